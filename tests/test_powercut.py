"""Power cuts: whatever the disk lost of what was not synced, every byte that was synced is there afterwards.

tests/disk.py says what a disk may have lost, tests/powercut.py and tests/powerstore.py what is promised. Every state is
drawn from a seed. POWERCUT_SCALE=n makes n times as many workloads, POWERCUT_SEED=n takes other ones.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from pathlib import Path

import powercut
import powerstore
import pytest
from disk import Disk
from powercut import SCALE, SEED, failing, quick
from powerstore import App, Settings, file_keys
from recording import Recording

from encfs_js import keyring, keystore
from encfs_js.errors import NotAStoreError
from encfs_js.format import Suite

__all__ = ["quick"]


# --- one sealed file, random operations -------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", Suite)
def test_random_operations_on_a_sealed_file(suite, quick):
    states = trimmed = 0
    for number in range(300 * SCALE):
        seed = f"{suite.label}/{SEED}/{number}"
        rng = random.Random(seed)
        plan = powercut.draw_plan(rng, rng.choice((4, 8, 14)))
        failure, judge = failing(plan, suite, seed, 8, quick)
        if failure:
            small, smallest = powercut.shortest(plan, lambda p, seed=seed: failing(p, suite, seed, 24, quick)[0])
            pytest.fail(f"seed {seed}: {failure}\nof {plan}\nshortest plan that fails: {small}\n{smallest}")
        states += judge.states
        trimmed += judge.trimmed
    print(f"{states} states, {trimmed} of them trimmed")
    assert states > 8000 * SCALE
    assert trimmed > states / 10


# --- a whole store: nats-server's ways ---------------------------------------------------------------------------------


def message(number):
    return random.Random(number).randbytes(1057)


def earlier_run(app: App) -> None:
    app.mkdir(b"S")
    app.put(b"S/meta.inf", b"{}" * 100, sync=True)
    app.mkdir(b"S/msgs")
    app.create(b"S/msgs/1.blk")
    for i in range(9):
        app.append(b"S/msgs/1.blk", message(i))
    app.close(b"S/msgs/1.blk")
    app.create(b"S/msgs/index.db")
    app.write(b"S/msgs/index.db", 0, b"index " * 900)
    app.close(b"S/msgs/index.db")
    app.put(b"S/o.dat", b"state" * 100, sync=True)


def appends(app: App, every: int) -> None:
    """The block of a stream that is published to: one fsync after `every` messages."""
    app.open(b"S/msgs/1.blk")
    for i in range(15):
        app.append(b"S/msgs/1.blk", message(i))
        if i % every == every - 1:
            app.sync(b"S/msgs/1.blk")
    app.close(b"S/msgs/1.blk")


def published(app: App) -> None:
    appends(app, 5)


def published_always(app: App) -> None:
    appends(app, 1)


def replaced(app: App) -> None:
    """index.db is cut and written, o.dat replaced, commit.idx written in place."""
    app.truncate(b"S/msgs/index.db", 0)
    app.open(b"S/msgs/index.db")
    app.write(b"S/msgs/index.db", 0, b"new index" * 700)
    app.close(b"S/msgs/index.db")
    for i in range(3):
        app.put(b"S/o.dat", b"%d" % i * (2000 + 3000 * i), sync=True)
    app.put(b"S/p.dat", b"never synced" * 300, sync=False)
    app.put(b"S/p.dat", b"nor this" * 300, sync=False)
    app.create(b"S/commit.idx")
    app.write(b"S/commit.idx", 0, b"\0" * 16)
    app.sync(b"S/commit.idx")
    for i in range(4):
        app.write(b"S/commit.idx", 0, bytes([i]) * 16)
        if i % 2:
            app.sync(b"S/commit.idx")
    app.close(b"S/commit.idx")


def cut_and_compacted(app: App) -> None:
    """A bad tail is cut off a block, more is published, the block is compacted, the stream purged and deleted."""
    app.truncate(b"S/msgs/1.blk", 1057 * 5)
    app.open(b"S/msgs/1.blk")
    for i in range(20, 26):
        app.append(b"S/msgs/1.blk", message(i))
    app.sync(b"S/msgs/1.blk")
    app.close(b"S/msgs/1.blk")
    app.create(b"S/msgs/1.new")
    app.write(b"S/msgs/1.new", 0, b"".join(message(i) for i in range(0, 24, 2)))
    app.close(b"S/msgs/1.new")
    app.rename(b"S/msgs/1.new", b"S/msgs/1.blk")
    app.sync(b"S/msgs/1.blk")
    app.sync_directory(b"S/msgs")
    app.create(b"S/msgs/2.blk")
    app.append(b"S/msgs/2.blk", message(30)[:30])
    app.close(b"S/msgs/2.blk")
    app.mkdir(b"S/__new_msgs__")
    app.rename(b"S/msgs/2.blk", b"S/__new_msgs__/2.blk")
    app.rename(b"S/msgs", b"S/__msgs__")
    app.rename(b"S/__new_msgs__", b"S/msgs")
    app.append(b"S/msgs/2.blk", message(31))
    app.sync(b"S/msgs/2.blk")
    app.unlink(b"S/__msgs__/1.blk")
    app.unlink(b"S/__msgs__/index.db")
    app.rmdir(b"S/__msgs__")
    app.unlink(b"S/meta.inf")
    app.rename(b"S", b".S")
    app.unlink(b".S/msgs/2.blk")


PLAIN = {"refuse": {}, "read": {"a": b"plain " * 1500, "b": message(1)}}


def sealed_in_place(app: App) -> None:
    """Files that were not sealed are sealed before they are changed."""
    app.append(b"a", message(0))
    app.sync(b"a")
    app.rename(b"b", b"S/c")
    app.truncate(b"S/c", 1000)
    app.append(b"S/c", message(1))


WAYS = [published, published_always, replaced, cut_and_compacted]


@pytest.mark.parametrize(
    ("way", "plaintext"),
    [(sealed_in_place, "read"), *((way, plaintext) for way in WAYS for plaintext in ("refuse", "read"))],
)
def test_nats_ways(way, plaintext, quick):
    settings = Settings(file_keys(Suite.AES if plaintext == "read" else Suite.CHACHAPOLY), plaintext == "read")
    recorded = powerstore.record(quick, settings, earlier_run, way, PLAIN[plaintext])
    states, failure = powerstore.search(recorded, f"{way.__name__}/{SEED}", 15 * SCALE, quick)
    print(f"{states} states, {len(recorded.trace.ops) - recorded.trace.base} operations")
    assert failure is None
    assert states > 25


def wander(app: App, rng: random.Random, length: int) -> None:
    """Random operations on names and contents."""
    places = [b"a", b"b", b"d/a", b"d/b", b"e/a", b"d/s/a"]
    for i in range(length):
        files = [path for path in places if app.exists(path)]
        path = rng.choice(places)
        there = path in files
        size = rng.choice((30, 1057, 4500, 9000))
        data = random.Random(i).randbytes(size)
        match rng.choice(
            ("make", "write", "write", "append", "truncate", "sync", "sync", "move", "move", "unlink", "dir")
        ):
            case "make" if not there:
                with contextlib.suppress(FileNotFoundError):
                    app.create(path)
                    app.write(path, 0, data)
                    if rng.random() < 0.5:
                        app.sync(path)
                    app.close(path)
            case "write" if there:
                app.write(path, rng.choice((0, 100, 4032, 5000)), data)
            case "append" if there:
                app.append(path, data)
            case "truncate" if there:
                app.truncate(path, rng.choice((0, 1, 4031, 4032, 6000)))
            case "sync" if there and rng.random() < 0.7:
                app.sync(path)
            case "sync" if app.exists(os.path.dirname(path)):
                app.sync_directory(os.path.dirname(path))
            case "move" if there:
                with contextlib.suppress(FileNotFoundError):
                    app.rename(path, rng.choice(places))
            case "unlink" if there and rng.random() < 0.5:
                app.unlink(path)
            case "dir":
                with contextlib.suppress(OSError):
                    rng.choice(
                        (
                            lambda: app.mkdir(b"d"),
                            lambda: app.mkdir(b"e"),
                            lambda: app.mkdir(b"d/s"),
                            lambda: app.rename(b"e", b"d/s"),
                            lambda: app.rename(b"d", b"e"),
                            lambda: app.rmdir(b"e"),
                        )
                    )()


def wandering(seed: str, plain: dict[str, bytes], length: int, where: Path) -> tuple[int, powercut.Failure | None]:
    """Random operations on a store, whose power is cut. How many states were judged, and the first failure."""
    rng = random.Random(seed)
    settings = Settings(file_keys(rng.choice(list(Suite))), bool(plain))
    operations = rng.random()

    def before(app: App) -> None:
        app.mkdir(b"d")
        if not plain:
            wander(app, random.Random(operations + 1), 14)

    recorded = powerstore.record(
        where, settings, before, lambda app: wander(app, random.Random(operations), length), plain
    )
    return powerstore.search(recorded, seed, 3, where)


@pytest.mark.parametrize("plaintext", ["refuse", "read"])
def test_random_operations_on_a_store(plaintext, quick):
    """With `read` two of the files are not sealed at the beginning, and are sealed in place when they are changed."""
    states = 0
    for number in range(60 * SCALE):
        seed = f"{plaintext}/{SEED}/{number}"
        found, failure = wandering(seed, PLAIN[plaintext], 25, quick)
        states += found
        for length in range(25 if failure else 0):
            if shorter := wandering(seed, PLAIN[plaintext], length, quick)[1]:
                pytest.fail(f"seed {seed}: {failure}\nwith {length} operations: {shorter}")
        assert failure is None, f"seed {seed}"
    print(f"{states} states")
    assert states > 600 * SCALE


# --- the keyring ------------------------------------------------------------------------------------------------------


def test_the_keyring_is_the_old_or_the_new_one(quick):
    """init, then two changes; `load` may read the copy."""
    store = quick / "store"
    store.mkdir()
    documents = [
        keyring.create(b"%d" % i, cipher=Suite.AES, plaintext="refuse", kdf=keyring.Kdf(1, 1, 8)) for i in range(3)
    ]
    io = Recording(store, sync=False)
    written = []
    for document in documents:
        before = len(io.ops)
        keystore.write(str(store), document, backing=io)
        written.append((before, len(io.ops)))
    disk = Disk(io.trace)
    states = set()
    for cut in range(io.base, len(io.ops) + 1):
        if cut > io.base:
            disk.feed(io.ops[cut - 1])
        done = sum(after <= cut for _, after in written)
        begun = sum(before < cut for before, _ in written)
        for i in range(40 * SCALE):
            found = disk.crash(random.Random(f"{SEED}/{cut}/{i}"))
            states.add((cut, *((path, found.files.get(number)) for path, number in found.paths())))
            with tempfile.TemporaryDirectory(dir=quick) as path:
                found.write_out(Path(path))
                try:
                    got, _ = keystore.load(path)
                except NotAStoreError:
                    got = None
            allowed = [keyring.parse(document) for document in documents[max(done - 1, 0) : begun]]
            assert got in allowed + ([None] if done == 0 else []), f"cut {cut}, draw {i}: {found.story}"
    print(f"{len(states)} states")
    assert len(states) > 100
