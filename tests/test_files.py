"""Names and contents of a store without a mount: what the guard promises, and what a failing disk must not take away."""

from __future__ import annotations

import errno
import json
import logging
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from encfs_js import guard, keyring, keystore, redo, state, sweep, times
from encfs_js.backing import Backing
from encfs_js.errors import IntegrityError, StoreIoError
from encfs_js.files import Files
from encfs_js.format import Suite
from encfs_js.guard import Guard
from encfs_js.reserve import Reserve
from encfs_js.sealed import FileKeys
from encfs_js.tree import Tree

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KEY = b"a key for tests"
NOW = datetime(2026, 11, 24, tzinfo=UTC)
BLOCK = "streams/S/msgs/1.blk"


class Store:
    """A store in a directory, with its rooms wired as a mount wires them."""

    def __init__(self, path: Path, io: Backing, *, plaintext: bool, windows: tuple[tuple[int, int], ...] = ()) -> None:
        self.path = str(path)
        if not (path / ".encfs_js").exists():
            kdf = keyring.Kdf(1, 1, 64)
            mode = "read" if plaintext else "refuse"
            keystore.write(self.path, keyring.create(KEY, cipher=Suite.AES, plaintext=mode, kdf=kdf))
        self.keys = keyring.unlock(keystore.load(self.path)[0], KEY)
        self.tree = Tree(io, self.path, Guard(self.path), give_to_caller=False)
        run = state.State(clean=False, began=0, windows=windows)
        self.redo_key = self.keys.derive(redo.INFO)
        self.files = Files(
            self.tree, FileKeys(self.keys.volume_key, Suite.AES, 1), run, self.redo_key,
            Reserve(io, self.tree.meta_fd), lambda: NOW, plaintext=plaintext, writeback=True,
        )  # fmt: skip

    def node(self, path: str):
        node = self.tree.root
        for name in os.fsencode(path).split(b"/"):
            node, _ = self.tree.lookup(node, name)
        return node

    def recover(self) -> list[str]:
        return redo.recover(self.tree.io, self.tree.root_fd, self.tree.meta_fd, self.redo_key)


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., Store]:
    def make(io: Backing | None = None, *, plaintext: bool = False, **more) -> Store:
        return Store(tmp_path, io or Backing(), plaintext=plaintext, **more)

    (tmp_path / "account/streams/S/msgs").mkdir(parents=True)
    return make


def opened_block(opened: Store, top: Path):
    """The node of an empty block that is open for writing, and its backing file."""
    path = top / "account" / BLOCK
    path.touch()
    node = opened.node("account/" + BLOCK)
    opened.files.open(node, write=True)
    return node, path


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def test_guard_closes_again_when_the_damage_is_met_again(store, tmp_path: Path, caplog) -> None:
    opened = store()
    block = tmp_path / "account" / BLOCK
    block.touch()
    node = opened.node("account/" + BLOCK)
    opened.files.open(node, write=True)
    opened.files.write(node, 0, b"x" * 20_000, cached=True)
    flip(block, 4096 + 100)
    for _ in range(2):
        caplog.clear()
        with pytest.raises(IntegrityError):
            opened.files.read(node, 5000, 10)
        with pytest.raises(OSError, match="Read-only") as refused:
            opened.tree.unlink(opened.node("account/streams/S/msgs"), b"1.blk")
        assert refused.value.errno == errno.EROFS
        assert [r.levelno for r in caplog.records] == [logging.ERROR]
        assert [c.directory for c in guard.read(opened.path)] == [b"account/streams/S"]
        assert guard.clear(opened.path) == 1
    opened.tree.unlink(opened.node("account/streams/S/msgs"), b"1.blk")


def test_damaged_guard_file_is_a_clear_error(store, tmp_path: Path) -> None:
    store()
    for content in ("{", "[]", json.dumps({"closed": [{}]})):
        (tmp_path / ".encfs_js/guard").write_text(content)
        with pytest.raises(StoreIoError, match="guard") as found:
            guard.read(str(tmp_path))
        assert found.value.hint


class AfterCommit(Backing):
    """Fails the first call of one name that follows the rename of a redo file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.committed = self.failed = False

    def _call(self, name: str, call: Callable[..., object], *args: object, **more: object):
        if self.committed and not self.failed and name == self.name:
            self.failed = True
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*args, **more)

    def rename(self, *args, **more):
        self.committed = True
        os.rename(*args, **more)

    def pwrite(self, *args):
        return self._call("pwrite", os.pwrite, *args)

    def ftruncate(self, *args):
        return self._call("ftruncate", os.ftruncate, *args)

    def fsync(self, *args):
        return self._call("fsync", os.fsync, *args)

    def unlink(self, *args, **more):
        return self._call("unlink", os.unlink, *args, **more)


@pytest.mark.parametrize("name", ["fsync", "pwrite", "ftruncate", "unlink"])
def test_after_a_rewriting_that_failed_nothing_is_written_that_the_next_start_would_undo(store, tmp_path, name) -> None:
    text = os.urandom(2_000_000)
    block = tmp_path / "account" / BLOCK
    block.write_bytes(text)
    opened = store(AfterCommit(name), plaintext=True)
    node = opened.node("account/" + BLOCK)
    opened.files.open(node, write=True)
    for change in (
        lambda: opened.files.write(node, len(text), b"more", cached=False),
        lambda: opened.files.write(node, 0, b"again", cached=False),
        lambda: opened.files.truncate(node, 10),
        lambda: opened.files.truncate(node, 0),
    ):
        with pytest.raises(OSError) as failed:
            change()
        assert failed.value.errno == errno.EIO
    # Nobody else may get the inode number while the redo file names it.
    opened.files.release(node, write=True, direct=False)
    assert node.fd >= 0
    again = store(plaintext=True)
    assert len(again.recover()) == 1
    node = again.node("account/" + BLOCK)
    assert again.files.size(node) == len(text)
    assert b"".join(bytes(again.files.read(node, at, 1 << 20)) for at in range(0, len(text), 1 << 20)) == text


def test_a_gap_before_a_write_is_filled_in_steps(store, tmp_path: Path) -> None:
    """Gigabytes of sealed zeros take seconds, in which the others want to be served."""
    opened = store()
    node, _ = opened_block(opened, tmp_path)
    sizes = []
    while not (done := opened.files.write(node, 10_000, b"end", cached=True, most=4096)):
        sizes.append(opened.files.size(node))
    assert (sizes, done) == ([4096, 8192], 3)
    assert bytes(opened.files.read(node, 0, 20_000)) == bytes(10_000) + b"end"
    assert opened.files.write(node, 5, b"x", cached=True, most=1) == 1, "no gap"


def test_sweep_that_could_not_look_says_so(store, tmp_path: Path) -> None:
    class Unreadable(Backing):
        def open(self, path, flags, mode=0o777, *, dir_fd=None):
            if path == b"account/bad" and not flags & os.O_PATH:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return os.open(path, flags, mode, dir_fd=dir_fd)

    (tmp_path / "account/bad").touch()
    always = ((0, 2**62),)
    opened = store(Unreadable(), windows=always)
    list(sweep.sweep(opened.tree, opened.files))
    assert opened.files.not_swept == 1
    opened = store(windows=always)
    list(sweep.sweep(opened.tree, opened.files))
    assert opened.files.not_swept == 0


def test_mtime_of_a_cached_write_reaches_the_backing_file_when_it_is_closed(store, tmp_path: Path) -> None:
    opened = store()
    node, path = opened_block(opened, tmp_path)
    opened.files.write(node, 0, b"x", cached=True)
    found = opened.tree.stat(node)
    kept = found.st_mtime_ns + 1_000_001
    times.flushed(opened.tree, node, found, kept)
    assert path.stat().st_mtime_ns == found.st_mtime_ns, "an fsync now needs no journal commit"
    assert times.mtime_ns(node, opened.tree.stat(node)) == kept, "what the mount shows is the kernel's"
    opened.files.release(node, write=True, direct=False)
    assert path.stat().st_mtime_ns == kept
    assert node.mtime_ns is None


def test_mtime_that_is_far_from_the_backing_files_is_set_at_once(store, tmp_path: Path) -> None:
    opened = store()
    node, path = opened_block(opened, tmp_path)
    times.flushed(opened.tree, node, opened.tree.stat(node), 5)
    assert path.stat().st_mtime_ns == 5
    opened.files.release(node, write=True, direct=False)


def test_mtime_a_disk_that_refuses_it_does_not_keep_a_file_from_closing(store, tmp_path: Path, caplog) -> None:
    class Refusing(Backing):
        def utime(self, *_args, **_more) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    opened = store(Refusing())
    node, _ = opened_block(opened, tmp_path)
    times.flushed(opened.tree, node, opened.tree.stat(node), opened.tree.stat(node).st_mtime_ns + 1)
    opened.files.release(node, write=True, direct=False)
    assert node.fd == -1
    assert "could not be set: Input/output error" in caplog.text


def test_a_descriptor_keeps_its_number_when_a_file_is_opened_for_writing_as_well(store, tmp_path: Path) -> None:
    """A thread may be syncing it at that moment."""

    class Grudging(Backing):
        refusing = True

        def open(self, path, flags, *args, **more):
            if self.refusing and flags & os.O_RDWR:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
            return os.open(path, flags, *args, **more)

    (tmp_path / "account" / BLOCK).touch()
    plain = store()
    plain.files.open(plain.node("account/" + BLOCK), write=True)
    plain.files.write(plain.node("account/" + BLOCK), 0, b"before", cached=True)
    plain.files.close_all()
    io = Grudging()
    io.refusing = False
    opened = store(io)
    io.refusing = True
    node = opened.node("account/" + BLOCK)
    opened.files.open(node, write=False)
    assert bytes(opened.files.read(node, 0, 9)) == b"before"
    number, before = node.fd, len(os.listdir("/proc/self/fd"))
    assert not node.writable
    io.refusing = False
    opened.files.open(node, write=True)
    opened.files.write(node, 0, b"after!", cached=True)
    assert (node.fd, node.writable, len(os.listdir("/proc/self/fd"))) == (number, True, before)
    assert bytes(opened.files.read(node, 0, 9)) == b"after!"
    opened.files.close_all()
