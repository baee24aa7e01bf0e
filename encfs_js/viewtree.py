"""The names and the plain contents of a store that nats-server has encrypted, as a view of it shows them; read only.

A node id is the backing inode number (the root is 1). What has several names, and what another file system has below the
store, gets one of its path instead: what a file holds depends on where it is. The table has what the kernel knows at the
moment, and is asked for nothing but paths; what is there is looked up every time, as nats-server may be at work on it.

Key files do not exist here. What cannot be decrypted is EIO when it is opened, and the log names it; a leftover (.tmp, .new),
which nats-server never reads, is not shown then. Symlinks are shown and never followed; another file system below the
store is shown as the directory or file that it is mounted on, and what is in it is EIO.

Synchronous, and safe to be called from several threads, apart from `read` of one handle. Names and paths are bytes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

from encfs_js.errors import EncfsError
from encfs_js.serverstore import Content, Kind, Place, open_content, place_of
from encfs_js.tree import ROOT, cookie

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from encfs_js.backing import Backing

log: Final = logging.getLogger("encfs_js")
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_AT: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_BY_PATH: Final = 1 << 63
_DEEPEST: Final = 4096
_AS_IT_LIES: Final = frozenset({Kind.OTHER, Kind.BLOCK, Kind.SUM})  # as many plain bytes as on the disk
_GROWING: Final = frozenset({Kind.OTHER, Kind.BLOCK})
_LARGE: Final = 256 << 10  # bytes that take a millisecond or more to read and decrypt
_TRIES: Final = 4

Identity = tuple[int, ...]
Version = tuple[Identity, Identity | None]


class Found(NamedTuple):
    """An entry. number: its node id. status: that of the backing file; size: plain bytes."""

    number: int
    generation: int
    status: os.stat_result
    size: int


class Handle:
    """An open file. `seen`: size and mtime of the file, `key`: what its key file was, when `content` was made of both."""

    __slots__ = ("content", "directory", "key", "name", "number", "path", "place", "seen")

    def __init__(
        self, number: int, directory: int, name: bytes, path: bytes, place: Place, content: Content, version: Version
    ) -> None:
        self.number = number
        self.directory = directory
        self.name = name
        self.path = path
        self.place = place
        self.content = content
        self.seen = _written(version[0])
        self.key = version[1]


class ViewTree:
    """The tree of one view. keys: the server's key and its previous one. Raises OSError when the store cannot be opened."""

    def __init__(self, io: Backing, store: str, keys: Sequence[bytes]) -> None:
        self.io = io
        self.store = store
        self.root_fd = io.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._keys = keys
        self._device = io.fstat(self.root_fd).st_dev
        self._names: dict[int, tuple[int, bytes]] = {}  # node id -> (that of its directory, name)
        self._counts: dict[int, int] = {}
        self._sizes: dict[int, tuple[Version, int | None]] = {}
        self._told: dict[bytes, Version | None] = {}

    # -- the table

    def remember(self, number: int, parent: int, name: bytes) -> None:
        """Note where a node is that the kernel is told of, once more."""
        self._names[number] = parent, name
        self._counts[number] = self._counts.get(number, 0) + 1

    def forget(self, number: int, count: int) -> None:
        """Note that the kernel has forgotten so many of those times."""
        left = self._counts.get(number, 0) - count
        if left > 0:
            self._counts[number] = left
        else:
            self._counts.pop(number, None)
            self._names.pop(number, None)
            self._sizes.pop(number, None)

    def parent(self, number: int) -> int:
        """Return the node id of a directory's directory, that of the root for the root."""
        return self._names.get(number, (ROOT, b""))[0]

    def _steps(self, number: int) -> list[bytes]:
        """Return the names that lead from the root to a node. Raises OSError ESTALE."""
        steps: list[bytes] = []
        while number != ROOT:
            if number not in self._names or len(steps) > _DEEPEST:  # that deep is a circle: directories were moved
                raise _error(errno.ESTALE)
            number, name = self._names[number]
            steps.append(name)
        return steps[::-1]

    @contextlib.contextmanager
    def _directory(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Open a directory, step by step so that no symlink is followed: (descriptor, path and a slash).

        Raises OSError: ESTALE when something else is there now.
        """
        steps = self._steps(number)
        fd = self.root_fd
        try:
            for name in steps:
                inner = self.io.open(name, _DIRECTORY, dir_fd=fd)
                if fd != self.root_fd:
                    self.io.close(fd)
                fd = inner
            path = b"".join(name + b"/" for name in steps)
            status = self.io.fstat(fd)
            if status.st_dev != self._device:
                self._tell(path[:-1], "another file system is mounted there, which the view does not enter")
                raise _error(errno.EIO)
            if number != ROOT and self._number(status, path[:-1]) != number:
                raise _error(errno.ESTALE)
            yield fd, path
        finally:
            if fd != self.root_fd:
                self.io.close(fd)

    def _number(self, status: os.stat_result, path: bytes) -> int:
        single = stat.S_ISDIR(status.st_mode) or status.st_nlink == 1
        if single and status.st_dev == self._device and status.st_ino != ROOT:
            return status.st_ino
        return _BY_PATH | cookie(path)

    # -- finding

    def lookup(self, parent: int, name: bytes, *, wait: bool = True) -> Found:
        """Find an entry of a directory. Raises OSError, BlockingIOError without `wait` when that takes long."""
        with self._directory(parent) as (fd, path):
            return self._find(fd, name, path + name, wait=wait)

    def stat(self, number: int, *, wait: bool = True) -> Found:
        """Look at a node that the kernel knows. Raises as `lookup` does, OSError ESTALE when something else is there now."""
        if number == ROOT:
            status = self.io.fstat(self.root_fd)
            return Found(ROOT, 0, status, status.st_size)
        *_, name = self._steps(number)
        found = self.lookup(self.parent(number), name, wait=wait)
        if found.number != number:
            raise _error(errno.ESTALE)
        return found

    def listing(self, number: int) -> list[bytes]:
        """Return the names in a directory, sorted, but for those of key files. Raises OSError."""
        with self._directory(number) as (fd, path):
            return sorted(name for name in self.io.listdir(fd) if place_of(path + name).kind is not Kind.KEY)

    def readlink(self, number: int) -> bytes:
        """Return the target of a symbolic link. Raises OSError."""
        *_, name = self._steps(number)
        with self._directory(self.parent(number)) as (fd, _):
            return os.fsencode(self.io.readlink(name, dir_fd=fd))

    def _find(self, fd: int, name: bytes, path: bytes, *, wait: bool) -> Found:
        place = place_of(path)
        if place.kind is Kind.KEY:
            raise _error(errno.ENOENT)
        status = self.io.stat(name, dir_fd=fd, follow_symlinks=False)
        number = self._number(status, path)
        size: int | None = status.st_size
        if stat.S_ISREG(status.st_mode) and status.st_dev == self._device:
            if place.kind not in _AS_IT_LIES or place.staged:
                size = self._plain_size(fd, name, path, place, number, wait=wait)
            if size is None:
                raise _error(errno.ENOENT)
        return Found(number, self.io.generation(fd, name), status, size or 0)

    def _plain_size(self, fd: int, name: bytes, path: bytes, place: Place, number: int, *, wait: bool) -> int | None:
        """Return a file's plain size: that on the disk if it cannot be had, None for a leftover that is not shown."""
        version = self._version(fd, name, place)
        if number in self._sizes and self._sizes[number][0] == version:
            return self._sizes[number][1]
        lies = version[0][2]
        if not wait and lies > _LARGE:
            raise BlockingIOError
        size: int | None = lies
        try:
            content = open_content(self.io, fd, name, path, self._keys, closely=False)
        except EncfsError as problem:
            if place.staged:
                size = None
                self._tell(path, "a leftover that is not shown", version, problem, level=logging.INFO)
        except OSError:
            return lies
        else:
            size = content.size
            content.close()
        self._sizes[number] = version, size
        return size

    def _version(self, fd: int, name: bytes, place: Place) -> Version:
        """Return what changes when a file or its key file does. Raises OSError when the file is not there."""
        own = _identity(self.io.stat(name, dir_fd=fd, follow_symlinks=False))
        return own, self._key_version(fd, place)

    def _key_version(self, fd: int, place: Place) -> Identity | None:
        if not place.key:
            return None
        try:
            return _identity(self.io.stat(place.key, dir_fd=fd, follow_symlinks=False))
        except FileNotFoundError:
            return None

    # -- contents

    def open(self, number: int, *, wait: bool = True) -> Handle:
        """Open a regular file. Raises OSError: EIO for what cannot be decrypted, BlockingIOError as `lookup` does."""
        *_, name = self._steps(number)
        with self._directory(self.parent(number)) as (fd, parent):
            path = parent + name
            place = place_of(path)
            status = self.io.stat(name, dir_fd=fd, follow_symlinks=False)
            if status.st_dev != self._device:
                self._tell(path, "another file system is mounted there, which the view does not enter")
                raise _error(errno.EIO)
            if not wait and place.kind is not Kind.OTHER and status.st_size > _LARGE:
                raise BlockingIOError
            content, version = self._content(fd, name, path, place)
            try:
                if self._number(self.io.fstat(content.fd), path) != number:
                    raise _error(errno.ESTALE)
                directory = self.io.open(b".", _AT, dir_fd=fd)
            except BaseException:
                content.close()
                raise
        return Handle(number, directory, name, path, place, content, version)

    def close(self, handle: Handle) -> None:
        """Close an open file."""
        handle.content.close()
        self.io.close(handle.directory)

    def read(self, handle: Handle, offset: int, size: int, *, wait: bool = True) -> bytes | memoryview:
        """Return plain bytes, fewer than `size` only at the end. Raises OSError, BlockingIOError as `lookup` does.

        A file that is decrypted as a whole stays as it was when it was opened. A block is read where it lies, and nats-server
        may give it another key meanwhile: what was read is only given out if the key file is still the same. It is not looked
        through for records that some versions append in the clear, which would take reading all of it: they do not match
        their hash here, as they do not for nats-server itself.
        """
        if handle.place.kind not in _GROWING:
            return handle.content.read(offset, size)
        if not wait and size > _LARGE:
            raise BlockingIOError
        renewed = False
        for _ in range(_TRIES):
            data = handle.content.read(offset, size)
            now = _written(_identity(self.io.fstat(handle.content.fd)))
            within = renewed or offset + size <= handle.content.size
            if now == handle.seen or (within and self._only_grew(handle, now)):
                return data
            self._renew(handle, now, wait=wait)
            renewed = True
        self._tell(handle.path, "changes too fast to be read")
        raise _error(errno.EIO)

    def _only_grew(self, handle: Handle, now: Identity) -> bool:
        """Tell whether what was there when a file was opened is what is there now, with the same key."""
        if handle.place.kind is Kind.OTHER:
            return True
        return now[0] >= handle.content.size > 0 and self._key_version(handle.directory, handle.place) == handle.key

    def _renew(self, handle: Handle, now: Identity, *, wait: bool) -> None:
        """Go on with a file that has changed: grown, or written anew, with another key perhaps."""
        if handle.place.kind is Kind.OTHER:
            handle.content.size, handle.seen = now[0], now
            return
        if not wait and now[0] > _LARGE:
            raise BlockingIOError
        content, version = self._content(handle.directory, handle.name, handle.path, handle.place)
        if self.io.fstat(content.fd).st_ino != self.io.fstat(handle.content.fd).st_ino:
            content.close()  # it has no name any more, and nobody knows with what key it was written last
            raise _error(errno.ESTALE)
        handle.content.close()
        handle.content, handle.seen, handle.key = content, _written(version[0]), version[1]

    def _content(self, fd: int, name: bytes, path: bytes, place: Place) -> tuple[Content, Version]:
        """Decrypt a file; again, when it or its key file was replaced meanwhile. Raises OSError."""
        for _ in range(_TRIES):
            version = self._version(fd, name, place)
            try:
                return open_content(self.io, fd, name, path, self._keys, closely=False), version
            except EncfsError as exc:
                problem = exc
                if self._version(fd, name, place) == version:
                    break
        self._tell(path, "cannot be decrypted, reads fail with EIO", version, problem)
        raise _error(errno.EIO)

    def _tell(
        self,
        path: bytes,
        text: str,
        version: Version | None = None,
        problem: EncfsError | None = None,
        level: int = logging.ERROR,
    ) -> None:
        """Log what is wrong with a file, once for each version of it."""
        if path in self._told and self._told[path] == version:
            return
        self._told[path] = version
        shown = os.fsdecode(path)
        why = "" if problem is None else ": " + str(problem).removeprefix(f"{shown}: ")
        log.log(level, "%s", one_line(f"{shown}: {text}{why}"))


def one_line(text: str) -> str:
    """Return a text with what is not printable escaped: names come from the store, and a log has lines."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _written(identity: Identity) -> Identity:
    """Return of it what changes with the content, and not with the names."""
    return identity[2:4]


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
