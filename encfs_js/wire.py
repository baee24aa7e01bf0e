"""What supervisor and worker say to each other: JSON objects, one a packet, with descriptors beside them.

A packet that was sent stays in the socket when its sender dies: what a worker says before it acts is never lost.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any, Final

_MOST: Final = 65536
_MOST_FDS: Final = 250  # the kernel takes 253 (SCM_MAX_FD)
BEAT: Final = b"."


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a connection that keeps packets apart."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return ours, theirs


def send(sock: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
    """Send a message, with at most 250 descriptors. Raises OSError, BlockingIOError when a non-blocking one is full."""
    data = json.dumps(message).encode()
    if fds:
        assert len(fds) <= _MOST_FDS
        socket.send_fds(sock, [data], fds)
    else:
        sock.send(data)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next message and its descriptors; an empty one for a heartbeat; None at the end.

    Raises BlockingIOError when there is none yet on a non-blocking socket.
    """
    try:
        data, fds, _, _ = socket.recv_fds(sock, _MOST, _MOST_FDS)
    except ConnectionResetError:
        return None
    for fd in fds:
        os.set_inheritable(fd, False)  # or every worker started later would keep it open as well
    if not data:
        return None
    return ({} if data == BEAT else json.loads(data)), list(fds)
