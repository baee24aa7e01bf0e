"""Three real nats-servers as one JetStream cluster on loopback, and clients that keep them busy. Knows nothing of encfs_js.

A node is a `nats_world.Server` that has routes to the other two; all that is in nats_world works with one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import socket
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mounts
import nats
import nats.errors
import nats.js.errors
import nats_world as world
from nats.js import api

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from nats.aio.client import Client
    from nats.js import JetStreamContext

CLUSTER = "drill"
NODES = 3
STREAM, SUBJECT, BUCKET = "ORDERS", "orders", "settings"
LIVE, STILL = "billing", "audit"  # durable consumers: one that works all the time, one that stands where it was left
STILL_ACKED = 300
PUBLISHERS = 4
KEYS = 20
FILLED = 1500  # messages before the work begins
LARGEST = 6000  # bytes of a message, without the marker
# What a client meets while a leader is chosen or a server is away. It asks again then.
UNCERTAIN = (
    TimeoutError,
    nats.errors.Error,
    nats.js.errors.Error,
    ConnectionError,
)
# A node that is up before the others cannot reach them yet.
STARTING = re.compile(r"Error trying to connect to route")


# --- the servers --------------------------------------------------------------------------------------------------


@dataclass
class Node(world.Server):
    """One server of the cluster. port: for the others' routes; ports: those of all."""

    name: str = ""
    port: int = 0
    ports: tuple[int, ...] = ()
    monitor: str = ""

    def configuration(self) -> str:
        routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in self.ports)
        return (
            super().configuration().replace("server_name: world", f"server_name: {self.name}")
            + f'http: "127.0.0.1:-1"\ncluster {{ name: {CLUSTER}, listen: "127.0.0.1:{self.port}", routes: [{routes}] }}\n'
        )

    def start(self) -> None:
        super().start()
        ports = self._ports()
        assert ports is not None
        self.monitor = ports["monitoring"][0]

    def ask(self, path: str) -> dict[str, Any]:
        """An answer of the server's monitoring; also the body of one whose status is not 200."""
        try:
            with urllib.request.urlopen(f"{self.monitor}/{path}", timeout=20) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as problem:
            with problem:
                found = json.load(problem)
        return found

    def healthy(self) -> bool:
        """Whether the server says that its meta layer and every stream and consumer that it has is up to date."""
        try:
            return bool(self.ask("healthz")["status"] == "ok")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def complaints(self) -> list[str]:
        """The lines of all its logs that say that something went wrong, but for routes to servers that are not up yet."""
        lines = [line for number in range(self.starts) for line in self.log(number + 1).splitlines()]
        bad = [line for line in lines if re.search(r"\[(ERR|FTL)\]|^panic|^goroutine", line)]
        return [line for line in bad if not STARTING.search(line)] + world.write_errors(self)


def free_ports(count: int) -> list[int]:
    """Ports that nobody has, and that no connection gets by itself: a server that comes back finds its own free."""
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
        lowest = int(file.read().split()[0])
    found: list[int] = []
    candidates = list(range(10_000, lowest)) or list(range(lowest // 2, lowest))
    random.shuffle(candidates)
    for port in candidates:
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports on loopback")


def wait_current(nodes: Sequence[Node]) -> None:
    """Wait until every server is up to date and all agree on who leads."""

    def current() -> bool:
        assert all(node.alive() for node in nodes), "\n".join(node.log() for node in nodes if not node.alive())
        if not all(node.healthy() for node in nodes):
            return False
        leaders = {(node.ask("jsz").get("meta_cluster") or {}).get("leader") for node in nodes}
        return len(leaders) == 1 and bool(leaders - {None, ""})

    try:
        mounts.until(current, "a cluster that is up to date")
    except AssertionError as problem:
        state = "\n".join(f"{node.name}: {node.ask('healthz')}" for node in nodes if node.alive())
        raise AssertionError(f"{problem}\n{state}") from None


@contextlib.contextmanager
def cluster(stores: Sequence[Path], work: Path, **options: Any) -> Iterator[list[Node]]:
    """A running cluster, one server for each store, up to date; stopped by SIGTERM, killed when the block failed."""
    ports = tuple(free_ports(len(stores)))
    nodes = [
        Node(store, work / f"n{i}", name=f"n{i}", port=ports[i - 1], ports=ports, **options)
        for i, store in enumerate(stores, 1)
    ]
    try:
        for node in nodes:
            node.start()
        wait_current(nodes)
        yield nodes
        for node in nodes:
            if node.process is not None:
                node.stop()
    finally:
        for node in nodes:
            node.kill()


# --- looking at every replica ---------------------------------------------------------------------------------------


def replicas(nodes: Sequence[Node], stream: str) -> dict[str, dict[str, Any]]:
    """What each server says of its own copy of a stream: messages, bytes, first and last sequence and their times.

    Not how many consumers there are: those of who has just read come and go.
    """
    found = {}
    for node in nodes:
        details = node.ask("jsz?accounts=true&streams=true")["account_details"]
        states = [s["state"] for account in details for s in account["stream_detail"] if s["name"] == stream]
        found[node.name] = {key: value for state in states for key, value in state.items() if key != "consumer_count"}
    return found


def wait_alike(nodes: Sequence[Node], stream: str) -> dict[str, Any]:
    """Wait until all replicas of a stream are the same by their numbers, and return those."""

    def alike() -> dict[str, Any] | None:
        first, *rest = replicas(nodes, stream).values()
        return first if first and all(state == first for state in rest) else None

    try:
        state: dict[str, Any] = mounts.until(alike, f"replicas of {stream} that are alike")
    except AssertionError as problem:
        raise AssertionError(f"{problem}\n{replicas(nodes, stream)}") from None
    return state


def lead(node: Node, stream: str, consumer: str = "") -> None:
    """Make this server the leader of a stream, or of a consumer: what is read then comes from its own files."""
    what, name = ("CONSUMER", f"{stream}.{consumer}") if consumer else ("STREAM", stream)

    async def ask(connection: Client, _: JetStreamContext) -> bool:
        # Only a leader answers, and while one is chosen nobody does.
        info = json.loads((await connection.request(f"$JS.API.{what}.INFO.{name}", b"", timeout=1)).data)
        if (info.get("cluster") or {}).get("leader") == node.name:
            return True
        request = json.dumps({"placement": {"preferred": node.name}}).encode()
        await connection.request(f"$JS.API.{what}.LEADER.STEPDOWN.{name}", request, timeout=1)
        return False

    def leads() -> bool:
        try:
            return bool(world.talk(node, ask))
        except UNCERTAIN:
            return False

    mounts.until(leads, f"{node.name} as leader of {name}")


def from_replica(node: Node, stream: str, ask: Callable[[], Any], consumer: str = "") -> Any:
    """What `ask` returns while this server leads; asked again when there was no answer, as a new leader may give none."""

    def once() -> list[Any]:
        lead(node, stream, consumer)
        try:
            return [ask()]
        except UNCERTAIN:
            return []

    return mounts.until(once, f"an answer from the replica of {stream} {consumer} on {node.name}")[0]


def read_from(node: Node, stream: str) -> dict[int, world.Stored]:
    """Every message of the stream by its sequence, from this server's replica."""
    found: list[world.Stored] = from_replica(node, stream, lambda: world.read(node, stream))
    assert len({m.seq for m in found}) == len(found), f"{node.name} gives back messages of {stream} twice"
    return {m.seq: m for m in found}


def consumer_from(node: Node, consumer: str) -> tuple[int, int, int]:
    """A consumer's state, see `nats_world.consumer_state`, from this server's replica."""
    state: tuple[int, int, int] = from_replica(
        node, STREAM, lambda: world.consumer_state(node, STREAM, consumer), consumer
    )
    return state


def leader(nodes: Sequence[Node], stream: str) -> Node:
    """Who leads a stream at this moment."""

    async def ask(_: Client, jetstream: JetStreamContext) -> str:
        info = await jetstream.stream_info(stream)
        return str(info.cluster.leader) if info.cluster else ""

    name = world.talk(nodes[0], ask)
    return next(node for node in nodes if node.name == name)


# --- clients that keep it busy ----------------------------------------------------------------------------------------


def order(i: int, marker: bytes) -> world.Message:
    """The i-th message that the publishers send."""
    return world.Message(
        f"{SUBJECT}.{i % 13}", world.noise(f"order {i}", i * 7919 % LARGEST) + marker, {"Nats-Msg-Id": f"{i}"}
    )


@dataclass
class Record:
    """What the servers promised. acked: stream sequence to number of the message; values: key to (revision, value).

    taken: sequences that the consumer was given and whose ack the server has confirmed; twice: those that came again
    after that; unsure: those whose ack had no answer, so they may come again or not.
    asked_again: questions of all kinds that had no answer.
    """

    marker: bytes
    acked: dict[int, int] = field(default_factory=dict)
    values: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)
    twice: list[int] = field(default_factory=list)
    unsure: set[int] = field(default_factory=set)
    asked_again: int = 0

    def counts(self) -> tuple[int, int, int]:
        """Messages acked, KV puts, messages consumed: each grows while the clients work."""
        return len(self.acked), max((revision for revision, _ in self.values.values()), default=0), len(self.taken)


async def _connect(nodes: Sequence[Node]) -> Client:
    async def lost(_: Exception) -> None:
        """What fails because of it is asked again."""

    return await nats.connect(
        [node.url for node in nodes],
        max_reconnect_attempts=-1,
        reconnect_time_wait=0.1,
        connect_timeout=10,
        error_cb=lost,
    )


def fill(nodes: Sequence[Node], marker: bytes) -> Record:
    """A stream, a KV bucket and two durable consumers, with three replicas each; some messages, some acks."""
    record = Record(marker)

    async def make() -> None:
        connection = await _connect(nodes)
        jetstream = connection.jetstream(timeout=20)
        try:
            await jetstream.add_stream(name=STREAM, subjects=[f"{SUBJECT}.>"], num_replicas=NODES)
            for name, wait in ((LIVE, 10), (STILL, 3600)):
                config = api.ConsumerConfig(durable_name=name, ack_policy=api.AckPolicy.EXPLICIT, ack_wait=wait)
                await jetstream.add_consumer(STREAM, config)
            await jetstream.create_key_value(bucket=BUCKET, replicas=NODES)
            acks = await world.publishing(connection, (order(i, marker) for i in range(FILLED)))
            record.acked |= {ack.seq: i for i, ack in enumerate(acks)}
            still = await jetstream.pull_subscribe_bind(STILL, stream=STREAM)
            left = STILL_ACKED
            while left:
                batch = await still.fetch(min(100, left), timeout=20)
                await asyncio.gather(*(msg.ack_sync(timeout=20) for msg in batch))
                left -= len(batch)
        finally:
            await connection.close()

    asyncio.run(asyncio.wait_for(make(), mounts.PATIENCE))
    assert len(record.acked) == FILLED
    return record


async def _publish(
    jetstream: JetStreamContext, record: Record, numbers: Iterator[int], over: Callable[[], bool]
) -> None:
    """One message after the other; one that was not acked is sent again with its id, so it is stored once."""
    for i in numbers:
        if over():
            return
        message = order(i, record.marker)
        while True:
            try:
                ack = await jetstream.publish(message.subject, message.payload, timeout=5, headers=message.headers)
            except UNCERTAIN:
                record.asked_again += 1
                await asyncio.sleep(0.1)
                continue
            assert ack.seq not in record.acked, f"sequence {ack.seq} was promised to two messages"
            record.acked[ack.seq] = i
            break
        await asyncio.sleep(0.01)


async def _put(jetstream: JetStreamContext, record: Record, over: Callable[[], bool]) -> None:
    """One key after the other, round and round; a value that was not acked is put again."""
    bucket = await jetstream.key_value(BUCKET)
    for i in itertools.count():
        if over():
            return
        key, value = f"key-{i % KEYS}", f"{i} ".encode() + world.noise(f"value {i}", i * 31 % 1500) + record.marker
        while True:
            try:
                record.values[key] = (await bucket.put(key, value), value)
                break
            except UNCERTAIN:
                record.asked_again += 1
                await asyncio.sleep(0.1)
        await asyncio.sleep(0.01)


async def _consume(jetstream: JetStreamContext, record: Record, over: Callable[[], bool]) -> None:
    """Take what comes, and ack each message; it is taken when the server has confirmed that."""
    consumer = await jetstream.pull_subscribe_bind(LIVE, stream=STREAM)
    while not over():
        try:
            batch = await consumer.fetch(50, timeout=1)
        except UNCERTAIN:
            continue
        for msg in batch:
            seq = msg.metadata.sequence.stream
            if seq in record.taken:
                record.twice.append(seq)
            try:
                await msg.ack_sync(timeout=5)
            except UNCERTAIN:  # comes again after ack_wait, if the ack did not arrive
                record.asked_again += 1
                record.unsure.add(seq)
                continue
            record.taken.add(seq)


@contextlib.contextmanager
def busy(nodes: Sequence[Node], record: Record) -> Iterator[Record]:
    """Publishers, a KV writer and a consumer that work in a thread of their own for the length of the block."""
    stop = threading.Event()
    failed: list[BaseException] = []

    async def work() -> None:
        connection = await _connect(nodes)
        jetstream = connection.jetstream(timeout=5)
        numbers = itertools.count(max(record.acked.values(), default=-1) + 1)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(PUBLISHERS):
                    group.create_task(_publish(jetstream, record, numbers, stop.is_set))
                group.create_task(_put(jetstream, record, stop.is_set))
                group.create_task(_consume(jetstream, record, stop.is_set))
        finally:
            await connection.close()

    def run() -> None:
        try:
            asyncio.run(work())
        except BaseException as problem:  # for the thread that waits
            failed.append(problem)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield record
    finally:
        stop.set()
        thread.join(mounts.PATIENCE)
    assert not thread.is_alive(), "the clients did not end"
    if failed:
        raise failed[0]


def wait_progress(record: Record, enough: int = 50) -> None:
    """Wait until each of the clients has got on by so much from here."""
    before = record.counts()
    mounts.until(
        lambda: all(now - then >= enough for now, then in zip(record.counts(), before, strict=True)),
        f"progress of the clients (they were at {before})",
    )


# --- what has to be there at the end ------------------------------------------------------------------------------------


def acked_prefix(record: Record) -> int:
    """The sequence up to which the working consumer's acks have no gap."""
    return next(seq for seq in itertools.count(1) if seq not in record.taken) - 1


def drain(nodes: Sequence[Node], record: Record) -> None:
    """Let the working consumer take all that is left. Nothing that was taken may come again, and nothing be missing."""
    last = max(record.acked)

    async def main() -> None:
        connection = await _connect(nodes)
        jetstream = connection.jetstream(timeout=5)
        over = asyncio.Event()

        async def watch() -> None:
            while not over.is_set():
                with contextlib.suppress(*UNCERTAIN):
                    info = await jetstream.consumer_info(STREAM, LIVE)
                    if info.ack_floor is not None and info.ack_floor.stream_seq == last and not info.num_ack_pending:
                        over.set()
                await asyncio.sleep(0.1)

        try:
            await asyncio.gather(watch(), _consume(jetstream, record, over.is_set))
        finally:
            await connection.close()

    asyncio.run(asyncio.wait_for(main(), mounts.PATIENCE))
    assert record.twice == [], "messages came again that had been acked"
    assert record.taken <= set(record.acked) <= record.taken | record.unsure


def check_everything(nodes: Sequence[Node], record: Record) -> None:
    """On every replica: each acked message once and with its payload, the KV values, the consumers where they were."""
    wait_current(nodes)
    sent = {i: order(i, record.marker) for i in record.acked.values()}
    for stream in (STREAM, f"KV_{BUCKET}"):
        wait_alike(nodes, stream)
    last = max(record.acked)
    for node in nodes:
        stored = read_from(node, STREAM)
        for seq, i in record.acked.items():
            assert seq in stored, f"{node.name} has lost message {i}, which was acked with sequence {seq}"
            assert world.Message(*stored[seq][1:]) == sent[i], f"{node.name}: sequence {seq} is not message {i}"
        # Every publisher repeats until it has an ack, so there is nothing that was not acked.
        assert set(stored) == set(record.acked), f"{node.name}: {sorted(set(stored) ^ set(record.acked))}"
        prefix = f"$KV.{BUCKET}."
        kept = {m.subject.removeprefix(prefix): (m.seq, m.payload) for m in read_from(node, f"KV_{BUCKET}").values()}
        assert kept == record.values, f"{node.name}: values of the KV bucket"
        assert consumer_from(node, STILL) == (STILL_ACKED, 0, last - STILL_ACKED)
        floor, _, _ = consumer_from(node, LIVE)
        assert floor >= acked_prefix(record), f"{node.name}: the consumer's ack floor went back to {floor}"
