"""Three servers as one cluster on loopback, each on a store of its own, and what a stream with three replicas comes to."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any, Final

from encfs_js.compare import client, clocks, modes, processes
from encfs_js.compare.loads import WINDOW
from encfs_js.compare.processes import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from encfs_js.compare.loads import Run
    from encfs_js.compare.modes import Store
    from encfs_js.compare.server import Server

NODES: Final = 3
STREAM: Final = "REPLICATED"
_SUBJECT: Final = b"replicated"
_SIZE: Final = 512  # bytes of a message
_TRIES: Final = 3  # with other ports each
# Seconds. Nobody answers a question to the API of a cluster whose leader has just changed: it was seen to be lost.
_ANSWER: Final = 3.0
_TAKEN: Final = "address already in use"


class _TakenError(Exception):
    """Somebody else was faster with a port."""


def cluster(run: Run) -> None:
    """Publish to a stream with three replicas, through a connection to its leader.

    Raises RunError when a replica lacks a message, and when no cluster comes about.
    """
    run.check()
    roots = [os.path.join(run.store.root, f"n{number}") for number in range(2, NODES + 1)]
    stores = [run.store, *(modes.create(run.store.mode, root, options=run.store.options) for root in roots)]
    with ExitStack() as stack:
        daemons = [stack.enter_context(modes.mounted(store)) for store in stores]
        run.check()
        servers = stack.enter_context(serving(stores, run.program))
        _publish(run, servers, [pid for daemon in daemons for pid in daemon.pids])


@contextmanager
def serving(stores: Sequence[Store], program: str) -> Iterator[list[Server]]:
    """Start a server on each store, as one cluster that is up to date, yield them, and stop all; they are killed on failure.

    When somebody else has one of the ports, others are taken. Raises RunError after the third time, and when a server ends.
    """
    servers: list[Server] = []
    try:
        for attempt in range(1, _TRIES + 1):
            servers = _servers(stores, program, free_ports(len(stores)))
            try:
                _start(servers)
                break
            except _TakenError as problem:
                for server in servers:
                    server.kill()
                if attempt == _TRIES:
                    raise RunError(f"no free ports for a cluster, {_TRIES} times: {problem}") from None
        yield servers
        for server in servers:  # all at once
            if server.process is not None:
                server.process.send_signal(signal.SIGTERM)
        for server in servers:
            server.stop()
    finally:
        for server in servers:
            server.kill()


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that nobody has, and that no connection gets by itself. Raises RunError."""
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
        lowest = int(file.read().split()[0])
    candidates = list(range(10_000, lowest)) or list(range(max(lowest // 2, 1024), lowest))
    random.shuffle(candidates)
    found: list[int] = []
    for port in candidates:
        with socket.socket() as trial, suppress(OSError):
            trial.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RunError("no free ports on 127.0.0.1 outside the range of the connections")


def _servers(stores: Sequence[Store], program: str, ports: Sequence[int]) -> list[Server]:
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
    servers = []
    for number, (store, port) in enumerate(zip(stores, ports, strict=True), 1):
        server = store.server(program, name=f"n{number}")
        server.cluster = f'cluster {{ name: compare, listen: "127.0.0.1:{port}", routes: [{routes}] }}\n'
        servers.append(server)
    return servers


def _start(servers: Sequence[Server]) -> None:
    """Start them and wait until all are up to date and agree on who leads. Raises _TakenError, RunError."""
    for server in servers:
        server.begin()
    try:
        for server in servers:
            server.ready()
        deadline = time.monotonic() + processes.PATIENCE
        while not _current(servers):
            _see_alive(servers)
            if time.monotonic() > deadline:
                raise RunError(f"no cluster within {processes.PATIENCE:.0f} s")
            time.sleep(0.02)
    except RunError:
        # The routes' port is opened after a server has said that it is ready: one that is taken ends it then.
        _see_alive(servers)
        raise


def _see_alive(servers: Sequence[Server]) -> None:
    """Raise when a server has ended: _TakenError where it had no port, else RefusedError."""
    for server in servers:
        if server.process is not None and (code := server.process.poll()) is not None:
            said = processes.tail(server.log)
            if _TAKEN in said:
                raise _TakenError(f"{server.name}: {_TAKEN}")
            raise processes.RefusedError(server.name, code, said)


def _ask(server: Server, path: str) -> dict[str, Any]:
    """Return what a server's monitoring answers, whatever the status; empty when it does not."""
    connection = HTTPConnection("127.0.0.1", server.monitor, timeout=20)
    try:
        connection.request("GET", path)
        found: dict[str, Any] = json.loads(connection.getresponse().read())
    except (OSError, HTTPException, ValueError):
        return {}
    finally:
        connection.close()
    return found


def _current(servers: Sequence[Server]) -> bool:
    if not all(_ask(server, "/healthz").get("status") == "ok" for server in servers):
        return False
    leaders = {(_ask(server, "/jsz").get("meta_cluster") or {}).get("leader") for server in servers}
    return len(leaders) == 1 and bool(leaders - {None, ""})


def _messages(server: Server, stream: str) -> int:
    """Return how many messages a server's own replica has; -1 when it does not say."""
    accounts = _ask(server, "/jsz?accounts=true&streams=true").get("account_details") or []
    counts = [
        each["state"]["messages"]
        for account in accounts
        for each in account.get("stream_detail") or []
        if each["name"] == stream
    ]
    return int(counts[0]) if counts else -1


def leader(servers: Sequence[Server], stream: str) -> Server:
    """Return the server that leads a stream, as soon as there is one. Raises RunError."""
    found: list[Server] = []

    def look() -> bool:
        with suppress(client.ApiError, TimeoutError):
            info = client.request(servers[0].port, f"STREAM.INFO.{stream}", timeout=_ANSWER)
            name = (info.get("cluster") or {}).get("leader")
            found.extend(server for server in servers if server.name == name)
        return bool(found)

    processes.until(look, f"a leader of {stream}", pause=0.02)
    return found[0]


def _created(servers: Sequence[Server]) -> bool:
    """Create the stream; to create it twice is no error."""
    try:
        client.create_stream(servers[0].port, STREAM, [_SUBJECT.decode()], _ANSWER, num_replicas=NODES)
    except (client.ApiError, TimeoutError):
        return False
    return True


def _publish(run: Run, servers: Sequence[Server], daemons: Sequence[int]) -> None:
    run.check()
    messages = run.size.replicated
    prepared = client.chunks([_SUBJECT], messages, client.bodies(_SIZE))
    processes.until(lambda: _created(servers), f"an answer to STREAM.CREATE.{STREAM}", pause=0.02)
    leads = leader(servers, STREAM)
    pids = [server.pid for server in servers]
    clocks.sync()
    before = clocks.written(run.store.root)
    with client.connected(leads.port) as connection:
        connection.subscribe(client.ACKS, 1)
        with clocks.measured(pids, daemons) as cost:
            latencies = client.publish(connection, prepared, WINDOW)
    # Two of three have acknowledged; the third may be a moment behind.
    processes.until(
        lambda: all(_messages(server, STREAM) == messages for server in servers),
        f"{messages} messages on each of {NODES} replicas",
        pause=0.02,
    )
    run.spent("cluster", cost, pids, daemons)
    clocks.sync()
    run.add("cluster", rate=messages / cost.wall)
    run.latencies("cluster", latencies)
    if before is not None and (after := clocks.written(run.store.root)) is not None:
        run.add("cluster", written=after - before)
