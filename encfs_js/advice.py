"""What the kernel is asked to do on our own mount before nats-server would have to wait for it; the half in the worker.

Two things made nats-server wait for us that we could have done before. When it closes a full message block, close(2) hands
over all 8 MiB at once and waits until they are sealed. And when it reads blocks in a row it waits for each to be opened. The
kernel does both earlier if somebody asks: sync_file_range(2) on a file that grows, posix_fadvise(2) on the block that comes next.
So what is dirty reaches the disk earlier, and a damaged page may be found, and the guard closed, one block before it is read.

The asking needs a descriptor of the mount, and whoever has one must not be a process that the mount needs: closing it may wait
for us, also when the process ends. So a process of its own has it (advisor.py), which has no keys and which nobody waits for.
It has files open only while they are written in bulk, or for the moment of a read: a mount with open files cannot be unmounted.
Where the mountpoint is not to be seen, or its files may not be opened (another mount namespace, another user), nothing comes of
it; so it is under the systemd unit, where nats-server has a user of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final

from encfs_js import advisor

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.tree import Node

log: Final = logging.getLogger("encfs_js")

# A WRITE of so many bytes comes from a file that is written fast: a slow one is synced, or its pages have aged, before.
BULK: Final = 512 << 10  # bytes
RECENT: Final = 1.0  # seconds: how long a directory counts as written or read in bulk
MOST: Final = 1000  # directories that are remembered; then those of long ago are forgotten
_END: Final = 1.0  # seconds that its end may take
_BLOCK: Final = re.compile(rb"([1-9][0-9]{0,18})\.blk")


class Advice:
    """The advice of one mount. Costs microseconds a request, and nothing of it may make a request fail.

    path: returns a node's path in the store. writeback: whether the kernel collects writes. clock: seconds, for tests.
    """

    def __init__(
        self, path: Callable[[Node], bytes], *, writeback: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._writeback = writeback
        self._clock = clock
        self._sock: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._written: dict[int, float] = {}  # directory: when a file in it was written in bulk
        self._opened: dict[int, tuple[int, float]] = {}  # directory: the last block that was opened, and when
        self._growing: set[int] = set()  # files whose growth the advisor was told to follow
        self._dropping: set[int] = set()  # those that it has still to be told to close

    def begin(self, mountpoint: str, device: int) -> None:
        """Start the advisor. device: the mount's st_dev. Does not fail: without it all goes on as well."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as problem:
            log.info("%s: no write-behind and read-ahead: %s", mountpoint, problem.strerror)
            return
        with theirs:
            # Isolated: nothing is imported but the standard library, and nothing of the environment gets in.
            command = [sys.executable, "-I", "-S", advisor.__file__]
            arguments = [str(theirs.fileno()), mountpoint, str(device), str(os.getpid())]
            try:
                self._process = subprocess.Popen(
                    [*command, *arguments],
                    pass_fds=[theirs.fileno()],
                    env={},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            except OSError as problem:
                log.info("%s: no write-behind and read-ahead: %s", mountpoint, problem.strerror)
                ours.close()
                return
        self._sock = ours

    def end(self) -> None:
        """End the advisor, when the mount is gone and it can wait for nothing: who adopts it might never reap it."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END)
        if self._sock is not None:
            self._sock.close()
        self._sock = self._process = None

    def wrote(self, node: Node, size: int) -> None:
        """Note that the kernel handed over `size` bytes of a file."""
        if size < BULK or not self._writeback or not node.names:
            return
        now = self._written[node.names[0][0].ino] = self._clock()
        if node.ino in self._growing:
            self._say(advisor.GROW, node)  # the advisor may have stopped to look
        if len(self._written) > MOST:
            self._written = {ino: when for ino, when in self._written.items() if now - when < RECENT}

    def writes(self, node: Node) -> None:
        """Note that a file was made or opened for writing. One in a directory that is written in bulk is followed."""
        if self._sock is None or not self._written or not node.names:
            return
        if self._clock() - self._written.get(node.names[0][0].ino, -RECENT) < RECENT:
            self._growing.add(node.ino)
            self._dropping.discard(node.ino)
            self._say(advisor.GROW, node)

    def closed(self, node: Node) -> None:
        """Note that a handle was closed. A file that nobody writes through the cache any more is followed no more."""
        if node.ino in self._growing and not node.cached_writers:
            self._growing.discard(node.ino)
            self._dropping.add(node.ino)
            self._drop()

    def opens(self, node: Node, flags: int) -> None:
        """Note that a file was opened for reading. At the second block in a row the one that follows is fetched.

        Only where its name was looked up before: nats-server lists a directory before it reads there. And not while it is
        written.
        """
        if self._sock is None or flags & advisor.MARK or not node.names:
            return
        directory, name = node.names[0]
        if (match := _BLOCK.fullmatch(name)) is None:
            return
        number, now = int(match[1]), self._clock()
        before, when = self._opened.get(directory.ino, (0, now))
        self._opened[directory.ino] = number, now
        if len(self._opened) > MOST:
            self._opened = {ino: one for ino, one in self._opened.items() if now - one[1] < RECENT}
        follower = directory.children.get(b"%d.blk" % (number + 1))
        if follower is None or follower.cached_writers or follower.direct_writers:
            return
        if number == before + 1 and now - when < RECENT:
            self._say(advisor.FETCH, follower)

    def _drop(self) -> None:
        """Tell the advisor to close what is to be closed; what cannot be said now is said the next time."""
        for ino in list(self._dropping):
            if not self._send(struct.pack(advisor.WORD, advisor.DROP, ino)):
                return
            self._dropping.discard(ino)

    def _say(self, what: int, node: Node) -> None:
        self._drop()
        with contextlib.suppress(OSError):  # a directory above has no name any more
            path = self._path(node)
            if len(path) <= advisor.LONGEST:
                self._send(struct.pack(advisor.WORD, what, node.ino) + path)

    def _send(self, word: bytes) -> bool:
        if self._sock is None:
            return False
        try:
            self._sock.send(word, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False  # it is behind: advice that comes late is worth nothing
        except OSError:
            self._sock.close()
            self._sock = None
            log.info("no write-behind and read-ahead any more: the process that asks for it has ended")
            return False
        return True
