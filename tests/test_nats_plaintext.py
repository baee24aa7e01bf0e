"""A store that a plain nats-server wrote goes on under the mount: read as it is, sealed before it is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mounts
import nats_world as world
import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from nats.aio.client import Client
    from nats.js import JetStreamContext

pytestmark = [
    pytest.mark.mount,
    pytest.mark.nats,
    pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-"),
    pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-"),
]

OLD = b"written in the clear before there was a key"
NEW = b"written later, and never to be seen on the disk"
STREAM = "jetstream/$G/streams/ORDERS"


def as_stored(messages: list[world.Message]) -> list[world.Stored]:
    return [world.Stored(seq, *message) for seq, message in enumerate(messages, 1)]


def write_plain_store(store: Path, work: Path) -> list[world.Message]:
    """Three blocks of messages, a consumer and a KV bucket, written by a server without any encryption."""
    messages = world.sample("ORDERS", 500, size=80_000, marker=OLD)
    with world.serving(store, work) as server:
        world.add_stream(server, "ORDERS", "ORDERS.>")
        world.publish(server, messages, window=64)
        world.add_durable(server, "ORDERS", "worker")
        world.consume(server, "ORDERS", "worker", 100)

        async def keep(_: Client, jetstream: JetStreamContext) -> None:
            bucket = await jetstream.create_key_value(bucket="settings")
            await bucket.put("colour", OLD)

        world.talk(server, keep)
    assert (store / STREAM / "msgs" / "3.blk").exists()
    return messages


def no_new_plaintext(store: Path, before: dict[str, bytes]) -> None:
    """The new marker is nowhere, and what is not sealed is a file of before that nobody has changed."""
    assert mounts.holding(store, NEW) == []
    now = mounts.contents(store)
    for path in mounts.unsealed(store):
        name = str(path.relative_to(store))
        assert now[name] == before.get(name), f"{name} was changed without being sealed"


@pytest.mark.parametrize("cipher", ["chachapoly", "aes"])
def test_plain_store_goes_on_sealed(tmp_path: Path, cipher: str) -> None:
    store, mountpoint, work = tmp_path / "store", tmp_path / "mnt", tmp_path / "work"
    store.mkdir()
    messages = write_plain_store(store, work)
    before = mounts.contents(store)
    untouched = mounts.snapshot(store)
    refused = mounts.run("init", store, code=15)
    assert "encfs-js: error: " in refused.stderr
    assert "--plaintext read" in refused.stderr
    assert mounts.snapshot(store) == untouched
    mounts.init(store, cipher=cipher, plaintext="read")
    assert mounts.contents(store) == before

    more = world.sample("ORDERS", 60, size=80_000, marker=NEW, tag="more")
    with mounts.mounted(store, mountpoint):
        with world.serving(mountpoint, work) as server:
            assert world.read(server, "ORDERS") == as_stored(messages)
            assert world.consumer_state(server, "ORDERS", "worker") == (100, 0, 400)
        no_new_plaintext(store, before)
        with world.serving(mountpoint, work) as server:
            world.publish(server, more, window=64)
            world.add_stream(server, "FRESH", "FRESH.>")
            world.publish(server, world.sample("FRESH", 100, marker=NEW))

            async def replace(_: Client, jetstream: JetStreamContext) -> None:
                bucket = await jetstream.key_value("settings")
                assert (await bucket.get("colour")).value == OLD
                await bucket.put("colour", NEW)
                await jetstream.delete_msg("ORDERS", 1)  # erased: the server rewrites the whole first block

            world.talk(server, replace)
            assert world.read(server, "ORDERS") == as_stored(messages + more)[1:]
            server.restart(kill=True)
            assert world.read(server, "ORDERS") == as_stored(messages + more)[1:]
            assert world.consume(server, "ORDERS", "worker", 460) == as_stored(messages + more)[100:]
    no_new_plaintext(store, before)
    blocks = store / STREAM / "msgs"
    assert (blocks / "2.blk").read_bytes() == before[f"{STREAM}/msgs/2.blk"], "nobody had a reason to touch it"
    assert mounts.suite_of(blocks / "1.blk") == cipher
    assert mounts.suite_of(blocks / "3.blk") == cipher
    assert mounts.suite_of(store / "jetstream/$G/streams/FRESH/msgs/1.blk") == cipher

    with mounts.mounted(store, mountpoint), world.serving(mountpoint, work) as server:
        assert world.read(server, "ORDERS") == as_stored(messages + more)[1:]
        assert world.consumer_state(server, "ORDERS", "worker") == (560, 0, 0)
        assert len(world.read(server, "FRESH")) == 100
    no_new_plaintext(store, before)
    mounts.verify(store)


def test_a_crash_leaves_no_new_plaintext(tmp_path: Path) -> None:
    """SIGKILL of daemon and server in the middle of the work: what is in STORE then is old or sealed."""
    store, mountpoint, work = tmp_path / "store", tmp_path / "mnt", tmp_path / "work"
    store.mkdir()
    messages = write_plain_store(store, work)
    before = mounts.contents(store)
    mounts.init(store, plaintext="read")
    more = world.sample("ORDERS", 60, size=80_000, marker=NEW, tag="more")
    with mounts.mounted(store, mountpoint) as mount, world.serving(mountpoint, work, sync="always") as server:
        world.publish(server, more, window=64)
        mount.process.kill()
        server.kill()
        mount.kill()
    no_new_plaintext(store, before)
    with mounts.mounted(store, mountpoint), world.serving(mountpoint, work) as server:
        assert world.read(server, "ORDERS") == as_stored(messages + more)
    no_new_plaintext(store, before)
    mounts.verify(store)
