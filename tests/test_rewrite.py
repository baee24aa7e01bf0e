"""Sealing the files of a store anew, without a mount: nothing is lost, whoever comes between, wherever it ends."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from encfs_js import keyring, redo, rewrite, state, steps
from encfs_js.backing import Backing
from encfs_js.files import Files
from encfs_js.format import Header, Suite
from encfs_js.guard import Guard
from encfs_js.redo import UnfinishedError
from encfs_js.reencrypt import Progress, reencrypt
from encfs_js.reserve import Reserve
from encfs_js.sealed import FileKeys
from encfs_js.tree import Tree

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2026, 11, 24, tzinfo=UTC)
STORE_ID = bytes(16)
VOLUME_KEYS = {1: bytes(range(32)), 2: bytes(range(32, 64))}
KEYS = keyring.Keys(STORE_ID, keyring.Settings(Suite.CHACHAPOLY, "refuse", 1), bytes(32), VOLUME_KEYS)
REDO_KEY = KEYS.derive(redo.INFO)
LONG = os.urandom(3 * 1024 * 1024 + 17)
SHORT = b"a metafile"
BLOCK, META = b"1.blk", b"meta.inf"
MTIME = 1_600_000_000_123_456_789


class Store:
    """A store in a directory, wired as a mount wires it. epoch, suite: of new files."""

    def __init__(
        self, path: Path, io: Backing | None = None, *, suite=Suite.CHACHAPOLY, epoch=1, plaintext=False
    ) -> None:
        (path / ".encfs_js").mkdir(exist_ok=True)
        io = io or Backing()
        self.tree = Tree(io, str(path), Guard(str(path)), give_to_caller=False)
        self.recovered = redo.recover(io, self.tree.root_fd, self.tree.meta_fd, REDO_KEY)
        self.files = Files(
            self.tree, FileKeys(KEYS.volume_key, suite, epoch), state.State(clean=False, began=0, windows=()), REDO_KEY,
            Reserve(io, self.tree.meta_fd), lambda: NOW, plaintext=plaintext, writeback=False,
        )  # fmt: skip

    def node(self, name: bytes):
        return self.tree.lookup(self.tree.root, name)[0]

    def write(self, name: bytes, data: bytes) -> None:
        try:
            node = self.node(name)
        except FileNotFoundError:
            node, fd, _ = self.tree.create(self.tree.root, name, 0o600, 0, 0, exclusive=True)
            os.close(fd)
        self.files.open(node, write=True)
        self.files.write(node, 0, data, cached=False)
        self.files.release(node, write=True, direct=False)

    def read(self, name: bytes) -> bytes:
        node = self.node(name)
        data = b"".join(
            bytes(self.files.read(node, at, 1 << 20)) for at in range(0, max(self.files.size(node), 1), 1 << 20)
        )
        self.files.detach(node)
        return data

    def rewrite(self, name: bytes) -> bool:
        return steps.run(rewrite.rewrite(self.files, self.node(name)))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A store of epoch 1 with a long file and a short one, of long ago."""
    store = Store(tmp_path)
    for name, data in ((BLOCK, LONG), (META, SHORT)):
        store.write(name, data)
        os.utime(tmp_path / os.fsdecode(name), ns=(MTIME, MTIME))
    return tmp_path


def header(path: Path, name: bytes) -> tuple[Suite, int]:
    found = Header.parse((path / os.fsdecode(name)).read_bytes()[:32])
    return found.suite, found.epoch


def leftovers(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path / ".encfs_js") if name.startswith("redo"))


OLD, NEW = (Suite.CHACHAPOLY, 1), (Suite.AES, 2)


def new(path: Path, io: Backing | None = None) -> Store:
    return Store(path, io, suite=Suite.AES, epoch=2)


@pytest.mark.parametrize(("name", "data"), [(BLOCK, LONG), (META, SHORT)])
def test_content_and_time_stay_suite_and_epoch_are_new(old: Path, name: bytes, data: bytes) -> None:
    store = new(old)
    ino = os.stat(old / os.fsdecode(name)).st_ino
    assert store.rewrite(name)
    found = os.stat(old / os.fsdecode(name))
    assert (header(old, name), found.st_ino, found.st_mtime_ns) == (NEW, ino, MTIME)
    assert store.read(name) == data
    assert leftovers(old) == []
    assert not store.rewrite(name), "there is nothing more to do"
    assert new(old).read(name) == data
    assert store.files.moved >= len(data)


def test_what_is_empty_or_not_sealed_is_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path, plaintext=True)
    (tmp_path / "empty").touch()
    (tmp_path / "plain").write_bytes(b"from before")
    assert not store.rewrite(b"empty")
    assert not store.rewrite(b"plain")
    assert (tmp_path / "plain").read_bytes() == b"from before"


@pytest.mark.parametrize("times", [1, 1000])
def test_a_change_meanwhile_is_not_lost(old: Path, times: int) -> None:
    """Somebody who changes the file whenever he may: in the end he has to wait, and everything he wrote is there."""
    store = new(old)
    node = store.node(BLOCK)
    store.files.open(node, write=True)
    expected, changes = bytearray(LONG), 0
    for step in rewrite.rewrite(store.files, node):
        if step is not None:
            step()
        elif store.files.frozen is not node and changes < times:
            changes += 1
            data = b"change %d" % changes
            assert store.files.write(node, 5000 * changes, data, cached=False) == len(data)
            expected[5000 * changes : 5000 * changes + len(data)] = data
    store.files.release(node, write=True, direct=False)
    assert changes == (1 if times == 1 else 2 * 4), "in each of the four parts, twice"
    assert header(old, BLOCK) == NEW
    assert store.read(BLOCK) == new(old).read(BLOCK) == expected
    assert leftovers(old) == []


def test_while_it_is_written_beside_it_can_be_read_and_cut_and_removed(old: Path) -> None:
    store = new(old)
    node = store.node(BLOCK)
    work = rewrite.rewrite(store.files, node)
    assert next(work) is None
    assert bytes(store.files.read(node, 100, 50)) == LONG[100:150]
    assert store.files.truncate(node, 10)
    next(work)
    store.tree.unlink(store.tree.root, BLOCK)
    store.files.forget(node.ino)
    assert steps.run(work) is False
    assert leftovers(old) == []
    assert node.fd == -1
    assert node.ino not in store.tree.nodes


def test_stopping_leaves_the_file_as_it_was(old: Path) -> None:
    store = new(old)
    work = rewrite.rewrite(store.files, store.node(BLOCK))
    next(work)
    work.close()
    assert leftovers(old) == []
    assert header(old, BLOCK) == OLD
    assert (store.files.frozen, store.files.copying, store.files.watched) == (None, None, None)
    assert store.read(BLOCK) == LONG


# --- ends in the middle -------------------------------------------------------------------------------------------

CALLS = (
    "open",
    "close",
    "preadv",
    "pwrite",
    "ftruncate",
    "fsync",
    "fdatasync",
    "rename",
    "unlink",
    "utime",
    "fallocate",
)


class Ending(Backing):
    """A disk below a process that ends itself at its n-th call, or whose n-th call of one kind fails."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.failing = ""
        self.code = errno.EIO
        for name in CALLS:
            setattr(self, name, self._wrapped(name, getattr(Backing, name)))

    def _wrapped(self, name: str, call):
        def wrapped(*args, **kwargs):
            if self.left is not None and name in (self.failing or CALLS):
                self.left -= 1
                if self.left < 0 and not self.failing:
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.left == -1:
                    raise OSError(self.code, os.strerror(self.code))
            return call(*args, **kwargs)

        return wrapped


def in_a_process_that_ends(path: Path, name: bytes, call: int) -> bool:
    """Rewrite in a child that is killed at its `call`-th system call. Returns whether it was."""
    child = os.fork()
    if not child:
        code = 1
        try:
            io = Ending()
            store = new(path, io)
            node = store.node(name)
            io.left = call
            steps.run(rewrite.rewrite(store.files, node))
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in {0, -signal.SIGKILL}
    return code != 0


@pytest.mark.parametrize(("name", "data"), [(BLOCK, LONG), (META, SHORT)])
def test_killed_at_every_step_the_file_has_its_content(old: Path, name: bytes, data: bytes) -> None:
    path = old / os.fsdecode(name)
    before, seen, call = path.read_bytes(), set(), 0
    while True:
        path.write_bytes(before)
        os.utime(path, ns=(MTIME, MTIME))
        killed = in_a_process_that_ends(old, name, call)
        store = new(old)
        assert store.read(name) == data, f"killed at call {call}"
        assert leftovers(old) == []
        seen.add((header(old, name), bool(store.recovered)))
        if store.recovered:
            assert path.stat().st_mtime_ns == MTIME
        if not killed:
            break
        call += 1
    assert (OLD, False) in seen
    assert (NEW, False) in seen
    assert ((NEW, True) in seen) == (name == BLOCK)
    assert call > 5


@pytest.mark.parametrize("call", ["pwrite", "fsync", "fallocate"])
def test_no_room_leaves_the_file_as_it_was(old: Path, call: str) -> None:
    io = Ending()
    store = new(old, io)
    io.left, io.failing, io.code = 0, (call,), errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        store.rewrite(BLOCK)
    assert leftovers(old) == []
    assert header(old, BLOCK) == OLD
    assert store.read(BLOCK) == LONG
    assert store.rewrite(BLOCK)


def test_room_that_is_promised_to_others_is_not_taken(old: Path, monkeypatch) -> None:
    store = new(old)
    monkeypatch.setattr(Reserve, "available", lambda _self: 4 << 20)
    with pytest.raises(OSError, match="No space left"):
        store.rewrite(BLOCK)
    assert leftovers(old) == []
    assert store.rewrite(META), "one page needs no room"


def test_a_disk_that_fails_during_the_copying_freezes_the_file_until_the_next_start(old: Path, caplog) -> None:
    io = Ending()
    store = new(old, io)
    work = rewrite.rewrite(store.files, store.node(BLOCK))

    def fail_when_it_is_copied() -> None:
        if store.files.copying is not None and io.left is None:
            io.left, io.failing = 0, ("pwrite",)

    with pytest.raises(UnfinishedError):
        steps.run(work, between=fail_when_it_is_copied)
    assert "rewriting it was interrupted" in caplog.text
    assert len(leftovers(old)) == 1
    with pytest.raises(OSError, match="Input/output error"):
        store.files.write(store.node(BLOCK), 0, b"x", cached=False)
    again = new(old)
    assert len(again.recovered) == 1
    assert (header(old, BLOCK), again.read(BLOCK)) == (NEW, LONG)


# --- a whole store ------------------------------------------------------------------------------------------------


def test_all_files_that_are_stale_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    store = Store(tmp_path)
    for i in range(5):
        store.write(b"file-%d" % i, bytes([i]) * 5000 * i)
    os.link(tmp_path / "file-3", tmp_path / "a/b/also-3")
    os.symlink("file-3", tmp_path / "a/symlink")
    os.mkfifo(tmp_path / "a/fifo")
    done = new(tmp_path)
    done.write(b"file-new", b"of the new epoch")
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("file-*")}
    progress = Progress()
    steps.run(reencrypt(done.files, progress))
    assert (progress.state, progress.files, progress.files_done, progress.failed) == ("done", 4, 4, [])
    assert progress.bytes == progress.bytes_done > 0
    after = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("file-*")}
    assert {name for name in before if before[name] == after[name]} == {"file-0", "file-new"}
    for i in range(5):
        assert done.read(b"file-%d" % i) == bytes([i]) * 5000 * i
    again = Progress()
    steps.run(reencrypt(done.files, again))
    assert (again.state, again.files) == ("done", 0)


def test_a_damaged_file_is_named_and_left_and_the_others_are_done(old: Path, caplog) -> None:
    raw = bytearray((old / "1.blk").read_bytes())
    raw[8192 + 100] ^= 1
    (old / "1.blk").write_bytes(raw)
    store = new(old)
    progress = Progress()
    steps.run(reencrypt(store.files, progress))
    assert progress.state == "incomplete"
    assert progress.failed == [("1.blk", "Input/output error")]
    assert "1.blk page 2 does not authenticate" in caplog.text
    assert (old / "1.blk").read_bytes() == raw
    assert header(old, META) == NEW
    assert progress.as_json()["failed"] == [{"file": "1.blk", "error": "Input/output error"}]


def test_a_full_disk_ends_the_pass(old: Path, monkeypatch) -> None:
    store = new(old)
    monkeypatch.setattr(Reserve, "available", lambda _self: 0)
    progress = Progress()
    with pytest.raises(OSError, match="No space left"):
        steps.run(reencrypt(store.files, progress))
    assert not progress.over
