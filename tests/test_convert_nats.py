"""What nats-server says of a store is the same after every conversion of it, and nothing worries it."""

from __future__ import annotations

import contextlib
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import cluster_world
import mounts
import nats_world as world
import pytest
import server_stores as stores

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.nats,
    pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-"),
]
KEY = stores.KEY
OTHER = "another key"


def convert(source: Path, target: Path, origin: str, goal: str, *options: str | Path, key: str = KEY) -> None:
    said = mounts.run("convert", source, target, "--from", origin, "--to", goal, *options, key=key)
    assert said.stderr == ""


def key_file(place: Path) -> None:
    (place / "other").write_text(OTHER)
    (place / "other").chmod(0o600)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A plain store with everything in it that leaves traces, and what the server says of it."""
    place = tmp_path_factory.mktemp("written")
    live = stores.written(place / "store", place / "work")
    yield {"store": place / "store", "live": live, "place": place}
    shutil.rmtree(place)


@contextlib.contextmanager
def copied(store: Path) -> Iterator[Path]:
    """Servers write; conversions go on with what they were given."""
    copy = store.with_name(store.name + ".copy")
    shutil.copytree(store, copy, symlinks=True)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


@pytest.mark.parametrize("cipher", ["chachapoly", "aes"])
def test_encrypted_and_back(cipher: str, written: dict[str, Any], tmp_path: Path) -> None:
    """plain -> server -> server with another key and cipher -> plain."""
    other = {"chachapoly": "aes", "aes": "chachapoly"}[cipher]
    key_file(tmp_path)
    convert(written["store"], tmp_path / "one", "plain", "server", "--cipher", cipher)
    assert mounts.holding(tmp_path / "one", stores.MARKER) == []
    with copied(tmp_path / "one") as copy:
        stores.check_boot(copy, tmp_path / "w1", written["live"], key=KEY, cipher=cipher)
    options = ("--cipher", other, "--new-key-file", tmp_path / "other")
    convert(tmp_path / "one", tmp_path / "two", "server", "server", *options)
    with copied(tmp_path / "two") as copy:
        stores.check_boot(copy, tmp_path / "w2", written["live"], key=OTHER, cipher=other)
    convert(tmp_path / "two", tmp_path / "three", "server", "plain", key=OTHER)
    assert mounts.contents(tmp_path / "three") == mounts.contents(written["store"])
    stores.check_boot(tmp_path / "three", tmp_path / "w3", written["live"])


@pytest.mark.mount
@pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")
def test_plain(written: dict[str, Any], tmp_path: Path) -> None:
    """plain -> plain -> sealed, mounted."""
    convert(written["store"], tmp_path / "one", "plain", "plain")
    with copied(tmp_path / "one") as copy:
        stores.check_boot(copy, tmp_path / "w1", written["live"])
    convert(tmp_path / "one", tmp_path / "two", "plain", "sealed", "--cipher", "aes")
    assert not mounts.unsealed(tmp_path / "two")
    report = mounts.verify(tmp_path / "two", key=KEY)
    assert report["sound"]
    assert report["warnings"] == []
    with mounts.mounted(tmp_path / "two", tmp_path / "mnt", key=KEY):
        stores.check_boot(tmp_path / "mnt", tmp_path / "w2", written["live"])


@pytest.mark.mount
@pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")
def test_sealed(written: dict[str, Any], tmp_path: Path) -> None:
    """A store that nats-server wrote encrypted -> sealed, mounted -> sealed with another key -> server -> sealed -> plain."""
    key_file(tmp_path)
    convert(written["store"], tmp_path / "server", "plain", "server", "--cipher", "aes")
    convert(tmp_path / "server", tmp_path / "sealed", "server", "sealed")
    assert mounts.holding(tmp_path / "sealed", stores.MARKER) == []
    with copied(tmp_path / "sealed") as copy, mounts.mounted(copy, tmp_path / "mnt", key=KEY):
        stores.check_boot(tmp_path / "mnt", tmp_path / "w1", written["live"])
    options = ("--cipher", "aes", "--new-key-file", tmp_path / "other")
    convert(tmp_path / "sealed", tmp_path / "again", "sealed", "sealed", *options)
    mounts.verify(tmp_path / "again", key=OTHER)
    assert {mounts.suite_of(path) for path in mounts.files(tmp_path / "again")} == {"aes"}
    convert(tmp_path / "again", tmp_path / "back", "sealed", "server", key=OTHER)
    with copied(tmp_path / "back") as copy:
        stores.check_boot(copy, tmp_path / "w2", written["live"], key=OTHER, cipher="chachapoly")
    convert(tmp_path / "again", tmp_path / "plain", "sealed", "plain", key=OTHER)
    assert mounts.contents(tmp_path / "plain") == mounts.contents(written["store"])
    stores.check_boot(tmp_path / "plain", tmp_path / "w3", written["live"])


def test_what_a_server_has_encrypted_itself(tmp_path: Path) -> None:
    """Written by a server with a key, in use, killed and started again; then without."""
    with world.serving(tmp_path / "store", tmp_path / "work", key=KEY, cipher="chachapoly") as server:
        stores.fill(server)
        server.restart(kill=True)
        live = stores.ask(server)
    with world.serving(tmp_path / "store", tmp_path / "work", key=KEY, cipher="chachapoly") as server:
        live = stores.ask(server)
    convert(tmp_path / "store", tmp_path / "plain", "server", "plain")
    assert mounts.holding(tmp_path / "plain", stores.MARKER) != []
    stores.check_boot(tmp_path / "plain", tmp_path / "w1", live)
    assert "key" not in (tmp_path / "w1/nats.conf").read_text()


def test_a_node_of_a_cluster(tmp_path: Path) -> None:
    """All three stores are converted while the cluster is down: raft logs, snapshots, consumers, everything is there."""
    places = [tmp_path / f"n{i}" for i in range(3)]
    for each in places:
        each.mkdir()
    with cluster_world.cluster(places, tmp_path / "work") as nodes:
        world.add_stream(nodes[0], "ORDERS", "ORDERS.>", num_replicas=3)
        cluster_world.wait_current(nodes)
        world.publish(nodes[0], world.sample("ORDERS", 60, size=900))
        world.add_durable(nodes[0], "ORDERS", "worker")
        cluster_world.wait_current(nodes)
        world.consume(nodes[0], "ORDERS", "worker", 20)
        cluster_world.wait_current(nodes)
        messages = world.read(nodes[0], "ORDERS")
        ask = partial(world.consumer_state, nodes[0], "ORDERS", "worker")
        state = cluster_world.from_replica(nodes[0], "ORDERS", ask, "worker")
    now = [tmp_path / f"e{i}" for i in range(3)]
    for i, (source, target) in enumerate(zip(places, now, strict=True)):
        convert(source, target, "plain", "server", "--cipher", "aes")
        assert list(target.glob("jetstream/$SYS/_js_/*/meta.key")), i
    with cluster_world.cluster(now, tmp_path / "again", key=KEY, cipher="aes") as nodes:
        for node in nodes:
            ask = partial(world.consumer_state, node, "ORDERS", "worker")
            assert cluster_world.from_replica(node, "ORDERS", ask, "worker") == state
            assert {seq: m.payload for seq, m in cluster_world.read_from(node, "ORDERS").items()} == {
                m.seq: m.payload for m in messages
            }
        more = partial(world.publish, nodes[1], [world.Message("ORDERS.1", b"and on it goes")])
        assert cluster_world.from_replica(nodes[1], "ORDERS", more)
    for node in nodes:
        assert not node.complaints(), node.log()
