"""The work on one nats-server: each function takes a fresh store of one mode and returns what every piece of work came to.

Whatever is published is acknowledged and counted, whatever is read is compared with what was published: a figure of lost
messages is none, and raises RunError.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from encfs_js.backing import META
from encfs_js.compare import client, clocks, processes
from encfs_js.compare.modes import Daemon, Store, mounted
from encfs_js.compare.processes import RunError
from encfs_js.compare.server import Server, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

WINDOW: Final = 16  # chunks in flight: more makes nothing faster, less starves a fast server
KV_WINDOW: Final = 16  # puts in flight
COMPACTING: Final = "1s"  # sync_interval; by default a purged block is rewritten within two minutes
_BLOCKS: Final = 64 << 10  # bytes: with few subjects only message blocks are larger than this
# The duplicate window of the streams that are restarted. Within it, a server that starts reads all blocks for their message ids;
# a stream that an operator restarts has nearly all its messages before it.
_DUPLICATES: Final = 100_000_000  # ns

Figures = dict[str, dict[str, float]]  # by work, by measure


@dataclass(frozen=True)
class Size:
    """How much of everything: messages, unless it says otherwise."""

    small: int = 600_000  # of 64 bytes
    usual: int = 600_000  # of 512 bytes
    page: int = 120_000  # of 4 KiB
    large: int = 8_000  # of 64 KiB
    one: int = 15_000
    always: int = 3_000
    puts: int = 60_000
    gets: int = 6_000
    purged: int = 200_000
    replicated: int = 100_000


QUICK: Final = Size(
    small=20_000, usual=20_000, page=3_000, large=300, one=300, always=100, puts=1_500, gets=300, purged=40_000, replicated=2_000
)  # fmt: skip


def published(size: Size, work: str) -> tuple[int, int]:
    """Return how many messages of how many bytes one of the saturating works publishes."""
    return {
        "publish-64": (size.small, 64),
        "publish-512": (size.usual, 512),
        "publish-4k": (size.page, 4 << 10),
        "publish-64k": (size.large, 64 << 10),
    }[work]


def singles(messages: int) -> list[bytes]:
    """Return the protocol bytes of messages of 512 bytes that each ask for an ack."""
    prepared = [client.encode(b"one", payload, client.ACKS) for payload in client.bodies(512)]
    return [prepared[i % len(prepared)] for i in range(messages)]


def puts(count: int) -> list[bytes]:
    """Return the protocol bytes of puts of 128 bytes into a bucket, of 1000 keys; the same keys in every mode."""
    payloads = client.bodies(128)
    keys = random.Random(6).choices(range(1000), k=count)  # noqa: S311
    return [
        client.encode(b"$KV.bench.key-%d" % key, payloads[i % len(payloads)], client.ACKS) for i, key in enumerate(keys)
    ]


def sequences(messages: int, count: int) -> list[int]:
    """Return which messages of a stream are read at random; the same in every mode."""
    return random.Random(6).choices(range(1, messages + 1), k=count)  # noqa: S311


@dataclass
class Run:
    """One run: a store, the program of its server, how much to do. check: called between steps, raises to end it all."""

    store: Store
    program: str
    size: Size
    check: Callable[[], None]
    figures: Figures = field(default_factory=dict)
    bounds: dict[str, str] = field(default_factory=dict)  # by work: what held it up

    @contextmanager
    def serving(self, *, sync: str | None = None) -> Iterator[tuple[Server, Daemon]]:
        """Mount and start a server; end both."""
        with mounted(self.store) as daemon, serving(self.store.server(self.program, sync=sync)) as server:
            yield server, daemon

    def add(self, work: str, **values: float) -> None:
        """Keep values by their measure, with `_` for `.`."""
        self.figures.setdefault(work, {}).update({name.replace("_", "."): value for name, value in values.items()})

    def spent(self, work: str, cost: clocks.Cost, servers: Sequence[int], daemons: Sequence[int]) -> None:
        """Keep what the work cost, and what its processes hold in memory at its end."""
        self.bounds[work] = cost.bound()
        self.add(work, cpu_server=cost.server, memory_server=clocks.memory(servers))
        if self.store.has_daemon:
            self.add(work, cpu_daemon=cost.daemon, memory_daemon=clocks.memory(daemons))

    def latencies(self, work: str, seconds: Sequence[float]) -> None:
        """Keep the latencies' p50, p99 and max."""
        parts = statistics.quantiles(seconds, n=100, method="inclusive")
        self.add(work, p50=parts[49], p99=parts[98], max=max(seconds))

    def on_disk(self, work: str, payload: int) -> None:
        """Keep what the store takes on the disk, against so many bytes of messages. Everything must be stopped and synced."""
        total = blocks = 0
        for directory, inside, names in os.walk(self.store.backing):
            inside[:] = [name for name in inside if name != META]  # its reserve is of one size, whatever is stored
            for name in names:
                found = os.lstat(os.path.join(directory, name))
                total += found.st_blocks * 512
                blocks += found.st_size if found.st_size > _BLOCKS else 0
        self.add(work, disk=total, disk_payload=total / payload, blocks=blocks)


def _publish(
    run: Run, server: Server, daemon: Daemon, work: str, stream: str, subject: bytes, messages: int, size: int
) -> list[bytes]:
    """Publish into a new stream, saturated, and keep what it came to; return the payloads."""
    run.check()
    payloads = client.bodies(size)
    prepared = client.chunks([subject], messages, payloads)
    client.create_stream(server.port, stream, [subject.decode()], allow_direct=True, duplicate_window=_DUPLICATES)
    clocks.sync()
    before = clocks.written(run.store.root)
    with client.connected(server.port) as connection:
        connection.subscribe(client.ACKS, 1)
        with clocks.measured([server.pid], daemon.pids) as cost:
            latencies = client.publish(connection, prepared, WINDOW)
    run.spent(work, cost, [server.pid], daemon.pids)
    if (count := client.stored(server.port, stream)) != messages:
        raise RunError(f"the stream has {count} of {messages} messages: the rest was lost")
    with clocks.measured() as rest:
        clocks.sync()
    run.add(work, rate=messages / cost.wall, synced=messages / (cost.wall + rest.wall))
    run.latencies(work, latencies)
    if before is not None and (after := clocks.written(run.store.root)) is not None:
        run.add(work, written=after - before)
    return payloads


def publish(run: Run) -> None:
    """Publish messages of 64 bytes, 4 KiB and 64 KiB, each into a stream of its own."""
    with run.serving() as (server, daemon):
        for work in ("publish-64", "publish-4k", "publish-64k"):
            messages, size = published(run.size, work)
            _publish(run, server, daemon, work, f"S{size}", b"s%d" % size, messages, size)


def stream(run: Run) -> None:
    """Publish messages of 512 bytes; restart cleanly, replay and get at random, all cold; restart after a kill."""
    messages, size = published(run.size, "publish-512")
    with run.serving() as (server, daemon):
        payloads = _publish(run, server, daemon, "publish-512", "BENCH", b"bench.load", messages, size)
    clocks.sync()
    run.on_disk("publish-512", messages * size)
    with mounted(run.store) as daemon:
        server = run.store.server(run.program)
        try:
            _restart(run, server, daemon, "restart", messages)
            _replay(run, server, daemon, messages, payloads)
            _get(run, server, daemon, messages, payloads)
            # Something that index.db does not know, so that it is of no use after the kill.
            more = client.chunks([b"bench.load"], len(payloads), payloads)
            with client.connected(server.port) as connection:
                connection.subscribe(client.ACKS, 1)
                client.publish(connection, more, WINDOW, last=messages)
            clocks.sync()
            server.kill()
            _restart(run, server, daemon, "restart-kill", messages + len(payloads))
            server.stop()
        finally:
            server.kill()


def _cold(run: Run) -> None:
    """Empty the page cache, but for the server's program: a cold store is not about that."""
    run.check()
    if clocks.drop_caches():
        with open(run.program, "rb") as file:
            while file.read(1 << 20):
                pass


def _restart(run: Run, server: Server, daemon: Daemon, work: str, messages: int) -> None:
    """Start the server cold, until it says that all messages are there."""
    _cold(run)
    with clocks.measured(lambda: [server.pid], daemon.pids) as cost:
        server.start()
        count = client.stored(server.port, "BENCH")
    if count != messages:
        raise RunError(f"after a restart the stream has {count} of {messages} messages")
    run.spent(work, cost, [server.pid], daemon.pids)
    run.add(work, time=cost.wall)


def _replay(run: Run, server: Server, daemon: Daemon, messages: int, payloads: Sequence[bytes]) -> None:
    with client.connected(server.port) as connection:
        consumer = client.Replay(connection, messages, len(payloads[0]))
        _cold(run)
        with clocks.measured([server.pid], daemon.pids) as cost:
            consumer.begin(server.port, "BENCH")
            consumer.receive()
    consumer.check(payloads)
    run.spent("replay", cost, [server.pid], daemon.pids)
    run.add("replay", rate=messages / cost.wall)


def _get(run: Run, server: Server, daemon: Daemon, messages: int, payloads: Sequence[bytes]) -> None:
    wanted = sequences(messages, run.size.gets)
    with client.connected(server.port) as connection:
        _cold(run)
        with clocks.measured([server.pid], daemon.pids) as cost:
            latencies, found = client.get_each(connection, "BENCH", wanted)
    if found != [payloads[(sequence - 1) % len(payloads)] for sequence in wanted]:
        raise RunError("a message is not what was published")
    run.spent("get", cost, [server.pid], daemon.pids)
    run.add("get", rate=run.size.gets / cost.wall)
    run.latencies("get", latencies)


def single(run: Run) -> None:
    """Publish one message at a time, put into a bucket, and purge every second message."""
    with run.serving(sync=COMPACTING) as (server, daemon):
        _one(run, server, daemon, "publish-one", run.size.one)
        _put(run, server, daemon)
        _purge(run, server, daemon)


def always(run: Run) -> None:
    """Publish one message at a time to a server that syncs each."""
    with run.serving(sync="always") as (server, daemon):
        _one(run, server, daemon, "publish-always", run.size.always)


def _one(run: Run, server: Server, daemon: Daemon, work: str, messages: int) -> None:
    run.check()
    client.create_stream(server.port, "ONE", ["one"])
    _each(run, server, daemon, work, "ONE", singles(messages), 1)


def _put(run: Run, server: Server, daemon: Daemon) -> None:
    run.check()
    client.create_stream(
        server.port, "KV_bench", ["$KV.bench.>"], max_msgs_per_subject=5, allow_rollup_hdrs=True, allow_direct=True,
        deny_delete=True, discard="new",
    )  # fmt: skip
    _each(run, server, daemon, "kv", "", puts(run.size.puts), KV_WINDOW)


def _each(
    run: Run, server: Server, daemon: Daemon, work: str, stream: str, prepared: Sequence[bytes], window: int
) -> None:
    """Publish messages that each ask for an ack, and keep what it came to."""
    clocks.sync()
    with client.connected(server.port) as connection:
        connection.subscribe(client.ACKS, 1)
        client.publish_each(connection, prepared[: len(prepared) // 20], window)  # the first of a stream do more
        with clocks.measured([server.pid], daemon.pids) as cost:
            latencies = client.publish_each(connection, prepared[len(prepared) // 20 :], window)
    if stream and (count := client.stored(server.port, stream)) != len(prepared):
        raise RunError(f"{stream} has {count} of {len(prepared)} messages: the rest was lost")
    run.spent(work, cost, [server.pid], daemon.pids)
    run.add(work, rate=len(latencies) / cost.wall)
    run.latencies(work, latencies)


def _purge(run: Run, server: Server, daemon: Daemon) -> None:
    """Purge two of three subjects that take turns: every block is left mostly empty, and the server rewrites it later.

    It does so at the next turn of its sync timer, so the time until then says nothing; CPU and bytes written do.
    """
    run.check()
    payloads = client.bodies(512)[:255]
    messages = run.size.purged
    client.create_stream(server.port, "PURGED", ["purged.*"])
    with client.connected(server.port) as connection:
        connection.subscribe(client.ACKS, 1)
        prepared = client.chunks([b"purged.a", b"purged.b", b"purged.c"], messages, payloads)
        client.publish(connection, prepared, WINDOW)
    clocks.sync()
    full = _blocks(server, "PURGED")
    before = clocks.written(run.store.root)
    with clocks.measured([server.pid], daemon.pids) as cost:
        began = time.monotonic()
        for subject in ("purged.a", "purged.b"):
            client.request(server.port, "STREAM.PURGE.PURGED", {"filter": subject})
        took = time.monotonic() - began
        processes.until(
            lambda: _blocks(server, "PURGED") < full * 0.7, "the server compacts what was purged", pause=0.05
        )
        clocks.sync()
    if (count := client.stored(server.port, "PURGED")) != messages // 3:
        raise RunError(f"after the purge there are {count} of {messages // 3} messages")
    run.spent("purge", cost, [server.pid], daemon.pids)
    run.add("purge", time=took)
    if before is not None and (after := clocks.written(run.store.root)) is not None:
        run.add("purge", written=after - before)


def _blocks(server: Server, stream: str) -> int:
    """Return the bytes of a stream's message blocks."""
    directory = os.path.join(server.store, "jetstream", "$G", "streams", stream, "msgs")
    found = 0
    for name in os.listdir(directory):
        with suppress(FileNotFoundError):
            found += os.stat(os.path.join(directory, name)).st_size if name.endswith(".blk") else 0
    return found
