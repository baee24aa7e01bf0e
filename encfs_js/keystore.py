"""The files of the keyring: read, replace and change `.encfs_js/keyring` and its copy (FORMAT.md section 3)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import stat
import time
from typing import TYPE_CHECKING, Final

from encfs_js import keyring as room
from encfs_js.backing import META, Backing, sync_directory
from encfs_js.errors import KeyringDamagedError, NotAStoreError, StoreBusyError, StoreIoError, VersionError
from encfs_js.keydocument import COPY, MAX_DOCUMENT, NAME, Keyring, damaged, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from encfs_js.keyring import Keys

STAGED: Final = "keyring.tmp"
LOCK: Final = "keyring.lock"
PATIENCE: Final = 10.0  # seconds that other changes of the keyring may take, each with one run of Argon2id in it
_PAUSE: Final = 0.01


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
        return keyring, room.unlock(keyring, key), warning
    except KeyringDamagedError as damage:
        path, spare = _paths(store)
        copy = _read(spare, backing)
        if not isinstance(copy, Keyring) or copy == keyring:
            raise
        return copy, room.unlock(copy, key), _read_instead(path, spare, f"cannot be used ({damage})")


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


def export(path: str, document: bytes) -> None:
    """Write a keyring's document to a new file of its own, mode 0600, and bring it to the disk. Raises StoreIoError.

    A crash leaves no file, part of one, which `load_export` refuses, or the whole.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(document)
            os.fsync(fd)
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
        sync_directory(os.path.dirname(os.path.abspath(path)))
    except FileExistsError:
        raise StoreIoError(f"{path} exists, and is not written over", hint="Name a new file.") from None
    except OSError as problem:
        raise StoreIoError(
            f"{path}: the keyring was not exported: {problem.strerror}", hint="Name a file where there is room."
        ) from None


def load_export(path: str) -> Keyring:
    """Read a keyring that was exported. Raises KeyringDamagedError, VersionError, StoreIoError."""
    found = _read(path, Backing())
    if isinstance(found, Keyring):
        return found
    if found is None:
        raise StoreIoError(f"{path}: {os.strerror(errno.ENOENT)}", hint="Name a file that `encfs-js key export` made.")
    hint = found.hint if isinstance(found, VersionError) else "Name a file that `encfs-js key export` made."
    raise type(found)(f"{path}: {found}", hint=hint)


def update(
    store: str,
    change: Callable[[Keyring], bytes | None],
    *,
    backing: Backing | None = None,
    patience: float = PATIENCE,
) -> Keyring:
    """Read the keyring, have `change` make another document of it, and write that. Returns the keyring as it is then.

    Nobody else changes it meanwhile; whether the store is mounted makes no difference. change: None for no change. patience:
    the seconds that another change may take. Raises what `load`, `change` and `write` raise, KeyringDamagedError also when only
    the copy can be read, and StoreBusyError when another change goes on and on.
    """
    backing = backing or Backing()
    load(store, backing=backing)  # what is no store gets no lock
    with _locked(store, backing, patience):
        path, _ = _paths(store)
        found = _read(path, backing)
        if not isinstance(found, Keyring):
            # The copy may be from before the last change, whose keys are nowhere but in the bad file.
            _, warning = load(store, backing=backing)
            raise KeyringDamagedError(f"{path} cannot be read, so it was not changed", hint=warning)
        document = change(found)
        if document is None:
            return found
        write(store, document, backing=backing)
        return parse(document)


@contextlib.contextmanager
def _locked(store: str, backing: Backing, patience: float) -> Iterator[None]:
    """Hold the lock of the keyring's changes; a crash gives it up. Its file stays, and means nothing."""
    path = os.path.join(store, META, LOCK)
    try:
        fd = backing.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as problem:
        raise StoreIoError(
            f"{path}: {problem.strerror}", hint="Run the command as the user that owns the store. Nothing was written."
        ) from None
    try:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise StoreBusyError(
                        f"{path}: another command is changing the keyring",
                        hint=f"Repeat the command. Who that is: fuser -v {shlex.quote(path)}",
                    ) from None
                time.sleep(_PAUSE)
            else:
                break
        owner = backing.stat(os.path.join(store, META))
        if os.geteuid() == 0 != owner.st_uid:
            backing.chown(fd, owner.st_uid, owner.st_gid)
        yield
    finally:
        backing.close(fd)


def write(store: str, document: bytes, *, backing: Backing | None = None) -> None:
    """Replace a store's keyring, then its copy. Makes `.encfs_js` (mode 0700) when it is not there.

    Each of the two is replaced atomically, the copy only when the keyring is safely on the disk. Raises StoreIoError;
    the keyring is the old or the new one then, never half of one. It belongs to whom `.encfs_js` belongs to.
    """
    # What a crash or a power cut after each call leaves behind:
    #
    #     mkdir .encfs_js, fsync of the store    an empty directory: no store yet (`load` raises NotAStoreError)
    #     unlink keyring.tmp                     as before; what an earlier crash staged is gone, or back again
    #     open .. fsync of keyring.tmp           as before, and a staged file that nobody reads
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
            owner = backing.fstat(directory)
            if os.geteuid() == 0 != owner.st_uid:
                backing.chown(fd, owner.st_uid, owner.st_gid)
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
