"""What damaged pages cost: no message that is gone is left out, none that is whole is named, and streams have their names."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import mounts
import nats_world as world
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.js import api
from sealed_files import PAGE, examples

from encfs_js import impact, jetstream
from encfs_js.format import page_of
from encfs_js.natscodec import hash_key, highwayhash64

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

NAME = "ORDERS-3"
ERASED, TOMBSTONE = 1 << 63, 1 << 62


def record(seq: int, payload: bytes, name: str = NAME, headers: bytes = b"") -> bytes:
    """A record as nats-server writes it; `seq` with its flags."""
    subject = b"" if seq & TOMBSTONE else b"ORDERS.new"
    body = struct.pack("<Qq", seq, 1_700_000_000_000_000_000)
    length = 22 + len(subject) + (4 + len(headers) if headers else 0) + len(payload) + 8
    start = struct.pack("<I", length | (1 << 31 if headers else 0))
    content = (struct.pack("<I", len(headers)) if headers else b"") + headers + payload
    digest = highwayhash64(hash_key(name), body, subject, headers, payload)
    return start + body + struct.pack("<H", len(subject)) + subject + content + digest


def block_of(parts: list[bytes]) -> tuple[bytes, list[tuple[int, int]]]:
    """The block, and where each record lies."""
    places, at = [], 0
    for part in parts:
        places.append((at, at + len(part)))
        at += len(part)
    return b"".join(parts), places


def spoil(block: bytes, holes: list[tuple[int, int]], filling: bytes = b"\0") -> bytes:
    hurt = bytearray(block)
    for start, end in holes:
        hurt[start:end] = (filling * (end - start))[: len(hurt[start:end])]
    return bytes(hurt)


def named(found: list[impact.Lost]) -> set[int]:
    seqs: set[int] = set()
    for lost in found:
        for first, last in lost.ranges:
            assert first is not None
            assert last is not None
            seqs |= set(range(first, last + 1))
    return seqs


def test_the_records_of_these_tests_are_records() -> None:
    block, places = block_of([record(1, b"one"), record(2, b"two", headers=b"NATS/1.0\r\nA: b\r\n\r\n")])
    found = list(jetstream.records(block, NAME, ""))
    assert [(r.seq, bytes(r.payload)) for r in found] == [(1, b"one"), (2, b"two")]
    assert [(r.offset, r.offset + r.length) for r in found] == places


@given(data=st.data())
@examples(300)
def test_names_what_is_gone_and_nothing_that_is_whole(data: st.DataObject) -> None:
    """Records of every kind, holes anywhere, bounds known: against what was built."""
    first = data.draw(st.integers(1, 1000))
    parts, messages, seq = [], {}, first - 1
    tombstones: set[int] = set()
    for _ in range(data.draw(st.integers(1, 25))):
        kind = data.draw(st.sampled_from(["message", "message", "message", "headers", "erased", "gap", "tombstone"]))
        if kind == "tombstone":
            if messages:
                gone = data.draw(st.sampled_from(sorted(messages)))
                tombstones.add(gone)
                parts.append(record(gone | TOMBSTONE, b""))
            continue
        seq += 1 + (data.draw(st.integers(1, 3)) if kind == "gap" else 0)
        payload = data.draw(st.binary(max_size=300))
        if kind == "erased":
            parts.append(record(seq | ERASED, b""))
        else:
            messages[seq] = len(parts)
            parts.append(record(seq, payload, headers=b"NATS/1.0\r\n\r\n" if kind == "headers" else b""))
    if not messages:
        return
    block, places = block_of(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(block)), min_size=2, max_size=6)))
    holes = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if a < b]
    if not holes:
        return
    hurt = spoil(block, holes, data.draw(st.sampled_from([b"\0", b"\xff", b"x", b"\x1e\0\0\0"])))
    bounds = impact.Bounds(first, seq)
    found = impact.lost(hurt, holes, NAME, bounds)
    assert len(found) == len(holes)
    lost = named(found)

    def touches(number: int, start: int, end: int) -> bool:
        return places[number][0] < end and start < places[number][1]

    gone = {s for s, number in messages.items() if any(touches(number, *hole) for hole in holes)}
    assert gone - tombstones <= lost
    assert not lost & (messages.keys() - gone), "a whole message is not lost"
    for hole, cost in zip(holes, found, strict=True):
        own = {s for s, number in messages.items() if touches(number, *hole)}
        assert own - tombstones <= named([cost]), "each hole names what it touches"


def test_without_bounds_an_open_end_stays_open() -> None:
    block, places = block_of([record(seq, b"x" * 100) for seq in range(5, 12)])
    unknown = impact.Bounds()
    assert impact.lost(spoil(block, [(0, 10)]), [(0, 10)], NAME, unknown)[0].ranges == ((None, 5),)
    middle = [(places[2][0] + 3, places[3][0] + 2)]
    assert impact.lost(spoil(block, middle), middle, NAME, unknown)[0].ranges == ((7, 8),)
    tail = [(places[5][0], len(block))]
    assert impact.lost(spoil(block, tail), tail, NAME, unknown)[0].ranges == ((10, None),)
    assert impact.lost(block[: places[5][0]], [(places[5][0], 10**9)], NAME, unknown)[0].ranges == ((10, None),)
    assert impact.lost(b"", [(0, 1)], NAME, unknown) == [impact.UNKNOWN]
    assert impact.lost(b"", [(0, 1)], NAME, impact.Bounds(5, 11))[0].told("messages") == "messages 5..11"


def test_a_head_that_can_be_read_names_its_message() -> None:
    """Only the payload is hurt: the record's own head says which one it is, and where the next one begins."""
    block, places = block_of([record(seq, b"x" * 5000) for seq in (7, 90, 91)])
    hole = [(places[1][0] + 1000, places[1][0] + 2000)]
    assert impact.lost(spoil(block, hole), hole, NAME, impact.Bounds())[0].told("messages") == "messages 90"


def test_deleted_messages_are_not_lost() -> None:
    parts = [record(seq, b"x" * 50) for seq in range(1, 10)] + [record(4 | TOMBSTONE, b"")]
    block, places = block_of(parts)
    hole = [(places[1][0] + 2, places[7][0] + 2)]
    found = impact.lost(spoil(block, hole), hole, NAME, impact.Bounds(1, 9, {6}))
    assert found[0].told("messages") == "messages 2..3, 5, 7..8"
    hole = [(places[3][0] + 25, places[3][0] + 30)]
    assert impact.lost(spoil(block, hole), hole, NAME, impact.Bounds())[0].told("messages") == "no messages"
    # What limits removed lies there still, and is no loss either.
    hole = [(places[0][0], places[5][0] + 2)]
    found = impact.lost(spoil(block, hole), hole, NAME, impact.Bounds(5, 9))
    assert found[0].told("messages") == "messages 5..6"


def test_what_is_no_block_of_this_stream_says_nothing() -> None:
    other, _ = block_of([record(seq, b"x" * 50, "OTHER-3") for seq in range(1, 10)])
    assert impact.lost(other, [(400, 500)], NAME, impact.Bounds(1, 9)) == [impact.UNKNOWN]
    compressed = b"cmp\x01" + os.urandom(4000)
    assert impact.lost(compressed, [(400, 500)], NAME, impact.Bounds()) == [impact.UNKNOWN]
    found = impact.lost(compressed, [(400, 500), (900, 950)], NAME, impact.Bounds(10, 99, range(20, 30)))
    assert [lost.told("messages") for lost in found] == ["messages 10..19, 30..99"] * 2


def test_a_record_in_the_payload_of_another_is_none() -> None:
    """Somebody stored a block's bytes as a message: behind a hole it looks like a record, but of a sequence that cannot be."""
    inner = record(2, b"y" * 80)
    block, places = block_of(
        [record(5, b"x" * 50), record(6, b"x" * 50), record(7, b"z" * 99 + inner), record(8, b"w")]
    )
    hole = [(places[1][0] + 3, places[2][0] + 60)]
    assert impact.lost(spoil(block, hole), hole, NAME, impact.Bounds())[0].told("messages") == "messages 6..7"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("jetstream/$G/streams/ORDERS/msgs/3.blk", "stream ORDERS of account $G, block 3"),
        ("$G/streams/ORDERS/msgs/3.blk", "stream ORDERS of account $G, block 3"),
        ("jetstream/$G/streams/ORDERS/meta.inf", "stream ORDERS of account $G, its configuration"),
        (
            "jetstream/A/streams/S/obs/worker/o.dat",
            "stream S of account A, consumer worker, its state: what was delivered and acked",
        ),
        (
            "jetstream/A/streams/S/obs/worker/meta.sum",
            "stream S of account A, consumer worker, the checksum of its configuration",
        ),
        (
            "jetstream/$SYS/_js_/S-R3F-abcdefgh/msgs/12.blk",
            "raft group S-R3F-abcdefgh, block 12",
        ),
        ("jetstream/$SYS/_js_/_meta_/snapshots/snap.1.2", "raft group _meta_, a snapshot of its state"),
        ("jetstream/$SYS/_js_/_meta_/tav.idx", "raft group _meta_, its term and vote"),
        ("jetstream/A/streams/S/msgs/3.new", "stream S of account A, msgs/3.new"),
        (
            "jetstream/A/streams/S/msgs/3.blk.tmp",
            "stream S of account A, block 3, a block (a leftover of nats-server's)",
        ),
        ("jetstream/A/streams/a\nb/msgs/3.blk", r"stream 'a\nb' of account A, block 3"),
        ("other/file", ""),
        ("file", ""),
    ],
)
def test_files_are_called_what_they_are(path: str, said: str) -> None:
    assert str(impact.subject(path.encode())) == said


# --- a real server's blocks, through a mount --------------------------------------------------------------------------


def flip(path: Path, page: int) -> None:
    with open(path, "r+b") as file:
        file.seek(page * PAGE + 2000)
        byte = file.read(1)[0]
        file.seek(page * PAGE + 2000)
        file.write(bytes([byte ^ 4]))


def flipped(plain: bytes, name: str, pages: list[int]) -> list[int]:
    """Which messages have a byte in one of these pages."""
    return [
        r.seq
        for r in jetstream.records(plain, name, "")
        if not r.tombstone and set(range(page_of(r.offset)[0], page_of(r.offset + r.length - 1)[0] + 1)) & set(pages)
    ]


def within(sequences: list[list[int]]) -> list[int]:
    return [seq for first, last in sequences for seq in range(first, last + 1)]


@pytest.mark.mount
@pytest.mark.nats
@pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")
@pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-")
def test_damage_in_a_real_store_is_named_by_the_messages_it_touches(tmp_path: Path) -> None:
    store, mountpoint = tmp_path / "store", tmp_path / "mnt"
    mounts.init(store, cipher="aes")
    plain: dict[str, dict[int, bytes]] = {}
    with mounts.mounted(store, mountpoint):
        with world.serving(mountpoint, tmp_path / "work") as server:
            # Blocks of 32,000 bytes.
            world.add_stream(server, "MANY", "MANY.>", max_bytes=120_000)
            world.publish(server, world.sample("MANY", 320, size=700), window=16)
            world.add_stream(server, "LOG", "LOG.>", max_bytes=120_000, compression=api.StoreCompression.S2)
            world.publish(server, world.sample("LOG", 150, size=1200, text=True), window=16)
            stored = {name: {m.seq for m in world.read(server, name)} for name in ("MANY", "LOG")}
            held = [seq for seq in sorted(stored["MANY"]) if seq % 2]

            async def delete(_: Any, js: Any) -> None:
                for seq in held[20:24]:
                    await js.delete_msg("MANY", seq)

            world.talk(server, delete)
            alive = {m.seq for m in world.read(server, "MANY")}
            assert stored["MANY"] - alive == set(held[20:24])
        for name in ("MANY", "LOG"):
            directory = mountpoint / f"jetstream/$G/streams/{name}/msgs"
            plain[name] = {int(path.stem): path.read_bytes() for path in directory.glob("*.blk")}
    blocks = store / "jetstream/$G/streams/MANY/msgs"
    numbers = sorted(plain["MANY"])
    assert len(numbers) >= 4, "there are blocks to choose from"
    full = len(plain["MANY"][numbers[0]]) // PAGE  # limits may have removed what its first pages hold
    hurt = {numbers[0]: [full - 2, full - 1], numbers[1]: [3], numbers[-1]: [0, 1]}
    for number, pages in hurt.items():
        for page in pages:
            flip(blocks / f"{number}.blk", page)
    closed = next(number for number, raw in sorted(plain["LOG"].items()) if raw.startswith(b"cmp"))
    flip(store / f"jetstream/$G/streams/LOG/msgs/{closed}.blk", 1)
    answer = mounts.verify(store, code=22)
    told = {(d["stream"], d["block"]): d for d in answer["damage"]}
    assert set(told) == {("MANY", number) for number in hurt} | {("LOG", closed)}
    for number, pages in hurt.items():
        found = told["MANY", number]
        assert (found["account"], found["what"], found["page"]) == ("$G", "message block", pages[0])
        gone = [s for s in flipped(plain["MANY"][number], f"MANY-{number}", pages) if s in alive]
        assert gone
        assert [seq for seq in within(found["sequences"]) if seq in alive] == gone
        assert set(within(found["sequences"])) <= alive, "what was deleted is not lost"
    # Of a compressed block everything may be gone.
    found = told["LOG", closed]
    others = set()
    for number, raw in plain["LOG"].items():
        if number != closed:
            block, _ = jetstream.plain_block(raw, None, f"LOG-{number}", "")
            others |= {r.seq for r in jetstream.messages(jetstream.records(block, f"LOG-{number}", ""))}
    assert set(within(found["sequences"])) & stored["LOG"] == stored["LOG"] - others
    # Without index.db the blocks beside it and the records themselves still say the most of it.
    flip(blocks / "index.db", 0)
    again = mounts.verify(store, code=22)["damage"]
    index = next(d for d in again if d["file"].endswith("index.db"))
    assert "rebuilds" in index["what"]
    assert (index["stream"], index["sequences"]) == ("MANY", None)
    middle = next(d for d in again if d["stream"] == "MANY" and d["block"] == numbers[1])
    gone = flipped(plain["MANY"][numbers[1]], f"MANY-{numbers[1]}", hurt[numbers[1]])
    assert within(middle["sequences"]) == list(range(gone[0], gone[-1] + 1))
    last = next(d for d in again if d["stream"] == "MANY" and d["block"] == numbers[-1])
    first = flipped(plain["MANY"][numbers[-1]], f"MANY-{numbers[-1]}", [0])[0]
    assert last["sequences"][0][0] == first, "the block before says where it began"
    out = mounts.run("verify", store, code=22).stdout
    line = next(line for line in out.splitlines() if f"{numbers[1]}.blk" in line)
    assert line == (
        f"damaged: jetstream/$G/streams/MANY/msgs/{numbers[1]}.blk page 3: "
        f"stream MANY of account $G, block {numbers[1]}, messages {gone[0]}..{gone[-1]}"
    )
