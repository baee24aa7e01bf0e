"""Look at a store without a key: its keyring, and what the headers of its files say.

Nothing here is authenticated: a header can be forged, a length can lie. `verify` is the room that proves
something. The walk over a store's files, which both use, lives here. `census` says whose the files are.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from encfs_js.backing import META
from encfs_js.format import HEADER, MAGIC, PAGE, Header, page_length, plain_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from encfs_js.backing import Backing

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DEEPEST: Final = 256  # directories in each other, each of which takes a descriptor; nats-server needs nine


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a store. path: relative to the store. directory: open until the next entry is asked for."""

    path: bytes
    directory: int
    name: bytes
    status: os.stat_result


def walk(io: Backing, store: str, failed: Callable[[bytes, OSError], None]) -> Iterator[Entry]:
    """Yield everything in a store in the order of names, each hard linked file once; without `.encfs_js`.

    Symlinks are yielded and never followed, other file systems not entered. What goes away during the walk is
    left out; a directory or an entry that cannot be looked at is handed to `failed`, as is one that lies too deep. Raises
    OSError when the store cannot be opened.
    """
    seen: set[tuple[int, int]] = set()

    def below(directory: int, prefix: bytes, depth: int) -> Iterator[Entry]:
        try:
            names = sorted(io.listdir(directory))
        except OSError as problem:
            failed(prefix.rstrip(b"/"), problem)
            return
        for name in names:
            if not prefix and name == META.encode():
                continue
            path = prefix + name
            try:
                status = io.stat(name, dir_fd=directory, follow_symlinks=False)
                if status.st_dev != device:
                    raise OSError(errno.EXDEV, "another file system is mounted there")
                if stat.S_ISDIR(status.st_mode):
                    if depth == _DEEPEST:
                        raise OSError(errno.ELOOP, f"more than {_DEEPEST} directories in each other")
                    inner = io.open(name, _DIRECTORY, dir_fd=directory)
                    try:
                        yield Entry(path, directory, name, status)
                        yield from below(inner, path + b"/", depth + 1)
                    finally:
                        io.close(inner)
                    continue
            except OSError as problem:
                if problem.errno not in {errno.ENOENT, errno.ENOTDIR}:
                    failed(path, problem)
                continue
            if status.st_nlink > 1:
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
            yield Entry(path, directory, name, status)

    top = io.open(store, _DIRECTORY & ~os.O_NOFOLLOW)
    try:
        device = io.fstat(top).st_dev
        yield from below(top, b"", 0)
    finally:
        io.close(top)


def open_file(io: Backing, entry: Entry) -> int | None:
    """Open a regular file of the walk for reading; None when it went away or is another kind of file now."""
    try:
        fd = io.open(entry.name, _FILE, dir_fd=entry.directory)
    except OSError as problem:
        if problem.errno in {errno.ENOENT, errno.ELOOP, errno.ENXIO}:
            return None
        raise
    if stat.S_ISREG(io.fstat(fd).st_mode):
        return fd
    io.close(fd)
    return None


@dataclass(slots=True)
class Group:
    """Sealed files of one suite and epoch. plain: bytes as the last page of each claims."""

    files: int = 0
    pages: int = 0
    plain: int = 0

    @property
    def sealed(self) -> int:
        """Bytes on the disk."""
        return self.pages * PAGE


@dataclass(slots=True)
class Survey:
    """What a store holds. foreign: (path, why) of what encfs_js would not have left there. symlinks: their paths."""

    groups: dict[tuple[str, int], Group] = field(default_factory=dict)
    directories: int = 0
    empty: int = 0
    plaintext_files: int = 0
    plaintext_bytes: int = 0
    others: Counter[str] = field(default_factory=Counter)
    symlinks: list[bytes] = field(default_factory=list)
    foreign: list[tuple[bytes, str]] = field(default_factory=list)
    unreadable: list[tuple[bytes, str]] = field(default_factory=list)


class Seen(NamedTuple):
    """A regular file as its first and its last bytes show it. suite: None for one that is not sealed; plain: as claimed."""

    size: int
    plain: int
    suite: str | None = None
    epoch: int = 0


_KINDS: Final = {
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


def kind_of(mode: int) -> str:
    """Name a kind of file that holds no bytes."""
    return _KINDS.get(stat.S_IFMT(mode), "unknown")


def survey(
    io: Backing,
    store: str,
    epochs: frozenset[int] | None,
    *,
    plaintext: bool,
    each: Callable[[Entry, int, Seen | None], None] | None = None,
) -> Survey:
    """Count a store's files by suite and epoch, from two short reads each.

    epochs: those of the keyring, None without one. plaintext: whether the store may hold plaintext files. each: is told of every
    directory (-1, None) and of every regular file: its descriptor, and what was seen of it; an OSError that it raises counts as
    one of that file. Raises OSError when the store cannot be opened.
    """
    found = Survey()

    def failed(path: bytes, problem: OSError) -> None:
        found.unreadable.append((path, problem.strerror or "unreadable"))

    for entry in walk(io, store, failed):
        mode = entry.status.st_mode
        if stat.S_ISDIR(mode):
            found.directories += 1
            if each is not None:
                each(entry, -1, None)
        elif not stat.S_ISREG(mode):
            found.others[kind_of(mode)] += 1
            if stat.S_ISLNK(mode):
                found.symlinks.append(entry.path)
        else:
            try:
                fd = open_file(io, entry)
                if fd is None:
                    continue
                try:
                    seen = _count(io, fd, entry.path, found, epochs, plaintext=plaintext)
                    if each is not None:
                        each(entry, fd, seen)
                finally:
                    io.close(fd)
            except OSError as problem:
                failed(entry.path, problem)
    return found


def _count(io: Backing, fd: int, path: bytes, found: Survey, epochs: frozenset[int] | None, *, plaintext: bool) -> Seen:
    size = io.fstat(fd).st_size
    pages, rest = divmod(size, PAGE)
    start = bytearray(HEADER)
    start = start[: io.preadv(fd, [start], 0)]
    if not size:
        found.empty += 1
        return Seen(0, 0)
    if start[: len(MAGIC)] != MAGIC:
        found.plaintext_files += 1
        found.plaintext_bytes += size
        if not plaintext:
            found.foreign.append((path, "not sealed, and plaintext is refused"))
        return Seen(size, size)
    try:
        header = Header.parse(bytes(start))
    except ValueError:
        found.foreign.append((path, "its header is of no version that is known here"))
        return Seen(size, 0, "")
    if epochs is None:
        found.foreign.append((path, "sealed, and there is no keyring here"))
    elif header.epoch not in epochs:
        found.foreign.append((path, f"sealed in epoch {header.epoch}, which the keyring does not have"))
    if rest:
        found.foreign.append((path, f"{rest} bytes behind the last whole page"))
    group = found.groups.setdefault((header.suite.label, header.epoch), Group())
    group.files += 1
    group.pages += pages
    plain = 0
    if pages:
        last = bytearray(PAGE)
        if io.preadv(fd, [last], (pages - 1) * PAGE) == PAGE:
            plain = plain_size(pages, page_length(memoryview(last), pages - 1))
            group.plain += plain
    return Seen(size, plain, header.suite.label, header.epoch)
