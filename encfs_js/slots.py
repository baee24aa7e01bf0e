"""One slot of a keyring: make one that wraps the keyring key, and open one (FORMAT.md section 3). No file."""

from __future__ import annotations

import hmac
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from encfs_js import recovery
from encfs_js.errors import CipherMissingError, SlotError, StoreIoError
from encfs_js.format import NO_PROVIDER, NONCE, REFUSED, Suite, aead
from encfs_js.keydocument import KINDS, Kdf, Pbkdf2, b64, canonical, damaged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from encfs_js.keydocument import Slot

_CHECK_INFO = b"encfs_js slot check v1"
_WRAP_INFO = b"encfs_js slot wrap v1"
_SECRET_INFO = b"encfs_js slot secret v1 "
_NAMES = {Kdf: "argon2id", Pbkdf2: "pbkdf2-hmac-sha256"}


def make(
    store_id: bytes,
    keyring_key: bytes,
    kind: str,
    secret: bytes,
    *,
    number: int,
    suite: Suite,
    label: str,
    created: str,
    random: Callable[[int], bytes],
    kdf: Kdf | Pbkdf2 | None = None,
) -> dict[str, Any]:
    """Return a slot of a keyring's document.

    kdf: how a key string is stretched: Argon2id, and PBKDF2 where the OpenSSL of this host refuses that.
    secret: for `key` the key string, for `tpm` what the TPM keeps, for `recovery` the code.
    Raises ValueError for an empty secret, a code that is none and an unknown kind, SlotError for what a TPM keeps and may be
    guessed, StoreIoError when Argon2id does not get its memory.
    """
    if not secret or kind not in KINDS or (kind == "recovery" and recovery.decode(secret) is None):
        raise ValueError("no secret of that kind")
    if kind == "tpm" and len(secret) < recovery.SIZE:
        raise SlotError(
            f"what the TPM keeps is too short for a key: {len(secret)} bytes",
            hint="Name a keys_file that does not exist: a new key is made for it. Nothing was written.",
        )
    salt = random(16)
    slot: dict[str, Any] = {"id": number, "kind": kind, "label": label, "created": created, "suite": suite.label}
    if kind == "key":
        kdf = kdf or _best_kdf()
        slot["kdf"] = {"name": _NAMES[type(kdf)], **asdict(kdf), "salt": b64(salt)}
        derived = _stretched(secret, kdf, salt)
    else:
        slot["kdf"] = {"name": "hkdf-sha256", "salt": b64(salt)}
        derived = _spread(kind, secret, salt)
    slot["check"] = b64(hkdf(derived, _CHECK_INFO, 16))
    slot["wrapped"] = b64(
        wrap(suite, hkdf(derived, _WRAP_INFO), random(NONCE), keyring_key, store_id + canonical(slot))
    )
    return slot


def open_any(slots: Iterable[Slot], store_id: bytes, secret: bytes) -> tuple[int, bytes] | None:
    """Return the number of the slot that the secret opens and the keyring key; None if it opens none.

    Raises what `open_one` does, but CipherMissingError only when no other slot opens.
    """
    refused: list[CipherMissingError] = []
    for slot in sorted(slots, key=lambda slot: slot.kdf is not None):  # those that cost nothing first
        try:
            keyring_key = open_one(slot, store_id, secret)
        except CipherMissingError as problem:
            refused.append(problem)
            continue
        if keyring_key is not None:
            return slot.id, keyring_key
    if refused:
        raise refused[0]
    return None


def open_one(slot: Slot, store_id: bytes, secret: bytes) -> bytes | None:
    """Return the keyring key if the secret opens the slot, None if it does not.

    Raises KeyringDamagedError when it does and the slot does not authenticate, StoreIoError when Argon2id does not get its
    memory.
    """
    if slot.suite is None or (slot.kind == "recovery" and recovery.decode(secret) is None):
        return None
    derived = _stretched(secret, slot.kdf, slot.salt) if slot.kdf else _spread(slot.kind, secret, slot.salt)
    if not hmac.compare_digest(hkdf(derived, _CHECK_INFO, 16), slot.check):
        return None
    return unwrap(slot.suite, hkdf(derived, _WRAP_INFO), slot.wrapped, store_id + slot.bound, f"slot {slot.id}")


def _best_kdf() -> Kdf | Pbkdf2:
    try:
        Argon2id(salt=bytes(16), length=32, iterations=1, lanes=1, memory_cost=8)
    except REFUSED:
        return Pbkdf2()
    return Kdf()


def _stretched(secret: bytes, kdf: Kdf | Pbkdf2, salt: bytes) -> bytes:
    """Return the slot secret of a key string, which a person may have chosen."""
    if isinstance(kdf, Pbkdf2):
        return PBKDF2HMAC(SHA256(), 32, salt, kdf.iterations).derive(secret)
    try:
        return Argon2id(
            salt=salt, length=32, iterations=kdf.iterations, lanes=kdf.lanes, memory_cost=kdf.memory_kib
        ).derive(secret)
    except MemoryError:
        raise StoreIoError(
            f"not enough memory to derive the key: Argon2id needs {kdf.memory_kib} KiB",
            hint="Raise the memory limit of the service or the container. Nothing was written.",
        ) from None
    except REFUSED:
        raise CipherMissingError(
            "the OpenSSL of this host refuses Argon2id (FIPS), with which the store's key was stretched where it was made",
            hint="Recovery codes do without: on another host, encfs-js key add STORE --recovery. It opens the store here, in a "
            "key file or typed; encfs-js key add then makes key slots that need no Argon2id. Nothing was written.",
        ) from None


def _spread(kind: str, secret: bytes, salt: bytes) -> bytes:
    """Return the slot secret of a random secret, whose guessing needs no slowing down."""
    raw = recovery.decode(secret) if kind == "recovery" else secret
    assert raw is not None
    return hkdf(raw, _SECRET_INFO + kind.encode(), salt=salt)


def hkdf(secret: bytes, info: bytes, length: int = 32, salt: bytes | None = None) -> bytes:
    """Return HKDF-SHA-256. Raises CipherMissingError, only where OpenSSL refuses everything."""
    try:
        return HKDF(SHA256(), length, salt, info).derive(secret)
    except REFUSED:
        raise CipherMissingError("the OpenSSL of this host refuses HKDF-SHA-256 (FIPS)", hint=NO_PROVIDER) from None


def wrap(suite: Suite, key: bytes, nonce: bytes, secret: bytes, bound: bytes) -> bytes:
    """Return nonce and sealed secret."""
    return nonce + aead(suite, key).encrypt(nonce, secret, bound)


def unwrap(suite: Suite, key: bytes, wrapped: bytes, bound: bytes, what: str) -> bytes:
    """Return the secret. Raises KeyringDamagedError, which names `what`."""
    try:
        return aead(suite, key).decrypt(wrapped[:NONCE], wrapped[NONCE:], bound)
    except InvalidTag:
        raise damaged(f"the key is right and {what} does not authenticate") from None
