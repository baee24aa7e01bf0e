"""inspect on all kinds of stores, compared with what the server that wrote them says; damage, odd names, half-done states."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import threading
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mounts
import nats_world as world
import pytest
import server_stores as stores
from test_cli import UPDATE, at_a_terminal
from test_jetstream import VECTORS, record, unpack

from encfs_js import holdings, serverkeys, state
from encfs_js.backing import Backing
from encfs_js.census import Census, Mode, looks_like_a_store, opened
from encfs_js.cli_table import width
from encfs_js.format import Suite
from encfs_js.inspect import survey
from encfs_js.natscodec import hash_key, highwayhash64

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js import JetStreamContext

STREAM = "jetstream/$G/streams/SMALL"
LIMITED = {"LOG", "MANY", "KV_settings"}  # what limits removed left no tombstone: only index.db knows of it
needs_server = pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-")
needs_fuse = pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")


def inspect(store: Path, *options: str | Path, key: str | None = None, code: int = 0) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(mounts.run("inspect", store, "--json", *options, key=key, code=code).stdout)
    return answer


def by_name(found: dict[str, Any], account: str = "$G") -> dict[str, dict[str, Any]]:
    (streams,) = [each["streams"] for each in found["accounts"] if each["name"] == account]
    return {stream["name"]: stream for stream in streams}


def sizes(store: Path) -> tuple[int, int]:
    paths = mounts.files(store)
    return len(paths), sum(path.stat().st_size for path in paths)


def nanoseconds(stamp: str) -> tuple[datetime, int]:
    """A time as the server writes it, without the zeros at the end."""
    match = re.fullmatch(r"(.{19})(?:\.(\d+))?Z", stamp)
    assert match
    return datetime.fromisoformat(match[1]), int((match[2] or "").ljust(9, "0"))


def check_state(found: dict[str, Any], live: dict[str, Any], source: str) -> None:
    state = found["state"]
    assert source in {state["counted_from"], "either"}, found["name"]
    names = {"messages": "messages", "bytes": "bytes", "first_seq": "first_seq", "last_seq": "last_seq"}
    names |= {"num_deleted": "deleted", "num_subjects": "subjects"}
    assert {name: state[ours] for name, ours in names.items()} == {name: live.get(name, 0) for name in names}
    assert nanoseconds(state["last_time"]) == nanoseconds(live["last_ts"])
    if live["messages"]:
        assert nanoseconds(state["first_time"]) == nanoseconds(live["first_ts"])


def check(found: dict[str, Any], live: dict[str, stores.Live], source: str) -> None:
    """Everything that inspect says with the key, against what the server says."""
    assert found["unreadable"] == found["foreign"] == []
    assert not found["key_needed"]
    streams = by_name(found)
    assert set(streams) == set(live)
    for name, said in live.items():
        mine = streams[name]
        assert mine["config"]["subjects"]
        if source == "index.db" or name not in LIMITED:
            check_state(mine, said.state, source)
        else:
            assert mine["state"]["messages"] >= said.state["messages"]
            assert mine["state"]["last_seq"] == said.state["last_seq"]
        assert {consumer["name"] for consumer in mine["consumers"]} == set(said.consumers)
        for consumer in mine["consumers"]:
            told, state = said.consumers[consumer["name"]], consumer["state"]
            assert state["ack_floor"]["stream_seq"] == told["ack_floor"]["stream_seq"]
            assert state["delivered"]["stream_seq"] == told["delivered"]["stream_seq"]
            assert state["pending"] == told["num_ack_pending"]
            assert consumer["config"]["durable_name"] == consumer["name"]
            assert consumer["config"]["ack_policy"] == "explicit"
    assert found["totals"]["messages"] == sum(stream["state"]["messages"] for stream in streams.values())
    assert found["totals"]["streams"] == len(live)


# --- with real servers --------------------------------------------------------------------------------------------


@pytest.mark.nats
@needs_server
@pytest.mark.parametrize("mode", stores.MODES)
def test_a_store_of_a_real_server(mode: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    key = None if mode == "plain" else stores.KEY
    with world.serving(store, tmp_path / "work", **stores.MODES[mode]) as server:
        stores.fill(server)
        live = stores.ask(server)
        while_it_runs = inspect(store, key=key)
    found = inspect(store, key=key)
    check(found, live, "index.db")
    check(while_it_runs, live, "either")
    rebuilt = tmp_path / "rebuilt"
    shutil.copytree(store, rebuilt)
    for index in rebuilt.glob("jetstream/*/*/*/msgs/index.db"):
        index.unlink()
    check(inspect(rebuilt, key=key), live, "blocks")
    assert found["kind"] == while_it_runs["kind"] == ("plain" if mode == "plain" else "server")
    assert (found["totals"]["files"], found["totals"]["disk_bytes"]) == sizes(store)
    assert {each["mode"] for each in found["modes"]} - {"empty"} == (
        {"plain"} if mode == "plain" else {"plain", "server"}
    )
    streams = by_name(found)
    assert streams["LOG"]["compressed_blocks"] == streams["LOG"]["blocks"] - 1 > 0
    assert streams["MANY"]["compressed_blocks"] == 0 < streams["MANY"]["blocks"]
    for name, stream in streams.items():
        assert stream["mode"] == ("plain" if mode == "plain" else "server")
        assert stream["blocks"] == len(list((store / "jetstream/$G/streams" / name).glob("msgs/*.blk")))
    without = inspect(store)
    assert without["modes"] == found["modes"]
    if mode == "plain":
        return check(without, live, "index.db")
    assert without["key_needed"]
    assert {stream["mode"] for stream in by_name(without).values()} == {"server"}
    assert {each["mode"] for s in by_name(found).values() for each in s["modes"] if each["encryptable"]} <= {
        "server", "empty"
    }  # fmt: skip
    suites = {each["cipher"] for stream in by_name(without).values() for each in stream["modes"]}
    assert suites - {None} == {mode}
    assert all(stream["state"] is stream["config"] is None for stream in by_name(without).values())
    assert [consumer["name"] for consumer in by_name(without)["ORDERS"]["consumers"]] == ["worker"]
    assert without["unreadable"] == []
    for name, stream in by_name(without).items():
        plain = sum(each["plain_bytes"] for each in streams[name]["modes"])
        assert sum(each["plain_bytes"] for each in stream["modes"]) == plain < stream["disk_bytes"]
    assert found["opened_by"] == {"key": found["key_files"], "prev_key": 0}
    return None


@pytest.mark.mount
@pytest.mark.nats
@needs_fuse
@needs_server
def test_a_sealed_store_under_a_running_server(tmp_path: Path) -> None:
    store = tmp_path / "store"
    mounts.init(store)
    stop = threading.Event()
    answers: list[dict[str, Any]] = []

    def look() -> None:
        while not stop.is_set():
            answers.append(inspect(store, key=mounts.KEY))

    with mounts.mounted(store, tmp_path / "mnt") as mount:
        with world.serving(mount.path, tmp_path / "work") as server:
            looking = threading.Thread(target=look)
            looking.start()
            try:
                stores.fill(server)
                for i in range(20):
                    world.add_stream(server, f"SHORT{i}", f"short.{i}")

                    async def delete(_: Client, js: JetStreamContext, name: str = f"SHORT{i}") -> None:
                        await js.delete_stream(name)

                    world.talk(server, delete)
            finally:
                stop.set()
                looking.join()
            live = stores.ask(server)
        mounted = inspect(store, key=mounts.KEY)
        through = inspect(mount.path)
    assert answers
    assert all(answer["kind"] == "sealed" for answer in answers)
    found = inspect(store, key=mounts.KEY)
    check(found, live, "index.db")
    check(through, live, "index.db")
    assert mounted["mounted"]["pid"]
    assert (found["kind"], through["kind"], found["mounted"]) == ("sealed", "plain", None)
    assert [each["mode"] for each in found["modes"] if each["mode"] != "empty"] == ["sealed"]
    assert found["totals"]["plain_bytes"] == through["totals"]["plain_bytes"] == through["totals"]["disk_bytes"]
    assert found["totals"]["disk_bytes"] == sizes(store)[1]
    (sealed,) = found["files"]
    assert (sealed["suite"], sealed["sealed_bytes"]) == ("chachapoly", found["totals"]["disk_bytes"])
    for code, key in ((0, None), (12, "another")):
        without = inspect(store, key=key, code=code)
        assert without["key_needed"]
        assert without["slots"]
        assert without["modes"] == found["modes"]
        assert all(s["state"] is s["config"] is s["compressed_blocks"] is None for s in by_name(without).values())
        assert {n: (s["blocks"], s["plain_bytes"]) for n, s in by_name(without).items()} == {
            n: (s["blocks"], s["plain_bytes"]) for n, s in by_name(found).items()
        }
    shutil.rmtree(store / "jetstream/$G/streams/LOG/msgs")
    for index in store.glob("jetstream/$G/streams/*/msgs/index.db"):
        index.unlink()
    again = inspect(store, key=mounts.KEY)
    for name in set(live) - LIMITED:
        check_state(by_name(again)[name], live[name].state, "blocks")
    # One bit of one page: the file is named, and nothing else is lost.
    mounts.flip(store / "jetstream/$G/streams/ORDERS/msgs/1.blk", 5000)
    hurt = inspect(store, key=mounts.KEY)
    assert [each["path"] for each in hurt["unreadable"]] == ["jetstream/$G/streams/ORDERS/msgs/1.blk"]
    assert "page 1" in hurt["unreadable"][0]["error"]
    assert by_name(hurt)["PURGED"] == by_name(again)["PURGED"]


# --- kept stores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("source", ["index.db", "blocks"])
def test_kept_stores(name: str, source: str, tmp_path: Path) -> None:
    vector = unpack(name, tmp_path)
    if source == "blocks":
        for index in tmp_path.glob("jetstream/*/*/*/msgs/index.db"):
            index.unlink()
    found = inspect(tmp_path, key=vector["key"])
    assert found["unreadable"] == []
    streams = by_name(found)
    for stream, said in vector["streams"].items():
        state = streams[stream]["state"]
        count = said["messages"] if isinstance(said["messages"], int) else len(said["messages"])
        assert (state["messages"], state["counted_from"]) == (count, source)
        assert [consumer["name"] for consumer in streams[stream]["consumers"]] == list(said["consumers"])
        for consumer in streams[stream]["consumers"]:
            told = consumer["state"]
            assert [told["ack_floor"]["stream_seq"], told["delivered"]["stream_seq"], told["pending"]] == (
                said["consumers"][consumer["name"]]
            )
    small = streams["SMALL"]["state"]
    assert (small["first_seq"], small["last_seq"], small["deleted"], small["subjects"]) == (1, 12, 1, 11)
    assert streams["PACKED"]["compressed_blocks"] == 1
    groups = {group["kind"]: group for group in found["raft_groups"]}
    if "cluster" not in name:
        assert not groups
        return
    assert set(groups) == {"meta", "stream", "consumer"}
    assert groups["meta"]["committed"] == groups["meta"]["snapshot"]["index"] == groups["meta"]["state"]["last_seq"]
    assert groups["consumer"]["state"]["messages"] == 17
    for group in found["raft_groups"]:
        assert (group["account"], group["cluster_size"], group["peers"], group["mode"]) == ("$SYS", 3, 3, "server")
        assert group["term"] >= 1
        # As seen: raft logs are chachapoly whatever the cipher.
        assert {each["cipher"] for each in group["modes"]} - {None} == {"chachapoly"}
    without = inspect(tmp_path)
    assert [group["term"] for group in without["raft_groups"]] == [group["term"] for group in found["raft_groups"]]
    assert all(group["state"] is None for group in without["raft_groups"])


def test_which_key_opened_what(tmp_path: Path) -> None:
    vector = unpack("2.15.1-chachapoly", tmp_path / "store")
    store, keys = tmp_path / "store", [vector["key"].encode()]
    file = store / STREAM / "obs/worker/meta.key"
    asset = serverkeys.stream("$G", "SMALL").consumer("worker")
    seed = serverkeys.open_key_file(file.read_bytes(), asset, keys, "meta.key")
    draws = iter((seed.nonce, seed.seed))
    file.write_bytes(serverkeys.new_key_file(b"from before", asset, Suite.CHACHAPOLY, lambda _: next(draws))[0])
    (tmp_path / "key").write_text(vector["key"])
    (tmp_path / "before").write_text("from before")
    for path in ("key", "before"):
        (tmp_path / path).chmod(0o600)
    found = inspect(store, "--key-file", tmp_path / "key", "--prev-key-file", tmp_path / "before")
    assert found["opened_by"] == {"key": found["key_files"] - 1, "prev_key": 1}
    assert by_name(found)["SMALL"]["opened_by"] == {"key": 2, "prev_key": 1}
    assert by_name(found)["SMALL"]["consumers"][0]["state"]["pending"] == 3
    # Without the second key only that consumer is missing.
    found = inspect(store, key=vector["key"])
    assert {each["path"].removeprefix(f"{STREAM}/obs/worker/") for each in found["unreadable"]} == {
        "meta.key", "meta.inf", "o.dat"
    }  # fmt: skip
    assert by_name(found)["SMALL"]["state"]["messages"] == 11
    # A key that opens nothing: what needs none is said, and the exit code is that of a wrong key.
    done = mounts.run("inspect", store, key="wrong", code=12)
    assert "opens none of nats-server's 6 key files" in done.stderr
    assert "SMALL" in done.stdout
    assert "wrong" not in done.stdout + done.stderr
    assert inspect(store, key="wrong", code=12)["unreadable"] == []
    mounts.run("inspect", store, key="", code=11)


# --- what is not as it should be ------------------------------------------------------------------------------------


def flip_last(path: Path) -> None:
    mounts.flip(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("name", "hurt", "lost"),
    [
        ("meta.inf", flip_last, "config"),
        ("meta.sum", flip_last, "config"),
        ("msgs/index.db", flip_last, None),
        ("msgs/index.db", lambda path: path.write_bytes(b""), None),
        ("obs/worker/o.dat", flip_last, "consumer"),
        ("msgs/1.key", lambda path: path.write_bytes(b"short"), "state"),
        ("msgs/1.key", Path.unlink, "state"),
        ("msgs/1.blk", lambda path: os.truncate(path, path.stat().st_size - 5), "tail"),
        ("meta.key", lambda path: path.write_bytes(path.read_bytes()[:-8] + bytes(8)), "all"),
    ],
)
@pytest.mark.parametrize("vector", ["2.15.1-chachapoly", "2.12.8-aes"])
def test_damage_is_listed_and_the_rest_is_shown(vector: str, name: str, hurt: Any, lost: str, tmp_path: Path) -> None:
    key = unpack(vector, tmp_path)["key"]
    sound = inspect(tmp_path, key=key)
    hurt(tmp_path / STREAM / name)
    found = inspect(tmp_path, key=key)
    listed = {each["path"] for each in found["unreadable"]}
    assert all(path.startswith(STREAM) for path in listed)
    assert all(each["error"] and not each["error"].startswith(each["path"]) for each in found["unreadable"])
    small, was = by_name(found)["SMALL"], by_name(sound)["SMALL"]
    wanted = {"meta.sum": "meta.inf", "msgs/1.key": "msgs/1.blk"}.get(name, name)
    assert f"{STREAM}/{wanted}" in listed or name == "meta.sum"
    assert listed
    if name != "meta.key":
        assert (small["config"] is None) == (lost == "config" and name != "meta.sum") or name == "meta.sum"
        assert (small["consumers"][0]["state"] is None) == (lost == "consumer")
    if name == "msgs/index.db":
        assert small["state"]["counted_from"] == "blocks"
        assert small["state"]["messages"] == was["state"]["messages"]
    elif lost == "tail":
        # The tombstone behind the messages is cut: what it had deleted is counted again.
        assert (small["state"]["counted_from"], small["state"]["messages"]) == ("blocks", 12)
    elif lost == "state":
        assert (small["state"]["counted_from"], small["state"]["messages"]) == ("blocks", 0)
    assert by_name(found)["PACKED"] == by_name(sound)["PACKED"]
    mounts.run("inspect", tmp_path, key=key)


def test_names_and_links(tmp_path: Path) -> None:
    """Streams and consumers of any name, also such that NATS would not allow; what is a symlink is named, not followed."""
    outside = tmp_path / "outside"
    unpack("2.15.1-plain", outside)
    store = tmp_path / "store"
    names = ["x" * 255, "🦀漢字", "é", "a'b\"$:", "-rf", "[bold]x", "a\nb\x1b[31m", "\udcff\udcfe"]
    for name in names:
        where = store / "jetstream" / "$G" / "streams" / name
        (where / "msgs").mkdir(parents=True)
        config = json.dumps({"name": "anything", "subjects": ["s.>"]}).encode()
        (where / "meta.inf").write_bytes(config)
        raw = os.fsencode(name).decode("utf-8", "surrogateescape")
        (where / "meta.sum").write_bytes(highwayhash64(hash_key(raw), config).hex().encode())
        (where / "msgs/1.blk").write_bytes(record(7, name=f"{raw}-1"))
        (where / "obs" / name).mkdir(parents=True)
    os.symlink(outside / STREAM, store / "jetstream/$G/streams/LINK")
    os.symlink(outside / STREAM / "obs/worker", store / "jetstream/$G/streams/é/obs/link")
    os.symlink(outside / STREAM / "msgs/1.blk", store / "jetstream/$G/streams/é/msgs/2.blk")
    os.symlink(outside / STREAM / "msgs/index.db", store / "jetstream/$G/streams/é/msgs/index.db")
    os.mkfifo(store / "jetstream/$G/streams/é/msgs/3.blk")
    found = inspect(store)
    streams = by_name(found)
    assert set(streams) == set(names)
    assert found["symlinks"] == [
        f"jetstream/$G/streams/{path}" for path in ("LINK", "é/msgs/2.blk", "é/msgs/index.db", "é/obs/link")
    ]
    for name, stream in streams.items():
        assert (stream["state"]["messages"], stream["state"]["first_seq"]) == (1, 7), name
        assert stream["config"] == {"subjects": ["s.>"]}
        assert [consumer["name"] for consumer in stream["consumers"]] == [name]
    text = mounts.run("inspect", store, key=None).stdout
    assert "symlink, not followed: jetstream/$G/streams/LINK" in text
    assert r"'a\nb\x1b[31m'" in text
    assert "\x1b" not in text
    assert "x" * 255 in text
    assert "[bold]x " in text


def test_what_lies_around_in_a_store(tmp_path: Path) -> None:
    """Streams that are being deleted, staged files, staged batches, a restore; and accounts directly in the store."""
    vector = unpack("2.15.1-chachapoly", tmp_path)
    account = tmp_path / "jetstream/$G"
    shutil.copytree(account / "streams/PACKED", account / "streams/.GONE")
    shutil.copytree(account / "streams/SMALL/msgs", account / "streams/SMALL/__msgs__")
    (account / "streams/SMALL/msgs/2.blk.tmp").write_bytes(b"staged")
    (account / "streams/SMALL/msgs/2.new").write_bytes(b"staged")
    (account / "__snapshots__/snap-1/msgs").mkdir(parents=True)
    (account / "__snapshots__/snap-1/msgs/1.blk").write_bytes(bytes(100))
    (tmp_path / "jetstream/_test_1").mkdir()
    batch = account / "streams/SMALL/batches/abcdefgh"
    (batch / "msgs").mkdir(parents=True)
    block = record(1, name="abcdefgh-1") + record(2, name="abcdefgh-1")
    asset, draws = serverkeys.stream("$G", "abcdefgh").block(1), iter((bytes(24), bytes(32)))
    raw, seed = serverkeys.new_key_file(vector["key"].encode(), asset, Suite.CHACHAPOLY, lambda _: next(draws))
    (batch / "msgs/1.key").write_bytes(raw)
    (batch / "msgs/1.blk").write_bytes(serverkeys.Keystream(seed).xor(block))
    found = inspect(tmp_path, key=vector["key"])
    (only,) = found["accounts"]
    assert [(each["name"], each["blocks"]) for each in only["deleting"]] == [("GONE", 2)]
    assert [(each["name"], each["disk_bytes"]) for each in only["restoring"]] == [("snap-1", 100)]
    small = by_name(found)["SMALL"]
    assert small["blocks"] == 1
    assert small["leftovers"] == 2 + 3
    assert small["state"]["messages"] == 11
    (staged,) = small["batches"]
    assert (staged["name"], staged["blocks"], staged["mode"]) == ("abcdefgh", 1, "server")
    assert staged["state"]["messages"] == 2
    assert (found["totals"]["files"], found["totals"]["disk_bytes"]) == sizes(tmp_path)
    lines = mounts.run("inspect", tmp_path, key=vector["key"]).stdout.splitlines()
    assert any(re.match(r"  staged batch abcdefgh of stream SMALL: 1 block, .* 2 messages", line) for line in lines)
    assert any(line.startswith("  being deleted: GONE: ") for line in lines)
    assert any(line.startswith("  being restored: snap-1: ") for line in lines)
    # As `store_dir` was before 2.2, or for somebody who names the directory within.
    inner = inspect(tmp_path / "jetstream", key=vector["key"])
    assert by_name(inner)["SMALL"]["state"] == small["state"]


def test_a_half_encrypted_stream_is_told_file_by_file(tmp_path: Path) -> None:
    """Key files that are there before what they are for is encrypted, and a block that was never encrypted."""
    key = unpack("2.15.1-chachapoly", tmp_path / "store")["key"]
    unpack("2.15.1-plain", tmp_path / "plain")
    store = tmp_path / "store"
    for name in ("meta.inf", "meta.sum", "msgs/index.db", "obs/worker/o.dat"):
        shutil.copy(tmp_path / "plain" / STREAM / name, store / STREAM / name)
    found = by_name(inspect(store))["SMALL"]
    modes = {each["mode"]: each["files"] for each in found["modes"]}
    assert found["mode"] == "mixed"
    assert modes == {"plain": 5, "server": 5}  # three key files, the block and the consumer's meta.inf
    assert {each["mode"]: each["encryptable"] for each in found["modes"]} == {"plain": 3, "server": 2}
    assert found["config"]["subjects"] == ["SMALL.>"]
    assert found["consumers"][0]["state"]["pending"] == 3
    assert found["key_needed"]
    shutil.copy(tmp_path / "plain" / STREAM / "msgs/1.blk", store / STREAM / "msgs/1.blk")
    found = by_name(inspect(store))["SMALL"]
    assert found["state"]["messages"] == 11
    assert by_name(inspect(store, key=key))["SMALL"]["state"]["messages"] == 11


def test_plaintext_in_a_sealed_store_is_read_without_a_key(tmp_path: Path) -> None:
    store = tmp_path / "store"
    unpack("2.15.1-plain", store)
    mounts.init(store, plaintext="read")
    for key in (None, mounts.KEY):
        found = inspect(store, key=key)
        assert (found["kind"], found["foreign"], found["key_needed"]) == ("sealed", [], False)
        assert by_name(found)["SMALL"]["mode"] == "plain"
        assert by_name(found)["SMALL"]["state"]["messages"] == 11


def test_a_store_that_is_sealed_in_part(tmp_path: Path) -> None:
    """As `encrypt --from server` leaves it when it is interrupted: the rest is as nats-server has encrypted it."""
    key = unpack("2.15.1-chachapoly", tmp_path)["key"]
    mounts.init(tmp_path, key=key, plaintext="read")
    state.mark(str(tmp_path))
    found = inspect(tmp_path, key=key)
    assert (found["kind"], found["half_sealed"], found["foreign"]) == ("sealed", True, [])
    assert by_name(found)["SMALL"]["mode"] == "server"
    assert by_name(found)["SMALL"]["state"]["messages"] == 11
    assert found["opened_by"]["key"] == found["key_files"] == 6
    (tmp_path / "other").write_text("the key of the keyring")
    (tmp_path / "other").chmod(0o600)
    mounts.run("key", "add", tmp_path, "--new-key-file", tmp_path / "other", key=key)
    # The keyring opens, and nats-server's key files do not: what they are for is left out, and no damage.
    found = inspect(tmp_path, "--key-file", tmp_path / "other")
    assert found["unreadable"] == []
    assert by_name(found)["SMALL"]["key_needed"]


def test_what_is_no_store(tmp_path: Path) -> None:
    io = Backing()
    (tmp_path / "jetstream").write_bytes(b"")
    assert not looks_like_a_store(io, str(tmp_path))
    done = mounts.run("inspect", tmp_path, key=None, code=14)
    assert "no encfs_js store" in done.stderr
    mounts.run("inspect", tmp_path / "nowhere", key=mounts.KEY, code=14)
    (tmp_path / "jetstream").unlink()
    (tmp_path / "jetstream/src").mkdir(parents=True)
    mounts.run("inspect", tmp_path, key=None, code=14)
    (tmp_path / "jetstream/src").rmdir()
    assert inspect(tmp_path)["totals"]["streams"] == 0
    (tmp_path / "jetstream/$G/streams").mkdir(parents=True)
    assert looks_like_a_store(io, str(tmp_path / "jetstream"))
    assert inspect(tmp_path / "jetstream")["kind"] == "plain"


def test_only_the_head_of_a_forged_block_is_trusted(tmp_path: Path) -> None:
    """A block of lengths and sequences at their limits is counted or called unreadable, in bounded memory."""
    where = tmp_path / "jetstream/$G/streams/S/msgs"
    where.mkdir(parents=True)
    for raw in (bytes(64), b"\xff" * 64, struct.pack("<IQqH", 30, (1 << 62) - 1, -(1 << 63), 0) + bytes(8), b"cmp\1"):
        (where / "1.blk").write_bytes(raw)
        (stream,) = by_name(inspect(tmp_path)).values()
        assert stream["state"]["messages"] in {0, 1}
        mounts.run("inspect", tmp_path, key=None)
    with open(where / "1.blk", "wb") as file:
        file.truncate(1 << 40)
    with open(where / "index.db", "wb") as file:
        file.truncate(1 << 40)
    found = inspect(tmp_path)
    assert {os.path.basename(each["path"]) for each in found["unreadable"]} == {"1.blk", "index.db"}


# --- files that vanish, and errors of the disk ----------------------------------------------------------------------


class Shaky(Backing):
    """Fails to open one name, in the way that is said."""

    def __init__(self, name: bytes, problem: int) -> None:
        self.name = name
        self.problem = problem

    def open(self, path: str | bytes, flags: int, *, dir_fd: int | None = None) -> int:  # type: ignore[override]
        if os.fsencode(path) == self.name and dir_fd is not None:
            raise OSError(self.problem, os.strerror(self.problem))
        return os.open(path, flags, dir_fd=dir_fd)


@pytest.mark.parametrize("name", [b"msgs", b"1.blk", b"index.db", b"meta.inf", b"o.dat", b"worker", b"SMALL"])
def test_what_vanishes_is_left_out(name: bytes, tmp_path: Path) -> None:
    unpack("2.15.1-plain", tmp_path)
    io = Backing()
    census = Census(io)
    found = survey(io, str(tmp_path), None, plaintext=True, each=census.take)
    assert found.unreadable == []
    assert {nature.mode for nature in census.tallies} == {Mode.PLAIN}
    with opened(io, str(tmp_path)) as top:
        for code, listed in ((2, False), (5, True)):
            reader = holdings.Reader(Shaky(name, code), top, (), sleep=lambda _: None)
            holding = holdings.look(reader, census.accounts["$G"].streams[b"SMALL"])
            assert not holding.sealed
            assert bool(reader.unreadable) == listed
            paths = {path.split(b"/")[-1] for path, _ in reader.unreadable}
            assert not listed or name in paths or name in {b"SMALL", b"worker"}


# --- as people see it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["2.15.1-plain", "2.15.1-chachapoly", "2.15.1-cluster-aes"])
@pytest.mark.parametrize("with_key", [True, False], ids=["key", "nokey"])
def test_the_words(name: str, with_key: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = unpack(name, tmp_path / "store")["key"]
    monkeypatch.chdir(tmp_path)
    golden = Path(__file__).parent / "cli" / "inspect" / f"{name}-{'key' if with_key else 'nokey'}.txt"
    text = mounts.run("inspect", "store", key=key if with_key else None).stdout
    if UPDATE:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def test_on_a_terminal_nobody_is_asked_and_tables_are_drawn(tmp_path: Path) -> None:
    unpack("2.15.1-chachapoly", tmp_path / "store")
    code, screen = at_a_terminal(["-m", "encfs_js", "inspect", tmp_path / "store"], [])
    assert code == 0
    assert "─" in screen
    assert "PACKED" in screen
    assert "With the key there is more to see" in screen


def test_widths() -> None:
    assert [width(text) for text in ("abc", "漢字", "é", "e\u0301", "🦀")] == [3, 4, 1, 1, 2]
