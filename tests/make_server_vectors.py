"""Make tests/vectors/server: small stores of a real nats-server, and what it said of them. Run by hand: they are random.

    .venv/bin/python tests/make_server_vectors.py

One file of a plain store, one with chachapoly, one of a node of a cluster with aes. JSON: `server`, `key`, `files` (path below
store_dir to base64), `streams`: name to `messages` (sequence, subject, base64 of the payload, headers; or only how many) and to
`consumers` (name to the stream sequences of ack floor and last delivery, and how many deliveries are pending).
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cluster_world
import nats_world as world
import server_stores as stores
from nats.js import api

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js import JetStreamContext

DIRECTORY = Path(__file__).parent / "vectors" / "server"


def fill(server: world.Server, replicas: int) -> None:
    world.add_stream(server, "SMALL", "SMALL.>", num_replicas=replicas)
    world.publish(server, world.sample("SMALL", 12, size=80))
    # 32,000 bytes a block that compress to a few hundred.
    world.add_stream(
        server, "PACKED", "PACKED.>", max_bytes=120_000, compression=api.StoreCompression.S2, num_replicas=replicas
    )
    long = b"all work and no play " * 740
    world.publish(
        server, [world.Message("PACKED.text", text) for text in (long + b"1", long + b"2", long[:900])], window=1
    )

    async def more(_: Client, js: JetStreamContext) -> None:
        await js.delete_msg("SMALL", 5)
        config = api.ConsumerConfig(durable_name="worker", ack_policy=api.AckPolicy.EXPLICIT, ack_wait=3600)
        await js.add_consumer("SMALL", config)
        subscription = await js.pull_subscribe_bind("worker", stream="SMALL")
        for i in range(6):
            (msg,) = await subscription.fetch(1, timeout=20)
            if i % 2 == 0:
                await msg.ack_sync(timeout=20)
        await subscription.unsubscribe()

    world.talk(server, more)


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


def main() -> None:
    version = subprocess.run([world.BINARY, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    os.makedirs(DIRECTORY, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for mode in ("plain", "chachapoly"):
            place = Path(scratch, mode)
            with world.serving(place / "store", place / "work", **stores.MODES[mode]) as server:
                fill(server, 1)
                live = stores.ask(server)
            write(mode, document(place / "store", live, version))
        places = [Path(scratch, f"node{i}") for i in range(3)]
        for place in places:
            place.mkdir()
        with cluster_world.cluster(places, Path(scratch, "work"), **stores.MODES["aes"]) as nodes:
            fill(nodes[0], 3)
            live = stores.ask(nodes[0])
        write("cluster-aes", document(places[0], live, version))


def write(name: str, found: dict[str, Any]) -> None:
    path = DIRECTORY / f"{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="ascii")
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
