"""Everything that can go wrong, each with its exit code and the next command to type.

Exit codes are a contract: one meaning each, never reused, listed in the README (a test compares the two).
Codes 0 (success), 1 (a bug: please report it) and 2 (usage) are the usual ones.
"""

from __future__ import annotations

import errno
import os
from typing import ClassVar


class EncfsError(Exception):
    """An error that a person can act on: one line that names the thing, and a hint with the next command.

    Never carries key material. `exit_code` is the process exit status that the command line gives it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def as_json(self) -> dict[str, str | int]:
        """Return what another process needs to report it, or to raise it again."""
        return {"error": type(self).__name__, "message": str(self), "hint": self.hint, "code": self.exit_code}


class ConfigError(EncfsError):
    """The configuration file or an option in it cannot be used."""

    exit_code = 10


class KeyMissingError(EncfsError):
    """No key source gave a key, or the one that was named is empty or unreadable."""

    exit_code = 11


class WrongKeyError(EncfsError):
    """The key opens no slot of the keyring. Nothing was written."""

    exit_code = 12


class KeyringDamagedError(EncfsError):
    """Neither the keyring nor its copy can be read or authenticated."""

    exit_code = 13


class NotAStoreError(EncfsError):
    """The directory holds no encfs_js keyring (or does not exist)."""

    exit_code = 14


class StoreNotEmptyError(EncfsError):
    """`init` found something in the directory and was not told to keep it as existing plaintext."""

    exit_code = 15


class StoreExistsError(EncfsError):
    """`init` found a keyring: the directory is a store already."""

    exit_code = 16


class StoreUnsuitableError(EncfsError):
    """The file system below the store cannot carry one (overlayfs, more than one device)."""

    exit_code = 17


class StoreBusyError(EncfsError):
    """Another process has the store mounted or is working on it."""

    exit_code = 18


class MountpointError(EncfsError):
    """The mountpoint does not exist, is not an empty directory, or overlaps the store."""

    exit_code = 19


class MountFailedError(EncfsError):
    """The kernel or fusermount3 refused the mount, or the daemon died while mounting."""

    exit_code = 20


class NotMountedError(EncfsError):
    """Nothing of ours is mounted there."""

    exit_code = 21


class DamageFoundError(EncfsError):
    """`verify` found damage: pages that do not authenticate, records that do not match."""

    exit_code = 22


class MountBusyError(EncfsError):
    """The mount has open files and was not unmounted."""

    exit_code = 23


class VersionError(EncfsError):
    """The store was written by a later version of encfs_js, in a format this one does not know."""

    exit_code = 24


class StoreIoError(EncfsError):
    """The operating system refused an operation on the store (permission, no space, I/O error)."""

    exit_code = 25


class GuardClosedError(EncfsError):
    """`guard status` found a closed guard: a stream is protected from deletion because of damage."""

    exit_code = 26


class WorkersFailedError(EncfsError):
    """The workers of a mount died again and again. The mount is left dead until it is unmounted."""

    exit_code = 27


class ReloadFailedError(EncfsError):
    """The new worker could not take over, or nobody could be asked. The mount goes on as it was."""

    exit_code = 28


class TpmMissingError(EncfsError):
    """No TPM can be used: there is none, it does not answer, or tpm2-pytss is not installed."""

    exit_code = 29


class TpmPasswordError(EncfsError):
    """The TPM refused the encryption password of the sealed key."""

    exit_code = 30


class TpmLockedError(EncfsError):
    """The TPM is in lockout after too many wrong passwords, and refuses the right one, too."""

    exit_code = 31


class TpmPcrError(EncfsError):
    """The PCR has another value than when the key was sealed, or another PCR is named."""

    exit_code = 32


class TpmParentError(EncfsError):
    """The key was sealed under another storage root key: another srk_password, or another TPM."""

    exit_code = 33


class TpmFileError(EncfsError):
    """The file with the sealed key is missing, damaged or unreadable."""

    exit_code = 34


class TpmOwnerError(EncfsError):
    """The TPM's owner hierarchy has a password: no storage root key can be made."""

    exit_code = 35


class SlotError(EncfsError):
    """The keyring has no such slot, it is the last one, or the key has a slot already."""

    exit_code = 36


class CipherMissingError(EncfsError):
    """The OpenSSL of this host refuses the cipher, or Argon2id (FIPS)."""

    exit_code = 37


class ReencryptError(EncfsError):
    """Re-encryption has not finished: files are left that could not be rewritten, or it was stopped."""

    exit_code = 38


class ConversionError(EncfsError):
    """A conversion was not begun or has not finished: something cannot be carried over, or came out unequal."""

    exit_code = 39


class NatsServerError(EncfsError):
    """No nats-server that can be compared with: there is none, or it is too old."""

    exit_code = 40


class CompareError(EncfsError):
    """A comparison is not complete: a mode could not run or failed. The report, where there is one, says which."""

    exit_code = 41


class FormatError(EncfsError):
    """Bytes that are no sealed file of this format version. Opaque on purpose, like IntegrityError."""

    exit_code = 22


class IntegrityError(OSError):
    """A page of a sealed file does not authenticate. Says where, never why.

    An OSError with errno EIO, so that code which only passes errors on does the right thing.

    path: the file's path relative to the store (bytes); page: its index from 0.
    """

    def __init__(self, path: bytes, page: int) -> None:
        super().__init__(errno.EIO, os.strerror(errno.EIO), os.fsdecode(path))
        self.path = path
        self.page = page

    def __str__(self) -> str:
        """Name file and page."""
        return f"{os.fsdecode(self.path)!r} page {self.page}: does not authenticate"
