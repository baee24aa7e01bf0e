"""The keyring: make, open, change and replace `.encfs_js/keyring` (FORMAT.md section 3).

This room does not know where a key string comes from (keysource), nor what the volume keys are used for. A key string
is UTF-8, and not empty. The document of a keyring holds no secret; `Keys` does: key bytes are never part of an
exception, a repr or a pickle.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import hmac
import json
import os
import shlex
import stat
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from encfs_js.backing import META, Backing
from encfs_js.errors import KeyringDamagedError, NotAStoreError, StoreIoError, VersionError, WrongKeyError
from encfs_js.format import AEADS, NONCE, Suite
from encfs_js.keydocument import (
    COPY,
    FORMAT,
    KEY,
    MAX_DOCUMENT,
    NAME,
    VERSION,
    Kdf,
    Keyring,
    Settings,
    b64,
    canonical,
    damaged,
    finish,
    parse,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# What other rooms look for here, though it stands in keydocument.
__all__ = ["Kdf", "Keyring", "Settings", "parse"]

STAGED: Final = "keyring.tmp"
_utc_now = partial(dt.datetime.now, dt.UTC)
_CHECK_INFO = b"encfs_js slot check v1"
_SLOT_INFO = b"encfs_js slot wrap v1"
_EPOCH_INFO = b"encfs_js epoch wrap v1"
_MAC_INFO = b"encfs_js keyring mac v1"
# The words of the Go libraries' errors, which NATS users know from their server's log.
_GO_NAME = {Suite.CHACHAPOLY: "chacha20poly1305", Suite.AES: "cipher"}


class Keys:
    """An unlocked keyring: its store id[16], its authenticated settings, and keys that it neither shows nor pickles."""

    __slots__ = ("_keyring_key", "_volume_keys", "settings", "store_id")

    def __init__(self, store_id: bytes, settings: Settings, keyring_key: bytes, volume_keys: dict[int, bytes]) -> None:
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
        return _hkdf(self._keyring_key, info, length)

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
    label: str = "",
    now: Callable[[], dt.datetime] = _utc_now,
    random: Callable[[int], bytes] = os.urandom,
    kdf: Kdf | None = None,
) -> bytes:
    """Make the document of a new keyring with one volume key (epoch 1) and one slot of kind `key`.

    Raises ValueError for an empty key and for arguments that `parse` would refuse, StoreIoError when Argon2id does not
    get its memory.
    """
    if not key:
        raise ValueError("an empty key")
    kdf = kdf or Kdf()
    created = now().astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    store_id, keyring_key, volume_key, salt = random(16), random(KEY), random(KEY), random(16)
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
            "salt": b64(salt),
        },
        "check": b64(_hkdf(secret, _CHECK_INFO, 16)),
    }
    slot["wrapped"] = b64(
        _wrap(cipher, _hkdf(secret, _SLOT_INFO), random(NONCE), keyring_key, store_id + canonical(slot))
    )
    wrapped = _wrap(cipher, _hkdf(keyring_key, _EPOCH_INFO), random(NONCE), volume_key, _epoch_bound(store_id, 1))
    return finish(
        {
            "format": FORMAT,
            "version": VERSION,
            "store_id": store_id.hex(),
            "settings": {"cipher": cipher.label, "plaintext": plaintext, "epoch": 1},
            "epochs": [{"epoch": 1, "created": created, "suite": cipher.label, "wrapped": b64(wrapped)}],
            "slots": [slot],
        },
        _hkdf(keyring_key, _MAC_INFO),
    )


def change_settings(
    keyring: Keyring,
    keys: Keys,
    *,
    cipher: Suite | None = None,
    plaintext: str | None = None,
    epoch: int | None = None,
) -> bytes:
    """Return the keyring's document with other settings, authenticated anew; what is not given stays.

    Raises KeyringDamagedError when `keys` do not authenticate `keyring` as it is (a change must never bless what
    somebody else wrote), ValueError for a setting that `parse` would refuse, such as an epoch without volume key.
    """
    mac_key = keys.derive(_MAC_INFO)
    _check_mac(keyring, mac_key)
    document = json.loads(keyring.signed)
    changes = {"cipher": cipher and cipher.label, "plaintext": plaintext, "epoch": epoch}
    document["settings"] |= {name: value for name, value in changes.items() if value is not None}
    return finish(document, mac_key)


def unlock(keyring: Keyring, key: bytes) -> Keys:
    """Open the keyring with a key string and authenticate all of it. Takes the time and memory of its Argon2id slots.

    Raises WrongKeyError when the key opens no slot, KeyringDamagedError when it opens one and the rest does not
    authenticate, VersionError when every slot is of a kind that this version does not know, StoreIoError when Argon2id
    does not get its memory, ValueError for an empty key.
    """
    if not key:
        raise ValueError("an empty key")
    first = None
    for slot in keyring.slots:
        if slot.kdf is None or slot.suite is None:
            continue
        first = first or slot
        secret = _slot_secret(key, slot.kdf, slot.salt)
        if not hmac.compare_digest(_hkdf(secret, _CHECK_INFO, 16), slot.check):
            continue
        bound = keyring.store_id + slot.bound
        keyring_key = _unwrap(slot.suite, _hkdf(secret, _SLOT_INFO), slot.wrapped, bound, f"slot {slot.id}")
        _check_mac(keyring, _hkdf(keyring_key, _MAC_INFO))
        epoch_key = _hkdf(keyring_key, _EPOCH_INFO)
        volume_keys = {}
        for e in keyring.epochs:
            bound = _epoch_bound(keyring.store_id, e.epoch)
            volume_keys[e.epoch] = _unwrap(e.suite, epoch_key, e.wrapped, bound, f"epoch {e.epoch}")
        return Keys(keyring.store_id, keyring.settings, keyring_key, volume_keys)
    if first is None or first.suite is None:
        kinds = ", ".join(sorted({slot.kind for slot in keyring.slots}))
        raise VersionError(
            f"the keyring has no slot for a key string, only for: {kinds}",
            hint="Use the version of encfs_js that made the slots. Nothing was written.",
        )
    raise WrongKeyError(
        f"Error decrypting our keyring: {_GO_NAME[first.suite]}: message authentication failed",
        hint="The key opens no slot of this keyring; nothing was written. Check where the key comes from (--key-file, "
        "--credential, --config, JS_KEY; the first that is given counts), and with `encfs-js inspect STORE` that this "
        "is the store you mean.",
    )


def load(store: str, *, backing: Backing | None = None) -> tuple[Keyring, str]:
    """Read a store's keyring, or its copy where the keyring is damaged.

    Returns it with a warning for the operator ("" if there is none): the copy had to be read, or it is not the same as
    the keyring. Raises NotAStoreError, KeyringDamagedError (both are damaged), VersionError, StoreIoError.
    """
    backing = backing or Backing()
    path, spare = _paths(store)
    main, copy = _read(path, backing), _read(spare, backing)
    if main is None and copy is None:
        raise NotAStoreError(
            f"{store}: no encfs_js store: {path} does not exist",
            hint=f"Check the path; `encfs-js init {shlex.quote(store)}` makes a new store.",
        )
    if isinstance(main, Keyring):
        if main == copy:
            return main, ""
        state = (
            "is missing"
            if copy is None
            else f"is not the same as {NAME}"
            if isinstance(copy, Keyring)
            else "is damaged"
        )
        # Not before: the keyring may be the wrong one of the two.
        again = f"cp -p {shlex.quote(path)} {shlex.quote(spare)}"
        return main, f"{spare} {state}. When the store has opened with your key, make the copy anew: {again}"
    for found in (main, copy):
        if isinstance(found, VersionError):
            raise found
    reason = "is missing" if main is None else f"cannot be used ({main})"
    if isinstance(copy, Keyring):
        return copy, _read_instead(path, spare, reason)
    raise KeyringDamagedError(
        f"{path} {reason}, and its copy {spare} " + ("is missing" if copy is None else f"neither ({copy})"),
        hint="Nothing was written. Put the keyring back from a backup of the store; one from after the last change of "
        "a key will do. Without a keyring no file of the store can be read.",
    )


def unlock_store(store: str, key: bytes, *, backing: Backing | None = None) -> tuple[Keyring, Keys, str]:
    """Load and unlock. A keyring that only the right key shows to be damaged is read from its copy, too.

    Returns the keyring that was opened, its keys and the warning of `load`. Raises what `load` and `unlock` raise.
    """
    backing = backing or Backing()
    keyring, warning = load(store, backing=backing)
    try:
        return keyring, unlock(keyring, key), warning
    except KeyringDamagedError as damage:
        path, spare = _paths(store)
        copy = _read(spare, backing)
        if not isinstance(copy, Keyring) or copy == keyring:
            raise
        return copy, unlock(copy, key), _read_instead(path, spare, f"cannot be used ({damage})")


def _paths(store: str) -> tuple[str, str]:
    return os.path.join(store, META, NAME), os.path.join(store, META, COPY)


def _read_instead(path: str, spare: str, reason: str) -> str:
    return (
        f"{path} {reason}. Its copy {spare} was read instead. Keep the bad file for a look, then: "
        f"cp -p {shlex.quote(spare)} {shlex.quote(path)}"
    )


def _read(path: str, backing: Backing) -> Keyring | KeyringDamagedError | VersionError | None:
    """Read one of the two files: the keyring, or what is wrong with it, or None if there is no such file."""
    try:
        # O_NONBLOCK: opening must not wait when somebody put a pipe there.
        fd = backing.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(backing.fstat(fd).st_mode):
                return damaged("it is no regular file")
            document = bytearray()
            part = bytearray(65536)
            while len(document) <= MAX_DOCUMENT and (got := backing.preadv(fd, [part], len(document))):
                document += part[:got]
        finally:
            backing.close(fd)
        return parse(bytes(document))
    except (KeyringDamagedError, VersionError) as problem:
        return problem
    except OSError as problem:
        if problem.errno in {errno.ENOENT, errno.ENOTDIR}:
            return None
        if problem.errno in {errno.EIO, errno.ELOOP}:
            return damaged(os.strerror(problem.errno))
        raise StoreIoError(
            f"{path}: {problem.strerror}",
            hint="Run the command as the user that owns the store. Nothing was written.",
        ) from problem


def write(store: str, document: bytes, *, backing: Backing | None = None) -> None:
    """Replace a store's keyring, then its copy. Makes `.encfs_js` (mode 0700) when it is not there.

    Each of the two is replaced atomically, the copy only when the keyring is safely on the disk. Raises StoreIoError;
    the keyring is the old or the new one then, never half of one. The caller holds the store's lock.
    """
    # What a crash or a power cut after each call leaves behind:
    #
    #     mkdir .encfs_js, fsync of the store    an empty directory: no store yet (`load` raises NotAStoreError)
    #     unlink keyring.tmp                     as before; what an earlier crash staged is gone, or back again
    #     open, pwrite, fsync of keyring.tmp     as before, and a staged file that nobody reads
    #     rename to keyring                      the old or the new keyring, whole: its bytes were synced first
    #     fsync of .encfs_js                     the new keyring, and the old copy or none (`load` warns)
    #     unlink .. fsync of keyring.tmp         the same, and a staged file that nobody reads
    #     rename to keyring.bak                  the new keyring, and the old copy or the new one, whole
    #     fsync of .encfs_js                     both new
    #
    # If the keyring was damaged before, the copy is the good one: it stays until the new keyring is on the disk.
    backing = backing or Backing()
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    with contextlib.ExitStack() as opened:
        try:
            top = backing.open(store, flags)
            opened.callback(backing.close, top)
            with contextlib.suppress(FileExistsError):
                backing.mkdir(META, 0o700, dir_fd=top)
            backing.fsync(top)  # also when it is there: a crash may have come between these two calls
            directory = backing.open(META, flags | os.O_NOFOLLOW, dir_fd=top)
            opened.callback(backing.close, directory)
            _replace(directory, NAME, document, backing)
            _replace(directory, COPY, document, backing)
        except OSError as problem:
            raise StoreIoError(
                f"{os.path.join(store, META)}: the keyring was not written: {problem.strerror}",
                hint="What was there still opens, or the new keyring does. Make room, or set the permissions right, "
                "and repeat the command.",
            ) from problem


def _replace(directory: int, name: str, document: bytes, backing: Backing) -> None:
    """Replace one file of the directory by way of keyring.tmp. Raises OSError, and then leaves no staged file."""
    with contextlib.suppress(FileNotFoundError):
        backing.unlink(STAGED, dir_fd=directory)
    fd = backing.open(
        STAGED, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=directory
    )
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
        # If it cannot be removed either, it is in nobody's way: the next write replaces it.
        with contextlib.suppress(OSError):
            backing.unlink(STAGED, dir_fd=directory)
        raise
    backing.fsync(directory)


def _check_mac(keyring: Keyring, mac_key: bytes) -> None:
    if not hmac.compare_digest(hmac.digest(mac_key, keyring.signed, "sha256"), keyring.mac):
        raise damaged("the key is right and the rest does not authenticate: somebody changed it")


def _hkdf(secret: bytes, info: bytes, length: int = 32) -> bytes:
    return HKDF(SHA256(), length, None, info).derive(secret)


def _slot_secret(key: bytes, kdf: Kdf, salt: bytes) -> bytes:
    try:
        return Argon2id(
            salt=salt, length=32, iterations=kdf.iterations, lanes=kdf.lanes, memory_cost=kdf.memory_kib
        ).derive(key)
    except MemoryError:
        raise StoreIoError(
            f"not enough memory to derive the key: Argon2id needs {kdf.memory_kib} KiB",
            hint="Raise the memory limit of the service or the container. Nothing was written.",
        ) from None


def _epoch_bound(store_id: bytes, epoch: int) -> bytes:
    return store_id + epoch.to_bytes(4, "little")


def _wrap(suite: Suite, key: bytes, nonce: bytes, secret: bytes, bound: bytes) -> bytes:
    return nonce + AEADS[suite](key).encrypt(nonce, secret, bound)


def _unwrap(suite: Suite, key: bytes, wrapped: bytes, bound: bytes, what: str) -> bytes:
    try:
        return AEADS[suite](key).decrypt(wrapped[:NONCE], wrapped[NONCE:], bound)
    except InvalidTag:
        raise damaged(f"the key is right and {what} does not authenticate") from None
