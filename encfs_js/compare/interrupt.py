"""What Ctrl-C and SIGTERM do to a comparison: the first one ends it wherever it waits, and nothing interrupts the cleaning up."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """Raises KeyboardInterrupt at the first signal, but only within `raising`; a signal before that is kept until then."""

    def __init__(self) -> None:
        self.came = False
        self._raising = False

    def take(self, _number: int, _frame: object) -> None:
        """Handle a signal."""
        first, self.came = not self.came, True
        if first and self._raising:
            self._raising = False
            raise KeyboardInterrupt

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Let signals raise within the block. Raises KeyboardInterrupt at once for one that came before."""
        self._raising = True
        try:
            if self.came:
                raise KeyboardInterrupt
            yield
        finally:
            self._raising = False


@contextmanager
def taken() -> Iterator[Interrupt]:
    """Take SIGNALS for the length of the block (in the main thread), and give them back, unless one came.

    Then the process is about to end, and ignores them to its last moment: one more must not change how. Raises
    KeyboardInterrupt at the end for one that came after `raising`.
    """
    interrupt = Interrupt()
    # A handler of Python's, not SIG_IGN: whatever is started meanwhile does not inherit it.
    before: dict[signal.Signals, Any] = {number: signal.signal(number, interrupt.take) for number in SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if interrupt.came else handler)
    if interrupt.came:
        raise KeyboardInterrupt
