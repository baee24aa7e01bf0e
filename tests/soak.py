"""Kill the worker of a mount again and again under two nats-servers that are in full use, and compare everything afterwards.

One server syncs every write (sync_interval always), the other as it does by default. On each publishers, a consumer that
acks, a key-value bucket, a stream that is purged and streams that come and go are at work while the worker is killed every
0.1 to 0.5 s. No client may see an error, and afterwards the servers, still the same processes, must give back what was
sent and nothing else; so must servers that are started anew on a new mount.

    python tests/soak.py DIRECTORY [--kills N] [--seed N] [--no-writeback]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import mounts
import nats
import nats_world as world
from nats.js import api
from nats.js.errors import KeyNotFoundError
from takeover import make_store, sound

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js import JetStreamContext
    from nats.js.kv import KeyValue

PUBLISHERS: Final = 5
LONG: Final = 3600.0  # seconds until a message that was not acked comes again: never
TIMEOUT: Final = 60.0
SLOW: Final = " took too long: "  # nats-server warns of two seconds, which a busy machine may take with or without us


@dataclass
class Life:
    """What is sent to one server, and what it has to know of it."""

    name: str
    chance: random.Random
    stop: asyncio.Event
    orders: dict[int, world.Message] = field(default_factory=dict)  # by sequence, as acked
    pauses: list[float] = field(default_factory=list)  # seconds from a publish to its ack
    consumed: list[int] = field(default_factory=list)
    values: dict[str, bytes | None] = field(default_factory=dict)
    logs: dict[int, world.Message] = field(default_factory=dict)
    removed: int = 0
    streams_made: int = 0
    publishing: int = 0
    problems: list[str] = field(default_factory=list)

    def message(self, subject: str, what: str) -> world.Message:
        """A message like no other, mostly small, now and then as large as a few pages."""
        size = int(20_000 ** self.chance.random())
        return world.Message(subject, world.noise(f"{self.name} {what}", size), {"What": what})

    async def rest(self, most: float) -> None:
        await asyncio.sleep(self.chance.uniform(0, most))


# --- callers ------------------------------------------------------------------------------------------------------


async def send(stream: JetStreamContext, message: world.Message) -> int:
    ack = await stream.publish(message.subject, message.payload, timeout=TIMEOUT, headers=message.headers)
    assert not ack.duplicate
    return ack.seq


async def publish(life: Life, stream: JetStreamContext, who: int) -> None:
    i = 0
    life.publishing += 1
    while not life.stop.is_set():
        message = life.message(f"orders.{who}", f"order {who} {i}")
        began = time.perf_counter()
        seq = await send(stream, message)
        life.pauses.append(time.perf_counter() - began)
        assert seq not in life.orders
        life.orders[seq] = message
        i += 1
        await life.rest(0.01)
    life.publishing -= 1


async def consume(life: Life, stream: JetStreamContext) -> None:
    """Every order once, in order, until the last that was published is acked."""
    subscription = await stream.pull_subscribe_bind("billing", stream="ORDERS")
    while not life.stop.is_set() or life.publishing or len(life.consumed) < len(life.orders):
        try:
            batch = await subscription.fetch(50, timeout=1)
        except TimeoutError:  # there was none
            continue
        for msg in batch:
            assert msg.metadata.num_delivered == 1
            life.consumed.append(msg.metadata.sequence.stream)
        await asyncio.gather(*(msg.ack_sync(timeout=TIMEOUT) for msg in batch))
    assert life.consumed == sorted(life.orders)


async def current(bucket: KeyValue, key: str) -> bytes | None:
    try:
        return (await bucket.get(key)).value
    except KeyNotFoundError:
        return None


async def keep(life: Life, stream: JetStreamContext) -> None:
    bucket = await stream.key_value("settings")
    turn = 0
    while not life.stop.is_set():
        turn += 1
        key, what = f"key-{life.chance.randrange(30)}", life.chance.random()
        if what < 0.7:
            life.values[key] = life.message("", f"value {turn}").payload or b"-"
            await bucket.put(key, life.values[key])
        elif what < 0.85:
            await (bucket.delete(key) if what < 0.8 else bucket.purge(key))
            life.values[key] = None
        else:
            assert await current(bucket, key) == life.values.get(key)
        await life.rest(0.02)


async def purge(life: Life, stream: JetStreamContext) -> None:
    """A stream from which messages are removed in every way there is."""
    turn = 0
    while not life.stop.is_set():
        for _ in range(life.chance.randrange(1, 15)):
            turn += 1
            message = life.message(f"logs.{turn % 3}", f"log {turn}")
            life.logs[await send(stream, message)] = message
        what = life.chance.random()
        last = life.chance.choice(sorted(life.logs))
        if what < 0.2:
            gone = set(life.logs)
            await stream.purge_stream("LOGS")
        elif what < 0.5:
            gone = {seq for seq, message in life.logs.items() if message.subject == "logs.1"}
            await stream.purge_stream("LOGS", subject="logs.1")
        elif what < 0.7:
            gone = {seq for seq in life.logs if seq < last}
            await stream.purge_stream("LOGS", seq=last)
        else:
            gone = {last}
            await stream.delete_msg("LOGS", last)
        life.logs = {seq: message for seq, message in life.logs.items() if seq not in gone}
        life.removed += len(gone)
        assert (await stream.stream_info("LOGS")).state.messages == len(life.logs)
        await life.rest(0.05)


async def come_and_go(life: Life, stream: JetStreamContext) -> None:
    """Streams that are made, filled, read and deleted."""
    while not life.stop.is_set():
        life.streams_made += 1
        name = f"TEMPORARY-{life.streams_made}"
        await stream.add_stream(name=name, subjects=[f"temporary.{life.streams_made}"])
        sent = [life.message(f"temporary.{life.streams_made}", f"{name} {i}") for i in range(life.chance.randrange(30))]
        for seq, message in enumerate(sent, 1):
            assert await send(stream, message) == seq
        for seq, message in enumerate(sent, 1):
            assert (await stream.get_msg(name, seq)).data == message.payload
        assert (await stream.stream_info(name)).state.messages == len(sent)
        await stream.delete_stream(name)
        await life.rest(0.05)


# --- a run --------------------------------------------------------------------------------------------------------


async def begin(stream: JetStreamContext) -> None:
    await stream.add_stream(name="ORDERS", subjects=["orders.>"])
    await stream.add_stream(name="LOGS", subjects=["logs.>"])
    billing = api.ConsumerConfig(durable_name="billing", ack_policy=api.AckPolicy.EXPLICIT, ack_wait=LONG)
    await stream.add_consumer("ORDERS", billing)
    await stream.create_key_value(bucket="settings", history=3)


async def kill(mount: mounts.Mount, kills: int, chance: random.Random, lives: list[Life]) -> None:
    for _ in range(kills):
        await asyncio.sleep(chance.uniform(0.1, 0.5))
        await asyncio.to_thread(mount.kill_worker)
    for life in lives:
        life.stop.set()


async def work(mount: mounts.Mount, servers: dict[str, world.Server], kills: int, seed: int) -> list[Life]:
    """Everybody at once, until the worker was killed that often. Any error ends it, and is raised."""
    lives: list[Life] = []
    connections: list[Client] = []

    async def connect(life: Life, server: world.Server) -> JetStreamContext:
        async def note(problem: Exception | None = None) -> None:
            life.problems.append(str(problem))

        connection = await nats.connect(
            server.url, allow_reconnect=False, connect_timeout=10, error_cb=note, disconnected_cb=note
        )
        connections.append(connection)
        return connection.jetstream(timeout=TIMEOUT)

    try:
        async with asyncio.TaskGroup() as group:
            for name, server in servers.items():
                life = Life(name, random.Random(f"{seed} {name}"), asyncio.Event())
                stream = await connect(life, server)
                await begin(stream)
                lives.append(life)
                for who in range(PUBLISHERS):
                    group.create_task(publish(life, stream, who))
                for caller in (consume, keep, purge, come_and_go):
                    group.create_task(caller(life, await connect(life, server)))
            group.create_task(kill(mount, kills, random.Random(seed), lives))
        for life in lives:
            assert life.problems == []
    finally:
        for connection in connections:
            with contextlib.suppress(Exception):
                await connection.close()
    return lives


def compare(life: Life, server: world.Server) -> None:
    """What the server gives back is what was sent and not removed; payload by payload, count by count."""

    def as_stored(messages: dict[int, world.Message]) -> list[world.Stored]:
        return [world.Stored(seq, *messages[seq]) for seq in sorted(messages)]

    orders = world.read(server, "ORDERS")
    assert [message.seq for message in orders] == sorted(life.orders) == list(range(1, len(orders) + 1))
    assert orders == as_stored(life.orders)
    assert world.read(server, "LOGS") == as_stored(life.logs)
    assert world.consumer_state(server, "ORDERS", "billing") == (len(orders), 0, 0)

    async def values(_: Client, stream: JetStreamContext) -> dict[str, bytes | None]:
        bucket = await stream.key_value("settings")
        return {key: await current(bucket, key) for key in life.values}

    assert world.talk(server, values) == life.values
    names = world.streams(server)
    assert set(names) == {"ORDERS", "LOGS", "KV_settings"}
    assert (names["ORDERS"], names["LOGS"]) == (len(life.orders), len(life.logs))


def soak(where: Path, *, kills: int, seed: int, options: tuple[str, ...] = ()) -> str:
    """Run it all in an empty directory. Returns the figures, for people. Raises AssertionError and what clients raise."""
    store = make_store(where / "store")
    mountpoint = where / "mnt"
    syncs = {"always": "always", "default": None}
    with contextlib.ExitStack() as stack:
        mount = stack.enter_context(mounts.mounted(store, mountpoint, *options))
        servers = {
            name: stack.enter_context(world.serving(mountpoint / name, where / f"server-{name}", sync=sync))
            for name, sync in syncs.items()
        }
        pids = [server.process.pid for server in servers.values() if server.process]
        began = time.monotonic()
        lives = asyncio.run(asyncio.wait_for(work(mount, servers, kills, seed), 60 + 5 * kills))
        took = time.monotonic() - began
        assert [server.process.pid for server in servers.values() if server.process and server.alive()] == pids
        assert mount.status()["takeovers"] == kills
        for life in lives:
            compare(life, servers[life.name])
            for word in ("[ERR]", "[FTL]", "[WRN]"):
                said = [line for line in servers[life.name].log().splitlines() if word in line and SLOW not in line]
                assert not said, said[:5]
    sound(store)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mounts.mounted(store, mountpoint, *options))
        for life in lives:
            sync = syncs[life.name]
            server = stack.enter_context(world.serving(mountpoint / life.name, where / f"again-{life.name}", sync=sync))
            compare(life, server)
    lines = [f"{kills} kills in {took:.0f} s, seed {seed}{' '.join(('', *options))}; no error, nothing lost or doubled"]
    for life in lives:
        pauses = sorted(life.pauses)
        lines.append(
            f"  sync {life.name}: {len(life.orders)} orders, {life.removed} purged, {len(life.values)} keys,"
            f" {life.streams_made} streams deleted; publish median {1000 * statistics.median(pauses):.1f} ms,"
            f" p99 {1000 * pauses[len(pauses) * 99 // 100]:.0f} ms, max {1000 * pauses[-1]:.0f} ms"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="empty; not on overlayfs")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    parser.add_argument("--no-writeback", action="store_true")
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", file=sys.stderr)
    options = ("--no-writeback",) if chosen.no_writeback else ()
    print(soak(chosen.directory, kills=chosen.kills, seed=chosen.seed, options=options))


if __name__ == "__main__":
    main()
