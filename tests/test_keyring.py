"""The keyring: vectors, damage of every kind, secrets that stay secret (the files: test_keyring_files.py)."""

from __future__ import annotations

import copy
import dataclasses
import datetime as dt
import hashlib
import importlib.util
import itertools
import json
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encfs_js import keydocument, keyring
from encfs_js.errors import (
    EncfsError,
    KeyringDamagedError,
    VersionError,
    WrongKeyError,
)
from encfs_js.format import Suite

VECTORS = Path(__file__).parent / "vectors" / "keyring"
KEY = b"correct horse battery staple"
CHEAP = keyring.Kdf(iterations=1, lanes=1, memory_kib=64)
NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.timezone(dt.timedelta(hours=1)))
OUTCOMES = {"wrong key": WrongKeyError, "damaged": KeyringDamagedError, "version": VersionError}


def _load_reference():
    spec = importlib.util.spec_from_file_location("keyring_reference", VECTORS / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _load_reference()


def made(suite: Suite = Suite.CHACHAPOLY, plaintext: str = "refuse", key: bytes = KEY, **more) -> bytes:
    return keyring.create(key, cipher=suite, plaintext=plaintext, kdf=CHEAP, **more)


DOCUMENT = made()
OTHER = made(Suite.AES)


# --- vectors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in VECTORS.glob("*.json")))
def test_vector(name):
    vector = json.loads((VECTORS / f"{name}.json").read_bytes())
    document = vector["document"].encode() if "document" in vector else bytes.fromhex(vector["document_hex"])
    key = vector["key"].encode()
    if vector["expect"] != "success":
        with pytest.raises(OUTCOMES[vector["expect"]]) as caught:
            keyring.unlock(keyring.parse(document), key)
        assert caught.value.hint
        return
    keys = keyring.unlock(keyring.parse(document), key)
    assert {str(e.epoch): keys.volume_key(e.epoch).hex() for e in keyring.parse(document).epochs} == vector[
        "volume_keys"
    ]
    assert keys.settings.cipher.label == vector["settings"]["cipher"]
    assert (keys.settings.plaintext, keys.settings.epoch) == (
        vector["settings"]["plaintext"],
        vector["settings"]["epoch"],
    )


def test_the_vectors_are_what_the_reference_makes():
    wanted = {name: reference.render(vector) for name, vector in reference.vectors().items()}
    assert {path.stem: path.read_bytes() for path in VECTORS.glob("*.json")} == wanted


def test_the_vectors_say_no_more_often_than_yes():
    expects = [json.loads(path.read_bytes())["expect"] for path in VECTORS.glob("*.json")]
    assert set(expects) == {"success", *OUTCOMES}
    assert 2 * expects.count("success") < len(expects)


@pytest.mark.parametrize("suite", Suite)
def test_the_reference_reads_what_we_write(suite):
    document = made(suite, "read", label="töst")
    keys = keyring.unlock(keyring.parse(document), KEY)
    assert reference.decode(document, KEY.decode()) == ("success", {1: keys.volume_key(1)})
    assert reference.decode(document, "x") == ("wrong key", {})
    changed = keyring.change_settings(keyring.parse(document), keys, plaintext="refuse")
    assert reference.decode(changed, KEY.decode()) == ("success", {1: keys.volume_key(1)})


# --- making and changing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", Suite)
def test_create_says_what_it_was_told(suite):
    parsed = keyring.parse(made(suite, "read", label="ops", now=lambda: NOW))
    assert parsed.settings == keyring.Settings(suite, "read", 1)
    [slot], [epoch] = parsed.slots, parsed.epochs
    assert (slot.id, slot.kind, slot.label, slot.suite, slot.kdf) == (1, "key", "ops", suite, CHEAP)
    assert slot.created == epoch.created == "2026-01-02T02:04:05Z"
    keys = keyring.unlock(parsed, KEY)
    assert (keys.store_id, keys.settings) == (parsed.store_id, parsed.settings)
    with pytest.raises(KeyError):
        keys.volume_key(2)


def test_every_byte_of_randomness_is_asked_for_and_used():
    asked = []

    def counting(length: int) -> bytes:
        asked.append(length)
        return hashlib.shake_256(bytes([len(asked)])).digest(length)

    first = made(random=counting, now=lambda: NOW)
    assert sorted(asked) == [12, 12, 16, 16, 32, 32]
    asked.clear()
    assert made(random=counting, now=lambda: NOW) == first
    assert made() != made()


def test_the_default_cost_is_the_one_of_the_format():
    [slot] = keyring.parse(keyring.create(KEY, cipher=Suite.AES, plaintext="refuse")).slots
    assert slot.kdf == keyring.Kdf(3, 4, 65536)


@pytest.mark.parametrize(
    "wrong", [{"key": b""}, {"plaintext": "no"}, {"label": "a\nb"}, {"label": "x" * 256}, {"label": "\ud800"}]
)
def test_create_refuses_what_it_could_not_read_back(wrong):
    with pytest.raises(ValueError):
        made(**wrong)


def test_change_settings_changes_those_and_nothing_else():
    before = keyring.parse(DOCUMENT)
    keys = keyring.unlock(before, KEY)
    after = keyring.parse(keyring.change_settings(before, keys, cipher=Suite.AES, plaintext="read"))
    assert after.settings == keyring.Settings(Suite.AES, "read", 1)
    assert (after.slots, after.epochs, after.store_id) == (before.slots, before.epochs, before.store_id)
    assert keyring.unlock(after, KEY).volume_key(1) == keys.volume_key(1)
    assert keyring.parse(keyring.change_settings(before, keys)) == before


@pytest.mark.parametrize("wrong", [{"epoch": 2}, {"epoch": 0}, {"plaintext": "maybe"}, {"plaintext": ""}])
def test_change_settings_refuses_what_is_no_setting(wrong):
    parsed = keyring.parse(DOCUMENT)
    with pytest.raises(ValueError):
        keyring.change_settings(parsed, keyring.unlock(parsed, KEY), **wrong)


def test_change_settings_keeps_slots_that_it_does_not_know():
    vector = json.loads((VECTORS / "unknown-kind-beside.json").read_bytes())
    parsed = keyring.parse(vector["document"].encode())
    changed = keyring.change_settings(parsed, keyring.unlock(parsed, vector["key"].encode()), plaintext="read")
    assert json.loads(changed)["slots"] == json.loads(vector["document"])["slots"]


def test_change_settings_blesses_nothing_that_somebody_else_wrote():
    parsed = keyring.parse(DOCUMENT)
    keys = keyring.unlock(parsed, KEY)
    forged = json.loads(DOCUMENT)
    forged["slots"][0]["label"] = "mine"
    for foreign in (keyring.parse(json.dumps(reference.with_checksum(forged)).encode()), keyring.parse(OTHER)):
        with pytest.raises(KeyringDamagedError):
            keyring.change_settings(foreign, keys, plaintext="read")


def test_derived_keys_depend_on_store_and_purpose():
    keys, others = (keyring.unlock(keyring.parse(d), KEY) for d in (DOCUMENT, OTHER))
    derived = {k.derive(info) for k in (keys, others) for info in (b"a", b"b")}
    assert len(derived) == 4
    assert keys.derive(b"a") == keys.derive(b"a")
    assert len(keys.derive(b"a", 16)) == 16


# --- damage ---------------------------------------------------------------------------------------------------------


def assert_refused_or_the_same(changed: bytes) -> None:
    try:
        parsed = keyring.parse(changed)
    except (KeyringDamagedError, VersionError):
        return
    assert parsed == keyring.parse(DOCUMENT), changed


def test_every_bit_flip_is_refused():
    for at, bit in itertools.product(range(len(DOCUMENT)), range(8)):
        changed = bytearray(DOCUMENT)
        changed[at] ^= 1 << bit
        assert_refused_or_the_same(bytes(changed))


def test_every_cut_is_refused():
    for length in range(len(DOCUMENT.rstrip())):
        for cut in (DOCUMENT[:length], DOCUMENT[length + 1 :], DOCUMENT[:length] + bytes(len(DOCUMENT) - length)):
            with pytest.raises(KeyringDamagedError):
                keyring.parse(cut)


@settings(max_examples=300, deadline=None, database=None)
@given(st.data())
def test_any_splice_is_refused(data):
    start = data.draw(st.integers(0, len(DOCUMENT)))
    end = data.draw(st.integers(start, min(start + 8, len(DOCUMENT))))
    piece = data.draw(
        st.one_of(st.binary(max_size=8), st.sampled_from([DOCUMENT, b"{}", b"null", b"1e400", b'"version":9,']))
    )
    assert_refused_or_the_same(DOCUMENT[:start] + piece + DOCUMENT[end:])


def leaves(value, path=()):
    """Every place of a document: its names, its list entries, its values."""
    yield path
    if isinstance(value, (dict, list)):
        for step in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[step], (*path, step))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, database=None)
@given(st.data())
def test_no_forgery_without_the_key_is_ever_opened(data):
    """Any place holds any other value, or is gone, and the checksum is right again."""
    source = json.loads((VECTORS / "second-slot.json").read_bytes())
    forged = json.loads(source["document"])
    *way, last = data.draw(st.sampled_from([p for p in leaves(forged) if p and p != ("checksum",)]))
    place = forged
    for step in way:
        place = place[step]
    before = copy.deepcopy(place)
    if data.draw(st.booleans()):
        del place[last]
    else:
        old = place[last]
        near = (
            [old + 1, old - 1] if isinstance(old, int) else [old[::-1], old[:-1]] if isinstance(old, str) else [[], {}]
        )
        place[last] = data.draw(st.sampled_from(near) | JSON)
        # What takes long is no forgery that must be tried here: 16 times the cost of the vector is enough.
        if last in ("iterations", "lanes", "memory_kib") and type(place[last]) is int:
            place[last] %= 1024
    if json.dumps(place, sort_keys=True) == json.dumps(before, sort_keys=True):
        return
    with pytest.raises((KeyringDamagedError, VersionError, WrongKeyError)):
        keyring.unlock(keyring.parse(json.dumps(reference.with_checksum(forged)).encode()), source["key"].encode())


def test_a_document_of_more_than_a_mebibyte_is_refused():
    with pytest.raises(KeyringDamagedError, match="longer"):
        keyring.parse(DOCUMENT + b" " * keydocument.MAX_DOCUMENT)


# --- errors and secrets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suite", "name"), [(Suite.CHACHAPOLY, "chacha20poly1305"), (Suite.AES, "cipher")])
def test_a_wrong_key_is_said_in_the_words_that_nats_users_know(suite, name):
    with pytest.raises(WrongKeyError) as caught:
        keyring.unlock(keyring.parse(made(suite)), b"wrong")
    assert str(caught.value) == f"Error decrypting our keyring: {name}: message authentication failed"
    assert "nothing was written" in caught.value.hint
    for word in ("--key-file", "--credential", "JS_KEY", "encfs-js inspect"):
        assert word in caught.value.hint


def test_an_empty_key_is_never_tried():
    with pytest.raises(ValueError):
        keyring.unlock(keyring.parse(DOCUMENT), b"")


def everything_about(error: BaseException) -> str:
    """All that an error handler, a log or a debugger without frames could show of an error."""
    seen, todo, found = set(), [error], []
    while todo:
        here = todo.pop()
        if here is None or id(here) in seen:
            continue
        seen.add(id(here))
        found += ["".join(traceback.format_exception(here)), repr(here), repr(here.args), repr(vars(here))]
        todo += [here.__context__, here.__cause__]
    return "\n".join(found)


def test_no_error_shows_a_key():
    parsed = keyring.parse(DOCUMENT)
    keys = keyring.unlock(parsed, KEY)
    wrong = os.urandom(16).hex().encode()
    forged = json.loads(DOCUMENT)
    forged["settings"]["plaintext"] = "read"
    forged = keyring.parse(json.dumps(reference.with_checksum(forged)).encode())
    tries = [
        lambda: keyring.unlock(parsed, wrong),
        lambda: keyring.unlock(forged, KEY),
        lambda: keyring.change_settings(forged, keys, plaintext="read"),
        lambda: keyring.change_settings(parsed, keys, epoch=9),
        lambda: keyring.create(KEY, cipher=Suite.AES, plaintext="no", kdf=CHEAP),
        lambda: keys.volume_key(9),
        lambda: pickle.dumps(keys),
    ]
    secrets = [KEY, wrong, keys.volume_key(1), keys._keyring_key]
    for attempt in tries:
        with pytest.raises((EncfsError, ValueError, KeyError, TypeError)) as caught:
            attempt()
        shown = everything_about(caught.value)
        for secret in secrets:
            assert secret.hex() not in shown
            assert repr(secret)[2:-1] not in shown


def test_keys_show_and_give_away_nothing():
    keys = keyring.unlock(keyring.parse(DOCUMENT), KEY)
    shown = f"{keys} {keys!r} {[keys]} {dir(keys)}"
    for secret in (keys.volume_key(1), keys._keyring_key):
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            leak(keys)
    with pytest.raises(TypeError):
        vars(keys)
    assert not dataclasses.is_dataclass(keys)


def test_a_keyring_shows_no_ciphertext():
    shown = repr(keyring.parse(DOCUMENT))
    assert "wrapped" not in shown
    assert "mac" not in shown


def test_too_little_memory_is_no_damage(tmp_path):
    """Argon2id wants 1 GiB, the process may have 600 MiB."""
    script = """
import resource, sys
from encfs_js import keyring
from encfs_js.errors import StoreIoError
from encfs_js.format import Suite
resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))
try:
    keyring.create(b"key", cipher=Suite.AES, plaintext="refuse", kdf=keyring.Kdf(1, 1, 1 << 20))
except StoreIoError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1048576 KiB" in done.stdout
