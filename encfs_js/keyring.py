"""The keyring: make, open and change its document (FORMAT.md section 3). No file: keystore reads and writes it.

This room does not know where a key comes from (keysource), nor what the volume keys are used for. A key string
is UTF-8, and not empty. The document of a keyring holds no secret; `Keys` does: key bytes are never part of an
exception, a repr or a pickle.
"""

from __future__ import annotations

import datetime as dt
import hmac
import json
import os
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from encfs_js import recovery, slots
from encfs_js.errors import (
    KeyringDamagedError,
    ReencryptError,
    SlotError,
    VersionError,
    WrongKeyError,
)
from encfs_js.format import NONCE, Suite
from encfs_js.keydocument import (
    FORMAT,
    KEY,
    MAX_EPOCHS,
    MAX_SLOTS,
    VERSION,
    Kdf,
    Keyring,
    Pbkdf2,
    Settings,
    b64,
    damaged,
    finish,
    parse,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

# What other rooms look for here, though it stands in keydocument.
__all__ = ["Kdf", "Keyring", "Settings", "parse"]

_utc_now = partial(dt.datetime.now, dt.UTC)
_EPOCH_INFO = b"encfs_js epoch wrap v1"
_MAC_INFO = b"encfs_js keyring mac v1"
# The words of the Go libraries' errors, which NATS users know from their server's log.
_GO_NAME = {Suite.CHACHAPOLY: "chacha20poly1305", Suite.AES: "cipher"}


class Keys:
    """An unlocked keyring: its store id[16], its authenticated settings, and keys that it neither shows nor pickles.

    slot: the id of the slot that was opened; None where none was needed.
    """

    __slots__ = ("_keyring_key", "_volume_keys", "settings", "slot", "store_id")

    def __init__(
        self,
        store_id: bytes,
        settings: Settings,
        keyring_key: bytes,
        volume_keys: dict[int, bytes],
        slot: int | None = None,
    ) -> None:
        self.slot = slot
        self.store_id = store_id
        self.settings = settings
        self._keyring_key = keyring_key
        self._volume_keys = volume_keys

    def volume_key(self, epoch: int) -> bytes:
        """Return the 32-byte volume key of an epoch. Raises KeyError."""
        return self._volume_keys[epoch]

    def secrets(self) -> tuple[bytes, dict[int, bytes]]:
        """Return the keyring key and the volume keys by epoch, for the memory that outlives a worker (keymemory.py)."""
        return self._keyring_key, self._volume_keys

    def derive(self, info: bytes, length: int = 32) -> bytes:
        """Derive a key for the purpose that `info` names: HKDF-SHA-256 of the keyring key, without salt."""
        return slots.hkdf(self._keyring_key, info, length)

    def __repr__(self) -> str:
        """Name the store and the epochs, never a key."""
        return f"Keys(store_id={self.store_id.hex()}, epochs={sorted(self._volume_keys)})"

    def __reduce__(self) -> NoReturn:
        """Refuse: a pickle, or a copy, would be key material in a place that nobody guards."""
        raise TypeError("Keys cannot be pickled or copied")


def create(
    key: bytes,
    *,
    cipher: Suite,
    plaintext: str,
    kind: str = "key",
    label: str = "",
    now: Callable[[], dt.datetime] = _utc_now,
    random: Callable[[int], bytes] = os.urandom,
    kdf: Kdf | Pbkdf2 | None = None,
) -> bytes:
    """Make the document of a new keyring with one volume key (epoch 1) and one slot.

    Raises ValueError for an empty key and for arguments that `parse` would refuse, StoreIoError when Argon2id does not
    get its memory.
    """
    created = _stamp(now)
    store_id, keyring_key, volume_key = random(16), random(KEY), random(KEY)
    slot = slots.make(
        store_id, keyring_key, kind, key, number=1, suite=cipher, label=label, created=created, random=random, kdf=kdf
    )
    return finish(
        {
            "format": FORMAT,
            "version": VERSION,
            "store_id": store_id.hex(),
            "settings": {"cipher": cipher.label, "plaintext": plaintext, "epoch": 1},
            "epochs": [_epoch(store_id, keyring_key, 1, volume_key, cipher, created, random)],
            "slots": [slot],
        },
        slots.hkdf(keyring_key, _MAC_INFO),
    )


# -- opening


def unlock(keyring: Keyring, key: bytes) -> Keys:
    """Open the keyring with a key, wherever it comes from, and authenticate all of it.

    Takes the time and memory of its Argon2id slots, unless a slot with a random secret opens. Raises WrongKeyError when the
    key opens no slot, KeyringDamagedError when it opens one and the rest does not authenticate, VersionError when every slot
    is of a kind that this version does not know, StoreIoError when Argon2id does not get its memory, ValueError for an empty
    key.
    """
    number, keyring_key = _opened(keyring, key)
    return _authenticated(keyring, keyring_key, number)


def opened_by(keyring: Keyring, key: bytes) -> int:
    """Return the id of the slot that the key opens. Raises what `unlock` raises."""
    number, _ = _opened(keyring, key)
    return number


def renew(keyring: Keyring, keys: Keys) -> Keys:
    """Open another version of the keyring that `keys` are of, which needs no slot. Raises KeyringDamagedError."""
    if keyring.store_id != keys.store_id:
        raise KeyringDamagedError(
            "this is the keyring of another store", hint="Nothing was written. Put the right one back from a backup."
        )
    return _authenticated(keyring, keys.secrets()[0])


def keep_old(keys: Keys, old: Keys) -> Keys:
    """Return `keys` with those volume keys of `old` that they have no more: files may still be open that need them.

    Raises KeyringDamagedError when the two have different keys under one number: the files of one of them would be lost.
    """
    (keyring_key, volume_keys), older = keys.secrets(), old.secrets()[1]
    if any(volume_keys.get(epoch, key) != key for epoch, key in older.items()):
        raise KeyringDamagedError(
            "it has another volume key for an epoch that both have", hint="The store was put back from a backup since."
        )
    return Keys(keys.store_id, keys.settings, keyring_key, older | volume_keys)


def _opened(keyring: Keyring, key: bytes) -> tuple[int, bytes]:
    if not key:
        raise ValueError("an empty key")
    known = [slot for slot in keyring.slots if slot.is_known]
    found = slots.open_any(known, keyring.store_id, key)
    if found is not None:
        return found
    if not known:
        kinds = ", ".join(sorted({slot.kind for slot in keyring.slots}))
        raise VersionError(
            f"the keyring has no slot that this version can open, only: {kinds}",
            hint="Use the version of encfs_js that made the slots. Nothing was written.",
        )
    name = _GO_NAME[known[0].suite or Suite.CHACHAPOLY]
    hint = (
        "The key opens no slot of this keyring; nothing was written. Check where the key comes from (--key-file, "
        "--credential, --tpm, --config, JS_KEY; the first that is given counts), and with `encfs-js inspect STORE` that this "
        "is the store you mean."
    )
    if recovery.is_mistyped(key) and any(slot.kind == "recovery" for slot in known):
        hint = (
            f"This looks like a recovery code with a typing error: its checksum does not match. If it is none: {hint}"
        )
    raise WrongKeyError(f"Error decrypting our keyring: {name}: message authentication failed", hint=hint)


def _authenticated(keyring: Keyring, keyring_key: bytes, slot: int | None = None) -> Keys:
    _check_mac(keyring, slots.hkdf(keyring_key, _MAC_INFO))
    epoch_key = slots.hkdf(keyring_key, _EPOCH_INFO)
    volume_keys = {
        e.epoch: slots.unwrap(
            e.suite, epoch_key, e.wrapped, _epoch_bound(keyring.store_id, e.epoch), f"epoch {e.epoch}"
        )
        for e in keyring.epochs
    }
    return Keys(keyring.store_id, keyring.settings, keyring_key, volume_keys, slot)


def place(keyring: Keyring, number: int) -> int:
    """Return the index of the slot with that number. Raises SlotError."""
    for at, slot in enumerate(keyring.slots):
        if slot.id == number:
            return at
    there = ", ".join(str(slot.id) for slot in keyring.slots)
    raise SlotError(
        f"the keyring has no slot {number}, only: {there}", hint="`encfs-js key list STORE` says what they are."
    )


# -- changing: each returns a new document, and raises KeyringDamagedError when `keys` do not authenticate `keyring` as it
#    is (a change must never bless what somebody else wrote), and ValueError for what `parse` would refuse


def change_settings(
    keyring: Keyring,
    keys: Keys,
    *,
    cipher: Suite | None = None,
    plaintext: str | None = None,
    epoch: int | None = None,
) -> bytes:
    """Change what is given; the rest stays."""
    document = _document(keyring, keys)
    changes = {"cipher": cipher and cipher.label, "plaintext": plaintext, "epoch": epoch}
    document["settings"] |= {name: value for name, value in changes.items() if value is not None}
    return finish(document, keys.derive(_MAC_INFO))


def add_slot(
    keyring: Keyring,
    keys: Keys,
    kind: str,
    secret: bytes,
    *,
    label: str = "",
    now: Callable[[], dt.datetime] = _utc_now,
    random: Callable[[int], bytes] = os.urandom,
    kdf: Kdf | Pbkdf2 | None = None,
) -> bytes:
    """Add a slot, at the end, with the next number; `secret` as slots.make has it. Raises SlotError when there are too many."""
    document = _document(keyring, keys)
    number = max(slot["id"] for slot in document["slots"]) + 1
    if len(document["slots"]) == MAX_SLOTS:
        raise SlotError(
            f"the keyring has {MAX_SLOTS} slots, and takes no more",
            hint="`encfs-js key list STORE` shows them; remove one: encfs-js key remove STORE SLOT",
        )
    document["slots"].append(_slot(keyring, keys, kind, secret, number, label, now, random, kdf))
    return finish(document, keys.derive(_MAC_INFO))


def replace_slot(
    keyring: Keyring,
    keys: Keys,
    number: int,
    kind: str,
    secret: bytes,
    *,
    label: str | None = None,
    now: Callable[[], dt.datetime] = _utc_now,
    random: Callable[[int], bytes] = os.urandom,
    kdf: Kdf | Pbkdf2 | None = None,
) -> bytes:
    """Put another secret into a slot, which keeps its number, and its label unless one is given. Raises SlotError."""
    document = _document(keyring, keys)
    at = place(keyring, number)
    kept = document["slots"][at]["label"] if label is None else label
    document["slots"][at] = _slot(keyring, keys, kind, secret, number, kept, now, random, kdf)
    return finish(document, keys.derive(_MAC_INFO))


def remove_slot(keyring: Keyring, keys: Keys, number: int) -> bytes:
    """Take a slot away. Raises SlotError when there is none, or no other that this version can open."""
    document = _document(keyring, keys)
    del document["slots"][place(keyring, number)]
    if not any(slot.is_known and slot.id != number for slot in keyring.slots):
        raise SlotError(
            f"slot {number} is the last one that opens this keyring",
            hint="Add another one first: encfs-js key add STORE",
        )
    return finish(document, keys.derive(_MAC_INFO))


def add_epoch(
    keyring: Keyring,
    keys: Keys,
    *,
    cipher: Suite | None = None,
    now: Callable[[], dt.datetime] = _utc_now,
    random: Callable[[int], bytes] = os.urandom,
) -> bytes:
    """Add a volume key for the files from now on; `cipher`: theirs, too. No number is given twice.

    Raises ReencryptError when there are too many.
    """
    document = _document(keyring, keys)
    epoch, suite = keyring.last_epoch + 1, cipher or keyring.settings.cipher
    document["epochs"].append(
        _epoch(keyring.store_id, keys.secrets()[0], epoch, random(KEY), suite, _stamp(now), random)
    )
    document["settings"] |= {"epoch": epoch, "cipher": suite.label}
    return _finish_epochs(document, keys, epoch)


def take_epochs(keyring: Keyring, keys: Keys, other: Keyring, *, random: Callable[[int], bytes] = os.urandom) -> bytes:
    """Take those volume keys that another version of the keyring has, and this one has no more.

    other: authenticated by the same keyring key, or KeyringDamagedError is raised, as when the two have different keys
    under one number. Raises ReencryptError when there are too many.
    """
    document = _document(keyring, keys)
    both = keep_old(renew(keyring, keys), renew(other, keys)).secrets()[1]
    ours = {e.epoch for e in keyring.epochs}
    for e in other.epochs:
        if e.epoch not in ours:
            wrapped = _epoch(
                keyring.store_id, keys.secrets()[0], e.epoch, both[e.epoch], keyring.settings.cipher, e.created, random
            )
            document["epochs"].append(wrapped)
    document["epochs"].sort(key=lambda e: e["epoch"])
    return _finish_epochs(document, keys, max(keyring.last_epoch, other.last_epoch))


def drop_epochs(keyring: Keyring, keys: Keys, epochs: Collection[int]) -> bytes:
    """Drop volume keys: what is sealed with them cannot be read any more. Raises ValueError for the one of new files."""
    document = _document(keyring, keys)
    if keyring.settings.epoch in epochs:
        raise ValueError("the epoch of new files cannot be dropped")
    document["epochs"] = [e for e in document["epochs"] if e["epoch"] not in epochs]
    return _finish_epochs(document, keys, keyring.last_epoch)


def _finish_epochs(document: dict[str, Any], keys: Keys, last: int) -> bytes:
    """Say which epoch was the last one, unless it is there and says so itself."""
    document.pop("last_epoch", None)
    if last > max(e["epoch"] for e in document["epochs"]):
        document["last_epoch"] = last
    if len(document["epochs"]) > MAX_EPOCHS:
        raise ReencryptError(
            f"the keyring has {MAX_EPOCHS} epochs, and takes no more",
            hint="Drop those that no file needs: encfs-js reencrypt STORE --drop-epochs",
        )
    return finish(document, keys.derive(_MAC_INFO))


def _document(keyring: Keyring, keys: Keys) -> dict[str, Any]:
    _check_mac(keyring, keys.derive(_MAC_INFO))
    document: dict[str, Any] = json.loads(keyring.signed)
    return document


def _slot(
    keyring: Keyring, keys: Keys, kind: str, secret: bytes, number: int, label: str,
    now: Callable[[], dt.datetime], random: Callable[[int], bytes], kdf: Kdf | Pbkdf2 | None,
) -> dict[str, Any]:  # fmt: skip
    return slots.make(
        keyring.store_id, keys.secrets()[0], kind, secret,
        number=number, suite=keyring.settings.cipher, label=label, created=_stamp(now), random=random, kdf=kdf,
    )  # fmt: skip


def _epoch(
    store_id: bytes, keyring_key: bytes, epoch: int, volume_key: bytes, suite: Suite, created: str,
    random: Callable[[int], bytes],
) -> dict[str, Any]:  # fmt: skip
    key = slots.hkdf(keyring_key, _EPOCH_INFO)
    wrapped = slots.wrap(suite, key, random(NONCE), volume_key, _epoch_bound(store_id, epoch))
    return {"epoch": epoch, "created": created, "suite": suite.label, "wrapped": b64(wrapped)}


def _check_mac(keyring: Keyring, mac_key: bytes) -> None:
    if not hmac.compare_digest(hmac.digest(mac_key, keyring.signed, "sha256"), keyring.mac):
        raise damaged("the key is right and the rest does not authenticate: somebody changed it")


def _epoch_bound(store_id: bytes, epoch: int) -> bytes:
    return store_id + epoch.to_bytes(4, "little")


def _stamp(now: Callable[[], dt.datetime]) -> str:
    return now().astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
