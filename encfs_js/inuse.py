"""Who uses a directory: mounts of ours, processes with something open below it, and a nats-server that is set to it.

nats-server takes no lock, and an idle one has no file of its store open, so its command line and configuration file are read,
too. What this user may not look at (/proc of other users) is not seen. No file system is asked for anything that could hang
on a dead mount: links, maps and fdinfo in /proc are answered by the kernel alone. In a container the same file has another
path, so open files are also told by device and inode number.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING, Final, NamedTuple

from encfs_js import state
from encfs_js.errors import StoreBusyError
from encfs_js.mounts import MountEntry, mounts, unescape

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_DEFAULT: Final = "nats"  # in the directory for temporary files, where no store_dir is given
_STORE: Final = re.compile(r"""(?im)\bstore(?:_?dir)?\b["']?\s*[:=\s]\s*("[^"\n]*"|'[^'\n]*'|[^\s,;{}#]+)""")
_JETSTREAM: Final = re.compile(r"""(?im)^\s*["']?jetstream\b""")
_INCLUDE: Final = re.compile(r"""(?im)^\s*include\s+("[^"\n]*"|'[^'\n]*'|\S+)""")
_COMMENT: Final = re.compile(r"(?m)(^|\s)(#|//).*$")
_MAPPED: Final = re.compile(r"^\S+ \S+ \S+ (\S+) (\d+)\s*(.*)$")
_MOST: Final = 1 << 20  # bytes of a configuration file, and includes in one another
_DEPTH: Final = 8


class User(NamedTuple):
    """A process that uses the directory, and how."""

    pid: int
    name: str
    how: str


def check_unused(directory: str, inodes: Collection[int] = (), *, lock: bool = True) -> None:
    """Raise StoreBusyError, which says who uses the directory, if somebody does.

    inodes: of what is in it. lock: whether the lock of a sealed store counts, too; no for who holds it.
    """
    real = os.path.realpath(directory)
    if lock and (who := state.holder(real)) is not None:
        at = f" at {who['mountpoint']}" if who.get("mountpoint") else ""
        raise StoreBusyError(
            f"{directory} is in use by process {who.get('pid', '(unknown)')}{at} since {who.get('since', '(unknown)')}",
            hint=f"encfs-js umount {shlex.quote(str(who.get('mountpoint') or 'MOUNTPOINT'))}",
        )
    for entry in mounts():
        if entry.fs_type.startswith("fuse.encfs") and (
            _is_below(entry.mountpoint, real) or (entry.source and _is_below(entry.source, real))
        ):
            raise StoreBusyError(
                f"{directory} is in use: {entry.source} is mounted at {entry.mountpoint}",
                hint=f"encfs-js umount {shlex.quote(entry.mountpoint)}",
            )
    for user in users(real, inodes):
        raise StoreBusyError(
            f"{directory} is in use by process {user.pid} ({user.name}): {user.how}",
            hint="Stop nats-server, and repeat the command."
            if "nats" in user.name
            else f"Wait for it, or stop it, and repeat the command. All of them: fuser -vm {shlex.quote(directory)}",
        )


def users(directory: str, inodes: Collection[int] = (), proc: str = "/proc") -> Iterator[User]:
    """Yield the processes that use a directory (a real path), this one and the shells it was called from left out."""
    device = _device(os.path.join(proc, "self"), directory)
    ours = _ancestors(proc)
    for name in sorted(filter(str.isdecimal, os.listdir(proc)), key=int):
        if int(name) in ours:
            continue
        path = os.path.join(proc, name)
        comm = _text(os.path.join(path, "comm")).strip()
        how = (
            _cwd(path, directory)
            or _open_file(path, directory, inodes, device)
            or _mapped(path, directory, inodes, device)
        )
        if not how and "nats" in comm:
            how = _configured(path, directory)
        if how:
            yield User(int(name), comm, how)


def _is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(_MOST)
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path).removesuffix(" (deleted)")
    except OSError:
        return ""


def _ancestors(proc: str) -> set[int]:
    found: set[int] = set()
    pid = os.getpid()
    while pid > 1 and pid not in found:
        found.add(pid)
        fields = _text(os.path.join(proc, str(pid), "stat")).rpartition(")")[2].split()
        pid = int(fields[1]) if len(fields) > 1 else 0
    return found


# -- open files


def _cwd(path: str, directory: str) -> str:
    at = _link(os.path.join(path, "cwd"))
    return f"it stands in {at}" if at and _is_below(at, directory) else ""


def _open_file(path: str, directory: str, inodes: Collection[int], device: str) -> str:
    fds = os.path.join(path, "fd")
    try:
        names = os.listdir(fds)
    except OSError:
        return ""
    devices: dict[str, str] | None = None
    for name in names:
        target = _link(os.path.join(fds, name))
        if not target.startswith("/"):
            continue  # a socket, a pipe
        if _is_below(target, directory):
            return f"it has {target} open"
        info = dict(
            line.split(":\t", 1) for line in _text(os.path.join(path, "fdinfo", name)).splitlines() if ":\t" in line
        )
        if info.get("ino", "").strip().isdecimal() and int(info["ino"]) in inodes:
            if devices is None:
                devices = {fields[0]: fields[2] for fields in _mountinfo(path)}
            if devices.get(info.get("mnt_id", "").strip(), "") == device:
                return f"it has {target} open"
    return ""


def _mapped(path: str, directory: str, inodes: Collection[int], device: str) -> str:
    for line in _text(os.path.join(path, "maps")).splitlines():
        found = _MAPPED.match(line)
        if found is None or found[2] == "0":
            continue
        major, _, minor = found[1].partition(":")
        same = f"{int(major, 16)}:{int(minor, 16)}" == device and int(found[2]) in inodes
        if same or _is_below(found[3], directory):
            return f"it has {found[3]} mapped"
    return ""


def _mountinfo(path: str) -> list[list[str]]:
    """Return the fields of a process's mounts: id, parent, device, root, mountpoint, options..., -, type, source, ..."""
    lines = _text(os.path.join(path, "mountinfo")).splitlines()
    return [[unescape(field) for field in line.split(" ")] for line in lines]


def _mount_of(path: str, directory: str) -> list[str]:
    there = [fields for fields in _mountinfo(path) if len(fields) > 4 and _is_below(directory, fields[4])]
    return max(there, key=lambda fields: len(fields[4]), default=[])


def _device(path: str, directory: str) -> str:
    fields = _mount_of(path, directory)
    return fields[2] if fields else ""


# -- a nats-server that has nothing open


def _configured(path: str, directory: str) -> str:
    """Tell how a nats-server is set to the directory, or to one in or above it; empty if it is not."""
    arguments = [a for a in _text(os.path.join(path, "cmdline")).split("\0")[1:] if a]
    at = _link(os.path.join(path, "cwd")) or "/"
    given, config, jetstream = "", "", False
    for i, argument in enumerate(arguments):
        if not argument.startswith("-"):
            continue
        option, _, value = argument.lstrip("-").partition("=")
        value = value or (arguments[i + 1] if i + 1 < len(arguments) else "")
        match option:
            case "sd" | "store_dir":
                given = value
            case "c" | "config":
                config = value
            case "js" | "jetstream":
                jetstream = True
    stores = [given] if given else []
    if config and not given:
        text = _configuration(path, os.path.join(at, config), _DEPTH)
        stores = [_unquoted(found, text) for found in _STORE.findall(text)]
        jetstream |= bool(_JETSTREAM.search(text))
    if not stores and jetstream:
        stores = [os.path.join("/tmp", _DEFAULT)]  # noqa: S108  nats-server's own default
    for store in stores:
        full = os.path.normpath(os.path.join(at, store))
        if _is_same(path, full, directory):
            return f"its store_dir is {store}"
    return ""


def _configuration(path: str, file: str, depth: int) -> str:
    """Return a configuration file as the process sees it, with what it includes, without comments."""
    text = _COMMENT.sub("", _text(_rooted(path, file)))
    if depth:
        for name in _INCLUDE.findall(text):
            text += "\n" + _configuration(path, os.path.join(os.path.dirname(file), name.strip("\"'")), depth - 1)
    return text


def _unquoted(value: str, text: str) -> str:
    """Return the value of store_dir: in quotes, bare, or of a variable that is set in the file."""
    if value.startswith("$"):
        found = re.search(rf"(?m)^\s*{re.escape(value[1:])}\s*[:=\s]\s*(\"[^\"\n]*\"|'[^'\n]*'|[^\s,;]+)", text)
        value = found[1] if found else value
    return value.strip("\"'")


def _rooted(path: str, file: str) -> str:
    root = os.path.join(path, "root")
    return file if _link(root) in {"/", ""} else root + file


def _is_same(path: str, store: str, directory: str) -> bool:
    """Tell whether a store_dir, as the process sees it, is the directory, or one lies in the other."""
    if _link(os.path.join(path, "root")) not in {"/", ""} or _in_other_namespace(path):
        mount = _mount_of(path, store)
        if not mount or any(word.startswith("fuse") for word in mount[mount.index("-") :][:2]):
            return False  # a dead mount would not answer
        try:
            there = os.stat(os.path.join(path, "root") + store)
            here = os.stat(directory)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
    for each in {store, _real(store)}:
        if _is_below(each, directory) or _is_below(directory, os.path.join(each, "jetstream")):
            return True
    return False


def _in_other_namespace(path: str) -> bool:
    theirs = _link(os.path.join(path, "ns", "mnt"))
    return bool(theirs) and theirs != _link("/proc/self/ns/mnt")


def _real(path: str) -> str:
    """Resolve symlinks without looking into a mount of FUSE, which may be dead."""
    within = [entry for entry in mounts() if _is_below(path, entry.mountpoint)]
    below: MountEntry | None = max(within, key=lambda entry: len(entry.mountpoint), default=None)
    return path if below is not None and below.fs_type.startswith("fuse") else os.path.realpath(path)
