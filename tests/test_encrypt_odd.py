"""encrypt and decrypt where something is odd: nothing is lost, nothing is said to be done that is not."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shlex
import shutil
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mounts
import pytest
import server_stores as stores
from test_encrypt import KEYS, MAC, STREAM, Dies, begun, files, killed, plain_of, seal, unseal
from test_jetstream import unpack

from encfs_js import cli_encrypt, decrypt, encrypt, keystore, serverkeys, serverstore, state
from encfs_js.backing import META, Backing
from encfs_js.cli_alone import alone
from encfs_js.errors import ConversionError, StoreBusyError, StoreNotEmptyError
from encfs_js.format import MAGIC, PAGE
from encfs_js.sealed import SealedFile

if TYPE_CHECKING:
    from pathlib import Path

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


def kept(tmp_path: Path, name: str = "2.15.1-plain") -> Path:
    unpack(name, tmp_path / "store")
    return tmp_path / "store"


def contents(store: Path) -> dict[str, bytes]:
    return {path: found.read_bytes() for path, found in files(store).items()}


def server(store: Path, *more: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    return mounts.run("encrypt", store, "--from", "server", *more, key=stores.KEY, code=code)


# --- a store that nats-server has encrypted ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["meta.inf", "msgs/index.db"])
def test_a_stream_whose_meta_key_is_lost_is_not_sealed_as_nonsense(name: str, tmp_path: Path) -> None:
    store = kept(tmp_path, "2.15.1-chachapoly")
    (store / STREAM / "meta.key").unlink()
    before = contents(store)
    assert f"{name}: its key file meta.key is missing" in server(store, code=39).stderr
    assert contents(store) == before
    assert sorted(os.listdir(store)) == ["jetstream"]


def test_a_symlink_to_what_would_stay_encrypted(tmp_path: Path) -> None:
    store = kept(tmp_path, "2.15.1-chachapoly")
    (store / STREAM).rename(tmp_path / "elsewhere")
    (store / STREAM).symlink_to(tmp_path / "elsewhere")
    before = contents(store)
    assert "SMALL: a symlink: what it leads to would stay encrypted" in server(store, code=39).stderr
    assert contents(store) == before


def test_a_plain_store_with_a_symlink_says_what_was_left_alone(tmp_path: Path) -> None:
    store = kept(tmp_path)
    (store / STREAM).rename(tmp_path / "elsewhere")
    (store / STREAM).symlink_to(tmp_path / "elsewhere")
    assert f"Left alone: {STREAM}, a symlink" in mounts.run("encrypt", store).stdout
    assert (tmp_path / "elsewhere/meta.inf").read_bytes()[:1] == b"{"
    assert json.loads(mounts.run("encrypt", store, "--json").stdout)["symlinks"] == [STREAM]


def test_records_that_were_appended_in_the_clear(tmp_path: Path) -> None:
    """Some servers did so between a start and the first read. Decrypted they would be nonsense for ever."""
    store, expected = begun("2.15.1-chachapoly", tmp_path)
    path = f"{STREAM}/msgs/1.blk"
    plain, raw = expected[path], (store / path).read_bytes()
    found = list(stores.jetstream.records(plain, "SMALL-1", ""))
    assert len(found) > 3
    start, end = found[1].offset, found[2].offset + found[2].length
    (store / path).write_bytes(raw[:start] + plain[start:end] + raw[end:])
    seal(store, KEYS)
    assert {name: plain_of(file) for name, file in files(store).items()} == expected


def test_sealing_a_block_of_random_records_finds_nothing_in_the_clear(tmp_path: Path) -> None:
    """Of encrypted bytes nothing is taken for a record, and it takes no time."""
    store = kept(tmp_path, "2.15.1-chachapoly")
    block, rng = store / STREAM / "msgs/1.blk", random.Random(3)
    data = os.fsencode(f"{STREAM}/msgs/1.blk")
    directory = os.open(block.parent, os.O_RDONLY)
    with_key = serverstore.open_content(Backing(), directory, b"1.blk", data, KEYS)
    first = bytes(with_key.read(0, with_key.size))
    raw = rng.randbytes(1 << 21)
    stream = serverkeys.Keystream(
        serverkeys.open_key_file(
            (block.parent / "1.key").read_bytes(), serverkeys.stream("$G", "SMALL").block(1), KEYS, ""
        )
    )
    # Records of 64 bytes with a wrong hash behind the good ones: 32,768 places to look at.
    bogus = b"".join(
        (64).to_bytes(4, "little") + raw[at + 4 : at + 20] + b"\x05\0" + raw[at + 22 : at + 64]
        for at in range(0, 1 << 21, 64)
    )
    block.write_bytes(stream.xor(first + bogus))
    began = time.process_time()
    found = serverstore.open_content(Backing(), directory, b"1.blk", data, KEYS)
    assert time.process_time() - began < 5
    assert bytes(found.read(0, found.size)) == first + bogus
    for each in (with_key, found):
        each.close()
    os.close(directory)


def test_a_staged_file_of_any_size_takes_no_memory(tmp_path: Path) -> None:
    store = kept(tmp_path, "2.15.1-chachapoly")
    with (store / STREAM / "meta.inf.tmp").open("wb") as file:
        file.truncate(3 << 30)
    with (store / STREAM / "msgs/7.key").open("wb") as file:
        file.truncate(3 << 30)
    (store / STREAM / "msgs/7.blk").write_bytes(b"a block with a key file that is none")
    command = ["prlimit", "--as=900000000", *mounts.COMMAND, "encrypt", str(store), "--from", "server"]
    done = subprocess.run(command, env=mounts.environment(stores.KEY), capture_output=True, text=True, check=False)
    assert (done.returncode, "7.key: not a key file of nats-server" in done.stderr) == (39, True), done.stderr
    for name in ("7.key", "7.blk"):
        (store / STREAM / "msgs" / name).unlink()
    done = subprocess.run(command, env=mounts.environment(stores.KEY), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "meta.inf.tmp, a leftover" in done.stdout


def test_another_key_on_a_run_that_goes_on(tmp_path: Path) -> None:
    """Nothing is destroyed, and the hint says which key is meant."""
    store = kept(tmp_path, "2.15.1-chachapoly")
    for name, text in (("old", stores.KEY), ("new", "the new store's key"), ("wrong", "neither of them")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    old, new, wrong = (str(tmp_path / name) for name in ("old", "new", "wrong"))
    mounts.run("encrypt", store, "--from", "server", "--key-file", old, "--new-key-file", new, key=None)
    state.mark(str(store))  # as if it had been killed just before its end
    before = contents(store)
    for given in (["--new-key-file", wrong], []):
        said = mounts.run("encrypt", store, "--from", "server", "--key-file", old, *given, key=None, code=12).stderr
        assert "--new-key-file" in said
    assert contents(store) == before
    mounts.run("encrypt", store, "--from", "server", "--key-file", wrong, "--new-key-file", new, key=None)
    assert contents(store) == before
    assert not state.is_half_sealed(str(store))
    assert mounts.verify(store, key="the new store's key")["sound"]


def test_options_that_would_be_ignored(tmp_path: Path) -> None:
    store = kept(tmp_path)
    (tmp_path / "new").write_text("the new store's key")
    for option in ("--new-key-file", "--new-credential", "--prev-key-file"):
        assert "are for --from server" in mounts.run("encrypt", store, option, tmp_path / "new", code=2).stderr
    both = ["--from", "server", "--new-key-file", "a", "--new-credential", "b"]
    assert "Only one of" in mounts.run("encrypt", store, *both, code=2).stderr
    assert sorted(os.listdir(store)) == ["jetstream"]


# --- two at once ------------------------------------------------------------------------------------------------------


def test_a_keyring_never_takes_the_place_of_another(tmp_path: Path) -> None:
    """Somebody makes the directory a store while this command asks for its key."""
    store = kept(tmp_path)
    job = cli_encrypt._Job(str(store), "plain", None)
    job.secret = "key", b"the second one's key"
    mounts.init(store, plaintext="read")
    before = (store / META / "keyring").read_bytes()
    with pytest.raises(StoreBusyError, match="another command was at work here"):
        cli_encrypt._encrypt(job, lambda _: None, lambda: None)
    assert (store / META / "keyring").read_bytes() == before


def test_sealed_files_are_looked_for_when_nobody_else_can_make_any(tmp_path: Path, monkeypatch: Any) -> None:
    store = kept(tmp_path)
    job = cli_encrypt._Job(str(store), "plain", None)
    job.secret = "key", b"the second one's key"
    took = state.lock

    def later(*args: Any) -> int:
        (store / "sealed").write_bytes(MAGIC)
        return took(*args)

    monkeypatch.setattr(state, "lock", later)
    with pytest.raises(StoreNotEmptyError, match="has sealed files in it"):
        cli_encrypt._encrypt(job, lambda _: None, lambda: None)
    assert not (store / META).exists()


def test_init_and_encrypt_at_once(tmp_path: Path) -> None:
    store = kept(tmp_path)
    with alone(str(store)):
        assert "another init is at work" in mounts.run("init", store, "--plaintext", "read", code=18).stderr
    fd = os.open(store, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert "another command is making it a store" in mounts.run("encrypt", store, code=18).stderr
    os.close(fd)
    assert sorted(os.listdir(store)) == ["jetstream"]


@ROOT
def test_a_user_in_a_container_is_seen(tmp_path: Path) -> None:
    """It has a file of the store open, by another path: a bind mount in a mount namespace of its own."""
    store = kept(tmp_path)
    (tmp_path / "inside").mkdir()
    inside = shlex.quote(str(tmp_path / "inside"))
    held = shlex.quote(f"{tmp_path}/inside/{STREAM}/meta.inf")
    script = f"mount --bind {shlex.quote(str(store))} {inside} && exec 9<{held} && echo ready && exec sleep 60"
    child = subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            pytest.skip("no mount namespace can be made here")
        assert "is in use by process" in mounts.run("encrypt", store, code=18).stderr
        assert sorted(os.listdir(store)) == ["jetstream"]
    finally:
        child.kill()
        child.communicate()


# --- whose it is, links, names ----------------------------------------------------------------------------------------


@ROOT
def test_root_leaves_a_store_that_its_owner_can_use(tmp_path: Path) -> None:
    store = kept(tmp_path)
    for path in (store, *store.rglob("*")):
        os.chown(path, mounts.NOBODY, mounts.NOBODY)
    mounts.run("encrypt", store)
    owners = {path.name: path.stat().st_uid for path in (store, *store.rglob("*"))}
    assert set(owners.values()) == {mounts.NOBODY}, owners
    # One that is refused leaves a state: that, too.
    (store / "planted").write_text("in the clear")
    mounts.run("decrypt", store, code=39)
    assert (store / META / "state").stat().st_uid == mounts.NOBODY


def test_a_copy_of_hard_links_is_not_sealed_with_it(tmp_path: Path) -> None:
    store = kept(tmp_path)
    subprocess.run(["cp", "-al", store, tmp_path / "backup"], check=True)
    before = contents(tmp_path / "backup")
    assert "1 more names (hard links) outside of the store" in mounts.run("encrypt", store, code=39).stderr
    assert contents(tmp_path / "backup") == before
    shutil.rmtree(tmp_path / "backup")
    os.link(store / STREAM / "meta.inf", store / "within")
    mounts.run("encrypt", store)
    assert (store / "within").read_bytes() == (store / STREAM / "meta.inf").read_bytes()
    assert (store / "within").read_bytes()[:8] == MAGIC


def test_a_symlink_in_the_place_of_the_meta_directory(tmp_path: Path) -> None:
    store = kept(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (store / META).symlink_to(tmp_path / "elsewhere")
    assert f"{META} is not a directory" in mounts.run("encrypt", store, code=17).stderr
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_name_that_does_not_print_and_a_strict_terminal(tmp_path: Path) -> None:
    store = kept(tmp_path)
    stream = store / STREAM
    os.rename(stream, os.fsencode(stream.parent) + b"/S\xff\nX")  # its records do not match their hash any more
    environ = mounts.environment(mounts.KEY) | {"PYTHONIOENCODING": "utf-8:strict"}
    for command in ("encrypt", "decrypt"):
        done = subprocess.run([*mounts.COMMAND, command, str(store)], env=environ, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.decode().splitlines()
        assert [line for line in lines if line.startswith("Damaged, as it was before:") and "S\\udcff\\nX" in line]


@ROOT
def test_an_error_names_the_whole_path(tmp_path: Path) -> None:
    store = kept(tmp_path)
    block = store / STREAM / "msgs/1.blk"
    if subprocess.run(["chattr", "+i", block], check=False, capture_output=True).returncode:
        pytest.skip("no immutable files here")
    try:
        for command in ("encrypt", "decrypt"):
            assert f"{block}: Operation not permitted" in mounts.run(command, store, code=25).stderr
            subprocess.run(["chattr", "-i", block], check=True)
            mounts.run("encrypt", store)
            subprocess.run(["chattr", "+i", block], check=True)
    finally:
        subprocess.run(["chattr", "-i", block], check=True)


def test_a_block_that_is_none_is_not_read_whole(tmp_path: Path) -> None:
    store = kept(tmp_path)
    with (store / STREAM / "msgs/99.blk").open("wb") as file:
        file.truncate(150 << 20)
    told = json.loads(mounts.run("encrypt", store, "--json").stdout)
    assert len(told["damaged"]) == 1
    assert "99.blk: byte " in told["damaged"][0]
    assert "not looked at" in told["damaged"][0]


# --- crashes ----------------------------------------------------------------------------------------------------------


def torn(store: Path, name: str, plain: bytes) -> None:
    """A sealed file as a power cut leaves it: without its end mark."""
    fd = os.open(store / name, os.O_RDWR | os.O_CREAT)
    SealedFile(Backing(), fd, keys_of(store)).write(0, plain)
    os.ftruncate(fd, os.fstat(fd).st_size - PAGE)
    os.close(fd)


def keys_of(store: Path) -> Any:
    _, keys, _ = keystore.unlock_store(str(store), mounts.KEY.encode())
    return cli_encrypt._file_keys(keys)


def uncleanly(store: Path) -> None:
    _, keys, _ = keystore.unlock_store(str(store), mounts.KEY.encode())
    state.save(str(store), keys, replace(state.begin(str(store), keys, time.time_ns()), clean=False))


@pytest.mark.parametrize("command", ["encrypt", "decrypt"])
def test_what_a_power_cut_left_is_trimmed(command: str, tmp_path: Path) -> None:
    store = kept(tmp_path)
    mounts.init(store, plaintext="read")
    torn(store, f"{STREAM}/msgs/9.blk", bytes(9000))
    mounts.run(command, store, code=22)  # nobody has noted a power cut: it is damage
    uncleanly(store)
    mounts.run(command, store)
    fd = os.open(store / STREAM / "msgs/9.blk", os.O_RDONLY)
    size = os.fstat(fd).st_size if command == "decrypt" else SealedFile(Backing(), fd, keys_of(store)).size
    os.close(fd)
    assert size == 2 * (PAGE - 32) - 32


@pytest.mark.parametrize("command", ["encrypt", "decrypt"])
def test_a_new_file_of_zeros_after_a_power_cut_is_not_plaintext(command: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    mounts.init(store)
    (store / "new").write_bytes(bytes(PAGE))
    uncleanly(store)
    mounts.run(command, store)
    assert (store / "new").read_bytes() == b""


def test_a_rewriting_that_cannot_be_finished_stops_the_command(tmp_path: Path) -> None:
    """The redo file was damaged on the disk, and its file may be half written: not a matter for silence."""
    store, _ = begun("2.15.1-chachapoly", tmp_path)
    calls = Dies(-1)
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    seal(copy, KEYS, calls)
    for at in range(1, -calls.left):
        shutil.rmtree(copy)
        shutil.copytree(store, copy)
        killed(lambda at=at: seal(copy, KEYS, Dies(at)))
        redo = [path for path in (copy / META).iterdir() if path.name.startswith("redo-") and path.suffix != ".tmp"]
        if redo:
            break
    raw = bytearray(redo[0].read_bytes())
    raw[PAGE + 100] ^= 1
    redo[0].write_bytes(raw)
    before = contents(copy)
    with pytest.raises(ConversionError, match=r"redo-.*\.orphan: the rewriting of a file was interrupted"):
        encrypt.recover(Backing(), str(copy), MAC)
    assert contents(copy) == before
    encrypt.recover(Backing(), str(copy), MAC)  # once


def test_nothing_in_the_clear_stays_behind(tmp_path: Path) -> None:
    """What decrypt had staged goes when it fails, and encrypt takes it away when it was killed."""
    store, _ = begun("2.15.1-plain", tmp_path)
    seal(store, None)

    class Full(Backing):
        @staticmethod
        def fsync(fd: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), fd)

    with pytest.raises(OSError, match="No space left") as caught:
        unseal(store, Full())
    assert str(caught.value.filename).startswith(str(store / "jetstream"))
    assert os.listdir(store / META) == []
    (store / META / encrypt.STAGED.decode()).write_text("in the clear")
    seal(store, None)
    assert os.listdir(store / META) == []


def test_the_lock_goes_last(tmp_path: Path) -> None:
    store = kept(tmp_path)
    (store / META).mkdir(0o700)
    for name in ("state", "keyring.bak", "keyring", "lock"):
        (store / META / name).touch()
    seen: list[list[str]] = []

    class Watched(Backing):
        @staticmethod
        def unlink(path: bytes, *, dir_fd: int) -> None:
            os.unlink(path, dir_fd=dir_fd)
            seen.append(sorted(os.listdir(store / META)))

    decrypt.forget(Watched(), str(store))
    assert seen == [["keyring", "keyring.bak", "lock"], ["keyring", "lock"], ["lock"], []]
    (store / META).mkdir(0o700)  # a power cut at the end: the same command removes the rest
    (store / META / "lock").touch()
    mounts.run("decrypt", store)
    assert sorted(os.listdir(store)) == ["jetstream"]


def test_redo_files_without_a_keyring_are_not_thrown_away(tmp_path: Path) -> None:
    store = kept(tmp_path)
    (store / META).mkdir(0o700)
    (store / META / "redo-0000000000000007").write_bytes(b"the only copy")
    assert "Put .encfs_js/keyring back" in mounts.run("decrypt", store, code=14).stderr
    assert (store / META / "redo-0000000000000007").exists()
