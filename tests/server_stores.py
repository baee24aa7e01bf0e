"""Stores that a real nats-server has written, encrypted by itself or not, and what the rooms read from their files."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import nats_world as world
from nats.js import api

from encfs_js import jetstream, serverkeys, serverstate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from nats.aio.client import Client
    from nats.js import JetStreamContext

KEY = "the server's own key"
MODES = {"plain": {}, "chachapoly": {"key": KEY, "cipher": "chachapoly"}, "aes": {"key": KEY, "cipher": "aes"}}
MARKER = b"to be found in plain files only"


class Live(NamedTuple):
    """What a running server says of a stream: its state, its messages, its consumers."""

    state: dict[str, Any]
    messages: list[world.Stored]
    consumers: dict[str, dict[str, Any]]


class Found(NamedTuple):
    """What the files of a stream say. consumers: name to configuration and state. encrypted: by file, of those that may be."""

    meta: dict[str, Any]
    index: serverstate.Index
    records: list[jetstream.Record]
    messages: list[world.Stored]
    consumers: dict[str, tuple[dict[str, Any], serverstate.ConsumerState]]
    encrypted: dict[str, bool]
    keys: dict[str, int]


# --- the live server --------------------------------------------------------------------------------------------------


def fill(server: world.Server) -> None:
    """Make streams in which everything occurs that leaves traces of its own kind in the files."""
    world.add_stream(server, "ORDERS", "ORDERS.>")
    world.publish(server, world.sample("ORDERS", 120, size=900, marker=MARKER))
    # Blocks of 32,000 bytes: some of them closed, and so compressed.
    world.add_stream(server, "LOG", "LOG.>", max_bytes=120_000, compression=api.StoreCompression.S2)
    world.publish(server, world.sample("LOG", 300, size=1200, marker=MARKER, text=True), window=16)
    world.add_stream(server, "MANY", "MANY.>", max_bytes=120_000)
    world.publish(server, world.sample("MANY", 250, size=1200, marker=MARKER), window=16)
    world.add_stream(server, "PURGED", "PURGED.>")
    world.publish(server, world.sample("PURGED", 60, size=300, marker=MARKER))
    world.add_stream(server, "EMPTIED", "EMPTIED.>")
    world.publish(server, world.sample("EMPTIED", 5))

    async def more(_: Client, js: JetStreamContext) -> None:
        for seq in (3, 4, 40, 120):
            await js.delete_msg("ORDERS", seq)
        await js.purge_stream("PURGED", subject="PURGED.3")
        await js.purge_stream("PURGED", seq=20)
        await js.purge_stream("EMPTIED")
        bucket = await js.create_key_value(bucket="settings", history=3)
        for turn in range(5):
            for name in ("colour", "size", "place"):
                await bucket.put(name, b"%d " % turn + MARKER)
        await bucket.delete("size")
        await bucket.purge("colour")
        config = api.ConsumerConfig(durable_name="worker", ack_policy=api.AckPolicy.EXPLICIT, ack_wait=3600)
        await js.add_consumer("ORDERS", config)
        subscription = await js.pull_subscribe_bind("worker", stream="ORDERS")
        batch = await subscription.fetch(30, timeout=20)
        await asyncio.gather(*(msg.ack_sync(timeout=20) for i, msg in enumerate(batch) if i < 10 or i % 3 == 0))
        await batch[11].nak()
        while (await subscription.fetch(1, timeout=20))[0].metadata.num_delivered < 2:
            pass  # the server may not have come to the nak yet
        await subscription.unsubscribe()

    world.talk(server, more)


def ask(server: world.Server) -> dict[str, Live]:
    """What the server says of every stream."""

    async def asking(client: Client, js: JetStreamContext) -> dict[str, Live]:
        found = {}
        for info in await js.streams_info():
            name = str(info.config.name)
            raw = json.loads((await client.request(f"$JS.API.STREAM.INFO.{name}", b'{"deleted_details": true}')).data)
            consumers = json.loads((await client.request(f"$JS.API.CONSUMER.LIST.{name}", b"")).data)["consumers"] or []
            state = {each["name"]: each for each in consumers}
            found[name] = Live(raw["state"], await world.reading(js, name), state)
        return found

    live: dict[str, Live] = world.talk(server, asking)
    return live


def written(store: Path, work: Path, **options: Any) -> dict[str, Live]:
    """Have a server fill a store. What it says of it after one more start, when what is volatile is gone."""
    with world.serving(store, work, **options) as server:
        fill(server)
        server.restart()
    with world.serving(store, work, **options) as server:
        return ask(server)


def settled(live: dict[str, Live]) -> dict[str, Any]:
    """What is said of every stream, without the moment at which it was said."""
    return {
        name: (
            each.state,
            each.messages,
            {
                consumer: {field: value for field, value in said.items() if field != "ts"}
                for consumer, said in each.consumers.items()
            },
        )
        for name, each in live.items()
    }


def complaints(server: world.Server) -> list[str]:
    return [line for line in server.log().splitlines() if "[WRN]" in line or "[ERR]" in line]


def check_boot(store: Path, work: Path, expected: dict[str, Live], **options: Any) -> None:
    """Boot a server: it answers as expected, and its log has neither a warning nor an error."""
    with world.serving(store, work, **options) as server:
        assert ("key:" in server.configuration()) == ("key" in options)
        assert settled(ask(server)) == settled(expected)
    assert not complaints(server), server.log()


# --- its files --------------------------------------------------------------------------------------------------------


def headers(raw: bytes) -> dict[str, str] | None:
    lines = raw.decode().split("\r\n")[1:]
    return dict(line.split(": ", 1) for line in lines if line) or None


def blocks(directory: Path) -> list[int]:
    return sorted(int(path.stem) for path in directory.glob("msgs/*.blk"))


def key_file(path: Path, asset: serverkeys.Asset, keys: Sequence[bytes]) -> serverkeys.Seed | None:
    return serverkeys.open_key_file(path.read_bytes(), asset, keys, str(path)) if path.exists() else None


def read(directory: Path, keys: Sequence[bytes], account: str = "$G") -> Found:
    """Read the directory of a stream: decrypt and check everything, and work out which messages there are."""
    name, path = directory.name, str(directory)
    asset = serverkeys.stream(account, name)
    seed = key_file(directory / "meta.key", asset, keys)
    encrypted, used = {"meta.inf": seed is not None}, {"meta.key": seed.key} if seed else {}
    meta = read_meta(directory, seed, name)
    body, encrypted["index.db"] = serverstate.open_index(
        (directory / "msgs/index.db").read_bytes(), seed, name, f"{path}/msgs/index.db"
    )
    index = serverstate.parse_index(body, f"{path}/msgs/index.db")
    states = {block.number: block for block in index.blocks}
    records: list[jetstream.Record] = []
    live: dict[int, jetstream.Record] = {}
    block = b""
    for number in blocks(directory):
        file = directory / f"msgs/{number}.blk"
        block_seed = key_file(file.with_suffix(".key"), asset.block(number), keys)
        if block_seed:
            used[f"{number}.key"] = block_seed.key
        keystream = serverkeys.Keystream(block_seed) if block_seed else None
        label = jetstream.block_name(name, number)
        block, encrypted[file.name] = jetstream.plain_block(file.read_bytes(), keystream, label, str(file))
        here = list(jetstream.records(block, label, str(file)))
        records += here
        deleted = set(serverstate.deleted_sequences(states[number]))
        first, last = states[number].first_seq, states[number].last_seq
        live |= {r.seq: r for r in jetstream.messages(iter(here)) if first <= r.seq <= last and r.seq not in deleted}
    assert serverstate.is_of(index, blocks(directory)[-1], block)
    for record in records:
        if record.tombstone:
            live.pop(record.seq, None)
    messages = [
        world.Stored(r.seq, r.subject.decode(), bytes(r.payload), headers(bytes(r.header))) for r in live.values()
    ]
    consumers = {}
    for consumer in sorted(directory.glob("obs/*")):
        own = key_file(consumer / "meta.key", asset.consumer(consumer.name), keys)
        if own:
            used[f"{consumer.name}/meta.key"] = own.key
        encrypted[f"{consumer.name}/o.dat"] = own is not None
        raw, file = (consumer / "o.dat").read_bytes(), str(consumer / "o.dat")
        state = serverstate.parse_consumer(serverkeys.open_file(raw, own, file) if own else raw, file)
        consumers[consumer.name] = (read_meta(consumer, own, f"{name}/{consumer.name}"), state)
    return Found(meta, index, records, messages, consumers, encrypted, used)


def read_meta(directory: Path, seed: serverkeys.Seed | None, name: str) -> dict[str, Any]:
    raw, path = (directory / "meta.inf").read_bytes(), str(directory / "meta.inf")
    jetstream.check_meta(raw, (directory / "meta.sum").read_bytes(), name, path)
    return jetstream.parse_meta(serverkeys.open_file(raw, seed, path) if seed else raw, path)
