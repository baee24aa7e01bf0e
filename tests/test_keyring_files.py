"""The keyring's files: replaced so that no crash, no error and no power cut leaves a store that cannot be opened."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from encfs_js import keydocument, keyring, keystore
from encfs_js.backing import META, Backing
from encfs_js.errors import KeyringDamagedError, NotAStoreError, StoreIoError, VersionError, WrongKeyError
from encfs_js.format import Suite

VECTORS = Path(__file__).parent / "vectors" / "keyring"
KEY = b"correct horse battery staple"


def made(suite: Suite) -> bytes:
    return keyring.create(KEY, cipher=suite, plaintext="refuse", kdf=keyring.Kdf(iterations=1, lanes=1, memory_kib=64))


DOCUMENT = made(Suite.CHACHAPOLY)
OTHER = made(Suite.AES)


def forged() -> bytes:
    """What somebody without the key makes of the keyring: another setting, and the right checksum for it."""
    document = json.loads(DOCUMENT)
    document["settings"]["plaintext"] = "read"
    del document["checksum"]
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps(document | {"checksum": hashlib.sha256(canonical).hexdigest()}).encode()


def put(store: Path, main: bytes | None, spare: bytes | None) -> str:
    (store / META).mkdir(mode=0o700)
    for name, document in ((keydocument.NAME, main), (keydocument.COPY, spare)):
        if document is not None:
            (store / META / name).write_bytes(document)
    return str(store)


def test_write_and_load(tmp_path):
    old = os.umask(0)
    try:
        keystore.write(str(tmp_path), DOCUMENT)
    finally:
        os.umask(old)
    assert keystore.load(str(tmp_path)) == (keyring.parse(DOCUMENT), "")
    meta = tmp_path / META
    assert stat.S_IMODE(meta.stat().st_mode) == 0o700
    assert sorted(os.listdir(meta)) == ["keyring", "keyring.bak"]
    for path in meta.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_bytes() == DOCUMENT
    keystore.write(str(tmp_path), OTHER)
    assert keystore.load(str(tmp_path)) == (keyring.parse(OTHER), "")


@pytest.mark.parametrize("how", ["file", "symlink", "longer"])
def test_what_a_crash_staged_is_replaced(tmp_path, how):
    put(tmp_path, DOCUMENT, DOCUMENT)
    staged, victim = tmp_path / META / keystore.STAGED, tmp_path / "victim"
    victim.write_bytes(b"untouched")
    if how == "symlink":
        staged.symlink_to(victim)
    else:
        staged.write_bytes(b"x" * (10 if how == "file" else 100_000))
    keystore.write(str(tmp_path), OTHER)
    assert keystore.load(str(tmp_path)) == (keyring.parse(OTHER), "")
    assert victim.read_bytes() == b"untouched"
    assert not os.path.lexists(staged)


def test_no_store(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty" / META).mkdir(parents=True)
    for name in ("file", "empty", "missing", "."):
        with pytest.raises(NotAStoreError) as caught:
            keystore.load(str(tmp_path / name))
        assert "encfs-js init" in caught.value.hint


BAD = [b"", DOCUMENT[:500], bytes(1000), DOCUMENT.replace(b"refuse", b"read"), b"x" * (keydocument.MAX_DOCUMENT + 1)]


@pytest.mark.parametrize("bad", [None, *BAD], ids=lambda bad: "missing" if bad is None else f"{len(bad)} bytes")
def test_a_damaged_keyring_is_read_from_its_copy(tmp_path, bad):
    store = put(tmp_path, bad, DOCUMENT)
    found, warning = keystore.load(store)
    assert found == keyring.parse(DOCUMENT)
    path = f"{store}/{META}/keyring"
    assert warning.startswith(path)
    command = f"cp -p {path}.bak {path}"
    assert "was read instead" in warning
    assert warning.endswith(command)
    subprocess.run(command.split(), check=True)
    assert keystore.load(store) == (found, "")


@pytest.mark.parametrize(("spare", "says"), [(None, "missing"), (b"", "damaged"), (OTHER, "not the same")])
def test_a_bad_copy_is_said_too(tmp_path, spare, says):
    store = put(tmp_path, DOCUMENT, spare)
    found, warning = keystore.load(store)
    assert found == keyring.parse(DOCUMENT)
    assert says in warning
    assert warning.endswith(f"cp -p {store}/{META}/keyring {store}/{META}/keyring.bak")


def test_damage_of_both(tmp_path):
    for number, (main, spare) in enumerate([(b"", b""), (b"{}", None), (None, b"x"), (DOCUMENT[:-9], bytes(99))]):
        store = tmp_path / str(number)
        store.mkdir()
        with pytest.raises(KeyringDamagedError) as caught:
            keystore.load(put(store, main, spare))
        assert "backup" in caught.value.hint
        assert str(store / META / "keyring") in str(caught.value)


def test_a_later_version_is_not_taken_for_damage(tmp_path):
    later = json.loads((VECTORS / "version-2.json").read_bytes())["document"].encode()
    for number, (main, spare) in enumerate([(later, DOCUMENT), (later, None), (b"", later), (None, later)]):
        store = tmp_path / str(number)
        store.mkdir()
        with pytest.raises(VersionError, match="version 2"):
            keystore.load(put(store, main, spare))


def test_what_is_no_file_is_damage_and_does_not_block(tmp_path):
    makers = {
        "pipe": os.mkfifo,
        "directory": os.mkdir,
        "link": lambda path: os.symlink("keyring.bak", path),
    }
    for name, make in makers.items():
        store = tmp_path / name
        store.mkdir()
        put(store, None, DOCUMENT)
        make(store / META / "keyring")
        found, warning = keystore.load(str(store))
        assert found == keyring.parse(DOCUMENT)
        assert warning


class Failing(Backing):
    """The real system calls, but the ones that `fails(name, arguments)` picks raise `error`."""

    def __init__(self, fails, error: BaseException, half: bool = False) -> None:
        self.calls: list[str] = []
        self.opened: set[int] = set()
        for name in ("open", "close", "pwrite", "preadv", "fsync", "fstat", "mkdir", "unlink", "rename"):
            setattr(self, name, self._wrapped(name, getattr(Backing, name), fails, error, half))

    def _wrapped(self, name, call, fails, error, half):
        def wrapped(*args, **kwargs):
            self.calls.append(name)
            if fails(self, name):
                if half and name == "pwrite":
                    call(args[0], args[1][: len(args[1]) // 2], args[2])
                raise error
            result = call(*args, **kwargs)
            if name == "open":
                self.opened.add(result)
            elif name == "close":
                self.opened.discard(args[0])
            return result

        return wrapped

    def reap(self) -> None:
        for fd in self.opened:
            os.close(fd)


class Killed(BaseException):
    """The process is gone: no call after it happens, no handler for errors runs."""


def states(tmp_path):
    """The stores that a write may meet: (directory, the outcomes of load that are right if it is interrupted)."""
    old, new = keyring.parse(DOCUMENT), keyring.parse(OTHER)
    for name, main, spare, right in [
        ("fresh", None, None, (None, new)),
        ("whole", DOCUMENT, DOCUMENT, (old, new)),
        ("damaged", DOCUMENT[:-7], DOCUMENT, (old, new)),
        ("no copy", DOCUMENT, None, (old, new)),
        ("bad copy", DOCUMENT, b"{", (old, new)),
    ]:
        store = tmp_path / name
        store.mkdir()
        if name != "fresh":
            put(store, main, spare)
            (store / META / keystore.STAGED).write_bytes(b"from an earlier crash")
        yield store, right


def loaded(store) -> keyring.Keyring | None:
    try:
        return keystore.load(str(store))[0]
    except NotAStoreError:
        return None


def test_a_crash_at_any_call_leaves_a_loadable_keyring(tmp_path):
    counts = []
    for store, right in states(tmp_path):
        for last, half in ((n // 2, bool(n % 2)) for n in itertools.count()):
            work = tmp_path / "work"
            shutil.copytree(store, work)
            backing = Failing(lambda b, _, last=last: len(b.calls) > last, Killed(), half)
            try:
                keystore.write(str(work), OTHER, backing=backing)
            except Killed:
                finished = False
            else:
                finished = True
            backing.reap()
            assert loaded(work) in right, (store.name, backing.calls)
            # The copy never comes before the keyring.
            if (work / META / "keyring.bak").exists() and (work / META / "keyring.bak").read_bytes() == OTHER:
                assert (work / META / "keyring").read_bytes() == OTHER
            # The next write goes through, whatever the crash left.
            keystore.write(str(work), DOCUMENT)
            assert keystore.load(str(work)) == (keyring.parse(DOCUMENT), "")
            assert sorted(os.listdir(work / META)) == ["keyring", "keyring.bak"]
            shutil.rmtree(work)
            if finished:
                counts.append(last)
                break
    assert len(counts) == 5
    assert min(counts) > 15


@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "mkdir", "unlink", "rename"])
def test_an_error_at_any_call_is_named_and_leaves_a_loadable_keyring(tmp_path, call):
    failed = 0
    for store, right in states(tmp_path):
        for nth in range(1, 9):
            work = tmp_path / "work"
            shutil.copytree(store, work)
            error = OSError(28, "No space left on device")
            backing = Failing(lambda b, name, nth=nth: name == call and b.calls.count(call) == nth, error, half=True)
            problem = None
            try:
                keystore.write(str(work), OTHER, backing=backing)
            except StoreIoError as caught:
                problem = caught
            assert (problem is not None) == (backing.calls.count(call) >= nth)
            if problem:
                failed += 1
                assert "No space left on device" in str(problem)
                assert str(work) in str(problem)
                assert problem.hint
            assert not backing.opened
            assert loaded(work) in right
            # A staged file of this write is removed, unless it is the removal that fails.
            if call in ("pwrite", "rename"):
                assert keystore.STAGED not in os.listdir(work / META)
            shutil.rmtree(work)
    assert failed >= (5 if call != "mkdir" else 1)


class Disk(Failing):
    """An imaginary disk beside the real calls: what it holds for sure, and what a power cut may leave of the rest."""

    def __init__(self, store: Path, last: int) -> None:
        super().__init__(lambda b, _: len(b.calls) > last, Killed())
        meta = store / META
        self.names = {p.name: [p.read_bytes(), p.read_bytes()] for p in meta.iterdir()} if meta.exists() else {}
        self.durable = dict(self.names)  # name -> file; a file is [content, content that was synced]
        self.pending: list[dict] = []  # entries of the directory that changed since its last fsync; None: gone
        self.files: dict[int, list] = {}
        self.meta_durable = meta.exists()
        self.meta_fd = -1
        for name in ("open", "pwrite", "fsync", "unlink", "rename"):
            setattr(self, name, self._noted(getattr(self, name), getattr(self, f"_note_{name}")))

    def _noted(self, call, note):
        def noted(*args, **kwargs):
            result = call(*args, **kwargs)
            note(result, *args)
            return result

        return noted

    def _note_open(self, fd, name, flags, *_):
        if flags & os.O_CREAT:
            self.files[fd] = self.names[name] = [b"", b""]
            self.pending.append({name: self.names[name]})
        elif name == META:
            self.meta_fd = fd

    def _note_pwrite(self, count, fd, data, at):
        self.files[fd][0] = self.files[fd][0][:at] + bytes(data[:count])

    def _note_fsync(self, _, fd):
        if fd in self.files:
            self.files[fd][1] = self.files[fd][0]
        elif fd == self.meta_fd:
            self.durable, self.pending = dict(self.names), []
        else:
            self.meta_durable = True

    def _note_unlink(self, _, name):
        del self.names[name]
        self.pending.append({name: None})

    def _note_rename(self, _, name, to):
        self.names[to] = self.names.pop(name)
        self.pending.append({name: None, to: self.names[to]})

    def after_power_cut(self):
        """Every content that the directory may have: any of its changes, any unsynced bytes."""
        if not self.meta_durable:
            yield None
        for taken in itertools.product((False, True), repeat=len(self.pending)):
            names = dict(self.durable)
            for entries, happened in zip(self.pending, taken, strict=True):
                names |= entries if happened else {}
            names = {name: file for name, file in names.items() if file}
            for lost in range(3):
                yield {
                    n: f[1] if lost == 0 or f[0] == f[1] else f[0] if lost == 1 else bytes(len(f[0]))
                    for n, f in names.items()
                }


def test_a_power_cut_at_any_call_leaves_a_loadable_keyring(tmp_path):
    """Renames and contents reach the disk or do not, in any mixture that the fsyncs allow."""
    cuts = set()
    for store, right in states(tmp_path):
        for last in itertools.count():
            work, shown = tmp_path / "work", tmp_path / "shown"
            shutil.copytree(store, work)
            disk = Disk(work, last)
            try:
                keystore.write(str(work), OTHER, backing=disk)
            except Killed:
                finished = False
            else:
                finished = True
            disk.reap()
            shutil.rmtree(work)
            for names in disk.after_power_cut():
                state = (store.name, finished, tuple(sorted((names or {"": b""}).items())))
                if state in cuts:
                    continue
                cuts.add(state)
                shown.mkdir()
                if names is not None:
                    (shown / META).mkdir()
                    for name, content in names.items():
                        (shown / META / name).write_bytes(content)
                assert loaded(shown) in ((right[1],) if finished else right), (store.name, disk.calls)
                if finished:
                    assert names == {"keyring": OTHER, "keyring.bak": OTHER}
                shutil.rmtree(shown)
            if finished:
                break
    assert len(cuts) > 40


def test_killed_while_writing(tmp_path):
    """The real thing: SIGKILL at any moment of a process that does nothing but write."""
    script = """
import sys
from encfs_js import keystore
store, documents = sys.argv[1], [open(name, "rb").read() for name in sys.argv[2:]]
print("ready", flush=True)
while True:
    for document in documents:
        keystore.write(store, document)
"""
    names = [tmp_path / "a", tmp_path / "b"]
    for name, document in zip(names, (DOCUMENT, OTHER), strict=True):
        name.write_bytes(document)
    store = tmp_path / "store"
    store.mkdir()
    keystore.write(str(store), DOCUMENT)
    right = (keyring.parse(DOCUMENT), keyring.parse(OTHER))
    chance = random.Random(20260102)
    for _ in range(12):
        command = [sys.executable, "-c", script, str(store), *map(str, names)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            try:
                assert child.stdout.readline() == "ready\n"
                time.sleep(chance.random() * 0.02)
            finally:
                child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
        found, _warning = keystore.load(str(store))
        assert found in right


@pytest.mark.parametrize("code", [5, 13], ids=["EIO", "EACCES"])
def test_a_keyring_that_cannot_be_read(tmp_path, code):
    store = put(tmp_path, DOCUMENT, DOCUMENT)
    backing = Failing(
        lambda b, name: name == "preadv" and b.calls.count("preadv") == 1, OSError(code, os.strerror(code))
    )
    if code == 5:
        found, warning = keystore.load(store, backing=backing)
        assert found == keyring.parse(DOCUMENT)
        assert "Input/output error" in warning
    else:
        with pytest.raises(StoreIoError, match="Permission denied"):
            keystore.load(store, backing=backing)
    assert not backing.opened


def test_write_to_what_is_no_directory(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for name in ("missing", "file"):
        with pytest.raises(StoreIoError) as caught:
            keystore.write(str(tmp_path / name), DOCUMENT)
        assert name in str(caught.value)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / META).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreIoError):
        keystore.write(str(tmp_path / "store"), DOCUMENT)
    assert not os.listdir(tmp_path / "elsewhere")


# --- both in one ----------------------------------------------------------------------------------------------------


def test_unlock_store(tmp_path):
    for number, (main, spare, warns) in enumerate(
        [(DOCUMENT, DOCUMENT, ""), (b"", DOCUMENT, "was read instead"), (forged(), DOCUMENT, "was read instead")]
    ):
        store = tmp_path / str(number)
        store.mkdir()
        found, keys, warning = keystore.unlock_store(put(store, main, spare), KEY)
        assert found == keyring.parse(DOCUMENT)
        assert keys.settings.plaintext == "refuse"
        assert warns in warning
        assert bool(warning) == bool(warns)
        with pytest.raises(WrongKeyError):
            keystore.unlock_store(str(store), b"wrong")
    for number, spare in enumerate([forged(), None, b"{"]):
        store = tmp_path / f"no {number}"
        store.mkdir()
        with pytest.raises(KeyringDamagedError):
            keystore.unlock_store(put(store, forged(), spare), KEY)
