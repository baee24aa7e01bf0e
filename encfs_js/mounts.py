"""What the kernel has mounted, from /proc/self/mountinfo: to ask the mount itself is to wait for who serves it."""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

log: Final = logging.getLogger("encfs_js")
FS_TYPE: Final = "fuse.encfs_js"
VIEW_TYPE: Final = "fuse.encfs_js_view"  # shows what nats-server has encrypted, read-only
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")


class MountEntry(NamedTuple):
    """One mounted file system. device: "major:minor"; source: for ours, the store's path; user: who serves it, of FUSE."""

    device: str
    mountpoint: str
    fs_type: str
    source: str
    read_only: bool
    user: int | None = None


def mounts() -> list[MountEntry]:
    """Return what is mounted, in the kernel's order: of several at one mountpoint the last one is in sight."""
    entries = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, right = line.rstrip("\n").split(" - ", 1)
            fields, kind = left.split(" "), right.split(" ")
            options = {*fields[5].split(","), *kind[2].split(",")}
            user = next((int(o[8:]) for o in options if o.startswith("user_id=")), None)
            entries.append(
                MountEntry(fields[2], unescape(fields[4]), kind[0], unescape(kind[1]), "ro" in options, user)
            )
    return entries


def unescape(text: str) -> str:
    """Undo the escapes in a path of mountinfo."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)


def find(mountpoint: str, types: Collection[str] = (FS_TYPE,)) -> MountEntry | None:
    """Return the mount of ours, of one of these types, that is in sight at `mountpoint`, or None. Does not touch the mount."""
    plain = os.path.abspath(mountpoint)
    # The last part of the path is left alone if it can be: to look at a mountpoint is to ask who serves it.
    parent, name = os.path.split(plain)
    table = mounts()
    for path in (os.path.join(os.path.realpath(parent), name), plain):
        there = [entry for entry in table if entry.mountpoint == path]
        if there:
            return there[-1] if there[-1].fs_type in types else None
    real = os.path.realpath(plain)
    there = [entry for entry in table if entry.mountpoint == real]
    return there[-1] if there and there[-1].fs_type in types else None


def mountpoint_of(device: str) -> str:
    """Return where a file system is mounted now, which is elsewhere when a directory above it was moved; "" for nowhere."""
    return next((entry.mountpoint for entry in mounts() if entry.device == device), "")


def find_store(store: str, mountpoint: str) -> MountEntry | None:
    """Return the mount of `store`, the one at `mountpoint` if there are several, or None. Does not touch the mount."""
    source = os.path.realpath(store)
    parent, name = os.path.split(os.path.abspath(mountpoint))
    wanted = os.path.join(os.path.realpath(parent), name)
    ours = [entry for entry in mounts() if entry.fs_type == FS_TYPE and entry.source == source]
    return next((entry for entry in ours if entry.mountpoint == wanted), ours[0] if ours else None)


def tune(mountpoint: str) -> int | None:
    """Allow larger reads and more requests at a time where we may (root); 128 KiB reads become 1 MiB reads.

    Returns the mount's st_dev, None where it is not to be seen from here. Not before FUSE_INIT is answered: the answer sets
    it all anew.
    """
    device = next((m.device for m in mounts() if m.mountpoint == mountpoint and m.fs_type == FS_TYPE), None)
    if device is None:
        return None
    minor = device.split(":")[1]
    for path, value in (
        (f"/sys/class/bdi/{device}/read_ahead_kb", "1024"),
        (f"/sys/fs/fuse/connections/{minor}/max_background", "64"),
        (f"/sys/fs/fuse/connections/{minor}/congestion_threshold", "48"),
    ):
        try:
            with open(path, "w", encoding="ascii") as file:
                file.write(value)
        except OSError as exc:
            log.debug("%s: %s", path, exc.strerror)
    return os.makedev(*map(int, device.split(":")))
