"""Whole stores in place: from plain or from nats-server's own encryption to sealed, and back, killed at every call."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import server_stores as stores
from disk import Disk
from othertimes import AfterCut
from powercut import SCALE, quick
from test_jetstream import unpack
from test_powercut_rewrite import Timed
from test_serverstore import export

from encfs_js import decrypt, encrypt, recordcheck
from encfs_js.backing import META, Backing
from encfs_js.errors import ConversionError, DamageFoundError, StoreIoError, WrongKeyError
from encfs_js.format import MAGIC, PAGE, Suite
from encfs_js.reencrypt import Progress
from encfs_js.sealed import FileKeys, SealedFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["quick"]
KEYS = [stores.KEY.encode()]
STREAM = "jetstream/$G/streams/SMALL"
FILE_KEYS = {1: bytes(range(32))}
MAC = b"m" * 32


class Dies(Backing):
    """Ends the process at the n-th call that could change something, as SIGKILL would; or has it refused."""

    def __init__(self, at: int, error: OSError | None = None) -> None:
        self.left = at
        self._error = error

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in CHANGES:
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                if self._error is None:
                    os._exit(KILLED)
                raise self._error
            return found(*args, **kwargs)

        return call


KILLED = 9
CHANGES = {
    "pwrite", "ftruncate", "fsync", "syncfs", "rename", "unlink", "fallocate", "utime", "chmod", "chown", "mkdir", "rmdir"
}  # fmt: skip


def killed(run: Callable[[], None]) -> None:
    """Run it in a process of its own, which has to be killed in it."""
    pid = os.fork()
    if not pid:
        try:
            run()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == KILLED


def file_keys() -> FileKeys:
    return FileKeys(FILE_KEYS.__getitem__, Suite.AES, 1)


def seal(store: Path, keys: list[bytes] | None, io: Backing | None = None, progress: Progress | None = None) -> None:
    io = io or Backing()
    encrypt.recover(io, str(store), MAC)
    encrypt.look(io, str(store), keys)
    encrypt.seal_all(io, str(store), keys, file_keys(), MAC, progress or Progress(), lambda: None)
    if keys is not None:
        encrypt.remove_keys(io, str(store))


def unseal(store: Path, io: Backing | None = None, progress: Progress | None = None) -> None:
    io = io or Backing()
    decrypt.look(io, str(store), file_keys(), lambda _: False)
    decrypt.open_all(io, str(store), file_keys(), progress or Progress(), lambda: None)


def files(store: Path) -> dict[str, Path]:
    found = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): path for path in found if META not in path.parts}


def plain_of(path: Path) -> bytes:
    """The content of a sealed file; an assertion for one that is not."""
    fd = os.open(path, os.O_RDONLY)
    try:
        file = SealedFile(Backing(), fd, file_keys())
        assert not file.pages or os.pread(fd, len(MAGIC), 0) == MAGIC
        return b"".join(bytes(file.read(at, PAGE)) for at in range(0, file.size, PAGE))
    finally:
        os.close(fd)


def begun(name: str, place: Path) -> tuple[Path, dict[str, bytes]]:
    """A kept store with an empty .encfs_js, and what each of its files is in the clear."""
    unpack(name, place / "store")
    export(place / "store", place / "plain", KEYS if "plain" not in name else [])
    expected = {path: file.read_bytes() for path, file in files(place / "plain").items()}
    shutil.rmtree(place / "plain")
    (place / "store" / META).mkdir(mode=0o700)
    return place / "store", expected


@pytest.mark.parametrize("name", ["2.15.1-plain", "2.15.1-chachapoly", "2.10.25-aes", "2.15.1-cluster-aes"])
def test_there_and_back(name: str, tmp_path: Path) -> None:
    store, expected = begun(name, tmp_path)
    for number, path in enumerate(files(store).values()):
        os.chmod(path, 0o600 if number % 2 else 0o440)
        os.utime(path, ns=(10**18 + number, 10**18 + number * 1001))
    before = {path: (found.stat().st_mode, found.stat().st_mtime_ns) for path, found in files(store).items()}
    progress = Progress()
    seal(store, None if "plain" in name else KEYS, progress=progress)
    assert {path: plain_of(found) for path, found in files(store).items()} == expected
    assert progress.files_done == sum(bool(content) for content in expected.values())
    kept = {path: before[path] for path in expected}
    assert {path: (found.stat().st_mode, found.stat().st_mtime_ns) for path, found in files(store).items()} == kept
    assert os.listdir(store / META) == []
    seal(store, None if "plain" in name else KEYS)  # once more: nothing to do

    sealed = {path: found.read_bytes() for path, found in files(store).items()}
    progress = Progress()
    unseal(store, progress=progress)
    assert {path: found.read_bytes() for path, found in files(store).items()} == expected
    assert {path: (found.stat().st_mode, found.stat().st_mtime_ns) for path, found in files(store).items()} == kept
    assert progress.files_done == sum(bool(content) for content in sealed.values())
    decrypt.forget(Backing(), str(store))
    assert sorted(os.listdir(store)) == ["jetstream"]


@pytest.mark.parametrize("name", ["2.15.1-plain", "2.15.1-chachapoly"])
def test_killed_at_every_call(name: str, quick: Path) -> None:
    keys = None if "plain" in name else KEYS
    origin, expected = begun(name, quick / "origin")
    calls = Dies(-1)
    store = quick / "store"
    shutil.copytree(origin, store)
    seal(store, keys, calls)
    whole = -1 - calls.left
    assert whole > 12 * len(expected)
    for at in range(1, whole + 1):
        shutil.rmtree(store)
        shutil.copytree(origin, store)
        killed(lambda at=at: seal(store, keys, Dies(at)))
        seal(store, keys)
        assert {path: plain_of(found) for path, found in files(store).items()} == expected, at
        assert os.listdir(store / META) == []


def test_killed_at_every_call_on_the_way_back(quick: Path) -> None:
    origin, expected = begun("2.15.1-plain", quick / "origin")
    seal(origin, None)
    calls = Dies(-1)
    store = quick / "store"
    shutil.copytree(origin, store)
    unseal(store, calls)
    for at in range(1, -calls.left):
        shutil.rmtree(store)
        shutil.copytree(origin, store)
        killed(lambda at=at: unseal(store, Dies(at)))
        found = files(store)
        assert {path: plain_of(f) if f.read_bytes()[:8] == MAGIC else f.read_bytes() for path, f in found.items()} == (
            expected
        ), at
        unseal(store)
        assert {path: f.read_bytes() for path, f in files(store).items()} == expected


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_every_call_refused_once(code: int, quick: Path) -> None:
    """What the disk refuses ends the command, and a repeated one does the rest."""
    origin, expected = begun("2.15.1-chachapoly", quick / "origin")
    store = quick / "store"
    for at in itertools.count(1, 3):
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(origin, store)
        io = Dies(at, OSError(code, os.strerror(code)))
        try:
            seal(store, KEYS, io)
        except OSError:
            pass
        else:
            if io.left > 0:
                break
        seal(store, KEYS)
        assert {path: plain_of(found) for path, found in files(store).items()} == expected, at
    assert at > 100


def cut(store: Path, run: Any, quick: Path) -> Any:
    """Record what `run` does to the store, and yield what a power cut after each call may have left, written out."""
    io = Timed(store)
    run(io)
    trace = io.trace
    disk, rng = Disk(trace), random.Random(7)
    seen = set()
    for number, op in enumerate(trace.ops[trace.base :]):
        disk.feed(op)
        for _ in range(SCALE):
            state = disk.crash(rng)
            key = (tuple(state.paths()), tuple(sorted(state.files.items())))
            if key in seen:
                continue
            seen.add(key)
            place = quick / "cut"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            yield number, place, AfterCut(trace.base, state, state.write_out(place), disk.inodes)


@pytest.mark.parametrize("name", ["2.15.1-plain", "2.15.1-chachapoly"])
def test_power_cut_at_every_call(name: str, quick: Path) -> None:
    keys = None if "plain" in name else KEYS
    store, expected = begun(name, quick / "origin")
    states = 0
    for number, place, io in cut(store, lambda io: seal(store, keys, io), quick):
        seal(place, keys, io)
        assert os.listdir(place / META) == []
        assert {path: plain_of(found) for path, found in files(place).items()} == expected, number
        states += 1
    assert states > 70


def test_power_cut_at_every_call_on_the_way_back(quick: Path) -> None:
    store, expected = begun("2.15.1-plain", quick / "origin")
    seal(store, None)
    states = 0
    for number, place, io in cut(store, lambda io: unseal(store, io), quick):
        unseal(place, io)
        assert {path: f.read_bytes() for path, f in files(place).items()} == expected, number
        states += 1
    assert states > 30


# --- what is refused, before anything is changed ----------------------------------------------------------------------


def unchanged(store: Path, keys: list[bytes] | None, problem: type[Exception], match: str) -> None:
    before = {path: found.read_bytes() for path, found in files(store).items()}
    with pytest.raises(problem, match=match):
        seal(store, keys)
    assert {path: found.read_bytes() for path, found in files(store).items()} == before


def test_a_wrong_key(tmp_path: Path) -> None:
    store, _ = begun("2.15.1-chachapoly", tmp_path)
    unchanged(store, [b"another"], WrongKeyError, "opens none of nats-server's key files")


def test_a_key_that_opens_a_part(tmp_path: Path) -> None:
    store, _ = begun("2.15.1-chachapoly", tmp_path)
    shutil.copy(store / STREAM / "meta.key", store / STREAM / "msgs/1.key")
    unchanged(
        store, KEYS, ConversionError, r"1 file cannot be read, so nothing was changed: .*msgs/1\.key: the key does"
    )


@pytest.mark.parametrize("name", ["meta.inf", "msgs/1.blk", "msgs/index.db"])
def test_damage(name: str, tmp_path: Path) -> None:
    store, _ = begun("2.15.1-chachapoly", tmp_path)
    file = store / STREAM / name
    file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))
    unchanged(store, KEYS, ConversionError, f"1 files? cannot be read, so nothing was changed: .*{name}")


def test_a_leftover_that_nobody_can_decrypt_goes(tmp_path: Path) -> None:
    store, expected = begun("2.15.1-chachapoly", tmp_path)
    (store / STREAM / "msgs/1.blk.tmp").write_bytes(b"torn" * 100)
    seal(store, KEYS)
    assert {path: plain_of(found) for path, found in files(store).items()} == expected


def test_a_sealed_block_is_never_taken_for_a_key_file_of_its_own(tmp_path: Path) -> None:
    """Key files are not removed while anything is not sealed."""
    store, _ = begun("2.15.1-chachapoly", tmp_path)
    with pytest.raises(ConversionError, match="is not sealed"):
        encrypt.remove_keys(Backing(), str(store))
    assert (store / STREAM / "meta.key").exists()


def test_no_room(tmp_path: Path) -> None:
    class Full(Backing):
        @staticmethod
        def statvfs(fd: int) -> Any:
            found = list(os.fstatvfs(fd))
            found[4] = 1  # f_bavail
            return os.statvfs_result(found)

    store, _ = begun("2.15.1-plain", tmp_path)
    with pytest.raises(StoreIoError, match=r"\d+ bytes of free disk space are needed meanwhile, and there are"):
        encrypt.look(Full(), str(store), None)


def test_damage_is_found_before_anything_is_opened(tmp_path: Path) -> None:
    store, _ = begun("2.15.1-plain", tmp_path)
    seal(store, None)
    file = store / STREAM / "msgs/1.blk"
    raw = bytearray(file.read_bytes())
    raw[1000] ^= 1
    file.write_bytes(raw)
    before = {path: found.read_bytes() for path, found in files(store).items()}
    with pytest.raises(DamageFoundError, match=r"damaged files: 1, so nothing was changed: .*1\.blk page 0"):
        unseal(store)
    assert {path: found.read_bytes() for path, found in files(store).items()} == before


def test_hard_links_and_content_that_looks_sealed_are_not_opened(tmp_path: Path) -> None:
    store, _ = begun("2.15.1-plain", tmp_path)
    seal(store, None)
    os.link(store / STREAM / "meta.inf", store / "second")
    with pytest.raises(ConversionError, match=r"has 2 names \(hard links\)"):
        unseal(store)
    (store / "second").unlink()
    cipher, path = file_keys(), store / "odd"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    SealedFile(Backing(), fd, cipher).write(0, MAGIC + b"and more")
    os.close(fd)
    with pytest.raises(ConversionError, match="odd: its plain content begins as a sealed file does"):
        unseal(store)


def test_symlinks_are_left_alone(tmp_path: Path) -> None:
    store, _ = begun("2.15.1-chachapoly", tmp_path)
    (tmp_path / "outside").write_bytes(b"not of the store")
    (store / STREAM / "link").symlink_to(tmp_path / "outside")
    seal(store, KEYS)
    assert (tmp_path / "outside").read_bytes() == b"not of the store"
    assert (store / STREAM / "link").is_symlink()


# --- the last look ----------------------------------------------------------------------------------------------------


def test_records_are_counted_and_judged(tmp_path: Path) -> None:
    store, _ = begun("2.15.1-plain", tmp_path)

    def read(entry: Any) -> bytes:
        return (store / os.fsdecode(entry.path)).read_bytes()

    found = recordcheck.check(Backing(), str(store), read, lambda: None)
    assert (found.damaged, found.indexed) == ([], found.streams)
    was = stores.read(store / STREAM, [])
    assert found.records >= len(was.records)
    file = store / STREAM / "msgs/1.blk"
    file.write_bytes(file.read_bytes()[:-3])
    again = recordcheck.check(Backing(), str(store), read, lambda: None)
    assert len(again.damaged) == 1
    assert "1.blk: byte " in again.damaged[0]
    assert again.records == found.records - 1
