"""The NATS side of run.sh: clients that keep a cluster busy and note what it promised, and the comparison with that."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import random
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import nats
import nats.errors
import nats.js.errors
from nats.js import api

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from nats.aio.client import Client

STREAM, BUCKET = "ORDERS", "settings"
REPLICAS = 3
FILLED = 2000  # messages before the work begins
AUDITED = 500  # of these, acked by the consumer `audit`, which then stands still
PUBLISHERS = 4
KEYS = 20
PATIENCE = 60
LAST_ANSWER = 20  # seconds that the clients wait for what they have asked for when they are to end
LEAST = 100  # messages that the clients publish and consume before `meanwhile` says how far they are
# What a client meets while the cluster chooses a leader. It asks again.
UNCERTAIN = (TimeoutError, ConnectionError, nats.errors.Error, nats.js.errors.Error)


def payload(i: int) -> bytes:
    """The i-th message: up to 4,000 bytes that no two messages have in common."""
    return f"order {i} ".encode() + hashlib.shake_128(b"%d" % i).digest(i * 7919 % 4001)


def with_id(i: int) -> dict[str, str]:
    """The server stores two messages with the same id once: a publisher that had no ack just repeats."""
    return {"Nats-Msg-Id": f"order-{i}"}


@contextlib.asynccontextmanager
async def connected(*urls: str) -> AsyncIterator[Client]:
    async def lost(_: Exception) -> None:
        """What fails because of it is asked again."""

    connection = await nats.connect(list(urls), max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=lost)
    try:
        yield connection
    finally:
        await connection.close()


# -- before the clients work


async def fill(*urls: str) -> None:
    async with connected(*urls) as connection:
        jetstream = connection.jetstream(timeout=20)
        await jetstream.add_stream(name=STREAM, subjects=["orders.>"], num_replicas=REPLICAS)
        for name, wait in (("billing", 10), ("audit", 3600)):
            config = api.ConsumerConfig(durable_name=name, ack_policy=api.AckPolicy.EXPLICIT, ack_wait=wait)
            await jetstream.add_consumer(STREAM, config)
        await jetstream.create_key_value(bucket=BUCKET, replicas=REPLICAS)
        for start in range(0, FILLED, 250):
            batch = range(start, start + 250)
            await asyncio.gather(
                *(jetstream.publish(f"orders.{i % 10}", payload(i), headers=with_id(i)) for i in batch)
            )
        consumer = await jetstream.pull_subscribe_bind("audit", stream=STREAM)
        taken = 0
        while taken < AUDITED:
            messages = await consumer.fetch(min(100, AUDITED - taken), timeout=20)
            await asyncio.gather(*(message.ack_sync(timeout=20) for message in messages))
            taken += len(messages)
    print(f"The stream {STREAM} and the KV bucket {BUCKET} have {REPLICAS} replicas each, {FILLED} messages are in.")
    print(f"The durable consumer audit has acked {AUDITED} of them; billing will consume all that comes.")


# -- the clients


class Clients:
    """Publishers, a KV writer and a consumer, and what the cluster promised them."""

    def __init__(self, connection: Client) -> None:
        self.jetstream = connection.jetstream(timeout=5)
        self.over = asyncio.Event()
        self.acked: dict[int, int] = {}  # stream sequence to number of the message
        self.values: dict[str, tuple[int, str]] = {}  # key to revision and value
        self.consumed: set[int] = set()  # sequences whose ack the server has confirmed
        self.again = 0  # questions that had no answer at first

    async def publish(self, numbers: Iterator[int]) -> None:
        for i in numbers:
            ack = None
            while ack is None:
                with self.patience():
                    ack = await self.jetstream.publish(f"orders.{i % 10}", payload(i), timeout=5, headers=with_id(i))
            self.acked[ack.seq] = i
            if self.over.is_set():
                return
            await asyncio.sleep(0.01)

    async def put(self) -> None:
        bucket = await self.jetstream.key_value(BUCKET)
        for i in itertools.count():
            revision = None
            while revision is None:
                with self.patience():
                    revision = await bucket.put(f"key-{i % KEYS}", f"value {i}".encode())
            self.values[f"key-{i % KEYS}"] = (revision, f"value {i}")
            if self.over.is_set():
                return
            await asyncio.sleep(0.01)

    async def consume(self) -> None:
        consumer = await self.jetstream.pull_subscribe_bind("billing", stream=STREAM)
        while not self.over.is_set():
            with contextlib.suppress(*UNCERTAIN):
                for message in await consumer.fetch(50, timeout=1):
                    with self.patience():
                        await message.ack_sync(timeout=5)
                        self.consumed.add(message.metadata.sequence.stream)

    @contextlib.contextmanager
    def patience(self) -> Iterator[None]:
        try:
            yield
        except UNCERTAIN:
            self.again += 1


async def work(*urls: str) -> dict[str, Any]:
    """Work until SIGTERM. Returns what was promised."""
    async with connected(*urls) as connection:
        clients = Clients(connection)
        loop = asyncio.get_running_loop()

        def end() -> None:
            clients.over.set()
            limit.reschedule(loop.time() + LAST_ANSWER)

        loop.add_signal_handler(signal.SIGTERM, end)
        async with asyncio.timeout(None) as limit, asyncio.TaskGroup() as group:
            numbers = itertools.count(FILLED)
            for _ in range(PUBLISHERS):
                group.create_task(clients.publish(numbers))
            group.create_task(clients.put())
            group.create_task(clients.consume())
    print(
        f"Published and acked: {len(clients.acked)} messages. Consumed: {len(clients.consumed)}. "
        f"Asked again for want of an answer: {clients.again} times."
    )
    return {"acked": clients.acked, "values": clients.values, "consumed": sorted(clients.consumed)}


async def meanwhile(*urls: str) -> None:
    """Wait until publishers and consumer have got on, and say how far they are."""
    async with connected(*urls) as connection:
        jetstream = connection.jetstream(timeout=20)

        async def now() -> tuple[int, int, int]:
            bucket = await jetstream.stream_info(f"KV_{BUCKET}")
            billing = await jetstream.consumer_info(STREAM, "billing")
            floor = billing.ack_floor.stream_seq if billing.ack_floor else 0
            return (await jetstream.stream_info(STREAM)).state.last_seq, floor, bucket.state.last_seq

        first = found = await now()
        deadline = time.monotonic() + PATIENCE
        while found[0] < first[0] + LEAST or found[1] < first[1] + LEAST:
            if time.monotonic() > deadline:
                sys.exit("The clients do not get on.")
            await asyncio.sleep(0.1)
            found = await now()
    print("The clients are at message {}, the consumer at {}, the KV bucket at put {}.".format(*found))


# -- the comparison


async def lead(connection: Client, what: str, name: str, server: str) -> None:
    """Make `server` the leader of a stream or a consumer: what is read then comes from its replica."""
    request = json.dumps({"placement": {"preferred": server}}).encode()
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(*UNCERTAIN):
            info = json.loads((await connection.request(f"$JS.API.{what}.INFO.{name}", timeout=1)).data)
            if info.get("cluster", {}).get("leader") == server:
                return
            await connection.request(f"$JS.API.{what}.LEADER.STEPDOWN.{name}", request, timeout=1)
        await asyncio.sleep(0.1)
    sys.exit(f"{server} does not become the leader of {name}.")


async def read(connection: Client, stream: str) -> dict[int, Any]:
    """All messages of a stream by sequence."""
    jetstream = connection.jetstream(timeout=20)
    count = (await jetstream.stream_info(stream)).state.messages
    replay = await jetstream.subscribe(">", stream=stream, ordered_consumer=True)
    messages = [await replay.next_msg(timeout=20) for _ in range(count)]
    await replay.unsubscribe()
    found = {message.metadata.sequence.stream: message for message in messages}
    assert len(found) == count, f"{stream} gives a message back twice"
    return found


async def check(promised: dict[str, Any], *urls: str) -> None:
    """Compare every server's replica with what was promised. The messages before the work have the first places."""
    acked = {int(seq): i for seq, i in promised["acked"].items()}
    gap = next(seq for seq in itertools.count(1) if seq not in set(promised["consumed"]))
    for url in urls:
        async with connected(url) as connection:
            server = connection._server_info["server_name"]  # noqa: SLF001, no other way to learn it
            await lead(connection, "STREAM", STREAM, server)
            stored = await read(connection, STREAM)
            numbers = {seq: int(message.headers["Nats-Msg-Id"].split("-")[1]) for seq, message in stored.items()}
            assert sorted(numbers.values()) == list(range(len(numbers))), (
                f"{server}: a message is missing, or there twice"
            )
            assert {seq: numbers.get(seq) for seq in acked} == acked, f"{server}: an acked message is not in its place"
            assert set(numbers) - set(acked) == set(range(1, FILLED + 1)), f"{server}: messages that nobody sent"
            for seq, message in stored.items():
                assert message.data == payload(numbers[seq]), f"{server}: message {seq} is not what was published"
            await lead(connection, "STREAM", f"KV_{BUCKET}", server)
            values = {
                message.subject.rsplit(".", 1)[1]: [seq, message.data.decode()]
                for seq, message in (await read(connection, f"KV_{BUCKET}")).items()
            }
            assert values == promised["values"], f"{server}: a value is not what was put"
            floors = {}
            for name in ("audit", "billing"):
                await lead(connection, "CONSUMER", f"{STREAM}.{name}", server)
                info = await connection.jetstream(timeout=20).consumer_info(STREAM, name)
                floors[name] = info.ack_floor.stream_seq if info.ack_floor else 0
            assert floors["audit"] == AUDITED, f"{server}: the consumer audit stands at {floors['audit']}"
            assert floors["billing"] >= gap - 1, f"{server}: the consumer billing went back to {floors['billing']}"
        print(
            f"{server}: {len(stored)} messages, each once and as it was published; {len(values)} KV values; "
            f"audit stands at {floors['audit']}, billing at {floors['billing']}."
        )


# -- what needs no client


def free_ports(count: int) -> list[int]:
    """Ports that nobody has, below those that connections get by themselves: a restarted server finds its own free."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        lowest = int(file.read().split()[0])
    found: list[int] = []
    for port in random.sample(range(lowest // 3, lowest), lowest - lowest // 3):
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    sys.exit("No free ports on loopback.")


def wait(monitors: Sequence[str]) -> None:
    """Wait until each server says that its meta layer, streams and consumers are up to date."""
    deadline = time.monotonic() + PATIENCE
    for monitor in monitors:
        while True:
            try:
                with urllib.request.urlopen(f"{monitor}/healthz", timeout=10):  # no other status than 200 comes here
                    break
            except (urllib.error.URLError, OSError) as problem:
                if time.monotonic() > deadline:
                    sys.exit(f"The cluster is not up to date: {problem}")
                time.sleep(0.1)
    print("All three are up, have a leader, and are up to date.")


def urls_of(path: str) -> str:
    """What the server's ports file says; it is there when the server is ready."""
    try:
        with open(path) as file:
            ports = json.load(file)
    except (FileNotFoundError, json.JSONDecodeError):
        sys.exit(1)
    return f"{ports['nats'][0]} {ports['monitoring'][0]}"


def kinds(inspected: dict[str, Any]) -> str:
    """Say which ciphers and epochs the files have. Fails when it is not one: aes, and the only epoch that there is."""
    groups = {(group["suite"], group["epoch"]) for group in inspected["files"]}
    epochs = [epoch["epoch"] for epoch in inspected["epochs"]]
    if groups != {("aes", epochs[-1])} or len(epochs) != 1:
        sys.exit(f"That is wrong: {groups}, epochs in the keyring: {epochs}")
    return f"All its files are sealed with aes, epoch {epochs[0]}; the keyring has no other epoch any more."


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["ports", count]:
            print(*free_ports(int(count)))
        case ["urls", path]:
            print(urls_of(path))
        case ["wait", *monitors]:
            wait(monitors)
        case ["kinds"]:
            print(kinds(json.load(sys.stdin)))
        case ["fill", *urls]:
            asyncio.run(fill(*urls))
        case ["work", path, *urls]:
            promised = asyncio.run(work(*urls))
            with open(path, "w") as file:
                json.dump(promised, file)
        case ["meanwhile", *urls]:
            asyncio.run(meanwhile(*urls))
        case ["check", path, *urls]:
            with open(path) as file:
                asyncio.run(check(json.load(file), *urls))
        case _:
            sys.exit(
                "cluster.py ports N | urls FILE | wait MONITOR... | kinds | fill, work, meanwhile, check (see run.sh)"
            )
