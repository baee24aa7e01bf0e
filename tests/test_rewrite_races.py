"""Sealing anew against everybody else: what comes between two steps, and what the steps find on the way."""

from __future__ import annotations

import errno
import json
import os
from types import SimpleNamespace

import pytest
import trio
from test_rewrite import BLOCK, KEYS, LONG, MTIME, NEW, OLD, SHORT, Store, header, leftovers, new, old

from encfs_js import cli_reencrypt, keymemory, keyring, keystore, mount, rewrite, steps, world
from encfs_js.background import Background
from encfs_js.backing import Backing
from encfs_js.errands import Errands
from encfs_js.errors import ReencryptError
from encfs_js.format import Suite
from encfs_js.gate import Gate
from encfs_js.reencrypt import Progress, reencrypt

__all__ = ["old"]


def whole_pass(store: Store) -> Progress:
    progress = Progress()
    steps.run(reencrypt(store.files, progress))
    return progress


# --- a copy that does not come to its end


def test_a_copying_that_ends_in_the_middle_for_whatever_reason_freezes_the_file(old) -> None:
    """Or what is written from then on would be undone when the redo file is finished."""
    store = new(old)
    node = store.node(BLOCK)
    work = rewrite.rewrite(store.files, node)
    while store.files.copying is None:
        step = next(work)
        if step is not None:
            step()
    work.close()
    assert len(leftovers(old)) == 1
    with pytest.raises(OSError, match="Input/output error"):
        store.files.write(node, 0, b"x", cached=False)
    again = new(old)
    assert (header(old, BLOCK), again.read(BLOCK)) == (NEW, LONG)


# --- what is found


def test_a_file_of_an_epoch_that_nobody_knows_is_named(old) -> None:
    raw = bytearray((old / "meta.inf").read_bytes())
    raw[12] = 9  # the epoch
    (old / "meta.inf").write_bytes(raw)
    progress = whole_pass(new(old))
    assert progress.state == "incomplete"
    assert progress.failed == [("meta.inf", "Input/output error")]
    assert progress.files == 2


class Refusing(Backing):
    """A host on which some names cannot be opened, or not for writing by who is not root."""

    def __init__(self, name: bytes, code: int) -> None:
        self._refused, self._code = name, code

    def open(self, path, flags, mode=0o777, *, dir_fd=None):
        if os.fsencode(path) == self._refused:
            raise OSError(self._code, os.strerror(self._code))
        return os.open(path, flags, mode, dir_fd=dir_fd)


@pytest.mark.parametrize("name", [b"meta.inf", b"closed"])
def test_what_cannot_be_opened_is_named_and_the_others_are_done(old, name: bytes) -> None:
    (old / "closed").mkdir()
    progress = whole_pass(new(old, Refusing(name, errno.EIO)))
    assert progress.failed == [(os.fsdecode(name), "Input/output error")]
    assert header(old, BLOCK) == NEW


def test_where_nothing_can_be_written_the_pass_says_so(old) -> None:
    store = new(old)
    store.files._reserve = store.files.promises = None  # as prepare leaves it on a disk that became read-only
    with pytest.raises(OSError, match="Read-only file system"):
        whole_pass(store)
    assert header(old, BLOCK) == OLD


class NotRoot(Backing):
    """Whoever may not open a file of his own whose mode says so."""

    def open(self, path, flags, mode=0o777, *, dir_fd=None):
        if flags & os.O_ACCMODE == os.O_RDWR and not flags & os.O_CREAT:
            found = os.stat(path, dir_fd=dir_fd)
            if not found.st_mode & 0o200:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return os.open(path, flags, mode, dir_fd=dir_fd)


def test_a_file_that_may_not_be_written_is_finished_at_the_next_start(old) -> None:
    (old / "1.blk").chmod(0o400)
    store = new(old, NotRoot())
    work = rewrite.rewrite(store.files, store.node(BLOCK))
    while store.files.copying is None:
        step = next(work)
        if step is not None:
            step()
    again = new(old, NotRoot())
    assert len(again.recovered) == 1
    assert (header(old, BLOCK), again.read(BLOCK), leftovers(old)) == (NEW, LONG, [])
    found = (old / "1.blk").stat()
    assert (found.st_mode & 0o777, found.st_mtime_ns) == (0o400, MTIME)
    work.close()


# --- files that move while the pass looks for them


@pytest.mark.parametrize("how", ["rename", "link", "directory", "exchange"])
def test_what_moves_away_from_the_look_is_not_missed(tmp_path, how: str) -> None:
    """From a directory that has not been listed yet into one that has been, in every round."""
    store = Store(tmp_path)
    for name in ("a", "a/in", "b", "z"):
        (tmp_path / name).mkdir()
    store.write(b"file", LONG[:9000])
    store.write(b"other", b"")
    (tmp_path / "file").rename(tmp_path / "a/in/file")
    store = new(tmp_path)
    root, tree = store.tree.root, store.tree
    order = [name for _, name in tree.listing(root)]
    assert order[-1] == b"a", "the listing's order is that of the names' hashes"
    inner = tree.lookup(tree.lookup(root, b"a")[0], b"in")[0]
    tree.lookup(inner, b"file")
    work = reencrypt(store.files, Progress())
    for _ in order[:-1]:
        next(work)
    if how == "rename":
        tree.rename(inner, b"file", root, b"moved", 0)
    elif how == "link":
        tree.link(tree.lookup(inner, b"file")[0], root, b"moved")
        tree.unlink(inner, b"file")
    elif how == "directory":
        tree.rename(tree.lookup(root, b"a")[0], b"in", root, b"moved", 0)
    else:
        tree.lookup(root, b"other")
        next(work)
        tree.rename(root, b"other", inner, b"file", 2)
    steps.run(work)
    path = {"directory": "moved/file", "exchange": "other"}.get(how, "moved")
    assert header(tmp_path, os.fsencode(path)) == NEW


# --- writers of a worker before this one


def test_a_file_that_a_worker_before_has_opened_for_writing_is_no_obstacle(old) -> None:
    store = new(old)
    store.files.writeback = True
    node = store.node(b"meta.inf")
    assert store.files.write(node, 0, SHORT, cached=True) == len(SHORT)
    store.files.detach(node)
    assert node.fd == -1
    assert whole_pass(store).failed == []


# --- the keys change, the pass is stopped and asked for again


def test_keys_that_change_at_the_very_end_are_seen(old) -> None:
    store = new(old)
    progress = Progress()
    work = reencrypt(store.files, progress)
    changed = False
    for step in work:
        if step is not None and getattr(step, "func", None) == store.files.io.syncfs and not changed:
            changed = True
            store.files.keys.renew(KEYS.volume_key, Suite.CHACHAPOLY, 2)
        if step is not None:
            step()
    assert changed
    assert (progress.state, progress.cipher) == ("done", "chachapoly")
    assert header(old, BLOCK) == header(old, b"meta.inf") == (Suite.CHACHAPOLY, 2)


def test_asked_for_again_while_it_stops_it_begins_again(old) -> None:
    store = new(old)
    told: list[dict] = []
    background = Background(store.files, Gate(store.files), told.append)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(background.run, 1.0)
            await trio.sleep(0.05)
            background.stop()
            nursery.start_soon(background.run, None)

    trio.run(main)
    assert [said["state"] for said in told if said["state"] not in {"counting", "running"}] == ["stopped", "done"]
    assert header(old, BLOCK) == NEW


def fake_worker() -> SimpleNamespace:
    return SimpleNamespace(sock=SimpleNamespace(send=len))


@pytest.mark.parametrize("dies_first", [False, True])
def test_a_stop_whose_worker_dies_is_a_stop(dies_first: bool) -> None:
    there, worker = Errands(os.memfd_create("keys")), fake_worker()
    there.on_serving(worker)
    there.reencrypt(None)
    there.on_progress({"is": "progress", "state": "running"})
    if dies_first:
        there.on_end(worker)
        assert there.progress["state"] == "running", "the next worker goes on"
        there.stop()
    else:
        there.stop()
        there.on_end(worker)
    assert there.progress["state"] == "stopped"
    os.close(there.keys)


def test_the_end_of_a_pass_that_was_stopped_is_not_that_of_the_next() -> None:
    there = Errands(os.memfd_create("keys"))
    there.on_serving(fake_worker())
    there.reencrypt(None)
    there.stop()
    there.reencrypt(None)
    there.on_progress({"is": "progress", "state": "stopped"})
    assert there.progress == {"state": "counting"}
    there.on_progress({"is": "progress", "state": "done"})
    assert there.progress == {"state": "done"}
    os.close(there.keys)


def test_new_keys_that_got_lost_on_their_way_are_no_success(caplog) -> None:
    there, answers = Errands(os.memfd_create("keys")), []
    there.on_serving(fake_worker())
    there.rekey(answers.append)
    there.on_rekeyed({"is": "rekeyed", "ok": True}, [])
    assert [answer["ok"] for answer in answers] == [False]
    assert "too many open files" in caplog.text
    os.close(there.keys)


# --- keys from before the store was ours


def two_epochs(path) -> tuple[keyring.Keys, keyring.Keys]:
    """A store whose files are of a second epoch, and whose first was dropped. Returns the keys of before and of now."""
    document = keyring.create(b"key", cipher=Suite.AES, plaintext="refuse", kdf=keyring.Kdf(1, 1, 8))
    before = keyring.unlock(keyring.parse(document), b"key")
    document = keyring.add_epoch(keyring.parse(document), before)
    document = keyring.drop_epochs(keyring.parse(document), before, [1])
    keystore.write(str(path), document)
    now = keyring.renew(keyring.parse(document), before)
    options = {"store": str(path), "read_only": False, "cipher": None, "writeback": False}
    opened = world.prepare(options, now, Backing(), resumed=False)
    node, fd, _ = opened.tree.create(opened.tree.root, BLOCK, 0o600, 0, 0, exclusive=True)
    os.close(fd)
    opened.files.write(node, 0, LONG[:9000], cached=False)
    opened.files.detach(node)
    world.end_run(opened)
    return before, now


def test_the_command_takes_the_keys_that_the_store_has_when_it_is_locked(tmp_path) -> None:
    before, now = two_epochs(tmp_path)
    raw = (tmp_path / "1.blk").read_bytes()
    progress = cli_reencrypt._alone(str(tmp_path), before, None, lambda _progress: None)
    assert (progress["state"], progress["files"], progress["epoch"]) == ("done", 0, now.settings.epoch)
    assert (tmp_path / "1.blk").read_bytes() == raw
    assert not (tmp_path / ".encfs_js/guard").exists()


def test_a_mount_takes_the_keys_that_the_store_has_when_it_is_locked(tmp_path, monkeypatch) -> None:
    """Or it would seal with an epoch that nobody has any more as soon as it is unmounted."""
    before, now = two_epochs(tmp_path)
    (tmp_path / "mnt").mkdir()
    started = []

    def execve(_path: str, command: list[str], _environ: dict[str, str]) -> None:
        orders = json.loads(os.pread(int(command[-1]), 1 << 20, 0))
        started.append(keymemory.take(orders["keys"]))
        for fd in (int(command[-1]), orders["keys"], orders["worker"], orders["lock"]):
            os.close(fd)

    monkeypatch.setattr(os, "execve", execve)
    mount._become_supervisor(mount.Options(str(tmp_path), str(tmp_path / "mnt")), before, None, mount.WORKER)
    assert [keys.settings.epoch for keys in started] == [now.settings.epoch] == [2]
    assert started[0].secrets()[1].keys() == {2}


def test_stopped_while_somebody_waits_at_the_gate_he_goes_on(old) -> None:
    store = new(old)
    node = store.node(BLOCK)
    store.files.open(node, write=True)
    gate = Gate(store.files)
    told: list[dict] = []
    background = Background(store.files, gate, told.append)
    waited = []

    async def write(at: int) -> None:
        waited.append(store.files.frozen is node)
        await gate.to_change(node)
        assert store.files.write(node, at, b"change", cached=False) == 6

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(background.run, None)
            while store.files.frozen is not node or store.files.copying is not None:
                if store.files.watched is node and store.files.frozen is None:
                    await write(0)
                await trio.lowlevel.checkpoint()
            looks = len(waited)
            nursery.start_soon(write, 100)
            while len(waited) == looks:  # trio runs tasks in any order
                await trio.lowlevel.checkpoint()
            background.stop()

    trio.run(main)
    assert waited[-1]
    assert not any(waited[:-1])
    assert [said["state"] for said in told][-1] == "stopped"
    store.files.release(node, write=True, direct=False)
    assert header(old, BLOCK) == OLD
    assert store.read(BLOCK) == b"change" + LONG[6:100] + b"change" + LONG[106:]
    assert leftovers(old) == []


def test_a_daemon_that_was_started_again_knows_nothing_of_the_pass(monkeypatch) -> None:
    monkeypatch.setattr(cli_reencrypt, "_rekey", lambda _store: None)
    monkeypatch.setattr(cli_reencrypt, "_ask", lambda _store, _message: {"ok": True, "reencrypt": None})
    with pytest.raises(ReencryptError, match="started again"):
        cli_reencrypt._by_daemon("/store", None, lambda _progress: None)


def test_an_open_file_that_has_got_its_id_just_now_gets_another(old) -> None:
    store = Store(old)
    node = store.node(b"meta.inf")
    store.files.open(node, write=True)
    store.files.write(node, 0, b"A", cached=False)
    store.files.keys.renew(KEYS.volume_key, *NEW)
    assert whole_pass(store).failed == []
    assert header(old, b"meta.inf") == NEW
    store.files.write(node, 1, b"B", cached=False)
    store.files.release(node, write=True, direct=False)
    assert new(old).read(b"meta.inf") == b"AB" + SHORT[2:]
