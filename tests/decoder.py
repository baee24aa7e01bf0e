"""A decoder of encfs_js stores, written from encfs_js/FORMAT.md alone.

It imports nothing from the package and shares no code with it: where the two agree, both implement the text.
It is slow and simple on purpose: whole files in memory, one function per paragraph of the text.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGE = 4096
SUITES = {1: ChaCha20Poly1305, 2: AESGCM}
NAMES = {"chachapoly": ChaCha20Poly1305, "aes": AESGCM}


class Damage(Exception):  # noqa: N818
    """A reader must refuse this page (section 2)."""

    def __init__(self, page: int) -> None:
        super().__init__(f"page {page}")
        self.page = page


class WrongKey(Exception):  # noqa: N818
    """No slot's check matches the key (section 3)."""


class KeyringDamage(Exception):  # noqa: N818
    """The keyring is damaged (section 3)."""


class Version(Exception):  # noqa: N818
    """The keyring has a version above 1 (section 3)."""


def hkdf(key: bytes, info: bytes, *, length: int = 32, salt: bytes | None = None) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=info).derive(key)


# --- section 2: the sealed file -------------------------------------------------------------------------------------


def capacity(page: int) -> int:
    return 4064 if page else 4032


def pages_of(sealed: bytes) -> int:
    """Count the pages, the one that the end of the file cuts included."""
    return -(-len(sealed) // PAGE)


def split_page(sealed: bytes, page: int) -> tuple[bytes, int, int, bytes]:
    """Take a page apart: nonce, length, zero field, ciphertext with tag."""
    raw = sealed[page * PAGE : (page + 1) * PAGE]
    start = 0 if page else 32
    nonce, length, zero = struct.unpack_from("<12sHH", raw, start)
    return nonce, length, zero, raw[start + 16 :]


def open_header(sealed: bytes, volume_keys: Mapping[int, bytes]) -> tuple[Any, bytes]:
    """Return the AEAD under the file's key, and the header; `Damage(0)` where the header is none."""
    header = sealed[:32]
    if len(sealed) < PAGE:
        raise Damage(0)
    magic, suite, flags, zero, epoch, file_id = struct.unpack("<8sBBHI16s", header)
    if magic != b"ENCFSJS1" or suite not in SUITES or flags or zero or epoch not in volume_keys:
        raise Damage(0)
    key = hkdf(volume_keys[epoch], b"encfs_js file key v1" + bytes([suite]), salt=file_id)
    return SUITES[suite](key), header


def authenticate(sealed: bytes, page: int, volume_keys: Mapping[int, bytes]) -> bytes:
    """Return the plain bytes of one whole page, whether or not its length fits its place in the file."""
    aead, header = open_header(sealed, volume_keys)
    nonce, length, zero, ciphertext = split_page(sealed, page)
    if zero or length > capacity(page):
        raise Damage(page)
    try:
        plain = aead.decrypt(nonce, ciphertext, header + struct.pack("<QHH", page, length, 0))
    except InvalidTag:
        raise Damage(page) from None
    return plain[:length]


def read_page(sealed: bytes, page: int, volume_keys: Mapping[int, bytes]) -> bytes:
    """Read one page as a reader must: authentic, whole, and full if and only if it is not the last one."""
    last = pages_of(sealed) - 1
    if len(sealed) < (page + 1) * PAGE:
        raise Damage(page)
    plain = authenticate(sealed, page, volume_keys)
    full = len(plain) == capacity(page)
    if page < last and not full:
        raise Damage(page)
    if page == last and full:
        raise Damage(page + 1)
    return plain


def read(sealed: bytes, volume_keys: Mapping[int, bytes]) -> bytes:
    """Read a whole file, or raise `Damage` at the first page that a reader must refuse."""
    return b"".join(read_page(sealed, page, volume_keys) for page in range(pages_of(sealed)))


def damaged_pages(sealed: bytes, volume_keys: Mapping[int, bytes]) -> list[int]:
    """List every page that a reader must refuse, in ascending order."""
    damaged = set()
    for page in range(pages_of(sealed)):
        try:
            read_page(sealed, page, volume_keys)
        except Damage as error:
            damaged.add(error.page)
    return sorted(damaged)


def plain_size(sealed: bytes) -> int:
    """Compute the plain size of a file of whole pages from its size and its last page's length alone."""
    pages = len(sealed) // PAGE
    if pages == 0:
        return 0
    length = split_page(sealed, pages - 1)[1]
    return length if pages == 1 else 4032 + (pages - 2) * 4064 + length


def nonce_of(sealed: bytes, page: int) -> bytes:
    return split_page(sealed, page)[0]


def file_id_of(sealed: bytes) -> bytes:
    return sealed[16:32]


# --- section 2.2: the crash rule ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trimmed:
    """What the crash rule makes of a file: the pages that stay, and whether an empty page is appended to them."""

    pages: int
    end_mark: bool

    @property
    def sealed_size(self) -> int:
        return (self.pages + self.end_mark) * PAGE


def crash_rule(sealed: bytes, volume_keys: Mapping[int, bytes]) -> Trimmed | None:
    """Say what the crash rule makes of a file; None if it shows none of the four traces."""
    total = pages_of(sealed)
    stay = total
    last_full = False
    for page in range(total):
        raw = sealed[page * PAGE : (page + 1) * PAGE]
        if len(raw) < PAGE or raw == bytes(PAGE):  # (d), (c)
            stay = page
            break
        try:
            full = len(authenticate(sealed, page, volume_keys)) == capacity(page)
        except Damage:
            last_full = False  # Damage never ends the scan, and nothing is known of its length.
            continue
        last_full = full
        if not full and page < total - 1:  # (b)
            stay = page + 1
            break
    if stay == total and not last_full:
        return None
    return Trimmed(stay, end_mark=stay > 0 and last_full)


# --- section 3: the keyring -----------------------------------------------------------------------------------------


def canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def without(document: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in names}


def unwrap(suite: str, key: bytes, wrapped: str, aad: bytes) -> bytes:
    data = base64.b64decode(wrapped, validate=True)
    plain: bytes = NAMES[suite](key).decrypt(data[:12], data[12:], aad)
    return plain


@dataclass(frozen=True)
class Unlocked:
    store_id: bytes
    settings: dict[str, Any]
    keyring_key: bytes
    volume_keys: dict[int, bytes]


def recovery_secret(code: bytes) -> bytes | None:
    """The 20 bytes of a recovery code; None for what is none."""
    digits = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    number = count = 0
    for letter in code.decode("latin-1"):
        if letter in "- \t\r\n":
            continue
        digit = digits.find({"O": "0", "I": "1", "L": "1"}.get(letter.upper(), letter.upper()))
        if digit < 0 or not letter.isascii():
            return None
        number, count = number * 32 + digit, count + 1
    if count != 35:
        return None
    secret, check = divmod(number, 2**15)
    raw = secret.to_bytes(20, "big")
    return raw if int.from_bytes(hashlib.sha256(raw).digest()[:2], "big") // 2 == check else None


def slot_secret(slot: Mapping[str, Any], key: bytes) -> bytes | None:
    """The slot secret; None where the key cannot be the one of such a slot."""
    kdf = slot["kdf"]
    salt = base64.b64decode(kdf["salt"], validate=True)
    if slot["kind"] != "key":
        if kdf["name"] != "hkdf-sha256":
            raise KeyringDamage
        secret = recovery_secret(key) if slot["kind"] == "recovery" else key
        return None if secret is None else hkdf(secret, b"encfs_js slot secret v1 " + slot["kind"].encode(), salt=salt)
    if kdf["name"] == "pbkdf2-hmac-sha256":
        return hashlib.pbkdf2_hmac("sha256", key, salt, kdf["iterations"])
    if kdf["name"] != "argon2id":
        raise KeyringDamage
    return Argon2id(
        salt=salt,
        length=32,
        iterations=kdf["iterations"],
        lanes=kdf["lanes"],
        memory_cost=kdf["memory_kib"],
    ).derive(key)


def unlock(document: bytes, key: bytes) -> Unlocked:
    """Open a keyring with a key string, what a TPM gave, or a recovery code."""
    try:
        keyring = json.loads(document)
        if keyring["format"] != "encfs_js keyring":
            raise KeyringDamage
        if keyring["version"] > 1:
            raise Version
        if hashlib.sha256(canonical(without(keyring, "checksum"))).hexdigest() != keyring["checksum"]:
            raise KeyringDamage
        if keyring.get("last_epoch", 2**32) < max(epoch["epoch"] for epoch in keyring["epochs"]):
            raise KeyringDamage
        store_id = bytes.fromhex(keyring["store_id"])
        for slot in keyring["slots"]:
            if slot["kind"] not in {"key", "tpm", "recovery"}:
                continue
            secret = slot_secret(slot, key)
            if secret is None:
                continue
            check = hkdf(secret, b"encfs_js slot check v1", length=16)
            if hmac.compare_digest(check, base64.b64decode(slot["check"], validate=True)):
                break
        else:
            raise WrongKey
        wrapping = hkdf(secret, b"encfs_js slot wrap v1")
        keyring_key = unwrap(slot["suite"], wrapping, slot["wrapped"], store_id + canonical(without(slot, "wrapped")))
        mac_key = hkdf(keyring_key, b"encfs_js keyring mac v1")
        mac = hmac.digest(mac_key, canonical(without(keyring, "mac", "checksum")), "sha256")
        if not hmac.compare_digest(mac, base64.b64decode(keyring["mac"], validate=True)):
            raise KeyringDamage
        epoch_key = hkdf(keyring_key, b"encfs_js epoch wrap v1")
        volume_keys = {
            epoch["epoch"]: unwrap(
                epoch["suite"], epoch_key, epoch["wrapped"], store_id + struct.pack("<I", epoch["epoch"])
            )
            for epoch in keyring["epochs"]
        }
    except (ValueError, KeyError, TypeError, InvalidTag, struct.error) as error:
        raise KeyringDamage from error
    return Unlocked(store_id, keyring["settings"], keyring_key, volume_keys)
