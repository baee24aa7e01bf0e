"""The readers of nats-server's files, without a server: kept vectors, files written by hand, and anything at all as input."""

from __future__ import annotations

import base64
import json
import random
import re
import struct
import time
import tracemalloc
from functools import cache
from typing import TYPE_CHECKING, Any

import cluster_world
import make_server_vectors as maker
import nats_world as world
import pytest
import server_stores as stores
from hypothesis import given
from hypothesis import strategies as st
from sealed_files import examples
from test_natscodec import LITERAL, framed, put_uvarint

from encfs_js import jetstream, serverkeys, serverstate
from encfs_js.errors import FormatError
from encfs_js.natscodec import S2_MAGIC, hash_key, highwayhash64

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VECTORS = sorted(path.stem for path in maker.DIRECTORY.glob("*.json"))
KEYS = [stores.KEY.encode()]
TOLD = re.compile(r"^some/file: (byte \d+: .+|does not authenticate)$")


def sv(value: int) -> bytes:
    return put_uvarint(2 * value if value >= 0 else -2 * value - 1)


def uv(*values: int) -> bytes:
    return b"".join(map(put_uvarint, values))


def with_hash(body: bytes, name: str) -> bytes:
    return body + highwayhash64(hash_key(name), body)


# --- kept stores ------------------------------------------------------------------------------------------------------


def vector_of(name: str) -> dict[str, Any]:
    """A kept store by its name, or the end of its name."""
    (path,) = maker.DIRECTORY.glob(f"*{name}.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
    return found


def unpack(name: str, place: Path) -> dict[str, Any]:
    found = vector_of(name)
    for path, content in found["files"].items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(base64.b64decode(content, validate=True))
    return found


def test_the_vectors_are_there() -> None:
    assert [name.partition("-")[2] for name in VECTORS] == ["aes", "aes", "chachapoly", "cluster-aes", "plain"]
    assert len({vector_of(name)["server"] for name in VECTORS}) == 3


@pytest.mark.parametrize("name", VECTORS)
def test_kept_stores_are_read(name: str, tmp_path: Path) -> None:
    vector = unpack(name, tmp_path)
    small = stores.read(tmp_path / "jetstream/$G/streams/SMALL", [vector["key"].encode()])
    assert small.index.version == {"2.10": 1, "2.12": 3, "2.15": 4}[vector["server"][:4]]
    said = [
        world.Stored(seq, subject, base64.b64decode(payload), headers)
        for seq, subject, payload, headers in vector["streams"]["SMALL"]["messages"]
    ]
    assert small.messages == said
    assert len(said) == 11
    assert [seq for block in small.index.blocks for seq in serverstate.deleted_sequences(block)] == [5]
    _, state = small.consumers["worker"]
    floor, delivered, pending = vector["streams"]["SMALL"]["consumers"]["worker"]
    assert (state.ack_floor.stream, state.delivered.stream, len(state.pending)) == (floor, delivered, pending)
    assert set(small.encrypted.values()) == {not name.endswith("plain")}
    packed = stores.read(tmp_path / "jetstream/$G/streams/PACKED", [vector["key"].encode()])
    assert [m.payload[:9] for m in packed.messages] == [b"all work "] * 3
    assert (tmp_path / "jetstream/$G/streams/PACKED/msgs/1.blk").stat().st_size < 1000 < packed.index.blocks[0].size


# --- raft groups ------------------------------------------------------------------------------------------------------


def check_groups(groups: Path, keys: list[bytes], nodes: int) -> dict[str, Any]:
    """Read all that lies in `$SYS/_js_`; returns group to the data of its snapshot, for _meta_ the names of the streams in it."""
    snapshots: dict[str, Any] = {}
    for group in sorted(groups.iterdir()):
        found = stores.read(group, keys, group.name)
        assert found.meta["name"] == group.name
        peers = serverstate.parse_peers((group / "peers.idx").read_bytes(), "peers.idx")
        assert (peers.cluster_size, len(set(peers.ids)), peers.extension) == (nodes, nodes, 0)
        term, vote = serverstate.parse_vote((group / "tav.idx").read_bytes(), "tav.idx")
        assert term >= 1
        assert vote in {b"", *peers.ids}
        for path in group.glob("snapshots/*"):
            snapshot = serverstate.parse_snapshot(path.read_bytes(), group.name, str(path))
            assert path.name == f"snap.{snapshot.term}.{snapshot.last}"
            assert set(snapshot.peers.ids) == set(peers.ids)
            snapshots[group.name] = snapshot.data
            if group.name == "_meta_":
                kept = serverstate.assignments(snapshot.data, str(path))
                snapshots[group.name] = {each["stream"]["name"] for each in kept}
                assert snapshots[group.name] <= {"SMALL", "PACKED"}
            elif group.name.startswith("C-"):
                assert serverstate.parse_consumer(snapshot.data, str(path)).version == 2
            else:
                assert snapshot.data[0] == 42
    commit = serverstate.parse_commit((groups / "_meta_/commit.idx").read_bytes(), "_meta_", "commit.idx")
    assert commit >= 1
    return snapshots


def test_kept_raft_groups_are_read(tmp_path: Path) -> None:
    vector = unpack("-cluster-aes", tmp_path)
    snapshots = check_groups(tmp_path / "jetstream/$SYS/_js_", [vector["key"].encode()], 3)
    assert snapshots["_meta_"] == {"SMALL", "PACKED"}
    assert any(name.startswith("S-") for name in snapshots)


@pytest.mark.nats
@pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-")
@pytest.mark.parametrize("mode", stores.MODES)
def test_a_real_cluster_is_read(mode: str, tmp_path: Path) -> None:
    places = [tmp_path / f"node{i}" for i in range(3)]
    for place in places:
        place.mkdir()
    with cluster_world.cluster(places, tmp_path / "work", **stores.MODES[mode]) as nodes:
        maker.fill(nodes[0], 3, lambda: cluster_world.wait_current(nodes))
        live = stores.ask(nodes[0])
    for place in places:
        found = stores.read(place / "jetstream/$G/streams/SMALL", KEYS)
        assert found.messages == live["SMALL"].messages
        assert set(found.encrypted.values()) == {mode != "plain"}
        check_groups(place / "jetstream/$SYS/_js_", KEYS, 3)
        if mode == "aes":
            sizes = {path.stat().st_size for path in (place / "jetstream/$SYS/_js_").rglob("*.key")}
            assert sizes == {72}, "raft logs are chachapoly whatever the cipher"


# --- records, by hand -------------------------------------------------------------------------------------------------

NAME = "SMALL-1"


def record(
    seq: int, subject: bytes = b"a.b", payload: bytes = b"hello", header: bytes = b"", when: int = 7, name: str = NAME
) -> bytes:
    middle = (struct.pack("<I", len(header)) if header else b"") + header + payload
    length = 22 + len(subject) + len(middle) + 8
    start = struct.pack("<Qq", seq, when)
    digest = highwayhash64(hash_key(name), start + subject + header + payload)
    length |= (1 << 31) if header else 0
    return struct.pack("<I", length) + start + struct.pack("<H", len(subject)) + subject + middle + digest


def read_records(block: bytes) -> list[jetstream.Record]:
    return list(jetstream.records(block, NAME, "some/file"))


def test_records() -> None:
    header = b"NATS/1.0\r\nA: b\r\n\r\n"
    block = (
        record(1) + record(2, header=header, when=-5) + record(3 | 1 << 63, b"", b"") + record(2 | 1 << 62, b"", b"")
    )
    found = read_records(block)
    assert [(r.seq, r.erased, r.tombstone, r.time) for r in found] == [
        *((1, False, False, 7), (2, False, False, -5), (3, True, False, 7), (2, False, True, 7))
    ]
    assert [bytes(r.header) for r in found] == [b"", header, b"", b""]
    assert [bytes(r.payload) for r in found] == [b"hello", b"hello", b"", b""]
    assert found[3].length == 30
    assert [r.offset for r in found] == [0, found[0].length, found[0].length + found[1].length, len(block) - 30]
    assert read_records(b"") == []


def test_messages_leaves_out_what_nats_server_does() -> None:
    ignored = [record(4, payload=b"again"), record(3), record(9 | 1 << 62, b"", b""), record(6 | 1 << 63), record(6)]
    block = b"".join([record(4), *ignored, record(8)])
    assert [r.seq for r in jetstream.messages(iter(read_records(block)))] == [4, 8]


GOOD = record(1)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (GOOD + b"\0", f"byte {len(GOOD)}: the block ends within a record"),
        (GOOD + GOOD[:-1], f"byte {len(GOOD)}: the block ends within a record"),
        (GOOD + bytes(40), f"byte {len(GOOD)}: a record that says it has 0 bytes"),
        (
            GOOD + struct.pack("<I", (32 << 20) + 1) + bytes(40),
            f"byte {len(GOOD)}: a record that says it has 33554433 bytes",
        ),
        (GOOD[:8] + b"\1" + GOOD[9:], "byte 0: a record that does not match its hash"),
        (record(1, name="S-2"), "byte 0: a record that does not match its hash"),
        (struct.pack("<IQqH", 33 | 1 << 31, 1, 1, 0) + bytes(11), "byte 0: a record that says it has 33 bytes"),
        (
            struct.pack("<IQqHI", 34 | 1 << 31, 1, 1, 0, 1) + bytes(8),
            "byte 0: a record with headers that are longer than it",
        ),
        (struct.pack("<IQqH", 40, 1, 1, 20) + bytes(30), "byte 0: a record that says it has 40 bytes"),
    ],
)
def test_records_that_are_none(block: bytes, message: str) -> None:
    with pytest.raises(FormatError) as told:
        read_records(block)
    assert str(told.value) == f"some/file: {message}"
    assert told.value.hint


@pytest.mark.parametrize("suite", [None, *serverkeys.NONCES])
def test_compressed_blocks(suite: serverkeys.Suite | None) -> None:
    stream = None
    if suite:
        stream = serverkeys.Keystream(serverkeys.Seed(suite, bytes(range(serverkeys.NONCES[suite])), bytes(32)))
    plain = record(1, payload=b"x" * 500) + record(2)
    for packed in (
        b"cmp\1" + uv(len(plain)) + S2_MAGIC + framed(1, plain[:-8], plain[:-8]) + plain[-8:],
        b"cmp\0" + uv(len(plain)) + plain,
        plain,
    ):
        raw = stream.xor(packed) if stream else packed
        assert jetstream.plain_block(raw, stream, NAME, "some/file") == (plain, stream is not None)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (b"cmp", "byte 3: the file ends within a field"),
        (b"cmp\1", "byte 4: the data ends within a number"),
        (b"cmp\2\x05hello", "byte 3: a compression that is not known"),
        (b"cmp\1\x05short", "byte 3: a compression that is not known"),
        (b"cmp\0\x06hello", "byte 4: the block has 5 bytes and says 6"),
        (
            b"cmp\1\x0d" + S2_MAGIC + framed(1, b"hell", b"hell") + bytes(8),
            "byte 4: the block has 12 bytes and says 13",
        ),
        (b"cmp\1" + uv(1 << 40) + bytes(40), "byte 4: a block of 1099511627776 bytes"),
        (b"cmp\1\x0c" + S2_MAGIC + framed(0, b"\5" + LITERAL, b"") + bytes(8), None),
        (b"cmp\1\x0c" + bytes(30), "byte 5: no S2 stream"),
    ],
)
def test_compressed_blocks_that_are_none(block: bytes, message: str | None) -> None:
    with pytest.raises(FormatError, match=TOLD) as told:
        jetstream.plain_block(block, None, NAME, "some/file")
    if message:
        assert str(told.value) == f"some/file: {message}"


# --- the rest, by hand ------------------------------------------------------------------------------------------------


def set_of(*sequences: int, version: int = 2, entries: int | None = None) -> bytes:
    words = {1: 64, 2: 32}[version]
    bits = sum(1 << (seq - 100) for seq in sequences)
    count = len(sequences) if entries is None else entries
    return struct.pack("<BBIIQ", 22, version, 1, count, 100) + bits.to_bytes(8 * words, "little") + b"\1\0"


def index(version: int, deleted: bytes, ndeleted: int) -> bytes:
    more = (uv(6) if version >= 2 else b"") + (uv(7) if version >= 3 else b"")
    return (
        bytes([11, version])
        + uv(3, 900, 100)
        + sv(10**18)
        + uv(120)
        + sv(10**18 + 5)
        + uv(2, 3)
        + b"a.b"
        + uv(1, 1)
        + (uv(1) if version >= 4 else b"")
        + uv(1)
        + b"c"
        + uv(2, 1, 2)
        + uv(1)
        + uv(1, 900, 100)
        + sv(0)
        + uv(120)
        + sv(-5)
        + uv(ndeleted)
        + more
        + deleted
        + uv(1)
        + b"lasthash"
    )


@pytest.mark.parametrize("version", [1, 2, 3, 4])
@pytest.mark.parametrize("map_version", [1, 2])
def test_index_of_every_version(version: int, map_version: int) -> None:
    sequences = [100, 101, 163, 164, 1000]
    found = serverstate.parse_index(index(version, set_of(*sequences, version=map_version), 5), "some/file")
    assert found[:7] == (version, 3, 900, 100, 10**18, 120, 10**18 + 5)
    assert found.subjects == ((b"a.b", 1, 1, 1), (b"c", 2, 1, 2))
    assert found.blocks[0][:6] == (1, 900, 100, 10**18, 120, 10**18 - 5)
    assert (found.blocks[0].ttls, found.blocks[0].schedules) == (6 * (version > 1), 7 * (version > 2))
    assert list(serverstate.deleted_sequences(found.blocks[0])) == sequences
    assert serverstate.is_of(found, 1, b"a block with lasthash")
    assert not serverstate.is_of(found, 2, b"a block with lasthash")
    assert not serverstate.is_of(found, 1, b"a block with losthash")


def test_index_that_is_none() -> None:
    good = index(4, set_of(100), 1)
    serverstate.parse_index(good, "some/file")
    for bad, message in [
        (good + b"\0", f"byte {len(good)}: more bytes than there should be"),
        (b"\x0b\5" + good[2:], "byte 0: no index.db of a version that is known"),
        (index(4, set_of(100, entries=2), 2), None),
        (index(4, set_of(100), 2), None),
        (index(4, set_of(100, entries=2), 1), None),
        *((good[:size], None) for size in range(len(good))),
    ]:
        with pytest.raises(FormatError, match=TOLD) as told:
            serverstate.parse_index(bad, "some/file")
        if message:
            assert str(told.value) == f"some/file: {message}"
    with pytest.raises(FormatError, match=r"byte \d+: the hash at the end does not match"):
        serverstate.open_index(with_hash(good, "other"), None, "S", "some/file")


def test_consumers() -> None:
    second = b"\x16\2" + uv(5, 50, 9, 58, 2) + sv(1000) + uv(3, 2) + sv(10) + uv(8, 4) + sv(-1) + uv(1, 3, 2)
    state = serverstate.parse_consumer(second, "some/file")
    assert state == (2, (5, 50), (9, 58), {53: (7, 990), 58: (9, 1001)}, {53: 2})
    first = b"\x16\1" + uv(5, 50, 5, 9, 1) + sv(1000) + uv(3) + sv(-10) + uv(0)
    assert serverstate.parse_consumer(first, "some/file") == (1, (5, 50), (9, 58), {53: (0, 990)}, {})
    assert serverstate.parse_consumer(b"\x16\1" + uv(0, 0, 1, 1, 0, 0), "some/file").delivered == (0, 0)
    for bad in (second + b"\0", b"\x16\3" + second[2:], *(second[:size] for size in range(len(second)))):
        with pytest.raises(FormatError, match=TOLD):
            serverstate.parse_consumer(bad, "some/file")


@pytest.mark.parametrize(
    ("raw", "offset"),
    [
        (b"", 0),
        (b'{"a": ', 6),
        (b'{"\xff": 1}', 2),
        (b"[1]", 0),
        (b"[" * 100_000, 0),
        (b'{"a":' + b"9" * 5000 + b"}", 0),
    ],
)
def test_metafiles_that_are_none(raw: bytes, offset: int) -> None:
    with pytest.raises(FormatError, match=rf"^some/file: byte {offset}: no JSON"):
        jetstream.parse_meta(raw, "some/file")


def test_a_cluster_without_streams_has_no_assignments() -> None:
    assert serverstate.assignments(b"", "x") == []
    assert serverstate.assignments(b"\x02\x04[]", "x") == []


def test_raft_files_that_are_none() -> None:
    peers = struct.pack("<II", 3, 2) + b"aaaaaaaabbbbbbbb" + b"\0\0"
    assert serverstate.parse_peers(peers, "x").ids == (b"aaaaaaaa", b"bbbbbbbb")
    snapshot = struct.pack("<QQI", 4, 5, len(peers)) + peers + b"data"
    assert serverstate.parse_snapshot(with_hash(snapshot, "G"), "G", "x")[:2] == (4, 5)
    assert serverstate.parse_snapshot(with_hash(snapshot, "G"), "G", "x").data == b"data"
    assert serverstate.parse_vote(bytes(8), "x") == (0, b"")
    with pytest.raises(FormatError, match=f"^some/file: byte {len(peers)}: more bytes than there should be$"):
        serverstate.parse_peers(peers + b"\0", "some/file")
    for size in range(len(peers)):
        with pytest.raises(FormatError, match=TOLD):
            serverstate.parse_peers(peers[:size], "some/file")
    for size in range(len(snapshot) - 4):
        with pytest.raises(FormatError, match=TOLD):
            serverstate.parse_snapshot(with_hash(snapshot[:size], "G"), "G", "some/file")
    for raw in (bytes(7), bytes(9), bytes(17)):
        with pytest.raises(FormatError, match=TOLD):
            serverstate.parse_vote(raw, "some/file")
        with pytest.raises(FormatError, match=TOLD):
            serverstate.parse_commit(with_hash(raw, "G"), "G", "some/file")


# --- anything at all --------------------------------------------------------------------------------------------------

SEED = serverkeys.Seed(serverkeys.Suite.AES, bytes(16), bytes(32))
READERS: dict[str, Callable[[bytes], object]] = {
    "blk": read_records,
    "plain blk": lambda raw: list(
        jetstream.records(jetstream.plain_block(raw, None, "PACKED-1", "some/file")[0], "PACKED-1", "some/file")
    ),
    "sealed blk": lambda raw: read_records(
        jetstream.plain_block(raw, serverkeys.Keystream(SEED), NAME, "some/file")[0]
    ),
    "meta.inf": lambda raw: jetstream.parse_meta(raw, "some/file"),
    "meta.sum": lambda raw: jetstream.check_meta(raw[16:], raw[:16], "S", "some/file"),
    "index.db": lambda raw: serverstate.parse_index(raw, "some/file"),
    "sealed index.db": lambda raw: serverstate.parse_index(
        serverstate.open_index(raw, SEED, "S", "some/file")[0], "some/file"
    ),
    "o.dat": lambda raw: serverstate.parse_consumer(raw, "some/file"),
    "peers.idx": lambda raw: serverstate.parse_peers(raw, "some/file"),
    "tav.idx": lambda raw: serverstate.parse_vote(raw, "some/file"),
    "commit.idx": lambda raw: serverstate.parse_commit(raw, "_meta_", "some/file"),
    "snap": lambda raw: serverstate.parse_snapshot(raw, "_meta_", "some/file"),
    "snap, good hash": lambda raw: serverstate.parse_snapshot(with_hash(raw, "_meta_"), "_meta_", "some/file"),
    "assignments": lambda raw: serverstate.assignments(raw, "some/file"),
}


def ends_well(reader: str, raw: bytes) -> None:
    """Read; either it goes, or the error names the file and an offset in it."""
    start = time.monotonic()
    told = "some/file: byte 0: it went"
    try:
        READERS[reader](raw)
    except FormatError as problem:
        told = str(problem)
    assert TOLD.match(told)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("reader", READERS)
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=40).map(lambda raw: raw * 50)))
@examples(60)
def test_any_bytes_end_well(reader: str, raw: bytes) -> None:
    ends_well(reader, raw)


@cache
def real_files() -> dict[str, bytes]:
    """Of the kept plain stores a file for every reader; in the place of those with a hash, what precedes it."""
    plain, raft = vector_of("-plain")["files"], vector_of("-cluster-aes")["files"]
    small, meta = "jetstream/$G/streams/SMALL", "jetstream/$SYS/_js_/_meta_"
    found = {
        "blk": plain[f"{small}/msgs/1.blk"],
        "plain blk": plain["jetstream/$G/streams/PACKED/msgs/1.blk"],
        "meta.inf": plain[f"{small}/meta.inf"],
        "index.db": plain[f"{small}/msgs/index.db"],
        "o.dat": plain[f"{small}/obs/worker/o.dat"],
        "peers.idx": raft[f"{meta}/peers.idx"],
        "tav.idx": raft[f"{meta}/tav.idx"],
        "commit.idx": raft[f"{meta}/commit.idx"],
        "snap": next(content for path, content in raft.items() if path.startswith(f"{meta}/snapshots/")),
    }
    files = {name: base64.b64decode(content) for name, content in found.items()}
    files["index.db"] = files["index.db"][:-8]
    files["snap, good hash"] = files["snap"][:-8]
    files["assignments"] = serverstate.parse_snapshot(files["snap"], "_meta_", "x").data
    return files


@given(st.data())
@examples(500)
def test_changed_real_files_end_well(data: st.DataObject) -> None:
    files = real_files()
    name = data.draw(st.sampled_from(sorted(files)))
    raw = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert", "remove", "number"])):
            case "set":
                raw[at] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[max(1, at) :]
            case "insert":
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "remove" if len(raw) > 9:
                del raw[at : at + data.draw(st.integers(1, 8))]
            case "number":
                raw[at : at + 10] = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"
    ends_well(name, bytes(raw))


HUGE = 2**63


@pytest.mark.parametrize(
    ("reader", "raw"),
    [
        ("index.db", b"\x0b\4" + uv(0, 0, 0, 0, 0, 0, HUGE, HUGE)),
        ("index.db", b"\x0b\4" + uv(0, 0, 0, 0, 0, 0, 0, HUGE)),
        ("index.db", b"\x0b\4" + uv(0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 0, 0) + b"\x16\2" + b"\xff" * 8),
        ("o.dat", b"\x16\2" + uv(0, 0, 0, 0, HUGE)),
        ("o.dat", b"\x16\2" + uv(0, 0, 0, 0, 0, HUGE)),
        ("peers.idx", b"\xff" * 8),
        ("snap, good hash", b"\xff" * 20),
        ("assignments", uv(HUGE) + LITERAL),
        ("assignments", uv(1 << 40) + LITERAL),
        ("assignments", uv(60 << 20) + LITERAL + b"\x02\x04\0" + b"\x1d\0\xff\xff\xff"),
        ("plain blk", b"cmp\1" + uv(60 << 20) + S2_MAGIC + framed(0, uv(1 << 40) + LITERAL, b"") * 100 + bytes(8)),
        (
            "plain blk",
            b"cmp\1"
            + uv(1 << 20)
            + S2_MAGIC
            + framed(0, uv(4 << 20) + LITERAL + b"\x02\4\0\x1d\0\xf7\xff\x3e", b"")
            + bytes(8),
        ),
    ],
)
def test_claims_of_great_size_take_no_memory(reader: str, raw: bytes) -> None:
    tracemalloc.start()
    try:
        ends_well(reader, raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 << 20


def test_the_readers_all_have_real_files() -> None:
    assert set(READERS) - set(real_files()) == {"sealed blk", "meta.sum", "sealed index.db"}
    for name, raw in real_files().items():
        assert READERS[name](raw) is not None


# --- records behind damage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filling", ["random", "zeros", "long"])
def test_a_record_behind_anything_is_found(filling: str) -> None:
    """A megabyte of random bytes, or of zeros, or in which everything looks like the length of a record."""
    between = {
        "random": random.Random(3).randbytes(1 << 20),
        "zeros": bytes(1 << 20),
        "long": b"\x00\x10\x00\x00" * (1 << 18),
    }[filling]
    block = record(1) + between + record(7, payload=b"behind") + record(8)
    finder = jetstream.Finder(block, NAME)
    assert (first := finder.find(0)) is not None
    assert first.seq == 1
    assert (found := finder.find(first.length)) is not None
    assert (found.seq, found.offset, bytes(found.payload)) == (7, first.length + len(between), b"behind")
    assert (last := finder.find(found.offset + found.length)) is not None
    assert last.seq == 8
    assert finder.find(last.offset + 1) is None
    assert jetstream.Finder(block, "another").find(0) is None  # hashes of another block


@pytest.mark.parametrize("times", [1, 200])
def test_what_is_made_to_be_hashed_in_vain_is_given_up(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good records between such as say that they are long: the whole block is not hashed for each of them."""
    hashed = 0

    def counting(key: bytes, *parts: bytes) -> bytes:
        nonlocal hashed
        hashed += sum(len(part) for part in parts)
        return highwayhash64(key, *parts)

    monkeypatch.setattr(jetstream, "highwayhash64", counting)
    lie = struct.pack("<IQqH", 30_000, 5, 5, 1)
    block = b"".join(record(seq) + lie * 20 for seq in range(1, times + 1)) + bytes(40_000)
    finder, at, found = jetstream.Finder(block, NAME), 0, 0
    while (here := finder.find(at)) is not None:
        at, found = here.offset + here.length, found + 1
    assert found >= 1
    assert hashed <= 5 * len(block)


def test_names_of_blocks() -> None:
    names = [
        b"2.blk",
        b"10.blk",
        b"1.blk",
        b"01.blk",
        b"0.blk",
        b"1.blk.tmp",
        b"x.blk",
        "\u0663.blk".encode(),
        b"3.key",
    ]
    assert jetstream.block_numbers(names) == [1, 2, 10]
