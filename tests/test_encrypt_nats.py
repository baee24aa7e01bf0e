"""The commands encrypt and decrypt on stores of a real nats-server, which finds everything again on the other side."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import mounts
import nats_world as world
import pytest
import server_stores as stores

from encfs_js import state

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.mount,
    pytest.mark.nats,
    pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-"),
    pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-"),
]
NEW = "the key of the new store"


def filled(place: Path, mode: str) -> tuple[Path, dict[str, stores.Live]]:
    store = place / "store"
    store.mkdir()
    return store, stores.written(store, place / "work", **stores.MODES[mode])


def keyed(tmp_path: Path, *, name: str = "key", key: str = stores.KEY) -> str:
    path = tmp_path / name
    path.write_text(key)
    path.chmod(0o600)
    return str(path)


def test_a_plain_store_is_sealed_and_opened_again(tmp_path: Path) -> None:
    store, live = filled(tmp_path, "plain")
    before = {path: os.stat(path) for path in mounts.files(store)}
    told = json.loads(mounts.run("encrypt", store, "--cipher", "aes", "--json").stdout)
    assert (told["done"], told["from"], told["to"], told["cipher"]) == (True, "plain", "sealed", "aes")
    assert told["files"] == sum(bool(found.st_size) for found in before.values())
    assert told["streams"] == told["indexed"] == len(live)
    assert told["damaged"] == []
    assert not mounts.unsealed(store)
    assert not mounts.holding(store, stores.MARKER)
    for path, found in before.items():
        now = os.stat(path)
        assert (now.st_mode, now.st_uid, now.st_ino, now.st_mtime_ns) == (
            found.st_mode, found.st_uid, found.st_ino, found.st_mtime_ns
        )  # fmt: skip
    assert mounts.verify(store)["sound"]
    mounts.run("init", store, code=16)
    with mounts.mounted(store, tmp_path / "mnt"):
        stores.check_boot(tmp_path / "mnt", tmp_path / "sealed", live)
    assert "nothing" in mounts.run("encrypt", store).stdout

    told = json.loads(mounts.run("decrypt", store, "--json").stdout)
    assert (told["done"], told["from"], told["to"]) == (True, "sealed", "plain")
    assert sorted(os.listdir(store)) == ["jetstream"]
    mounts.run("decrypt", store, code=14)
    stores.check_boot(store, tmp_path / "plain", live)


@pytest.mark.parametrize("mode", ["chachapoly", "aes"])
def test_a_store_that_the_server_has_encrypted(mode: str, tmp_path: Path) -> None:
    store, live = filled(tmp_path, mode)
    key, new = keyed(tmp_path), keyed(tmp_path, name="new", key=NEW)
    assert "--from server" in mounts.run("encrypt", store, "--key-file", key, code=39).stderr
    mounts.run("encrypt", store, "--from", "server", key="another", code=12)
    assert sorted(os.listdir(store)) == ["jetstream"]
    given = ["--from", "server", "--key-file", key] + (["--new-key-file", new] if mode == "aes" else [])
    told = json.loads(mounts.run("encrypt", store, *given, "--json").stdout)
    assert (told["from"], told["left_out"], told["damaged"]) == ("server", [], [])
    assert told["key_files_removed"] > told["blocks"] > 0
    assert not list(store.rglob("*.key"))
    assert not mounts.unsealed(store)
    own = NEW if mode == "aes" else stores.KEY
    assert mounts.verify(store, key=own)["sound"]
    with mounts.mounted(store, tmp_path / "mnt", key=own):
        stores.check_boot(tmp_path / "mnt", tmp_path / "sealed", live)


def test_the_command_is_killed_time_and_again(tmp_path: Path) -> None:
    """And until it has ended nobody can mount the store."""
    store, live = filled(tmp_path, "chachapoly")
    key = keyed(tmp_path)
    rng, killed = random.Random(5), 0
    command = [*mounts.COMMAND, "encrypt", str(store), "--from", "server", "--key-file", key]
    while killed < 8:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.3 + rng.random() * 0.3)
        child.send_signal(signal.SIGKILL)
        if child.wait() == 0:
            break
        killed += 1
        if state.is_half_sealed(str(store)) and (store / ".encfs_js/keyring").exists():
            (tmp_path / "mnt").mkdir(exist_ok=True)
            said = mounts.run("mount", store, tmp_path / "mnt", key=stores.KEY, code=39).stderr
            assert "--from server goes on" in said
            assert "only a part of it is sealed yet" in mounts.run("decrypt", store, key=stores.KEY, code=39).stderr
    if state.is_half_sealed(str(store)) or not (store / ".encfs_js").exists():
        mounts.run("encrypt", store, "--from", "server", "--key-file", key)
    assert not state.is_half_sealed(str(store))
    assert not list(store.rglob("*.key"))
    with mounts.mounted(store, tmp_path / "mnt", key=stores.KEY):
        stores.check_boot(tmp_path / "mnt", tmp_path / "sealed", live)


def test_nobody_may_use_the_store_meanwhile(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    with world.serving(store, tmp_path / "work") as server:
        world.add_stream(server, "ORDERS", "ORDERS.>")
        assert "nats-server" in mounts.run("encrypt", store, code=18).stderr
        assert sorted(os.listdir(store)) == ["jetstream"]
    mounts.run("encrypt", store)
    with mounts.mounted(store, tmp_path / "mnt"):
        assert "encfs-js umount" in mounts.run("decrypt", store, code=18).stderr
        assert "encfs-js umount" in mounts.run("encrypt", store, code=18).stderr


def test_a_file_that_somebody_put_into_a_sealed_store(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    mounts.init(store)
    (store / "planted").write_text("in the clear")
    assert "refuses plaintext" in mounts.run("encrypt", store, code=39).stderr
    assert "refuses plaintext" in mounts.run("decrypt", store, code=39).stderr
    assert (store / "planted").read_text() == "in the clear"
    assert mounts.run("decrypt", store, key="another", code=12)
    (store / "planted").unlink()
    mounts.run("decrypt", store)
    assert os.listdir(store) == []


def test_a_store_that_was_to_be_sealed_little_by_little(tmp_path: Path) -> None:
    """`init --plaintext read`, a mount that has sealed some of it, and then the rest."""
    store, live = filled(tmp_path, "plain")
    mounts.init(store, plaintext="read")
    with mounts.mounted(store, tmp_path / "mnt"):
        stores.check_boot(tmp_path / "mnt", tmp_path / "first", live)
    assert mounts.unsealed(store)
    mounts.run("encrypt", store)
    assert not mounts.unsealed(store)
    assert json.loads(mounts.run("inspect", store, "--json").stdout)["settings"]["plaintext"] == "refuse"
    with mounts.mounted(store, tmp_path / "mnt"):
        stores.check_boot(tmp_path / "mnt", tmp_path / "second", live)
