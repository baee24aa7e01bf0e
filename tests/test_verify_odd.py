"""verify and inspect on what an operator would not expect in a store: files of any size, odd JSON, deep directories, Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import mounts
import pytest
import server_stores as stores
from sealed_files import PAGE, text
from test_inspect import by_name, inspect
from test_jetstream import unpack
from test_verify import Store
from test_verify_pool import children

from encfs_js import filecheck, jetstream, loss, serverstate
from encfs_js.backing import Backing
from encfs_js.census import is_store
from encfs_js.errors import StoreIoError
from encfs_js.inspect import walk
from encfs_js.meter import Meter
from encfs_js.natscodec import hash_key, highwayhash64
from encfs_js.pool import pool
from encfs_js.servercheck import Report, check

if TYPE_CHECKING:
    from pathlib import Path

STREAM = "jetstream/$G/streams/SMALL"
HUGE = 1 << 42


@pytest.fixture(params=["plain", "chachapoly"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    unpack(f"2.15.1-{request.param}", tmp_path / "store")
    return tmp_path / "store"


def checked(store: Path) -> Report:
    return check(Backing(), str(store), [stores.KEY.encode()])


def grow(path: Path, size: int) -> None:
    """Make a file larger by a hole, which takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("ab").close()
    os.truncate(path, size)


# --- large files ------------------------------------------------------------------------------------------------------

LARGE = [
    f"{STREAM}/meta.key",
    f"{STREAM}/msgs/1.key",
    f"{STREAM}/meta.inf",
    f"{STREAM}/msgs/thw.db",
    "jetstream/$SYS/_js_/_meta_/tav.idx",
    "jetstream/$SYS/_js_/_meta_/snapshots/snap.1.1",
]


@pytest.mark.parametrize("name", LARGE)
def test_a_file_larger_than_any_is_damage_and_not_read(name: str, store: Path) -> None:
    grow(store / name, HUGE)
    assert name in {os.fsdecode(damage.path) for damage in checked(store).damage}


def test_a_checksum_larger_than_any_does_not_match(store: Path) -> None:
    grow(store / STREAM / "meta.sum", HUGE)
    assert [os.fsdecode(damage.path) for damage in checked(store).damage] == [f"{STREAM}/meta.inf"]


def test_a_block_larger_than_any_is_damage_and_its_records_are_read(store: Path) -> None:
    before = checked(store)
    assert not before.damage
    path = max((store / STREAM / "msgs").glob("*.blk"), key=lambda path: int(path.stem))
    written, name = path.stat().st_size, os.fsencode(path.relative_to(store))
    grow(path, HUGE)
    if before.ciphers:  # the cipher's counter ends before: nothing of it can be decrypted
        assert name in {damage.path for damage in checked(store).damage}
        return
    after = checked(store)
    (damage,) = after.damage
    assert (damage.path, damage.offset) == (name, written)
    assert damage.why == "a block longer than any that nats-server writes"
    assert after.records == before.records
    os.truncate(path, written + 100)  # that is what a power cut leaves
    after = checked(store)
    assert (after.damage, after.torn) == ([], [(name, written)])


def test_what_is_behind_many_zeros_is_found_at_once(tmp_path: Path) -> None:
    head = (5).to_bytes(8, "little") + bytes(8)
    record = (31).to_bytes(4, "little") + head + (1).to_bytes(2, "little") + b"s"
    path = tmp_path / "jetstream/A/streams/S/msgs/1.blk"
    grow(path, 48 << 20)
    with open(path, "ab") as file:
        file.write(record + highwayhash64(hash_key(jetstream.block_name("S", 1)), head, b"s"))
    report = checked(tmp_path)
    assert (report.records, [damage.offset for damage in report.damage]) == (1, [0])


def test_a_hole_in_a_sealed_file_is_told_by_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filecheck, "_MOST", 100)
    store = Store(tmp_path / "store")
    path = store.seal("jetstream/file", text(3 * PAGE))
    whole = path.stat().st_size // PAGE
    for pages in (HUGE // PAGE, 150):
        os.truncate(path, pages * PAGE)
        found = store.damaged()["jetstream/file"]
        assert len(found) == 101
        assert found[-1] == pages - 1
        assert found[:-1] == [*range(found[0], found[0] + 100)]
        assert found[0] in {whole - 1, whole}
    os.truncate(path, 50 * PAGE)
    assert store.damaged()["jetstream/file"][-1] == 49


def test_deletes_that_no_memory_holds_are_not_counted() -> None:
    node = (1, (1 << 2048) - 1)
    block = serverstate.BlockState(1, 0, 1, 0, 5, 0, 0, 0, (node,) * 1000)
    assert loss.deleted_in(block) == ()
    assert loss.deleted_in(block._replace(deleted=(node, node))) == tuple(range(1, 2049)) * 2


# --- odd names, odd JSON ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b'{"max_age": NaN}',
        b'{"max_bytes": 1e999}',
        b'{"max_age": %s}' % (b"9" * 400),
        b'{"subjects": %s}' % (b"[" * 300 + b"]" * 300),
    ],
)
def test_a_configuration_that_nats_server_does_not_write_is_unreadable(raw: bytes, tmp_path: Path) -> None:
    unpack("2.15.1-plain", tmp_path / "store")
    directory = tmp_path / "store" / STREAM
    (directory / "meta.inf").write_bytes(raw)
    (directory / "meta.sum").write_bytes(highwayhash64(hash_key("SMALL"), raw).hex().encode())
    said = mounts.run("inspect", tmp_path / "store", "--json", key=None).stdout
    found = json.loads(said, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert by_name(found)["SMALL"]["config"] is None
    assert f"{STREAM}/meta.inf" in {each["path"] for each in found["unreadable"]}
    mounts.run("inspect", tmp_path / "store", key=None)


def test_odd_names_do_not_reach_the_terminal(store: Path) -> None:
    top = store / "jetstream"
    shutil.copytree(top / "$G", top / "\udcff\x1b[31m\n$X")
    key = stores.KEY if (store / STREAM / "meta.key").exists() else None
    for command, code in (("verify", 22 if key else 0), ("inspect", 0)):
        said = mounts.run(command, store, key=key, code=code)
        assert all(line.isprintable() for line in (said.stdout + said.stderr).split("\n"))
    assert "\udcff\x1b[31m\n$X" in {each["name"] for each in inspect(store)["accounts"]}


def test_directories_that_lie_too_deep_are_named(tmp_path: Path) -> None:
    store = tmp_path / "store"
    unpack("2.15.1-plain", store)
    fd = os.open(store, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    try:
        failed: list[bytes] = []
        seen = {entry.path for entry in walk(Backing(), str(store), lambda path, _: failed.append(path))}
        assert failed == [b"/".join([b"d"] * 257)]
        assert b"/".join([b"d"] * 256) in seen
        assert "256 directories in each other" in mounts.run("verify", store, key=None, code=25).stdout
        assert [each["path"] for each in inspect(store)["unreadable"]] == ["/".join(["d"] * 257)]
    finally:
        subprocess.run(["rm", "-rf", store / "d"], check=True)  # rmtree does not get so deep


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_who_may_not_look_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "jetstream/$G/streams").mkdir(parents=True)
    (tmp_path / "jetstream").chmod(0o700)
    tmp_path.chmod(0o755)
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)  # nobody may not get there by its path
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setresuid(65534, 65534, 65534)
            with pytest.raises(StoreIoError, match="Permission denied"):
                is_store(Backing(), f"/proc/self/fd/{fd}")
            code = 0
        finally:
            os._exit(code)
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert is_store(Backing(), str(tmp_path))


# --- rate, processes --------------------------------------------------------------------------------------------------


def test_a_rate_may_be_as_low_as_a_number_can_be(tmp_path: Path) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        Meter(1, 1e-300, sleep=sleep).add(1 << 40)
    assert 0 < slept[0] <= 3600
    (tmp_path / "jetstream").mkdir()
    mounts.run("verify", "--rate", "nan", tmp_path, key=None, code=2)


def test_ctrl_c_in_a_fork_ends_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    before, fork = children(), os.fork

    def interrupted() -> int:
        pid = fork()
        if pid:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # here it would be met
        return pid

    monkeypatch.setattr(os, "fork", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), pool(lambda task: task, 3):
        pytest.fail("the interruption was lost")
    assert children() == before
    assert signal.getsignal(signal.SIGINT) is handler
