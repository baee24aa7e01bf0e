"""The process that asks the kernel for write-behind and read-ahead on a mount (advice.py says why). Has no keys.

Run as a script, isolated: arguments are the number of a socket, the mountpoint, and the mount's st_dev. It ends when the worker
that started it does, or when it finds that the mount is not to be had from here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import struct
import sys
import time
from typing import Final

WORD: Final = "<BQ"  # what, inode; a path follows
GROW, DROP, FETCH = 1, 2, 3
STEP: Final = 1 << 20  # bytes: the largest request that FUSE makes
# 340 MB/s, the most that was seen, are 1 MiB in 3 ms.
_LOOK_MS: Final = 2
_IDLE: Final = 0.25  # seconds without growth after which a file is let go
_LONGEST: Final = 8192  # bytes of a word with its path
_SYNC_FILE_RANGE_WRITE: Final = 2
_libc: Final = ctypes.CDLL(None, use_errno=True)


class NotToBeHadError(Exception):
    """The mountpoint shows another file system here."""


class Growing:
    """A file that is written: `done` bytes of it were asked for, `size` was seen last, at `when`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.when = time.monotonic()
        self.size = os.fstat(fd).st_size
        self.done = self.size // STEP * STEP

    def look(self) -> bool:
        """Have the kernel write what is complete. Returns whether the file still grows."""
        size, now = os.fstat(self.fd).st_size, time.monotonic()
        if size != self.size:
            self.size, self.when = size, now
        whole = size // STEP * STEP
        if whole > self.done:
            start, length = ctypes.c_int64(self.done), ctypes.c_int64(whole - self.done)
            _libc.sync_file_range(self.fd, start, length, _SYNC_FILE_RANGE_WRITE)
            self.done = whole
        return now - self.when < _IDLE


def opened(mountpoint: bytes, device: int, path: bytes, ino: int) -> int:
    """Open a file of the mount; -1 when it is gone, or another one by now. Raises OSError, NotToBeHadError."""
    try:
        fd = os.open(os.path.join(mountpoint, path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return -1
    found = os.fstat(fd)
    if (found.st_dev, found.st_ino) == (device, ino):
        return fd
    os.close(fd)
    if found.st_dev != device:
        raise NotToBeHadError
    return -1


def fetch(fd: int) -> None:
    """Have the kernel read a file into its cache. It takes no more than its read-ahead at a time."""
    for at in range(0, os.fstat(fd).st_size, STEP):
        os.posix_fadvise(fd, at, STEP, os.POSIX_FADV_WILLNEED)


def advise(sock: socket.socket, mountpoint: bytes, device: int) -> None:
    """Do what the worker says until it has ended. Raises OSError, NotToBeHadError."""
    grown: dict[int, Growing] = {}
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while True:
        if poll.poll(_LOOK_MS if grown else None):
            word = sock.recv(_LONGEST)
            if not word:
                return
            what, ino = struct.unpack_from(WORD, word)
            path = word[struct.calcsize(WORD) :]
            if what == DROP and ino in grown:
                os.close(grown.pop(ino).fd)
            elif what == GROW and ino not in grown and (fd := opened(mountpoint, device, path, ino)) >= 0:
                grown[ino] = Growing(fd)
            elif what == FETCH and (fd := opened(mountpoint, device, path, ino)) >= 0:
                fetch(fd)
                os.close(fd)
        for ino, growing in list(grown.items()):
            if not growing.look():
                os.close(grown.pop(ino).fd)


def main() -> None:
    """Run the advisor."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    with contextlib.suppress(OSError, NotToBeHadError):  # nobody needs the advice
        advise(sock, os.fsencode(sys.argv[2]), int(sys.argv[3]))


if __name__ == "__main__":
    main()
