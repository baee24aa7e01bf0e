"""On a host whose OpenSSL refuses ChaCha20-Poly1305, aes works and chachapoly is a clear error, before anything is done."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from typing import TYPE_CHECKING

import fips_host
import mounts
import pytest
import swtpm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from subprocess import CompletedProcess

pytestmark = pytest.mark.skipif(bool(fips_host.needs_provider()), reason=fips_host.needs_provider() or "-")
needs_fuse = pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")

REFUSES = "the OpenSSL of this host refuses chachapoly (FIPS)"
LARGE, SMALL, OTHER = b"a large file " * 5000, b"a small file", b"one that is sealed with aes"
STREAM = "jetstream/$G/streams/ORDERS"


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return fips_host.build(tmp_path_factory.mktemp("host") / "fips")


@pytest.fixture
def fips(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """`with fips():` every process that is started in the block is on the host that refuses."""

    @contextlib.contextmanager
    def block() -> Iterator[None]:
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            yield

    return block


def refused(done: CompletedProcess[str], message: str = REFUSES) -> str:
    """Check that a command has ended with one line of error and one of hint. Returns the hint."""
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("encfs-js: error: " + message)
    assert hint.startswith("encfs-js: hint: ")
    assert "Traceback" not in done.stderr
    return hint


def add_code(store: Path) -> str:
    """A recovery code for the store: what opens it where there is no Argon2id."""
    code: str = json.loads(mounts.run("key", "add", store, "--recovery", "--json").stdout)["recovery_code"]
    return code


def inspected(store: Path) -> set[str]:
    """The ciphers of the files that are there."""
    return {group["suite"] for group in json.loads(mounts.run("inspect", store, "--json", key=None).stdout)["files"]}


def test_the_host_is_one(environ: dict[str, str]) -> None:
    """It is `cryptography` that refuses, with the OpenSSL that it has everywhere else."""
    program = """
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.bindings._rust import openssl
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
print(openssl.openssl_version_text(), openssl.is_fips_enabled())
for refused in (
    lambda: ChaCha20Poly1305(bytes(32)),
    lambda: Argon2id(salt=bytes(16), length=32, iterations=1, lanes=1, memory_cost=8).derive(b"key"),
):
    try:
        refused()
    except UnsupportedAlgorithm:
        print("refused")
print(AESGCM(bytes(32)).encrypt(bytes(12), b"text", b"").hex())
"""
    here, there = fips_host.says({}, program).splitlines(), fips_host.says(environ, program).splitlines()
    assert here[0].endswith(" False")
    assert there == [here[0].replace(" False", " True"), "refused", "refused", here[-1]]


# --- chachapoly ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--cipher", "chachapoly", "--plaintext", "read")])
def test_init_refuses_chachapoly_and_writes_nothing(tmp_path: Path, fips, options: tuple[str, ...]) -> None:
    store = tmp_path / "store"
    if options:
        store.mkdir()
    before = mounts.snapshot(tmp_path)
    with fips():
        assert "--cipher aes" in refused(mounts.run("init", store, *options, code=37))
        # Nobody is asked for the key of what is refused anyway.
        assert "--cipher aes" in refused(mounts.run("init", store, *options, key=None, code=37))
    assert mounts.snapshot(tmp_path) == before


def test_a_chachapoly_store_is_refused_as_it_is(tmp_path: Path, fips) -> None:
    store, mountpoint = tmp_path / "store", tmp_path / "mnt"
    mounts.init(store)
    code = add_code(store)
    mountpoint.mkdir()
    before = mounts.snapshot(tmp_path)
    with fips():
        for command in (
            ("mount", store, mountpoint),
            ("mount", store, mountpoint, "--read-only"),
            ("mount", store, mountpoint, "--cipher", "aes"),
            ("verify", store),
            ("reencrypt", store, "--new-epoch", "--cipher", "aes"),
            ("key", "remove", store, "1"),
        ):
            hint = refused(mounts.run(*command, key=code, code=37))
            assert "encfs-js reencrypt STORE --new-epoch --cipher aes --drop-epochs" in hint
            assert "encfs-js key change STORE" in hint
            assert mounts.entry_at(mountpoint) is None
        for command in (("inspect", store), ("key", "list", store), ("guard", "status", store)):
            mounts.run(*command, key=None)
    assert mounts.snapshot(tmp_path) == before


def test_the_hint_makes_the_store_one_that_opens(tmp_path: Path, fips) -> None:
    store = tmp_path / "store"
    mounts.init(store)
    mounts.run("reencrypt", store, "--new-epoch", "--cipher", "aes", "--drop-epochs")
    changed = mounts.run("key", "change", store, "--recovery", "--json")
    code = json.loads(changed.stdout)["recovery_code"]
    with fips():
        assert mounts.verify(store, key=code)["sound"]


# --- Argon2id -----------------------------------------------------------------------------------------------------


def test_a_slot_with_argon2id_is_refused_by_name(tmp_path: Path, fips) -> None:
    store = tmp_path / "store"
    mounts.init(store, cipher="aes")
    code = add_code(store)
    before = mounts.snapshot(tmp_path)
    with fips():
        for key in (mounts.KEY, "another key"):
            hint = refused(
                mounts.run("verify", store, key=key, code=37), "the OpenSSL of this host refuses Argon2id (FIPS)"
            )
            assert "encfs-js key add STORE --recovery" in hint
        mounts.verify(store, key=code)
    assert mounts.snapshot(tmp_path) == before


def test_key_strings_do_without_argon2id_where_it_is_refused(tmp_path: Path, fips) -> None:
    """PBKDF2 takes its place; a host that has Argon2id opens those slots as well, and makes its own with Argon2id."""
    store, new_key = tmp_path / "store", tmp_path / "key"
    new_key.touch(0o600)
    new_key.write_text("another key string")

    def costs() -> list[tuple[bool, int | None]]:
        slots = json.loads(mounts.run("inspect", store, "--json", key=None).stdout)["slots"]
        return [(slot["argon2id"] is not None, slot.get("pbkdf2", {}).get("iterations")) for slot in slots]

    with fips():
        mounts.init(store, cipher="aes")
        assert costs() == [(False, 1_000_000)]
        assert "pbkdf2 1000000" in mounts.run("inspect", store, key=None).stdout
        mounts.verify(store)
        mounts.run("verify", store, key="a wrong key", code=12)
    mounts.verify(store)
    mounts.run("key", "add", store, "--new-key-file", new_key)
    assert costs() == [(False, 1_000_000), (True, None)]
    with fips():
        mounts.verify(store)
        refused(
            mounts.run("verify", store, key="another key string", code=37), "the OpenSSL of this host refuses Argon2id"
        )
        mounts.run("key", "change", store, "--slot", "2", "--new-key-file", new_key)
        assert costs() == [(False, 1_000_000), (False, 1_000_000)]
        mounts.verify(store, key="another key string")
    mounts.verify(store, key="another key string")


# --- aes ----------------------------------------------------------------------------------------------------------


@pytest.mark.mount
@needs_fuse
def test_aes_works(tmp_path: Path, fips) -> None:
    """Mount, verify, reencrypt and slots on the host that refuses; another host reads the same."""
    store, mountpoint = tmp_path / "store", tmp_path / "mnt"
    with fips():
        mounts.init(store, cipher="aes")
    code = mounts.KEY
    made = {"large": LARGE, "small": SMALL, "empty": b""}
    with fips(), mounts.mounted(store, mountpoint, key=code) as mount:
        for name, data in made.items():
            (mount.path / name).write_bytes(data)
        mounts.run("reencrypt", store, "--new-epoch", "--drop-epochs", key=code)
        (mount.path / "later").write_bytes(SMALL)
        mount.kill_worker()
        assert mounts.contents(mount.path) == made | {"later": SMALL}
    with fips():
        assert mounts.verify(store, key=code)["suites"] == {"aes": 3}
        json.loads(mounts.run("key", "add", store, "--recovery", "--json", key=code).stdout)
        mounts.run("reencrypt", store, "--new-epoch", key=code)
        with mounts.mounted(store, mountpoint, key=code) as mount:
            assert mounts.contents(mount.path) == made | {"later": SMALL}
    with mounts.mounted(store, mountpoint) as mount:
        assert mounts.contents(mount.path) == made | {"later": SMALL}
    assert mounts.verify(store)["sound"]


@pytest.mark.mount
@needs_fuse
def test_a_store_is_made_on_that_host(tmp_path: Path, fips) -> None:
    """With a TPM, whose secret needs no Argon2id: init, a recovery code, mount and verify, and another host reads the same."""
    if reason := swtpm.needs_swtpm():
        pytest.skip(reason)
    store, mountpoint, keys_file, file = (tmp_path / name for name in ("store", "mnt", "keys", "encfs-js.yaml"))
    with swtpm.running(tmp_path / "tpm") as chip:
        file.touch(0o600)
        file.write_text(
            f"jetstream:\n  tpm:\n    keys_file: {keys_file}\n    encryption_password: open\n    tcti: {chip.tcti}\n"
        )
        options = ("--config", str(file))
        with fips():
            assert "--cipher aes" in refused(mounts.run("init", store, *options, key=None, code=37))
            assert not store.exists()
            assert not keys_file.exists(), "a key was made for a store that was refused"
            mounts.run("init", store, *options, "--cipher", "aes", key=None)
            done = mounts.run("key", "add", store, *options, "--recovery", "--json", key=None)
            code = json.loads(done.stdout)["recovery_code"]
            with mounts.mounted(store, mountpoint, *options) as mount:
                (mount.path / "file").write_bytes(LARGE)
            mounts.run("verify", store, *options, key=None)
        with mounts.mounted(store, mountpoint, *options) as mount:
            assert (mount.path / "file").read_bytes() == LARGE
    with fips():
        assert mounts.verify(store, key=code)["suites"] == {"aes": 1}
    assert mounts.verify(store, key=code)["suites"] == {"aes": 1}


# --- an aes store with chachapoly files in it -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    top = tmp_path_factory.mktemp("mixed")
    store, mountpoint = top / "store", top / "mnt"
    mounts.init(store, cipher="aes")
    with mounts.mounted(store, mountpoint) as mount:
        (mount.path / STREAM / "msgs").mkdir(parents=True)
        (mount.path / STREAM / "meta.inf").write_bytes(OTHER)
        (mount.path / "other").write_bytes(OTHER)
    with mounts.mounted(store, mountpoint, "--cipher", "chachapoly") as mount:
        (mount.path / STREAM / "msgs" / "1.blk").write_bytes(LARGE)
        (mount.path / STREAM / "msgs" / "2.blk").write_bytes(SMALL)
    assert inspected(store) == {"aes", "chachapoly"}
    return store, add_code(store)


@pytest.fixture
def mixed(mixed_once: tuple[Path, str], tmp_path: Path) -> tuple[Path, str]:
    """A store that was made with aes and has files of both ciphers, and a code that opens it."""
    store, code = mixed_once
    return shutil.copytree(store, tmp_path / "store"), code


def fails(number: int, call: Callable[[], object]) -> None:
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        call()


def change(file: Path) -> None:
    """Overwrite a byte and bring it to the disk: the kernel takes the write, and hands it over at the sync."""
    with open(file, "r+b", buffering=0) as opened:
        opened.write(b"x")
        os.fsync(opened.fileno())


@pytest.mark.mount
@needs_fuse
def test_chachapoly_files_are_errors_and_stay(mixed: tuple[Path, str], tmp_path: Path, fips) -> None:
    """They have their size, reading is EIO, the log names the cause, and nats-server cannot delete their stream for it."""
    store, code = mixed
    with fips(), mounts.mounted(store, tmp_path / "mnt", key=code) as mount:
        cause = r"is sealed with chachapoly, which the OpenSSL of this host refuses \(FIPS\) \(stream ORDERS of account \$G\)"
        mount.expect(rf"ERROR: .*msgs/1\.blk page 0 {cause}")
        mount.expect(rf"ERROR: .*msgs/2\.blk page 0 {cause}")
        stream = mount.path / STREAM
        large, small = stream / "msgs" / "1.blk", stream / "msgs" / "2.blk"
        assert (large.stat().st_size, small.stat().st_size) == (len(LARGE), len(SMALL))
        for file in (large, small):
            fails(errno.EIO, file.read_bytes)
            fails(errno.EIO, file.read_bytes)
            fails(errno.EIO, lambda file=file: change(file))
            fails(errno.EROFS, lambda file=file: file.write_bytes(b""))
            fails(errno.EROFS, file.unlink)
        fails(errno.EROFS, lambda: os.rename(stream, mount.path / "away"))
        assert (stream / "meta.inf").read_bytes() == (mount.path / "other").read_bytes() == OTHER
        (mount.path / "other").write_bytes(SMALL)
    assert len(mount.complaints()) == 2
    assert "does not authenticate" not in mount.log()
    assert "restored" not in mount.log()
    with fips():
        done = mounts.run("verify", store, "--json", key=code, code=37)
        refused(done)
        found = json.loads(done.stdout)
        assert found["damage"] == []
        assert {entry["path"].rsplit("/", 1)[1] for entry in found["unreadable"]} == {"1.blk", "2.blk"}
        assert {entry["error"] for entry in found["unreadable"]} == {"the OpenSSL of this host refuses chachapoly"}
        done = mounts.run("reencrypt", store, "--json", key=code, code=38)
        assert len(json.loads(done.stdout)["failed"]) == 2
    mounts.run("guard", "clear", store, key=None)
    with mounts.mounted(store, tmp_path / "mnt") as mount:
        assert (mount.path / STREAM / "msgs" / "1.blk").read_bytes() == LARGE
        assert (mount.path / STREAM / "msgs" / "2.blk").read_bytes() == SMALL
    mounts.run("reencrypt", store)
    assert inspected(store) == {"aes"}
    with fips():
        assert mounts.verify(store, key=code)["sound"]
        with mounts.mounted(store, tmp_path / "mnt", key=code) as mount:
            assert (mount.path / STREAM / "msgs" / "1.blk").read_bytes() == LARGE


@pytest.mark.mount
@needs_fuse
def test_new_files_of_a_refused_cipher(mixed: tuple[Path, str], tmp_path: Path, fips) -> None:
    """A mount that would seal new files with it is refused; --cipher aes and --read-only are ways round."""
    store, code = mixed
    (tmp_path / "mnt").mkdir(exist_ok=True)
    with fips():
        before = mounts.snapshot(store)
        refused(mounts.run("mount", store, tmp_path / "mnt", "--cipher", "chachapoly", key=code, code=37))
        refused(mounts.run("reencrypt", store, "--cipher", "chachapoly", key=code, code=37))
        assert mounts.entry_at(tmp_path / "mnt") is None
        assert mounts.snapshot(store) == before
    mounts.run("reencrypt", store, "--cipher", "chachapoly")
    with fips():
        before = mounts.snapshot(store)
        refused(mounts.run("mount", store, tmp_path / "mnt", key=code, code=37))
        refused(mounts.run("reencrypt", store, key=code, code=37))
        assert mounts.entry_at(tmp_path / "mnt") is None
        assert mounts.snapshot(store) == before
        with mounts.mounted(store, tmp_path / "mnt", "--read-only", key=code) as mount:
            mount.tolerated.append("is sealed with chachapoly, which the OpenSSL of this host refuses")
            assert (mount.path / "other").stat().st_size == len(OTHER)
            fails(errno.EIO, (mount.path / "other").read_bytes)
        with mounts.mounted(store, tmp_path / "mnt", "--cipher", "aes", key=code) as mount:
            (mount.path / "new").write_bytes(SMALL)
            assert (mount.path / "new").read_bytes() == SMALL


@pytest.mark.mount
@needs_fuse
def test_a_daemon_takes_no_keys_that_it_cannot_use(tmp_path: Path, fips) -> None:
    """The keyring is changed to chachapoly by a command that could, under a daemon that cannot: it says so, and goes on."""
    store = tmp_path / "store"
    mounts.init(store, cipher="aes")
    code = add_code(store)
    with contextlib.ExitStack() as stack:
        with fips():
            mount = stack.enter_context(mounts.mounted(store, tmp_path / "mnt", key=code))
        done = mounts.run("reencrypt", store, "--cipher", "chachapoly", code=38)
        assert REFUSES in done.stderr
        (mount.path / "new").write_bytes(LARGE)
        assert (mount.path / "new").read_bytes() == LARGE
    assert inspected(store) == {"aes"}


@pytest.mark.mount
@needs_fuse
def test_what_a_crash_left_is_looked_at_where_it_can_be(tmp_path: Path, fips) -> None:
    """A host that cannot tell what a crash has left of a file leaves the look at it to one that can."""
    store = tmp_path / "store"
    mounts.init(store, cipher="aes")
    code = add_code(store)
    with mounts.mounted(store, tmp_path / "mnt", "--cipher", "chachapoly", "--no-writeback") as mount:
        (mount.path / "file").write_bytes(LARGE)
        (mount.path / "other").write_bytes(LARGE)
        mount.kill()
    sealed = store / "file"
    # A crash can lose the last pages: then the last one that is left is full (FORMAT.md section 2.2, a).
    os.truncate(sealed, 8 * 4096)
    kept = 8 * 4064 - 32

    def windows() -> list[list[int]]:
        found: list[list[int]] = json.loads((store / ".encfs_js" / "state").read_text())["windows"]
        return found

    with fips(), mounts.mounted(store, tmp_path / "mnt", key=code) as mount:
        mount.expect(r"file page 0 is sealed with chachapoly")
        mount.expect(r"other page 0 is sealed with chachapoly")
        mounts.until(lambda: len(mount.complaints()) == 2, "the look at both files")
    assert sealed.stat().st_size == 8 * 4096
    assert len(windows()) == 1
    mounts.run("guard", "clear", store, key=None)
    with mounts.mounted(store, tmp_path / "mnt") as mount:
        mount.expect(rf"WARNING: file: cut from {kept} to {kept} bytes")
        assert (mount.path / "file").read_bytes() == LARGE[:kept]
        assert (mount.path / "other").read_bytes() == LARGE
        mounts.until(lambda: "every file was looked at" in mount.log(), "the look at all files")
    assert windows() == []
    assert re.search(r"every file was looked at, 1 were cut", mount.log())


# --- a host that is set up in half ----------------------------------------------------------------------------------


def test_without_a_provider_all_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fips=yes` and no FIPS provider: OpenSSL has no algorithm at all, and that is no bug of ours."""
    store = tmp_path / "store"
    mounts.init(store, cipher="aes")
    code = add_code(store)
    there = fips_host.build_empty(tmp_path / "host")
    # Of HKDF and ChaCha20-Poly1305 `cryptography` knows that they are missing; AES it tries, and fails otherwise.
    program = """
from encfs_js import errors, format
for suite in format.Suite:
    try:
        format.aead(suite, bytes(32))
    except errors.CipherMissingError as problem:
        print(suite.label, problem.exit_code)
"""
    assert fips_host.says(there, program) == "chachapoly 37\naes 37\n"
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    before = mounts.snapshot(tmp_path)
    for done in (
        mounts.run("init", tmp_path / "other", "--cipher", "aes", code=37),
        mounts.run("verify", store, key=code, code=37),
    ):
        assert "is its FIPS provider loaded?" in refused(done, "the OpenSSL of this host refuses ")
    assert mounts.snapshot(tmp_path) == before
