"""The supervisor of a mount: it owns /dev/fuse and the unlocked keys, and sees to it that a worker serves (succession.py).

One process, one thread, the standard library only: what it does not do cannot fail. It never touches the mount, which may
have nobody to serve it, and never waits for anything but its own poll(2).

At its side are the worker that serves, and one that stands by with everything imported, so that a takeover costs
no start of Python. Both are killed by the kernel when the supervisor dies; then nobody holds /dev/fuse, and whoever
uses the mount gets an error at once instead of waiting for ever.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from encfs_js import control, fusemount, hygiene, logs, notify, spawn
from encfs_js.mounts import mountpoint_of
from encfs_js.succession import Succession

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.spawn import Worker

log: Final = logging.getLogger("encfs_js")
_TURN: Final = 0.25  # seconds
_OVERSLEPT: Final = 1.0
_AGAIN: Final = 0.5  # seconds until a busy mount is tried again
_SOON: Final = 0.05  # the same after the first try: the advisor may have closed its file by then
_DRAIN: Final = 2.0  # seconds in which the worker writes what sync(2) has the kernel hand to it
_MOST_BUGS: Final = 100


class Supervisor:
    """One mount. orders: what mount.py left for us, see there."""

    def __init__(self, orders: dict[str, Any]) -> None:
        self._orders = orders
        self._mountpoint: str = orders["mountpoint"]
        self._notify = notify.Notify(os.environ)
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], object]] = {}
        fuse = notify.passed(os.environ).get("fuse", -1)
        self._succession = Succession(orders, fuse, self.watch, self._on_serving)
        self._passed = fuse >= 0  # somebody else has mounted it
        self._synced = False
        self._asked = 0  # to stop: how often
        self._busy = 0  # how often it could not be unmounted since
        self._unmounting = -1  # a pidfd
        self._next_try = self._next_sign = 0.0
        self._bugs = 0

    def run(self) -> int:
        """Serve until unmounted or given up. Returns the exit code."""
        awake, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in spawn.STOP:
            signal.signal(number, self._on_signal)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self.watch(awake, lambda: os.read(awake, 4096))
        listener = control.listen(self._orders["store"], self.watch, self._on_request)
        last = time.monotonic()
        while self._succession.exit_code is None:
            self._guarded(self._look_after, time.monotonic())
            for fd, _ in self._poll.poll(_TURN * 1000):
                if fd in self._handlers:
                    self._guarded(self._handlers[fd])
            now = time.monotonic()
            if now - last > _OVERSLEPT:
                self._succession.overslept(now)
            last = now
        self._succession.end()
        if listener is not None:
            control.close(self._orders["store"], listener)
        if self._succession.problem:
            self._report(self._succession.problem)
        return self._succession.exit_code

    def _guarded(self, call: Callable[..., object], *args: object) -> None:
        """Outlive a bug of our own, unless there is no end to it: with us goes the mount."""
        try:
            call(*args)
        except Exception:
            self._bugs += 1
            log.critical("%s: a bug in the supervisor", self._mountpoint, exc_info=True)
            if self._bugs > _MOST_BUGS:
                raise

    def watch(self, fd: int, handler: Callable[[], object] | None) -> None:
        """Call `handler` when there is something to read; None: no longer."""
        if handler is not None:
            self._poll.register(fd, select.POLLIN)
            self._handlers[fd] = handler
        elif self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _look_after(self, now: float) -> None:
        self._succession.look_after(now)
        if self._asked and self._succession.served and self._unmounting < 0 and now >= self._next_try:
            self._unmount()
        if self._notify.watchdog and now >= self._next_sign:
            self._next_sign = now + self._notify.watchdog
            self._notify.say("WATCHDOG=1")

    def _on_serving(self, worker: Worker) -> None:
        """Tell whoever waits for it."""
        succession = self._succession
        if not succession.takeovers:
            if self._passed:
                self._notify.say("FDSTOREREMOVE=1", "FDNAME=fuse")  # when we die nobody must hold it
            self._ready(b"ready")
            self._notify.say("READY=1")
        self._notify.status(
            f"{self._mountpoint} is served by worker {worker.pid}, taken over {succession.takeovers} times"
        )

    def _ready(self, text: bytes) -> None:
        if self._orders["ready"] is not None:
            with suppress(OSError):  # who started us did not wait
                os.write(self._orders["ready"], text)
            os.close(self._orders["ready"])
            self._orders["ready"] = None

    def _report(self, problem: dict[str, Any]) -> None:
        """Say why there is no mount, or none any more."""
        self._notify.status(problem["message"])
        if self._orders["ready"] is not None:
            self._ready(json.dumps(problem).encode())
        elif not self._succession.served:
            logs.print_error(problem["message"], problem.get("hint"))

    # -- stopping

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._asked += 1
        self._busy = 0
        self._next_try = 0.0

    def _unmount(self) -> None:
        """Have it unmounted: the kernel then writes back what it holds. A second signal does it lazily.

        Who has mounted it instead of us can unmount it, and we cannot. The unit does that before it ends us, unless it is
        stopped while it starts or reloads: then the mount dies with us, but not what was written to it.
        """
        if self._synced:
            self._succession.exit_code = 128 + signal.SIGTERM
            return
        try:
            if self._passed:
                log.warning("%s is still mounted, and cannot be unmounted from here", self._mountpoint)
                pid = fusemount.syncing()
            else:
                mountpoint = mountpoint_of(self._succession.device) or self._mountpoint
                pid = fusemount.unmounting(mountpoint, lazy=self._asked > 1)
        except OSError as problem:
            log.error("%s: fusermount3 or sync could not be started: %s", self._mountpoint, problem.strerror)
            self._next_try = time.monotonic() + _AGAIN
            return
        self._unmounting = os.pidfd_open(pid)
        self.watch(self._unmounting, lambda: self._on_unmounted(pid))

    def _on_unmounted(self, pid: int) -> None:
        self.watch(self._unmounting, None)
        os.close(self._unmounting)
        self._unmounting = -1
        status = os.waitpid(pid, 0)[1]
        if self._passed:
            self._synced = True
            self._next_try = time.monotonic() + _DRAIN
            return
        if status == 0:
            self._asked = 0
            return
        self._busy += 1
        if self._busy == 2:
            log.warning("%s is busy: it will be unmounted when the last file is closed", self._mountpoint)
        self._next_try = time.monotonic() + (_AGAIN if self._busy > 1 else _SOON)

    # -- commands

    def _on_request(self, request: control.Request) -> None:
        """Answer what a command asks over the control socket."""
        succession = self._succession
        errands, message = succession.errands, request.message
        if message.get("do") == "reload" and isinstance(message.get("options"), dict):
            succession.reload(message["options"], request.answer)
        elif message.get("do") == "rekey":
            errands.rekey(request.answer)
        elif message.get("do") == "reencrypt" and isinstance(message.get("rate"), float | None):
            errands.reencrypt(message.get("rate"))
            request.answer({"ok": True})
        elif message.get("do") == "stop":
            errands.stop()
            request.answer({"ok": True})
        elif message.get("do") == "status":
            request.answer(self._status())
        else:
            request.answer({"ok": False, "how": "no such command"})

    def _status(self) -> dict[str, Any]:
        succession = self._succession
        active, standby = succession.active, succession.standby
        return {
            "ok": True,
            "supervisor": os.getpid(),
            "worker": active.pid if active is not None and active.serving else None,
            "standby": standby.pid if standby is not None and standby.loaded else None,
            "takeovers": succession.takeovers,
            "writeback": succession.writeback,
            "reencrypt": succession.errands.progress or None,
            "options": json.loads(os.pread(succession.options, 1 << 20, 0)),
        }


def main() -> None:
    """Run the supervisor. Arguments: store and mountpoint, for people, and the descriptor of its orders (mount.py)."""
    hygiene.no_dumps()
    fd = int(sys.argv[-1])
    orders = json.loads(os.pread(fd, 1 << 20, 0))
    os.close(fd)
    for name in ("worker", "keys", "lock", "ready"):
        if orders[name] is not None:
            os.set_inheritable(orders[name], False)
    logs.configure(orders["log_file"], foreground=orders["foreground"])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # for the files that we hold for the workers
    if problem := hygiene.lock_file(orders["keys"]):
        log.warning("keys may reach the swap: memory cannot be locked: %s", problem)
    code = Supervisor(orders).run()
    if code == 0:
        log.info("%s unmounted", orders["mountpoint"])
    sys.exit(code)


if __name__ == "__main__":
    main()
