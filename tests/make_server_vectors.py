"""Make tests/vectors/server: small stores of a real nats-server, and what it said of them. Run by hand: they are random.

    .venv/bin/python tests/make_server_vectors.py [NATS-SERVER...]

Of the nats-server that is installed: a plain store, one with chachapoly, one of a node of a cluster with aes, and in `notes/`
one whose streams have TTLs, schedules and sources. Of every other one that is named (2.10 to 2.12 have other versions of
index.db): one with aes; of 2.9, which has no index.db, in `old/` one in every mode. JSON: `server`, `key`, `files` (path below
store_dir to base64), `streams`: name to `messages` (sequence, subject, base64 of the payload, headers; or only how many) and to
`consumers` (name to the stream sequences of ack floor and last delivery, and how many deliveries are pending).
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cluster_world
import mounts
import nats_world as world
import server_stores as stores
from nats.js import api

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.client import Client
    from nats.js import JetStreamContext

DIRECTORY = Path(__file__).parent / "vectors" / "server"


def fill(server: world.Server, replicas: int = 1, settled: Callable[[], None] = lambda: None) -> None:
    """Make two streams and a consumer. settled: waits until a cluster is up to date."""
    world.add_stream(server, "SMALL", "SMALL.>", num_replicas=replicas)
    settled()
    world.publish(server, world.sample("SMALL", 12, size=80))
    # 32,000 bytes a block that compress to a few hundred.
    world.add_stream(
        server, "PACKED", "PACKED.>", max_bytes=120_000, compression=api.StoreCompression.S2, num_replicas=replicas
    )
    settled()
    long = b"all work and no play " * 740
    world.publish(
        server, [world.Message("PACKED.text", text) for text in (long + b"1", long + b"2", long[:900])], window=1
    )

    async def consumer(_: Client, js: JetStreamContext) -> None:
        await js.delete_msg("SMALL", 5)
        config = api.ConsumerConfig(durable_name="worker", ack_policy=api.AckPolicy.EXPLICIT, ack_wait=3600)
        await js.add_consumer("SMALL", config)

    world.talk(server, consumer)
    settled()

    async def work(_: Client, js: JetStreamContext) -> None:
        subscription = await js.pull_subscribe_bind("worker", stream="SMALL")
        for i in range(6):
            (msg,) = await subscription.fetch(1, timeout=20)
            if i % 2 == 0:
                await msg.ack_sync(timeout=20)
        await subscription.unsubscribe()

    world.talk(server, work)
    settled()


def fill_notes(server: world.Server) -> dict[str, float]:
    """Make streams with TTLs, schedules and sources. Returns the subject of each TTL to when it ends, in seconds since 1970."""
    ends: dict[str, float] = {}

    async def filling(client: Client, js: JetStreamContext) -> None:
        async def create(name: str, **config: Any) -> None:
            request = {"name": name, "retention": "limits", "storage": "file", "num_replicas": 1, **config}
            said = await client.request(f"$JS.API.STREAM.CREATE.{name}", json.dumps(request).encode(), timeout=20)
            assert "error" not in json.loads(said.data), said.data

        await create("TTL", subjects=["TTL.>"], allow_msg_ttl=True)
        await create("PLANS", subjects=["PLANS.>", "DUE.>"], allow_msg_ttl=True, allow_msg_schedules=True)
        await create("COPY", sources=[{"name": "TTL", "filter_subject": "TTL.a.*"}, {"name": "PLANS"}])
        for i in range(6):
            await js.publish(f"TTL.a.{i}", b"gone", headers={"Nats-TTL": f"{4000 + i}s"} if i % 2 == 0 else None)
            if i % 2 == 0:
                ends[f"TTL.a.{i}"] = time.time() + 4000 + i
        for i in range(3):
            when = {"Nats-Schedule": f"@at 2100-01-01T00:00:0{i}Z", "Nats-Schedule-Target": f"DUE.{i}"}
            await js.publish(f"PLANS.{i}", b"to do", headers=when)

    world.talk(server, filling)
    mounts.until(lambda: world.streams(server)["COPY"] == 9, "the copies")
    return ends


def document(store: Path, live: dict[str, stores.Live], version: str) -> dict[str, Any]:
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {
        "server": version,
        "key": stores.KEY,
        "files": {str(path.relative_to(store)): base64.b64encode(path.read_bytes()).decode() for path in files},
        "streams": {
            name: {
                "messages": [[m.seq, m.subject, base64.b64encode(m.payload).decode(), m.headers] for m in each.messages]
                if name == "SMALL"
                else len(each.messages),
                "consumers": {
                    consumer: [said[field]["stream_seq"] for field in ("ack_floor", "delivered")]
                    + [said["num_ack_pending"]]
                    for consumer, said in each.consumers.items()
                },
            }
            for name, each in live.items()
        },
    }


def version_of(binary: str) -> str:
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    return said.split()[-1].removeprefix("v")


def single(binary: str, mode: str, place: Path) -> None:
    with world.serving(place / "store", place / "work", binary=binary, **stores.MODES[mode]) as server:
        fill(server)
        live = stores.ask(server)
    version = version_of(binary)
    write(mode, document(place / "store", live, version), "old" if version.startswith("2.9.") else "")


def of_notes(place: Path) -> None:
    with world.serving(place / "store", place / "work") as server:
        fill_notes(server)
        live = stores.ask(server)
    write("plain", document(place / "store", live, version_of(world.BINARY)), "notes")


def of_cluster(mode: str, place: Path) -> None:
    places = [place / f"node{i}" for i in range(3)]
    for each in places:
        each.mkdir(parents=True)
    with cluster_world.cluster(places, place / "work", **stores.MODES[mode]) as nodes:
        fill(nodes[0], 3, lambda: cluster_world.wait_current(nodes))
        live = stores.ask(nodes[0])
    write(f"cluster-{mode}", document(places[0], live, version_of(world.BINARY)))


def write(name: str, found: dict[str, Any], below: str = "") -> None:
    path = DIRECTORY / below / f"{found['server']}-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="ascii")
    print(path, path.stat().st_size)


def main(others: list[str]) -> None:
    os.makedirs(DIRECTORY, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for mode in ("plain", "chachapoly"):
            single(world.BINARY, mode, Path(scratch, mode))
        of_cluster("aes", Path(scratch, "cluster"))
        of_notes(Path(scratch, "notes"))
        for i, binary in enumerate(others):
            for mode in stores.MODES if version_of(binary).startswith("2.9.") else ("aes",):
                single(binary, mode, Path(scratch, f"other{i}-{mode}"))


if __name__ == "__main__":
    main(sys.argv[1:])
