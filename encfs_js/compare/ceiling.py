"""The rate that the load generator alone reaches: the same work against a process that stores nothing (`sink`)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

import msgspec

from encfs_js.compare import client, loads, processes
from encfs_js.compare.processes import RunError
from encfs_js.compare.sink import Job

if TYPE_CHECKING:
    from collections.abc import Iterator

    from encfs_js.compare.loads import Size

WORKS: Final = ("publish-64", "publish-512", "publish-4k", "publish-64k", "publish-one", "kv", "replay", "get")


_IN_TURNS: Final = {"publish-one", "get"}  # one message in flight: the load generator and the server never work at once


def rate(work: str, size: Size) -> float:
    """Return the rate of one of WORKS against a sink, per second. Raises RunError, OSError."""
    with _one_core() if work in _IN_TURNS else nullcontext():
        return _rate(work, size)


@contextmanager
def _one_core() -> Iterator[None]:
    """Keep this thread, and what it starts, on one core for the length of the block.

    On two, each message waits twice for an idle core to wake up, which takes longer than all of the load generator's work: 37,000
    messages a second were seen on two cores and 85,000 on one, and 47,000 with a real server, wherever it was.
    """
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        yield
    finally:
        os.sched_setaffinity(0, before)


def _rate(work: str, size: Size) -> float:
    if work in {"publish-one", "kv"}:
        prepared = loads.singles(size.one) if work == "publish-one" else loads.puts(size.puts)
        window = 1 if work == "publish-one" else loads.KV_WINDOW
        numbers = list(range(1, len(prepared) + 1))
        job = Job("CEILING", [len(data) for data in prepared], numbers, together=max(1, window // 2))
        with _sink(job) as port, client.connected(port) as connection:
            connection.subscribe(client.ACKS, 1)
            began = time.perf_counter()
            done = len(client.publish_each(connection, prepared, window))
            return done / (time.perf_counter() - began)
    messages, bytes_each = loads.published(size, work if work.startswith("publish-") else "publish-512")
    if work == "replay":
        with _sink(Job("CEILING", replay=messages, size=bytes_each)) as port, client.connected(port) as connection:
            consumer = client.Replay(connection, messages, bytes_each)
            began = time.perf_counter()
            consumer.begin(port, "CEILING")
            consumer.receive()
            return messages / (time.perf_counter() - began)
    if work == "get":
        wanted = loads.sequences(messages, size.gets)
        lengths = [len(client.direct_get("CEILING", sequence)) for sequence in wanted]
        with _sink(Job("CEILING", lengths, size=bytes_each)) as port, client.connected(port) as connection:
            began = time.perf_counter()
            done = len(client.get_each(connection, "CEILING", wanted)[0])
            return done / (time.perf_counter() - began)
    chunks = client.chunks([b"bench.load"], messages, client.bodies(bytes_each))
    job = Job("CEILING", [len(data) for data, _ in chunks], [last for _, last in chunks])
    with _sink(job) as port, client.connected(port) as connection:
        connection.subscribe(client.ACKS, 1)
        began = time.perf_counter()
        client.publish(connection, chunks, loads.WINDOW)
        return messages / (time.perf_counter() - began)


@contextmanager
def _sink(job: Job) -> Iterator[int]:
    """Start a sink, yield its port, and see that it took the work to its end. Raises RunError when it did not."""
    process = subprocess.Popen(
        [sys.executable, "-m", "encfs_js.compare.sink"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # one that is ended while it starts has nothing to say to anybody
        env=processes.environment({}),
        start_new_session=True,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(job))
        process.stdin.close()
        port = process.stdout.readline()
        if not port:
            raise RunError("the sink for the load generator's ceiling did not start")
        yield int(port)
        try:
            code = process.wait(processes.PATIENCE)
        except subprocess.TimeoutExpired:
            raise RunError("the sink for the load generator's ceiling did not end") from None
        if code:
            raise RunError(f"the sink for the load generator's ceiling ended with {code}")
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
