"""The keyring: the volume keys, wrapped, and the settings they authenticate (FORMAT.md section 3).

This room makes, reads, opens and replaces `.encfs_js/keyring`. It does not know where a key string comes from (keysource), nor
what the volume keys are used for. A key string is any UTF-8 bytes that are not empty.

The document of a keyring holds no secret; `Keys` does. Key bytes are never part of an exception, a repr or a pickle.
"""

from __future__ import annotations

import base64
import datetime
import errno
import hashlib
import hmac
import json
import os
import re
import shlex
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NoReturn

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from encfs_js.backing import Backing
from encfs_js.errors import (
    EncfsError,
    KeyringDamagedError,
    NotAStoreError,
    StoreIoError,
    VersionError,
    WrongKeyError,
)
from encfs_js.format import AEADS, NONCE, TAG, Suite

if TYPE_CHECKING:
    from collections.abc import Callable

DIRECTORY: Final = ".encfs_js"
NAME: Final = "keyring"
COPY: Final = "keyring.bak"
STAGED: Final = "keyring.tmp"
VERSION: Final = 1
PLAINTEXT: Final = ("refuse", "read")

# What a reader takes. A keyring may come from an attacker: opening it must end, and must not need the machine's whole memory.
MAX_DOCUMENT: Final = 1 << 20  # bytes
MAX_SLOTS: Final = 64
MAX_ITERATIONS: Final = 1000
MAX_LANES: Final = 255
MAX_MEMORY_KIB: Final = 4 << 20  # 4 GiB

_FORMAT = "encfs_js keyring"
_KEY = 32
_WRAPPED = NONCE + _KEY + TAG
_MAC_INFO = b"encfs_js keyring mac v1"
_SUITES = {suite.label: suite for suite in Suite}
# The words of the Go libraries' errors, which NATS users know from their server's log.
_GO_NAME = {Suite.CHACHAPOLY: "chacha20poly1305", Suite.AES: "cipher"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the keyring says about new files: their suite and epoch; and what a file that is not sealed is (refuse, read)."""

    cipher: Suite
    plaintext: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Kdf:
    """The cost of Argon2id. The defaults are RFC 9106's second choice: 64 MiB, 0.1 s on one machine of 2025 with two cores."""

    iterations: int = 3
    lanes: int = 4
    memory_kib: int = 65536


@dataclass(frozen=True, slots=True)
class Epoch:
    """One wrapped volume key. `created` is RFC 3339 UTC."""

    epoch: int
    created: str
    suite: Suite
    wrapped: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Slot:
    """One way to open the keyring. Of a kind that this version does not know, only `id`, `kind`, `label` and `created` are read."""

    id: int
    kind: str
    label: str
    created: str
    suite: Suite | None = None
    kdf: Kdf | None = None
    salt: bytes = field(default=b"", repr=False)
    check: bytes = field(default=b"", repr=False)
    wrapped: bytes = field(default=b"", repr=False)
    bound: bytes = field(default=b"", repr=False)  # canonical JSON of the slot without "wrapped"


@dataclass(frozen=True, slots=True)
class Keyring:
    """A parsed document. It is intact, but nothing in it is authenticated before `unlock`.

    signed: what `mac` covers, the canonical JSON of the document without "mac" and "checksum".
    """

    store_id: bytes
    settings: Settings
    epochs: tuple[Epoch, ...]
    slots: tuple[Slot, ...]
    mac: bytes = field(repr=False)
    signed: bytes = field(repr=False)


class Keys:
    """An unlocked keyring: its store id[16], its authenticated settings, and the keys. Shows none of them, and cannot be pickled."""

    __slots__ = ("_keyring_key", "_volume_keys", "settings", "store_id")

    def __init__(
        self, store_id: bytes, settings: Settings, keyring_key: bytes, volume_keys: dict[int, bytes]
    ) -> None:
        self.store_id = store_id
        self.settings = settings
        self._keyring_key = keyring_key
        self._volume_keys = volume_keys

    def volume_key(self, epoch: int) -> bytes:
        """Return the 32-byte volume key of an epoch. Raises KeyError."""
        return self._volume_keys[epoch]

    def derive(self, info: bytes, length: int = 32) -> bytes:
        """Derive a key for another purpose, named by `info`: HKDF-SHA-256 of the keyring key, without salt."""
        return _hkdf(self._keyring_key, info, length)

    def __repr__(self) -> str:
        """Name the store and the epochs, never a key."""
        return f"Keys(store_id={self.store_id.hex()}, epochs={sorted(self._volume_keys)})"

    def __reduce__(self) -> NoReturn:
        """Refuse: a pickle (or a copy) would be key material in a place that nobody guards."""
        raise TypeError("Keys cannot be pickled or copied")


# --- making ---------------------------------------------------------------------------------------------------------


def utc_now() -> datetime.datetime:
    """Return the present time, with its zone."""
    return datetime.datetime.now(datetime.UTC)


def create(
    key: bytes,
    *,
    cipher: Suite,
    plaintext: str,
    label: str = "",
    now: Callable[[], datetime.datetime] = utc_now,
    random: Callable[[int], bytes] = os.urandom,
    kdf: Kdf | None = None,
) -> bytes:
    """Make the document of a new keyring with one volume key (epoch 1) and one slot of kind `key`.

    Raises ValueError for an empty key, an unknown `plaintext` or a label that `parse` would refuse, StoreIoError when Argon2id
    does not get its memory.
    """
    if not key:
        raise ValueError("an empty key")
    kdf = kdf or Kdf()
    created = now().astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    store_id, keyring_key, volume_key, salt = random(16), random(_KEY), random(_KEY), random(16)
    secret = _slot_secret(key, kdf, salt)
    slot: dict[str, Any] = {
        "id": 1,
        "kind": "key",
        "label": label,
        "created": created,
        "suite": cipher.label,
        "kdf": {
            "name": "argon2id",
            "iterations": kdf.iterations,
            "lanes": kdf.lanes,
            "memory_kib": kdf.memory_kib,
            "salt": _b64(salt),
        },
        "check": _b64(_slot_check(secret)),
    }
    wrapping = _hkdf(secret, b"encfs_js slot wrap v1")
    slot["wrapped"] = _b64(_wrap(cipher, wrapping, random(NONCE), keyring_key, store_id + _canonical(slot)))
    epoch_key, bound = _hkdf(keyring_key, b"encfs_js epoch wrap v1"), store_id + (1).to_bytes(4, "little")
    document = _finish(
        {
            "format": _FORMAT,
            "version": VERSION,
            "store_id": store_id.hex(),
            "settings": {"cipher": cipher.label, "plaintext": plaintext, "epoch": 1},
            "epochs": [
                {
                    "epoch": 1,
                    "created": created,
                    "suite": cipher.label,
                    "wrapped": _b64(_wrap(cipher, epoch_key, random(NONCE), volume_key, bound)),
                }
            ],
            "slots": [slot],
        },
        _hkdf(keyring_key, _MAC_INFO),
    )
    _check_own(document)
    return document


def change_settings(
    keyring: Keyring,
    keys: Keys,
    *,
    cipher: Suite | None = None,
    plaintext: str | None = None,
    epoch: int | None = None,
) -> bytes:
    """Return the keyring's document with other settings, authenticated anew; what is not given stays.

    Raises KeyringDamagedError when `keys` do not authenticate `keyring` as it is (a change must never bless what somebody
    else wrote), ValueError for a setting that `parse` would refuse, an epoch without volume key among them.
    """
    mac_key = keys.derive(_MAC_INFO)
    _check_mac(keyring, mac_key)
    document = json.loads(keyring.signed)
    settings = document["settings"]
    settings["cipher"] = settings["cipher"] if cipher is None else cipher.label
    settings["plaintext"] = settings["plaintext"] if plaintext is None else plaintext
    settings["epoch"] = settings["epoch"] if epoch is None else epoch
    changed = _finish(document, mac_key)
    _check_own(changed)
    return changed


# --- reading --------------------------------------------------------------------------------------------------------

_Time = Annotated[
    str, msgspec.Meta(pattern=r"\A[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?Z\Z")
]
_Number = Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]
_Bytes16 = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
_Bytes32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Wrapped = Annotated[bytes, msgspec.Meta(min_length=_WRAPPED, max_length=_WRAPPED)]
_SuiteName = Literal["chachapoly", "aes"]


class _KdfShape(msgspec.Struct, forbid_unknown_fields=True):
    name: Literal["argon2id"]
    iterations: Annotated[int, msgspec.Meta(ge=1, le=MAX_ITERATIONS)]
    lanes: Annotated[int, msgspec.Meta(ge=1, le=MAX_LANES)]
    memory_kib: Annotated[int, msgspec.Meta(ge=8, le=MAX_MEMORY_KIB)]
    salt: _Bytes16


class _SlotShape(msgspec.Struct):
    id: _Number
    kind: Annotated[str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9-]{0,31}\Z")]
    label: Annotated[str, msgspec.Meta(max_length=255)]
    created: _Time


class _KeySlotShape(_SlotShape, forbid_unknown_fields=True):
    suite: _SuiteName
    kdf: _KdfShape
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
    epochs: Annotated[list[_EpochShape], msgspec.Meta(min_length=1)]
    slots: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1, max_length=MAX_SLOTS)]
    mac: _Bytes32
    checksum: str


def parse(document: bytes) -> Keyring:
    """Read a keyring's document and check all that needs no key: its checksum, its shape, its limits.

    Raises VersionError for a version above 1, KeyringDamagedError for everything else.
    """
    raw = _read_json(document)
    if raw.get("format") != _FORMAT:
        raise _damaged("it does not say that it is a keyring")
    version = raw.get("version")
    if type(version) is int and version > VERSION:
        raise VersionError(
            f"the keyring has version {version}; this encfs_js knows version {VERSION}",
            hint="Use the version of encfs_js that wrote it, or a later one. Nothing was written.",
        )
    unsummed = {name: value for name, value in raw.items() if name != "checksum"}
    if version != VERSION or raw.get("checksum") != hashlib.sha256(_canonical(unsummed)).hexdigest():
        raise _damaged("its checksum does not match")
    try:
        shape = msgspec.convert(raw, _Shape)
        slots = tuple(_parse_slot(slot) for slot in shape.slots)
    except msgspec.ValidationError as problem:
        raise _damaged(str(problem)) from None
    epochs = tuple(Epoch(e.epoch, e.created, _SUITES[e.suite], e.wrapped) for e in shape.epochs)
    numbers = {e.epoch for e in epochs}
    if len(numbers) < len(epochs) or len({slot.id for slot in slots}) < len(slots):
        raise _damaged("two epochs or two slots have one number")
    if shape.settings.epoch not in numbers:
        raise _damaged("the epoch of new files has no volume key")
    del unsummed["mac"]
    return Keyring(
        store_id=bytes.fromhex(shape.store_id),
        settings=Settings(_SUITES[shape.settings.cipher], shape.settings.plaintext, shape.settings.epoch),
        epochs=epochs,
        slots=slots,
        mac=shape.mac,
        signed=_canonical(unsummed),
    )


def _parse_slot(raw: dict[str, Any]) -> Slot:
    """Check one slot. Kinds that later versions add are kept as they are and not tried: they are under the mac like the rest."""
    shape = msgspec.convert(raw, _SlotShape)
    # Labels are printed before any key is known: no escape sequences to the terminal.
    if not shape.label.isprintable():
        raise msgspec.ValidationError("a label that is not printable")
    if shape.kind != "key":
        return Slot(shape.id, shape.kind, shape.label, shape.created)
    full = msgspec.convert(raw, _KeySlotShape)
    if full.kdf.memory_kib < 8 * full.kdf.lanes:
        raise msgspec.ValidationError("less than 8 KiB of memory a lane")
    return Slot(
        id=full.id,
        kind=full.kind,
        label=full.label,
        created=full.created,
        suite=_SUITES[full.suite],
        kdf=Kdf(full.kdf.iterations, full.kdf.lanes, full.kdf.memory_kib),
        salt=full.kdf.salt,
        check=full.check,
        wrapped=full.wrapped,
        bound=_canonical({name: value for name, value in raw.items() if name != "wrapped"}),
    )


def _read_json(document: bytes) -> dict[str, Any]:
    """Read a JSON object strictly: UTF-8 without a mark, no name twice, no NaN, no numbers that are not whole."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) < len(pairs):
            raise ValueError
        return names

    def refuse(_number: str) -> NoReturn:
        raise ValueError

    if len(document) > MAX_DOCUMENT:
        raise _damaged(f"it is longer than {MAX_DOCUMENT} bytes")
    try:
        raw = json.loads(
            document.decode(), object_pairs_hook=unique, parse_constant=refuse, parse_float=refuse
        )
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict):
        raise _damaged("it is not the JSON of a keyring")
    return raw


# --- opening --------------------------------------------------------------------------------------------------------


def unlock(keyring: Keyring, key: bytes) -> Keys:
    """Open the keyring with a key string and authenticate all of it. Takes the time and memory of its slots' Argon2id.

    Raises WrongKeyError when the key opens no slot, KeyringDamagedError when it opens one and the rest does not authenticate,
    VersionError when there is no slot of a kind that this version knows, StoreIoError when Argon2id does not get its memory.
    """
    if not key:
        raise ValueError("an empty key")
    slots = [slot for slot in keyring.slots if slot.kind == "key"]
    if not slots:
        kinds = ", ".join(sorted({slot.kind for slot in keyring.slots}))
        raise VersionError(
            f"the keyring has no slot for a key string, only for: {kinds}",
            hint="Use the version of encfs_js that made the slots. Nothing was written.",
        )
    for slot in slots:
        assert slot.kdf is not None
        assert slot.suite is not None
        secret = _slot_secret(key, slot.kdf, slot.salt)
        if hmac.compare_digest(_slot_check(secret), slot.check):
            wrapping = _hkdf(secret, b"encfs_js slot wrap v1")
            keyring_key = _unwrap(
                slot.suite, wrapping, slot.wrapped, keyring.store_id + slot.bound, f"slot {slot.id}"
            )
            return _open(keyring, keyring_key)
    suite = slots[0].suite
    assert suite is not None
    raise WrongKeyError(
        f"Error decrypting our keyring: {_GO_NAME[suite]}: message authentication failed",
        hint="The key opens no slot of this keyring; nothing was written. Check where the key comes from (--key-file, --credential, "
        "--config, JS_KEY: the first one given counts), and with `encfs-js inspect STORE` that this is the store you mean.",
    )


def _open(keyring: Keyring, keyring_key: bytes) -> Keys:
    """Authenticate the whole keyring and unwrap every volume key."""
    _check_mac(keyring, _hkdf(keyring_key, _MAC_INFO))
    epoch_key = _hkdf(keyring_key, b"encfs_js epoch wrap v1")
    volume_keys = {}
    for e in keyring.epochs:
        bound = keyring.store_id + e.epoch.to_bytes(4, "little")
        volume_keys[e.epoch] = _unwrap(e.suite, epoch_key, e.wrapped, bound, f"epoch {e.epoch}")
    return Keys(keyring.store_id, keyring.settings, keyring_key, volume_keys)


def _check_mac(keyring: Keyring, mac_key: bytes) -> None:
    if not hmac.compare_digest(hmac.digest(mac_key, keyring.signed, "sha256"), keyring.mac):
        raise _damaged("the key is right, and the rest does not authenticate: somebody changed it")


# --- the files ------------------------------------------------------------------------------------------------------


def load(store: str, *, backing: Backing | None = None) -> tuple[Keyring, str]:
    """Read a store's keyring, or its copy where the keyring is damaged.

    Returns it with a warning for the operator ("" if there is nothing to say): the copy had to be read, or the copy is not the same
    as the keyring. Raises NotAStoreError, KeyringDamagedError (both are damaged), VersionError, StoreIoError.
    """
    backing = backing or Backing()
    main, copy = _try(store, NAME, backing), _try(store, COPY, backing)
    path, spare = os.path.join(store, DIRECTORY, NAME), os.path.join(store, DIRECTORY, COPY)
    if main is None and copy is None:
        raise NotAStoreError(
            f"{store}: no encfs_js store: {path} does not exist",
            hint=f"Check the path; `encfs-js init {shlex.quote(store)}` makes a new store.",
        )
    if isinstance(main, Keyring):
        if main == copy:
            return main, ""
        why = (
            "is missing"
            if copy is None
            else "is damaged"
            if isinstance(copy, KeyringDamagedError)
            else "has other contents"
        )
        return main, f"{spare} {why}. Make it anew: cp -p {shlex.quote(path)} {shlex.quote(spare)}"
    if isinstance(main, VersionError):
        raise main
    if isinstance(copy, VersionError):
        raise copy
    why = f"{path} is missing" if main is None else f"{path}: {main}"
    if isinstance(copy, Keyring):
        return copy, (
            f"{why}. Its copy {spare} was read instead. Keep the damaged file for a look, then: "
            f"cp -p {shlex.quote(spare)} {shlex.quote(path)}"
        )
    raise KeyringDamagedError(
        f"{why}; its copy " + ("is missing" if copy is None else f"{spare}: {copy}"),
        hint=f"Nothing was written. Put {path} back from a backup of the store, any age after the last change of a key will do: "
        "without a keyring no file of the store can be read.",
    )


def unlock_store(store: str, key: bytes, *, backing: Backing | None = None) -> tuple[Keyring, Keys, str]:
    """Load and unlock in one: a keyring that the right key shows to be damaged is read from its copy, too.

    Returns the keyring that was opened, its keys and the warning of `load`. Raises what `load` and `unlock` raise.
    """
    backing = backing or Backing()
    keyring, warning = load(store, backing=backing)
    try:
        return keyring, unlock(keyring, key), warning
    except KeyringDamagedError as damage:
        copy = _try(store, COPY, backing)
        if not isinstance(copy, Keyring) or copy == keyring:
            raise
        path, spare = os.path.join(store, DIRECTORY, NAME), os.path.join(store, DIRECTORY, COPY)
        keys = unlock(copy, key)
        return (
            copy,
            keys,
            (
                f"{path}: {damage}. Its copy {spare} was read instead. Keep the damaged file for a look, then: "
                f"cp -p {shlex.quote(spare)} {shlex.quote(path)}"
            ),
        )


def _try(store: str, name: str, backing: Backing) -> Keyring | EncfsError | None:
    """Read one of the two files: the keyring, what is wrong with it, or None if there is no such file. Raises StoreIoError."""
    path = os.path.join(store, DIRECTORY, name)
    try:
        # O_NONBLOCK: opening must not wait when somebody put a pipe there.
        fd = backing.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(backing.fstat(fd).st_mode):
                return _damaged("it is no regular file")
            parts, at = [], 0
            while at <= MAX_DOCUMENT:
                part = bytearray(65536)
                got = backing.preadv(fd, [part], at)
                if not got:
                    break
                parts.append(part[:got])
                at += got
        finally:
            backing.close(fd)
        return parse(b"".join(parts))
    except (KeyringDamagedError, VersionError) as problem:
        return problem
    except OSError as problem:
        if problem.errno in {errno.ENOENT, errno.ENOTDIR}:
            return None
        if problem.errno in {errno.EIO, errno.ELOOP}:
            return _damaged(os.strerror(problem.errno))
        raise StoreIoError(
            f"{path}: {problem.strerror}",
            hint="Run the command as the user that owns the store. Nothing was written.",
        ) from problem


def write(store: str, document: bytes, *, backing: Backing | None = None) -> None:
    """Replace a store's keyring, then its copy. Makes `.encfs_js` (mode 0700) when it is not there.

    Each of the two is replaced atomically, and the copy only when the keyring is safely on the disk. Raises StoreIoError: then the
    keyring is the old or the new one, never half of one. The caller holds the store's lock.
    """
    # What a crash, or a power cut, after each call leaves behind:
    #
    #     mkdir .encfs_js, fsync of the store     an empty directory: no store yet (`load` says NotAStoreError)
    #     unlink keyring.tmp                      as before; a staged file of an earlier crash is gone, or is back
    #     open, pwrite keyring.tmp, fsync         as before, and a staged file that nobody reads
    #     rename to keyring                       the old keyring or the new one, both whole: the bytes were synced first
    #     fsync of .encfs_js                      the new keyring, the old copy (`load` warns that they differ, or that it is missing)
    #     unlink .. fsync keyring.tmp             the same, and a staged file that nobody reads
    #     rename to keyring.bak                   the new keyring, and the old or the new copy
    #     fsync of .encfs_js                      both new
    #
    # When the keyring was damaged before, the copy is the good one: it is not touched before the new keyring is on the disk.
    backing = backing or Backing()
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    fds: list[int] = []
    try:
        fds.append(top := backing.open(store, flags))
        try:
            backing.mkdir(DIRECTORY, 0o700, dir_fd=top)
        except FileExistsError:
            pass
        else:
            backing.fsync(top)
        fds.append(directory := backing.open(DIRECTORY, flags | os.O_NOFOLLOW, dir_fd=top))
        for name in (NAME, COPY):
            _replace(directory, name, document, backing)
    except OSError as problem:
        raise StoreIoError(
            f"{os.path.join(store, DIRECTORY)}: the keyring was not written: {problem.strerror}",
            hint="Whatever was there before still opens. Make room or set the permissions right, and repeat the command.",
        ) from problem
    finally:
        for fd in fds:
            backing.close(fd)


def _replace(directory: int, name: str, document: bytes, backing: Backing) -> None:
    """Replace one file of the directory by way of keyring.tmp. Raises OSError, and leaves no staged file behind then."""
    try:
        backing.unlink(STAGED, dir_fd=directory)
    except FileNotFoundError:
        pass
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = backing.open(STAGED, flags, 0o600, dir_fd=directory)
    try:
        try:
            at = 0
            while at < len(document):
                at += backing.pwrite(fd, document[at:], at)
            backing.fsync(fd)
        finally:
            backing.close(fd)
        backing.rename(STAGED, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        try:
            backing.unlink(STAGED, dir_fd=directory)
        except OSError:
            pass  # it is in nobody's way: the next write replaces it
        raise
    backing.fsync(directory)


# --- primitives -----------------------------------------------------------------------------------------------------


def _damaged(reason: str) -> KeyringDamagedError:
    return KeyringDamagedError(
        f"the keyring is damaged: {reason}",
        hint=f"Nothing was written. Compare {DIRECTORY}/{NAME} with its copy {DIRECTORY}/{COPY} or a backup, and put the good one back.",
    )


def _check_own(document: bytes) -> None:
    """Hold what was just made against the reader's rules: what cannot be read back must not be written."""
    try:
        parse(document)
    except KeyringDamagedError as problem:
        raise ValueError(str(problem)) from None


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def _finish(unsigned: dict[str, Any], mac_key: bytes) -> bytes:
    """Add mac and checksum and return the document's bytes, laid out for people."""
    signed = unsigned | {"mac": _b64(hmac.digest(mac_key, _canonical(unsigned), "sha256"))}
    whole = signed | {"checksum": hashlib.sha256(_canonical(signed)).hexdigest()}
    return json.dumps(whole, indent=2).encode("ascii") + b"\n"


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _hkdf(secret: bytes, info: bytes, length: int = 32) -> bytes:
    return HKDF(SHA256(), length, None, info).derive(secret)


def _slot_check(secret: bytes) -> bytes:
    return _hkdf(secret, b"encfs_js slot check v1", 16)


def _slot_secret(key: bytes, kdf: Kdf, salt: bytes) -> bytes:
    argon = Argon2id(
        salt=salt, length=32, iterations=kdf.iterations, lanes=kdf.lanes, memory_cost=kdf.memory_kib
    )
    try:
        return argon.derive(key)
    except MemoryError:
        pass
    raise StoreIoError(
        f"not enough memory to open the keyring: its slot asks Argon2id for {kdf.memory_kib} KiB",
        hint="Raise the memory limit of the service or the container. Nothing was written.",
    )


def _wrap(suite: Suite, key: bytes, nonce: bytes, secret: bytes, bound: bytes) -> bytes:
    return nonce + AEADS[suite](key).encrypt(nonce, secret, bound)


def _unwrap(suite: Suite, key: bytes, wrapped: bytes, bound: bytes, what: str) -> bytes:
    try:
        return AEADS[suite](key).decrypt(wrapped[:NONCE], wrapped[NONCE:], bound)
    except InvalidTag:
        raise _damaged(f"the key is right, and {what} does not authenticate") from None
