"""What commands ask of the worker that serves, over and above serving: to take other keys, to seal the files anew.

Part of the supervisor: the standard library only, and never a wait. What was asked is asked again of the next worker.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from encfs_js import hygiene, wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.spawn import Worker

log: Final = logging.getLogger("encfs_js")


class Errands:
    """The errands of one mount. keys: the memfd with the unlocked keys, for the workers to come.

    progress: what was last heard of sealing the files anew, {} for nothing.
    """

    def __init__(self, keys: int) -> None:
        self.keys = keys
        self.progress: dict[str, Any] = {}
        self._pass: dict[str, Any] | None = None
        self._worker: Worker | None = None
        self._waiting: list[Callable[[dict[str, Any]], None]] = []

    def rekey(self, answer: Callable[[dict[str, Any]], None]) -> None:
        """Have the worker read the keyring again; `answer` gets {"ok": True}, or why not."""
        self._waiting.append(answer)
        if self._worker is None or not self._send({"do": "rekey"}):
            self._answer({"ok": False, "how": "no worker serves at this moment"})

    def reencrypt(self, rate: float | None) -> None:
        """Have the files sealed anew. rate: bytes a second at most."""
        self._pass = {"do": "reencrypt", "rate": rate}
        self.progress = {"state": "counting"}
        self._send(self._pass)

    def stop(self) -> None:
        """Have that stopped."""
        if self._pass is not None:
            self._pass = None
            if not self._send({"do": "stop"}):
                self._has_stopped()

    # -- from the workers

    def on_serving(self, worker: Worker) -> None:
        """Go on with a new worker."""
        self._worker = worker
        if self._pass is not None:
            self._send(self._pass)

    def on_end(self, worker: Worker) -> None:
        """Tell who waits for a worker that has ended."""
        if worker is self._worker:
            self._worker = None
            self._answer({"ok": False, "how": "its worker has ended meanwhile"})
            self._has_stopped()

    def on_rekeyed(self, message: dict[str, Any], fds: list[int]) -> None:
        """Take the keys for the workers to come. They are sent before they are used, so no file has an epoch that is lost.

        Every answer is that to one question: the keyring may have changed again before the next.
        """
        if fds:
            os.close(self.keys)
            self.keys = fds[0]
            if problem := hygiene.lock_file(self.keys):
                log.warning("keys may reach the swap: memory cannot be locked: %s", problem)
        elif message["ok"]:
            message = {"ok": False, "how": "too many open files: the next worker would not have the new keys"}
            log.critical("%s", message["how"])
        if self._waiting:
            self._waiting.pop(0)(message)

    def on_progress(self, message: dict[str, Any]) -> None:
        """Note how far sealing anew is."""
        if message["state"] == "stopped" and self._pass is not None:
            return  # it was asked for again since
        self.progress = {name: value for name, value in message.items() if name != "is"}
        if message["state"] not in {"counting", "running"}:
            self._pass = None

    def _has_stopped(self) -> None:
        """Say that the pass has stopped if that was asked for, and nobody is left who would say so."""
        if self._pass is None and self.progress.get("state") in {"counting", "running"}:
            self.progress = self.progress | {"state": "stopped"}

    def _send(self, message: dict[str, Any]) -> bool:
        if self._worker is None:
            return False
        with suppress(OSError):  # it has died, and its pidfd tells
            wire.send(self._worker.sock, message)
            return True
        return False

    def _answer(self, message: dict[str, Any]) -> None:
        waiting, self._waiting = self._waiting, []
        for answer in waiting:
            answer(message)
