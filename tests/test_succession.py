"""Who follows whom, without a mount: workers that never say a word."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import mounts
import pytest

from encfs_js import succession as room
from encfs_js.succession import Succession

if TYPE_CHECKING:
    from collections.abc import Iterator

SILENT = [sys.executable, "-c", "import time; time.sleep(1000)"]


class Watched:
    """A succession, and what its loop would call."""

    def __init__(self) -> None:
        self.handlers = {}
        self.answers: list[dict] = []
        fds = {name: os.memfd_create(name) for name in ("worker", "keys", "lock")}
        orders = {"mountpoint": "/nowhere", "writeback": True, "program": SILENT, "mount_options": "", **fds}
        self.succession = Succession(orders, -1, self.watch, lambda _: None)

    def watch(self, fd, handler) -> None:
        if handler is None:
            self.handlers.pop(fd, None)
        else:
            self.handlers[fd] = handler

    def served(self) -> room.Worker:
        """The worker that serves, as far as it is known."""
        self.succession.look_after(time.monotonic())
        worker = self.succession.active
        assert worker is not None
        self.succession.served = worker.loaded = worker.serving = True
        worker.since = time.monotonic()
        return worker

    def end(self, worker: room.Worker, number: int) -> None:
        """Kill a worker, and let the succession know."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, number)
        mounts.until(lambda: os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT), "its end")
        self.handlers[worker.pidfd]()


@pytest.fixture
def watched() -> Iterator[Watched]:
    watched = Watched()
    yield watched
    for worker in {watched.succession.active, watched.succession.standby, watched.succession.candidate} - {None}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
            worker.reap()


def test_a_new_worker_that_never_loads_is_given_up_and_the_old_one_goes_on(watched, caplog) -> None:
    succession = watched.succession
    old = watched.served()
    succession.reload({"cipher": "aes"}, watched.answers.append)
    new = succession.candidate
    assert new is not None
    later = time.monotonic() + room._START + 1
    old.beat = later
    succession.look_after(later)
    watched.end(new, 0)
    assert "has not loaded within 60 s" in caplog.text
    assert [answer["ok"] for answer in watched.answers] == [False]
    assert "killed by signal 9" in watched.answers[0]["how"]
    assert succession.active is old
    succession.reload({"cipher": "aes"}, watched.answers.append)
    assert succession.candidate is not None, "another reload is possible"


def test_the_mount_ends_while_a_new_worker_takes_over(watched) -> None:
    """It was about to serve, and finds nothing to serve any more: who asked for the reload is told, and nobody else ended."""
    succession = watched.succession
    old = watched.served()
    succession.reload({}, watched.answers.append)
    new = succession.candidate
    assert new is not None
    new.loaded = True
    watched.end(old, signal.SIGKILL)
    assert succession.active is new
    os.kill(new.pid, signal.SIGKILL)
    code = new.reap()
    assert code == -signal.SIGKILL
    succession.active = None
    succession._replace(new, 0, "ended with exit code 0")
    assert succession.exit_code == 0
    succession.end()
    assert succession.candidate is None
    assert watched.answers == [{"ok": False, "how": "the mount has ended meanwhile"}]


def test_whoever_kills_a_worker_that_serves_may_do_so_for_ever(watched) -> None:
    succession = watched.succession
    for _ in range(3 * room._DEATHS):
        worker = watched.served()
        worker.since -= 2 * room._SERVED
        watched.end(worker, signal.SIGKILL)
    assert succession.exit_code is None


def test_workers_that_are_killed_before_they_have_answered_anything_are_given_up(watched, caplog) -> None:
    """As the kernel does for the memory that a request takes."""
    succession = watched.succession
    ends = 0
    while succession.exit_code is None:
        watched.end(watched.served(), signal.SIGKILL)
        ends += 1
    assert ends == room._DEATHS
    assert succession.exit_code == 27
    assert "given up, and the mount left dead" in caplog.text
