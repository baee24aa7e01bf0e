"""The keyring's document, purely: its JSON, its shapes and limits, its checksum (FORMAT.md section 3).

No file, no key. What `parse` returns is intact and in shape; only `keyring.unlock` can tell whether it is authentic.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, NoReturn

import msgspec

from encfs_js.backing import META
from encfs_js.errors import KeyringDamagedError, VersionError
from encfs_js.format import NONCE, TAG, Suite

NAME: Final = "keyring"
COPY: Final = "keyring.bak"
FORMAT: Final = "encfs_js keyring"
VERSION: Final = 1
KEY: Final = 32
KINDS: Final = frozenset({"key", "tpm", "recovery"})

# What a reader takes. A keyring may come from an attacker: opening it must end, and must not take all of the memory.
MAX_DOCUMENT: Final = 1 << 20  # bytes
MAX_SLOTS: Final = 64
MAX_LABEL: Final = 255  # characters
MAX_EPOCHS: Final = 4096  # of which one has about 230 bytes in the document
MAX_ITERATIONS: Final = 1000
MAX_LANES: Final = 255
MAX_MEMORY_KIB: Final = 4 << 20  # 4 GiB
MAX_PBKDF2: Final = 20_000_000  # iterations of all slots together: 7 s
MAX_WORK_KIB: Final = 64 << 20  # iterations times memory of all slots together: a wrong key is tried on each

_LAYOUT = ("format", "version", "store_id", "settings", "epochs", "last_epoch", "slots", "mac", "checksum")
_WRAPPED = NONCE + KEY + TAG
_SUITES = {suite.label: suite for suite in Suite}


@dataclass(frozen=True, slots=True)
class Settings:
    """What new files get (cipher, epoch), and what a file that is not sealed is: `refuse` or `read`."""

    cipher: Suite
    plaintext: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Kdf:
    """The cost of Argon2id. The defaults are the second choice of RFC 9106: 64 MiB; 0.1 s on two cores of 2025."""

    iterations: int = 3
    lanes: int = 4
    memory_kib: int = 65536


@dataclass(frozen=True, slots=True)
class Pbkdf2:
    """The cost of PBKDF2-HMAC-SHA-256, for slots that a host makes whose OpenSSL refuses Argon2id (FIPS): 0.4 s."""

    iterations: int = 1_000_000


@dataclass(frozen=True, slots=True)
class Epoch:
    """One wrapped volume key. `created` is RFC 3339 UTC."""

    epoch: int
    created: str
    suite: Suite
    wrapped: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Slot:
    """One way to open the keyring. Of a kind that this version does not know, only the first four fields are read.

    kdf: None where the secret is random and needs no stretching. bound: the canonical JSON of the slot without "wrapped".
    """

    id: int
    kind: str
    label: str
    created: str
    suite: Suite | None = None
    kdf: Kdf | Pbkdf2 | None = None
    salt: bytes = field(default=b"", repr=False)
    check: bytes = field(default=b"", repr=False)
    wrapped: bytes = field(default=b"", repr=False)
    bound: bytes = field(default=b"", repr=False)

    @property
    def is_known(self) -> bool:
        """Whether this version can open it."""
        return self.suite is not None


@dataclass(frozen=True, slots=True)
class Keyring:
    """A parsed document.

    last_epoch: the highest number that an epoch ever had; none is given twice. signed: what `mac` covers, the canonical JSON
    of the document without "mac" and "checksum".
    """

    store_id: bytes
    settings: Settings
    epochs: tuple[Epoch, ...]
    slots: tuple[Slot, ...]
    last_epoch: int
    mac: bytes = field(repr=False)
    signed: bytes = field(repr=False)


_Time = Annotated[
    str, msgspec.Meta(pattern=r"\A[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?Z\Z")
]
_Number = Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]
_Bytes16 = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
_Bytes32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Wrapped = Annotated[bytes, msgspec.Meta(min_length=_WRAPPED, max_length=_WRAPPED)]
_SuiteName = Literal["chachapoly", "aes"]


class _KdfShape(msgspec.Struct, forbid_unknown_fields=True, tag_field="name", tag="argon2id"):
    iterations: Annotated[int, msgspec.Meta(ge=1, le=MAX_ITERATIONS)]
    lanes: Annotated[int, msgspec.Meta(ge=1, le=MAX_LANES)]
    memory_kib: Annotated[int, msgspec.Meta(ge=8, le=MAX_MEMORY_KIB)]
    salt: _Bytes16


class _Pbkdf2Shape(msgspec.Struct, forbid_unknown_fields=True, tag_field="name", tag="pbkdf2-hmac-sha256"):
    iterations: Annotated[int, msgspec.Meta(ge=1000, le=MAX_PBKDF2)]
    salt: _Bytes16


class _SlotShape(msgspec.Struct):
    id: _Number
    kind: Annotated[str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9-]{0,31}\Z")]
    label: Annotated[str, msgspec.Meta(max_length=MAX_LABEL)]
    created: _Time


class _KeySlotShape(_SlotShape, forbid_unknown_fields=True):
    suite: _SuiteName
    kdf: _KdfShape | _Pbkdf2Shape
    check: _Bytes16
    wrapped: _Wrapped


class _HkdfShape(msgspec.Struct, forbid_unknown_fields=True):
    name: Literal["hkdf-sha256"]
    salt: _Bytes16


class _RandomSlotShape(_SlotShape, forbid_unknown_fields=True):
    """A slot whose secret is random: `tpm`, `recovery`."""

    suite: _SuiteName
    kdf: _HkdfShape
    check: _Bytes16
    wrapped: _Wrapped


class _EpochShape(msgspec.Struct, forbid_unknown_fields=True):
    epoch: _Number
    created: _Time
    suite: _SuiteName
    wrapped: _Wrapped


class _SettingsShape(msgspec.Struct, forbid_unknown_fields=True):
    cipher: _SuiteName
    plaintext: Literal["refuse", "read"]
    epoch: _Number


class _Shape(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    store_id: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    settings: _SettingsShape
    epochs: Annotated[list[_EpochShape], msgspec.Meta(min_length=1, max_length=MAX_EPOCHS)]
    slots: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1, max_length=MAX_SLOTS)]
    mac: _Bytes32
    checksum: str
    last_epoch: _Number | msgspec.UnsetType = msgspec.UNSET


def parse(document: bytes) -> Keyring:
    """Read a keyring's document and check all that needs no key: its checksum, its shape, its limits.

    Raises VersionError for a version above 1, KeyringDamagedError for everything else.
    """
    raw = _read_json(document)
    if raw.get("format") != FORMAT:
        raise damaged("it does not say that it is a keyring")
    version = raw.get("version")
    if type(version) is int and version > VERSION:
        raise VersionError(
            f"the keyring has version {version}; this encfs_js knows version {VERSION}",
            hint="Use the version of encfs_js that wrote it, or a later one. Nothing was written.",
        )
    unsummed = {name: value for name, value in raw.items() if name != "checksum"}
    if raw.get("checksum") != hashlib.sha256(canonical(unsummed)).hexdigest():
        raise damaged("its checksum does not match")
    try:
        shape = msgspec.convert(raw, _Shape)
        slots = tuple(_parse_slot(slot) for slot in shape.slots)
    except msgspec.ValidationError as problem:
        raise damaged(str(problem)) from None
    except UnicodeEncodeError:
        raise damaged("there is text in it that is not Unicode") from None
    epochs = tuple(Epoch(e.epoch, e.created, _SUITES[e.suite], e.wrapped) for e in shape.epochs)
    numbers = {e.epoch for e in epochs}
    if version != VERSION:
        raise damaged("there is no such version")
    if len(numbers) < len(epochs) or len({slot.id for slot in slots}) < len(slots):
        raise damaged("two epochs or two slots have one number")
    if shape.settings.epoch not in numbers:
        raise damaged("the epoch of new files has no volume key")
    last = max(numbers) if isinstance(shape.last_epoch, msgspec.UnsetType) else shape.last_epoch
    if last < max(numbers):
        raise damaged("there is an epoch behind the last one")
    work = sum(slot.kdf.iterations * slot.kdf.memory_kib for slot in slots if isinstance(slot.kdf, Kdf))
    rounds = sum(slot.kdf.iterations for slot in slots if isinstance(slot.kdf, Pbkdf2))
    if work > MAX_WORK_KIB or rounds > MAX_PBKDF2:
        raise damaged("trying a key on all of its slots would take too long")
    del unsummed["mac"]
    return Keyring(
        store_id=bytes.fromhex(shape.store_id),
        settings=Settings(_SUITES[shape.settings.cipher], shape.settings.plaintext, shape.settings.epoch),
        epochs=epochs,
        slots=slots,
        last_epoch=last,
        mac=shape.mac,
        signed=canonical(unsummed),
    )


def _parse_slot(raw: dict[str, Any]) -> Slot:
    """Check one slot. A kind that a later version adds is kept as it is: the mac covers it like the rest."""
    shape = msgspec.convert(raw, _SlotShape)
    # Labels are printed before any key is known: no escape sequences to the terminal.
    if not shape.label.isprintable():
        raise msgspec.ValidationError("a label is not printable")
    if shape.kind not in KINDS:
        return Slot(shape.id, shape.kind, shape.label, shape.created)
    full: _KeySlotShape | _RandomSlotShape
    full = msgspec.convert(raw, _KeySlotShape) if shape.kind == "key" else msgspec.convert(raw, _RandomSlotShape)
    kdf: Kdf | Pbkdf2 | None = None
    if isinstance(full.kdf, _Pbkdf2Shape):
        kdf = Pbkdf2(full.kdf.iterations)
    elif isinstance(full.kdf, _KdfShape):
        kdf = Kdf(full.kdf.iterations, full.kdf.lanes, full.kdf.memory_kib)
        if kdf.memory_kib < 8 * kdf.lanes:
            raise msgspec.ValidationError("a slot has less than 8 KiB of memory a lane")
    return Slot(
        id=full.id,
        kind=full.kind,
        label=full.label,
        created=full.created,
        suite=_SUITES[full.suite],
        kdf=kdf,
        salt=full.kdf.salt,
        check=full.check,
        wrapped=full.wrapped,
        bound=canonical({name: value for name, value in raw.items() if name != "wrapped"}),
    )


def _read_json(document: bytes) -> dict[str, Any]:
    """Read a JSON object strictly: UTF-8 without a byte order mark, no name twice, every number whole."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) < len(pairs):
            raise ValueError("a name twice")
        return names

    def refuse(_number: str) -> NoReturn:
        raise ValueError("not a whole number")

    if len(document) > MAX_DOCUMENT:
        raise damaged(f"it is longer than {MAX_DOCUMENT} bytes")
    try:
        raw = json.loads(document.decode(), object_pairs_hook=unique, parse_constant=refuse, parse_float=refuse)
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict):
        raise damaged("it is not the JSON of a keyring")
    return raw


def canonical(value: object) -> bytes:
    """Return the canonical JSON that checksums, macs and AEADs take: sorted names, no white space, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def b64(raw: bytes) -> str:
    """Return standard base64 with padding."""
    return base64.b64encode(raw).decode("ascii")


def finish(unsigned: dict[str, Any], mac_key: bytes) -> bytes:
    """Add mac and checksum and return the document's bytes, laid out for people.

    Raises ValueError when `parse` would refuse them: what cannot be read back must not be written.
    """
    document = _whole(unsigned, hmac.digest(mac_key, canonical(unsigned), "sha256"))
    try:
        parse(document)
    except KeyringDamagedError as problem:
        raise ValueError(str(problem)) from None
    return document


def write_out(keyring: Keyring) -> bytes:
    """Return a document that `parse` makes this very keyring of."""
    return _whole(json.loads(keyring.signed), keyring.mac)


def _whole(unsigned: dict[str, Any], mac: bytes) -> bytes:
    signed = unsigned | {"mac": b64(mac)}
    whole = signed | {"checksum": hashlib.sha256(canonical(signed)).hexdigest()}
    # One document for one keyring, whichever change it comes from: a file that is another is another keyring.
    laid_out = {name: json.loads(canonical(whole[name])) for name in _LAYOUT if name in whole}
    return json.dumps(laid_out, indent=2).encode("ascii") + b"\n"


def damaged(reason: str) -> KeyringDamagedError:
    """Make the error for a document that cannot be used."""
    return KeyringDamagedError(
        f"the keyring is damaged: {reason}",
        hint=f"Nothing was written. Compare {META}/{NAME} with its copy {META}/{COPY} and with a backup, "
        "and put the good one back.",
    )
