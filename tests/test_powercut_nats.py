"""Power cuts under a real nats-server on a real mount: what it acked is on the disk, whatever else the disk lost.

The server syncs every message (`sync_interval: always`), the daemon records, and states are drawn from the record as in
test_powercut.py. What a file may be is learned from the record itself: another decoder reads every page that was written.
"""

from __future__ import annotations

import os
import random
import struct
import sys
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

import decoder
import mounts
import nats_world as world
import powerstore
import pytest
import recording
from powercut import start_of
from powerstore import Recorded, Settings, Step, World
from recording import Resize, Sync, SyncBegin, Write
from test_powercut import SCALE, SEED, quick

from encfs_js import keyring
from encfs_js.sealed import FileKeys

if TYPE_CHECKING:
    from pathlib import Path

    from recording import Trace

pytestmark = [
    pytest.mark.mount,
    pytest.mark.nats,
    pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-"),
    pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-"),
]

__all__ = ["quick"]
PAGE = 4096


class Acked(NamedTuple):
    """The server promised to keep `payload` as number `seq` of the stream. size: of the record of calls by then."""

    seq: int
    payload: bytes
    size: int


def steps_of(trace: Trace, volume_keys: dict[int, bytes]) -> tuple[list[Step], dict[int, bytes]]:
    """What happened to the plain files, as another decoder reads it from the pages that were written."""
    images: dict[int, bytearray] = {}
    steps: list[Step] = []
    start: dict[int, bytes] = {}

    def pages(number: int, first: int, last: int) -> list[tuple[int, bytes]]:
        return [(p, decoder.authenticate(bytes(images[number]), p, volume_keys)) for p in range(first, last)]

    def written(number: int, pieces: list[tuple[int, bytes]], size: int) -> Step:
        def begins(world: World) -> None:
            promise = world.of(number)
            for page, piece in pieces:
                promise.write(start_of(page), piece)
            if len(promise.plain) > size:
                promise.truncate(size)

        return Step(at, at + 1, begins)

    def cut(number: int, size: int) -> Step:
        return Step(at, at + 1, lambda world: world.of(number).truncate(size))

    foreign = {
        op.file for op in trace.ops if isinstance(op, Write) and op.offset == 0 and op.data[:8] != b"ENCFSJS1"
    }
    for at, op in enumerate(trace.ops):
        if isinstance(op, Write) and op.file not in foreign:
            image = images.setdefault(op.file, bytearray())
            image[op.offset : op.offset + len(op.data)] = op.data
            if at < trace.base:
                start[op.file] = decoder.read(op.data, volume_keys)
                continue
            assert op.offset % PAGE == len(op.data) % PAGE == 0, "a page was not written whole"
            pieces = pages(op.file, op.offset // PAGE, (op.offset + len(op.data)) // PAGE)
            steps.append(written(op.file, pieces, decoder.plain_size(bytes(image))))
        elif isinstance(op, Resize) and op.file not in foreign:
            image = images.setdefault(op.file, bytearray())
            assert op.size <= len(image)
            del image[op.size :]
            steps.append(cut(op.file, start_of(op.size // PAGE)))
        elif isinstance(op, SyncBegin):
            steps.append(
                Step(at, at + 1, lambda world, number=op.file, token=at: world.of(number).sync_begins(token))
            )
        elif isinstance(op, Sync):

            def ends(world: World, number: int = op.file, token: int = op.began) -> None:
                world.of(number).sync_ends(token)

            steps.append(Step(at, at + 1, lambda world: None, ends))
    return steps, start


def messages_in(blocks: list[bytes]) -> dict[int, bytes]:
    """Sequence to payload of every message in nats-server's blocks (not encrypted, not compressed)."""
    found = {}
    for block in blocks:
        at = 0
        while at + 30 <= len(block):
            length, seq, _, subject = struct.unpack_from("<IQQH", block, at)
            size = length & 0x7FFFFFFF
            if not 30 <= size <= len(block) - at:
                break
            if not seq >> 62:
                found[seq] = block[at + 22 + subject : at + size - 8]
            at += size
    return found


def publish(server: world.Server, sink: Path, first: int, count: int) -> list[Acked]:
    """Publish one by one, noting how much had been recorded when the ack came."""

    async def one_by_one(_, jetstream):
        acked = []
        for number in range(first, first + count):
            payload = world.noise(str(number), number * 7919 % 6000)
            ack = await jetstream.publish(f"orders.{number % 3}", payload)
            acked.append(Acked(ack.seq, payload, os.stat(sink).st_size))
        return acked

    return world.talk(server, one_by_one)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A run on a store that an earlier run has filled: the record, and what was acked, each with the number of calls by
    then: before the purge, and after it; and when the purge began.
    """
    store, sink = tmp_path / "store", tmp_path / "sink"
    mounts.init(store, cipher="aes")
    sink.touch()
    with (
        mounts.mounted(store, tmp_path / "mnt"),
        world.serving(tmp_path / "mnt", tmp_path / "work", sync="always") as server,
    ):
        world.add_stream(server, "ORDERS", "orders.>")
        world.add_durable(server, "ORDERS", "billing")
        acked = publish(server, sink, 0, 40)
    monkeypatch.setattr(
        mounts, "COMMAND", [sys.executable, os.path.join(os.path.dirname(__file__), "recorded_mount.py")]
    )
    monkeypatch.setenv("POWERCUT_SINK", str(sink))
    with (
        mounts.mounted(store, tmp_path / "mnt"),
        world.serving(tmp_path / "mnt", tmp_path / "work", sync="always") as server,
    ):
        acked += publish(server, sink, 100, 80)
        world.consume(server, "ORDERS", "billing", 40)
        purge = os.stat(sink).st_size
        world.talk(server, lambda _, jetstream: jetstream.purge_stream("ORDERS"))
        purged = len(acked)
        acked += publish(server, sink, 200, 70)
        server.restart()
        acked += publish(server, sink, 300, 30)
    trace = recording.load(sink)
    ends = recording.ends(sink)
    _, keys, _ = keyring.unlock_store(str(store), mounts.KEY.encode())
    steps, start = steps_of(trace, {1: keys.volume_key(1)})
    settings = Settings(FileKeys(keys.volume_key, keys.settings.cipher, 1))
    done = [(ack, bisect_right(ends, ack.size)) for ack in acked]
    return Recorded(trace, steps, start, settings), done[:purged], done[purged:], bisect_right(ends, purge)


def test_acked_messages_are_on_the_disk(recorded, quick):
    run, before, after, purge = recorded
    blocks: list[bytes] = []

    def also(stack: powerstore.Opened) -> str:
        blocks[:] = [stack.read(path) for path in stack.all_files() if path.endswith(b".blk")]
        found = messages_in(blocks)
        wanted = [ack for ack, done in after if done <= cut] + [
            ack for ack, done in before if done <= cut <= purge
        ]
        lost = [ack.seq for ack in wanted if found.get(ack.seq) != ack.payload]
        return f"acked messages {lost} are lost" if lost else ""

    states = wanted = 0
    for cut, disk, promises in run.replay():
        for i in range(2 * SCALE):
            found = disk.crash(random.Random(f"{SEED}/{cut}/{i}"))
            finding = powerstore.judge(run, found, disk.inodes, promises, quick, also)
            assert not finding, f"cut after {cut} operations, seed {SEED}/{cut}/{i}: {finding}\n{found.story}"
            states += 1
            wanted += sum(done <= cut for _, done in after)
    print(f"{states} states of {len(run.trace.ops)} operations")
    assert states > 1000 * SCALE
    assert wanted > 10_000 * SCALE
