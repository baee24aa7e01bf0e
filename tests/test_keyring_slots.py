"""Slots and epochs: what every change makes, what it refuses, and that nothing is ever blessed unseen."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import decoder
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sealed_files import examples
from test_keyring import everything_about, leaves, reference

from encfs_js import keydocument, keyring, recovery, slots
from encfs_js.errors import KeyringDamagedError, ReencryptError, SlotError, WrongKeyError
from encfs_js.format import Suite

if TYPE_CHECKING:
    from encfs_js.keyring import Keyring

VECTORS = Path(__file__).parent / "vectors" / "keyring"
CHEAP = keyring.Kdf(iterations=1, lanes=1, memory_kib=64)
KEY = b"correct horse battery staple"
TPM = b"SUAKYRHVIOREXV7EUZTBHUHL7NUMHPMAS7QMDU3GTIUWEI5LDNOXD43IZY"
CODE = recovery.encode(bytes(range(20))).encode()
SECRETS = {"key": b"another key", "tpm": TPM, "recovery": CODE}
LATER = dt.datetime(2030, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


def made(suite: Suite = Suite.AES, key: bytes = KEY, kind: str = "key") -> Keyring:
    return keyring.parse(keyring.create(key, kind=kind, cipher=suite, plaintext="refuse", kdf=CHEAP))


FIRST = made()
KEYS = keyring.unlock(FIRST, KEY)
OTHER = made()


def with_slot(found: Keyring, kind: str, secret: bytes | None = None, **more) -> Keyring:
    document = keyring.add_slot(found, keyring.renew(found, KEYS), kind, secret or SECRETS[kind], kdf=CHEAP, **more)
    return keyring.parse(document)


ALL = with_slot(with_slot(with_slot(FIRST, "key"), "tpm"), "recovery", label="on paper")
WITH_UNKNOWN = json.loads((VECTORS / "unknown-kind-beside.json").read_bytes())


def forged(found: Keyring, *way, to) -> Keyring:
    """What somebody without a key makes of a keyring."""
    document = json.loads(keydocument.write_out(found))
    place = document
    for step in way[:-1]:
        place = place[step]
    place[way[-1]] = to
    return keyring.parse(json.dumps(reference.with_checksum(document)).encode())


# --- slots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("suite", Suite)
def test_a_slot_that_was_added_opens(suite, kind):
    before = made(suite)
    keys = keyring.unlock(before, KEY)
    document = keyring.add_slot(before, keys, kind, SECRETS[kind], label="ops", now=lambda: LATER, kdf=CHEAP)
    after = keyring.parse(document)
    old, new = after.slots
    assert old == before.slots[0]
    assert (new.id, new.kind, new.label, new.created, new.suite) == (2, kind, "ops", "2030-01-02T03:04:05Z", suite)
    assert new.kdf == (CHEAP if kind == "key" else None)
    assert (after.epochs, after.settings) == (before.epochs, before.settings)
    for secret, number in ((KEY, 1), (SECRETS[kind], 2)):
        opened = keyring.unlock(after, secret)
        assert opened.secrets() == keys.secrets()
        assert opened.slot == number == keyring.opened_by(after, secret)
        assert reference.decode(document, secret.decode()) == ("success", keys.secrets()[1])
        assert decoder.unlock(document, secret).volume_keys == keys.secrets()[1]
    for wrong in (b"wrong", SECRETS[kind][:-1]):
        with pytest.raises(WrongKeyError):
            keyring.unlock(after, wrong)
        with pytest.raises(decoder.WrongKey):
            decoder.unlock(document, wrong)


@pytest.mark.parametrize("kind", ["tpm", "recovery"])
def test_a_store_may_begin_with_any_kind(kind):
    found = made(key=SECRETS[kind], kind=kind)
    assert [slot.kind for slot in found.slots] == [kind]
    keyring.unlock(found, SECRETS[kind])
    with pytest.raises(WrongKeyError):
        keyring.unlock(found, KEY)


def test_what_is_random_is_tried_before_what_is_slow(monkeypatch):
    def unwanted(**_):
        raise AssertionError("Argon2id although the secret is one that needs none")

    monkeypatch.setattr(slots, "Argon2id", unwanted)
    assert keyring.unlock(ALL, TPM).secrets() == KEYS.secrets()
    assert keyring.unlock(ALL, CODE.lower()).secrets() == KEYS.secrets()
    with pytest.raises(AssertionError):
        keyring.unlock(ALL, b"wrong")


def test_a_code_with_a_typing_error_is_told_where_one_is_expected():
    mistyped = CODE[:-1] + b"0"
    assert recovery.is_mistyped(mistyped)
    with pytest.raises(WrongKeyError) as caught:
        keyring.unlock(ALL, mistyped)
    assert "recovery code with a typing error" in caught.value.hint
    for found, key in ((ALL, CODE + b"00"), (ALL, b"wrong"), (FIRST, mistyped), (FIRST, CODE)):
        with pytest.raises(WrongKeyError) as caught:
            keyring.unlock(found, key)
        assert "typing error" not in caught.value.hint
    # What has the form of a code may be a key all the same.
    assert keyring.opened_by(with_slot(ALL, "key", mistyped), mistyped) == 5


def test_secrets_that_make_no_slot():
    for kind, secret in (("key", b""), ("tpm", b""), ("recovery", b""), ("recovery", CODE[:-1]), ("fido2", TPM)):
        with pytest.raises(ValueError):
            keyring.add_slot(FIRST, KEYS, kind, secret)
    with pytest.raises(SlotError, match="too short") as caught:
        keyring.add_slot(FIRST, KEYS, "tpm", b"x" * 19)
    assert "keys_file" in caught.value.hint
    with_slot(FIRST, "tpm", b"x" * 20)


def test_a_key_may_be_long():
    key = b"x" * (1 << 20)
    assert keyring.opened_by(with_slot(FIRST, "key", key), key) == 2


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_slot_that_was_removed_opens_no_more(number):
    secrets = dict(enumerate([KEY, *SECRETS.values()], 1))
    after = keyring.parse(keyring.remove_slot(ALL, KEYS, number))
    assert [slot.id for slot in after.slots] == [n for n in secrets if n != number]
    for n, secret in secrets.items():
        if n == number:
            with pytest.raises(WrongKeyError):
                keyring.unlock(after, secret)
        else:
            assert keyring.unlock(after, secret).secrets() == KEYS.secrets()


def test_the_last_slot_stays():
    with pytest.raises(SlotError, match="last one") as caught:
        keyring.remove_slot(FIRST, KEYS, 1)
    assert "encfs-js key add" in caught.value.hint
    parsed = keyring.parse(WITH_UNKNOWN["document"].encode())
    keys = keyring.unlock(parsed, WITH_UNKNOWN["key"].encode())
    with pytest.raises(SlotError, match="last one"):
        keyring.remove_slot(parsed, keys, 1)
    after = keyring.parse(keyring.remove_slot(parsed, keys, 2))
    assert [slot.kind for slot in after.slots] == ["key"]


@pytest.mark.parametrize("number", [0, 2, 99])
def test_a_slot_that_is_not_there(number):
    for change in (
        lambda: keyring.remove_slot(FIRST, KEYS, number),
        lambda: keyring.replace_slot(FIRST, KEYS, number, "key", b"new", kdf=CHEAP),
    ):
        with pytest.raises(SlotError, match=f"no slot {number}") as caught:
            change()
        assert "encfs-js key list" in caught.value.hint


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("number", [1, 3, 4])
def test_a_slot_that_was_replaced_keeps_its_place(number, kind):
    new = {"key": b"brand new", "tpm": TPM[::-1], "recovery": recovery.encode(b"\7" * 20).encode()}[kind]
    document = keyring.replace_slot(ALL, KEYS, number, kind, new, now=lambda: LATER, kdf=CHEAP)
    after = keyring.parse(document)
    assert [slot.id for slot in after.slots] == [1, 2, 3, 4]
    for old, slot in zip(ALL.slots, after.slots, strict=True):
        assert slot.label == old.label
        assert (slot == old) == (slot.id != number)
    assert keyring.opened_by(after, new) == number
    assert decoder.unlock(document, new).volume_keys == KEYS.secrets()[1]
    with pytest.raises(WrongKeyError):
        keyring.unlock(after, [KEY, *SECRETS.values()][number - 1])
    relabelled = keyring.replace_slot(ALL, KEYS, number, kind, new, label="other", kdf=CHEAP)
    assert keyring.parse(relabelled).slots[number - 1].label == "other"


def test_64_slots_and_no_more():
    found = FIRST
    for i in range(keydocument.MAX_SLOTS - 1):
        found = with_slot(found, "tpm", b"%020d" % i)
    assert keyring.opened_by(found, b"%020d" % 62) == 64
    with pytest.raises(SlotError, match="64 slots") as caught:
        with_slot(found, "tpm")
    assert "key remove" in caught.value.hint
    fewer = keyring.parse(keyring.remove_slot(found, KEYS, 3))
    assert keyring.opened_by(with_slot(fewer, "tpm"), TPM) == 65


def test_slots_of_unknown_kinds_are_kept_by_every_change():
    parsed = keyring.parse(WITH_UNKNOWN["document"].encode())
    keys = keyring.unlock(parsed, WITH_UNKNOWN["key"].encode())
    unknown = json.loads(WITH_UNKNOWN["document"])["slots"][0]
    for document in (
        keyring.add_slot(parsed, keys, "tpm", TPM),
        keyring.replace_slot(parsed, keys, 1, "tpm", TPM),
        keyring.add_epoch(parsed, keys),
        keyring.drop_epochs(parsed, keys, []),
        keyring.take_epochs(parsed, keys, parsed),
    ):
        assert json.loads(document)["slots"][0] == unknown
        assert reference.decode(document, WITH_UNKNOWN["key"] if TPM.decode() not in str(document) else "")[0]
        keyring.renew(keyring.parse(document), keys)


# --- epochs -----------------------------------------------------------------------------------------------------------


def test_a_new_epoch_is_for_new_files():
    document = keyring.add_epoch(FIRST, KEYS, cipher=Suite.CHACHAPOLY, now=lambda: LATER)
    after = keyring.parse(document)
    assert after.settings == keyring.Settings(Suite.CHACHAPOLY, "refuse", 2)
    assert [(e.epoch, e.suite) for e in after.epochs] == [(1, Suite.AES), (2, Suite.CHACHAPOLY)]
    assert after.epochs[1].created == "2030-01-02T03:04:05Z"
    assert after.slots == FIRST.slots
    keys = keyring.unlock(after, KEY)
    assert keys.volume_key(1) == KEYS.volume_key(1) != keys.volume_key(2)
    assert keys.settings == after.settings
    assert decoder.unlock(document, KEY).volume_keys == keys.secrets()[1]
    same = keyring.parse(keyring.add_epoch(FIRST, KEYS))
    assert same.settings == keyring.Settings(Suite.AES, "refuse", 2)
    assert keyring.unlock(same, KEY).volume_key(2) != keys.volume_key(2)


def test_an_epoch_that_was_dropped_is_gone():
    two = keyring.parse(keyring.add_epoch(FIRST, KEYS))
    after = keyring.parse(keyring.drop_epochs(two, KEYS, [1, 7]))
    assert [e.epoch for e in after.epochs] == [2]
    keys = keyring.unlock(after, KEY)
    with pytest.raises(KeyError):
        keys.volume_key(1)
    assert keyring.keep_old(keys, KEYS).volume_key(1) == KEYS.volume_key(1)
    assert keyring.keep_old(keys, KEYS).settings == keys.settings
    for epochs in ([2], [1, 2]):
        with pytest.raises(ValueError, match="epoch of new files"):
            keyring.drop_epochs(two, KEYS, epochs)


@given(st.data())
@examples(40)
def test_no_number_ever_means_two_keys(data):
    """Any sequence of changes, and of imports of any keyring that there was."""
    found, history, ever = FIRST, [FIRST], {1: KEYS.volume_key(1)}
    for _ in range(data.draw(st.integers(1, 8))):
        keys = keyring.renew(found, KEYS)
        known = [e.epoch for e in found.epochs]
        match data.draw(st.sampled_from(["add", "add", "drop", "select", "take"])):
            case "add":
                document = keyring.add_epoch(found, keys)
            case "drop":
                chosen = data.draw(st.sets(st.sampled_from(known))) - {found.settings.epoch}
                document = keyring.drop_epochs(found, keys, chosen)
            case "select":
                document = keyring.change_settings(found, keys, epoch=data.draw(st.sampled_from(known)))
            case _:
                other = data.draw(st.sampled_from(history))
                document = keyring.take_epochs(found, keys, other)
                both = {e.epoch for e in (*found.epochs, *other.epochs)}
                assert {e.epoch for e in keyring.parse(document).epochs} == both
        last, found = found.last_epoch, keyring.parse(document)
        history.append(found)
        assert found.last_epoch >= last
        assert decoder.unlock(document, KEY).volume_keys == keyring.unlock(found, KEY).secrets()[1]
        for epoch, key in keyring.unlock(found, KEY).secrets()[1].items():
            assert ever.setdefault(epoch, key) == key


def test_documents_from_before_stay_as_they_are():
    """The field that says which epoch was the last one stands only where nothing else does."""
    assert "last_epoch" not in json.loads(keydocument.write_out(FIRST))
    two = keyring.parse(keyring.add_epoch(FIRST, KEYS))
    assert "last_epoch" not in json.loads(keydocument.write_out(two))
    back = keyring.parse(keyring.change_settings(two, KEYS, epoch=1))
    dropped = keyring.parse(keyring.drop_epochs(back, KEYS, [2]))
    assert json.loads(keydocument.write_out(dropped))["last_epoch"] == dropped.last_epoch == 2
    assert keyring.parse(keyring.add_epoch(dropped, KEYS)).settings.epoch == 3
    for name, digest in (
        ("chachapoly", "feca96784af58ee3ab322991903d195718c86c7555180cd98a4c01fa2dd2c00b"),
        ("two-epochs", "bfd1e18350f71a933a7200848e590a39860672818ad1dd8d9615484f0f5bdaa4"),
    ):
        assert hashlib.sha256((VECTORS / f"{name}.json").read_bytes()).hexdigest() == digest


def many_epochs(count: int) -> bytes:
    """A keyring with all the slots and so many epochs, each with numbers as long as they can be."""
    document = json.loads(keydocument.write_out(FIRST))
    entry = document["epochs"][0] | {"suite": "chachapoly", "created": "2026-01-02T03:04:05.123456789Z"}
    first = 2**32 - 1 - count
    document["epochs"] = [entry | {"epoch": first + i} for i in range(count)]
    document["settings"]["epoch"] = first
    slot = document["slots"][0] | {"label": "x" * 255, "suite": "chachapoly"}
    document["slots"] = [slot | {"id": 2**32 - 2 - i} for i in range(keydocument.MAX_SLOTS)]
    del document["mac"], document["checksum"]
    return keydocument.finish(document, KEYS.derive(b"encfs_js keyring mac v1"))


def test_4096_epochs_and_no_more():
    document = many_epochs(keydocument.MAX_EPOCHS)
    assert len(document) < keydocument.MAX_DOCUMENT
    full = keyring.parse(document)
    with pytest.raises(ReencryptError, match="4096 epochs") as caught:
        keyring.add_epoch(full, KEYS)
    assert "--drop-epochs" in caught.value.hint
    with pytest.raises(ValueError, match="4096"):
        many_epochs(keydocument.MAX_EPOCHS + 1)


def test_epochs_that_come_back():
    two = keyring.parse(keyring.add_epoch(FIRST, KEYS))
    dropped = keyring.parse(keyring.drop_epochs(two, KEYS, [1]))
    changed = keyring.parse(keyring.replace_slot(dropped, KEYS, 1, "key", b"new", kdf=CHEAP))
    back = keyring.parse(keyring.take_epochs(changed, KEYS, two))
    assert back.slots == changed.slots
    assert back.settings == changed.settings
    assert [(e.epoch, e.created) for e in back.epochs] == [(e.epoch, e.created) for e in two.epochs]
    assert keyring.unlock(back, b"new").secrets() == keyring.renew(two, KEYS).secrets()
    with pytest.raises(KeyringDamagedError, match="another store"):
        keyring.take_epochs(changed, KEYS, OTHER)
    with pytest.raises(KeyringDamagedError, match="does not authenticate"):
        keyring.take_epochs(changed, KEYS, forged(two, "settings", "epoch", to=1))
    with pytest.raises(KeyringDamagedError, match="another volume key"):
        keyring.take_epochs(two, KEYS, keyring.parse(keyring.add_epoch(FIRST, KEYS)))


def test_a_newer_keyring_of_the_store_needs_no_slot():
    two = keyring.parse(keyring.add_epoch(FIRST, KEYS, cipher=Suite.CHACHAPOLY))
    changed = keyring.parse(keyring.replace_slot(two, KEYS, 1, "tpm", TPM))
    keys = keyring.renew(changed, KEYS)
    assert keys.secrets() == keyring.unlock(changed, TPM).secrets()
    assert (keys.settings, keys.slot) == (changed.settings, None)
    with pytest.raises(KeyringDamagedError, match="another store"):
        keyring.renew(OTHER, KEYS)
    for found in (forged(changed, "settings", "cipher", to="aes"), forged(changed, "slots", 0, "label", to="mine")):
        with pytest.raises(KeyringDamagedError, match="does not authenticate"):
            keyring.renew(found, KEYS)
    disguised = forged(OTHER, "store_id", to=FIRST.store_id.hex())
    with pytest.raises(KeyringDamagedError, match="does not authenticate"):
        keyring.renew(disguised, KEYS)


# --- what is refused --------------------------------------------------------------------------------------------------

CHANGES = {
    "settings": lambda found: keyring.change_settings(found, KEYS, plaintext="read"),
    "add": lambda found: keyring.add_slot(found, KEYS, "tpm", TPM),
    "replace": lambda found: keyring.replace_slot(found, KEYS, 1, "tpm", TPM),
    "remove": lambda found: keyring.remove_slot(found, KEYS, 1),
    "add epoch": lambda found: keyring.add_epoch(found, KEYS),
    "drop epochs": lambda found: keyring.drop_epochs(found, KEYS, [2]),
    "take epochs": lambda found: keyring.take_epochs(found, KEYS, FIRST),
    "take forged epochs": lambda found: keyring.take_epochs(FIRST, KEYS, found),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_blesses_what_somebody_else_wrote(change):
    for found in (
        OTHER,
        forged(ALL, "slots", 1, "label", to="mine"),
        forged(ALL, "settings", "plaintext", to="read"),
        forged(ALL, "slots", to=json.loads(OTHER.signed)["slots"]),
        forged(ALL, "mac", to=base64.b64encode(bytes(32)).decode()),
        forged(ALL, "last_epoch", to=99),
    ):
        with pytest.raises(KeyringDamagedError):
            CHANGES[change](found)
    CHANGES[change](ALL)


@given(st.data())
@examples(60)
def test_no_forgery_without_a_key_is_opened_by_any(data):
    """Any place of a keyring with slots of every kind holds the one of another keyring, and the checksum is right again."""
    document = json.loads(keydocument.write_out(ALL))
    other = json.loads(keydocument.write_out(with_other_slots()))
    way = data.draw(st.sampled_from([p for p in leaves(document) if p and p != ("checksum",)]))
    theirs, place, value = other, document, None
    for step in way[:-1]:
        theirs, place = theirs[step], place[step]
    value = theirs[way[-1]]
    if place[way[-1]] == value:
        return
    place[way[-1]] = value
    changed = json.dumps(reference.with_checksum(document)).encode()
    for secret in (TPM, CODE, data.draw(st.sampled_from([KEY, SECRETS["key"]]))):
        with pytest.raises((KeyringDamagedError, WrongKeyError)):
            keyring.unlock(keyring.parse(changed), secret)


def with_other_slots() -> Keyring:
    """The same kinds of slots in the same order, of another store, with the same secrets and with other numbers."""
    keys = keyring.unlock(OTHER, KEY)
    document = json.loads(keydocument.write_out(OTHER))
    for kind in ("key", "tpm", "recovery"):
        found = keyring.parse(json.dumps(document).encode())
        document = json.loads(keyring.add_slot(found, keys, kind, SECRETS[kind], kdf=CHEAP))
    found = keyring.parse(json.dumps(document).encode())
    return keyring.parse(keyring.add_slot(found, keys, "key", b"fifth", kdf=CHEAP))


def test_no_error_of_a_change_shows_a_secret():
    code = recovery.encode(b"\5" * 20).encode()
    key = b"s3cret-%d" % 4711  # the traceback shows this file's lines
    tries = [
        lambda: keyring.add_slot(FIRST, KEYS, "key", key, label="a\nb", kdf=CHEAP),
        lambda: keyring.add_slot(FIRST, KEYS, "tpm", key),
        lambda: keyring.add_slot(FIRST, KEYS, "recovery", key),
        lambda: keyring.add_slot(FIRST, KEYS, "recovery", code, label="a\nb"),
        lambda: keyring.unlock(ALL, code),
        lambda: keyring.unlock(ALL, code[:-1] + b"0"),
        lambda: keyring.drop_epochs(FIRST, KEYS, [1]),
        lambda: keyring.renew(OTHER, KEYS),
    ]
    keyring_key, volume_keys = KEYS.secrets()
    for attempt in tries:
        with pytest.raises((SlotError, ValueError, WrongKeyError, KeyringDamagedError)) as caught:
            attempt()
        shown = everything_about(caught.value)
        assert "s3cret-4711" not in shown
        assert code.decode()[:12] not in shown
        for secret in (keyring_key, *volume_keys.values()):
            assert secret.hex() not in shown
            assert repr(secret)[2:-1] not in shown


def test_a_keyring_is_written_out_as_it_was_read():
    for path in VECTORS.glob("*.json"):
        vector = json.loads(path.read_bytes())
        if vector["expect"] == "success":
            found = keyring.parse(vector["document"].encode())
            assert keyring.parse(keydocument.write_out(found)) == found
    document = keydocument.write_out(ALL)
    assert keydocument.write_out(keyring.parse(document)) == document


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.json")), ids=lambda path: path.stem)
def test_the_decoder_agrees_with_the_vectors(path):
    """The decoder knows the cryptography; not every limit of the shape, and not what an unknown slot is."""
    vector = json.loads(path.read_bytes())
    key = vector["key"].encode()
    if vector["expect"] == "success":
        unlocked = decoder.unlock(vector["document"].encode(), key)
        assert {str(epoch): key.hex() for epoch, key in unlocked.volume_keys.items()} == vector["volume_keys"]
    elif vector["expect"] == "wrong key":
        with pytest.raises(decoder.WrongKey):
            decoder.unlock(vector["document"].encode(), key)
    elif "forged" in path.stem or "removed" in path.stem or "swapped" in path.stem:
        with pytest.raises(decoder.KeyringDamage):
            decoder.unlock(vector["document"].encode(), key)
