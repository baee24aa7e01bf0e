"""The read-only plaintext view of a store that nats-server has encrypted itself."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import time
from typing import TYPE_CHECKING

import mounts
import pytest
import server_stores as stores
import views
from test_jetstream import VECTORS, unpack
from test_serverstore import export

from encfs_js import jetstream, serverkeys, view, viewtree
from encfs_js.backing import Backing
from encfs_js.errors import CipherMissingError, FormatError, WrongKeyError
from encfs_js.format import Suite
from encfs_js.tree import ROOT
from encfs_js.viewtree import ViewTree

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from encfs_js.viewtree import Handle

KEYS = [stores.KEY.encode()]
STREAM = "jetstream/$G/streams/SMALL"
VECTOR = "2.15.1-chachapoly"
mount = pytest.mark.mount
if mounts.needs_fuse():
    mount = pytest.mark.skip(reason=mounts.needs_fuse())
if_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    unpack(VECTOR, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def plain(store: Path, tmp_path: Path) -> dict[str, bytes]:
    """What the view has to show: path to content."""
    export(store, tmp_path / "plain")
    return mounts.contents(tmp_path / "plain")


def block_of(store: Path) -> Path:
    return min((store / STREAM / "msgs").glob("*.blk"))


def keyed_block(store: Path, content: bytes, suite: Suite, seed: int = 1) -> None:
    """Give the store a block of that content, with a key file of its own, written in place as nats-server does it."""
    block = block_of(store)
    asset = serverkeys.stream("$G", "SMALL").block(int(block.stem))
    raw, opened = serverkeys.new_key_file(KEYS[0], asset, suite, random.Random(seed).randbytes)
    temporary = block.with_suffix(".key.tmp")
    temporary.write_bytes(raw)
    temporary.rename(block.with_suffix(".key"))
    with open(block, "r+b") as file:
        file.truncate(0)
        file.write(serverkeys.Keystream(opened).xor(content))


# --- what it shows ----------------------------------------------------------------------------------------------------


@mount
@pytest.mark.parametrize("name", VECTORS)
def test_a_kept_store(name: str, tmp_path: Path) -> None:
    unpack(name, tmp_path / "store")
    export(tmp_path / "store", tmp_path / "plain")
    expected = mounts.contents(tmp_path / "plain")
    with views.shown(tmp_path / "store", tmp_path / "mnt") as shown:
        assert mounts.contents(shown.path) == expected
        for path, content in expected.items():
            here, there = os.stat(shown.path / path), os.stat(tmp_path / "store" / path)
            assert here.st_size == len(content), path
            assert (here.st_ino, here.st_mode, here.st_uid, here.st_mtime_ns) == (
                there.st_ino, there.st_mode, there.st_uid, there.st_mtime_ns
            )  # fmt: skip
            with open(shown.path / path, "rb", buffering=0) as file:
                for at in (0, 1, 63, len(content) // 2, max(len(content) - 3, 0), len(content), len(content) + 9):
                    assert os.pread(file.fileno(), 100, at) == content[at : at + 100], (path, at)
        assert sorted(os.listdir(shown.path)) == sorted(os.listdir(tmp_path / "store"))
    told = ["nothing in it is encrypted"] if name.endswith("plain") else []
    assert [
        line for line in shown.log().splitlines() if "warning" in line.lower() and not any(t in line for t in told)
    ] == []
    assert not shown.complaints()
    assert all(text in shown.log() for text in told)


@mount
def test_key_files_do_not_exist(store: Path, tmp_path: Path) -> None:
    keys = [str(path.relative_to(store)) for path in store.rglob("*.key")]
    assert len(keys) > 3
    with views.shown(store, tmp_path / "mnt") as shown:
        assert not list(shown.path.rglob("*.key"))
        for path in keys:
            with pytest.raises(FileNotFoundError):
                os.lstat(shown.path / path)


@mount
def test_nothing_can_be_changed(store: Path, tmp_path: Path) -> None:
    before = mounts.snapshot(store)
    file = f"{STREAM}/meta.inf"

    def refused(root: Path) -> None:
        for change in (
            lambda: os.open(root / file, os.O_RDWR),
            lambda: os.open(root / file, os.O_WRONLY | os.O_TRUNC),
            lambda: os.open(root / "new", os.O_WRONLY | os.O_CREAT),
            lambda: os.truncate(root / file, 3),
            lambda: os.chmod(root / file, 0o777),
            lambda: os.utime(root / file),
            lambda: os.unlink(root / file),
            lambda: os.mkdir(root / "new"),
            lambda: os.rmdir(root / STREAM / "obs"),
            lambda: os.symlink("x", root / "new"),
            lambda: os.link(root / file, root / "new"),
            lambda: os.rename(root / file, root / "new"),
            lambda: os.mkfifo(root / "new"),
        ):
            with pytest.raises(OSError, match="Read-only file system") as problem:
                change()
            assert problem.value.errno == errno.EROFS

    with views.shown(store, tmp_path / "mnt") as shown:
        with open("/proc/self/mountinfo", encoding="utf-8") as file_of_mounts:
            options = next(line for line in file_of_mounts if f" {shown.path} " in line).split(" ")[5]
        assert {"ro", "nosuid", "nodev", "noexec"} <= set(options.split(","))
        refused(shown.path)
        with pytest.raises(OSError) as problem:  # getxattr: never ENODATA
            os.getxattr(shown.path / file, "user.x")
        assert problem.value.errno == errno.EOPNOTSUPP
        if (
            os.geteuid() == 0
            and not subprocess.run(
                ["mount", "-i", "-o", "remount,rw", str(shown.path)], capture_output=True, check=False
            ).returncode
        ):
            refused(shown.path)
    assert mounts.snapshot(store) == before
    assert not shown.complaints()


@mount
def test_symlinks_are_shown_and_not_followed(store: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_bytes(b"not of the store")
    os.symlink("../../../../outside/secret", store / STREAM / "link")
    os.symlink(tmp_path / "outside", store / STREAM / "obs/away")
    os.symlink("meta.key", store / STREAM / "tokey")
    os.mkfifo(store / STREAM / "pipe")
    key = (store / STREAM / "meta.key").read_bytes()
    (tmp_path / "outside/key").write_bytes(key)
    (store / STREAM / "obs/worker/meta.key").unlink()
    os.symlink(tmp_path / "outside/key", store / STREAM / "obs/worker/meta.key")
    with views.shown(store, tmp_path / "mnt") as shown:
        stream = shown.path / STREAM
        assert os.readlink(stream / "link") == "../../../../outside/secret"
        assert os.readlink(stream / "obs/away") == str(tmp_path / "outside")
        assert stat.S_ISFIFO(os.lstat(stream / "pipe").st_mode)
        with pytest.raises(FileNotFoundError):  # followed by the kernel, inside the view
            (stream / "tokey").read_bytes()
        assert views.problem(stream / "obs/worker/meta.inf") == errno.ELOOP
        assert views.problem(stream / "meta.inf") == 0


@mount
def test_a_file_with_two_names(store: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    """One of them is where nats-server would decrypt it, and the other is not."""
    block = block_of(store)
    os.link(block, store / "backup.blk")
    with views.shown(store, tmp_path / "mnt") as shown:
        there = shown.path / block.relative_to(store)
        for _ in range(3):
            assert there.read_bytes() == plain[str(block.relative_to(store))]
            assert (shown.path / "backup.blk").read_bytes() == block.read_bytes()
        assert os.stat(there).st_ino != os.stat(shown.path / "backup.blk").st_ino


@mount
@if_root
@pytest.mark.root
def test_another_file_system_is_not_entered(store: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    obs = store / STREAM / "obs"
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(obs)], check=True)
    try:
        (obs / "there").write_bytes(b"elsewhere")
        with views.shown(store, tmp_path / "mnt") as shown:
            assert "obs" in os.listdir(shown.path / STREAM)
            with pytest.raises(OSError) as problem:
                os.listdir(shown.path / STREAM / "obs")
            assert problem.value.errno == errno.EIO
            assert views.problem(shown.path / STREAM / "obs/there") == errno.EIO
            assert (shown.path / STREAM / "meta.inf").read_bytes() == plain[f"{STREAM}/meta.inf"]
        assert f"{STREAM}/obs: another file system is mounted there" in shown.log()
    finally:
        subprocess.run(["umount", str(obs)], check=True)


# --- what cannot be decrypted -----------------------------------------------------------------------------------------


@mount
def test_damage_is_an_error_that_the_log_names(store: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    block = block_of(store)
    damaged = {
        f"{STREAM}/meta.inf": store / STREAM / "meta.inf",
        f"{STREAM}/obs/worker/o.dat": store / STREAM / "obs/worker/o.dat",
        f"{STREAM}/msgs/index.db": store / STREAM / "msgs/index.db",
        str(block.relative_to(store)): block.with_suffix(".key"),
        "jetstream/$G/streams/PACKED/msgs/1.blk": None,
    }
    for path in damaged.values():
        if path is None:
            (store / "jetstream/$G/streams/PACKED/msgs/1.key").unlink()
        else:
            mounts.flip(path, path.stat().st_size // 2)
    with views.shown(store, tmp_path / "mnt") as shown:
        listed = {str(path.relative_to(shown.path)) for path in mounts.files(shown.path)}
        assert listed == set(plain)
        for _ in range(2):
            for path, content in plain.items():
                if path in damaged:
                    assert views.problem(shown.path / path) == errno.EIO, path
                elif path == f"{STREAM}/meta.sum":  # of a meta.inf that is not as it was
                    assert (shown.path / path).read_bytes() == (store / path).read_bytes()
                else:
                    assert (shown.path / path).read_bytes() == content, path
    for path in damaged:
        named = [line for line in shown.complaints() if line.startswith(f"encfs-js: ERROR: {path}: ")]
        assert len(named) == 1, shown.log()
        assert "EIO" in named[0]
    assert stores.KEY not in shown.log()
    mended = shutil.copytree(store, tmp_path / "mended", symlinks=True)
    mounts.flip(mended / STREAM / "meta.inf", (mended / STREAM / "meta.inf").stat().st_size // 2)
    with views.shown(mended, tmp_path / "mnt") as shown:
        assert (shown.path / STREAM / "meta.inf").read_bytes() == plain[f"{STREAM}/meta.inf"]


@mount
def test_leftovers_are_shown_if_they_can_be_decrypted(store: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    block = block_of(store)
    good, bad = block.with_name(f"{block.name}.tmp"), store / STREAM / "meta.inf.tmp"
    shutil.copyfile(block, good)
    bad.write_bytes(b"half of it")
    (store / STREAM / "meta.key.tmp").write_bytes(b"a key")
    with views.shown(store, tmp_path / "mnt") as shown:
        for _ in range(2):
            assert (shown.path / good.relative_to(store)).read_bytes() == plain[str(block.relative_to(store))]
            assert sorted(os.listdir(shown.path / STREAM)) == ["meta.inf", "meta.sum", "msgs", "obs"]
            assert views.problem(shown.path / bad.relative_to(store)) == errno.ENOENT
    assert shown.log().count("not shown") == 1
    assert not shown.complaints()


def test_names_do_not_break_the_log() -> None:
    assert viewtree.one_line(os.fsdecode(b"a\nERROR: b\xff\x1b[2J")) == "a\\nERROR: b\\udcff\\x1b[2J"


# --- keys -------------------------------------------------------------------------------------------------------------


@mount
def test_a_wrong_key_mounts_nothing(store: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    before = mounts.snapshot(store)
    said = mounts.run("view", store, tmp_path / "mnt", key="another", code=12)
    assert "the key does not open it" in said.stderr
    assert "another\n" not in said.stderr
    assert mounts.entry_at(tmp_path / "mnt") is None
    mounts.run("view", store, tmp_path / "mnt", key=None, code=11)
    assert mounts.entry_at(tmp_path / "mnt") is None
    assert mounts.snapshot(store) == before


@mount
def test_both_keys_and_one_of_them(store: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    """A block has the new key already, all the rest the old one."""
    block = block_of(store)
    name = str(block.relative_to(store))
    asset = serverkeys.stream("$G", "SMALL").block(int(block.stem))
    raw, seed = serverkeys.new_key_file(b"the new one", asset, Suite.AES, os.urandom)
    block.with_suffix(".key").write_bytes(raw)
    block.write_bytes(serverkeys.Keystream(seed).xor(plain[name]))
    (tmp_path / "old").write_text(stores.KEY)
    (tmp_path / "old").chmod(0o600)
    (tmp_path / "yaml").write_text(json.dumps({"jetstream": {"key": "the new one", "prev_key": stores.KEY}}))
    (tmp_path / "yaml").chmod(0o600)
    for options in (("--prev-key-file", tmp_path / "old"), ("--config", tmp_path / "yaml")):
        with views.shown(store, tmp_path / "mnt", *options, key="the new one") as shown:
            assert mounts.contents(shown.path) == plain
        assert not shown.complaints()
    with views.shown(store, tmp_path / "mnt", key=stores.KEY) as shown:
        for path, content in plain.items():
            if path == name:
                assert views.problem(shown.path / path) == errno.EIO
            else:
                assert (shown.path / path).read_bytes() == content
        assert f"WARNING: {name.replace('.blk', '.key')}: the key does not open it" in shown.log()


def test_whether_keys_open_key_files(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = view.key_files(Backing(), str(store))
    assert {os.fsdecode(path) for path, _ in found} == {str(path.relative_to(store)) for path in store.rglob("*.key")}
    assert view.check_keys(found, KEYS) == []
    with pytest.raises(WrongKeyError):
        view.check_keys(found, [b"another"])
    assert view.check_keys([], []) == []
    cut = [file._replace(raw=b"short") for file in found]
    assert {type(problem) for problem in view.check_keys(cut, KEYS)} == {FormatError}
    assert [str(p) for p in view.check_keys([*found, cut[0]._replace(raw=bytes(72))], KEYS)] == [
        f"{os.fsdecode(found[0].path)}: the key does not open it"
    ]

    def refuses(*_: object) -> None:
        raise CipherMissingError("this host refuses chacha")

    monkeypatch.setattr(serverkeys, "open_key_file", refuses)
    with pytest.raises(CipherMissingError):
        view.check_keys(found, KEYS)


# --- random access and change -----------------------------------------------------------------------------------------


class Counted(Backing):
    """Counts the bytes that are read."""

    def __init__(self) -> None:
        self.bytes = 0

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:  # type: ignore[override]
        got = os.preadv(fd, buffers, offset)
        self.bytes += got
        return got


class Direct:
    """The tree of a view without a mount: what the kernel would ask."""

    def __init__(self, store: Path, io: Backing | None = None) -> None:
        self.tree = ViewTree(io or Backing(), str(store), KEYS)

    def number(self, path: str) -> int:
        number = ROOT
        for name in path.split("/"):
            found = self.tree.lookup(number, name.encode())
            self.tree.remember(found.number, number, name.encode())
            number = found.number
        return number

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Handle]:
        handle = self.tree.open(self.number(path))
        try:
            yield handle
        finally:
            self.tree.close(handle)

    def read(self, handle: Handle, offset: int = 0, size: int = 1 << 30) -> bytes:
        return bytes(self.tree.read(handle, offset, size))


@pytest.mark.parametrize("suite", [Suite.CHACHAPOLY, Suite.AES])
def test_a_part_of_a_block_is_read_without_the_rest(suite: Suite, store: Path, plain: dict[str, bytes]) -> None:
    name = str(block_of(store).relative_to(store))
    content = plain[name] + random.Random(1).randbytes(24 << 20)
    keyed_block(store, content, suite)
    io = Counted()
    direct = Direct(store, io)
    with direct.open(name) as handle:
        opening = io.bytes  # of its head, which says whether it is encrypted
        assert opening < 1 << 18
        for at in (0, 5, 17 << 20, len(content) - 10):
            assert direct.read(handle, at, 4096) == content[at : at + 4096]
        assert io.bytes - opening <= 4 * 4096
        assert direct.read(handle, 0, 1 << 20) == content[: 1 << 20]
    io.bytes = 0
    assert direct.tree.stat(direct.number(name)).size == len(content)
    assert io.bytes == 0


def test_the_size_of_a_file_is_found_out_once(store: Path, plain: dict[str, bytes]) -> None:
    io = Counted()
    direct = Direct(store, io)
    number = direct.number(f"{STREAM}/meta.inf")
    once = io.bytes
    assert once > 0
    for _ in range(3):
        assert direct.tree.stat(number).size == len(plain[f"{STREAM}/meta.inf"])
    assert io.bytes == once
    os.utime(store / STREAM / "meta.inf")
    assert direct.tree.stat(number).size == len(plain[f"{STREAM}/meta.inf"])
    assert io.bytes > once


def test_what_takes_long_is_left_to_a_thread(store: Path, plain: dict[str, bytes]) -> None:
    name = str(block_of(store).relative_to(store))
    keyed_block(store, plain[name] + bytes(2 << 20), Suite.AES)
    direct = Direct(store)
    with direct.open(name) as handle:
        with pytest.raises(BlockingIOError):
            direct.tree.read(handle, 0, 1 << 20, wait=False)
        assert bytes(direct.tree.read(handle, 0, 4096, wait=False)) == (plain[name] + bytes(4096))[:4096]
    index = f"{STREAM}/msgs/index.db"
    with open(store / index, "ab") as file:
        file.write(bytes(1 << 20))  # no index.db any more, which only shows when it was read
    parent, number = direct.number(f"{STREAM}/msgs"), direct.number(index)
    os.utime(store / index)
    with pytest.raises(BlockingIOError):
        direct.tree.lookup(parent, b"index.db", wait=False)
    with pytest.raises(BlockingIOError):
        direct.tree.open(number, wait=False)
    assert direct.tree.lookup(parent, b"index.db").size == (store / index).stat().st_size


def test_a_block_that_grows_while_it_is_open(store: Path, plain: dict[str, bytes]) -> None:
    block = block_of(store)
    name = str(block.relative_to(store))
    asset = serverkeys.stream("$G", "SMALL").block(int(block.stem))
    keyed_block(store, plain[name], Suite.CHACHAPOLY)
    stream = serverkeys.Keystream(serverkeys.open_key_file(block.with_suffix(".key").read_bytes(), asset, KEYS, ""))
    last = list(jetstream.records(plain[name], f"SMALL-{block.stem}", name))[-1]
    record = plain[name][-last.length :]
    direct = Direct(store)
    with direct.open(name) as handle, open(store / name, "ab", buffering=0) as file:
        assert direct.read(handle) == plain[name]
        now = plain[name]
        for _ in range(3):
            file.write(stream.xor(record, len(now)))
            assert direct.read(handle, 2, 50) == now[2:52]
            now += record
            assert direct.read(handle, len(now) - 20, 4) == now[-20:-16]
            assert direct.read(handle) == now


def test_a_block_that_never_stops_growing(store: Path, plain: dict[str, bytes]) -> None:
    block = block_of(store)
    name = str(block.relative_to(store))
    keyed_block(store, plain[name], Suite.AES)

    class Busy(Backing):
        def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:  # type: ignore[override]
            got = os.preadv(fd, buffers, offset)
            with open(block, "ab") as file:
                file.write(b"x")
            return got

    direct = Direct(store, Busy())
    with direct.open(name) as handle:
        assert direct.read(handle).startswith(plain[name])
        assert direct.read(handle, 10, 10) == plain[name][10:20]


@pytest.mark.parametrize("before", ["other cipher", "other key", "in the clear", "empty"])
def test_a_block_that_gets_another_key_while_it_is_open(before: str, store: Path, plain: dict[str, bytes]) -> None:
    """nats-server converts in place: a new key file, then the block itself. Nothing of it may come out undecrypted."""
    block = block_of(store)
    name, key = str(block.relative_to(store)), block.with_suffix(".key")
    content = plain[name]
    match before:
        case "other cipher":
            keyed_block(store, content, Suite.AES)
        case "in the clear":
            block.write_bytes(content)
            key.unlink()
        case "empty":
            block.write_bytes(b"")
    direct = Direct(store)
    with direct.open(name) as handle:
        assert direct.read(handle) == (b"" if before == "empty" else content)
        keyed_block(store, content, Suite.CHACHAPOLY, seed=2)
        assert direct.read(handle, 3, 50) == content[3:53]
        assert direct.read(handle) == content
        key.unlink()
        os.utime(block)
        with pytest.raises(OSError) as problem:
            direct.read(handle)
        assert problem.value.errno == errno.EIO
        block.unlink()
        block.write_bytes(b"another file")
        with pytest.raises(OSError):
            direct.read(handle)


def test_a_block_that_is_replaced_while_it_is_open(store: Path, plain: dict[str, bytes]) -> None:
    """As a compaction does: who has it open reads on in the old one."""
    block = block_of(store)
    name = str(block.relative_to(store))
    direct = Direct(store)
    with direct.open(name) as handle:
        new = block.with_suffix(".new")
        new.write_bytes(block.read_bytes()[:100])
        new.rename(block)
        assert direct.read(handle) == plain[name]
        with pytest.raises(OSError) as problem:
            direct.tree.stat(handle.number)
        assert problem.value.errno == errno.ESTALE
    with direct.open(name) as handle:
        assert direct.read(handle) == plain[name][:100]


def test_the_table_knows_what_the_kernel_knows(store: Path) -> None:
    direct = Direct(store)
    tree = direct.tree
    first = direct.number(f"{STREAM}/meta.inf")
    assert direct.number(f"{STREAM}/meta.inf") == first
    assert len(tree._names) == len(f"{STREAM}/meta.inf".split("/"))
    tree.forget(first, 1)
    assert tree.stat(first).size
    tree.forget(first, 1)
    with pytest.raises(OSError) as problem:
        tree.stat(first)
    assert problem.value.errno == errno.ESTALE
    assert first not in tree._sizes
    (store / "jetstream/$G/streams/SMALL").rename(store / "jetstream/$G/streams/.SMALL")
    stream = next(number for number, (_, name) in tree._names.items() if name == b"SMALL")
    with pytest.raises(FileNotFoundError):
        tree.listing(stream)
    assert direct.number("jetstream/$G/streams/.SMALL") == stream
    assert b"meta.inf" in tree.listing(stream)
    # Two directories that have changed places, as an old table has them: in one another.
    tree._names[stream] = stream, b"SMALL"
    with pytest.raises(OSError) as problem:
        tree.listing(stream)
    assert problem.value.errno == errno.ESTALE


@mount
def test_a_file_that_grows_and_a_name_that_goes(store: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    block = block_of(store)
    name = str(block.relative_to(store))
    keyed_block(store, plain[name] * 2, Suite.AES)
    with views.shown(store, tmp_path / "mnt") as shown, open(shown.path / name, "rb", buffering=0) as file:
        assert file.read(1 << 20) == plain[name] * 2
        keyed_block(store, plain[name] * 3, Suite.CHACHAPOLY)
        assert file.read(1 << 20) == plain[name]
        mounts.until(lambda: os.fstat(file.fileno()).st_size == len(plain[name]) * 3, "the new size", 5)
        block.rename(block.with_name("99.blk.old"))
        mounts.until(lambda: not (shown.path / name).exists(), "the end of the name", 5)
        os.pread(file.fileno(), 10, 0)
        time.sleep(1.1)  # for longer than the kernel keeps attributes
        assert os.fstat(file.fileno()).st_size == len(plain[name]) * 3
    assert not shown.complaints()


# --- the process ------------------------------------------------------------------------------------------------------


@mount
def test_in_the_background(store: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    mountpoint, log = tmp_path / "mnt", tmp_path / "log"
    mountpoint.mkdir()
    try:
        assert mounts.run("view", store, mountpoint, "--log-file", log, key=stores.KEY).stderr == ""
        assert mounts.contents(mountpoint) == plain
        (told,) = json.loads(mounts.run("status", mountpoint, "--json", key=None).stdout)["mounts"]
        assert (told["kind"], told["serving"], told["store"], told["mountpoint"], told["read_only"]) == (
            "view", True, str(store), str(mountpoint), True
        )  # fmt: skip
        with open(f"/proc/{told['pid']}/cmdline", encoding="utf-8") as file:
            assert "view" in file.read()
        shown = mounts.run("status", mountpoint, key=None).stdout
        assert f"process {told['pid']} since 20" in shown
        assert "in the clear and read-only" in shown
        mounts.run("view", store, mountpoint, key=stores.KEY, code=19)
        mounts.run("reload", mountpoint, key=None, code=21)
        with open(mountpoint / STREAM / "meta.inf", "rb"):
            assert "in use" in mounts.run("umount", mountpoint, key=None, code=23).stderr
        for name in ("maps", "mem", "environ"):  # nobody but root can look at its memory
            assert os.stat(f"/proc/{told['pid']}/{name}").st_uid == 0
        mounts.run("umount", mountpoint, key=None)
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{told['pid']}/stat", encoding="utf-8") as file:
            assert file.read().rpartition(") ")[2][0] == "Z"  # where nobody reaps orphans
        assert mounts.entry_at(mountpoint) is None
        assert "is shown at" in log.read_text()
        assert "unmounted" in log.read_text()
    finally:
        mounts.abort(mounts.entry_at(mountpoint))
        mounts.detach(mountpoint)


@mount
def test_killed_it_leaves_a_dead_mount(store: Path, tmp_path: Path) -> None:
    with views.shown(store, tmp_path / "mnt") as shown:
        shown.process.kill()
        shown.process.wait(mounts.PATIENCE)
        with pytest.raises(OSError) as problem:
            os.listdir(shown.path)
        assert problem.value.errno == errno.ENOTCONN
        (told,) = json.loads(mounts.run("status", shown.path, "--json", key=None).stdout)["mounts"]
        assert (told["kind"], told["serving"], told["pid"]) == ("view", False, None)
        assert "nobody serves it" in mounts.run("status", shown.path, key=None).stdout
        mounts.run("umount", shown.path, key=None)
    with views.shown(store, tmp_path / "mnt") as shown:
        assert (shown.path / STREAM / "meta.inf").read_bytes()[:1] == b"{"


@mount
def test_signals_unmount_it(store: Path, tmp_path: Path) -> None:
    with views.shown(store, tmp_path / "mnt") as shown:
        shown.process.send_signal(signal.SIGTERM)
        assert shown.process.wait(mounts.PATIENCE) == 0
        assert mounts.entry_at(shown.path) is None
    with views.shown(store, tmp_path / "mnt") as shown:
        with open(shown.path / STREAM / "meta.inf", "rb") as file:
            shown.process.send_signal(signal.SIGTERM)
            mounts.until(lambda: "is busy" in shown.log(), "a word about it")
            assert file.read(1) == b"{"
        assert shown.process.wait(mounts.PATIENCE) == 0
        assert mounts.entry_at(shown.path) is None
    assert shown.log().count("is busy") == 1
    with views.shown(store, tmp_path / "mnt") as shown, open(shown.path / STREAM / "meta.inf", "rb") as file:
        shown.process.send_signal(signal.SIGINT)
        mounts.until(lambda: "is busy" in shown.log(), "a word about it")
        shown.process.send_signal(signal.SIGINT)
        mounts.until(lambda: mounts.entry_at(shown.path) is None, "the lazy end of the mount")
        assert file.read(1) == b"{"
        file.close()
        assert shown.process.wait(mounts.PATIENCE) == 0


@mount
def test_what_cannot_be_shown(store: Path, tmp_path: Path) -> None:
    mountpoint, sealed = tmp_path / "mnt", tmp_path / "sealed"
    mounts.run("view", store, mountpoint, key=stores.KEY, code=19)
    mountpoint.mkdir()
    mounts.run("view", tmp_path / "none", mountpoint, key=stores.KEY, code=14)
    mounts.run("view", store, store / "jetstream", key=stores.KEY, code=19)
    sealed.mkdir()
    mounts.init(sealed)
    said = mounts.run("view", sealed, mountpoint, code=16).stderr
    assert f"encfs-js mount {sealed} {mountpoint}" in said
    mounts.run("view", store, mountpoint, "--log-file", tmp_path / "none/log", key=stores.KEY, code=25)
    (mountpoint / "something").touch()
    mounts.run("view", store, mountpoint, key=stores.KEY, code=19)
    assert mounts.entry_at(mountpoint) is None


@mount
@if_root
@pytest.mark.root
def test_as_a_user(store: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    """Whom the files belong to needs no privilege, and lets nobody else in, not even root."""
    mountpoint, log = tmp_path / "mnt", tmp_path / "log"
    mountpoint.mkdir()
    log.touch()
    reachable = [path for path in (tmp_path, *tmp_path.parents) if not path.stat().st_mode & stat.S_IXOTH]
    for path in [mountpoint, log, *store.rglob("*"), store]:
        os.chown(path, mounts.NOBODY, mounts.NOBODY)
    modes = {path: path.stat().st_mode for path in reachable}
    for path in reachable:
        path.chmod(stat.S_IMODE(modes[path]) | stat.S_IXOTH)
    user = mounts.command_as_user(mounts.NOBODY)[-6:]
    assert user[0] == "setpriv"
    process = None
    try:
        with open(log, "wb") as out:
            process = subprocess.Popen(
                [*mounts.command_as_user(mounts.NOBODY), *mounts.COMMAND, "view", store, mountpoint, "--foreground"],
                env=mounts.environment(stores.KEY),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=mounts.ROOT,
            )
        find = ["nsenter", "-t", str(process.pid), "-m", *user, "cat", f"{mountpoint}/{STREAM}/meta.inf"]
        got = mounts.until(
            lambda: (
                process.poll() is not None
                or subprocess.run(find, capture_output=True, check=False, timeout=mounts.PATIENCE).stdout
            ),
            "the view of a user",
        )
        assert got == plain[f"{STREAM}/meta.inf"], log.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(mounts.PATIENCE) == 0, log.read_text()
    finally:
        if process is not None:
            process.kill()
            process.wait(mounts.PATIENCE)
        for path, mode in modes.items():
            path.chmod(stat.S_IMODE(mode))
