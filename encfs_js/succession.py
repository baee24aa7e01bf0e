"""Who serves a mount: one worker at a time, another that stands by, and what happens when one of them ends.

Part of the supervisor (see there): the standard library only, and never a wait.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from encfs_js import fusemount, journal, resend, spawn, wire
from encfs_js.errands import Errands
from encfs_js.errors import MountFailedError, WorkersFailedError
from encfs_js.mounts import find

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.spawn import Worker

log: Final = logging.getLogger("encfs_js")
_SILENCE: Final = 3.0  # seconds without a heartbeat after which a worker hangs; it sends two a second
_BUSY: Final = 120.0  # the same, while it works
_START: Final = 60.0  # seconds that a worker may take to load
_RETRY: Final = 1.0  # seconds until a process is started again where that failed
_PART: Final = 200  # descriptors in one message
# A worker that dies of itself, or before it has answered anything: so many in so many seconds, and the mount is given up.
_DEATHS: Final = 5
_WINDOW: Final = 60.0
_SERVED: Final = 1.0  # seconds after which nothing may have been asked


class Succession:
    """The workers of one mount.

    orders: what mount.py left. fuse: /dev/fuse when somebody else has mounted, -1 otherwise. watch: calls a function when
    there is something to read. on_serving: is called with the worker that serves from now on.
    """

    def __init__(
        self,
        orders: dict[str, Any],
        fuse: int,
        watch: Callable[[int, Callable[[], object] | None], None],
        on_serving: Callable[[Worker], None],
    ) -> None:
        self.mountpoint: str = orders["mountpoint"]
        self.fuse = fuse
        self._passed = fuse >= 0  # somebody else has mounted, and unmounts
        self.device = ""
        self.options: int = orders["worker"]  # the memfd with the options of the workers to come
        self.can_resend = True
        self.writeback: bool = orders["writeback"]
        self.active: Worker | None = None
        self.standby: Worker | None = None
        self.candidate: Worker | None = None  # of a reload, until it serves
        self.served = False
        self.takeovers = 0
        self.problem: dict[str, Any] = {}  # what a worker that failed said
        self.exit_code: int | None = None  # set: it is over
        self.errands = Errands(orders["keys"])
        self._orders = orders
        self._watch = watch
        self._tell = on_serving
        self._first = b""  # the FUSE_INIT request
        self._journal = os.memfd_create("journal", os.MFD_CLOEXEC)
        os.ftruncate(self._journal, journal.SIZE)
        self._memory = mmap.mmap(self._journal, journal.SIZE)
        self._held: dict[int, int] = {}  # files that are open and have no name: inode number -> descriptor
        self._deaths: list[float] = []
        self._unheard = 0  # workers in a row that were killed before they answered anything
        self._next_start = 0.0
        self._unmounted = False
        self._reloaded: Callable[[dict[str, Any]], None] = lambda _answer: None

    # -- from outside

    def look_after(self, now: float) -> None:
        """Start who is missing, and end who hangs. To be called a few times a second; now: of the monotonic clock."""
        if self.active is None and now >= self._next_start:
            self.active = self._start(self.options, now)
        elif self.served and self.can_resend and self.standby is None and now >= self._next_start:
            self.standby = self._start(self.options, now)
        worker = self.active
        silence = now - worker.beat if worker is not None else 0.0
        limit = _SILENCE if worker is not None and worker.loaded else _START
        if worker is not None and silence > limit and (spawn.hangs(worker) or silence > _BUSY):
            log.error("worker %d has not been heard of for %.0f s: it is replaced", worker.pid, silence)
            os.kill(worker.pid, signal.SIGKILL)
            worker.beat = now
        for worker in (self.standby, self.candidate):
            if worker is not None and worker is not self.active and not worker.loaded and now - worker.beat > _START:
                log.error("worker %d has not loaded within %.0f s", worker.pid, _START)
                os.kill(worker.pid, signal.SIGKILL)
                worker.beat = now

    def overslept(self, now: float) -> None:
        """Forgive the silence of a time in which this process did not run either: a frozen machine, a debugger."""
        for worker in (self.active, self.standby, self.candidate):
            if worker is not None:
                worker.beat = now

    def reload(self, options: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        """Replace the worker that serves by a new one with these options; `answer` gets {"ok": True, "worker": pid}.

        Otherwise {"ok": False, "how": why}, and the old one, or another with the old code, goes on.
        """
        why = ""
        if not self.can_resend:
            why = "this kernel cannot send requests again (FUSE_NOTIFY_RESEND, Linux 6.9)"
        elif self.candidate is not None or self.active is None or not self.active.serving:
            why = "a worker is being replaced already"
        else:
            memory = os.memfd_create("options", os.MFD_CLOEXEC)
            os.write(memory, json.dumps(options).encode())
            self.problem = {}
            self.candidate = self._start(memory, time.monotonic())
            if self.candidate is None:
                why = "no process could be started"
            self._reloaded = answer
        if why:
            answer({"ok": False, "how": why})

    def end(self) -> None:
        """End those who stand by."""
        for worker in (self.standby, self.candidate):
            if worker is not None:
                os.kill(worker.pid, signal.SIGKILL)
                worker.reap()
        self._answer({"ok": False, "how": "the mount has ended meanwhile"})

    # -- workers

    def _start(self, options: int, now: float) -> Worker | None:
        """Start a worker, which loads everything and then waits. None when that failed: it is tried again."""
        fds = {"options": options, "journal": self._journal, "lock": self._orders["lock"]}
        try:
            worker = spawn.start([*self._orders["program"], self.mountpoint], fds)
        except OSError as problem:
            log.error("no worker could be started: %s", problem.strerror)
            self._next_start = now + _RETRY
            return None
        self._watch(worker.sock.fileno(), lambda: self._listen(worker))
        self._watch(worker.pidfd, lambda: self._on_end(worker))
        return worker

    @staticmethod
    def _send(worker: Worker, message: dict[str, Any], fds: list[int] | None = None) -> None:
        with suppress(OSError):  # it has died, and its pidfd tells
            wire.send(worker.sock, message, fds)

    def _listen(self, worker: Worker) -> None:
        """Take what a worker has to say."""
        while True:
            try:
                packet = wire.receive(worker.sock)
            except BlockingIOError:
                return
            if packet is None:
                self._watch(worker.sock.fileno(), None)  # its end is told by its pidfd
                return
            worker.beat = time.monotonic()
            message, fds = packet
            if said := message.get("is"):
                getattr(self, f"_on_{said}")(worker, message, fds)

    def _on_held(self, _worker: Worker, message: dict[str, Any], fds: list[int]) -> None:
        self._let_go(message["ino"])
        if fds:
            self._held[message["ino"]] = fds[0]
        else:
            log.error("too many open files: a file that has no name any more would be lost with its worker")

    def _on_forgotten(self, _worker: Worker, message: dict[str, Any], _fds: list[int]) -> None:
        self._let_go(message["ino"])

    def _let_go(self, ino: int) -> None:
        if ino in self._held:
            os.close(self._held.pop(ino))

    def _on_loaded(self, worker: Worker, _message: dict[str, Any] | None = None, _fds: list[int] | None = None) -> None:
        worker.loaded = True
        if worker is self.active:
            self._send(worker, {"do": "prepare", "resumed": self.served}, [self.errands.keys])
        elif worker is self.candidate and self.active is not None:
            log.info("%s: reload: worker %d takes over", self.mountpoint, worker.pid)
            os.kill(self.active.pid, signal.SIGKILL)

    def _on_prepared(self, worker: Worker, _message: dict[str, Any], _fds: list[int]) -> None:
        if not self._first:
            try:
                self._mount()
            except (fusemount.RefusedError, OSError) as problem:
                error = MountFailedError(
                    f"{self.mountpoint}: the mount was refused: {problem}",
                    hint="encfs-js mount needs /dev/fuse and the package fuse3",
                )
                self.problem = error.as_json()
                self._send(worker, {"do": "abandon"})
                return
        held = list(self._held.items())
        for i in range(0, len(held), _PART):
            part = held[i : i + _PART]
            self._send(worker, {"do": "hold", "inos": [ino for ino, _ in part]}, [fd for _, fd in part])
        worker.answered = journal.answered(self._memory)
        orders = {"do": "serve", "init": self._first.hex(), "writeback": self.writeback}
        self._send(worker, orders, [self.fuse])

    def _mount(self) -> None:
        if self.fuse < 0:
            self.fuse = fusemount.mount(self.mountpoint, self._orders["mount_options"])
        entry = find(self.mountpoint)
        self.device = entry.device if entry is not None else ""
        self._first = fusemount.first_request(self.fuse)
        self.can_resend = bool(resend.init_flags(self._first) & resend.HAS_RESEND)
        if not self.can_resend:
            self.writeback = False
            log.warning(
                "this kernel cannot send requests again (FUSE_NOTIFY_RESEND, Linux 6.9): every write goes to the disk at"
                " once, and the mount dies with its worker"
            )

    def _on_serving(self, worker: Worker, _message: dict[str, Any], _fds: list[int]) -> None:
        worker.serving = True
        worker.since = time.monotonic()
        if self.served:
            self.takeovers += 1
            log.warning("%s: worker %d has taken over", self.mountpoint, worker.pid)
        self.served = True
        if worker is self.candidate:
            self.candidate = None
            self.options = worker.options
            if self.standby is not None:
                os.kill(self.standby.pid, signal.SIGKILL)  # the old code; its end brings the new one
            self._answer({"ok": True, "worker": worker.pid})
        self.errands.on_serving(worker)
        self._tell(worker)

    def _on_rekeyed(self, _worker: Worker, message: dict[str, Any], fds: list[int]) -> None:
        self.errands.on_rekeyed(message, fds)

    def _on_progress(self, _worker: Worker, message: dict[str, Any], _fds: list[int]) -> None:
        self.errands.on_progress(message)

    def _on_unmounted(self, _worker: Worker, _message: dict[str, Any], _fds: list[int]) -> None:
        self._unmounted = True

    def _on_failed(self, _worker: Worker, message: dict[str, Any], _fds: list[int]) -> None:
        self.problem = message

    # -- ends

    def _on_end(self, worker: Worker) -> None:
        """Deal with a worker's end."""
        self._listen(worker)  # what it said before
        self._watch(worker.sock.fileno(), None)
        self._watch(worker.pidfd, None)
        code = worker.reap()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self.errands.on_end(worker)
        if worker is self.active:
            self.active = None
            self._replace(worker, code, how)
        elif worker is self.candidate:
            self.candidate = None
            self._answer({"ok": False, "how": f"the new worker {how}"} | self.problem)
        elif worker is self.standby:
            self.standby = None
            if worker.options == self.options and self._too_many(worker, code):
                log.error("worker %d, which stood by, %s", worker.pid, how)
                self._next_start = time.monotonic() + _WINDOW

    def _replace(self, worker: Worker, code: int, how: str) -> None:
        """Deal with the end of the worker that served, or was about to."""
        reloading = worker is self.candidate
        if reloading:
            self.candidate = None
        if code == 0:
            if self.served:
                self.problem = {}  # of a reload
            self.exit_code = int(self.problem.get("code", 0))
        elif self._unmounted and code > 0:
            self.exit_code = code
            log.critical("%s", self.problem.get("message", f"{self.mountpoint}: unmounted, and then the worker {how}"))
        elif not self.served:
            if not self.problem:
                text = f"the worker {how} while it was starting"
                self.problem = MountFailedError(text, hint="look at its log; --foreground shows it").as_json()
            if self._first:
                os.close(self.fuse)
            if self._first and not self._passed:
                os.waitpid(fusemount.unmounting(self.mountpoint, lazy=True), 0)
            self.exit_code = int(self.problem["code"])
        elif not self.can_resend:
            self._give_up(f"worker {worker.pid} {how}, and this kernel cannot send requests again")
        elif reloading:
            log.error("%s: the new worker %d %s: the old code goes on", self.mountpoint, worker.pid, how)
            self._answer({"ok": False, "how": f"the new worker {how}"} | self.problem)
            self._take_over()
        elif self.candidate is not None and self.candidate.loaded:
            self.active = self.candidate
            self._on_loaded(self.active)
        elif self._too_many(worker, code):
            said = f": {self.problem['message']}" if self.problem else ""
            self._give_up(f"{_DEATHS} workers failed within {_WINDOW:.0f} s; the last one, {worker.pid}, {how}{said}")
        else:
            log.error("%s: worker %d %s", self.mountpoint, worker.pid, how)
            self._take_over()

    def _take_over(self) -> None:
        self.problem = {}
        now = time.monotonic()
        self.active, self.standby = self.standby or self._start(self.options, now), None
        if self.active is not None:
            self.active.beat = now
            if self.active.loaded:
                self._on_loaded(self.active)

    def _too_many(self, worker: Worker, code: int) -> bool:
        """Count an end that is the worker's own fault: whoever kills one that serves may do so for ever.

        Several that are killed in a row, before they have answered anything, may have been killed for what they were asked to
        do: for the memory that this took, perhaps.
        """
        now = time.monotonic()
        answered = journal.answered(self._memory) > worker.answered
        self._deaths = [death for death in self._deaths if now - death < _WINDOW]
        if code != -signal.SIGKILL or not worker.serving:
            self._deaths.append(now)
        if worker.serving:
            self._unheard = 0 if answered or now - worker.since > _SERVED else self._unheard + 1
        return max(len(self._deaths), self._unheard) >= _DEATHS

    def _give_up(self, why: str) -> None:
        """Leave the mount dead, never bare: an empty directory would look like an empty store."""
        error = WorkersFailedError(
            f"{self.mountpoint}: given up, and the mount left dead: {why}",
            hint=f"look at the log, then: encfs-js umount {self.mountpoint}, and mount again",
        )
        log.critical("%s (%s)", error, error.hint)
        self.problem = error.as_json()
        self.exit_code = error.exit_code

    def _answer(self, message: dict[str, Any]) -> None:
        answer, self._reloaded = self._reloaded, lambda _answer: None
        answer(message)
