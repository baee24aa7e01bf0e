"""A change of the keyring under its lock: nothing is lost between two processes, and no kill leaves a store without a key."""

from __future__ import annotations

import contextlib
import fcntl
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
import warnings
from pathlib import Path

import pytest
from test_keyring_files import Failing, put
from test_keyring_slots import ALL, CHEAP, CODE, FIRST, KEY, KEYS, OTHER, SECRETS, TPM, forged

from encfs_js import keydocument, keyring, keystore
from encfs_js.backing import META, Backing
from encfs_js.errors import (
    KeyringDamagedError,
    NotAStoreError,
    SlotError,
    StoreBusyError,
    StoreIoError,
    VersionError,
    WrongKeyError,
)
from encfs_js.format import Suite

DOCUMENT = keydocument.write_out(ALL)
NOBODY = 65534


def store_with(path: Path, found: keyring.Keyring = ALL) -> str:
    path.mkdir()
    return put(path, *[keydocument.write_out(found)] * 2)


def held(store: str) -> dict[str, tuple[int, int, bytes]]:
    """What lies in .encfs_js, but the lock."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in Path(store, META).iterdir()
        if path.name != keystore.LOCK
    }


# --- one process ------------------------------------------------------------------------------------------------------


def test_a_change_is_on_the_disk_twice(tmp_path):
    store = store_with(tmp_path / "store")
    after = keystore.update(store, lambda found: keyring.remove_slot(found, KEYS, 1))
    assert [slot.id for slot in after.slots] == [2, 3, 4]
    assert keystore.load(store) == (after, "")
    assert sorted(os.listdir(Path(store, META))) == ["keyring", "keyring.bak", "keyring.lock"]
    assert stat.S_IMODE(Path(store, META, "keyring.lock").stat().st_mode) == 0o600
    before = held(store)
    assert keystore.update(store, lambda _: None) == after
    assert held(store) == before


def test_a_change_that_raises_changes_nothing(tmp_path):
    store = store_with(tmp_path / "store", FIRST)
    before = held(store)
    with pytest.raises(SlotError):
        keystore.update(store, lambda found: keyring.remove_slot(found, KEYS, 1))
    with pytest.raises(ZeroDivisionError):
        keystore.update(store, lambda _: 1 // 0)
    assert held(store) == before
    keystore.update(store, lambda found: keyring.add_epoch(found, KEYS), patience=0)  # the lock is free again


def test_what_is_no_store_gets_no_lock(tmp_path):
    (tmp_path / "empty" / META).mkdir(parents=True)
    for name in ("empty", "missing", "."):
        with pytest.raises(NotAStoreError):
            keystore.update(str(tmp_path / name), lambda _: pytest.fail("a change of nothing"))
    assert os.listdir(tmp_path / "empty" / META) == []
    assert os.listdir(tmp_path) == ["empty"]


def test_the_lock_is_waited_for_and_named(tmp_path):
    store = store_with(tmp_path / "store")
    keystore.update(store, lambda _: None)
    path = Path(store, META, keystore.LOCK)
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        begun = time.monotonic()
        with pytest.raises(StoreBusyError) as caught:
            keystore.update(store, lambda _: pytest.fail("changed without the lock"), patience=0.2)
        assert time.monotonic() - begun >= 0.2
    assert str(path) in str(caught.value)
    assert "fuser" in caught.value.hint
    keystore.update(store, lambda found: keyring.remove_slot(found, KEYS, 1))


@pytest.mark.parametrize("what", ["directory", "pipe", "symlink"])
def test_a_lock_that_is_no_file(tmp_path, what):
    store = store_with(tmp_path / "store")
    path = Path(store, META, keystore.LOCK)
    {"directory": path.mkdir, "pipe": lambda: os.mkfifo(path), "symlink": lambda: path.symlink_to("keyring")}[what]()
    before = held(store)
    if what == "pipe":
        keystore.update(store, lambda _: None)  # a pipe can be locked like a file, and is not waited for
    else:
        with pytest.raises(StoreIoError, match=r"keyring\.lock: "):
            keystore.update(store, lambda found: keyring.remove_slot(found, KEYS, 1))
    assert held(store) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes the keyring of somebody else")
def test_what_root_changes_stays_the_owners(tmp_path):
    store = store_with(tmp_path / "store")
    for path in (Path(store, META), *Path(store, META).iterdir()):
        os.chown(path, NOBODY, NOBODY)
    keystore.update(store, lambda found: keyring.remove_slot(found, KEYS, 1))
    for path in Path(store, META).iterdir():
        assert (path.stat().st_uid, path.stat().st_gid) == (NOBODY, NOBODY)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main", [None, b"", DOCUMENT[:-3]], ids=["missing", "empty", "cut"])
def test_what_only_the_copy_is_left_of_is_not_changed(tmp_path, main):
    """The copy may be from before the last change: to go on from it would lose a new epoch for good."""
    (tmp_path / "store").mkdir()
    store = put(tmp_path / "store", main, DOCUMENT)
    before = held(store)
    with pytest.raises(KeyringDamagedError, match="not changed") as caught:
        keystore.update(store, lambda found: keyring.remove_slot(found, KEYS, 1))
    assert held(store) == before
    command = caught.value.hint.rpartition("then: ")[2]
    assert command == f"cp -p {store}/{META}/keyring.bak {store}/{META}/keyring"
    subprocess.run(command.split(), check=True)
    keystore.update(store, lambda found: keyring.remove_slot(found, KEYS, 1))


def test_a_change_makes_a_bad_copy_anew(tmp_path):
    for number, spare in enumerate([None, b"{", keydocument.write_out(FIRST)]):
        (tmp_path / str(number)).mkdir()
        store = put(tmp_path / str(number), DOCUMENT, spare)
        after = keystore.update(store, lambda found: keyring.remove_slot(found, KEYS, 1))
        assert keystore.load(store) == (after, "")


def test_a_keyring_of_another_store_is_not_changed_and_opens_nothing(tmp_path):
    """Swapped: the one file, or both. Its own key is needed, and then it has other volume keys."""
    stranger = keyring.parse(keyring.create(b"stranger", cipher=Suite.AES, plaintext="refuse", kdf=CHEAP))
    for number, (main, spare) in enumerate([(stranger, stranger), (stranger, ALL), (OTHER, OTHER)]):
        (tmp_path / str(number)).mkdir()
        store = put(tmp_path / str(number), keydocument.write_out(main), keydocument.write_out(spare))
        before = held(store)
        with pytest.raises(KeyringDamagedError):
            keystore.update(store, lambda found: keyring.change_settings(found, KEYS, plaintext="read"))
        with pytest.raises(KeyringDamagedError):
            keyring.renew(keystore.load(store)[0], KEYS)
        if main is stranger:
            with pytest.raises(WrongKeyError):
                keystore.unlock_store(store, KEY)
        else:
            assert keystore.unlock_store(store, KEY)[1].secrets() != KEYS.secrets()
        assert held(store) == before
        assert ("not the same" in keystore.load(store)[1]) == (spare is ALL)


def test_a_forged_keyring_is_not_changed(tmp_path):
    (tmp_path / "store").mkdir()
    mine = keydocument.write_out(forged(ALL, "settings", "plaintext", to="read"))
    store = put(tmp_path / "store", mine, DOCUMENT)
    before = held(store)
    with pytest.raises(KeyringDamagedError, match="does not authenticate"):
        keystore.update(store, lambda found: keyring.remove_slot(found, KEYS, 1))
    assert held(store) == before


def test_cut_anywhere(tmp_path):
    """Both files, to every length: the copy is read while it is whole, and half a keyring is never taken for one."""
    store = store_with(tmp_path / "store")
    main, spare = Path(store, META, "keyring"), Path(store, META, "keyring.bak")
    for length in reversed(range(len(DOCUMENT.rstrip()))):
        os.truncate(main, length)
        found, warning = keystore.load(store)
        assert found == ALL
        assert "was read instead" in warning
    main.write_bytes(DOCUMENT)
    for length in reversed(range(len(DOCUMENT.rstrip()))):
        os.truncate(spare, length)
        found, warning = keystore.load(store)
        assert found == ALL
        assert "is damaged" in warning
    spare.write_bytes(DOCUMENT)
    for length in reversed(range(0, len(DOCUMENT.rstrip()), 7)):
        os.truncate(main, length)
        os.truncate(spare, length)
        with pytest.raises(KeyringDamagedError):
            keystore.load(store)


# --- kills ------------------------------------------------------------------------------------------------------------

NEW = b"brand new"
CHANGES = {
    "add": (FIRST, keyring.add_slot(FIRST, KEYS, "key", NEW, kdf=CHEAP), KEY, NEW),
    "add tpm": (FIRST, keyring.add_slot(FIRST, KEYS, "tpm", TPM), KEY, TPM),
    "add recovery": (FIRST, keyring.add_slot(FIRST, KEYS, "recovery", CODE), KEY, CODE),
    "remove": (ALL, keyring.remove_slot(ALL, KEYS, 1), KEY, SECRETS["key"]),
    "replace": (FIRST, keyring.replace_slot(FIRST, KEYS, 1, "key", NEW, kdf=CHEAP), KEY, NEW),
    "replace by tpm": (FIRST, keyring.replace_slot(FIRST, KEYS, 1, "tpm", TPM), KEY, TPM),
    "add epoch": (ALL, keyring.add_epoch(ALL, KEYS, cipher=Suite.CHACHAPOLY), TPM, TPM),
    "settings": (ALL, keyring.change_settings(ALL, KEYS, plaintext="read"), TPM, TPM),
}
_TWO = keyring.parse(keyring.add_epoch(ALL, KEYS))
CHANGES["drop epochs"] = (_TWO, keyring.drop_epochs(_TWO, KEYS, [1]), CODE, CODE)
_DROPPED = keyring.parse(CHANGES["drop epochs"][1])
CHANGES["take epochs"] = (_DROPPED, keyring.take_epochs(_DROPPED, KEYS, _TWO), CODE, CODE)


class Deadly(Backing):
    """The real system calls; the process is killed before the n-th, or in the middle of it if it writes."""

    def __init__(self, last: int, half: bool) -> None:
        calls = itertools.count()
        for name in (
            "open",
            "close",
            "pwrite",
            "preadv",
            "fsync",
            "fstat",
            "stat",
            "chown",
            "mkdir",
            "unlink",
            "rename",
        ):
            setattr(self, name, self._counted(name, getattr(Backing, name), calls, last, half))

    @staticmethod
    def _counted(name, call, calls, last, half):
        def counted(*args, **kwargs):
            if next(calls) == last:
                if half and name == "pwrite":
                    call(args[0], args[1][: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted


def killed_at(store: str, document: bytes, last: int, half: bool) -> bool:
    """Change the keyring in a process of its own that is killed at a call. False: it came to the end before that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests: none holds a lock of ours
        child = os.fork()
    if child == 0:
        try:
            keystore.update(store, lambda _: document, backing=Deadly(last, half))
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in {0, -signal.SIGKILL}
    return code != 0


@pytest.mark.parametrize("change", CHANGES)
def test_killed_at_every_call(tmp_path, change):
    before, document, old_key, new_key = CHANGES[change]
    after = keyring.parse(document)
    seen = set()
    for last, half in ((n // 2, bool(n % 2)) for n in itertools.count()):
        store = store_with(tmp_path / "store", before)
        died = killed_at(store, document, last, half)
        found, warning = keystore.load(store)
        assert found in (before, after)
        seen.add((found == after, bool(warning)))
        # The old key opens the old one, the new key the new one: somebody always gets in.
        opened, keys, _ = keystore.unlock_store(store, new_key if found == after else old_key)
        assert opened == found
        assert set(keys.secrets()[1].items()) >= set(keyring.renew(before, KEYS).secrets()[1].items()) or change == (
            "drop epochs"
        )
        # The next change goes through, and leaves nothing behind.
        again = keystore.update(store, lambda f, k=keys: keyring.change_settings(f, k, plaintext="read"), patience=0)
        assert keystore.load(store) == (again, "")
        assert sorted(os.listdir(Path(store, META))) == ["keyring", "keyring.bak", "keyring.lock"]
        shutil.rmtree(store)
        if not died:
            break
    assert last > 25
    assert seen == {(False, False), (True, True), (True, False)}


@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "rename", "unlink"])
def test_an_error_at_any_call_leaves_the_old_or_the_new(tmp_path, call):
    before, document, _, _ = CHANGES["replace"]
    for nth in itertools.count(1):
        store = store_with(tmp_path / "store", before)
        backing = Failing(
            lambda b, name, nth=nth: name == call and b.calls.count(call) == nth, OSError(28, "No space left on device")
        )
        with contextlib.suppress(StoreIoError, KeyringDamagedError):
            keystore.update(store, lambda _: document, backing=backing)
        assert not backing.opened
        failed = backing.calls.count(call) >= nth
        assert keystore.load(store)[0] in (before, keyring.parse(document))
        keystore.update(store, lambda f: keyring.change_settings(f, KEYS, plaintext="read"), patience=0)
        shutil.rmtree(store)
        if not failed:
            break
    assert nth > 2


# --- two processes ----------------------------------------------------------------------------------------------------

ADDER = """
import sys, time
from encfs_js import keyring, keystore
store, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
_, keys, _ = keystore.unlock_store(store, b"correct horse battery staple")
print("ready", flush=True)
sys.stdin.readline()
for i in range(count):
    secret = b"%20d" % i + name.encode()
    keystore.update(store, lambda found: keyring.add_slot(found, keys, "tpm", secret, label=f"{name} {i}"))
    keystore.update(store, lambda found: keyring.add_epoch(found, keys))
    time.sleep(0.01)  # lets the other one in, which looks for the lock as often
"""


def test_two_processes_at_once_lose_nothing(tmp_path):
    store = store_with(tmp_path / "store", FIRST)
    names, count = ("left", "right"), 15
    children = [
        subprocess.Popen(
            [sys.executable, "-c", ADDER, store, name, str(count)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in names
    ]  # fmt: skip
    try:
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        for child in children:
            _, errors = child.communicate(timeout=60)
            assert (child.returncode, errors) == (0, "")
    finally:
        for child in children:
            child.kill()
            child.communicate()
    found, warning = keystore.load(store)
    assert warning == ""
    assert sorted(slot.label for slot in found.slots[1:]) == sorted(f"{n} {i}" for n in names for i in range(count))
    order = [slot.label.split()[0] for slot in found.slots[1:]]
    assert order != sorted(order), "the two were not at it at the same time"
    assert [slot.id for slot in found.slots] == list(range(1, 2 * count + 2))
    assert [e.epoch for e in found.epochs] == list(range(1, 2 * count + 2))
    for name, i in itertools.product(names, range(count)):
        keyring.unlock(found, b"%20d" % i + name.encode())


CHANGER = """
import itertools, sys
from encfs_js import keyring, keystore
store = sys.argv[1]
found, keys, _ = keystore.unlock_store(store, b"correct horse battery staple")
print("ready", flush=True)
for i in itertools.count():
    keystore.update(store, lambda found: keyring.replace_slot(found, keys, 1, "tpm", b"%30d" % i, label=str(i)))
"""


def test_killed_at_any_moment(tmp_path):
    """The real thing: SIGKILL of a process that does nothing but change the key. The lock goes with it."""
    store = store_with(tmp_path / "store", FIRST)
    chance = random.Random(20260103)
    for _ in range(8):
        keystore.update(store, lambda found: keyring.replace_slot(found, KEYS, 1, "key", KEY, kdf=CHEAP), patience=0)
        command = [sys.executable, "-c", CHANGER, store]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            try:
                assert child.stdout.readline() == "ready\n"
                time.sleep(chance.random() * 0.03)
            finally:
                child.kill()
        found, _ = keystore.load(store)
        [slot] = found.slots
        key = KEY if slot.kind == "key" else b"%30d" % int(slot.label)
        assert keyring.unlock(found, key).secrets() == KEYS.secrets()


# --- exports ----------------------------------------------------------------------------------------------------------


def test_an_export_is_a_new_file(tmp_path):
    path = tmp_path / "exported"
    old = os.umask(0)
    try:
        keystore.export(str(path), DOCUMENT)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keystore.load_export(str(path)) == ALL
    assert json.loads(path.read_bytes()) == json.loads(DOCUMENT)
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("exported", "dangling", "."):
        with pytest.raises(StoreIoError, match=name):
            keystore.export(str(tmp_path / name), keydocument.write_out(FIRST))
    with pytest.raises(StoreIoError, match="No such file"):
        keystore.export(str(tmp_path / "missing" / "file"), DOCUMENT)
    assert path.read_bytes() == DOCUMENT
    assert not (tmp_path / "nowhere").exists()


def test_an_export_that_does_not_fit_leaves_no_file(tmp_path):
    script = """
import resource, sys
from encfs_js import keystore
from encfs_js.errors import StoreIoError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    keystore.export(sys.argv[1], bytes(2000))
except StoreIoError as error:
    print(error)
"""
    path = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{path}: the keyring was not exported: File too large\n"
    assert os.listdir(tmp_path) == []


def test_what_is_no_export(tmp_path):
    later = json.loads((Path(__file__).parent / "vectors" / "keyring" / "version-2.json").read_bytes())["document"]
    for content, says in (
        (None, "No such file"),
        (b"", "not the JSON"),
        (DOCUMENT[:-9], "damaged"),
        (later.encode(), "version"),
    ):
        path = tmp_path / "file"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises((StoreIoError, KeyringDamagedError, VersionError), match=says) as caught:
            keystore.load_export(str(path))
        assert str(path) in str(caught.value)
        assert caught.value.hint
