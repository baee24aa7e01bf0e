"""Sealing files anew in a mount that is in use: a step at a time, between the requests (reencrypt.py has the steps)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import trio

from encfs_js.reencrypt import Progress, reencrypt

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.files import Files
    from encfs_js.gate import Gate

log: Final = logging.getLogger("encfs_js")
_TELL: Final = 0.25  # seconds between two reports
_NAP: Final = 0.1


class Background:
    """The pass of one mount. tell: gets the progress as JSON has it, now and then and at the end."""

    def __init__(self, files: Files, gate: Gate, tell: Callable[[dict[str, Any]], None]) -> None:
        self._files = files
        self._gate = gate
        self._tell = tell
        self._stopping = False
        self._over = False
        self._ended: trio.Event | None = None  # of the pass that runs

    def stop(self) -> None:
        """Stop after the file that is being put in its place, or before."""
        self._stopping = True

    async def end(self) -> None:
        """Stop for ever, and wait for it."""
        self._over = True
        self.stop()
        if self._ended is not None:
            await self._ended.wait()

    async def run(self, rate: float | None) -> None:
        """Seal all that is stale. rate: bytes a second at most. Must not be cancelled: `end` stops it.

        While one runs it goes on, and sees to keys that are new. One that is about to stop is waited for.
        """
        while self._ended is not None:
            if not self._stopping:
                return
            await self._ended.wait()
        if self._over:
            return
        ended = self._ended = trio.Event()
        self._stopping = False
        progress = Progress()
        try:
            await self._drive(progress, rate)
        except OSError as exc:
            progress.state, progress.why = "failed", exc.strerror or str(exc)
            log.error("sealing the files anew stopped: %s", progress.why)
        except Exception:
            progress.state, progress.why = "failed", "a bug: see the log of the mount"
            log.critical("sealing the files anew stopped", exc_info=True)
        finally:
            self._ended = None
            ended.set()
            self._tell(progress.as_json())
        if progress.state in {"done", "incomplete"}:
            log.info("%d files were sealed anew, %d could not be", progress.files_done, len(progress.failed))

    async def _drive(self, progress: Progress, rate: float | None) -> None:
        steps = reencrypt(self._files, progress)
        begun = told = trio.current_time()
        moved = self._files.moved
        problem: OSError | None = None
        while True:
            try:
                step = next(steps) if problem is None else steps.throw(problem)
            except StopIteration:
                return
            finally:
                self._gate.look()
            problem = None
            if step is None:
                await trio.lowlevel.checkpoint()
            else:
                try:
                    await trio.to_thread.run_sync(step)
                except OSError as exc:
                    problem = exc
            now = trio.current_time()
            if now - told > _TELL:
                told = now
                self._tell(progress.as_json())
            while rate and not self._stopping and self._files.frozen is None:
                ahead = begun + (self._files.moved - moved) / rate - trio.current_time()
                if ahead <= 0:
                    break
                await trio.sleep(min(ahead, _NAP))
            if self._stopping and self._files.copying is None:
                steps.close()
                self._gate.look()
                progress.state = "stopped"
                return
