"""The NATS side of quickstart.sh: fills a server with messages, a KV bucket and an object, and compares them later."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from typing import TYPE_CHECKING

import nats
from nats.js import api

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nats.js import JetStreamContext

MARKER = "quickstart: nobody may read this on the disk"
MESSAGES = 5000
ACKED = 1200
KEYS = 200
OBJECT = MARKER.encode() * 50_000
WINDOW = 500


def payload(i: int) -> bytes:
    """The i-th message: the marker, and up to 2,000 bytes that no two messages have in common."""
    return f"{MARKER} ({i}) ".encode() + hashlib.shake_128(b"%d" % i).digest(i * 7919 % 2001)


def headers(i: int) -> dict[str, str]:
    return {"Order": str(i), "Trace": f"trace-{i % 97}"}


async def fill(jetstream: JetStreamContext) -> None:
    await jetstream.add_stream(name="ORDERS", subjects=["orders.>"])
    config = api.ConsumerConfig(durable_name="billing", ack_policy=api.AckPolicy.EXPLICIT)
    await jetstream.add_consumer("ORDERS", config)
    for start in range(0, MESSAGES, WINDOW):
        batch = range(start, start + WINDOW)
        await asyncio.gather(*(jetstream.publish(f"orders.{i % 10}", payload(i), headers=headers(i)) for i in batch))
    consumer = await jetstream.pull_subscribe_bind("billing", stream="ORDERS")
    taken = 0
    while taken < ACKED:
        messages = await consumer.fetch(min(200, ACKED - taken), timeout=10)
        await asyncio.gather(*(message.ack_sync(timeout=10) for message in messages))
        taken += len(messages)
    bucket = await jetstream.create_key_value(bucket="settings")
    for i in range(KEYS):
        await bucket.put(f"key-{i}", f"{MARKER} [{i}]".encode())
    objects = await jetstream.create_object_store(bucket="files")
    await objects.put("report", OBJECT)
    size = sum(len(payload(i)) for i in range(MESSAGES))
    print(f"Published {MESSAGES} messages with headers ({size} bytes) to the stream ORDERS, each acked by the server.")
    print(f"The durable consumer billing has taken and acked {ACKED} of them.")
    print(f"The KV bucket settings holds {KEYS} keys, the object store files one object of {len(OBJECT)} bytes.")


async def check(jetstream: JetStreamContext) -> None:
    replay = await jetstream.subscribe("orders.>", ordered_consumer=True)
    order = {}
    for sequence in range(1, MESSAGES + 1):
        message = await replay.next_msg(timeout=10)
        i = int(message.headers["Order"])
        assert message.metadata.sequence.stream == sequence
        assert message.subject == f"orders.{i % 10}"
        assert message.data == payload(i), f"message {i} is not what was published"
        assert message.headers == headers(i), f"the headers of message {i} are not what was published"
        order[sequence] = i
    assert sorted(order.values()) == list(range(MESSAGES))
    await replay.unsubscribe()
    print(f"Replayed {MESSAGES} messages: every payload and every header is what was published.")

    consumer = await jetstream.pull_subscribe_bind("billing", stream="ORDERS")
    (message,) = await consumer.fetch(1, timeout=10)
    assert message.metadata.sequence.stream == ACKED + 1
    print(f"The consumer billing goes on with message {ACKED + 1}.")

    bucket = await jetstream.key_value("settings")
    for i in range(KEYS):
        assert (await bucket.get(f"key-{i}")).value == f"{MARKER} [{i}]".encode()
    objects = await jetstream.object_store("files")
    assert (await objects.get("report")).data == OBJECT
    print(f"All {KEYS} keys and the object are what was put.")


def url_of(path: str) -> str:
    """What the server's ports file says; it is there when the server is ready."""
    try:
        with open(path) as file:
            return json.load(file)["nats"][0]
    except (FileNotFoundError, json.JSONDecodeError):
        sys.exit(1)


async def main(talk: Callable[[JetStreamContext], Awaitable[None]], url: str) -> None:
    connection = await nats.connect(url, allow_reconnect=False)
    try:
        await talk(connection.jetstream(timeout=30))
    finally:
        await connection.close()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["marker"]:
            print(MARKER)
        case ["url", path]:
            print(url_of(path))
        case ["fill", url]:
            asyncio.run(main(fill, url))
        case ["check", url]:
            asyncio.run(main(check, url))
        case _:
            sys.exit("quickstart.py marker | url FILE | fill URL | check URL")
