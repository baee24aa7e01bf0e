"""What the tests of the takeover share: a mount whose workers follow a plan (faulty_mount.py), and callers that go on."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import faulty_mount
import mounts

from encfs_js import keyring, keystore
from encfs_js.format import Suite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FAULTY = [sys.executable, os.path.abspath(faulty_mount.__file__)]
KILLED = [r"worker \d+ was killed by signal 9$", r"worker \d+ has taken over$"]
DATA = bytes(range(251)) * 80


def needs_memlock() -> str:
    """Why a worker cannot die here without anybody noticing, or an empty string."""
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if os.geteuid() != 0 and hard != resource.RLIM_INFINITY and hard < 1 << 28:
        return "RLIMIT_MEMLOCK is too low: a request that a worker is reading when it is killed may fail"
    return ""


def make_store(path: Path, *, plaintext: str = "refuse") -> Path:
    """A store whose key is found quickly."""
    path.mkdir(exist_ok=True)
    kdf = keyring.Kdf(1, 1, 64)
    keystore.write(str(path), keyring.create(mounts.KEY.encode(), cipher=Suite.AES, plaintext=plaintext, kdf=kdf))
    return path


def sound(store: Path) -> None:
    """Verify finds nothing, not even what an unclean stop may leave."""
    report = mounts.verify(store)
    assert report["sound"]
    assert not report["crashed"]
    assert not report["unfinished"]


class Plan:
    """What the workers of a mount are to do wrong: see faulty_mount.py."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def write(self, *steps: dict[str, Any]) -> None:
        """Replace the plan; no steps: nothing is to go wrong."""
        faulty_mount.write_plan(self.path, list(steps))

    def rest(self) -> list[dict[str, Any]]:
        return faulty_mount.read_plan(self.path)

    def wait(self) -> None:
        """Wait until all of it has happened."""
        mounts.until(lambda: not self.rest(), "the plan")

    def close_gate(self) -> None:
        """Have the worker that comes to a step "wait" wait."""
        with open(self.path + ".gate", "w", encoding="utf-8"):
            pass

    def open_gate(self) -> None:
        for name in (self.path + ".gate", self.path + ".here"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)

    def wait_at_gate(self) -> None:
        """Wait until a worker stands before it."""
        mounts.until(lambda: os.path.exists(self.path + ".here"), "a worker at the gate")


class Faulty(NamedTuple):
    """A mount whose workers follow a plan, and a plain directory to compare it with."""

    mount: mounts.Mount
    plan: Plan
    plain: Path


@contextlib.contextmanager
def faulty_mounted(
    where: Path, *options: str, store: Path | None = None, environ: dict[str, str] | None = None
) -> Iterator[Faulty]:
    """A new store (or the one given), mounted below `where`; nobody waits for a gate any more at the end of the block."""
    if store is None:
        store = make_store(where / "store")
    plan, plain = Plan(where / "plan"), where / "plain"
    plain.mkdir(exist_ok=True)
    environ = {"FAULT_PLAN": plan.path} | (environ or {})
    with mounts.mounted(store, where / "mnt", *options, program=FAULTY, environ=environ) as mount:
        mount.tolerated += KILLED
        (mount.path / "before").write_bytes(DATA)
        try:
            yield Faulty(mount, plan, plain)
        finally:
            plan.write()
            plan.open_gate()


def mount_again(faulty: Faulty) -> None:
    """After all that: a new mount has what was there before, and verify finds nothing."""
    with mounts.mounted(faulty.mount.store, faulty.mount.path) as mount:
        assert (mount.path / "before").read_bytes() == DATA
    sound(faulty.mount.store)


def standby(mount: mounts.Mount) -> int:
    """Wait until somebody stands by, and return who."""
    return int(mounts.until(lambda: mount.status()["standby"], "a standby"))


def outcome(call: Callable[[], Any]) -> str:
    """What a call comes to: nothing, or the name of its error."""
    try:
        call()
    except OSError as problem:
        return errno.errorcode[problem.errno or 0]
    return "done"


def fails(call: Callable[[], Any]) -> bool:
    """Whether a call fails as it does on a mount that has died, and does not hang."""
    said = mounts.within(mounts.PATIENCE, lambda: outcome(call), "a call on a dying mount", lambda: None)
    return said in {"ENOTCONN", "ECONNABORTED"}


class Load:
    """Callers that go on in threads until the block ends; the first thing that went wrong is raised there."""

    def __init__(self, *callers: Callable[[Callable[[], bool]], None]) -> None:
        self._end = threading.Event()
        self._problems: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(caller,), daemon=True) for caller in callers]

    def _run(self, caller: Callable[[Callable[[], bool]], None]) -> None:
        try:
            caller(self._end.is_set)
        except BaseException as problem:
            self._problems.append(problem)
            self._end.set()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(mounts.PATIENCE)
            assert not thread.is_alive(), "a caller hangs"
        if self._problems:
            raise self._problems[0]

    def failed(self) -> bool:
        return bool(self._problems)
