"""What NATS's documentation says of encryption at rest, paragraph by paragraph, for both ways of having it.

Server mode: nats-server's own `key` and `cipher` on a plain directory. Mount: a nats-server without them on a mount. All that
is asserted of the server was seen with 2.15.1.

Enabling it for data that is there. The server converts the metafiles of streams and consumers at its next start. It encrypts a
block when it reads it, and which it reads at a start is decided by two things: the duplicate window (the last block and
those with messages in the last two minutes, or what the stream says) and index.db (all blocks, when it is of no use). That is
so at the second start, unless something was stored in the stream before: the first leaves it in the clear, and the second
takes it for encrypted. What only index.db knew is lost then: purged values come back. A mount converts nothing for being read:
each file is sealed before its first change.

New blocks are encrypted, old ones are not. In server mode until somebody reads them, on a mount until somebody changes them. The
last step is `encrypt`: all that is left is sealed in place, also of a store that the server has encrypted or begun to.

Disabling it. Without the key there are no streams. The server says so in its log and goes on as a core NATS server. Nothing is
lost until somebody creates a stream with the name of one that is there: that deletes it. So a mount without its key does not
come to be, and the wrong key is no key.

Changing the key. With the old one as `prev_key` the server converts streams and loses consumers; in a cluster it does not start,
and back with the old key deletes its streams. On a mount only the keyring changes.

Changing the cipher. The server converts all at its start and makes index.db anew from the blocks: purged values come back. On a
mount new files have the new cipher, old ones are read as they are, and `reencrypt` does the rest.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cluster_world
import mounts
import nats.js.errors
import nats_world as world
import pytest
import server_stores as stores
from nats.js import api

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext

pytestmark = [
    pytest.mark.nats,
    pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-"),
]
on_a_mount = pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")

KEY, OTHER = "the key of the server", "another key"
MODES = {name: {"key": KEY, "cipher": name} for name in ("chachapoly", "aes")}
TITLES = {"chachapoly": "ChaCha20-Poly1305", "aes": "AES-GCM"}
FAILED = {
    "chachapoly": "chacha20poly1305: message authentication failed",
    "aes": "cipher: message authentication failed",
}
OLD = b"written before there was a key"
NEW = b"written when there was one"
STREAMS = "jetstream/$G/streams"
SMALL_BLOCKS = 120_000  # max_bytes that makes blocks of 32,000 bytes
WINDOWS = {"QUIET": 0.2, "RECENT": 3600}  # seconds; without a word of the stream two minutes
# When the server starts again QUIET has no message within its duplicate window, RECENT has. Both have 37, 37 and 6 in a block.
NAMES = ("KV_settings", "QUIET", "RECENT")
SENT = {
    name: [world.Message(f"{name}.{i % 5}", world.noise(f"{name} {i}", 800) + OLD) for i in range(80)]
    for name in ("QUIET", "RECENT")
}
MORE = [world.Message(f"QUIET.{i % 5}", world.noise(f"more {i}", 800) + NEW) for i in range(50)]
ACKED = 30
PURGED = [b"a colour that was purged, %d" % turn for turn in range(5)]
BACK = PURGED[1:3]  # of the five, these are found in blocks that index.db does not go with


class Kept(NamedTuple):
    """What a server says it has. consumers: to acked, delivered, not acked, not delivered."""

    messages: dict[str, list[world.Stored]]
    consumers: dict[str, dict[str, tuple[int, int, int, int]]]

    def without_consumers(self) -> Kept:
        return self._replace(consumers={name: {} for name in self.consumers})

    def values(self) -> list[bytes]:
        """The values of the purged key that can be read."""
        return [m.payload for m in self.messages["KV_settings"] if m.subject == "$KV.settings.colour" and m.payload]

    def but(self, stream: str) -> Kept:
        messages, consumers = dict(self.messages), dict(self.consumers)
        del messages[stream], consumers[stream]
        return Kept(messages, consumers)


def ask(server: world.Server) -> Kept:
    live = stores.ask(server)
    consumers = {
        name: {
            consumer: (
                said["ack_floor"]["stream_seq"],
                said["delivered"]["stream_seq"],
                said["num_ack_pending"],
                said["num_pending"],
            )
            for consumer, said in found.consumers.items()
            if "durable_name" in said["config"]  # and not what a reader of a moment ago had
        }
        for name, found in live.items()
    }
    return Kept({name: found.messages for name, found in live.items()}, consumers)


def fill(server: world.Server) -> Kept:
    for name, sent in SENT.items():
        world.add_stream(server, name, f"{name}.>", max_bytes=SMALL_BLOCKS, duplicate_window=WINDOWS[name])
        world.publish(server, sent, window=8)
        world.add_durable(server, name, "worker")
        world.consume(server, name, "worker", ACKED)

    async def keep(_: Client, jetstream: JetStreamContext) -> None:
        bucket = await jetstream.create_key_value(bucket="settings", history=3)
        for turn, colour in enumerate(PURGED):
            for name, value in (("colour", colour), ("size", b"%d" % turn), ("place", b"%d" % turn)):
                await bucket.put(name, value + OLD)
        await bucket.purge("colour")

    world.talk(server, keep)
    kept = ask(server)
    assert kept.values() == []
    assert {name: len(messages) for name, messages in kept.messages.items()} == {
        "KV_settings": 7,
        "QUIET": 80,
        "RECENT": 80,
    }
    assert kept.consumers == {"KV_settings": {}, **{name: {"worker": (30, 30, 0, 50)} for name in SENT}}
    return kept


_made: dict[str, tuple[Path, Kept]] = {}


def make(mode: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Kept]:
    """A filled store that a plain server (`plain`) or one with its own encryption wrote; a copy, and what is in it."""
    if mode not in _made:
        place = tmp_path_factory.mktemp(mode)
        with world.serving(place / "store", place / "work", **MODES.get(mode, {})) as server:
            kept = fill(server)
        _made[mode] = place / "store", kept
        time.sleep(WINDOWS["QUIET"])
    original, kept = _made[mode]
    shutil.copytree(original, tmp_path / "store")
    return tmp_path / "store", kept


@pytest.fixture
def plain(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Kept]:
    return make("plain", tmp_path, tmp_path_factory)


@pytest.fixture
def own(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Kept]:
    """A store that the server encrypts itself, with chachapoly."""
    return make("chachapoly", tmp_path, tmp_path_factory)


@pytest.fixture
def sealed(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Kept]:
    """The plain one, sealed with chachapoly: written through a mount."""
    store, kept = tmp_path / "store", make("plain", tmp_path / "from", tmp_path_factory)
    mounts.init(store)
    with mounts.mounted(store, tmp_path / "mnt") as mount:
        shutil.copytree(kept[0], mount.path, dirs_exist_ok=True)
    assert mounts.unsealed(store) == []
    return store, kept[1]


def with_key(store: Path, cipher: str, *, key: str = KEY) -> dict[str, dict[str, bool]]:
    """Of each stream, by file, whether it is encrypted; all of it was decrypted and checked."""
    found = {path.name: stores.read(path, [key.encode()]) for path in sorted((store / STREAMS).iterdir())}
    lengths = {file.stat().st_size for file in store.rglob("*.key")}
    assert lengths == {{"chachapoly": 72, "aes": 64}[cipher]}
    return {name: each.encrypted for name, each in found.items()}


def blocks(encrypted: dict[str, bool]) -> list[bool]:
    """Of block 1, 2 ... whether it is encrypted."""
    found = {int(name.removesuffix(".blk")): value for name, value in encrypted.items() if name.endswith(".blk")}
    assert sorted(found) == list(range(1, len(found) + 1))
    return [found[number] for number in sorted(found)]


def lines(server: world.Server) -> list[str]:
    """Level and text of the lines of the log of the latest start that tell of encryption or trouble."""
    found = [line[line.index(" [") + 1 :] for line in server.log().splitlines() if " [" in line]
    return [
        line for line in found if line.startswith(("[WRN]", "[ERR]", "[FTL]")) or "crypt" in line or "Convert" in line
    ]


async def chat(connection: Client, _: JetStreamContext) -> bytes:
    """Core NATS: a request and a reply."""

    async def answer(msg: Msg) -> None:
        await msg.respond(b"yes, " + msg.data)

    await connection.subscribe("service", cb=answer)
    data: bytes = (await connection.request("service", b"I am here", timeout=10)).data
    return data


def core_works(server: world.Server) -> bool:
    return bool(world.talk(server, chat) == b"yes, I am here")


async def create(_: Client, jetstream: JetStreamContext) -> None:
    """What an application does at its start: have its stream, whether it is there or not."""
    await jetstream.add_stream(name="QUIET", subjects=["QUIET.>"])


# --- encryption for data that is there --------------------------------------------------------------------------------


@pytest.mark.parametrize("cipher", MODES)
def test_enabling_in_the_server(plain: tuple[Path, Kept], tmp_path: Path, cipher: str) -> None:
    store, kept = plain
    with world.serving(store, tmp_path / "work", **MODES[cipher]) as server:
        assert world.streams(server) == {name: len(messages) for name, messages in kept.messages.items()}
        assert server.log().count(f"[INF]   Encryption:      {TITLES[cipher]}\n") == 1
        assert sorted(lines(server)[1:]) == [f"[INF]   Encrypting stream '$G > {name}'" for name in NAMES]
    found = with_key(store, cipher)
    assert blocks(found["QUIET"]) == [False, False, True], "only the last"
    assert blocks(found["RECENT"]) == [True, True, True], "those that have messages within the duplicate window"
    assert [found[name]["index.db"] for name in NAMES] == [False, False, False]
    assert [found[name]["worker/o.dat"] for name in SENT] == [True, True]
    assert {path.name for path in mounts.holding(store, OLD)} == {"1.blk", "2.blk"}

    with world.serving(store, tmp_path / "work", **MODES[cipher]) as server:
        assert sorted(lines(server)[1:]) == sorted(
            f"[WRN] Filestore [{name}] {what}: {FAILED[cipher]}"
            for name in NAMES
            for what in ("Stream state error reading encryption key", "Recovering stream state from index errored")
        )
        again = ask(server)
    assert again.but("KV_settings") == kept.but("KV_settings")
    assert [value.removesuffix(OLD) for value in again.values()] == BACK, "purged, and back"
    assert all(all(encrypted.values()) for encrypted in with_key(store, cipher).values())
    assert mounts.holding(store, OLD) == []


@pytest.mark.mount
@on_a_mount
def test_enabling_on_a_mount(plain: tuple[Path, Kept], tmp_path: Path) -> None:
    store, kept = plain
    before = mounts.contents(store)
    mounts.init(store, plaintext="read")
    for _ in range(2):
        with mounts.mounted(store, tmp_path / "mnt"), world.serving(tmp_path / "mnt", tmp_path / "work") as server:
            assert ask(server) == kept, "purged values, too, stay where they are: nowhere"
            assert lines(server) == []
    now = mounts.contents(store)
    assert set(now) == set(before)
    unsealed = {str(path.relative_to(store)) for path in mounts.unsealed(store)}
    assert all(now[path] == before[path] for path in unsealed)
    assert {path for path in unsealed if path.endswith(".blk")} == {path for path in now if path.endswith(".blk")}
    assert {os.path.basename(path) for path in set(now) - unsealed} <= {"index.db", "o.dat", "thw.db"}
    mounts.verify(store)


# --- new blocks are encrypted, old ones are not -----------------------------------------------------------------------


@pytest.mark.parametrize("cipher", MODES)
def test_new_blocks_in_the_server(plain: tuple[Path, Kept], tmp_path: Path, cipher: str) -> None:
    store, kept = plain
    with world.serving(store, tmp_path / "work", **MODES[cipher]) as server:
        world.publish(server, MORE, window=8)
    for _ in range(2):
        found = with_key(store, cipher)["QUIET"]
        assert blocks(found) == [False, False, True, True]
        assert found["index.db"], "it was written anew"
        assert {path.name for path in mounts.holding(store / STREAMS / "QUIET", OLD)} == {"1.blk", "2.blk"}
        with world.serving(store, tmp_path / "work", **MODES[cipher]) as server:
            assert not any("QUIET" in line for line in lines(server)), "so index.db is of use, and no block is read"
    assert blocks(with_key(store, cipher)["QUIET"]) == [False, False, True, True]

    with world.serving(store, tmp_path / "work", **MODES[cipher]) as server:
        world.talk(server, lambda _, jetstream: jetstream.get_msg("QUIET", 3))
        assert blocks(with_key(store, cipher)["QUIET"]) == [True, False, True, True]
        assert world.read(server, "QUIET") == [*kept.messages["QUIET"], *of(MORE, 81)]
    assert blocks(with_key(store, cipher)["QUIET"]) == [True, True, True, True]
    assert mounts.holding(store, NEW) == []


def of(messages: Sequence[world.Message], first: int) -> list[world.Stored]:
    return [world.Stored(seq, *message) for seq, message in enumerate(messages, first)]


@pytest.mark.mount
@on_a_mount
def test_new_blocks_on_a_mount(plain: tuple[Path, Kept], tmp_path: Path) -> None:
    store, kept = plain
    directory = store / STREAMS / "QUIET"
    before = mounts.contents(directory)
    mounts.init(store, plaintext="read")
    with mounts.mounted(store, tmp_path / "mnt"), world.serving(tmp_path / "mnt", tmp_path / "work") as server:
        world.publish(server, MORE, window=8)
    for _ in range(2):
        with mounts.mounted(store, tmp_path / "mnt"), world.serving(tmp_path / "mnt", tmp_path / "work") as server:
            assert world.read(server, "QUIET") == [*kept.messages["QUIET"], *of(MORE, 81)]
        now = mounts.contents(directory)
        unsealed = {str(path.relative_to(directory)) for path in mounts.unsealed(directory)}
        assert {path for path in unsealed if path.endswith(".blk")} == {"msgs/1.blk", "msgs/2.blk"}
        assert {path for path in now if path.endswith(".blk")} - unsealed == {"msgs/3.blk", "msgs/4.blk"}
        assert all(now[path] == before[path] for path in unsealed)
        assert mounts.holding(store, NEW) == []
        assert {path.name for path in mounts.holding(directory, OLD)} == {"1.blk", "2.blk"}
    mounts.verify(store)


@pytest.mark.mount
@on_a_mount
def test_the_last_step_on_a_mount_is_the_old_blocks(plain: tuple[Path, Kept], tmp_path: Path) -> None:
    store, kept = plain
    mounts.init(store, plaintext="read")
    with mounts.mounted(store, tmp_path / "mnt"), world.serving(tmp_path / "mnt", tmp_path / "work") as server:
        world.publish(server, MORE, window=8)
    left = mounts.unsealed(store)
    assert {path.name for path in left} >= {"1.blk", "2.blk"}
    done = json.loads(mounts.run("encrypt", store, "--json").stdout)
    assert (done["done"], done["files"]) == (True, len(left))
    assert mounts.unsealed(store) == mounts.holding(store, OLD) == mounts.holding(store, NEW) == []
    with mounts.mounted(store, tmp_path / "mnt"), world.serving(tmp_path / "mnt", tmp_path / "work") as server:
        found = ask(server)
        assert lines(server) == []
    assert found.but("QUIET") == kept.but("QUIET")
    assert found.messages["QUIET"] == [*kept.messages["QUIET"], *of(MORE, 81)]
    assert found.consumers["QUIET"] == {"worker": (30, 30, 0, 100)}
    mounts.verify(store)


@pytest.mark.mount
@on_a_mount
@pytest.mark.parametrize("cipher", MODES)
def test_from_the_server_halfway_to_a_mount(plain: tuple[Path, Kept], tmp_path: Path, cipher: str) -> None:
    """The server has encrypted some blocks, others not, and not index.db: nothing is lost, and nothing comes back."""
    store, kept = plain
    with world.serving(store, tmp_path / "work", **MODES[cipher]):
        pass
    found = with_key(store, cipher)
    assert blocks(found["QUIET"]) == [False, False, True]
    assert not any(each["index.db"] for each in found.values())
    mounts.run("encrypt", store, "--from", "server", key=KEY)
    assert mounts.unsealed(store) == mounts.holding(store, OLD) == list(store.rglob("*.key")) == []
    with (
        mounts.mounted(store, tmp_path / "mnt", key=KEY),
        world.serving(tmp_path / "mnt", tmp_path / "work") as server,
    ):
        assert ask(server) == kept
        assert lines(server) == []
    mounts.verify(store, key=KEY)


# --- without the key, and with a wrong one ----------------------------------------------------------------------------

WITHOUT: dict[str, tuple[dict[str, Any], str, str]] = {
    "no key": ({}, "encryption not enabled", "encrypted store encountered with no main key"),
    "wrong key": ({"key": OTHER, "cipher": "chachapoly"}, "unable to recover keys", FAILED["chachapoly"]),
    "wrong key, other cipher": ({"key": OTHER, "cipher": "aes"}, "unable to recover keys", FAILED["aes"]),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_without_the_key_the_server_goes_on_without_streams(own: tuple[Path, Kept], tmp_path: Path, case: str) -> None:
    (store, kept), (options, why, _) = own, WITHOUT[case]
    before = mounts.contents(store)
    with world.serving(store, tmp_path / "work", **options) as server:
        assert core_works(server)
        assert world.streams(server) == {}
        assert [line for line in lines(server) if "WRN" in line] == [
            f"[WRN]   Error decrypting our stream metafile: {why}"
        ] * len(NAMES)
        with pytest.raises(AssertionError, match="no responders"):
            world.publish(server, MORE[:1])
    assert mounts.contents(store) == before
    with world.serving(store, tmp_path / "work", **MODES["chachapoly"]) as server:
        assert ask(server) == kept


@pytest.mark.parametrize("case", WITHOUT)
def test_without_the_key_creating_a_stream_deletes_it(own: tuple[Path, Kept], tmp_path: Path, case: str) -> None:
    """Why a mount without its key is no mount."""
    (store, kept), (options, _, why) = own, WITHOUT[case]
    with world.serving(store, tmp_path / "work", **options) as server:
        with pytest.raises(nats.js.errors.ServerError) as refused:
            world.talk(server, create)
        assert (refused.value.code, refused.value.err_code) == (500, 10049)
        assert refused.value.description == "error creating store for stream"
        assert lines(server)[-1] == f"[WRN] Stream create failed for '$G > QUIET': {why} (10077)"
    assert sorted(os.listdir(store / STREAMS)) == ["KV_settings", "RECENT"]
    with world.serving(store, tmp_path / "work", **MODES["chachapoly"]) as server:
        assert ask(server) == kept.but("QUIET")


class Core(world.Server):
    """The same without JetStream."""

    def configuration(self) -> str:
        return super().configuration().split("jetstream {")[0]


@pytest.mark.mount
@on_a_mount
def test_without_the_key_there_is_no_mount(sealed: tuple[Path, Kept], tmp_path: Path) -> None:
    """Core NATS goes on where the operator wants it to, and what applications do meanwhile touches no stream."""
    store, kept = sealed
    mountpoint, work = tmp_path / "mnt", tmp_path / "work"
    before = mounts.snapshot(store)
    refused = mounts.run("mount", store, mountpoint, key=None, code=11)
    assert refused.stderr.startswith("encfs-js: error: no key: none was given, and there is no terminal to ask on\n")
    refused = mounts.run("mount", store, mountpoint, key=OTHER, code=12)
    assert refused.stderr.startswith(
        "encfs-js: error: Error decrypting our keyring: chacha20poly1305: message authentication failed\n"
    )
    assert mounts.entry_at(mountpoint) is None
    assert os.listdir(mountpoint) == []

    core = Core(mountpoint, work)
    try:
        core.start()
        assert core_works(core)
        with pytest.raises(nats.js.errors.ServiceUnavailableError):
            world.streams(core)
        core.stop()
    finally:
        core.kill()
    assert os.listdir(mountpoint) == []
    with world.serving(tmp_path / "elsewhere", work) as other:
        assert core_works(other)
        world.talk(other, create)

    # Where nothing keeps the server from the bare mountpoint, that is an empty store, in the clear. The next mount says so.
    with world.serving(mountpoint, work) as astray:
        assert world.streams(astray) == {}
        world.talk(astray, create)
    refused = mounts.run("mount", store, mountpoint, code=19)
    assert f"{mountpoint} is not empty: what is in it would be hidden\n" in refused.stderr
    assert mounts.snapshot(store) == before
    shutil.rmtree(mountpoint)
    with mounts.mounted(store, mountpoint), world.serving(mountpoint, work) as server:
        assert ask(server) == kept


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory of the user that a server without privileges runs as."""
    user = mounts.NOBODY if os.geteuid() == 0 else os.geteuid()
    with tempfile.TemporaryDirectory(prefix="encfs_js-bare-") as path:
        os.chown(path, user, -1)
        yield Path(path)


@pytest.mark.skipif(
    os.geteuid() == 0 and not (shutil.which("setpriv") and shutil.which("unshare")), reason="util-linux is missing"
)
def test_a_bare_mountpoint_that_nobody_can_write_to_is_no_store(home: Path) -> None:
    bare, binary = home / "mnt", home / "as-user"
    bare.mkdir(mode=0o555)
    prefix = mounts.command_as_user(mounts.NOBODY) if os.geteuid() == 0 else []
    words = " ".join("'" + word.replace("'", "'\\''") + "'" for word in [*prefix, world.BINARY])
    binary.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    binary.chmod(stat.S_IRWXU)
    server = world.Server(bare, home / "work", binary=str(binary))
    try:
        with pytest.raises(AssertionError, match="nats-server ended with 1"):
            server.start()
        assert "[FTL] Can't start JetStream: " in server.log()
        assert "permission denied" in server.log()
    finally:
        server.kill()
    assert os.listdir(bare) == []


# --- another key ------------------------------------------------------------------------------------------------------


def test_another_key_in_the_server_loses_the_consumers(own: tuple[Path, Kept], tmp_path: Path) -> None:
    store, kept = own
    lost = f"[WRN]     Error adding consumer '$G > {{}} > worker': error creating store for consumer: {FAILED['aes']} (10104)"
    worker = api.ConsumerConfig(durable_name="worker", ack_policy=api.AckPolicy.EXPLICIT, ack_wait=3600)

    async def replace(_: Client, jetstream: JetStreamContext) -> None:
        await jetstream.add_consumer("QUIET", worker)

    new = {"key": OTHER, "cipher": "chachapoly"}
    with world.serving(store, tmp_path / "work", prev_key=KEY, **new) as server:
        found = ask(server)
        said = lines(server)
    assert found.but("KV_settings") == kept.but("KV_settings").without_consumers()
    assert [value.removesuffix(OLD) for value in found.values()] == BACK
    assert sorted(line for line in said if "Convert" in line or "consumer" in line) == [
        *(f"[INF]   Converting to {TITLES['chachapoly']} for stream '$G > {name}'" for name in NAMES),
        *(lost.format(name) for name in SENT),
    ]
    with world.serving(store, tmp_path / "work", **new) as server:
        assert ask(server) == found
        assert lines(server)[1:] == ["[WRN]   Error decrypting our consumer metafile: unable to recover keys"] * 2
        with pytest.raises(nats.js.errors.ServerError) as refused:
            world.talk(server, replace)
        assert (refused.value.code, refused.value.err_code) == (500, 10012)
        assert lines(server)[-1].startswith("[WRN] Consumer create failed for '$G > QUIET > worker': ")
    with world.serving(store, tmp_path / "work", **MODES["chachapoly"]) as server:
        assert world.streams(server) == {}, "the old key opens nothing any more"


@pytest.mark.parametrize("cipher", MODES)
def test_another_key_in_a_cluster_of_servers(tmp_path: Path, cipher: str) -> None:
    """The node does not start, core NATS included, and its blocks have the new key already: the old one is no way back.

    Started with that, it deletes what it had: a stream without replicas elsewhere is lost. On mounts: test_rotation_drill.
    """
    places = [tmp_path / f"s{number}" for number in range(cluster_world.NODES)]
    for place in places:
        place.mkdir()
    fatal = "Error creating filestore: chacha20poly1305: message authentication failed"  # the raft log is always that
    with cluster_world.cluster(places, tmp_path / "work", **MODES[cipher]) as nodes:
        for name, replicas in (("QUIET", 3), ("ALONE", 1)):
            world.add_stream(nodes[0], name, f"{name}.>", num_replicas=replicas)
            cluster_world.wait_current(nodes)
            world.publish(nodes[0], [message._replace(subject=f"{name}.1") for message in MORE])
        cluster_world.wait_current(nodes)
        node = cluster_world.leader(nodes, "ALONE")
        node.stop()
        node.key, node.prev_key = OTHER, KEY
        with pytest.raises(AssertionError, match="nats-server ended with 1"):
            node.start()
        for name in ("ALONE", "QUIET"):
            assert f"[INF]   Converting to {TITLES[cipher]} for stream '$G > {name}'" in lines(node)
        assert lines(node)[-2:] == [
            f"[ERR] {fatal}",
            f"[FTL] Can't start JetStream: {fatal.removeprefix('Error creating filestore: ')}",
        ]
        node.kill()
        node.key, node.prev_key = KEY, None
        node.start()
        assert [line for line in lines(node) if "metafile" in line] == [
            "[WRN]   Error decrypting our stream metafile: unable to recover keys"
        ] * 2
        mounts.until(lambda: not list(node.store.glob("jetstream/$G/**/*.blk")), "the deletion of what it had")
        node.restart()
        cluster_world.wait_current(nodes)
        assert len(cluster_world.read_from(node, "QUIET")) == len(MORE), "from the other two"
        assert world.streams(nodes[0]) == {"ALONE": 0, "QUIET": len(MORE)}


@pytest.mark.mount
@on_a_mount
def test_another_key_on_a_mount_keeps_all(sealed: tuple[Path, Kept], tmp_path: Path) -> None:
    store, kept = sealed
    before = {path: data for path, data in mounts.contents(store).items() if path.endswith((".blk", ".inf"))}
    new = tmp_path / "new.key"
    new.touch(0o600)
    new.write_text(OTHER)
    with mounts.mounted(store, tmp_path / "mnt"), world.serving(tmp_path / "mnt", tmp_path / "work") as server:
        mounts.run("key", "change", store, "--new-key-file", new)
        assert ask(server) == kept
    mounts.run("mount", store, tmp_path / "mnt", code=12)
    with (
        mounts.mounted(store, tmp_path / "mnt", key=OTHER),
        world.serving(tmp_path / "mnt", tmp_path / "work") as server,
    ):
        assert ask(server) == kept
        assert world.consume(server, "QUIET", "worker", 50) == kept.messages["QUIET"][ACKED:]
    now = mounts.contents(store)
    assert {path: now[path] for path in before} == before
    mounts.verify(store, key=OTHER)


# --- another cipher ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [("chachapoly", "aes"), ("aes", "chachapoly")])
def test_another_cipher_in_the_server(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, first: str, second: str
) -> None:
    store, kept = make(first, tmp_path, tmp_path_factory)
    assert all(all(encrypted.values()) for encrypted in with_key(store, first).values())
    with world.serving(store, tmp_path / "work", **MODES[second]) as server:
        found = ask(server)
        assert sorted(lines(server)[1:]) == sorted(
            line
            for name in NAMES
            for line in (
                f"[INF]   Converting to {TITLES[second]} for stream '$G > {name}'",
                f"[WRN] Filestore [{name}] Stream state magic and version mismatch",
                f"[WRN] Filestore [{name}] Recovering stream state from index errored: corrupt state file",
            )
        )
    assert found.but("KV_settings") == kept.but("KV_settings")
    assert [value.removesuffix(OLD) for value in found.values()] == BACK
    assert len(found.messages["KV_settings"]) == len(kept.messages["KV_settings"]) + len(BACK)
    assert all(all(encrypted.values()) for encrypted in with_key(store, second).values())
    with world.serving(store, tmp_path / "work", **MODES[second]) as server:
        assert ask(server) == found
        assert len(lines(server)) == 1


@pytest.mark.mount
@on_a_mount
def test_another_cipher_on_a_mount(sealed: tuple[Path, Kept], tmp_path: Path) -> None:
    store, kept = sealed
    old = {path for path in mounts.files(store) if path.suffix in (".blk", ".inf", ".sum")}
    with (
        mounts.mounted(store, tmp_path / "mnt", "--cipher", "aes"),
        world.serving(tmp_path / "mnt", tmp_path / "work") as server,
    ):
        assert ask(server) == kept
        world.publish(server, MORE, window=8)
    assert {mounts.suite_of(path) for path in old} == {"chachapoly"}
    assert mounts.suite_of(store / STREAMS / "QUIET" / "msgs" / "4.blk") == "aes"
    with mounts.mounted(store, tmp_path / "mnt") as mount:
        plain = mounts.contents(mount.path)
    mounts.run("reencrypt", store, "--cipher", "aes")
    assert {mounts.suite_of(path) for path in mounts.files(store)} <= {"aes", None}
    with mounts.mounted(store, tmp_path / "mnt") as mount:
        assert mounts.contents(mount.path) == plain, "index.db, too"
        with world.serving(mount.path, tmp_path / "work") as server:
            found = ask(server)
            assert lines(server) == []
    assert found.but("QUIET") == kept.but("QUIET")
    assert found.values() == []
    assert found.messages["QUIET"] == [*kept.messages["QUIET"], *of(MORE, 81)]
    assert found.consumers["QUIET"] == {"worker": (30, 30, 0, 100)}
    mounts.verify(store)
