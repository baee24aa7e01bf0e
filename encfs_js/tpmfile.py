"""The file with a key that a TPM has sealed: its JSON, reading it, putting a new one in its place. Talks to no TPM.

It is nats-server's `keys_file` (2.11 to 2.15, Windows), one JSON object:

    version      1
    private_key  base64 of the base64 of the content of a TPM2B_PRIVATE, without its size
    public_key   the same of a TPMT_PUBLIC (`_PUBLIC`), 78 bytes

and, in a file that encfs_js made, what nats-server passes over when it reads it:

    srk_name     the name of the storage root key above it, in hex: 000b, SHA-256 of its public area
    srk_salt     base64 of the 16 bytes salt for srk_password, where there is one

The key is a text, a user seed as `nk -gen user` makes one. Nothing in the file is secret to who has the machine's TPM not.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import fcntl
import json
import os
import shlex
import stat
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from encfs_js.backing import RENAME_NOREPLACE, Backing
from encfs_js.errors import TpmFileError

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION: Final = 1
SALT: Final = 16
NAME: Final = 34  # bytes of an object's name: algorithm, SHA-256
MAX_FILE: Final = 65536
_MAX_PRIVATE: Final = 1024  # bytes; 184 for a user seed. A TPM2B_PRIVATE takes more, this one never needs it

# TPMT_PUBLIC of a sealed key (TPM 2.0 Library, Part 2, 12.2.4), big endian: type KEYEDHASH, nameAlg SHA256,
# objectAttributes fixedTPM|fixedParent, authPolicy[32], scheme NULL, unique. Without userWithAuth the policy is the only way
# to the secret, and without noDA the TPM counts wrong passwords.
_PUBLIC: Final = struct.Struct(">HHIH32sHH32s")
_KIND: Final = (0x0008, 0x000B, 0x00000012, 32)
_SCHEME: Final = (0x0010, 32)

_LOCK_ATTEMPTS: Final = 100
_LOCK_PAUSE: Final = 0.1  # seconds: sealing takes less than a few, on a slow TPM
_SEED: Final = 18 << 3  # nkeys' prefix bytes: 'S' and 'U' in base32
_USER: Final = 20 << 3


@dataclass(frozen=True, slots=True)
class Sealed:
    """A sealed key. srk_name: None in a file that nats-server made; srk_salt: None without an srk_password."""

    private: bytes
    public: bytes
    srk_name: bytes | None = None
    srk_salt: bytes | None = None

    @property
    def policy(self) -> bytes:
        """The 32-byte digest of what has to be shown to the TPM."""
        digest: bytes = _PUBLIC.unpack(self.public)[4]
        return digest


def template(policy: bytes) -> bytes:
    """Return the public area to seal with: as in `_PUBLIC`, without a unique, which the TPM makes."""
    return _PUBLIC.pack(*_KIND, policy, _SCHEME[0], 0, b"")[:-32]


def user_seed(raw: bytes) -> bytes:
    """Return 32 random bytes as the text of an nkey's user seed: base32 of prefix[2] raw[32] crc16[2], 58 characters.

    The checksum is CRC-16/XMODEM, little endian (nkeys: "Encoding" in its README).
    """
    body = bytes([_SEED | _USER >> 5, (_USER & 31) << 3]) + raw
    return base64.b32encode(body + binascii.crc_hqx(body, 0).to_bytes(2, "little")).rstrip(b"=")


def encode(sealed: Sealed) -> bytes:
    """Return the file's content."""

    def twice(data: bytes) -> str:
        return base64.b64encode(base64.b64encode(data)).decode()

    document = {"version": VERSION, "private_key": twice(sealed.private), "public_key": twice(sealed.public)}
    if sealed.srk_name is not None:
        document["srk_name"] = sealed.srk_name.hex()
    if sealed.srk_salt is not None:
        document["srk_salt"] = base64.b64encode(sealed.srk_salt).decode()
    return json.dumps(document).encode() + b"\n"


def parse(content: bytes, path: str) -> Sealed:
    """Return what a file holds. Raises TpmFileError, which names it, for anything but a sealed key."""
    try:
        document = json.loads(content)
        if not isinstance(document, dict):
            raise damaged(path, "no JSON object")
        version = document.pop("version", None)
        if type(version) is not int or version != VERSION:
            raise damaged(path, "not of version 1")
        private, public = (_decode(_decode(document.pop(name))) for name in ("private_key", "public_key"))
        name, salt = document.pop("srk_name", None), document.pop("srk_salt", None)
        srk_name = None if name is None else bytes.fromhex(name)
        srk_salt = None if salt is None else _decode(salt)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged(path, "not as nats-server or encfs_js write it") from None
    # A name that is spelt wrong must not turn off what the right one says.
    if document:
        raise damaged(path, "a name in it is not known to this version")
    if len(public) != _PUBLIC.size or not 0 < len(private) <= _MAX_PRIVATE:
        raise damaged(path, "a part of it has a wrong size")
    fields: Any = _PUBLIC.unpack(public)
    if fields[:4] != _KIND or fields[5:7] != _SCHEME:
        raise damaged(path, "what it holds is no key that was sealed this way")
    if (srk_name is not None and len(srk_name) != NAME) or (srk_salt is not None and len(srk_salt) != SALT):
        raise damaged(path, "a part of it has a wrong size")
    if srk_salt is not None and srk_name is None:
        raise damaged(path, "srk_name is missing")
    return Sealed(private, public, srk_name, srk_salt)


def _decode(text: Any) -> bytes:
    return base64.b64decode(text, validate=True)


def damaged(path: str, why: str) -> TpmFileError:
    """Return the error for a file that is there and cannot be used."""
    return TpmFileError(
        f"{path}: the sealed key cannot be used: {why}",
        hint=f"Put {shlex.quote(path)} back from a backup, or open the store with another of its keys. Nothing was written: "
        "a new key would not open what the old one sealed.",
    )


def read(path: str, backing: Backing) -> bytes | None:
    """Return the file's content, None if there is no such file. Raises TpmFileError."""
    try:
        # O_NONBLOCK: opening must not wait when somebody put a pipe there.
        fd = backing.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(backing.fstat(fd).st_mode):
                raise damaged(path, "it is no regular file")
            content = bytearray()
            part = bytearray(MAX_FILE)
            while len(content) <= MAX_FILE and (got := backing.preadv(fd, [part], len(content))):
                content += part[:got]
        finally:
            backing.close(fd)
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise TpmFileError(
            f"{path}: the sealed key cannot be read: {problem.strerror}",
            hint="Check keys_file, and that the user of this command may read it. No new key was made.",
        ) from None
    if len(content) > MAX_FILE:
        raise damaged(path, f"longer than {MAX_FILE} bytes")
    return bytes(content)


def sync(path: str, backing: Backing) -> None:
    """Bring a file that was found to the disk: who made it may have died before that. Raises TpmFileError."""
    try:
        for name, flags in ((path, 0), (os.path.dirname(path) or ".", os.O_DIRECTORY)):
            fd = backing.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
            try:
                backing.fsync(fd)
            finally:
                backing.close(fd)
    except OSError as problem:
        raise TpmFileError(
            f"{path}: the sealed key is not safely on the disk: {problem.strerror}", hint="Repeat the command."
        ) from None


@contextlib.contextmanager
def held(path: str, backing: Backing) -> Iterator[int]:
    """Keep others from making this file for the block, which gets the descriptor of its directory. Raises TpmFileError."""
    directory = os.path.dirname(path) or "."
    try:
        fd = backing.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as problem:
        raise TpmFileError(
            f"{directory}: no sealed key can be made there: {problem.strerror}",
            hint=f"mkdir -p -m 700 {shlex.quote(directory)}, or name another keys_file.",
        ) from None
    try:
        for attempt in range(_LOCK_ATTEMPTS):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == _LOCK_ATTEMPTS - 1:
                    raise TpmFileError(
                        f"{path}: another process is making a sealed key in {directory}",
                        hint="Wait for it to end, and repeat the command.",
                    ) from None
                time.sleep(_LOCK_PAUSE)
        yield fd
    finally:
        backing.close(fd)


def publish(directory: int, path: str, content: bytes, backing: Backing) -> None:
    """Put a new file in place, mode 0600, never over one that is there. Raises TpmFileError; then there is no new file.

    directory: from `held`.
    """
    # What a crash or a power cut after each call leaves behind:
    #
    #     open, pwrite, fsync of FILE.tmp    no file, and a temporary that nobody reads and the next one overwrites
    #     rename to FILE                     the file, whole, or after a power cut none: nobody has used its key yet
    #     fsync of the directory             the file; from here on its key may be used
    name = os.fsencode(os.path.basename(path))
    temporary = name + b".tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = backing.open(temporary, flags, 0o600, dir_fd=directory)
        try:
            written = 0
            while written < len(content):
                written += backing.pwrite(fd, content[written:], written)
            backing.fsync(fd)
        finally:
            backing.close(fd)
        _rename(directory, temporary, name, backing)
        backing.fsync(directory)
    except OSError as problem:
        with contextlib.suppress(OSError):
            backing.unlink(temporary, dir_fd=directory)
        raise TpmFileError(
            f"{path}: the sealed key was not written: {problem.strerror}",
            hint="Make room, or set the permissions right, and repeat the command. If the file is there now, no store "
            "uses its key yet.",
        ) from None


def _rename(directory: int, old: bytes, new: bytes, backing: Backing) -> None:
    try:
        backing.renameat2(directory, old, directory, new, RENAME_NOREPLACE)
    except OSError as problem:
        if problem.errno not in {errno.EINVAL, errno.ENOSYS}:
            raise
        # A file system without it. Nobody of ours can have made the file meanwhile (`held`).
        backing.rename(old, new, src_dir_fd=directory, dst_dir_fd=directory)
