"""Stores carried over into another form, killed at every call that changes the disk, and everything that is refused."""

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
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mounts
import pytest
import server_stores as stores
from disk import Disk
from powercut import SCALE, quick
from sealed_files import Randomness
from test_jetstream import VECTORS, unpack
from test_powercut_rewrite import Timed
from test_serverstore import export

from encfs_js import convert, keyring, keystore, serverkeys, staging, state
from encfs_js.backing import META, Backing
from encfs_js.errors import FormatError, StoreIoError, StoreNotEmptyError, WrongKeyError
from encfs_js.format import Suite
from encfs_js.keydocument import Kdf
from encfs_js.sealed import FileKeys
from encfs_js.serverstore import Kind, place_of
from encfs_js.sides import Form, Side, UnreadableError, open_reader
from encfs_js.survey import survey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["quick"]
KEY = stores.KEY
STREAM = "jetstream/$G/streams/SMALL"
CHEAP = Kdf(1, 1, 8)
CHANGES = (
    "pwrite", "ftruncate", "fsync", "mkdir", "rmdir", "unlink", "rename", "renameat2", "symlink", "chmod", "chown", "utime"
)  # fmt: skip


@pytest.fixture
def ram() -> Iterator[Path]:
    """A directory in memory: thousands of fsyncs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


class KilledError(BaseException):
    """Nothing catches it."""


class Killed(Backing):
    """The n-th call that changes the disk does not come to it any more, nor does any after it."""

    def __init__(self, at: int = 1 << 30) -> None:
        self.at = at
        self.calls = 0
        for name in CHANGES:
            setattr(self, name, self._deadly(getattr(Backing, name)))

    def _dies(self) -> None:
        self.calls += 1
        if self.calls >= self.at:
            raise KilledError

    def _deadly(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def deadly(*args: Any, **kwargs: Any) -> Any:
            self._dies()
            return call(*args, **kwargs)

        return deadly

    def open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:  # type: ignore[override]
        if flags & os.O_CREAT:
            self._dies()
        return os.open(path, flags, *args, **kwargs)


class Failing(Killed):
    """The n-th call that changes the disk, and all after it, fail with an error."""

    def _dies(self) -> None:
        self.calls += 1
        if self.calls >= self.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def side_of(form: Form, store: str) -> Side:
    if form is Form.PLAIN:
        return Side(form)
    if form is Form.SERVER:
        return Side(form, server_keys=[KEY.encode()])
    keys = keystore.unlock_store(store, KEY.encode())[1]
    return Side(form, file_keys=FileKeys(keys.volume_key, keys.settings.cipher, keys.settings.epoch))


def target_of(goal: Form, target: Path, io: Backing) -> Callable[[staging.Stage], Side]:
    def opened(stage: staging.Stage) -> Side:
        if goal is not Form.SEALED:
            return side_of(goal, "")
        for store in (str(target), stage.path):
            if os.path.exists(os.path.join(store, ".encfs_js/keyring")):
                return side_of(goal, store)
        document = keyring.create(KEY.encode(), cipher=Suite.AES, plaintext="refuse", kdf=CHEAP)
        keystore.write(stage.path, document, backing=io)
        return side_of(goal, stage.path)

    return opened


def converted(io: Backing, source: Path, target: Path, origin: Form, goal: Form) -> convert.Result:
    wanted = {"source": str(source), "from": origin.value, "to": goal.value, "cipher": "aes"}
    work = convert.Conversion(
        io, str(source), str(target), wanted, side_of(origin, str(source)), target_of(goal, target, io), Suite.AES,
        survey(io, str(source)), os.urandom, convert.Progress(),
    )  # fmt: skip
    return convert.convert(work)


def plain(store: Path, form: Form) -> dict[str, bytes]:
    """The plain content of every file, and what every directory and symlink is."""
    side, found = side_of(form, str(store)), {}
    for directory, names, files in os.walk(store):
        for name in sorted(names + files):
            path = os.path.relpath(os.path.join(directory, name), store)
            if path.startswith((".encfs_js/", ".encfs_js")) or (
                form is Form.SERVER and place_of(path.encode()).kind is Kind.KEY
            ):
                continue
            full = store / path
            if full.is_symlink():
                found[path] = os.fsencode(os.readlink(full))
            elif full.is_dir():
                found[path] = b"directory"
            else:
                fd = os.open(directory, os.O_RDONLY)
                reader = open_reader(Backing(), side, fd, name.encode(), path.encode())
                found[path] = reader.all()
                reader.close()
                os.close(fd)
    return found


def small(place: Path) -> Path:
    """A plain store of a few files, one of them without bytes, with a symlink."""
    unpack("2.15.1-plain", place)
    shutil.rmtree(place / "jetstream/$G/streams/PACKED")
    (place / STREAM / "msgs/2.blk").write_bytes(b"")
    (place / "link").symlink_to("jetstream")
    return place


def metadata(store: Path) -> dict[str, tuple[int, int, int, int]]:
    found = {}
    for path in sorted(store.rglob("*")):
        info = path.lstat()
        found[str(path.relative_to(store))] = (info.st_mode, info.st_uid, info.st_gid, info.st_mtime_ns)
    return found


@pytest.mark.parametrize(
    ("origin", "goal"),
    [(Form.PLAIN, Form.SEALED), (Form.PLAIN, Form.SERVER), (Form.SERVER, Form.PLAIN), (Form.SEALED, Form.SERVER)],
)
def test_killed_at_every_call(origin: Form, goal: Form, ram: Path) -> None:
    """What is left never is half a store, SRC is as it was, and the same command does the rest."""
    source = small(ram / "plain")
    if origin is not Form.PLAIN:
        converted(Backing(), source, ram / "source", Form.PLAIN, origin)
        source = ram / "source"
    before, was, dressed = plain(source, origin), mounts.snapshot(source), metadata(source)
    count = Killed()
    converted(count, source, ram / "whole", origin, goal)
    assert count.calls > 60
    target = ram / "target"
    at, broken = 0, set()
    while True:
        at += 1
        io = Killed(at)
        try:
            result = converted(io, source, target, origin, goal)
        except KilledError:
            pass
        else:
            assert result.done
            break
        finally:
            assert mounts.snapshot(source) == was
        complete = target.exists() and not (target / staging.STAGE).exists() and "jetstream" in os.listdir(target)
        if complete:
            assert plain(target, goal) == before
            with pytest.raises(StoreNotEmptyError):
                converted(Backing(), source, target, origin, goal)
            shutil.rmtree(target)
            broken.add("complete")
            continue
        if target.exists():
            names = set(os.listdir(target)) - {staging.STAGE}
            if "jetstream" in names:
                now = plain(target, goal) if goal is not Form.SEALED or ".encfs_js" in names else None
                assert (
                    now is None
                    or {n: c for n, c in now.items() if not n.startswith(staging.STAGE)}.items() <= before.items()
                )
            else:
                assert not names - {"link"}
            broken.add("published" if "jetstream" in names else "staged")
        again = converted(Backing(), source, target, origin, goal)
        assert again.done, again
        assert not (target / staging.STAGE).exists()
        assert plain(target, goal) == before
        shutil.rmtree(target)
    assert at == count.calls + 1
    assert broken == {"staged", "published", "complete"}
    now = metadata(target)
    assert {name: now[name] for name in dressed if name in now and ".encfs_js" not in name} == {
        name: info for name, info in dressed.items() if ".encfs_js" not in name and not name.endswith(".key")
    }


def test_killed_again_and_again(ram: Path) -> None:
    """Each run goes on where the last one was, and in the end it is done."""
    source, target, runs = small(ram / "source"), ram / "target", 0
    draw = random.Random(5)
    while not target.exists() or staging.STAGE in os.listdir(target):
        runs += 1
        assert runs < 200
        with contextlib.suppress(KilledError):
            converted(Killed(draw.randrange(30, 110)), source, target, Form.PLAIN, Form.SERVER)
    assert runs >= 3
    assert plain(target, Form.SERVER) == plain(source, Form.PLAIN)


def test_a_full_disk(ram: Path) -> None:
    source = small(ram / "source")
    before = plain(source, Form.PLAIN)
    for at in range(1, 100, 4):
        with pytest.raises(OSError, match="No space left"):
            converted(Failing(at), source, ram / "target", Form.PLAIN, Form.SERVER)
        if (ram / "target").exists():
            assert "jetstream" not in os.listdir(ram / "target")
        assert converted(Backing(), source, ram / "target", Form.PLAIN, Form.SERVER).done
        assert plain(ram / "target", Form.SERVER) == before
        shutil.rmtree(ram / "target")


def test_what_a_power_cut_undid_is_written_again(ram: Path) -> None:
    """A key file that is gone, bytes that never came to the disk, a file that was in the stage and is not in SRC any more."""
    source = small(ram / "source")
    stage = ram / "target" / staging.STAGE / "tree"
    counted = Killed()
    converted(counted, source, ram / "count", Form.PLAIN, Form.SERVER)
    at = counted.calls
    marker = ram / "target" / staging.STAGE / "marker"
    while not marker.exists() or b"publish" in marker.read_bytes():  # back to when nothing was published yet
        at -= 1
        shutil.rmtree(ram / "target", ignore_errors=True)
        with pytest.raises(KilledError):
            converted(Killed(at), source, ram / "target", Form.PLAIN, Form.SERVER)
    block = stage / STREAM / "msgs/1.blk"
    info, raw = block.stat(), block.read_bytes()
    block.write_bytes(bytes(len(raw)))
    os.utime(block, ns=(info.st_atime_ns, info.st_mtime_ns))
    (stage / STREAM / "meta.key").unlink()
    (stage / STREAM / "msgs/2.key").write_bytes(b"cut")
    (stage / "gone/with").mkdir(parents=True)
    (stage / "link").unlink()
    (stage / "link").mkdir()
    result = converted(Backing(), source, ram / "target", Form.PLAIN, Form.SERVER)
    assert result.done
    assert result.outcome.kept > 3
    assert plain(ram / "target", Form.SERVER) == plain(source, Form.PLAIN)


# --- what it is made of -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("suite", Suite)
def test_kept_stores_encrypted_anew(name: str, suite: Suite, ram: Path) -> None:
    """In the clear and encrypted with another key and cipher: the reader that was written for nats-server reads both."""
    vector = unpack(name, ram / "store")
    keys = [vector["key"].encode()]
    origin = Form.PLAIN if name.endswith("plain") else Form.SERVER
    source = Side(origin, server_keys=keys)
    new = [b"another one"]
    found = survey(Backing(), str(ram / "store"))
    assert found.form is origin
    work = convert.Conversion(
        Backing(), str(ram / "store"), str(ram / "new"), {"source": "", "from": "", "to": "server", "cipher": ""},
        source, lambda _: Side(Form.SERVER, server_keys=new), suite, found, os.urandom, convert.Progress(),
    )  # fmt: skip
    assert convert.convert(work).done
    was = stores.read(ram / "store" / STREAM, keys)
    now = stores.read(ram / "new" / STREAM, new)
    assert now[:5] == was[:5]
    assert all(now.encrypted.values())
    export(ram / "store", ram / "plain", keys)
    suites = export(ram / "new", ram / "again", new)
    assert mounts.contents(ram / "plain") == mounts.contents(ram / "again")
    for path, used in suites.items():
        if used is not None:
            assert used is (Suite.CHACHAPOLY if "/_js_/" in path else suite), path
    key_files = [path.read_bytes() for path in (ram / "new").rglob("*.key")]
    assert len({raw[:16] for raw in key_files}) == len(key_files) > 3
    records = work.progress.as_json()
    assert records["state"] == "done"
    for block in (ram / "new").rglob("*.blk"):
        assert block.with_suffix(".key").exists(), "an empty block has a key, too"


@pytest.mark.parametrize("suite", Suite)
def test_key_files_and_sealed_files(suite: Suite) -> None:
    asset, draw = serverkeys.stream("$G", "S").block(3), Randomness(1)
    raw, seed = serverkeys.new_key_file(b"key", asset, suite, draw)
    assert serverkeys.open_key_file(raw, asset, [b"no", b"key"], "p").seed == seed.seed
    with pytest.raises(WrongKeyError):
        serverkeys.open_key_file(raw, serverkeys.stream("$G", "S").block(4), [b"key"], "p")
    sealed = serverkeys.seal_file(b"text", seed, draw(serverkeys.NONCES[suite]))
    assert serverkeys.open_file(sealed, seed, "p") == b"text"
    with pytest.raises(FormatError):
        serverkeys.open_file(sealed[:-1] + bytes([sealed[-1] ^ 1]), seed, "p")


def test_a_sealed_store_after_a_crash_is_read_as_the_next_mount_would(ram: Path) -> None:
    source = small(ram / "plain")
    (source / "jetstream/big").write_bytes(os.urandom(50_000))
    converted(Backing(), source, ram / "store", Form.PLAIN, Form.SEALED)
    whole = (source / "jetstream/big").read_bytes()
    sealed = ram / "store/jetstream/big"
    os.truncate(sealed, 3 * 4096)  # ends with a full page
    keys = keystore.unlock_store(str(ram / "store"), KEY.encode())[1]
    side = side_of(Form.SEALED, str(ram / "store"))
    fd = os.open(sealed.parent, os.O_RDONLY)
    with pytest.raises(UnreadableError, match="does not authenticate"):
        open_reader(Backing(), side, fd, b"big", b"jetstream/big")
    run = state.begin(str(ram / "store"), keys, time.time_ns())
    now = state.State(False, run.began, ((run.began, run.began),))
    before = sealed.read_bytes()
    after = Side(Form.SEALED, file_keys=side.file_keys, touched=now.touched)
    reader = open_reader(Backing(), after, fd, b"big", b"jetstream/big")
    data = reader.all()
    reader.close()
    os.close(fd)
    assert data == whole[: len(data)]
    assert len(data) == 4032 + 2 * 4064
    assert sealed.read_bytes() == before


# --- the command ------------------------------------------------------------------------------------------------------


def command(*args: str | Path, code: int = 0, key: str | None = KEY) -> subprocess.CompletedProcess[str]:
    return mounts.run("convert", *args, key=key, code=code)


def refused(*args: str | Path, code: int, key: str | None = KEY) -> str:
    top = Path(args[0]).parent
    before = mounts.snapshot(top)
    said = command(*args, code=code, key=key).stderr
    assert mounts.snapshot(top) == before
    return said


def test_modes_owners_times_and_names(tmp_path: Path) -> None:
    source = small(tmp_path / "source")
    long = source / "jetstream/$G/streams" / ("é" * 127 + "x")
    (long / "msgs").mkdir(parents=True)
    (long / "msgs/thw.db").write_bytes(b"\1")
    odd = os.fsencode(source) + b"/jetstream/\xff\xfe: '$\"\n"
    os.mkdir(odd)
    Path(os.fsdecode(odd + b"/file")).write_bytes(b"odd")
    (source / "jetstream/twin").write_bytes(b"the same")
    os.link(source / "jetstream/twin", source / "jetstream/twin2")
    os.chmod(source / "jetstream/twin", 0o440)
    os.chmod(long / "msgs", 0o710)
    if os.geteuid() == 0:
        os.chown(source / "jetstream/twin", 1234, 2345)
        os.chown(long, 1234, 2345)
        os.lchown(source / "link", 1234, 2345)
    for path in sorted(source.rglob("*"), reverse=True):
        os.utime(path, ns=(10**18 + 1, 10**18 + hash(str(path)) % 10**9), follow_symlinks=False)
    os.utime(source, ns=(10**18, 10**18 + 5))
    os.chmod(source, 0o750)
    said = command(source, tmp_path / "sealed", "--from", "plain", "--to", "sealed")
    assert "hard linked" in said.stderr
    command(tmp_path / "sealed", tmp_path / "server", "--from", "sealed", "--to", "server")
    command(tmp_path / "server", tmp_path / "plain", "--from", "server", "--to", "plain")
    assert metadata(tmp_path / "plain") == metadata(source)
    assert mounts.contents(tmp_path / "plain") == mounts.contents(source)
    assert (tmp_path / "plain").stat().st_mtime_ns == 10**18 + 5
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == 0o750
    assert not mounts.unsealed(tmp_path / "sealed")
    mounts.verify(tmp_path / "sealed", key=KEY)


def test_json_and_another_key(tmp_path: Path) -> None:
    unpack("2.15.1-chachapoly", tmp_path / "source")
    (tmp_path / "new").write_text("quite another key")
    args = ("--from", "server", "--to", "server", "--cipher", "aes", "--new-key-file", tmp_path / "new", "--json")
    said = json.loads(command(tmp_path / "source", tmp_path / "target", *args).stdout)
    assert said["done"]
    assert (said["files"], said["failed"], said["left_out"]) == (12, [], [])
    assert said["records"] == {"streams": 2, "indexed": 2, "blocks": 3, "records": 16, "damaged": []}
    now = stores.read(tmp_path / "target" / STREAM, [b"quite another key"])
    assert now[:5] == stores.read(tmp_path / "source" / STREAM, [KEY.encode()])[:5]
    refused(tmp_path / "target", tmp_path / "no", "--from", "server", "--to", "plain", code=WrongKeyError.exit_code)


def test_prev_key(tmp_path: Path) -> None:
    """A part of the store has another key: the consumers, after nats-server has changed the key of a stream."""
    unpack("2.15.1-chachapoly", tmp_path / "source")
    (tmp_path / "new").write_text("new key")
    (tmp_path / "old").write_text(KEY)
    args = ("--from", "server", "--to", "server", "--new-key-file", tmp_path / "new")
    command(tmp_path / "source", tmp_path / "changed", *args)
    consumer = f"{STREAM}/obs/worker"
    shutil.rmtree(tmp_path / "changed" / consumer)
    shutil.copytree(tmp_path / "source" / consumer, tmp_path / "changed" / consumer)
    target = tmp_path / "target"
    said = command(tmp_path / "changed", target, "--from", "server", "--to", "plain", key="new key", code=39)
    assert f"{consumer}/meta.inf" in said.stderr
    assert not (target / "jetstream").exists()
    args = ("--from", "server", "--to", "plain", "--prev-key-file", tmp_path / "old")
    command(tmp_path / "changed", target, *args, key="new key")
    command(tmp_path / "source", tmp_path / "plain", "--from", "server", "--to", "plain")
    assert mounts.contents(target) == mounts.contents(tmp_path / "plain")


def test_into_a_store_that_is_there(tmp_path: Path) -> None:
    source = small(tmp_path / "source")
    mounts.init(tmp_path / "store", key=KEY, cipher="aes")
    assert "is an encfs_js store" in refused(source, tmp_path / "store", "--from", "plain", "--to", "server", code=15)
    refused(source, tmp_path / "store", "--from", "plain", "--to", "sealed", key="wrong", code=12)
    command(source, tmp_path / "store", "--from", "plain", "--to", "sealed")
    assert plain(tmp_path / "store", Form.SEALED) == plain(source, Form.PLAIN)
    assert {mounts.suite_of(path) for path in mounts.files(tmp_path / "store")} == {"aes", None}
    said = refused(source, tmp_path / "store", "--from", "plain", "--to", "sealed", code=15)
    assert "not empty" in said


def test_refusals(tmp_path: Path) -> None:
    source, target = small(tmp_path / "source"), tmp_path / "target"
    unpack("2.15.1-chachapoly", tmp_path / "server")
    mounts.init(tmp_path / "sealed", key=KEY)
    for store, form in (("source", "plain"), ("server", "server"), ("sealed", "sealed")):
        for other in {"plain", "server", "sealed"} - {form}:
            said = refused(tmp_path / store, target, "--from", other, "--to", "plain", code=10)
            assert f"it is {form}" in said
    assert "one lies in the other" in refused(source, source / "new", "--from", "plain", "--to", "plain", code=10)
    assert "one lies in the other" in refused(source / "jetstream", source, "--from", "plain", "--to", "plain", code=10)
    refused(source, tmp_path / "no/such", "--from", "plain", "--to", "plain", code=14)
    refused(tmp_path / "none", target, "--from", "plain", "--to", "plain", code=14)
    refused(source, source / "link", "--from", "plain", "--to", "plain", code=10)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_bytes(b"")
    refused(source, tmp_path / "full", "--from", "plain", "--to", "plain", code=15)
    refused(source, tmp_path / "full/x", "--from", "plain", "--to", "plain", code=17)
    refused(source, target, "--from", "plain", "--to", "plain", "--cipher", "aes", code=2)
    refused(source, target, "--from", "plain", "--to", "server", "--prev-key-file", "/x", code=2)
    refused(source, target, "--from", "plain", "--to", "server", key=None, code=11)
    refused(tmp_path / "server", target, "--from", "server", "--to", "plain", key="wrong", code=12)
    os.mkfifo(source / "jetstream/pipe")
    said = refused(source, target, "--from", "plain", "--to", "plain", code=39)
    assert "jetstream/pipe: a fifo" in said


def test_no_room(ram: Path) -> None:
    source = small(ram / "source")

    class Full(Backing):
        @staticmethod
        def statvfs(fd: int) -> os.statvfs_result:
            real = list(os.fstatvfs(fd))
            real[4] = 1  # f_bavail
            return os.statvfs_result(real)

    found = survey(Backing(), str(source))
    with pytest.raises(StoreIoError, match=r"\d+ bytes are needed, and \d+ are free"):
        convert.check_room(Full(), str(ram / "target"), found, sealed=True, staged=0)
    convert.check_room(Full(), str(ram / "target"), found, sealed=True, staged=1 << 20)
    convert.check_room(Backing(), str(ram / "target"), found, sealed=True, staged=0)


def test_files_that_cannot_be_read_are_all_named(tmp_path: Path) -> None:
    source, target = small(tmp_path / "plain"), tmp_path / "target"
    command(source, tmp_path / "sealed", "--from", "plain", "--to", "sealed")
    for name in ("meta.inf", "msgs/1.blk"):
        mounts.flip(tmp_path / "sealed" / STREAM / name, 200)
    before = mounts.snapshot(tmp_path / "sealed")
    said = command(tmp_path / "sealed", target, "--from", "sealed", "--to", "plain", code=39)
    assert f"{STREAM}/meta.inf: page 0 does not authenticate" in said.stderr
    assert f"{STREAM}/msgs/1.blk: page 0 does not authenticate" in said.stderr
    assert os.listdir(target) == [staging.STAGE]
    changed = {name for name, info in mounts.snapshot(tmp_path / "sealed").items() if before.get(name) != info}
    assert changed <= {".encfs_js/lock", ".encfs_js"}
    for name in ("meta.inf", "msgs/1.blk"):
        mounts.flip(tmp_path / "sealed" / STREAM / name, 200)
    said = command(tmp_path / "sealed", target, "--from", "sealed", "--to", "plain", "--json")
    assert json.loads(said.stdout)["kept"] > 3
    assert mounts.contents(target) == mounts.contents(source)


def test_another_conversion_is_in_the_way(tmp_path: Path) -> None:
    source, target = small(tmp_path / "source"), tmp_path / "target"
    (source / STREAM / "msgs/index.db").write_bytes(b"\x0b damaged")
    said = command(source, target, "--from", "plain", "--to", "server", code=39).stderr
    assert "msgs/index.db: its hash does not match" in said
    said = refused(source, target, "--from", "plain", "--to", "plain", code=39)
    assert "another conversion that was interrupted" in said
    refused(source, target, "--from", "plain", "--to", "server", "--cipher", "aes", code=39)
    (source / STREAM / "msgs/index.db").unlink()
    (target / "stranger").write_bytes(b"")
    refused(source, target, "--from", "plain", "--to", "server", code=StoreNotEmptyError.exit_code)
    (target / "stranger").unlink()
    said = command(source, target, "--from", "plain", "--to", "server", key="another", code=12).stderr
    assert "begun with another key" in said
    command(source, target, "--from", "plain", "--to", "server")
    assert plain(target, Form.SERVER) == plain(source, Form.PLAIN)


def test_a_store_that_is_being_filled_is_not_mounted(tmp_path: Path) -> None:
    source, target = small(tmp_path / "source"), tmp_path / "target"
    mounts.init(target, key=KEY)
    (tmp_path / "mnt").mkdir()
    with pytest.raises(KilledError):
        converted(Killed(40), source, target, Form.PLAIN, Form.SEALED)
    said = mounts.run("mount", target, tmp_path / "mnt", "--foreground", key=KEY, code=39).stderr
    assert "has not finished" in said
    said = mounts.run("convert", target, tmp_path / "x", "--from", "sealed", "--to", "plain", key=KEY, code=39).stderr
    assert "has not finished" in said
    (target / ".encfs_js/keyring").rename(target / "keyring")
    (target / ".encfs_js/keyring.bak").rename(target / ".encfs_js/away")
    (target / "keyring").rename(target / ".encfs_js/away2")
    marker = target / staging.STAGE / "marker"
    marker.write_bytes(marker.read_bytes().replace(b'"aes"', b'""'))
    refused(source, target, "--from", "plain", "--to", "sealed", code=14)
    (target / ".encfs_js/away2").rename(target / ".encfs_js/keyring")
    command(source, target, "--from", "plain", "--to", "sealed")
    assert plain(target, Form.SEALED) == plain(source, Form.PLAIN)


def test_a_server_with_a_key_on_a_mount(tmp_path: Path) -> None:
    """What is sealed is encrypted by nats-server besides: it comes out as nats-server has it, and not encrypted twice."""
    unpack("2.15.1-chachapoly", tmp_path / "source")
    converted(Backing(), tmp_path / "source", tmp_path / "sealed", Form.PLAIN, Form.SEALED)
    said = refused(tmp_path / "sealed", tmp_path / "no", "--from", "sealed", "--to", "server", code=39)
    assert "encrypts itself" in said
    said = command(tmp_path / "sealed", tmp_path / "out", "--from", "sealed", "--to", "plain", "--json").stdout
    assert json.loads(said)["records"] is None
    assert mounts.contents(tmp_path / "out") == mounts.contents(tmp_path / "source")


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_as_another_user(ram: Path) -> None:
    """Directories that nobody may write, files that only their owner may read; and an owner that cannot be kept."""
    source = small(ram / "source")
    for path in [source, *source.rglob("*")]:
        os.lchown(path, mounts.NOBODY, mounts.NOBODY)
        if not path.is_symlink():
            os.chmod(path, 0o500 if path.is_dir() else 0o400)
    os.chmod(ram, 0o755)
    place = ram / "place"
    place.mkdir()
    os.chown(place, mounts.NOBODY, mounts.NOBODY)
    arguments = ["convert", str(source), str(place / "new"), "--from", "plain", "--to", "server"]
    try:
        words = [*mounts.command_as_user(mounts.NOBODY), *mounts.COMMAND]
        done = subprocess.run(
            [*words, *arguments], env=mounts.environment(KEY), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert metadata(source).items() <= metadata(place / "new").items()
        os.chown(source / STREAM / "meta.inf", 0, mounts.NOBODY)  # and so its key file
        os.chmod(source / STREAM / "meta.inf", 0o440)
        arguments[2] += "er"
        done = subprocess.run(
            [*words, *arguments], env=mounts.environment(KEY), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert "the owner of 2 entries is another one now" in done.stderr
    finally:
        for path in ram.rglob("*"):
            if path.is_dir():
                os.chmod(path, 0o700)


def test_leftovers_of_a_rewriting(tmp_path: Path) -> None:
    source = small(tmp_path / "source")
    (source / STREAM / "msgs/1.blk.tmp").write_bytes((source / STREAM / "msgs/1.blk").read_bytes()[:100])
    (source / STREAM / "meta.inf.tmp").write_bytes(b"{}")
    said = command(source, tmp_path / "server", "--from", "plain", "--to", "server").stderr
    assert f"{STREAM}/msgs/1.blk.tmp was left out" in said
    command(source, tmp_path / "sealed", "--from", "plain", "--to", "sealed")
    assert plain(tmp_path / "sealed", Form.SEALED) == plain(source, Form.PLAIN)
    copied = tmp_path / "server" / STREAM / "msgs/1.new"
    copied.write_bytes(b"garbage")
    said = command(tmp_path / "server", tmp_path / "plain", "--from", "server", "--to", "plain").stderr
    assert f"{STREAM}/msgs/1.new was left out" in said
    assert not list((tmp_path / "plain").rglob("*.new"))


def test_src_changes_meanwhile(ram: Path) -> None:
    source = small(ram / "source")

    class Busy(Backing):
        calls = 0

        def fsync(self, fd: int) -> None:  # type: ignore[override]
            os.fsync(fd)
            self.calls += 1
            if self.calls == 8:
                (source / "jetstream/new").write_bytes(b"a server is at work")

    result = converted(Busy(), source, ram / "target", Form.PLAIN, Form.PLAIN)
    assert not result.done
    assert b"jetstream/new" in [path for path, _ in result.unequal] + result.changed
    assert "jetstream" not in os.listdir(ram / "target")
    assert converted(Backing(), source, ram / "target", Form.PLAIN, Form.PLAIN).done
    assert plain(ram / "target", Form.PLAIN) == plain(source, Form.PLAIN)


def test_sigkill_of_the_command(tmp_path: Path) -> None:
    """The real process on the real disk, at random moments; each run goes on where the last one was."""
    source = small(tmp_path / "source")
    draw = random.Random(11)
    for i in range(60):
        (source / f"jetstream/{i}").write_bytes(draw.randbytes(20_000))
    args = [*mounts.COMMAND, "convert", str(source), str(tmp_path / "target"), "--from", "plain", "--to", "sealed"]
    tree = tmp_path / "target" / staging.STAGE / "tree/jetstream"

    def written() -> int:
        try:
            return len(os.listdir(tree))
        except FileNotFoundError:
            return 0

    kills, end = 0, time.monotonic() + mounts.PATIENCE
    while True:
        goal = written() + draw.randrange(5, 30)
        with subprocess.Popen(
            args, env=mounts.environment(KEY), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        ) as child:
            while child.poll() is None and written() < goal:
                assert time.monotonic() < end
            child.kill()
        if child.returncode != -signal.SIGKILL:
            assert child.returncode == 0
            break
        kills += 1
    assert kills >= 2, "no kill came in the middle of the work"
    assert plain(tmp_path / "target", Form.SEALED) == plain(source, Form.PLAIN)
    mounts.verify(tmp_path / "target", key=KEY)


def cut_at_every_call(origin: Form, goal: Form, place: Path, backing: type[Timed], draws: int) -> tuple[int, int]:
    """Convert, and for whatever a power cut may leave see that it is nothing that looks like a store, and repeat.

    Returns how many states there were, and in how many of them all was done.
    """
    source = small(place / "plain")
    if origin is not Form.PLAIN:
        converted(Backing(), source, place / "source", Form.PLAIN, origin)
        source = place / "source"
    for path in source.rglob("*"):  # what the imaginary disk writes out has no other modes
        if not path.is_symlink():
            path.chmod(0o700 if path.is_dir() else 0o644)
    before, disk_of = plain(source, origin), place / "disk"
    disk_of.mkdir()
    io = backing(disk_of)
    assert converted(io, source, disk_of / "target", origin, goal).done
    trace = io.trace
    disk, rng, seen, complete = Disk(trace), random.Random(5), set(), 0
    for op in trace.ops[trace.base :]:
        disk.feed(op)
        for _ in range(draws):
            found = disk.crash(rng)
            key = (tuple(found.paths()), tuple(sorted(found.files.items())))
            if key in seen:
                continue
            seen.add(key)
            shutil.rmtree(disk_of)
            disk_of.mkdir()
            found.write_out(disk_of)
            target = disk_of / "target"
            if "jetstream" in (os.listdir(target) if target.exists() else []) and not (target / staging.STAGE).exists():
                complete += 1
                assert plain(target, goal) == before
                continue
            assert converted(Backing(), source, target, origin, goal).done
            assert plain(target, goal) == before
            assert sorted(os.listdir(target)) == sorted(["jetstream", "link"] + [META] * (goal is Form.SEALED))
    return len(seen), complete


@pytest.mark.parametrize(
    ("origin", "goal"), [(Form.PLAIN, Form.SERVER), (Form.SERVER, Form.PLAIN), (Form.PLAIN, Form.SEALED)]
)
def test_power_cut_at_every_call(origin: Form, goal: Form, quick: Path) -> None:
    states, complete = cut_at_every_call(origin, goal, quick, Timed, 4 * SCALE)
    assert states > 50
    assert complete


class Forgetful(Timed):
    """Does not bring the content of files to the disk before they get their names."""

    def fsync(self, fd: int) -> None:
        if os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) != os.fsdecode(staging.TMP):
            super().fsync(fd)


def test_what_is_not_synced_is_found(quick: Path) -> None:
    with pytest.raises((AssertionError, UnreadableError, WrongKeyError)):
        cut_at_every_call(Form.PLAIN, Form.SERVER, quick, Forgetful, 4)
