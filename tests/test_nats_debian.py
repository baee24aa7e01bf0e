"""Debian's nats-server (2.9 in bookworm): its older store format, on the mount and as it lies on a disk.

tests/run.sh puts the package's files into .venv/debian where the distribution has it.
"""

from __future__ import annotations

import base64
import os
import subprocess
from typing import TYPE_CHECKING, Any, NamedTuple

import mounts
import nats_world as world
import pytest
import server_stores as stores
from test_jetstream import unpack

from encfs_js import jetstream, serverkeys, serverold, serverstate
from encfs_js.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FETCHED = os.path.join(mounts.ROOT, ".venv/debian/nats-server/usr/sbin/nats-server")
PLACES = (FETCHED, "/usr/sbin/nats-server", "/usr/bin/nats-server")
BINARY = next((path for path in PLACES if os.access(path, os.X_OK)), "")
MARKER = b"a payload that an older server keeps"
KEYS = [stores.KEY.encode()]


def version() -> str:
    said = subprocess.run([BINARY, "--version"], capture_output=True, text=True, timeout=mounts.PATIENCE, check=True)
    return said.stdout.split()[-1].removeprefix("v")


def needs_old() -> str:
    """Why there is no nats-server of before 2.10, or an empty string."""
    if not BINARY:
        return "no nats-server of the distribution: tests/run.sh fetches it where there is one (Debian 12)"
    if tuple(map(int, version().split(".")[:2])) >= (2, 10):
        return f"the distribution's nats-server is {version()}: its stores are no older than those of 2.10"
    return ""


NEEDS_OLD = needs_old()


# --- on the mount -----------------------------------------------------------------------------------------------------


@pytest.mark.mount
@pytest.mark.nats
@pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")
@pytest.mark.skipif(not BINARY, reason=NEEDS_OLD or "-")
def test_distribution_server(tmp_path: Path) -> None:
    store, mountpoint, work = tmp_path / "store", tmp_path / "mnt", tmp_path / "work"
    store.mkdir()
    mounts.init(store)
    messages = world.sample("orders", 2000, marker=MARKER)
    stored = [world.Stored(seq, *message) for seq, message in enumerate(messages, 1)]
    with mounts.mounted(store, mountpoint), world.serving(mountpoint, work, binary=BINARY) as server:
        world.add_stream(server, "ORDERS", "orders.>")
        world.publish(server, messages)
        world.add_durable(server, "ORDERS", "worker")
        assert world.consume(server, "ORDERS", "worker", 500) == stored[:500]
        server.restart()
        assert world.read(server, "ORDERS") == stored
        server.restart(kill=True)
        assert world.read(server, "ORDERS") == stored
        assert world.consumer_state(server, "ORDERS", "worker") == (500, 0, 1500)
    assert mounts.unsealed(store) == []
    assert mounts.holding(store, MARKER) == []
    mounts.verify(store)

    # Its successor takes the store over, on the same mount.
    if not world.needs_server():
        with mounts.mounted(store, mountpoint), world.serving(mountpoint, work) as server:
            assert world.read(server, "ORDERS") == stored
        mounts.verify(store)


# --- its own encryption -----------------------------------------------------------------------------------------------


class OldFound(NamedTuple):
    """What the files of a stream of 2.9 say. subjects: name to how many messages; encrypted: by file, of those that may be."""

    meta: dict[str, Any]
    indexes: dict[int, serverold.OldIndex]
    subjects: dict[bytes, int]
    messages: list[world.Stored]
    consumers: dict[str, tuple[dict[str, Any], serverstate.ConsumerState]]
    encrypted: dict[str, bool]


def read_old(directory: Path, keys: Sequence[bytes], account: str = "$G") -> OldFound:
    """Read the directory of a stream that 2.9 wrote: decrypt and check everything, work out which messages there are."""
    name, asset = directory.name, serverkeys.stream(account, directory.name)
    seed = stores.key_file(directory / "meta.key", asset, keys)
    meta = stores.read_meta(directory, seed, name)
    encrypted, indexes, subjects = {"meta.inf": seed is not None}, {}, dict[bytes, int]()
    messages: list[world.Stored] = []
    for number in stores.blocks(directory):
        file, label = directory / f"msgs/{number}.blk", jetstream.block_name(name, number)
        own = stores.key_file(file.with_suffix(".key"), asset.block(number), keys)
        block, encrypted[file.name] = jetstream.plain_block(
            file.read_bytes(), serverkeys.Keystream(own) if own else None, label, str(file)
        )
        path = file.with_suffix(".idx")
        raw = path.read_bytes()
        index = serverold.parse_old_index(serverold.open_old_index(raw, own, str(path)) if own else raw, str(path))
        indexes[number], encrypted[path.name] = index, own is not None
        records = list(jetstream.records(block, label, str(file)))
        # A plain server overwrites what is deleted, and forgets that this changes the hash.
        assert index.last_hash == (block[-8:] or bytes(8)) or (own is None and records[-1].seq in index.deleted)
        here = [
            record
            for record in jetstream.messages(iter(records))
            if index.first_seq <= record.seq <= index.last_seq and record.seq not in index.deleted
        ]
        assert (len(here), sum(record.length for record in here)) == index[:2]
        if here:
            assert (here[0].seq, here[0].time) == (index.first_seq, index.first_time)
        messages += [
            world.Stored(r.seq, r.subject.decode(), bytes(r.payload), stores.headers(bytes(r.header))) for r in here
        ]
        path = file.with_suffix(".fss")
        if path.exists():
            found, last_hash = serverold.parse_old_subjects(path.read_bytes(), label, str(path))
            assert last_hash in {index.last_hash, block[-8:]}
            there = counted(here)
            assert {each.name: each.total for each in found} == {
                subject: total for subject, (total, *_) in there.items()
            }
            for each in found:
                _, first, last = there[each.name]
                assert each.first <= first <= last <= each.last
                subjects[each.name] = subjects.get(each.name, 0) + each.total
    consumers = {}
    for consumer in sorted(directory.glob("obs/*")):
        own = stores.key_file(consumer / "meta.key", asset.consumer(consumer.name), keys)
        raw, file = (consumer / "o.dat").read_bytes(), consumer / "o.dat"
        encrypted[f"{consumer.name}/o.dat"] = own is not None
        state = serverstate.parse_consumer(serverkeys.open_file(raw, own, str(file)) if own else raw, str(file))
        consumers[consumer.name] = (stores.read_meta(consumer, own, f"{name}/{consumer.name}"), state)
    return OldFound(meta, indexes, subjects, messages, consumers, encrypted)


def counted(records: list[jetstream.Record]) -> dict[bytes, tuple[int, int, int]]:
    """Subject to how many messages, first and last sequence."""
    found: dict[bytes, tuple[int, int, int]] = {}
    for record in records:
        total, first, _ = found.get(record.subject, (0, record.seq, 0))
        found[record.subject] = (total + 1, first, record.seq)
    return found


def check(found: OldFound, live: stores.Live, mode: str) -> None:
    assert found.messages == live.messages
    assert len(found.messages) == live.state["messages"]
    assert set(found.encrypted.values()) == {mode != "plain"}
    deleted = {
        seq
        for index in found.indexes.values()
        for seq in index.deleted
        if live.state["first_seq"] <= seq <= live.state["last_seq"]
    }
    assert sorted(deleted) == live.state.get("deleted", [])
    assert set(found.consumers) == ({"worker"} if found.meta["name"] == "ORDERS" else set())
    for name, (_, state) in found.consumers.items():
        said = live.consumers[name]
        assert state.ack_floor.stream == said["ack_floor"]["stream_seq"]
        assert state.delivered.stream == said["delivered"]["stream_seq"]
        assert len(state.pending) == said["num_ack_pending"]


@pytest.mark.parametrize("mode", stores.MODES)
def test_kept_old_stores_are_read(mode: str, tmp_path: Path) -> None:
    vector = unpack(f"old/2.9.10-{mode}", tmp_path)
    small = read_old(tmp_path / "jetstream/$G/streams/SMALL", KEYS)
    assert small.messages == [
        world.Stored(seq, subject, base64.b64decode(payload), headers)
        for seq, subject, payload, headers in vector["streams"]["SMALL"]["messages"]
    ]
    assert small.indexes[1].deleted == {5}
    assert set(small.encrypted.values()) == {mode != "plain"}
    _, state = small.consumers["worker"]
    floor, delivered, pending = vector["streams"]["SMALL"]["consumers"]["worker"]
    assert (state.ack_floor.stream, state.delivered.stream, len(state.pending)) == (floor, delivered, pending)
    packed = read_old(tmp_path / "jetstream/$G/streams/PACKED", KEYS)
    assert [m.payload[:9] for m in packed.messages] == [b"all work "] * 3
    assert packed.subjects == {b"PACKED.text": 3}


@pytest.mark.nats
@pytest.mark.skipif(bool(NEEDS_OLD), reason=NEEDS_OLD or "-")
@pytest.mark.parametrize("mode", stores.MODES)
def test_old_stores_are_read(mode: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with world.serving(store, tmp_path / "work", binary=BINARY, **stores.MODES[mode]) as server:
        stores.fill(server)
        live = stores.ask(server)
    assert set(live) == {"ORDERS", "LOG", "MANY", "PURGED", "EMPTIED", "KV_settings"}
    streams = store / "jetstream/$G/streams"
    for name, each in live.items():
        found = read_old(streams / name, KEYS)
        check(found, each, mode)
        print(name, len(found.indexes), len(found.messages), len(found.subjects))
    assert (mounts.holding(store, stores.MARKER) == []) == (mode != "plain")


@pytest.mark.nats
@pytest.mark.skipif(bool(NEEDS_OLD), reason=NEEDS_OLD or "-")
def test_a_plain_index_of_an_old_block_is_not_taken_for_a_sealed_one(tmp_path: Path) -> None:
    """And the other way round, and not with the key of another block."""
    with world.serving(tmp_path / "store", tmp_path / "work", binary=BINARY, **stores.MODES["aes"]) as server:
        world.add_stream(server, "MANY", "MANY.>", max_bytes=120_000)
        world.publish(server, world.sample("MANY", 100, size=1200), window=16)
    directory = tmp_path / "store/jetstream/$G/streams/MANY/msgs"
    asset = serverkeys.stream("$G", "MANY")
    first, second = stores.blocks(directory.parent)[:2]
    raw = (directory / f"{first}.idx").read_bytes()
    own = stores.key_file(directory / f"{first}.key", asset.block(first), KEYS)
    other = stores.key_file(directory / f"{second}.key", asset.block(second), KEYS)
    assert own is not None
    assert other is not None
    body = serverold.open_old_index(raw, own, "1.idx")
    assert len(body) == len(raw) - serverkeys.TAG
    for seed, content in ((other, raw), (own, body), (own, raw[:-1]), (own, b"")):
        with pytest.raises(FormatError, match=r"^1\.idx: does not authenticate$"):
            serverold.open_old_index(content, seed, "1.idx")
    with pytest.raises(FormatError, match=r"^1\.idx: byte 0: no index of a block"):
        serverold.parse_old_index(raw, "1.idx")


@pytest.mark.nats
@pytest.mark.skipif(bool(NEEDS_OLD or world.needs_server()), reason=NEEDS_OLD or world.needs_server() or "-")
@pytest.mark.parametrize("mode", stores.MODES)
def test_old_stores_that_a_newer_server_has_opened(mode: str, tmp_path: Path) -> None:
    store, options = tmp_path / "store", stores.MODES[mode]
    with world.serving(store, tmp_path / "old", binary=BINARY, **options) as server:
        stores.fill(server)
        before = stores.ask(server)
    streams = store / "jetstream/$G/streams"
    assert [path.suffix for path in sorted(streams.glob("ORDERS/msgs/1.*"))] == [".blk", ".fss", ".idx"] + (
        [".key"] if mode != "plain" else []
    )
    with world.serving(store, tmp_path / "new", **options) as server:
        live = stores.ask(server)
        for name in live:
            # 2.15.1 does not take an index that counts more deletions than it names, and what a purge had deleted is back.
            came_back = [m for m in live[name].messages if m not in before[name].messages]
            assert [m for m in live[name].messages if m not in came_back] == before[name].messages, name
            assert {m.subject for m in came_back} <= ({"PURGED.3"} if name == "PURGED" else set()), name
        world.publish(server, world.sample("ORDERS", 7, tag="of the new one"), window=1)
        live = stores.ask(server)
    assert list(streams.rglob("*.idx")) == list(streams.rglob("*.fss")) == []
    for name, each in live.items():
        found = stores.read(streams / name, KEYS)
        assert found.messages == each.messages, name
        assert found.index.version == 4
        assert set(found.encrypted.values()) == {mode != "plain"}
        assert set(found.consumers) == ({"worker"} if name == "ORDERS" else set())  # those of the reading are in memory
        for consumer, (_, state) in found.consumers.items():
            assert state.ack_floor.stream == each.consumers[consumer]["ack_floor"]["stream_seq"]
            assert len(state.pending) == each.consumers[consumer]["num_ack_pending"]


def converted(source: Path, target: Path, origin: str, goal: str, *options: str | Path, key: str = stores.KEY) -> None:
    said = mounts.run("convert", source, target, "--from", origin, "--to", goal, *options, key=key)
    assert said.stderr == ""


@pytest.mark.mount
@pytest.mark.nats
@pytest.mark.skipif(bool(NEEDS_OLD or mounts.needs_fuse()), reason=NEEDS_OLD or mounts.needs_fuse() or "-")
@pytest.mark.parametrize("mode", ["chachapoly", "aes"])
def test_old_stores_in_every_form(mode: str, tmp_path: Path) -> None:
    """The old server finds everything again: in the clear, encrypted anew with another cipher, and on a mount."""
    store, options = tmp_path / "store", stores.MODES[mode]
    live = stores.written(store, tmp_path / "work", binary=BINARY, **options)
    said = {name: (each.state, each.messages) for name, each in live.items()}

    def check_old(place: Path, work: Path, **options: str) -> None:
        with world.serving(place, work, binary=BINARY, **options) as server:
            found = stores.ask(server)
        assert {name: (each.state, each.messages) for name, each in found.items()} == said
        assert found["ORDERS"].consumers["worker"]["ack_floor"] == live["ORDERS"].consumers["worker"]["ack_floor"]

    converted(store, tmp_path / "plain", "server", "plain")
    other = "aes" if mode == "chachapoly" else "chachapoly"
    converted(tmp_path / "plain", tmp_path / "anew", "plain", "server", "--cipher", other)
    assert mounts.holding(tmp_path / "anew", stores.MARKER) == []
    assert list((tmp_path / "anew").rglob("*.idx"))
    check_old(tmp_path / "anew", tmp_path / "w1", key=stores.KEY, cipher=other)
    check_old(tmp_path / "plain", tmp_path / "w2")
    mounts.run("encrypt", store, "--from", "server", key=stores.KEY)
    assert not mounts.unsealed(store)
    with mounts.mounted(store, tmp_path / "mnt", key=stores.KEY):
        check_old(tmp_path / "mnt", tmp_path / "w3")
