"""A nats-server without a key boots a copy of the view of a store that another one has encrypted."""

from __future__ import annotations

import os
import shutil
import threading
from functools import partial
from typing import TYPE_CHECKING

import cluster_world
import mounts
import nats_world as world
import pytest
import server_stores as stores
import views
from nats.js import api

from encfs_js import jetstream, natscodec

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.mount,
    pytest.mark.nats,
    pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-"),
    pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-"),
]
NEW = "the key that came after"


@pytest.mark.parametrize("mode", ["chachapoly", "aes"])
def test_a_copy_of_the_view(mode: str, tmp_path: Path) -> None:
    live = stores.written(tmp_path / "store", tmp_path / "work", **stores.MODES[mode])
    assert mounts.holding(tmp_path / "store", stores.MARKER) == []
    before = mounts.snapshot(tmp_path / "store")
    with views.shown(tmp_path / "store", tmp_path / "mnt") as shown:
        shutil.copytree(shown.path, tmp_path / "copy", symlinks=True)
    assert not shown.complaints()
    assert mounts.snapshot(tmp_path / "store") == before
    packed = list((tmp_path / "copy").glob("jetstream/$G/streams/LOG/msgs/*.blk"))
    assert any(path.read_bytes()[:4] == b"cmp\x01" for path in packed)
    stores.check_boot(tmp_path / "copy", tmp_path / "plain", live)


def test_after_a_crash(tmp_path: Path) -> None:
    """The server was killed: there is no index.db that fits, and whatever it was about to do lies there."""
    options = stores.MODES["aes"]
    with world.serving(tmp_path / "store", tmp_path / "work", **options) as server:
        stores.fill(server)
        server.restart()
        live = stores.ask(server)
        world.publish(server, world.sample("ORDERS", 30, tag="late"))
        messages = world.read(server, "ORDERS")
        server.kill()
    with views.shown(tmp_path / "store", tmp_path / "mnt") as shown:
        shutil.copytree(shown.path, tmp_path / "copy", symlinks=True)
    assert not shown.complaints()
    with world.serving(tmp_path / "copy", tmp_path / "plain") as server:
        assert world.read(server, "ORDERS") == messages
        assert world.read(server, "LOG") == live["LOG"].messages
        assert "worker" in stores.ask(server)["ORDERS"].consumers


def test_half_way_to_another_key(tmp_path: Path) -> None:
    """The key and the cipher were changed: nats-server carries its streams over, and loses its consumers. The view has them."""
    store = tmp_path / "store"
    with world.serving(store, tmp_path / "work", key=stores.KEY, cipher="aes") as server:
        stores.fill(server)
        server.restart()
        live = stores.ask(server)
    with world.serving(store, tmp_path / "later", key=NEW, prev_key=stores.KEY, cipher="chachapoly") as server:
        changed = stores.ask(server)
    assert "worker" not in changed["ORDERS"].consumers
    old = tmp_path / "old"
    old.write_text(stores.KEY)
    old.chmod(0o600)
    with views.shown(store, tmp_path / "mnt", "--prev-key-file", old, key=NEW) as shown:
        shutil.copytree(shown.path, tmp_path / "copy", symlinks=True)
    assert not shown.complaints()
    with world.serving(tmp_path / "copy", tmp_path / "plain") as server:
        found = stores.ask(server)
    assert not stores.complaints(server), server.log()
    assert {name: each.messages for name, each in found.items()} == {
        name: each.messages for name, each in changed.items()
    }
    was, now = (each["ORDERS"].consumers["worker"] for each in (live, found))
    for field in ("ack_floor", "delivered"):
        assert (now[field]["consumer_seq"], now[field]["stream_seq"]) == (
            was[field]["consumer_seq"], was[field]["stream_seq"]
        )  # fmt: skip
    assert now["num_ack_pending"] == was["num_ack_pending"] > 0
    # With the new key alone the streams are there, and the consumer is an error and not garbage.
    with views.shown(store, tmp_path / "mnt", key=NEW) as shown:
        files = mounts.files(shown.path)
        refused = {str(path.relative_to(shown.path)) for path in files if views.problem(path)}
    base = "jetstream/$G/streams/ORDERS/obs/worker"
    assert refused == {f"{base}/meta.inf", f"{base}/o.dat"}


def test_the_store_is_in_use(tmp_path: Path) -> None:
    """A server writes, rolls blocks, compresses and deletes them while all is read through the view: records or errors."""
    store = tmp_path / "store"
    with world.serving(store, tmp_path / "work", key=stores.KEY, cipher="chachapoly") as server:
        s2 = {"max_bytes": 120_000, "compression": api.StoreCompression.S2}
        world.add_stream(server, "LOG", "LOG.>", **s2)
        world.add_stream(server, "ORDERS", "ORDERS.>")
        world.publish(server, world.sample("ORDERS", 3, size=100))
        with views.shown(store, tmp_path / "mnt") as shown:
            done = threading.Event()
            problems: list[object] = []

            def write() -> None:
                try:
                    for turn in range(12):
                        world.publish(server, world.sample("LOG", 100, size=2500, tag=str(turn), text=True), window=64)
                        world.publish(server, world.sample("ORDERS", 40, size=900, tag=str(turn)), window=64)
                except BaseException as problem:
                    problems.append(problem)
                finally:
                    done.set()

            writer = threading.Thread(target=write)
            writer.start()
            looked = records = 0
            first = f"{shown.path}/jetstream/$G/streams/ORDERS/msgs/1.blk"
            with open(first, "rb", buffering=0) as kept:
                while not done.is_set() or not looked:
                    for stream in ("LOG", "ORDERS"):
                        for path in sorted((shown.path / f"jetstream/$G/streams/{stream}/msgs").glob("*.blk")):
                            try:
                                block = path.read_bytes()
                            except OSError:
                                continue  # gone again, or not written to its end
                            records += count(block, stream, path)
                            looked += 1
                writer.join()
                assert not problems
                whole = os.pread(kept.fileno(), 8 << 20, 0)
            assert count(whole, "ORDERS", shown.path / "1.blk") == 3 + 12 * 40
            assert looked > 20
            assert records > 1000
            live = stores.ask(server)
        assert "Traceback" not in shown.log()
    with views.shown(store, tmp_path / "mnt") as shown:
        shutil.copytree(shown.path, tmp_path / "copy", symlinks=True)
    assert not shown.complaints()
    stores.check_boot(tmp_path / "copy", tmp_path / "plain", live)


def count(block: bytes, stream: str, path: Path) -> int:
    """How many records a block has. A block that is being written may end in the middle of one, and holds nothing else."""
    label = jetstream.block_name(stream, int(path.stem))
    if block[:4] == b"cmp\x01":
        return len(list(jetstream.records(jetstream.plain_block(block, None, label, str(path))[0], label, str(path))))
    at = found = 0
    while (head := jetstream.head_of(block, at)) is not None and at + head.length <= len(block):
        body = block[at : at + head.length]
        key = natscodec.hash_key(label)
        length = int.from_bytes(body[20:22], "little")
        subject = body[22 : 22 + length]
        rest = body[22 + length + (4 if body[3] & 0x80 else 0) : -8]
        assert natscodec.highwayhash64(key, body[4:20], subject, rest) == body[-8:], (path, at)
        at, found = at + head.length, found + 1
    assert found or not block
    return found


def test_a_node_of_a_cluster(tmp_path: Path) -> None:
    """Raft logs are encrypted with ChaCha20 whatever the cipher is; snapshots and votes lie in the clear."""
    places = [tmp_path / f"n{i}" for i in range(3)]
    for each in places:
        each.mkdir()
    with cluster_world.cluster(places, tmp_path / "work", key=stores.KEY, cipher="aes") as nodes:
        world.add_stream(nodes[0], "ORDERS", "ORDERS.>", num_replicas=3)
        cluster_world.wait_current(nodes)
        world.publish(nodes[0], world.sample("ORDERS", 60, size=900))
        world.add_durable(nodes[0], "ORDERS", "worker")
        cluster_world.wait_current(nodes)
        world.consume(nodes[0], "ORDERS", "worker", 20)
        cluster_world.wait_current(nodes)
        messages = world.read(nodes[0], "ORDERS")
        ask = partial(world.consumer_state, nodes[0], "ORDERS", "worker")
        state = cluster_world.from_replica(nodes[0], "ORDERS", ask, "worker")
    copies = [tmp_path / f"c{i}" for i in range(3)]
    for source, target in zip(places, copies, strict=True):
        assert list(source.glob("jetstream/$SYS/_js_/*/msgs/*.key"))
        with views.shown(source, tmp_path / "mnt") as shown:
            shutil.copytree(shown.path, target, symlinks=True)
        assert not shown.complaints()
    with cluster_world.cluster(copies, tmp_path / "again") as nodes:
        for node in nodes:
            ask = partial(world.consumer_state, node, "ORDERS", "worker")
            assert cluster_world.from_replica(node, "ORDERS", ask, "worker") == state
            assert {seq: m.payload for seq, m in cluster_world.read_from(node, "ORDERS").items()} == {
                m.seq: m.payload for m in messages
            }
    for node in nodes:
        assert not node.complaints(), node.log()
