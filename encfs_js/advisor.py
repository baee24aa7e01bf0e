"""The process that asks the kernel for write-behind and read-ahead on a mount (advice.py says why). Has no keys.

Run as a script, isolated. Arguments: the number of a socket, the mountpoint, the mount's st_dev, and who starts it. It ends when
that worker does, or when it finds that the mount is not to be had from here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
from typing import Final

WORD: Final = "<BQ"  # what, inode; a path follows
GROW, DROP, FETCH = 1, 2, 3
LONGEST: Final = 4096  # bytes of a path
# 340 MB/s, the most that was seen, are 1 MiB, the largest request that FUSE makes, in 3 ms. Saturated publish, 512 bytes, aes, of
# plain: 0.79 with 1 MiB and a look every 2 ms; 0.77 with 1 MiB and 4 ms; 0.76 with 2 MiB and 4 ms; 0.72 without any of it.
STEP: Final = 1 << 20  # bytes
MOST: Final = 16 << 20  # bytes that are fetched of one file; nats-server's largest block has 8 MiB
_LOOK_MS: Final = 2
_IDLE: Final = 0.25  # seconds without growth after which a file is not looked at any more
# What tells our own opening from others'. Nobody else has a reason to open a regular file so.
MARK: Final = os.O_NONBLOCK
_PR_SET_PDEATHSIG: Final = 1
_SYNC_FILE_RANGE_WRITE: Final = 2
_libc: Final = ctypes.CDLL(None, use_errno=True)


class NotToBeHadError(Exception):
    """The mountpoint shows another file system here."""


class Growing:
    """A file that is written. size, when: what was seen last, and when it changed; done: how far it was asked for."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.when = time.monotonic()
        self.size = self.done = 0  # what is clean costs nothing to ask for

    def look(self) -> bool:
        """Have the kernel write what is complete. Returns whether the file still grows. Raises OSError."""
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
    """Open a regular file of the mount; -1 when it is gone, or another one by now. Raises OSError, NotToBeHadError.

    A path can lead anywhere by now, and to open what lies there could do anything. So first it is only found, and looked at.
    """
    try:
        place = os.open(os.path.join(mountpoint, path), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    try:
        found = os.fstat(place)
        if found.st_dev != device:
            if os.stat(mountpoint).st_dev != device:
                raise NotToBeHadError
            return -1
        if found.st_ino != ino or not stat.S_ISREG(found.st_mode):
            return -1
        return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC | MARK)
    finally:
        os.close(place)


def read_ahead(device: int) -> int:
    """Return how many bytes the kernel reads ahead on a mount: it takes no more at a time."""
    path = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    with contextlib.suppress(OSError, ValueError), open(path, encoding="ascii") as file:
        return max(4096, min(int(file.read()) << 10, STEP))
    return 128 << 10


def fetch(fd: int, step: int) -> None:
    """Have the kernel read a file into its cache, `step` bytes at a time. Raises OSError."""
    for at in range(0, min(os.fstat(fd).st_size, MOST), step):
        os.posix_fadvise(fd, at, step, os.POSIX_FADV_WILLNEED)


class Advisor:
    """What one advisor has open: all files that are written in bulk, by inode, and which of them grow.

    A file stays open until nobody writes it any more. Closing writes back all that is dirty and takes note of its errors, which
    are the writer's to hear.
    """

    def __init__(self, mountpoint: bytes, device: int) -> None:
        self._mountpoint = mountpoint
        self._device = device
        self._open: dict[int, Growing] = {}
        self._grow: set[int] = set()
        self._unborn: dict[int, tuple[bytes, float]] = {}  # paths that were not there, and until when to try
        self._step = read_ahead(device)

    @property
    def busy(self) -> bool:
        """Whether there is something to look at."""
        return bool(self._grow or self._unborn)

    def obey(self, word: bytes) -> None:
        """Do what the worker says. Raises OSError, NotToBeHadError."""
        what, ino = struct.unpack_from(WORD, word)
        path = word[struct.calcsize(WORD) :]
        if what == DROP:
            self._grow.discard(ino)
            self._unborn.pop(ino, None)
            if ino in self._open:
                os.close(self._open.pop(ino).fd)
        elif what == GROW and ino in self._open:
            self._open[ino].when = time.monotonic()
            self._grow.add(ino)
        elif what == GROW:
            self._unborn[ino] = path, time.monotonic() + _IDLE
        elif (fd := opened(self._mountpoint, self._device, path, ino)) >= 0:
            try:
                fetch(fd, self._step)
            finally:
                os.close(fd)

    def look(self) -> None:
        """See to the files that grow. Raises NotToBeHadError."""
        for ino, (path, until) in list(self._unborn.items()):
            # We are told before the one who makes the file has his answer: until then the kernel may say that there is none.
            try:
                fd = opened(self._mountpoint, self._device, path, ino)
            except OSError:
                del self._unborn[ino]
                continue
            if fd >= 0:
                self._open[ino] = Growing(fd)
                self._grow.add(ino)
            if fd >= 0 or time.monotonic() > until:
                del self._unborn[ino]
        for ino in list(self._grow):
            grows = False
            with contextlib.suppress(OSError):
                grows = self._open[ino].look()
            if not grows:
                self._grow.discard(ino)


def advise(sock: socket.socket, mountpoint: bytes, device: int) -> None:
    """Do what the worker says until it has ended. What cannot be done is left: nobody needs it. Raises NotToBeHadError."""
    advisor = Advisor(mountpoint, device)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while True:
        said = poll.poll(_LOOK_MS if advisor.busy else None)
        word = sock.recv(LONGEST + struct.calcsize(WORD)) if said else b""
        if said and not word:
            return
        if word:
            with contextlib.suppress(OSError):
                advisor.obey(word)
        advisor.look()


def main() -> None:
    """Run the advisor."""
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGHUP,
    ):  # the worker, which must not die of them, ignores them
        signal.signal(number, signal.SIG_DFL)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[4]):
        return
    with contextlib.suppress(OSError, NotToBeHadError):
        advise(socket.socket(fileno=int(sys.argv[1])), os.fsencode(sys.argv[2]), int(sys.argv[3]))


if __name__ == "__main__":
    main()
