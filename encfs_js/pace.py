"""Waiting for the disk without making everybody else wait."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final

import trio

from encfs_js.format import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.backing import Backing

# A thread costs 55-140 us a request (measured); what waited less than this for the disk on average is done in the loop.
_QUICK: Final = 0.0006
# The kernel's own read-ahead makes requests of 128 KiB and more; then the rest of a message block will be wanted too.
_SEQUENTIAL: Final = 128 << 10
_READ_AHEAD: Final = 4 << 20


class Pace:
    """Runs calls that wait for the disk: in the loop while they have been quick, in a thread while they have not."""

    def __init__(self) -> None:
        self._took = 0.0

    async def run(self, call: Callable[..., object], *args: object) -> None:
        """Call, and wait for it. Raises what the call raises."""
        started = time.perf_counter()
        if self._took < _QUICK:
            call(*args)
        else:
            await trio.to_thread.run_sync(call, *args)
        self._took += (time.perf_counter() - started - self._took) / 8


def fetch_ahead(io: Backing, fd: int, start: int, end: int) -> None:
    """Ask for the bytes start..end of a file, and for what a sequential reader will want next; returns at once."""
    ahead = _READ_AHEAD if end - start >= _SEQUENTIAL else 0
    io.fadvise(fd, start, end - start + ahead, os.POSIX_FADV_WILLNEED)


def await_pages(io: Backing, fd: int, start: int, end: int) -> None:
    """Wait until start..end are in memory: one byte of every 128 KiB, so that nothing is copied."""
    byte = bytearray(1)
    for at in (*range(start, end - PAGE, _SEQUENTIAL), end - PAGE):
        io.preadv(fd, [byte], at)
