"""A second implementation of FORMAT.md section 3, written from that text alone; it imports nothing from the package.

    python tests/vectors/keyring/reference.py      writes the vectors anew (a test compares them with what lies here)

A vector is a JSON object: `comment`, `expect` ("success", "wrong key", "damaged", "version"), `key`, `document` (text;
or `document_hex` where it is no text) and, with success, `volume_keys` (hex by epoch) and `settings`. A reader may
refuse a document before or after it has the key: only the outcome counts.
"""

import base64
import copy
import hashlib
import hmac
import json
import os
import sys

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

AEAD = {"chachapoly": ChaCha20Poly1305, "aes": AESGCM}
KEY = "correct horse battery staple"
CHEAP = {"name": "argon2id", "iterations": 1, "lanes": 1, "memory_kib": 64}
DEFAULT = {"name": "argon2id", "iterations": 3, "lanes": 4, "memory_kib": 65536}
PBKDF2 = {"name": "pbkdf2-hmac-sha256", "iterations": 1000}
CREATED = "2026-01-02T03:04:05Z"
DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def fixed(name: str, length: int) -> bytes:
    """Bytes in place of random ones, different for every name."""
    return hashlib.shake_256(f"encfs_js keyring vector: {name}".encode()).digest(length)


STORE_ID = fixed("store id", 16)
KEYRING_KEY = fixed("keyring key", 32)


def canonical(value) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def hkdf(secret: bytes, info: str, length: int = 32) -> bytes:
    """RFC 5869 with SHA-256 and no salt, for one block of output."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info.encode() + b"\x01", "sha256")[:length]


def hkdf_salted(secret: bytes, salt: bytes, info: str) -> bytes:
    return hmac.digest(hmac.digest(salt, secret, "sha256"), info.encode() + b"\x01", "sha256")


def code_of(secret: bytes) -> str:
    """The recovery code of 20 bytes."""
    bits = "".join(f"{byte:08b}" for byte in secret) + "".join(f"{b:08b}" for b in hashlib.sha256(secret).digest())[:15]
    digits = [DIGITS[int(bits[at : at + 5], 2)] for at in range(0, 175, 5)]
    return "-".join("".join(digits[at : at + 5]) for at in range(0, 35, 5))


def secret_of(code: str) -> bytes | None:
    """The 20 bytes of a recovery code, or None for what is none."""
    digits = ""
    for letter in code:
        if letter not in "- \t\r\n":
            upper = letter.upper() if letter.isascii() else letter
            digits += {"O": "0", "I": "1", "L": "1"}.get(upper, upper)
    if len(digits) != 35 or any(digit not in DIGITS for digit in digits):
        return None
    secret = (sum(DIGITS.index(digit) << 5 * place for place, digit in enumerate(reversed(digits))) >> 15).to_bytes(20)
    return secret if code_of(secret).replace("-", "") == digits else None


def slot_secret(key: str, kdf: dict, kind: str = "key") -> bytes | None:
    salt = base64.b64decode(kdf["salt"])
    if kind != "key":
        secret = key.encode() if kind == "tpm" else secret_of(key)
        return None if secret is None else hkdf_salted(secret, salt, f"encfs_js slot secret v1 {kind}")
    if kdf["name"] == "pbkdf2-hmac-sha256":
        return hashlib.pbkdf2_hmac("sha256", key.encode(), salt, kdf["iterations"])
    cost = {"iterations": kdf["iterations"], "lanes": kdf["lanes"], "memory_cost": kdf["memory_kib"]}
    return Argon2id(salt=salt, length=32, **cost).derive(key.encode())


def slot_aad(slot: dict, store_id: bytes) -> bytes:
    return store_id + canonical({k: v for k, v in slot.items() if k != "wrapped"})


# --- writing --------------------------------------------------------------------------------------------------------


def epoch_entry(number: int, suite: str, volume_key: bytes | None = None) -> dict:
    nonce = fixed(f"epoch nonce {number}", 12)
    key = hkdf(KEYRING_KEY, "encfs_js epoch wrap v1")
    volume_key = volume_key or fixed(f"volume key {number}", 32)
    sealed = AEAD[suite](key).encrypt(nonce, volume_key, STORE_ID + number.to_bytes(4, "little"))
    return {"epoch": number, "created": CREATED, "suite": suite, "wrapped": b64(nonce + sealed)}


def key_slot(number: int, suite: str, key: str = KEY, label: str = "", kdf: dict = CHEAP) -> dict:
    slot = {"id": number, "kind": "key", "label": label, "created": CREATED, "suite": suite}
    slot["kdf"] = kdf | {"salt": b64(fixed(f"salt {number}", 16))}
    secret = slot_secret(key, slot["kdf"])
    slot["check"] = b64(hkdf(secret, "encfs_js slot check v1", 16))
    return wrap_slot(slot, secret)


def random_slot(number: int, kind: str, suite: str, key: str, label: str = "") -> dict:
    """A slot whose secret is random."""
    slot = {"id": number, "kind": kind, "label": label, "created": CREATED, "suite": suite}
    slot["kdf"] = {"name": "hkdf-sha256", "salt": b64(fixed(f"salt {number}", 16))}
    secret = slot_secret(key, slot["kdf"], kind)
    slot["check"] = b64(hkdf(secret, "encfs_js slot check v1", 16))
    return wrap_slot(slot, secret)


def wrap_slot(slot: dict, secret: bytes) -> dict:
    nonce = fixed(f"slot nonce {slot['id']}", 12)
    sealed = AEAD[slot["suite"]](hkdf(secret, "encfs_js slot wrap v1")).encrypt(
        nonce, KEYRING_KEY, slot_aad(slot, STORE_ID)
    )
    return slot | {"wrapped": b64(nonce + sealed)}


def keyring(cipher="chachapoly", plaintext="refuse", epoch=1, epochs=None, slots=None) -> dict:
    return {
        "format": "encfs_js keyring",
        "version": 1,
        "store_id": STORE_ID.hex(),
        "settings": {"cipher": cipher, "plaintext": plaintext, "epoch": epoch},
        "epochs": epochs or [epoch_entry(1, cipher)],
        "slots": slots or [key_slot(1, cipher)],
    }


def with_mac(document: dict) -> dict:
    unsigned = {k: v for k, v in document.items() if k not in ("mac", "checksum")}
    return unsigned | {
        "mac": b64(hmac.digest(hkdf(KEYRING_KEY, "encfs_js keyring mac v1"), canonical(unsigned), "sha256"))
    }


def with_checksum(document: dict) -> dict:
    unsummed = {k: v for k, v in document.items() if k != "checksum"}
    return unsummed | {"checksum": hashlib.sha256(canonical(unsummed)).hexdigest()}


def text(document: dict) -> str:
    return json.dumps(document, indent=2) + "\n"


# --- reading --------------------------------------------------------------------------------------------------------


def decode(document: bytes, key: str) -> tuple[str, dict[int, bytes]]:
    """Return the outcome and, with success, the volume keys. Knows the cryptography, not every limit of the shape."""
    raw = json.loads(document)
    if raw["version"] > 1:
        return "version", {}
    if with_checksum(raw)["checksum"] != raw["checksum"]:
        return "damaged", {}
    store_id = bytes.fromhex(raw["store_id"])
    for slot in raw["slots"]:
        if slot["kind"] not in ("key", "tpm", "recovery"):
            continue
        secret = slot_secret(key, slot["kdf"], slot["kind"])
        if secret is None or hkdf(secret, "encfs_js slot check v1", 16) != base64.b64decode(slot["check"]):
            continue
        try:
            wrapped = base64.b64decode(slot["wrapped"])
            keyring_key = AEAD[slot["suite"]](hkdf(secret, "encfs_js slot wrap v1")).decrypt(
                wrapped[:12], wrapped[12:], slot_aad(slot, store_id)
            )
            unsigned = {k: v for k, v in raw.items() if k not in ("mac", "checksum")}
            mac = hmac.digest(hkdf(keyring_key, "encfs_js keyring mac v1"), canonical(unsigned), "sha256")
            if mac != base64.b64decode(raw["mac"]):
                return "damaged", {}
            keys = {}
            for e in raw["epochs"]:
                wrapped = base64.b64decode(e["wrapped"])
                aead = AEAD[e["suite"]](hkdf(keyring_key, "encfs_js epoch wrap v1"))
                bound = store_id + e["epoch"].to_bytes(4, "little")
                keys[e["epoch"]] = aead.decrypt(wrapped[:12], wrapped[12:], bound)
        except InvalidTag:
            return "damaged", {}
        return "success", keys
    return "wrong key", {}


TPM = "SU" + base64.b32encode(fixed("tpm", 35)).decode()
CODE = code_of(fixed("recovery 1", 20))


# --- the vectors ----------------------------------------------------------------------------------------------------


def success(comment: str, document: dict | str, key: str = KEY) -> dict:
    whole = document if isinstance(document, str) else text(with_checksum(with_mac(document)))
    raw = json.loads(whole)
    return {
        "comment": comment,
        "expect": "success",
        "key": key,
        "document": whole,
        "volume_keys": {str(e["epoch"]): fixed(f"volume key {e['epoch']}", 32).hex() for e in raw["epochs"]},
        "settings": raw["settings"],
    }


def failure(expect: str, comment: str, document: dict | str | bytes, key: str = KEY) -> dict:
    vector = {"comment": comment, "expect": expect, "key": key}
    if isinstance(document, bytes):
        return vector | {"document_hex": document.hex()}
    return vector | {"document": document if isinstance(document, str) else text(document)}


def signed(change, base: dict | None = None) -> dict:
    """A keyring that was changed before it was signed: everything about it is authentic, and it is still wrong."""
    document = copy.deepcopy(base or keyring())
    change(document)
    return with_checksum(with_mac(document))


def forged(change, base: dict | None = None) -> dict:
    """A keyring that somebody without a key changed; the checksum is right again."""
    document = with_mac(copy.deepcopy(base or keyring()))
    change(document)
    return with_checksum(document)


def in_slot(**fields):
    """Change a slot and wrap it again, so that only the changed field itself is wrong."""

    def change(document: dict) -> None:
        slot = document["slots"][0]
        secret = slot_secret({"key": KEY, "tpm": TPM, "recovery": CODE}[slot["kind"]], slot["kdf"], slot["kind"])
        document["slots"][0] = wrap_slot(slot | fields, secret)

    return change


def in_kdf(**fields):
    def change(document: dict) -> None:
        document["slots"][0]["kdf"] |= fields

    return change


def at(*path, to):
    def change(document: dict) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = to

    return change


def without(*path):
    def change(document: dict) -> None:
        for step in path[:-1]:
            document = document[step]
        del document[path[-1]]

    return change


def vectors() -> dict[str, dict]:
    """All vectors by name."""
    plain = with_checksum(with_mac(keyring()))
    whole = text(plain)
    two_epochs = keyring(epochs=[epoch_entry(1, "chachapoly"), epoch_entry(2, "aes")], epoch=2)
    two_slots = keyring(slots=[key_slot(1, "aes", "another key"), key_slot(2, "chachapoly", label="clé")])
    other_kind = {"id": 2, "kind": "fido2", "label": "", "created": CREATED, "blob": {"deep": [1, "x", None]}}
    mixed = keyring(slots=[other_kind, key_slot(1, "chachapoly")])
    tpm, paper = (
        keyring(slots=[random_slot(1, "tpm", "aes", TPM)]),
        keyring(slots=[random_slot(1, "recovery", "aes", CODE)]),
    )
    all_kinds = keyring(
        slots=[
            key_slot(1, "chachapoly"),
            random_slot(2, "tpm", "chachapoly", TPM),
            random_slot(7, "recovery", "aes", CODE, label="in the safe"),
        ]
    )
    dropped = keyring(epochs=[epoch_entry(2, "aes"), epoch_entry(3, "aes")], epoch=2) | {"last_epoch": 9}
    spaced = CODE.lower().replace("0", "o").replace("1", "l").replace("-", " ", 3)
    assert {"o", "l"} <= set(spaced)
    assert "1" in CODE
    mistyped = CODE[:-1] + ("0" if CODE[-1] != "0" else "1")
    pbkdf2 = keyring(slots=[key_slot(1, "aes", kdf=PBKDF2)])
    rounds = [key_slot(n, "aes") | {"kdf": PBKDF2 | {"iterations": 10_000_001, "salt": b64(bytes(16))}} for n in (1, 2)]
    costly = [
        key_slot(number, "aes") | {"kdf": DEFAULT | {"iterations": 8, "memory_kib": 1 << 22, "salt": b64(bytes(16))}}
        for number in range(2, 5)
    ]
    swapped = copy.deepcopy(two_epochs)
    a, b = swapped["epochs"]
    a["wrapped"], b["wrapped"], b["suite"] = b["wrapped"], a["wrapped"], "chachapoly"
    flipped = "A" if plain["mac"][0] != "A" else "B"
    found = {
        "chachapoly": success("one slot, one epoch", keyring()),
        "aes": success("the other suite", keyring("aes")),
        "default-cost": success("the cost that init takes", keyring(slots=[key_slot(1, "aes", kdf=DEFAULT)])),
        "pbkdf2": success("a key slot of a host that has no Argon2id", keyring(slots=[key_slot(1, "aes", kdf=PBKDF2)])),
        "pbkdf2-beside": success(
            "beside one with Argon2id", keyring(slots=[key_slot(1, "aes", "other"), key_slot(2, "aes", kdf=PBKDF2)])
        ),
        "second-slot": success("the key opens the second of two slots; a label beyond ASCII", two_slots),
        "two-epochs": success("two epochs, one suite each", two_epochs),
        "unknown-kind-beside": success("a slot of a kind that this version does not know is passed over", mixed),
        "other-layout": success("no white space, names sorted", canonical(plain).decode()),
        "raw-utf8": success(
            "UTF-8 in place of escapes means the same",
            json.dumps(with_checksum(with_mac(two_slots)), ensure_ascii=False),
        ),
        "unicode-key": success(
            "a key beyond ASCII", keyring(slots=[key_slot(1, "aes", "Schlüssel 🔑")]), "Schlüssel 🔑"
        ),
        "tpm": success("what a TPM keeps", tpm, TPM),
        "recovery": success("a recovery code as it is printed", paper, CODE),
        "recovery-typed": success("lower case, o for 0, l for 1, blanks for hyphens", paper, spaced),
        "recovery-bare": success(
            "no hyphens, a line end, i for 1", paper, CODE.replace("-", "").replace("1", "i") + "\n"
        ),
        "all-kinds-key": success("a key string, beside slots of other kinds", all_kinds),
        "all-kinds-tpm": success("what the TPM keeps, the same", all_kinds, TPM),
        "all-kinds-recovery": success("a recovery code, the same", all_kinds, CODE),
        "code-as-key": success(
            "a key string that is a recovery code, too", keyring(slots=[key_slot(1, "aes", CODE)]), CODE
        ),
        "last-epoch": success("epochs that are there no more have had higher numbers", dropped),
        "last-epoch-present": success("the field says what is there", keyring() | {"last_epoch": 1}),
        "plaintext-read": success("the other setting", keyring(plaintext="read")),
        "wrong-key-chachapoly": failure("wrong key", "another key", whole, KEY + "!"),
        "wrong-key-aes": failure("wrong key", "another key", with_checksum(with_mac(keyring("aes"))), "x"),
        "wrong-key-tpm": failure("wrong key", "another secret", with_checksum(with_mac(tpm)), TPM[:-1] + "_"),
        "wrong-key-tpm-recovery": failure(
            "wrong key", "a TPM's secret is no code", with_checksum(with_mac(paper)), TPM
        ),
        "wrong-key-recovery-tpm": failure("wrong key", "a code is no TPM's secret", with_checksum(with_mac(tpm)), CODE),
        "wrong-key-recovery-typo": failure("wrong key", "the last digit", with_checksum(with_mac(paper)), mistyped),
        "wrong-key-recovery-short": failure(
            "wrong key", "a digit is missing", with_checksum(with_mac(paper)), CODE[1:]
        ),
        "wrong-key-recovery-u": failure(
            "wrong key", "U is no digit", with_checksum(with_mac(paper)), CODE.replace(CODE[0], "U")
        ),
        "wrong-key-code-case": failure(
            "wrong key",
            "case counts in a key string, also in one that is a code",
            with_checksum(with_mac(keyring(slots=[key_slot(1, "aes", CODE)]))),
            CODE.lower(),
        ),
        "wrong-key-newline": failure("wrong key", "a newline belongs to the key", whole, KEY + "\n"),
        "wrong-key-normal-form": failure(
            "wrong key",
            "keys are not normalised: e with accent in two code points",
            with_checksum(with_mac(keyring(slots=[key_slot(1, "aes", "cl\u00e9")]))),
            "cle\u0301",
        ),
        "wrong-key-forged-check": failure(
            "wrong key",
            "a forged check cannot be told from a wrong key",
            forged(at("slots", 0, "check", to=b64(bytes(16)))),
        ),
        "version-2": failure("version", "all as in version 1, but the number", signed(at("version", to=2))),
        "version-2-other-shape": failure(
            "version",
            "a later version may have other fields",
            '{"format": "encfs_js keyring", "version": 2, "new": []}',
        ),
        "version-huge": failure("version", "any number above 1", signed(at("version", to=2**70))),
        "only-unknown-kinds": failure(
            "version", "no slot that this version can try", with_checksum(with_mac(keyring(slots=[other_kind])))
        ),
    }
    damaged: dict[str, tuple[str, dict | str | bytes]] = {
        "empty": ("nothing", ""),
        "zeros": ("what a power cut can leave of a file that was not synced", bytes(1000)),
        "cut-half": ("half of it", whole[: len(whole) // 2]),
        "cut-brace": ("all but the last brace", whole.rstrip().removesuffix("}")),
        "appended": ("something behind it", whole + "x"),
        "twice": ("the document twice", whole + whole),
        "not-utf8": ("a byte that is no UTF-8", whole.encode().replace(b'"label": ""', b'"label": "\xff"')),
        "byte-order-mark": ("a mark before it", b"\xef\xbb\xbf" + whole.encode()),
        "array": ("an array", "[]"),
        "null": ("null", "null"),
        "deep": ("brackets without end", "[" * 20_000),
        "name-twice": ("the same name twice", whole.replace('"version": 1,', '"version": 1, "version": 1,')),
        "inner-name-twice": ("the same", whole.replace('"lanes": 1,', '"lanes": 1, "lanes": 1,')),
        "fraction": ("1.0 is not 1", whole.replace('"version": 1,', '"version": 1.0,')),
        "fraction-unknown-kind": (
            "numbers are whole, also where this version does not look",
            signed(at("slots", 0, "blob", to=[0.5]), mixed),
        ),
        "nan": ("no JSON", whole.replace('"version": 1,', '"version": NaN,')),
        "digits": ("a number of 5000 digits", whole.replace('"version": 1,', f'"version": {"9" * 5000},')),
        "format": ("another format", signed(at("format", to="encfs_js state"))),
        "no-format": ("no format", signed(without("format"))),
        "version-0": ("there is no version 0", signed(at("version", to=0))),
        "version-negative": ("nor this", signed(at("version", to=-2))),
        "version-text": ("a text", signed(at("version", to="1"))),
        "version-true": ("true is no number", signed(at("version", to=True))),
        "no-version": ("no version", signed(without("version"))),
        "checksum": ("another checksum", plain | {"checksum": "0" * 64}),
        "checksum-upper": ("upper case", plain | {"checksum": plain["checksum"].upper()}),
        "no-checksum": ("none", {k: v for k, v in plain.items() if k != "checksum"}),
        "no-mac": ("no mac", with_checksum(keyring())),
        "mac": ("another mac", forged(at("mac", to=flipped + plain["mac"][1:]))),
        "mac-short": ("a mac of 31 bytes", forged(at("mac", to=b64(bytes(31))))),
        "unknown-field": ("a field that version 1 has not", signed(at("comment", to=""))),
        "unknown-field-settings": ("the same", signed(at("settings", "comment", to=""))),
        "unknown-field-epoch": ("the same", signed(at("epochs", 0, "comment", to=""))),
        "unknown-field-slot": ("the same", signed(in_slot(comment=""))),
        "unknown-field-kdf": ("the same", signed(in_kdf(comment=""))),
        "store-id-upper": ("upper case", signed(at("store_id", to=STORE_ID.hex().upper()))),
        "store-id-short": ("15 bytes", signed(at("store_id", to=STORE_ID.hex()[:30]))),
        "store-id-other": ("of another store", forged(at("store_id", to="00" * 16))),
        "settings-list": ("a list", signed(at("settings", to=[]))),
        "settings-epoch": ("an epoch that has no volume key", signed(at("settings", "epoch", to=2))),
        "settings-cipher": ("an alias is not written", signed(at("settings", "cipher", to="chacha"))),
        "settings-cipher-case": ("nor another case", signed(at("settings", "cipher", to="AES"))),
        "settings-plaintext": ("an unknown word", signed(at("settings", "plaintext", to="allow"))),
        "settings-forged": ("changed without a key", forged(at("settings", "plaintext", to="read"))),
        "settings-cipher-forged": ("changed without a key", forged(at("settings", "cipher", to="aes"))),
        "epochs-empty": ("none", signed(at("epochs", to=[]))),
        "epochs-object": ("no list", signed(at("epochs", to={}))),
        "epoch-0": ("epochs begin with 1", signed(at("epochs", to=[epoch_entry(0, "aes"), epoch_entry(1, "aes")]))),
        "epoch-33-bits": (
            "does not fit a header",
            signed(lambda d: d["epochs"].append(d["epochs"][0] | {"epoch": 2**32})),
        ),
        "epoch-twice": ("one number twice", signed(lambda d: d["epochs"].append(d["epochs"][0]))),
        "epoch-removed": ("removed without a key", forged(lambda d: d["epochs"].pop(0), two_epochs)),
        "epochs-swapped": ("two wrapped keys swapped", with_checksum(with_mac(swapped))),
        "epoch-suite": ("another suite than it was wrapped with", signed(at("epochs", 0, "suite", to="aes"))),
        "epoch-short": ("a volume key of 31 bytes", signed(at("epochs", 0, to=epoch_entry(1, "aes", bytes(31))))),
        "epoch-long": ("a volume key of 33 bytes", signed(at("epochs", 0, to=epoch_entry(1, "aes", b"x" * 33)))),
        "epoch-forged": ("a wrapped key of zeros", forged(at("epochs", 0, "wrapped", to=b64(bytes(60))))),
        "slots-empty": ("none", signed(at("slots", to=[]))),
        "slots-many": ("65 of them", signed(at("slots", to=[other_kind | {"id": n} for n in range(1, 66)]))),
        "slot-twice": ("one number twice", signed(lambda d: d["slots"].append(d["slots"][0]))),
        "slot-text": ("no object", signed(lambda d: d["slots"].append("slot"))),
        "slot-removed": ("removed without a key", forged(lambda d: d["slots"].pop(0), two_slots)),
        "slot-id-0": ("slots begin with 1", signed(in_slot(id=0))),
        "slot-kind-case": ("no kind", signed(in_slot(kind="Key"))),
        "slot-kind-hidden": ("a slot made unknown", forged(at("slots", 0, "kind", to="fido2"), two_slots)),
        "slot-suite": ("an unknown suite", signed(at("slots", 0, "suite", to="xchacha"))),
        "slot-suite-other": ("not what it was wrapped with", forged(at("slots", 0, "suite", to="aes"))),
        "slot-label-forged": ("a label changed without a key", forged(at("slots", 0, "label", to="mine"))),
        "slot-label-escape": ("a terminal's escape sequence", signed(in_slot(label="\x1b[2J"))),
        "slot-label-long": ("256 characters", signed(in_slot(label="x" * 256))),
        "slot-label-surrogate": ("half a character", signed(in_slot(label="\ud800"))),
        "slot-label-null": ("no text", signed(in_slot(label=None))),
        "slot-created-zone": ("not UTC", signed(in_slot(created="2026-01-02T03:04:05+01:00"))),
        "slot-created-newline": ("a line end behind it", signed(in_slot(created=CREATED + "\n"))),
        "slot-created-digits": ("other digits than ASCII", signed(in_slot(created="٢٠٢٦-01-02T03:04:05Z"))),
        "slot-check-short": ("15 bytes", signed(in_slot(check=b64(bytes(15))))),
        "slot-wrapped-forged": ("a wrapped key of zeros", forged(at("slots", 0, "wrapped", to=b64(bytes(60))))),
        "slot-wrapped-short": ("59 bytes", signed(at("slots", 0, "wrapped", to=b64(bytes(59))))),
        "slot-wrapped-empty": ("nothing", signed(at("slots", 0, "wrapped", to=""))),
        "base64-padding": ("no padding", signed(at("slots", 0, "check", to=b64(bytes(16)).rstrip("=")))),
        "base64-space": ("white space", signed(at("slots", 0, "check", to=" " + b64(bytes(16))))),
        "base64-url": ("the other alphabet", signed(at("slots", 0, "check", to="-_" * 11 + "=="))),
        "no-kdf": ("no kdf", signed(without("slots", 0, "kdf"))),
        "kdf-name": ("another function", signed(in_kdf(name="scrypt"))),
        "kdf-memory-tib": ("a TiB of memory", signed(in_kdf(memory_kib=2**30))),
        "kdf-memory-above": ("one KiB above 4 GiB", signed(in_kdf(memory_kib=2**22 + 1))),
        "kdf-memory-lanes": ("less than 8 KiB a lane", signed(in_kdf(lanes=9))),
        "kdf-iterations": ("too many", signed(in_kdf(iterations=1001))),
        "kdf-iterations-huge": ("more than 64 bits", signed(in_kdf(iterations=2**64))),
        "kdf-iterations-0": ("too few", signed(in_kdf(iterations=0))),
        "kdf-lanes": ("too many", signed(in_kdf(lanes=256, memory_kib=4096))),
        "kdf-lanes-0": ("none", signed(in_kdf(lanes=0))),
        "kdf-lanes-text": ("a text", signed(in_kdf(lanes="1"))),
        "kdf-work": (
            "each slot is within its limits, all together are not",
            with_checksum(with_mac(keyring(slots=[key_slot(1, "aes"), *costly]))),
        ),
        "kdf-pbkdf2-cheap": ("999 rounds", signed(in_kdf(iterations=999), pbkdf2)),
        "kdf-pbkdf2-costly": ("more than 20,000,000 rounds", signed(in_kdf(iterations=20_000_001), pbkdf2)),
        "kdf-pbkdf2-work": (
            "each is within its limit, all together are not",
            with_checksum(with_mac(keyring(slots=rounds))),
        ),
        "kdf-pbkdf2-memory": ("a field that PBKDF2 has not", signed(in_kdf(memory_kib=64), pbkdf2)),
        "kdf-of-tpm": ("hkdf-sha256 is not for key strings", signed(at("slots", 0, "kind", to="key"), tpm)),
        "kdf-of-key": ("argon2id is not for a TPM's secret", signed(at("slots", 0, "kind", to="tpm"))),
        "kdf-of-recovery": ("nor for a code", signed(at("slots", 0, "kind", to="recovery"))),
        "unknown-field-hkdf": ("a field that hkdf-sha256 has not", signed(in_kdf(iterations=1), tpm)),
        "hkdf-salt-short": ("15 bytes", signed(in_kdf(salt=b64(bytes(15))), paper)),
        "unknown-field-recovery": ("a field that the slot has not", signed(in_slot(comment=""), paper)),
        "recovery-label-forged": ("a label changed without a key", forged(at("slots", 0, "label", to="mine"), paper)),
        "last-epoch-low": ("an epoch has a higher number", signed(at("last_epoch", to=2), dropped)),
        "last-epoch-0": ("there is no such epoch", signed(at("last_epoch", to=0))),
        "last-epoch-null": ("no number", signed(at("last_epoch", to=None))),
        "last-epoch-forged": ("changed without a key", forged(at("last_epoch", to=3), dropped)),
        "kdf-salt-short": ("15 bytes", signed(in_kdf(salt=b64(bytes(15))))),
    }
    keys = {"unknown-field-hkdf": TPM, "kdf-of-tpm": TPM, "hkdf-salt-short": CODE}
    keys |= {"unknown-field-recovery": CODE, "recovery-label-forged": CODE}
    return found | {
        f"damaged-{name}": failure("damaged", why, what, keys.get(name, KEY)) for name, (why, what) in damaged.items()
    }


def render(vector: dict) -> bytes:
    return json.dumps(vector, indent=1).encode() + b"\n"


def main() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    for name in os.listdir(here):
        if name.endswith(".json"):
            os.unlink(os.path.join(here, name))
    for name, vector in vectors().items():
        with open(os.path.join(here, name + ".json"), "wb") as file:
            file.write(render(vector))
    print(len(os.listdir(here)) - 1, "vectors", file=sys.stderr)


if __name__ == "__main__":
    main()
