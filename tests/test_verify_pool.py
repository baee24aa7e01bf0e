"""verify by several processes: it finds the same, holds one rate, and a process that dies is an error."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

import mounts
import pytest
from sealed_files import PAGE, SUITES, text
from test_verify import Store, edit

from encfs_js import keystore, state
from encfs_js.backing import Backing
from encfs_js.errors import FormatError, StoreIoError
from encfs_js.meter import Meter
from encfs_js.pool import pool
from encfs_js.sealed import FileKeys, SealedFile

if TYPE_CHECKING:
    from pathlib import Path


def children() -> set[int]:
    """The processes whose parent this one is. (/proc/self/task/*/children is not reliable while threads come and go.)"""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                parent = int(read(f"/proc/{name}/stat").rpartition(") ")[2].split()[1])
                found |= {int(name)} if parent == os.getpid() else set()
    return found


def read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


# --- the pool ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_every_task_is_done_once(jobs: int) -> None:
    before, numbers = children(), []

    def work(task: int) -> tuple[int, int, int]:
        return task, task * task, numbers[0] if numbers else -1

    with pool(work, jobs, numbers.append) as spread:
        found = sorted(spread(range(200)))
        again = sorted(spread(range(3)))
        assert len(children() - before) == (jobs if jobs > 1 else 0)
    assert [(task, square) for task, square, _ in found] == [(n, n * n) for n in range(200)]
    assert [task for task, _, _ in again] == [0, 1, 2]
    assert {number for _, _, number in found} <= (set(range(jobs)) if jobs > 1 else {-1})
    assert children() == before


def test_large_tasks_and_results_do_not_wait_for_each_other() -> None:
    with pool(lambda task: task * 40, 2) as spread:
        assert sum(len(part) for part in spread(bytes(30_000) for _ in range(20))) == 20 * 40 * 30_000


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_the_work_raises_is_raised(jobs: int) -> None:
    def work(task: int) -> int:
        if task == 7:
            raise FormatError("the seventh", hint="count again")
        return task

    before = children()
    with pytest.raises(FormatError, match="the seventh") as caught, pool(work, jobs) as spread:
        list(spread(range(20)))
    assert caught.value.hint == "count again"
    assert children() == before


def test_a_process_that_dies_is_an_error_and_not_a_hang() -> None:
    def work(task: int) -> int:
        if task == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    before = children()
    with pytest.raises(StoreIoError, match="was ended by SIGKILL"), pool(work, 3) as spread:
        list(spread(range(30)))
    assert children() == before


def test_a_process_that_ends_by_itself_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    def work(_: int) -> NoReturn:
        raise SystemExit(4)

    with pytest.raises(StoreIoError, match="exit code 1"), pool(work, 2) as spread:
        list(spread(range(30)))
    assert "SystemExit: 4" in capfd.readouterr().err


def test_who_leaves_early_leaves_nobody_behind() -> None:
    before = children()
    with pool(time.sleep, 2) as spread:
        left = spread([0.001, 0.001, 600, 600])
        next(left)
    assert children() == before


def test_the_processes_end_with_the_one_that_forked_them(tmp_path: Path) -> None:
    program = (
        "import os, time\n"
        "from encfs_js.pool import pool\n"
        "def work(path):\n"
        "    open(path, 'w').write(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        f"with pool(work, 2) as spread: list(spread([{str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as above:
        try:
            mounts.until(
                lambda: all((tmp_path / n).exists() and (tmp_path / n).read_text() for n in "ab"), "no processes"
            )
            pids = [int((tmp_path / name).read_text()) for name in "ab"]
        finally:
            above.kill()
        mounts.until(lambda: not any(alive(pid) for pid in pids), "they live on")


def alive(pid: int) -> bool:
    try:
        return ") Z " not in read(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- the rate ---------------------------------------------------------------------------------------------------------


class Clock:
    """Time that only passes while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_the_rate_is_held_over_all_processes() -> None:
    clock = Clock()
    meter = Meter(2, 1000.0, clock=clock, sleep=clock.sleep)
    meter.add(500)
    assert clock.now == pytest.approx(100.5)
    meter.take(1)  # as another process would
    meter.add(1500)
    assert meter.total == 2000
    assert clock.now == pytest.approx(102.0)
    clock.now = 110.0
    meter.add(100)
    assert clock.now == 110.0, "who is late does not wait"


def test_counters_are_shared_by_forked_processes() -> None:
    meter = Meter(3)
    with pool(meter.add, 3, meter.take) as spread:
        list(spread([10] * 50))
    assert meter.total == 500


def test_verify_reads_no_faster_than_the_rate(tmp_path: Path) -> None:
    store, clock = Store(tmp_path / "store"), Clock()
    store.seal("file", text(3_000_000))
    store.seal("small", text(10))
    size = sum(path.stat().st_size for path in (store.top / "file", store.top / "small"))
    meter = Meter(1, 100_000.0, clock=clock, sleep=clock.sleep)
    assert store.verify(meter=meter).damage == []
    assert meter.total == size
    assert clock.now - 100 == pytest.approx(size / 100_000)


# --- verify -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hurt(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    for i in range(300):
        store.seal(f"jetstream/$G/streams/S{i % 7}/msgs/{i}.blk", text(1 + i * 997 % 60_000, i), SUITES[i % 2])
    for i in (3, 77, 299):
        edit(store.top / f"jetstream/$G/streams/S{i % 7}/msgs/{i}.blk", lambda raw: raw.__setitem__(99, raw[99] ^ 1))
    (store.top / "plain").write_bytes(b"plain")
    (store.top / "empty").write_bytes(b"")
    return store


def test_more_processes_find_the_same(hurt: Store) -> None:
    alone, shown = hurt.verify(), []
    meter = Meter(3)
    together = hurt.verify(jobs=3, meter=meter, show=shown.append)
    assert together == alone
    assert len(alone.damage) == 4
    assert [damage.lost for damage in together.damage] == [damage.lost for damage in alone.damage]
    assert shown[-1]["files"] == shown[-1]["files_done"] == 302
    assert shown[-1]["bytes_done"] == meter.total
    assert 0 < shown[0]["files_done"] <= 302
    done = [progress["files_done"] for progress in shown]
    assert done == sorted(done)


def test_keys_are_never_sent(hurt: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, _protocol: object) -> NoReturn:
        raise AssertionError(f"{type(self).__name__} is sent")

    monkeypatch.setattr(type(hurt.keys), "__reduce_ex__", refuse)
    assert len(hurt.verify(jobs=2).damage) == 4


def test_a_killed_process_of_the_command_is_an_error(tmp_path: Path) -> None:
    store = tmp_path / "store"
    mounts.init(store)
    fill(store, 40)
    child = subprocess.Popen(
        [*mounts.COMMAND, "verify", store, "--jobs", "2", "--rate", "0.5"],
        env=mounts.environment(mounts.KEY),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        path = f"/proc/{child.pid}/task/{child.pid}/children"
        pids = mounts.until(lambda: len(read(path).split()) == 2 and read(path).split(), "no worker processes")
        os.kill(int(pids[0]), signal.SIGKILL)
        _, err = child.communicate(timeout=mounts.PATIENCE)
    finally:
        child.kill()
        child.wait(mounts.PATIENCE)
    assert child.returncode == 25
    assert "a worker process was ended by SIGKILL" in err


def fill(store: Path, count: int) -> None:
    """Seal files into a store that `init` made."""
    keys = keystore.unlock_store(str(store), mounts.KEY.encode())[1]
    file_keys = FileKeys(keys.volume_key, keys.settings.cipher, 1)
    for i in range(count):
        with open(store / f"file{i}", "w+b") as file:
            SealedFile(Backing(), file.fileno(), file_keys).write(0, text(50_000, i))


# --- .encfs_js and what lies in the clear -----------------------------------------------------------------------------


def answer(store: Path, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(mounts.run("verify", store, "--json", code=code).stdout)
    return found


def test_the_own_files_are_checked(tmp_path: Path) -> None:
    store = tmp_path / "store"
    mounts.init(store)
    meta = store / ".encfs_js"
    assert answer(store)["warnings"] == [], "a store that nobody has mounted yet has no state"
    keys = keystore.unlock_store(str(store), mounts.KEY.encode())[1]
    fill(store, 1)
    (warning,) = answer(store)["warnings"]
    assert "state is missing" in warning
    state.save(str(store), keys, state.State(clean=True, began=5, windows=()))
    assert answer(store)["warnings"] == []
    good = (meta / "state").read_bytes()
    (meta / "state").write_bytes(good.replace(b'"clean": true', b'"clean": false'))
    found = answer(store, 22)
    assert [each["file"] for each in found["own_damage"]] == [".encfs_js/state"]
    assert not found["sound"]
    out = mounts.run("verify", store, code=22)
    assert "damaged: .encfs_js/state: does not authenticate" in out.stdout
    assert "1 file of encfs_js's own damaged" in out.stderr
    (meta / "state").write_bytes(good)
    (meta / "guard").write_bytes(b"{}")
    assert [each["file"] for each in answer(store, 22)["own_damage"]] == [".encfs_js/guard"]
    (meta / "guard").unlink()
    copy = (meta / "keyring.bak").read_bytes()
    (meta / "keyring.bak").unlink()
    (warning,) = answer(store)["warnings"]
    assert "keyring.bak is missing" in warning
    assert f"warning: {warning}" in mounts.run("verify", store).stdout
    (meta / "keyring.bak").write_bytes(copy)
    (meta / "redo-00000000000000ff.orphan").write_bytes(b"x")
    (meta / "redo-00000000000000fe").write_bytes(b"x")
    first, second = answer(store)["warnings"]
    assert "redo-00000000000000fe: the rewriting of a file was interrupted" in first
    assert "redo-00000000000000ff.orphan is the content of a file that is gone" in second


def test_a_store_that_is_sealed_in_part_is_told(tmp_path: Path) -> None:
    mounts.init(tmp_path / "store")
    state.mark(str(tmp_path / "store"))
    (warning,) = answer(tmp_path / "store")["warnings"]
    assert "only a part of the store is sealed" in warning


def test_the_copy_of_another_keyring_is_told(tmp_path: Path) -> None:
    store, other = tmp_path / "store", tmp_path / "other"
    mounts.init(store)
    mounts.init(other)
    (store / ".encfs_js/keyring.bak").write_bytes((other / ".encfs_js/keyring").read_bytes())
    warnings = answer(store)["warnings"]
    assert any("another store" in warning for warning in warnings)


def test_a_closed_guard_is_a_warning(tmp_path: Path) -> None:
    store = tmp_path / "store"
    mounts.init(store)
    closed = {
        "directory": "jetstream/$G/streams/S",
        "file": "jetstream/$G/streams/S/msgs/1.blk",
        "page": 3,
        "since": "now",
    }
    (store / ".encfs_js/guard").write_text(json.dumps({"closed": [closed]}))
    assert answer(store)["warnings"] == [
        "the guard is closed over stream S of account $G since now: jetstream/$G/streams/S/msgs/1.blk page 3"
    ]


def test_plain_files_are_listed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    mounts.init(store, plaintext="read")
    for i in range(25):
        (store / f"plain{i:02}").write_bytes(b"x" * i + b"y")
    found = answer(store)
    assert found["plaintext"] == [{"file": f"plain{i:02}", "bytes": i + 1} for i in range(25)]
    out = mounts.run("verify", store).stdout
    assert out.count("not sealed: plain") == 20
    assert "not sealed: 5 more; --json names them all" in out
    assert "25 files not sealed yet" in out


def test_pages_of_a_long_run_are_told_apart(tmp_path: Path) -> None:
    """The fast way through a run must notice what the slow one does: tags, lengths, places."""
    store = Store(tmp_path / "store")
    path = store.seal("file", text(200 * 4064))
    sound = path.read_bytes()
    changes = {
        "tag": lambda raw, page: raw.__setitem__((page + 1) * PAGE - 1, raw[(page + 1) * PAGE - 1] ^ 1),
        "nonce": lambda raw, page: raw.__setitem__(page * PAGE, raw[page * PAGE] ^ 1),
        "length": lambda raw, page: raw.__setitem__(page * PAGE + 12, raw[page * PAGE + 12] ^ 1),
        "zero": lambda raw, page: raw.__setitem__(page * PAGE + 15, 1),
        "text": lambda raw, page: raw.__setitem__(page * PAGE + 700, raw[page * PAGE + 700] ^ 1),
        "place": lambda raw, page: raw.__setitem__(
            slice(page * PAGE, (page + 1) * PAGE), raw[(page - 2) * PAGE : (page - 1) * PAGE]
        ),
    }
    for change in changes.values():
        for page in (3, 63, 64, 65, 127, 130, 199):
            raw = bytearray(sound)
            change(raw, page)
            path.write_bytes(raw)
            assert store.damaged() == {"file": [page]}
