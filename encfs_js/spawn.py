"""Starting a worker process: what it inherits, what ends it, and what is known of it."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import TYPE_CHECKING, Final

from encfs_js import hygiene, wire

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

STOP: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Worker:
    """A worker process.

    options: the memfd with its options; loaded, serving: what it has said; beat: when it was last heard of, in seconds of
    the monotonic clock; answered: how many requests had been answered when it began; since: when it began to serve;
    used: clock ticks of CPU when `hangs` last looked.
    """

    __slots__ = ("answered", "beat", "loaded", "options", "pid", "pidfd", "serving", "since", "sock", "used")

    def __init__(self, pid: int, sock: socket.socket, options: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.sock = sock
        self.options = options
        self.loaded = False
        self.serving = False
        self.answered = 0
        self.since = 0.0
        self.used = 0
        self.beat = time.monotonic()

    def reap(self) -> int:
        """Wait for its end and return its exit code, the negative signal if one killed it."""
        _, status = os.waitpid(self.pid, 0)
        self.sock.close()
        os.close(self.pidfd)
        return os.waitstatus_to_exitcode(status)


def start(program: Sequence[str], fds: Mapping[str, int]) -> Worker:
    """Start a worker with these descriptors and one end of a socket, which its last argument names.

    It dies with this process. Signals that stop the mount do not reach it: it has to serve until all is unmounted.
    """
    ours, theirs = wire.pair()
    parent = os.getpid()
    inherited = {"socket": theirs.fileno(), **fds}
    command = [*program, json.dumps(inherited)]
    pid = os.fork()
    if not pid:
        try:
            signal.set_wakeup_fd(-1)
            hygiene.die_with_parent(parent, signal.SIGKILL)
            for number in STOP:
                signal.signal(number, signal.SIG_IGN)
            for fd in inherited.values():
                os.set_inheritable(fd, True)
            os.execve(command[0], command, os.environ)  # noqa: S606
        finally:
            os._exit(127)
    theirs.close()
    ours.setblocking(False)
    return Worker(pid, ours, fds["options"])


def hangs(worker: Worker) -> bool:
    """Tell whether a worker that is silent neither waits for a device nor has used the CPU since the last such question.

    One that waits for a device cannot answer, and cannot be killed either; one that works may be sealing a large file.
    """
    try:
        with open(f"/proc/{worker.pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return False  # it has ended: its pidfd tells
    used = int(fields[11]) + int(fields[12])
    idle = used == worker.used
    worker.used = used
    return idle and fields[0] != "D"
