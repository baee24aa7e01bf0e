"""The socket through which commands reach the daemon of a store: STORE/.encfs_js/control, one JSON line each way.

It lies in a directory that only the owner of the store can enter; who connects is checked once more (SO_PEERCRED): root and
the user that the daemon runs as.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log: Final = logging.getLogger("encfs_js")
_NAME: Final = "control"
_MOST: Final = 65536
_CREDENTIALS: Final = struct.Struct("iII")
_PATIENCE: Final = 1.0  # seconds that a command may take to send its line


class Request:
    """A command that waits for its answer."""

    def __init__(self, sock: socket.socket, message: dict[str, Any]) -> None:
        self._sock = sock
        self.message = message

    def answer(self, message: dict[str, Any]) -> None:
        """Answer, and hang up. Who did not wait for it does not matter."""
        with contextlib.suppress(OSError):
            self._sock.sendall(json.dumps(message).encode() + b"\n")
        self._sock.close()


@contextlib.contextmanager
def _in_meta(store: str) -> Iterator[str]:
    """Yield a short path of the socket: those of sockets have 107 bytes at most."""
    fd = os.open(os.path.join(store, ".encfs_js"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{_NAME}"
    finally:
        os.close(fd)


def listen(
    store: str, watch: Callable[[int, Callable[[], object] | None], None], on_request: Callable[[Request], None]
) -> socket.socket | None:
    """Listen for commands. Returns the socket; None where it cannot be made (a read-only STORE), which the log says."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _in_meta(store) as path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # the lock is ours, so it is nobody's
            mask = os.umask(0o177)
            try:
                sock.bind(path)
            finally:
                os.umask(mask)
    except OSError as exc:
        log.info("no commands can reach this mount (%s: %s)", _NAME, exc.strerror)
        sock.close()
        return None
    sock.listen()
    watch(sock.fileno(), lambda: _accept(sock, on_request))
    return sock


def close(store: str, listener: socket.socket) -> None:
    """Take the socket away."""
    listener.close()
    with contextlib.suppress(OSError), _in_meta(store) as path:
        os.unlink(path)


def _accept(listener: socket.socket, on_request: Callable[[Request], None]) -> None:
    try:
        sock, _ = listener.accept()
    except OSError:
        return  # it hung up, or there are no descriptors left
    try:
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(peer)[1] not in {0, os.geteuid()}:
            raise PermissionError
        sock.settimeout(_PATIENCE)
        message = json.loads(sock.recv(_MOST))
        if not isinstance(message, dict):
            raise ValueError  # noqa: TRY004
    except (OSError, ValueError, RecursionError):
        sock.close()
        return
    on_request(Request(sock, message))


def ask(store: str, message: dict[str, Any], patience: float) -> dict[str, Any]:
    """Send a command to the daemon of a store and return its answer. Raises OSError when nobody answers in `patience` s."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, _in_meta(store) as path:
        sock.settimeout(patience)
        sock.connect(path)
        sock.sendall(json.dumps(message).encode())
        data = b""
        while not data.endswith(b"\n"):
            part = sock.recv(_MOST)
            if not part:
                raise ConnectionResetError
            data += part
    answer: dict[str, Any] = json.loads(data)
    return answer
