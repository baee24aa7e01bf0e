"""A damaged page below a real nats-server: what the server destroys elsewhere, the guard keeps."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from typing import TYPE_CHECKING

import mounts
import nats.js.errors
import nats_world as world
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nats.aio.client import Client
    from nats.js import JetStreamContext

pytestmark = [
    pytest.mark.nats,
    pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-"),
]
on_a_mount = pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")

VICTIM = "jetstream/$G/streams/VICTIM"
BLOCK = f"{VICTIM}/msgs/1.blk"
INDEX = f"{VICTIM}/msgs/index.db"
MESSAGES = {name: world.sample(name, 600, tag=name) for name in ("VICTIM", "OTHER")}


def fill(server: world.Server) -> None:
    for name, messages in MESSAGES.items():
        world.add_stream(server, name, f"{name}.>")
        world.publish(server, messages)
        world.add_durable(server, name, "worker")
        world.consume(server, name, "worker", 100)


def whole(server: world.Server, name: str) -> bool:
    """Whether every message of a stream is there, payload and headers."""
    wanted = [world.Stored(seq, *message) for seq, message in enumerate(MESSAGES[name], 1)]
    return world.streams(server).get(name) == len(wanted) and world.read(server, name) == wanted


def use(server: world.Server) -> None:
    """What an application does when it starts: create its stream, read. The server may refuse each."""

    async def start(_: Client, jetstream: JetStreamContext) -> None:
        with contextlib.suppress(nats.js.errors.Error):
            await jetstream.add_stream(name="VICTIM", subjects=["VICTIM.>"])
        for seq in (1, 300, 600):
            with contextlib.suppress(nats.js.errors.Error):
                await jetstream.get_msg("VICTIM", seq)

    world.talk(server, start)


@pytest.mark.parametrize("encryption", [{}, {"key": "k" * 32, "cipher": "chacha"}, {"key": "k" * 32, "cipher": "aes"}])
def test_without_the_mount_a_flipped_bit_destroys_messages(tmp_path: Path, encryption: dict[str, str]) -> None:
    """A plain directory and the server's own encryption: there is nothing left to put the bit back into."""
    store, work = tmp_path / "store", tmp_path / "work"
    with world.serving(store, work, **encryption) as server:
        fill(server)
    (store / INDEX).unlink()
    middle = (store / BLOCK).stat().st_size // 2
    mounts.flip(store / BLOCK, middle)
    with world.serving(store, work, **encryption) as server:
        assert whole(server, "OTHER")
        assert not whole(server, "VICTIM")
    left = (store / BLOCK).stat().st_size if (store / BLOCK).exists() else 0
    assert left <= middle, "the server has cut off the block where the bit was flipped, or removed it"
    with world.serving(store, work, **encryption) as server:
        assert world.streams(server).get("VICTIM", 0) < len(MESSAGES["VICTIM"])


# What is damaged: a file of the stream, and which of its pages (a share of them: 0 the first, 1 the last).
DAMAGES = {
    "block-first": ("msgs/1.blk", 0.0),
    "block-middle": ("msgs/1.blk", 0.5),
    "block-last": ("msgs/1.blk", 1.0),
    "stream-metafile": ("meta.inf", 0.0),
    "consumer-state": ("obs/worker/o.dat", 0.0),
}


@pytest.mark.parametrize(
    ("damage", "index"),
    [(damage, "index-gone") for damage in DAMAGES] + [("block-middle", "index-there")],
)
@pytest.mark.mount
@on_a_mount
def test_guard_keeps_a_damaged_stream(tmp_path: Path, damage: str, index: str) -> None:
    store, mountpoint, work = tmp_path / "store", tmp_path / "mnt", tmp_path / "work"
    store.mkdir()
    mounts.init(store)
    with mounts.mounted(store, mountpoint):
        with world.serving(mountpoint, work) as server:
            fill(server)
        if index == "index-gone":
            (mountpoint / INDEX).unlink()
    undamaged = mounts.contents(store / VICTIM)
    file, share = DAMAGES[damage]
    path = store / VICTIM / file
    page = int((path.stat().st_size // 4096 - 1) * share)
    mounts.flip(path, page * 4096 + 2000)
    damaged = mounts.contents(store / VICTIM)
    name = str(path.relative_to(store))

    def server_lives_with_it() -> None:
        with world.serving(mountpoint, work) as server:
            assert whole(server, "OTHER")
            use(server)
            server.restart(kill=True)
            assert whole(server, "OTHER")

    def nothing_lost() -> None:
        after = mounts.contents(store / VICTIM)
        assert {name: after.get(name) for name in damaged} == damaged

    with mounts.mounted(store, mountpoint, expect=("VICTIM",)) as mount:
        server_lives_with_it()
        assert mount.alive()
        says = "\n".join(mount.complaints())
        assert name in says
        assert f"page {page}" in says
        assert VICTIM in says
    nothing_lost()
    status = mounts.run("guard", "status", store, "--json", code=26)
    closed = json.loads(status.stdout)["closed"]
    assert [(entry["directory"], entry["file"], entry["page"]) for entry in closed] == [(VICTIM, name, page)]

    # The guard stays closed across a remount, before anything has been read.
    with mounts.mounted(store, mountpoint) as mount:
        victim = mountpoint / VICTIM
        attempts: list[Callable[[], object]] = [
            lambda: os.unlink(victim / "meta.sum"),
            lambda: os.rename(victim, victim.with_name("ELSEWHERE")),
            lambda: os.rename(victim / "meta.sum", victim / "meta.bak"),
            lambda: os.truncate(victim / "meta.sum", 0),
            lambda: os.rmdir(victim / "obs" / "worker"),
            lambda: os.close(os.open(victim / "meta.sum", os.O_WRONLY | os.O_TRUNC)),
        ]
        for attempt in attempts:
            with pytest.raises(OSError) as refusal:
                attempt()
            assert refusal.value.errno == errno.EROFS
        os.unlink(mountpoint / "jetstream" / "$G" / "streams" / "OTHER" / "msgs" / "index.db")
        mount.expect("VICTIM")
        server_lives_with_it()
    nothing_lost()

    # The administrator puts the page back (from a backup, say) and opens the guard.
    mounts.flip(path, page * 4096 + 2000)
    mounts.run("guard", "clear", store, VICTIM)
    assert json.loads(mounts.run("guard", "status", store, "--json").stdout)["closed"] == []
    restored = mounts.contents(store / VICTIM)
    assert {name: restored.get(name) for name in undamaged} == undamaged
    with mounts.mounted(store, mountpoint), world.serving(mountpoint, work) as server:
        assert whole(server, "OTHER")
        assert whole(server, "VICTIM")
        assert world.consumer_state(server, "VICTIM", "worker")[0] == 100
        world.talk(server, lambda _, jetstream: jetstream.delete_stream("VICTIM"))
    assert not (store / VICTIM).exists()
    mounts.verify(store)


@pytest.mark.mount
@on_a_mount
@pytest.mark.parametrize("cipher", ["chachapoly", "aes"])
def test_wrong_key_touches_nothing(tmp_path: Path, cipher: str) -> None:
    store, mountpoint, work = tmp_path / "store", tmp_path / "mnt", tmp_path / "work"
    store.mkdir()
    mounts.init(store, cipher=cipher)
    with mounts.mounted(store, mountpoint), world.serving(mountpoint, work) as server:
        fill(server)
    before = mounts.snapshot(store)
    for foreground in (["--foreground"], []):
        refused = mounts.run("mount", store, mountpoint, *foreground, key="not the key", code=12)
        assert "encfs-js: error: Error decrypting our keyring: " in refused.stderr
        assert ": message authentication failed" in refused.stderr
        assert "encfs-js: hint: " in refused.stderr
        assert "not the key" not in refused.stderr + refused.stdout
        assert mounts.entry_at(mountpoint) is None
        assert os.listdir(mountpoint) == []
    assert mounts.snapshot(store) == before
    with mounts.mounted(store, mountpoint), world.serving(mountpoint, work) as server:
        assert whole(server, "VICTIM")
        assert whole(server, "OTHER")
