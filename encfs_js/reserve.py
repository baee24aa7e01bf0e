"""Room on the disk for what the kernel has accepted but not handed over yet.

With the writeback cache a write(2) succeeds before the disk is asked. Two things keep such a promise when the disk fills up:

- Before a file is opened for writing through the cache there must be room for what all files opened so may still take: up
  to the next multiple of 8 MiB each, the largest message block of nats-server. When there is not, the file is opened with
  direct I/O: every write then reaches the disk, or its error the writer, as on a plain directory.
- `.encfs_js/reserve` holds some space against everything else (other writers on the disk, files that grow on and on). It
  is given up when a cached write finds the disk full, and taken again when there is room.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.backing import Backing
    from encfs_js.tree import Node

GROWTH: Final = 8 << 20
SLACK: Final = 4 << 20
_LEAST: Final = 1 << 20
_MOST: Final = 64 << 20
_PIECE: Final = 64 << 10

T = TypeVar("T")


def still_to_come(sealed_size: int) -> int:
    """Return how many bytes a file opened through the cache may still take before somebody asks again."""
    return GROWTH - sealed_size % GROWTH + sealed_size % GROWTH // 64


class Reserve:
    """The reserve of one mounted store. `meta_fd`: `.encfs_js`, open."""

    def __init__(self, io: Backing, meta_fd: int) -> None:
        self._io = io
        self._fd = io.open(b"reserve", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=meta_fd)
        disk = io.statvfs(self._fd)
        self.size = min(max(disk.f_blocks * disk.f_frsize // 64, _LEAST), _MOST)
        self.held = io.fstat(self._fd).st_size > 0
        self.refill()

    def available(self) -> int:
        """Return the bytes that the disk has free for us, the reserve not counted."""
        disk = self._io.statvfs(self._fd)
        return disk.f_bavail * disk.f_frsize

    def refill(self) -> None:
        """Take the reserve if it is not held and there is room for it twice."""
        if self.held or self.available() < 2 * self.size + SLACK:
            return
        try:
            self._io.fallocate(self._fd, 0, 0, self.size)
            self.held = True
        except OSError as exc:
            if exc.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EOPNOTSUPP}:
                raise
            self._io.ftruncate(self._fd, 0)

    def give_up(self) -> bool:
        """Give the space back to the disk. Returns whether there was any."""
        held, self.held = self.held, False
        if held:
            self._io.ftruncate(self._fd, 0)
        return held

    def make_room_for(self, action: Callable[[], T]) -> T:
        """Do what writes a file of our own; on a full disk once more, with a piece of the reserve."""
        try:
            return action()
        except OSError as exc:
            size = self._io.fstat(self._fd).st_size
            if exc.errno not in {errno.ENOSPC, errno.EDQUOT} or not size:
                raise
            self._io.ftruncate(self._fd, max(0, size - _PIECE))
        return action()

    def close(self) -> None:
        """Close the file; the space stays taken."""
        self._io.close(self._fd)


class Promises:
    """What files that are written through the kernel's cache may still take of the disk. writers: their nodes, open."""

    def __init__(self, io: Backing, reserve: Reserve) -> None:
        self._io = io
        self._reserve = reserve
        self.writers: set[Node] = set()

    def has_room_for(self, node: Node) -> bool:
        """Tell whether one more file, which is open, may be written through the cache."""
        self._reserve.refill()
        free = self._reserve.available() - SLACK
        return free > (len(self.writers) + 1) * still_to_come(0) or free > self._promised({*self.writers, node})

    def leave_room(self, node: Node, growth: int) -> None:
        """Refuse a direct write of `growth` more bytes that would take room promised to others. Raises OSError ENOSPC."""
        others = self.writers - {node}
        if growth > 0 and others and self._reserve.available() < self._promised(others) + growth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def leave_room_beside(self, size: int) -> None:
        """Refuse a copy of `size` bytes that would take room promised to anybody. Raises OSError ENOSPC."""
        if self._reserve.available() - SLACK < self._promised(self.writers) + size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _promised(self, writers: set[Node]) -> int:
        # One that a worker before this one has opened may be closed here: then the most that a file may still take.
        return sum(still_to_come(self._io.fstat(node.fd).st_size if node.fd >= 0 else 0) for node in writers)
