"""verify on stores as nats-server keeps them: real ones are sound in every mode, and what is changed in them is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mounts
import nats_world as world
import pytest
import server_stores as stores
from test_jetstream import VECTORS, unpack

from encfs_js import jetstream, serverkeys, serverstore
from encfs_js.backing import Backing
from encfs_js.census import is_store
from encfs_js.servercheck import Report, check, has_keys

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS = [stores.KEY.encode()]
STREAMS = "jetstream/$G/streams"
needs_server = [
    pytest.mark.nats,
    pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-"),
]
pytestmark = needs_server


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store of each mode, of servers that have stopped."""
    found = {}
    for mode, options in stores.MODES.items():
        top = tmp_path_factory.mktemp(mode)
        with world.serving(top / "store", top / "work", **options) as server:
            stores.fill(server)
        found[mode] = top / "store"
    return found


@pytest.fixture(params=list(stores.MODES))
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(made: dict[str, Path], mode: str, tmp_path: Path) -> Path:
    shutil.copytree(made[mode], tmp_path / "store")
    return tmp_path / "store"


def checked(store: Path, keys: list[bytes] = KEYS, **how: Any) -> Report:
    return check(Backing(), str(store), keys, **how)


def edit(path: Path, change: Callable[[bytearray], Any]) -> None:
    raw, times = bytearray(path.read_bytes()), path.stat()
    change(raw)
    path.write_bytes(raw)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def flip(path: Path, at: int) -> None:
    edit(path, lambda raw: raw.__setitem__(at, raw[at] ^ 1))


def block(store: Path, stream: str, number: int, mode: str) -> list[jetstream.Record]:
    """The records of a block."""
    path, keystream = store / STREAMS / stream / f"msgs/{number}.blk", None
    if mode != "plain":
        asset = serverkeys.stream("$G", stream).block(number)
        keystream = serverkeys.Keystream(
            serverkeys.open_key_file(path.with_suffix(".key").read_bytes(), asset, KEYS, "")
        )
    name = jetstream.block_name(stream, number)
    return list(jetstream.records(jetstream.plain_block(path.read_bytes(), keystream, name, "")[0], name, ""))


def test_a_store_that_a_server_has_left_is_sound(store: Path, mode: str) -> None:
    assert is_store(Backing(), str(store))
    assert has_keys(Backing(), str(store)) == (mode != "plain")
    report = checked(store)
    assert report.damage == report.torn == report.plaintext == report.unreadable == report.warnings == []
    assert report.files == sum(path.is_file() for path in store.rglob("*"))
    assert report.blocks == len(list(store.rglob("*.blk")))
    assert report.records > 500
    assert set(report.ciphers) == (set() if mode == "plain" else {mode})
    alike = checked(store, jobs=2)
    assert alike == report


def test_damage_is_named_by_the_messages_it_touches(store: Path, mode: str) -> None:
    directory = store / STREAMS / "ORDERS/msgs"
    records = block(store, "ORDERS", 1, mode)
    hit = [next(r for r in records if r.seq == seq and not r.tombstone) for seq in (10, 11, 50)]
    flip(directory / "1.blk", hit[0].offset + hit[0].length - 20)
    flip(directory / "1.blk", hit[1].offset)  # its length
    flip(directory / "1.blk", hit[2].offset + 6)  # its sequence
    report = checked(store)
    assert [(d.path.decode(), d.offset) for d in report.damage] == [
        (f"{STREAMS}/ORDERS/msgs/1.blk", hit[0].offset),
        (f"{STREAMS}/ORDERS/msgs/1.blk", hit[2].offset),
    ]
    assert [d.lost.ranges for d in report.damage if d.lost] == [((10, 11),), ((50, 50),)]
    assert str(report.damage[0].subject) == "stream ORDERS of account $G, block 1"
    assert "hash" in report.damage[0].why


def test_a_deleted_message_is_no_loss(store: Path, mode: str) -> None:
    records = block(store, "ORDERS", 1, mode)
    deleted = next(r for r in records if r.seq == 40 and not r.tombstone)
    flip(store / STREAMS / "ORDERS/msgs/1.blk", deleted.offset + 60)
    (damage,) = checked(store).damage
    assert damage.lost is not None
    assert damage.lost.ranges == ()


def test_a_compressed_block_is_lost_as_a_whole(store: Path, mode: str) -> None:
    directory = store / STREAMS / "LOG/msgs"
    number = min(int(path.stem) for path in directory.glob("*.blk"))
    records = block(store, "LOG", number, mode)
    flip(directory / f"{number}.blk", 500)
    (damage,) = checked(store).damage
    assert damage.lost is not None
    ((first, last),) = damage.lost.ranges
    assert first is not None
    assert records[0].seq <= first <= records[-1].seq
    assert last == records[-1].seq


def test_what_no_record_can_begin_with_is_no_torn_tail(made: dict[str, Path], tmp_path: Path) -> None:
    store = Path(shutil.copytree(made["plain"], tmp_path / "store"))
    directory = store / STREAMS / "MANY/msgs"
    number = max(int(path.stem) for path in directory.glob("*.blk"))
    end = (directory / f"{number}.blk").stat().st_size
    for garbage in (b"\xff" * 100, b"\x01\0\0\x02" + b"x" * 100):  # too long for any record
        edit(directory / f"{number}.blk", lambda raw, garbage=garbage: raw.__setitem__(slice(end, None), garbage))
        report = checked(store)
        assert report.torn == []
        (damage,) = report.damage
        assert (damage.path, damage.offset) == (f"{STREAMS}/MANY/msgs/{number}.blk".encode(), end)


def test_a_cut_last_record_is_a_torn_tail(store: Path, mode: str) -> None:
    directory = store / STREAMS / "MANY/msgs"
    numbers = sorted(int(path.stem) for path in directory.glob("*.blk"))
    last = block(store, "MANY", numbers[-1], mode)[-1]
    edit(directory / f"{numbers[-1]}.blk", lambda raw: raw.__delitem__(slice(last.offset + 40, None)))
    report = checked(store)
    assert report.torn == [(f"{STREAMS}/MANY/msgs/{numbers[-1]}.blk".encode(), last.offset)]
    assert report.damage == []
    assert any("MANY/msgs/index.db" in warning for warning in report.warnings)
    # In a block that is not the last one it is damage.
    first = block(store, "MANY", numbers[0], mode)[-1]
    edit(directory / f"{numbers[0]}.blk", lambda raw: raw.__delitem__(slice(first.offset + 40, None)))
    (damage,) = checked(store).damage
    assert (damage.path, damage.offset) == (f"{STREAMS}/MANY/msgs/{numbers[0]}.blk".encode(), first.offset)
    assert damage.lost is not None
    assert damage.lost.ranges == ((first.seq, first.seq),)


def test_a_server_that_was_killed_leaves_no_damage(tmp_path: Path, mode: str) -> None:
    with world.serving(tmp_path / "store", tmp_path / "work", **stores.MODES[mode]) as server:
        world.add_stream(server, "ORDERS", "ORDERS.>")
        world.publish(server, world.sample("ORDERS", 100))
        assert checked(tmp_path / "store").damage == [], "while it runs"
        server.kill()
        report = checked(tmp_path / "store")
    assert report.damage == []
    assert report.records >= 100


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("meta.inf", "meta.sum does not match"),
        ("meta.sum", ""),
        ("msgs/index.db", "the hash at the end does not match"),
        ("obs/worker/meta.inf", ""),
        ("obs/worker/o.dat", ""),
    ],
)
def test_other_files_are_checked(store: Path, mode: str, name: str, why: str) -> None:
    if name == "obs/worker/o.dat" and mode == "plain":
        edit(store / STREAMS / "ORDERS" / name, lambda raw: raw.__delitem__(slice(-3, None)))  # it has no checksum
    else:
        flip(store / STREAMS / "ORDERS" / name, 9)
    report = checked(store)
    files = {damage.path.decode() for damage in report.damage}
    assert files == {f"{STREAMS}/ORDERS/{name}".replace("meta.sum", "meta.inf")}
    (damage,) = report.damage
    assert damage.subject.stream == "ORDERS"
    assert damage.subject.consumer == ("worker" if "worker" in name else None)
    if mode == "plain" and why:
        assert damage.why == why


def test_a_lost_metafile_sum_is_damage(store: Path) -> None:
    (store / STREAMS / "ORDERS/meta.sum").unlink()
    (damage,) = checked(store).damage
    assert damage.why == "meta.sum is missing"


@pytest.mark.parametrize("mode", ["chachapoly", "aes"], indirect=True)
def test_a_damaged_key_file_costs_its_block(store: Path, mode: str) -> None:
    directory = store / STREAMS / "MANY/msgs"
    number = min(int(path.stem) for path in directory.glob("*.blk"))
    records = block(store, "MANY", number, mode)
    flip(directory / f"{number}.key", 40)
    report = checked(store)
    assert not report.locked
    assert [damage.path.decode() for damage in report.damage] == [
        f"{STREAMS}/MANY/msgs/{number}.blk",
        f"{STREAMS}/MANY/msgs/{number}.key",
    ]
    lost = report.damage[0].lost
    assert lost is not None
    assert lost.ranges[0][1] == records[-1].seq
    (directory / f"{number}.key").unlink()
    (damage,) = checked(store).damage
    assert damage.why == f"its key file {number}.key is missing"


@pytest.mark.parametrize("mode", ["chachapoly", "aes"], indirect=True)
@pytest.mark.usefixtures("mode")
def test_what_is_in_the_clear_is_listed(store: Path, made: dict[str, Path]) -> None:
    directory = store / STREAMS / "ORDERS/msgs"
    # What nats-server leaves so after its first run with a key, and what somebody could put there.
    shutil.copy(made["plain"] / STREAMS / "ORDERS/msgs/1.blk", directory / "1.blk")
    (directory / "1.key").unlink()
    shutil.copy(made["plain"] / STREAMS / "ORDERS/msgs/index.db", directory / "index.db")
    report = checked(store)
    assert report.damage == []
    assert [path.decode() for path, _ in report.plaintext] == [
        f"{STREAMS}/ORDERS/msgs/1.blk",
        f"{STREAMS}/ORDERS/msgs/index.db",
    ]


@pytest.mark.parametrize("mode", ["aes"], indirect=True)
def test_the_wrong_key_is_said_as_such(store: Path) -> None:
    assert checked(store, [b"another"]).locked
    done = mounts.run("verify", store, key="another", code=12)
    assert "the key opens no key file of this store" in done.stderr
    (store.parent / "previous").write_text(stores.KEY)
    mounts.run("verify", store, "--prev-key-file", store.parent / "previous", key="another")


def test_the_command(store: Path, mode: str) -> None:
    key = None if mode == "plain" else stores.KEY
    answer = json.loads(mounts.run("verify", store, "--json", key=key).stdout)
    assert answer["sound"]
    assert answer["kind"] == ("plain" if mode == "plain" else "server")
    if mode != "plain":
        mounts.run("verify", store, key=None, code=11)
    records = block(store, "ORDERS", 1, mode)
    flip(store / STREAMS / "ORDERS/msgs/1.blk", records[6].offset + 26)
    done = mounts.run("verify", store, key=key, code=22)
    assert (
        f"damaged: {STREAMS}/ORDERS/msgs/1.blk byte {records[6].offset}: a record that does not match its hash: "
        f"stream ORDERS of account $G, block 1, messages {records[6].seq}\n"
    ) in done.stdout
    answer = json.loads(mounts.run("verify", store, "--json", key=key, code=22).stdout)
    assert answer["damage"] == [
        {
            "file": f"{STREAMS}/ORDERS/msgs/1.blk",
            "offset": records[6].offset,
            "why": "a record that does not match its hash",
            "what": "message block",
            "account": "$G",
            "stream": "ORDERS",
            "raft_group": None,
            "consumer": None,
            "block": 1,
            "sequences": [[records[6].seq, records[6].seq]],
        }
    ]


def test_nothing_is_written(store: Path) -> None:
    names = [store, *store.rglob("*")]
    before = [(name, name.stat()) for name in names]
    checked(store)
    for name, was in before:
        now = name.stat()
        assert (now.st_mtime_ns, now.st_ctime_ns, now.st_size) == (was.st_mtime_ns, was.st_ctime_ns, was.st_size)


def test_a_directory_that_is_no_store_is_none(tmp_path: Path) -> None:
    (tmp_path / "jetstream/account").mkdir(parents=True)
    assert not is_store(Backing(), str(tmp_path))
    assert not is_store(Backing(), str(tmp_path / "missing"))
    mounts.run("verify", tmp_path, code=14)
    (tmp_path / "jetstream/account/streams").mkdir()
    assert is_store(Backing(), str(tmp_path))
    assert serverstore.place_of(b"jetstream/account/streams/S/msgs/1.blk").number == 1
    os.rename(tmp_path / "jetstream/account", tmp_path / "account")  # as it was before 2.2
    os.rmdir(tmp_path / "jetstream")
    assert is_store(Backing(), str(tmp_path))


@pytest.mark.parametrize("name", VECTORS)
def test_kept_stores_of_other_versions_are_sound(name: str, tmp_path: Path) -> None:
    vector = unpack(name, tmp_path)
    report = checked(tmp_path, [vector["key"].encode()])
    assert report.damage == report.torn == report.plaintext == report.unreadable == []
    assert report.records > 0
    groups = sorted(tmp_path.glob("jetstream/$SYS/_js_/*/msgs/*.blk"))
    assert bool(groups) == ("cluster" in name)
    if groups:
        group = next(path for path in groups if path.stat().st_size > 200)
        flip(group, 100)
        flip(group.parents[1] / "tav.idx", 0)  # has no checksum: any term will do
        edit(group.parents[1] / "peers.idx", lambda raw: raw.__delitem__(slice(-1, None)))
        found = checked(tmp_path, [vector["key"].encode()]).damage
        assert {damage.subject.group for damage in found} == {group.parents[1].name}
        assert {damage.path.decode() for damage in found} == {
            str(group.relative_to(tmp_path)),
            str(group.parents[1].relative_to(tmp_path) / "peers.idx"),
        }
