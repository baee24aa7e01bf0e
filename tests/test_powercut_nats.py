"""Power cuts under a real nats-server on a real mount: what it acked is on the disk, whatever else the disk lost.

The server syncs every message (`sync_interval: always`), the daemon records, and states are drawn from the record as in
test_powercut.py. What a file may be is learned from the record itself: another decoder reads every page that was written.
"""

from __future__ import annotations

import os
import random
import re
import struct
import sys
import time
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

import decoder
import mounts
import nats_world as world
import powerstore
import pytest
import recording
from powercut import SCALE, SEED, quick
from powerstore import Recorded, Settings, Step, World
from promise import start_of
from recording import Resize, Sync, SyncBegin, Write

from encfs_js import keyring, keystore, state
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

    foreign = {op.file for op in trace.ops if isinstance(op, Write) and op.offset == 0 and op.data[:8] != b"ENCFSJS1"}
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
            steps.append(Step(at, at + 1, lambda world, number=op.file, token=at: world.of(number).sync_begins(token)))
        elif isinstance(op, Sync):

            def ends(world: World, number: int = op.file, token: int = op.began) -> None:
                world.of(number).sync_ends(token)

            steps.append(Step(at, at + 1, None, ends))
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


class Run(NamedTuple):
    """A recorded run, and what was acked in it, each with the number of calls by then: before the purge, and after it;
    the number of calls when the purge began; the store's keys.
    """

    recorded: Recorded
    before: list[tuple[Acked, int]]
    after: list[tuple[Acked, int]]
    purge: int
    keys: keyring.Keys

    def lost(self, found: dict[int, bytes], cut: int) -> str:
        """Which messages are missing that were acked when the power was cut; those before the purge until it began."""
        wanted = [ack for ack, done in self.after if done <= cut]
        wanted += [ack for ack, done in self.before if done <= cut <= self.purge]
        missing = [ack.seq for ack in wanted if found.get(ack.seq) != ack.payload]
        return f"acked messages {missing} are lost" if missing else ""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A server that syncs every message, on a store that an earlier run has filled."""
    where = tmp_path_factory.mktemp("recorded")
    store, mountpoint, sink = where / "store", where / "mnt", where / "sink"
    mounts.init(store, cipher="aes")
    sink.touch()
    with (
        mounts.mounted(store, mountpoint),
        world.serving(mountpoint, where / "work", sync="always") as server,
    ):
        world.add_stream(server, "ORDERS", "orders.>")
        world.add_durable(server, "ORDERS", "billing")
        acked = publish(server, sink, 0, 40)
    with pytest.MonkeyPatch.context() as patch:
        program = os.path.join(os.path.dirname(__file__), "recorded_mount.py")
        patch.setattr(mounts, "COMMAND", [sys.executable, program])
        patch.setenv("POWERCUT_SINK", str(sink))
        with (
            mounts.mounted(store, mountpoint),
            world.serving(mountpoint, where / "work", sync="always") as server,
        ):
            acked += publish(server, sink, 100, 80)
            world.consume(server, "ORDERS", "billing", 40)
            purge, purged = os.stat(sink).st_size, len(acked)
            world.talk(server, lambda _, jetstream: jetstream.purge_stream("ORDERS"))
            acked += publish(server, sink, 200, 70)
            server.restart()
            acked += publish(server, sink, 300, 30)
    trace, ends = recording.load(sink), recording.ends(sink)
    _, keys, _ = keystore.unlock_store(str(store), mounts.KEY.encode())
    steps, start = steps_of(trace, {1: keys.volume_key(1)})
    settings = Settings(FileKeys(keys.volume_key, keys.settings.cipher, 1))
    done = [(ack, bisect_right(ends, ack.size)) for ack in acked]
    recorded = Recorded(trace, steps, start, settings)
    return Run(recorded, done[:purged], done[purged:], bisect_right(ends, purge), keys)


def test_acked_messages_are_on_the_disk(run, quick):
    """At every point of the run, and whichever way the directories were on the disk: in one of the stream's blocks."""
    states = 0
    for cut, disk, promises in run.recorded.replay():

        def lost(stack: powerstore.Opened, cut: int = cut) -> str:
            blocks = [stack.read(path) for path in stack.all_files() if path.endswith(b".blk")]
            return run.lost(messages_in(blocks), cut)

        for i in range(2 * SCALE):
            found = disk.crash(random.Random(f"{SEED}/{cut}/{i}"))
            finding = powerstore.judge(run.recorded, found, disk.inodes, promises, quick, lost)
            assert not finding, f"cut after {cut} operations, seed {SEED}/{cut}/{i}: {finding}\n{found.story}"
            states += 1
    print(f"{states} states of {len(run.recorded.trace.ops)} operations")
    assert states > 1000 * SCALE


def test_a_server_goes_on_after_a_power_cut(run, tmp_path):
    """A real mount and a real server on what was found, on a file system with one journal as ext4 is."""
    length = len(run.recorded.trace.ops)
    cuts = sorted(random.Random(SEED).sample(range(run.recorded.trace.base, length), 3 * SCALE))
    for cut, disk, _ in run.recorded.replay():
        if cut not in cuts:
            continue
        found = disk.crash(random.Random(f"{SEED}/{cut}"), single=True)
        store, mountpoint = tmp_path / f"store{cut}", tmp_path / f"mnt{cut}"
        store.mkdir()
        found.write_out(store)
        state.save(str(store), run.keys, state.State(clean=False, began=time.time_ns(), windows=()))
        with mounts.mounted(store, mountpoint) as mount:
            with world.serving(mountpoint, tmp_path / f"work{cut}", sync="always") as server:
                messages = world.read(server, "ORDERS")
                finding = run.lost({message.seq: message.payload for message in messages}, cut)
                assert not finding, f"cut after {cut} operations, seed {SEED}/{cut}: {finding}\n{found.story}"
                world.publish(server, world.sample("orders", 20))
                assert len(world.read(server, "ORDERS")) == len(messages) + 20
            trimmed = [line for line in mount.complaints() if "never synced before the unclean stop" in line]
            mount.expected += map(re.escape, trimmed)
        mounts.verify(store)
