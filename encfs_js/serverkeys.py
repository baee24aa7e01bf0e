"""The keys that nats-server makes for its own encryption at rest, and what it encrypts with them, purely.

nats-server (option `key`) gives every stream, consumer, raft group and block a random seed[32]. Beside what it encrypts
lies the seed, wrapped by a key that is the HMAC-SHA-256 of the configured key and the asset's name:

    meta.key, N.key     nonce[24 or 16] | sealed seed[32] | tag[16]; its length tells XChaCha20-Poly1305 from AES-256-GCM
    meta.inf, o.dat     nonce           | sealed content  | tag[16], with the seed of meta.key
    N.blk               content XOR keystream, with seed and nonce of N.key: not authenticated, as long as the plain content

Nothing of a name, a place or an age is authenticated. Errors name the file and say nothing of the bytes in it.
Measured on stores that nats-server 2.9 and 2.15 have written.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from encfs_js.errors import FormatError, WrongKeyError
from encfs_js.format import REFUSED, Suite, missing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SEED: Final = 32
TAG: Final = 16
NONCES: Final = {Suite.CHACHAPOLY: 24, Suite.AES: 16}
KEY_FILES: Final = {nonce + SEED + TAG: suite for suite, nonce in NONCES.items()}  # 72 and 64 bytes
MAX_STREAM: Final = 1 << 38  # bytes that ChaCha20's counter of 32 bits can count

_WORDS: Final = struct.Struct("<16I")
_SIGMA: Final = struct.unpack("<4I", b"expand 32-byte k")
_READ_ON: Final = "Such a store is read on a host whose OpenSSL does not insist on FIPS algorithms."


@dataclass(frozen=True, slots=True)
class Asset:
    """What has a key file: `info` (the account's or raft group's name) and `context`, as they go into the HMAC."""

    info: str
    context: str

    def block(self, number: int) -> Asset:
        """Return the asset of the stream's or raft group's block `number`, whose key file is msgs/<number>.key."""
        return Asset(self.info, f"{self.context}:{number}")

    def consumer(self, name: str) -> Asset:
        """Return the asset of the stream's consumer, whose key file is obs/<name>/meta.key."""
        return Asset(self.info, f"{self.context}.{name}")


def stream(account: str, name: str) -> Asset:
    """Return the asset of a stream, or of the staged batch (batches/<name>/) of one."""
    return Asset(account, name)


def raft_group(name: str) -> Asset:
    """Return the asset of a raft group's log ($SYS/_js_/<name>/)."""
    return Asset(name, name)


@dataclass(frozen=True, slots=True)
class Seed:
    """What a key file holds: the cipher, the nonce[24 or 16] of the file, which a block's keystream needs, the seed[32].

    `key` is the place in the list of keys of the one that opened it.
    """

    suite: Suite
    nonce: bytes
    seed: bytes = field(repr=False)
    key: int = 0


def wrapping_key(key: bytes, asset: Asset) -> bytes:
    """Derive the key[32] that wraps an asset's seed. `key` is the configured string's bytes, of any length but 0."""
    mac = HMAC(key, SHA256())
    mac.update(_bytes(asset.info) + _bytes(asset.context))
    return mac.finalize()


def open_key_file(raw: bytes, asset: Asset, keys: Sequence[bytes], path: str) -> Seed:
    """Unwrap a meta.key or N.key with the first of `keys` (key, prev_key) that does it.

    Raises FormatError (no key file), WrongKeyError, CipherMissingError (FIPS).
    """
    suite = KEY_FILES.get(len(raw))
    if suite is None:
        raise FormatError(
            f"{path}: not a key file of nats-server ({len(raw)} bytes)",
            hint="Put this file back from a backup: what it is the key of cannot be read without it.",
        )
    for at, key in enumerate(keys):
        try:
            seed = _unseal(suite, wrapping_key(key, asset), raw)
        except InvalidTag:
            continue
        return Seed(suite, raw[: NONCES[suite]], seed, at)
    raise WrongKeyError(
        f"{path}: opens with none of the {len(keys)} given keys"
        if len(keys) > 1
        else f"{path}: the key does not open it",
        hint="Give the `key` that nats-server has in its configuration, and the `prev_key` if it was changed. If other "
        "files of this store open, this one is damaged or another's.",
    )


def open_file(raw: bytes, seed: Seed, path: str) -> bytes:
    """Decrypt a meta.inf or o.dat (or what precedes the hash of an index.db). Raises FormatError, CipherMissingError."""
    try:
        if len(raw) < NONCES[seed.suite] + TAG:
            raise InvalidTag
        return _unseal(seed.suite, seed.seed, raw)
    except InvalidTag:
        raise FormatError(f"{path}: does not authenticate", hint="Put this file back from a backup.") from None


def new_key_file(key: bytes, asset: Asset, suite: Suite, random: Callable[[int], bytes]) -> tuple[bytes, Seed]:
    """Make a new seed and its meta.key or N.key: (the file's content, what `open_key_file` makes of it).

    random: n -> n random bytes. Raises CipherMissingError (FIPS).
    """
    nonce, seed = random(NONCES[suite]), random(SEED)
    return _seal(suite, wrapping_key(key, asset), nonce, seed), Seed(suite, nonce, seed)


def seal_file(plain: bytes, seed: Seed, nonce: bytes) -> bytes:
    """Encrypt a meta.inf or o.dat (or what precedes the hash of an index.db): nonce | sealed | tag. Raises CipherMissingError.

    nonce: 24 or 16 random bytes, NONCES says how many; never twice with the same seed.
    """
    return _seal(seed.suite, seed.seed, nonce, plain)


class Keystream:
    """The keystream of one block: `xor` encrypts and decrypts any part of it. Raises CipherMissingError (FIPS).

    Holds the key of the block; its repr does not show it.
    """

    __slots__ = ("_chacha", "_key", "_nonce")

    def __init__(self, seed: Seed) -> None:
        self._chacha = seed.suite is Suite.CHACHAPOLY
        if self._chacha:
            self._key, self._nonce = _hchacha20(seed.seed, seed.nonce[:16]), bytes(4) + seed.nonce[16:]
        else:
            self._key, self._nonce = seed.seed, seed.nonce

    def xor(self, data: bytes | memoryview, offset: int = 0) -> bytes:
        """Return `data`, which stands at `offset` of the block, encrypted or decrypted. Raises ValueError (too far)."""
        if offset < 0 or offset + len(data) > MAX_STREAM:
            raise ValueError(f"a block of {offset + len(data)} bytes")
        cipher: Cipher[Any]
        if self._chacha:
            unit, skip = divmod(offset, 64)
            cipher = _chacha20(self._key, unit.to_bytes(4, "little") + self._nonce)
        else:
            unit, skip = divmod(offset, 16)
            counter = (int.from_bytes(self._nonce, "big") + unit) % (1 << 128)
            cipher = Cipher(algorithms.AES(self._key), modes.CTR(counter.to_bytes(16, "big")))
        worker = cipher.encryptor()
        worker.update(bytes(skip))
        return worker.update(data)


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _unseal(suite: Suite, key: bytes, raw: bytes) -> bytes:
    """Open nonce | sealed | tag. Raises InvalidTag, CipherMissingError."""
    size = NONCES[suite]
    nonce, sealed = raw[:size], raw[size:]
    if suite is Suite.AES:
        try:
            return AESGCM(key).decrypt(nonce, sealed, None)
        except REFUSED:
            raise missing(suite) from None
    own = _hchacha20(key, nonce[:16])
    try:
        return ChaCha20Poly1305(own).decrypt(bytes(4) + nonce[16:], sealed, None)
    except REFUSED:
        raise missing(suite, _READ_ON) from None


def _seal(suite: Suite, key: bytes, nonce: bytes, plain: bytes) -> bytes:
    """Return nonce | sealed | tag. Raises CipherMissingError."""
    assert len(nonce) == NONCES[suite]
    if suite is Suite.AES:
        try:
            return nonce + AESGCM(key).encrypt(nonce, plain, None)
        except REFUSED:
            raise missing(suite) from None
    own = _hchacha20(key, nonce[:16])
    try:
        return nonce + ChaCha20Poly1305(own).encrypt(bytes(4) + nonce[16:], plain, None)
    except REFUSED:
        raise missing(suite, _READ_ON) from None


def _hchacha20(key: bytes, nonce: bytes) -> bytes:
    """Return HChaCha20 (draft-irtf-cfrg-xchacha, section 2.2) of key[32] and nonce[16]: XChaCha20's key[32].

    ChaCha20's block is its last state plus its first one. HChaCha20 is eight words of the last state, and these words
    of the first one are constants and the nonce: known, so they are taken off again.
    """
    block = _WORDS.unpack(_chacha20(key, nonce).encryptor().update(bytes(64)))
    first = _SIGMA + struct.unpack("<4I", nonce)
    last = [(word - start) % (1 << 32) for word, start in zip(block[:4] + block[12:], first, strict=True)]
    return struct.pack("<8I", *last)


def _chacha20(key: bytes, counter_and_nonce: bytes) -> Cipher[None]:
    """Return ChaCha20 from counter[4] | nonce[12] on. Raises CipherMissingError, already here where OpenSSL refuses it."""
    try:
        cipher: Cipher[None] = Cipher(algorithms.ChaCha20(key, counter_and_nonce), None)
        cipher.encryptor()
    except REFUSED:
        raise missing(Suite.CHACHAPOLY, _READ_ON) from None
    return cipher
