"""How many bytes several processes have done together, and the brake that keeps all of them to one rate."""

from __future__ import annotations

import mmap
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_COUNT: Final = 8  # bytes of a counter
_LONGEST: Final = 3600.0  # seconds: the system takes no number of them


class Meter:
    """Counts bytes, one counter for each process, in memory that processes forked later share.

    rate: bytes a second that all of them together may do, on average since the meter was made; None for no limit. A process
    writes its own counter only, so nobody waits for a lock.
    """

    def __init__(
        self,
        processes: int,
        rate: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._counts = memoryview(mmap.mmap(-1, processes * _COUNT)).cast("Q")
        self._rate = rate
        self._clock = clock
        self._sleep = sleep
        self._begun = clock()
        self._own = 0

    def take(self, process: int) -> None:
        """Say which of the processes this one is, from 0."""
        self._own = process

    @property
    def total(self) -> int:
        """The bytes of all processes."""
        return sum(self._counts)

    def add(self, count: int) -> None:
        """Count bytes that were done, and wait until all processes together are no faster than the rate."""
        self._counts[self._own] += count
        if self._rate is not None:
            while (ahead := self._begun + self.total / self._rate - self._clock()) > 0:
                self._sleep(min(ahead, _LONGEST))
