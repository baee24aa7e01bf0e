"""The main job: an unmodified nats-server keeps its JetStream store on the mount, and STORE holds only sealed files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import mounts
import nats_world as world
import pytest
from nats.js import api

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nats.aio.client import Client
    from nats.js import JetStreamContext

pytestmark = [
    pytest.mark.mount,
    pytest.mark.nats,
    pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-"),
    pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-"),
]

MARKER = b"a payload that nobody may find on the disk: 4711-0815"


class World(NamedTuple):
    """What was put into a server and has to come out of it, whatever happens in between."""

    orders: list[world.Message]  # stream ORDERS, with headers, several message sizes
    logs: list[world.Message]  # stream LOGS, compressed with s2, two blocks
    values: dict[str, list[bytes | None]]  # KV bucket settings: the history of every key, None is a delete
    image: bytes  # object store files, object image


def fill(server: world.Server) -> World:
    made = World(
        orders=world.sample("orders", 3000, marker=MARKER, tag="first"),
        logs=world.sample("logs", 320, size=80_000, tag="log", text=True),
        values={f"key-{i}": [f"{i} {n} ".encode() + MARKER for n in range(i % 4 + 1)] for i in range(40)},
        image=MARKER + world.noise("image", 3_000_000) + MARKER,
    )
    made.values["key-7"].append(None)
    world.add_stream(server, "ORDERS", "orders.>")
    world.add_stream(server, "LOGS", "logs.>", compression=api.StoreCompression.S2)
    world.publish(server, made.orders)
    world.publish(server, made.logs, window=64)
    world.add_durable(server, "ORDERS", "billing")

    async def keep(_: Client, jetstream: JetStreamContext) -> None:
        bucket = await jetstream.create_key_value(bucket="settings", history=5)
        for key, values in made.values.items():
            for value in values:
                await (bucket.delete(key) if value is None else bucket.put(key, value))
        objects = await jetstream.create_object_store(bucket="files")
        await objects.put("image", made.image)

    world.talk(server, keep)
    return made


def as_stored(messages: list[world.Message]) -> list[world.Stored]:
    return [world.Stored(seq, *message) for seq, message in enumerate(messages, 1)]


def check(server: world.Server, made: World) -> None:
    """Every payload and header, in order."""
    assert world.read(server, "ORDERS") == as_stored(made.orders)
    assert world.read(server, "LOGS") == as_stored(made.logs)

    values: dict[str, list[bytes | None]] = {key: [] for key in made.values}
    for entry in world.read(server, "KV_settings"):
        deleted = (entry.headers or {}).get("KV-Operation") == "DEL"
        values[entry.subject.removeprefix("$KV.settings.")].append(None if deleted else entry.payload)

    async def look(_: Client, jetstream: JetStreamContext) -> tuple[bytes | None, bytes | None]:
        bucket = await jetstream.key_value("settings")
        objects = await jetstream.object_store("files")
        return (await bucket.get("key-6")).value, (await objects.get("image")).data

    latest, image = world.talk(server, look)
    assert latest == made.values["key-6"][-1]
    assert values == made.values
    assert image == made.image


def sealed_and_silent(store: Path, cipher: str) -> None:
    """Nothing but sealed files of this cipher in STORE, and the marker nowhere in it."""
    assert mounts.files(store)
    assert mounts.unsealed(store) == []
    assert {mounts.suite_of(path) for path in mounts.files(store)} <= {cipher, None}
    assert mounts.holding(store, MARKER) == []


@pytest.mark.parametrize("cipher", ["chachapoly", "aes"])
@pytest.mark.parametrize("sync", [None, "always"], ids=["sync-default", "sync-always"])
def test_publish_restart_and_replay(tmp_path: Path, cipher: str, sync: str | None) -> None:
    store, mountpoint = tmp_path / "store", tmp_path / "mnt"
    store.mkdir()
    mounts.init(store, cipher=cipher)
    with mounts.mounted(store, mountpoint), world.serving(mountpoint, tmp_path / "work", sync=sync) as server:
        made = fill(server)
        acked = world.consume(server, "ORDERS", "billing", 1200)
        assert acked == as_stored(made.orders)[:1200]
        check(server, made)
        server.restart()
        check(server, made)
        assert world.consumer_state(server, "ORDERS", "billing") == (1200, 0, 1800)
        server.restart(kill=True)
        check(server, made)
        server.stop()
        blocks = {path.parent.parent.name for path in mounts.holding(mountpoint, MARKER)}
        assert blocks >= {"ORDERS", "KV_settings", "OBJ_files"}, "the marker is not even in the mount"
        assert (mountpoint / "jetstream/$G/streams/LOGS/msgs/1.blk").read_bytes()[:3] == b"cmp"
        assert ".encfs_js" not in os.listdir(mountpoint)
    sealed_and_silent(store, cipher)
    with mounts.mounted(store, mountpoint), world.serving(mountpoint, tmp_path / "work", sync=sync) as server:
        check(server, made)
        assert world.consumer_state(server, "ORDERS", "billing") == (1200, 0, 1800)
        assert world.consume(server, "ORDERS", "billing", 1800) == as_stored(made.orders)[1200:]
        server.restart()  # acks reach the disk some time after they were answered: only a clean stop keeps them all
        assert world.consumer_state(server, "ORDERS", "billing") == (3000, 0, 0)
        more = world.sample("orders", 300, marker=MARKER, tag="second")
        world.publish(server, more)
        server.restart(kill=True)
        check(server, made._replace(orders=made.orders + more))
    sealed_and_silent(store, cipher)
    mounts.verify(store)


@pytest.mark.parametrize("cipher", ["chachapoly", "aes"])
def test_purge_delete_and_compact(tmp_path: Path, cipher: str) -> None:
    store, mountpoint = tmp_path / "store", tmp_path / "mnt"
    store.mkdir()
    mounts.init(store, cipher=cipher)
    streams = mountpoint / "jetstream" / "$G" / "streams"
    sent = {
        "EMPTIED": world.sample("EMPTIED", 500, marker=MARKER, tag="a"),
        "TAIL": world.sample("TAIL", 500, marker=MARKER, tag="b"),
        "GONE": world.sample("GONE", 500, marker=MARKER, tag="c"),
        "SPARSE": world.sample("SPARSE", 640, size=40_000, marker=MARKER, tag="d"),
    }

    async def clean(connection: Client, jetstream: JetStreamContext) -> None:
        await jetstream.purge_stream("EMPTIED")
        await jetstream.purge_stream("TAIL", keep=100)
        await jetstream.delete_stream("GONE")
        for seq in range(1, 301):
            if seq % 100 == 1:  # erased: the server rewrites the whole block
                await jetstream.delete_msg("SPARSE", seq)
            elif seq % 10:  # deleted: a tombstone is appended, and the next sync compacts the block
                request = json.dumps({"seq": seq, "no_erase": True}).encode()
                answer = await connection.request("$JS.API.STREAM.MSG.DELETE.SPARSE", request, timeout=30)
                assert json.loads(answer.data).get("success"), answer.data

    left: dict[str, list[world.Stored]] = {
        "EMPTIED": [],
        "TAIL": as_stored(sent["TAIL"])[400:],
        "SPARSE": [m for m in as_stored(sent["SPARSE"]) if m.seq > 300 or m.seq % 10 == 0],
    }

    def check_left(server: world.Server) -> None:
        assert {name: world.read(server, name) for name in left} == left
        assert set(world.streams(server)) == set(left)

    with mounts.mounted(store, mountpoint), world.serving(mountpoint, tmp_path / "work", sync="1s") as server:
        for name, messages in sent.items():
            world.add_stream(server, name, f"{name}.>")
            world.publish(server, messages, window=64)
        block = streams / "SPARSE" / "msgs" / "1.blk"
        full = block.stat().st_size
        world.talk(server, clean)
        mounts.until(lambda: block.stat().st_size < full // 2, "compaction of the first block")
        check_left(server)
        server.restart(kill=True)
        check_left(server)
        again = world.sample("EMPTIED", 200, marker=MARKER, tag="e")
        world.publish(server, again)
        left["EMPTIED"] = [world.Stored(seq, *m) for seq, m in enumerate(again, 501)]
        server.restart()
        check_left(server)
        mounts.until(lambda: not (streams / "GONE").exists(), "removal of the deleted stream's directory")
    assert sorted(os.listdir(store / "jetstream" / "$G" / "streams")) == sorted(left)
    sealed_and_silent(store, cipher)
    mounts.verify(store)
    with mounts.mounted(store, mountpoint), world.serving(mountpoint, tmp_path / "work") as server:
        check_left(server)


@pytest.mark.parametrize("cipher", ["chachapoly", "aes"])
def test_killed_daemon_loses_nothing_that_was_synced(tmp_path: Path, cipher: str) -> None:
    """With sync_interval always an ack means fsync: the messages survive SIGKILL of the daemon and of the server."""
    store, mountpoint = tmp_path / "store", tmp_path / "mnt"
    store.mkdir()
    mounts.init(store, cipher=cipher)
    sent = world.sample("orders", 800, marker=MARKER)
    with mounts.mounted(store, mountpoint) as mount:
        with world.serving(mountpoint, tmp_path / "work", sync="always") as server:
            world.add_stream(server, "ORDERS", "orders.>")
            world.publish(server, sent)
            mount.process.kill()
            server.kill()
        mount.kill()
    with mounts.mounted(store, mountpoint), world.serving(mountpoint, tmp_path / "work") as server:
        assert world.read(server, "ORDERS") == as_stored(sent)
    sealed_and_silent(store, cipher)
    mounts.verify(store)


@pytest.fixture
def nobodys_home() -> Iterator[Path]:
    """A directory that another user can reach: pytest keeps its own to its user."""
    with tempfile.TemporaryDirectory(prefix="encfs_js-nobody-") as home:
        os.chown(home, mounts.NOBODY, mounts.NOBODY)
        yield Path(home)


@pytest.mark.root
@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can become another user; run as a user, every test is this one"
)
@pytest.mark.skipif(not (shutil.which("setpriv") and shutil.which("unshare")), reason="util-linux is missing")
def test_unprivileged_user(nobodys_home: Path) -> None:
    """The main job as a user without privileges, who mounts with the setuid fusermount3: the test above, run again.

    In a mount namespace of its own, where /dev/fuse has the mode 0666 that udev gives it everywhere.
    """
    device = nobodys_home / "fuse"
    os.mknod(device, stat.S_IFCHR | 0o600, os.stat("/dev/fuse").st_rdev)
    device.chmod(0o666)
    this = f"{os.path.abspath(__file__)}::{test_publish_restart_and_replay.__name__}[sync-default-aes]"
    again = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        f"--basetemp={nobodys_home}/tests",
        this,
    ]
    namespace = ["unshare", "--mount", "--propagation", "slave", "sh", "-c"]
    inside = 'mount --bind "$0" /dev/fuse && exec "$@"'
    child = subprocess.Popen(
        [*namespace, inside, str(device), *mounts.command_as_user(mounts.NOBODY), *again],
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        env={**os.environ, "HOME": str(nobodys_home), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = child.communicate(timeout=2 * mounts.PATIENCE)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait(mounts.PATIENCE)
    assert child.returncode == 0, out
    assert "1 passed" in out, out
