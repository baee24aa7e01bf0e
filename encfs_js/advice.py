"""What the kernel is asked to do on our own mount before nats-server would have to wait for it; the half in the worker.

Two things made nats-server wait for us that we could have done before. When it closes a full message block, close(2) hands
over all 8 MiB at once and waits until they are sealed. And when it reads blocks in a row it waits for each to be opened. The
kernel does both earlier if somebody asks: sync_file_range(2) on a file that grows, posix_fadvise(2) on the block that comes next.
Nothing else changes: what is dirty, in the cache or on the disk is as it would be a little later.

The asking needs a descriptor of the mount, and whoever has one must not be a process that the mount needs: closing it may wait
for us, also when the process ends. So a process of its own has it (advisor.py), which has no keys and which nobody waits for. It
has it only while a bulk write or read goes on: a mount with open files cannot be unmounted. Where the mountpoint is not to be
seen, or its files may not be opened (another mount namespace, another user), there is no advice, and all works as before.
"""

from __future__ import annotations

import logging
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
_BLOCK: Final = re.compile(rb"([1-9][0-9]{0,18})\.blk")


class Advice:
    """The advice of one mount. Costs microseconds a request.

    path: returns a node's path in the store. clock: seconds, for tests.
    """

    def __init__(self, path: Callable[[Node], bytes], clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._sock: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._written: dict[int, float] = {}  # directory: when a file in it was written in bulk
        self._opened: dict[int, tuple[int, float]] = {}  # directory: the last block that was opened, and when
        self._growing: set[int] = set()  # files whose growth the advisor was told to follow

    def begin(self, mountpoint: str, device: int) -> None:
        """Start the advisor. device: the mount's st_dev."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # Isolated: nothing is imported but the standard library, and nothing of the environment gets in.
            command = [sys.executable, "-I", "-S", advisor.__file__, str(theirs.fileno()), mountpoint, str(device)]
            try:
                self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={}, stdin=subprocess.DEVNULL)
            except OSError as problem:
                log.debug("no advice: %s", problem.strerror)
                ours.close()
                return
        self._sock = ours

    def wrote(self, node: Node, size: int) -> None:
        """Note that the kernel handed over `size` bytes of a file."""
        if size >= BULK and node.names:
            self._written[node.names[0][0].ino] = self._clock()

    def writes(self, node: Node) -> None:
        """Note that a file was made or opened for writing. One in a directory that is written in bulk is followed."""
        if self._sock is None or not self._written or not node.names:
            return
        if self._clock() - self._written.get(node.names[0][0].ino, -RECENT) < RECENT:
            self._growing.add(node.ino)
            self._say(advisor.GROW, node.ino, self._path(node))

    def closed(self, node: Node) -> None:
        """Note that a handle was closed. A file that nobody writes through the cache any more is followed no more."""
        if node.ino in self._growing and not node.cached_writers:
            self._growing.discard(node.ino)
            self._say(advisor.DROP, node.ino, b"")

    def opens(self, node: Node, pid: int) -> None:
        """Note that process `pid` opened a file for reading. At the second block in a row the one that follows is fetched."""
        if self._process is None or pid == self._process.pid or not node.names:
            return
        directory, name = node.names[0]
        if (match := _BLOCK.fullmatch(name)) is None:
            return
        number, now = int(match[1]), self._clock()
        before, when = self._opened.get(directory.ino, (0, now))
        self._opened[directory.ino] = number, now
        follower = directory.children.get(b"%d.blk" % (number + 1))
        if follower is not None and number == before + 1 and now - when < RECENT:
            self._say(advisor.FETCH, follower.ino, self._path(follower))

    def _say(self, what: int, ino: int, path: bytes) -> None:
        if self._sock is None:
            return
        try:
            self._sock.send(struct.pack(advisor.WORD, what, ino) + path, socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass  # it is behind: advice that comes late is worth nothing
        except OSError:
            self._sock.close()
            self._sock = None
            log.debug("no advice any more: the advisor has ended")
