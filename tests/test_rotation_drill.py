"""Key, cipher and epoch of three stores are changed, one after the other, under a cluster that works all the time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import cluster_world as world
import mounts
import nats_world
import pytest
from test_readme import nothing_left, sets_nothing_up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.mount,
    pytest.mark.nats,
    pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-"),
    pytest.mark.skipif(bool(nats_world.needs_server()), reason=nats_world.needs_server() or "-"),
]

MARKER = b"a payload that nobody may find on the disk: 0815-4711"
NAMES = [f"n{i}" for i in range(1, world.NODES + 1)]


@contextlib.contextmanager
def three_mounts(top: Path, keys: dict[str, str]) -> Iterator[dict[str, mounts.Mount]]:
    """Each store at its own mountpoint, with its own key."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(mounts.mounted(top / name / "store", top / name / "mnt", key=keys[name]))
            for name in NAMES
        }


def three_stores(top: Path, cipher: str) -> dict[str, str]:
    """Three stores, each with a key of its own. Returns the keys."""
    keys = {name: f"the first key of {name}" for name in NAMES}
    for name in NAMES:
        (top / name).mkdir()
        mounts.init(top / name / "store", key=keys[name], cipher=cipher)
    return keys


def inspect(store: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(mounts.run("inspect", store, "--json", key=None).stdout)
    return answer


def kinds(store: Path) -> set[tuple[str, int]]:
    """The ciphers and epochs of the files that are there."""
    return {(group["suite"], group["epoch"]) for group in inspect(store)["files"]}


def reencrypt(store: Path, key: Path, *options: str) -> dict[str, Any]:
    done = mounts.run("reencrypt", store, "--key-file", key, "--json", *options, key=None)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def rotate(store: Path, old: Path, new: Path) -> None:
    """What an operator types, while the store is mounted and written to."""
    assert kinds(store) == {("chachapoly", 1)}
    mounts.run("key", "change", store, "--key-file", old, "--new-key-file", new, key=None)
    before = sum(group["files"] for group in inspect(store)["files"])
    answer = reencrypt(store, new, "--new-epoch", "--cipher", "aes")
    assert (answer["done"], answer["cipher"], answer["epoch"]) == (True, "aes", 2)
    assert answer["files_failed"] == 0
    assert answer["files_done"] == answer["files"] >= before // 2, "nothing was there to be sealed anew"
    assert kinds(store) == {("aes", 2)}
    answer = reencrypt(store, new, "--drop-epochs")
    assert (answer["done"], answer["dropped_epochs"]) == (True, [1])


def test_rotation_under_load(tmp_path: Path) -> None:
    """One node after the other gets a new key, a new epoch and another cipher; the servers and their clients go on.

    Afterwards all is there on each replica, also when everything was stopped, mounted with the new keys and started
    again, and when the leading server is then killed under load.
    """
    keys = three_stores(tmp_path, "chachapoly")
    new_keys = {name: f"the second key of {name}" for name in NAMES}
    stores = {name: tmp_path / name / "store" for name in NAMES}
    for which, those in (("old", keys), ("new", new_keys)):
        for name, key in those.items():
            file = tmp_path / name / f"{which}.key"
            file.touch(0o600)
            file.write_text(key)
    with (
        three_mounts(tmp_path, keys) as served,
        # Every message goes to the daemon at once, so files change while they are sealed anew. By itself the kernel hands
        # over what was written so rarely that nothing met: a daemon that lost such changes passed.
        world.cluster([mount.path for mount in served.values()], tmp_path / "work", sync="always") as nodes,
    ):
        record = world.fill(nodes, MARKER)
        pids = [node.process.pid for node in nodes if node.process is not None]
        with world.busy(nodes, record):
            world.wait_progress(record)
            for name in NAMES:
                rotate(stores[name], tmp_path / name / "old.key", tmp_path / name / "new.key")
                world.wait_progress(record)
        assert [node.process.pid for node in nodes if node.process is not None and node.alive()] == pids
        assert [node.complaints() for node in nodes] == [[], [], []]
        assert [mount.status()["takeovers"] for mount in served.values()] == [0, 0, 0]
        world.check_everything(nodes, record)
        for name in NAMES:
            mounts.verify(stores[name], key=new_keys[name])
    for name in NAMES:
        found = inspect(stores[name])
        assert [epoch["epoch"] for epoch in found["epochs"]] == [2]
        assert kinds(stores[name]) == {("aes", 2)}
        assert mounts.unsealed(stores[name]) == []
        assert mounts.holding(stores[name], MARKER) == []
        mounts.verify(stores[name], key=new_keys[name])
        mounts.run("verify", stores[name], key=keys[name], code=12)
    with (
        three_mounts(tmp_path, new_keys) as served,
        world.cluster([mount.path for mount in served.values()], tmp_path / "work") as nodes,
    ):
        world.check_everything(nodes, record)
        with world.busy(nodes, record):
            world.wait_progress(record)
            node = world.leader(nodes, world.STREAM)
            node.kill()
            world.wait_progress(record)
            node.start()
            world.wait_current(nodes)
            world.wait_progress(record)
        world.drain(nodes, record)
        world.check_everything(nodes, record)
    for name in NAMES:
        assert kinds(stores[name]) == {("aes", 2)}
        mounts.verify(stores[name], key=new_keys[name])


# --- the same for a person to watch -------------------------------------------------------------------------------

SCRIPT = os.path.join(mounts.ROOT, "examples", "cluster", "run.sh")


def start_example(scratch: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        # What is run in the background has SIGINT ignored, and no shell below it could trap it.
        ["env", "--default-signal=INT", "bash", SCRIPT],
        env={**mounts.environment(None), "TMPDIR": str(scratch)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@sets_nothing_up
def test_the_example(tmp_path: Path) -> None:
    process = start_example(tmp_path)
    try:
        out, _ = process.communicate(timeout=3 * mounts.PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, out
    assert out.count("each once and as it was published") == 2 * world.NODES
    assert out.count("All its files are sealed with aes, epoch 2") == world.NODES
    assert "no error is in their logs" in out
    nothing_left(tmp_path)


@sets_nothing_up
@pytest.mark.parametrize("sign", ["$ encfs-js mount", "$ encfs-js reencrypt"])
def test_the_example_cleans_up_after_ctrl_c(tmp_path: Path, sign: str) -> None:
    process = start_example(tmp_path)
    try:
        assert process.stdout is not None
        seen = ""
        for line in process.stdout:
            seen += line
            if line.startswith(sign):
                os.killpg(process.pid, signal.SIGINT)
                break
        seen += process.stdout.read()
        assert process.wait(mounts.PATIENCE) == 130, seen
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
    nothing_left(tmp_path)
