"""Turning a whole store back into a plain one, in place, and taking its keyring away at the end.

Everything is authenticated before anything is changed. Then, file by file: the plain content is written to a file of its own
in `.encfs_js`, brought to the disk, read back and compared, and renamed over the sealed one.

Crash points. Until that rename the sealed file is untouched, and what was written is removed by the next run; after it the
plain file is there, whole, because it was synced before. The keyring has `plaintext: read` from before the first rename, so
the store can be mounted, and this be repeated, in any state between. When every file is plain and on the disk `.encfs_js` is
emptied, the keyring after all that it could be needed for, and the lock behind it, so that nobody opens the store with that
keyring any more. What is left of it a repeated run removes.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from encfs_js import crash
from encfs_js.backing import META
from encfs_js.encrypt import DIRECTORY, STAGED, begins, check_room, entries, naming
from encfs_js.errors import ConversionError, DamageFoundError
from encfs_js.format import MAGIC, PAGE, DamagedPageError
from encfs_js.keydocument import COPY, NAME
from encfs_js.redo import open_target
from encfs_js.sealed import RUN_BYTES, SealedFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from encfs_js.backing import Backing
    from encfs_js.inspect import Entry
    from encfs_js.reencrypt import Progress
    from encfs_js.sealed import FileKeys

_NAMED: Final = 5
_LAST: Final = (COPY.encode(), NAME.encode(), b"lock")  # of what lies in .encfs_js
_XATTRS_LACK: Final = frozenset({errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.ENODATA})


@dataclass(slots=True)
class Look:
    """What there is to do: files, and the size of their plain content in bytes.

    plain: files with content that is not sealed. inodes: of all regular files.
    """

    files: int = 0
    size: int = 0
    plain: int = 0
    inodes: set[int] = field(default_factory=set)


def look(
    io: Backing, store: str, file_keys: FileKeys, touched: Callable[[int], bool], *, plaintext: bool = True
) -> Look:
    """Authenticate every file, after the crash rule was applied to those that it is for. Changes nothing else.

    touched: ctime in ns -> whether the crash rule applies. plaintext: whether the store may hold some. Raises
    DamageFoundError, ConversionError (a file that has several names, or whose content would look sealed), StoreIoError without
    room, OSError.
    """
    found, largest = Look(), 0
    damaged: list[str] = []
    for entry in entries(io, store):
        found.inodes.add(entry.status.st_ino)
        with naming(store, entry):
            fd = open_target(io, entry.directory, entry.name)
        try:
            if touched(entry.status.st_ctime_ns):
                crash.trim(io, fd, file_keys, plaintext=plaintext)
            start = begins(io, fd)
            if start != MAGIC:
                found.plain += bool(start)
                continue
            if entry.status.st_nlink > 1:
                raise ConversionError(
                    f"{os.fsdecode(entry.path)} has {entry.status.st_nlink} names (hard links), which would part",
                    hint="Remove the other names; nats-server makes none.",
                )
            file = SealedFile(io, fd, file_keys)
            try:
                for i, run in enumerate(_runs(file)):
                    if i == 0 and bytes(run[: len(MAGIC)]) == MAGIC:
                        raise ConversionError(
                            f"{os.fsdecode(entry.path)}: its plain content begins as a sealed file does",
                            hint="A store with such a file cannot be a plain one; convert it to another directory.",
                        )
            except DamagedPageError as problem:
                damaged.append(f"{os.fsdecode(entry.path)} page {problem.page}")
            found.files, found.size = found.files + 1, found.size + file.size
            largest = max(largest, file.size + PAGE)
        finally:
            io.close(fd)
    if damaged:
        more = f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
        raise DamageFoundError(
            f"{store}: damaged files: {len(damaged)}, so nothing was changed: {', '.join(damaged[:_NAMED])}{more}",
            hint=f"Put them back from a backup, or take them away. encfs-js verify {shlex.quote(store)} names every page.",
        )
    check_room(io, store, largest)
    return found


def _runs(file: SealedFile) -> Iterator[memoryview]:
    """Yield the plain content, all of it authenticated, in runs that are valid until the next. Raises DamagedPageError."""
    if file.damage is not None:
        raise DamagedPageError(file.damage)
    for at in range(0, file.size, RUN_BYTES):
        yield file.read(at, min(RUN_BYTES, file.size - at))


def open_all(io: Backing, store: str, file_keys: FileKeys, progress: Progress, between: Callable[[], None]) -> None:
    """Make every sealed file a plain one. The store's keyring must allow plaintext already.

    between: is called after every file; what it raises ends this. Raises OSError and DamageFoundError; the file at hand is as it
    was, or plain.
    """
    meta = io.open(os.path.join(store, META), DIRECTORY)
    try:
        for entry in entries(io, store):
            with naming(store, entry):
                size = _open(io, store, meta, entry, file_keys)
            if size is not None:
                progress.files_done += 1
                progress.bytes_done += size
                between()
    finally:
        io.close(meta)


def _open(io: Backing, store: str, meta: int, entry: Entry, file_keys: FileKeys) -> int | None:
    """Make one file a plain one. Returns its plain bytes, None if it is plain."""
    fd = open_target(io, entry.directory, entry.name)
    try:
        if begins(io, fd) != MAGIC:
            return None
        file = SealedFile(io, fd, file_keys)
        _replace(io, meta, entry, file)
        return file.size
    except DamagedPageError as problem:
        raise DamageFoundError(
            f"{store}: {os.fsdecode(entry.path)} page {problem.page} is damaged",
            hint=f"Put the file back from a backup, and repeat the command. encfs-js verify {shlex.quote(store)}",
        ) from None
    finally:
        io.close(fd)


def _replace(io: Backing, meta: int, entry: Entry, file: SealedFile) -> None:
    with suppress(FileNotFoundError):
        io.unlink(STAGED, dir_fd=meta)
    plain = io.open(STAGED, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=meta)
    try:
        at = 0
        for run in _runs(file):
            done = 0
            while done < len(run):
                done += io.pwrite(plain, run[done:], at + done)
            at += done
        _dress(io, file.fd, plain)
        io.fsync(plain)
        io.fadvise(plain, 0, 0, os.POSIX_FADV_DONTNEED)
        at = 0
        for run in _runs(file):
            back = bytearray(len(run))
            if io.preadv(plain, [back], at) != len(run) or back != run:
                raise OSError(errno.EIO, "what was written is not what was read", entry.path)
            at += len(run)
        if at != file.size:
            raise OSError(errno.EIO, "what was written is not what was read", entry.path)
    except BaseException:
        with suppress(OSError):  # it is in the clear, and the disk may be full
            io.unlink(STAGED, dir_fd=meta)
        raise
    finally:
        io.close(plain)
    io.rename(STAGED, entry.name, src_dir_fd=meta, dst_dir_fd=entry.directory)
    io.fsync(entry.directory)


def _dress(io: Backing, sealed: int, plain: int) -> None:
    """Give the new file owner, mode, attributes and times of the old one; the owner first, as chown clears set-id bits."""
    found = io.fstat(sealed)
    mine: Any = io.fstat(plain)
    if (found.st_uid, found.st_gid) != (mine.st_uid, mine.st_gid):
        io.chown(plain, found.st_uid, found.st_gid)
    io.chmod(plain, stat.S_IMODE(found.st_mode))
    try:
        for name in io.listxattr(sealed):
            io.setxattr(plain, name, io.getxattr(sealed, name))
    except OSError as problem:
        if problem.errno not in _XATTRS_LACK:
            raise
    io.utime(plain, ns=(found.st_atime_ns, found.st_mtime_ns))


def forget(io: Backing, store: str) -> None:
    """Bring everything to the disk, and remove `.encfs_js`. Raises ConversionError if anything is sealed still."""
    top = io.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        io.syncfs(top)
        for entry in entries(io, store):
            fd = io.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=entry.directory)
            try:
                if begins(io, fd) == MAGIC:
                    raise ConversionError(f"{os.fsdecode(entry.path)} is still sealed", hint="Repeat the command.")
            finally:
                io.close(fd)
        meta = io.open(META, DIRECTORY, dir_fd=top)
        try:
            names = [name for name in io.listdir(meta) if name not in _LAST]
            for name in sorted(names):
                io.unlink(name, dir_fd=meta)
            for name in _LAST:
                if name == NAME.encode():
                    io.fsync(meta)  # everything else is gone before the last copy of the keyring goes
                with suppress(FileNotFoundError):
                    io.unlink(name, dir_fd=meta)
        finally:
            io.close(meta)
        io.rmdir(META, dir_fd=top)
        io.fsync(top)
    finally:
        io.close(top)


def unfinished(io: Backing, store: str) -> list[str]:
    """Return the names of redo files that belong to no file: content that would be lost with `.encfs_js`."""
    meta = io.open(os.path.join(store, META), DIRECTORY)
    try:
        return sorted(os.fsdecode(name) for name in io.listdir(meta) if name.startswith(b"redo-"))
    finally:
        io.close(meta)
