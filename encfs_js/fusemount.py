"""Mounting and unmounting: fusermount3 does both, for root and for everybody else, and the kernel's first words are kept.

The protocol of fusermount3: it mounts, and passes /dev/fuse through the socket whose number is in _FUSE_COMMFD.
"""

from __future__ import annotations

import os
import socket
from typing import Final

_COMM: Final = "_FUSE_COMMFD"
_FIRST_READ: Final = (1 << 20) + 8192


class RefusedError(Exception):
    """fusermount3 or the kernel refused; the text is what it said."""


def mount(mountpoint: str, options: str) -> int:
    """Mount at `mountpoint` and return the descriptor of /dev/fuse. Raises RefusedError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    said, says = os.pipe()
    environ = {"PATH": os.environ.get("PATH", os.defpath), _COMM: str(theirs.fileno())}
    os.set_inheritable(theirs.fileno(), True)
    try:
        pid = os.posix_spawnp(
            "fusermount3",
            ["fusermount3", "-o", options, "--", mountpoint],
            environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, says, 2)],
        )
    except FileNotFoundError:
        raise RefusedError("fusermount3 is not installed (Debian: apt-get install fuse3)") from None
    finally:
        theirs.close()
        os.close(says)
    try:
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        with open(said, encoding="utf-8", errors="replace", closefd=False) as file:
            text = file.read()
    finally:
        ours.close()
        os.close(said)
    _, status = os.waitpid(pid, 0)
    if status or not fds:
        for fd in fds:
            os.close(fd)
        raise RefusedError(text.strip().removeprefix("fusermount3: ") or f"fusermount3 ended with status {status}")
    os.set_inheritable(fds[0], False)
    return int(fds[0])


def unmounting(mountpoint: str, *, lazy: bool) -> int:
    """Begin to unmount. Returns the process that does it: to do it oneself is to wait for those one has to look after."""
    null = (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)
    arguments = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]
    return os.posix_spawnp("fusermount3", arguments, {"PATH": os.environ.get("PATH", os.defpath)}, file_actions=[null])


def syncing() -> int:
    """Begin to have the kernel write back what it holds, of all file systems. Returns the process that does it.

    It needs neither a privilege nor a descriptor; and it waits for those one has to look after, as unmounting does.
    """
    return os.posix_spawnp("sync", ["sync"], {"PATH": os.environ.get("PATH", os.defpath)})


def first_request(fuse: int) -> bytes:
    """Return the FUSE_INIT request, which the kernel sends once per mount. Raises OSError ENODEV when it is gone."""
    return os.read(fuse, _FIRST_READ)
