"""Starting a view: what must hold before, and the process that serves it.

There is one process and no supervisor: a view holds nothing that could be lost. When it is killed, the mount is left dead
(ENOTCONN, never a bare directory): umount it, and make it anew.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import shlex
import stat
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from encfs_js import fusemount, hygiene, logs, mount, presence, serverkeys
from encfs_js.backing import META, Backing
from encfs_js.errors import (
    CipherMissingError,
    EncfsError,
    FormatError,
    MountFailedError,
    MountpointError,
    NotAStoreError,
    StoreExistsError,
    WrongKeyError,
)
from encfs_js.inspect import open_file, walk
from encfs_js.keydocument import COPY, NAME
from encfs_js.mounts import FS_TYPE, VIEW_TYPE, find, mounts
from encfs_js.serverstore import Kind, place_of
from encfs_js.viewfs import serve
from encfs_js.viewtree import ViewTree, one_line

if TYPE_CHECKING:
    from collections.abc import Sequence

log: Final = logging.getLogger("encfs_js")
_LARGEST: Final = 128  # bytes that are read of a key file: more than one has


class KeyFile(NamedTuple):
    """A key file of nats-server, and what is in it."""

    path: bytes
    raw: bytes


def check(store: str, mountpoint: str) -> None:
    """Raise an EncfsError unless `store` is a directory that can be shown, and `mountpoint` one to show it at."""
    if not os.path.isdir(store):
        raise NotAStoreError(
            f"{store}: no such directory", hint="Name the directory that nats-server has as its store_dir."
        )
    if any(os.path.lexists(os.path.join(store, META, name)) for name in (NAME, COPY)):
        raise StoreExistsError(
            f"{store} is a store that encfs-js has sealed, not one that nats-server has encrypted itself",
            hint=f"encfs-js mount {shlex.quote(store)} {shlex.quote(mountpoint)}",
        )
    mount.check_store(store)
    if find(mountpoint, (FS_TYPE, VIEW_TYPE)) is not None:
        raise MountpointError(f"{mountpoint} is mounted already", hint=f"encfs-js umount {shlex.quote(mountpoint)}")
    mount.check_mountpoint(store, mountpoint)


def key_files(io: Backing, store: str) -> list[KeyFile]:
    """Read all key files that nats-server uses. What cannot be read is logged, and left out. Raises OSError."""
    found = []

    def failed(path: bytes, problem: OSError) -> None:
        log.warning("%s: %s", one_line(os.fsdecode(path)), problem.strerror)

    for entry in walk(io, store, failed):
        place = place_of(entry.path)
        if place.kind is not Kind.KEY or place.staged or not stat.S_ISREG(entry.status.st_mode):
            continue
        try:
            fd = open_file(io, entry)
            if fd is None:
                continue
            try:
                raw = bytearray(_LARGEST)
                found.append(KeyFile(entry.path, bytes(raw[: io.preadv(fd, [raw], 0)])))
            finally:
                io.close(fd)
        except OSError as problem:
            failed(entry.path, problem)
    return found


def check_keys(found: Sequence[KeyFile], keys: Sequence[bytes]) -> list[EncfsError]:
    """Open all key files. Returns what is wrong with those that do not open.

    Raises WrongKeyError when none opens and a wrong key is the reason, CipherMissingError when the host's OpenSSL is (FIPS).
    """
    problems: list[EncfsError] = []
    for path, raw in found:
        asset = place_of(path).asset
        assert asset is not None
        try:
            serverkeys.open_key_file(raw, asset, keys, os.fsdecode(path))
        except (FormatError, WrongKeyError, CipherMissingError) as problem:
            problems.append(problem)
    if found and len(problems) == len(found):
        for kind in (CipherMissingError, WrongKeyError):
            for reason in problems:
                if isinstance(reason, kind):
                    raise reason
    return problems


def show(
    store: str,
    mountpoint: str,
    keys: Sequence[bytes],
    problems: Sequence[EncfsError] = (),
    *,
    foreground: bool,
    allow_other: bool = False,
    log_file: str | None = None,
) -> int:
    """Mount and serve until unmounted; in the background: return 0 as soon as the view is served.

    problems: what the log is to begin with. Raises MountFailedError and OSError; then there is no mount.
    """
    store, mountpoint = os.path.realpath(store), os.path.realpath(mountpoint)
    logs.configure(log_file, foreground=foreground)
    for problem in problems:
        log.warning("%s", one_line(str(problem)))
    tree = ViewTree(Backing(), store, keys)
    try:
        fuse = fusemount.mount(mountpoint, _options(store, allow_other=allow_other))
    except fusemount.RefusedError as refused:
        raise MountFailedError(
            f"{mountpoint} cannot be mounted: {refused}",
            hint="Look at the permissions of the mountpoint and /dev/fuse.",
        ) from None
    if foreground:
        _serve(tree, fuse, mountpoint, None)
        return 0
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        os.close(fuse)
        return _await_start(reader, pid, mountpoint)
    code = 1
    try:
        os.close(reader)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.chdir("/")
        _serve(tree, fuse, mountpoint, writer)
        code = 0
    finally:
        os._exit(code)


def _await_start(reader: int, pid: int, mountpoint: str) -> int:
    with os.fdopen(reader, "rb") as file:
        if file.read() == b"ready":
            return 0
    os.waitpid(pid, 0)
    os.waitpid(fusemount.unmounting(mountpoint, lazy=True), 0)
    raise MountFailedError("the view died while it was starting", hint="try again with --foreground")


def _serve(tree: ViewTree, fuse: int, mountpoint: str, ready: int | None) -> None:
    """Be the process of the view. ready: is told when it serves."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # two an open file
    threading.stack_size(1 << 19)  # all of it is locked in memory
    gc.freeze()
    if problem := hygiene.lock_memory():
        log.warning("keys may reach the swap: memory cannot be locked: %s", problem)
    device = next((m.device for m in reversed(mounts()) if (m.mountpoint, m.fs_type) == (mountpoint, VIEW_TYPE)), "")

    served = False

    def answering() -> None:
        nonlocal served
        served = True
        log.info("%s is shown at %s", one_line(tree.store), one_line(mountpoint))
        if ready is not None:
            os.write(ready, b"ready")
            os.close(ready)

    try:
        serve(tree, fuse, mountpoint, device, answering, presence.listen(device))
    except BaseException:
        if not served:
            os.waitpid(fusemount.unmounting(mountpoint, lazy=True), 0)
        raise


def _options(store: str, *, allow_other: bool) -> str:
    name = store.replace("\\", "\\\\").replace(",", "\\,") if store.isascii() else "encfs_js"
    chosen = ["ro", "nosuid", "nodev", "noexec", "default_permissions", f"subtype={VIEW_TYPE.partition('.')[2]}"]
    return ",".join([*chosen, f"fsname={name}", *(["allow_other"] if allow_other else [])])
