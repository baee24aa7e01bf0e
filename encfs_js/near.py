"""Files of a directory tree by their path, opened without following anything on the way; the walk, in portions of such paths."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeVar

from encfs_js.inspect import walk
from encfs_js.pool import MAX_TASK, pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from encfs_js.backing import Backing
    from encfs_js.meter import Meter

_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GONE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})
_MOST_FILES: Final = 64
_MOST_BYTES: Final = 4 << 20


class Near:
    """A tree whose files are opened by path. The directory that was asked for last stays open: the next file is likely there."""

    def __init__(self, io: Backing, top: str) -> None:
        self._io = io
        self._top = io.open(top, _DIRECTORY & ~os.O_NOFOLLOW)
        self._last: tuple[bytes, int] = b"", self._top

    def directory(self, path: bytes) -> int:
        """Return a directory, open until the next one is asked for. Raises OSError."""
        if self._last[0] != path:
            self.leave()
            fd = self._top
            for name in path.split(b"/") if path else []:
                try:
                    inner = self._io.open(name, _DIRECTORY, dir_fd=fd)
                finally:
                    if fd != self._top:
                        self._io.close(fd)
                fd = inner
            self._last = path, fd
        return self._last[1]

    def file(self, path: bytes) -> int | None:
        """Open a regular file for reading; None when there is none. Raises OSError."""
        parent, _, name = path.rpartition(b"/")
        try:
            fd = self._io.open(name, _FILE, dir_fd=self.directory(parent))
        except OSError as problem:
            if problem.errno in _GONE:
                return None
            raise
        if stat.S_ISREG(self._io.fstat(fd).st_mode):
            return fd
        self._io.close(fd)
        return None

    def names(self, path: bytes) -> list[bytes]:
        """Return what is in a directory, in no order; nothing where that cannot be told."""
        try:
            return self._io.listdir(self.directory(path))
        except OSError:
            return []

    def leave(self) -> None:
        """Close the directory that is open."""
        if self._last[1] != self._top:
            self._io.close(self._last[1])
        self._last = b"", self._top

    def close(self) -> None:
        """Close what is open."""
        self.leave()
        self._io.close(self._top)


def portions(io: Backing, store: str, failed: Callable[[bytes, OSError], None]) -> Iterator[list[bytes]]:
    """Walk a store, and yield the paths of its regular files in portions that are worth handing over to a process."""
    paths: list[bytes] = []
    length = size = 0
    for entry in walk(io, store, failed):
        if not stat.S_ISREG(entry.status.st_mode):
            continue
        if paths and length + len(entry.path) + 16 > MAX_TASK:
            yield paths
            paths, length, size = [], 0, 0
        paths.append(entry.path)
        length += len(entry.path) + 16
        size += entry.status.st_size
        if len(paths) == _MOST_FILES or size >= _MOST_BYTES:
            yield paths
            paths, length, size = [], 0, 0
    if paths:
        yield paths


class Report(Protocol):
    """What came of files: `add` takes in what came of others."""

    files: int

    def add(self, other: Self) -> None:
        """Take in another report."""


R = TypeVar("R", bound=Report)


def spread(
    io: Backing,
    store: str,
    work: Callable[[list[bytes]], R],
    report: R,
    jobs: int,
    meter: Meter,
    failed: Callable[[bytes, OSError], None],
    show: Callable[[dict[str, Any]], None] | None,
) -> None:
    """Have `jobs` processes work on the paths of all regular files of a store, and add what comes of it to the report.

    show: told now and then how far it is, in the words of reencrypt.Progress. Raises what `pool` does, OSError.
    """
    with pool(work, jobs, meter.take) as hand_out:
        progress = {"state": "verifying"} | (totals(io, store) if show is not None else {})
        for part in hand_out(portions(io, store, failed)):
            report.add(part)
            if show is not None:
                show(progress | {"files_done": report.files, "bytes_done": meter.total})


def totals(io: Backing, store: str) -> dict[str, int]:
    """Count the regular files of a store and their bytes, as somebody who shows progress needs it."""
    sizes = [e.status.st_size for e in walk(io, store, lambda *_: None) if stat.S_ISREG(e.status.st_mode)]
    return {"files": len(sizes), "bytes": sum(sizes)}
