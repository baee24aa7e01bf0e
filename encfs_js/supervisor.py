"""The supervisor of a mount: it owns /dev/fuse and the unlocked keys, and replaces the worker that serves when it dies.

One process, one thread, the standard library only: what it does not do cannot fail. It never touches the mount, which may
have nobody to serve it, and never waits for anything but its own poll(2).

At its side are the worker that serves, and one that stands by with everything imported, so that a takeover costs
no start of Python. Both are killed by the kernel when the supervisor dies; then nobody holds /dev/fuse, and whoever
uses the mount gets an error at once instead of waiting for ever.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from encfs_js import control, fusemount, hygiene, journal, logs, notify, resend, spawn, wire
from encfs_js.errors import MountFailedError, WorkersFailedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.spawn import Worker

log: Final = logging.getLogger("encfs_js")
_BEAT: Final = 0.5  # seconds between two heartbeats of a worker
_SILENCE: Final = 3.0  # seconds of it after which a worker hangs
_BUSY: Final = 120.0  # the same, while it works
_START: Final = 60.0  # seconds that a worker may take to load, or to prepare: the tree of a large store is walked
_AGAIN: Final = 0.5  # seconds until a busy mount is tried again
_PART: Final = 200  # descriptors in one message
# A worker that dies of itself, or before it has answered anything: so many in so many seconds, and it is given up.
_DEATHS: Final = 5
_WINDOW: Final = 60.0


class Supervisor:
    """One mount. orders: what mount.py left for us, see there."""

    def __init__(self, orders: dict[str, Any]) -> None:
        self.orders = orders
        self.mountpoint: str = orders["mountpoint"]
        self.notify = notify.Notify(os.environ)
        self.fuse = notify.passed(os.environ).get("fuse", -1)
        self.first = b""  # the FUSE_INIT request
        self.can_resend = True
        self.writeback: bool = orders["writeback"]
        self.journal = os.memfd_create("journal", os.MFD_CLOEXEC)
        os.ftruncate(self.journal, journal.SIZE)
        self.memory = mmap.mmap(self.journal, journal.SIZE)
        self.active: Worker | None = None
        self.standby: Worker | None = None
        self.candidate: Worker | None = None  # of a reload, until it serves
        self.held: dict[int, int] = {}  # files that are open and have no name: inode number -> descriptor
        self.deaths: list[float] = []
        self.takeovers = 0
        self.served = False
        self.problem: dict[str, Any] = {}  # what the last worker that failed said
        self.asked = 0  # to stop: how often
        self.unmounting = -1  # a pidfd
        self.next_try = self.next_sign = 0.0
        self.exit_code: int | None = None
        self.poll = select.poll()
        self.handlers: dict[int, Callable[[], object]] = {}
        self.asker: control.Request | None = None

    # -- the loop

    def run(self) -> int:
        """Serve until unmounted or given up. Returns the exit code."""
        awake, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in spawn.STOP:
            signal.signal(number, self._on_signal)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self.watch(awake, lambda: os.read(awake, 4096))
        listener = control.listen(self.orders["store"], self.watch, self._on_request)
        self.active = self._spawn(self.orders["worker"])
        last = time.monotonic()
        while self.exit_code is None:
            for fd, _ in self.poll.poll(250):
                if fd in self.handlers:
                    self.handlers[fd]()
            now = time.monotonic()
            if now - last > 2 * _BEAT:
                for worker in (self.active, self.standby, self.candidate):
                    if worker is not None:
                        worker.beat = now  # it was we who slept: a frozen machine, a debugger
            last = now
            self._look_after(now)
        for worker in (self.standby, self.candidate):
            if worker is not None:
                os.kill(worker.pid, signal.SIGKILL)
                worker.reap()
        if listener is not None:
            control.close(self.orders["store"], listener)
        return self.exit_code

    def watch(self, fd: int, handler: Callable[[], object] | None) -> None:
        """Call `handler` when there is something to read; None: no longer."""
        if handler is None:
            self.poll.unregister(fd)
            del self.handlers[fd]
        else:
            self.poll.register(fd, select.POLLIN)
            self.handlers[fd] = handler

    def _look_after(self, now: float) -> None:
        worker = self.active
        silence = now - worker.beat if worker is not None else 0.0
        limit = _SILENCE if worker is not None and worker.serving else _START
        if worker is not None and silence > limit and (spawn.hangs(worker) or silence > _BUSY):
            log.error("worker %d has not been heard of for %.0f s: it is replaced", worker.pid, silence)
            os.kill(worker.pid, signal.SIGKILL)
            worker.beat = now
        if self.asked and self.served and self.unmounting < 0 and now >= self.next_try and self.exit_code is None:
            self._unmount()
        if self.notify.watchdog and now >= self.next_sign:
            self.next_sign = now + self.notify.watchdog
            self.notify.say("WATCHDOG=1")

    # -- workers

    def _spawn(self, options: int) -> Worker:
        """Start a worker, which loads everything and then waits. options: a memfd with what worker.py takes."""
        fds = {"options": options, "journal": self.journal, "keys": self.orders["keys"], "lock": self.orders["lock"]}
        worker = spawn.start([*self.orders["program"], self.mountpoint], fds)
        self.watch(worker.sock.fileno(), lambda: self._listen(worker))
        self.watch(worker.pidfd, lambda: self._on_end(worker))
        return worker

    def _listen(self, worker: Worker) -> None:
        """Take what a worker has to say."""
        while True:
            try:
                packet = wire.receive(worker.sock)
            except BlockingIOError:
                return
            if packet is None:
                self.poll.modify(worker.sock.fileno(), 0)  # its end is told by its pidfd
                return
            worker.beat = time.monotonic()
            message, fds = packet
            if said := message.get("is"):
                getattr(self, f"_on_{said}")(worker, message, fds)

    def _on_held(self, _worker: Worker, message: dict[str, Any], fds: list[int]) -> None:
        self._let_go(message["ino"])
        self.held[message["ino"]] = fds[0]

    def _on_forgotten(self, _worker: Worker, message: dict[str, Any], _fds: list[int]) -> None:
        self._let_go(message["ino"])

    def _let_go(self, ino: int) -> None:
        if ino in self.held:
            os.close(self.held.pop(ino))

    def _on_loaded(self, worker: Worker, _message: dict[str, Any] | None = None, _fds: list[int] | None = None) -> None:
        worker.loaded = True
        if worker is self.active:
            wire.send(worker.sock, {"do": "prepare", "resumed": self.served})
        elif worker is self.candidate and self.active is not None:
            log.info("%s: reload: worker %d takes over", self.mountpoint, worker.pid)
            os.kill(self.active.pid, signal.SIGKILL)

    def _on_prepared(self, worker: Worker, _message: dict[str, Any], _fds: list[int]) -> None:
        if not self.first:
            try:
                self._mount()
            except (fusemount.RefusedError, OSError) as problem:
                error = MountFailedError(
                    f"{self.mountpoint}: the mount was refused: {problem}",
                    hint="encfs-js mount needs /dev/fuse and the package fuse3",
                )
                self.problem = error.as_json()
                wire.send(worker.sock, {"do": "abandon"})
                return
        held = list(self.held.items())
        for i in range(0, len(held), _PART):
            part = held[i : i + _PART]
            wire.send(worker.sock, {"do": "hold", "inos": [ino for ino, _ in part]}, [fd for _, fd in part])
        worker.answered = journal.answered(self.memory)
        orders = {"do": "serve", "init": self.first.hex(), "writeback": self.writeback}
        wire.send(worker.sock, orders, [self.fuse])

    def _mount(self) -> None:
        if self.fuse < 0:
            self.fuse = fusemount.mount(self.mountpoint, self.orders["mount_options"])
        else:
            self.notify.say("FDSTOREREMOVE=1", "FDNAME=fuse")  # when we die nobody must hold it
        self.first = fusemount.first_request(self.fuse)
        self.can_resend = bool(resend.init_flags(self.first) & resend.HAS_RESEND)
        if not self.can_resend:
            self.writeback = False
            log.warning(
                "this kernel cannot send requests again (FUSE_NOTIFY_RESEND, Linux 6.9): every write goes to the disk at"
                " once, and the mount dies with its worker"
            )

    def _on_serving(self, worker: Worker, _message: dict[str, Any], _fds: list[int]) -> None:
        worker.serving = True
        if self.served:
            self.takeovers += 1
            log.warning("%s: worker %d has taken over", self.mountpoint, worker.pid)
        else:
            self.served = True
            self._ready(b"ready")
            self.notify.say("READY=1")
        if worker is self.candidate:
            self.candidate = None
            self.orders["worker"] = worker.options
            if self.standby is not None:
                os.kill(self.standby.pid, signal.SIGKILL)  # the old code; its end brings the new one
            self._answer({"ok": True, "worker": worker.pid})
        elif self.standby is None and self.can_resend:
            self.standby = self._spawn(self.orders["worker"])
        self.notify.status(f"{self.mountpoint} is served by worker {worker.pid}, taken over {self.takeovers} times")

    def _on_failed(self, _worker: Worker, message: dict[str, Any], _fds: list[int]) -> None:
        self.problem = message

    def _on_end(self, worker: Worker) -> None:
        """Deal with a worker's end."""
        self._listen(worker)  # what it said before
        self.watch(worker.sock.fileno(), None)
        self.watch(worker.pidfd, None)
        code = worker.reap()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if self.exit_code is not None:
            return
        if worker is self.active:
            self.active = None
            self._replace(worker, code, how)
        elif worker is self.candidate:
            self.candidate = None
            self._answer({"ok": False, "how": f"the new worker {how}"} | self.problem)
        elif worker is self.standby:
            self.standby = None
            if worker.options != self.orders["worker"] or not self._too_many(worker, code):
                self.standby = self._spawn(self.orders["worker"])
            else:
                log.error("worker %d, which stood by, %s; nobody stands by any more", worker.pid, how)

    def _replace(self, worker: Worker, code: int, how: str) -> None:
        """Deal with the end of the worker that served, or was about to."""
        if code == 0:
            self.exit_code = 0 if not self.problem else self._report()
        elif not self.served:
            if not self.problem:
                text = f"the worker {how} while it was starting"
                self.problem = MountFailedError(text, hint="look at its log; --foreground shows it").as_json()
            if self.first:
                os.close(self.fuse)
                os.waitpid(fusemount.unmounting(self.mountpoint, lazy=True), 0)
            self.exit_code = self._report()
        elif not self.can_resend:
            self._give_up(f"worker {worker.pid} {how}, and this kernel cannot send requests again")
        elif worker is self.candidate:
            self.candidate = None
            log.error("%s: the new worker %d %s: the old code goes on", self.mountpoint, worker.pid, how)
            self._answer({"ok": False, "how": f"the new worker {how}"} | self.problem)
            self._take_over()
        elif self.candidate is not None and self.candidate.loaded:
            self.active = self.candidate
            self._on_loaded(self.active)
        elif self._too_many(worker, code):
            self._give_up(f"{_DEATHS} workers failed within {_WINDOW:.0f} s; the last one, {worker.pid}, {how}")
        else:
            log.error("%s: worker %d %s", self.mountpoint, worker.pid, how)
            self._take_over()

    def _take_over(self) -> None:
        self.problem = {}
        self.active, self.standby = self.standby or self._spawn(self.orders["worker"]), None
        self.active.beat = time.monotonic()
        if self.active.loaded:
            self._on_loaded(self.active)

    def _too_many(self, worker: Worker, code: int) -> bool:
        """Count an end that is the worker's own fault: whoever kills one that serves may do so for ever."""
        served = worker.serving and journal.answered(self.memory) > worker.answered
        now = time.monotonic()
        if code != -signal.SIGKILL or not served:
            self.deaths = [*(death for death in self.deaths if now - death < _WINDOW), now]
        return len(self.deaths) >= _DEATHS

    def _give_up(self, why: str) -> None:
        """Leave the mount dead, never bare: an empty directory would look like an empty store."""
        error = WorkersFailedError(
            f"{self.mountpoint}: given up, and the mount left dead: {why}",
            hint=f"look at the log, then: encfs-js umount {self.mountpoint}, and mount again",
        )
        log.critical("%s (%s)", error, error.hint)
        self.notify.status(str(error))
        self.exit_code = error.exit_code

    # -- starting and stopping

    def _ready(self, text: bytes) -> None:
        if self.orders["ready"] is not None:
            os.write(self.orders["ready"], text)
            os.close(self.orders["ready"])
            self.orders["ready"] = None

    def _report(self) -> int:
        """Tell whoever waits for the mount why there is none. Returns the exit code."""
        problem = self.problem
        if self.orders["ready"] is not None:
            self._ready(json.dumps(problem).encode())
        else:
            print(f"encfs-js: error: {problem['message']}", file=sys.stderr)
            if problem.get("hint"):
                print(f"encfs-js: hint: {problem['hint']}", file=sys.stderr)
        return int(problem["code"])

    def _on_signal(self, _number: int, _frame: object) -> None:
        self.asked += 1
        self.next_try = 0.0

    def _unmount(self) -> None:
        """Have it unmounted: the kernel then writes back what it holds. A second signal does it lazily."""
        pid = fusemount.unmounting(self.mountpoint, lazy=self.asked > 1)
        self.unmounting = os.pidfd_open(pid)
        self.watch(self.unmounting, lambda: self._on_unmounted(pid))

    def _on_unmounted(self, pid: int) -> None:
        self.watch(self.unmounting, None)
        os.close(self.unmounting)
        self.unmounting = -1
        if os.waitpid(pid, 0)[1] == 0:
            self.asked = 0
            return
        if self.next_try == 0.0:
            log.warning("%s is busy: it will be unmounted when the last file is closed", self.mountpoint)
        self.next_try = time.monotonic() + _AGAIN

    # -- requests

    def _on_request(self, request: control.Request) -> None:
        """Answer what a command asks over the control socket: the status, or a reload."""
        if request.message.get("do") == "status":
            request.answer(
                {
                    "ok": True,
                    "supervisor": os.getpid(),
                    "worker": self.active.pid if self.active is not None and self.active.serving else None,
                    "standby": self.standby.pid if self.standby is not None and self.standby.loaded else None,
                    "takeovers": self.takeovers,
                    "writeback": self.writeback,
                    "options": _read(self.orders["worker"]),
                }
            )
        elif not self.can_resend:
            request.answer({"ok": False, "how": "this kernel cannot send requests again (Linux 6.9)"})
        elif self.candidate is not None or self.active is None or not self.active.serving:
            request.answer({"ok": False, "how": "a worker is being replaced already"})
        else:
            options = os.memfd_create("options", os.MFD_CLOEXEC)
            os.write(options, json.dumps(request.message["options"]).encode())
            self.problem = {}
            self.asker = request
            self.candidate = self._spawn(options)

    def _answer(self, message: dict[str, Any]) -> None:
        if self.asker is not None:
            self.asker.answer(message)
            self.asker = None


def _read(fd: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(os.pread(fd, 1 << 20, 0))
    return found


def main() -> None:
    """Run the supervisor. Arguments: store and mountpoint, for people, and the descriptor of its orders (mount.py)."""
    hygiene.no_dumps()
    fd = int(sys.argv[-1])
    orders = _read(fd)
    os.close(fd)
    for name in ("worker", "keys", "lock", "ready"):
        if orders[name] is not None:
            os.set_inheritable(orders[name], False)
    logs.configure(orders["log_file"], foreground=orders["foreground"])
    if problem := hygiene.lock_file(orders["keys"]):
        log.warning("keys may reach the swap: memory cannot be locked: %s", problem)
    code = Supervisor(orders).run()
    if code == 0:
        log.info("%s unmounted", orders["mountpoint"])
    sys.exit(code)


if __name__ == "__main__":
    main()
