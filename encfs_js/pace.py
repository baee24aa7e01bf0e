"""Waiting for the disk without making everybody else wait."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from encfs_js.format import PAGE, page_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.backing import Backing

T = TypeVar("T")

# A thread costs 55-140 us a request (measured); what waited less than this for the disk on average is done in the loop.
_QUICK: Final = 0.0006
_STEP: Final = 128 << 10


class Pace:
    """Runs calls that wait for the disk: in the loop while they have been quick, in a thread while they have not."""

    def __init__(self) -> None:
        self._took = 0.0

    async def run(self, call: Callable[..., T], *args: object) -> T:
        """Call, and wait for it. Returns and raises what the call does."""
        started = time.perf_counter()
        result = call(*args) if self._took < _QUICK else await trio.to_thread.run_sync(call, *args)
        self._took += (time.perf_counter() - started - self._took) / 8
        return result


def pages_around(offset: int, size: int) -> tuple[int, int]:
    """Return where the sealed pages of `size` plain bytes at `offset` start and end in the backing file."""
    return page_of(offset)[0] * PAGE, (page_of(offset + size)[0] + 1) * PAGE


def await_pages(io: Backing, fd: int, start: int, end: int) -> None:
    """Wait until start..end are in memory: one byte of every 128 KiB, so that nothing is copied."""
    io.fadvise(fd, start, end - start, os.POSIX_FADV_WILLNEED)
    byte = bytearray(1)
    for at in (*range(start, end - PAGE, _STEP), end - PAGE):
        io.preadv(fd, [byte], at)
