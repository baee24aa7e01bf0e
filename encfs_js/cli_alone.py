"""What encrypt and decrypt share: having a store to oneself, telling what went wrong, and the last look at the records."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from encfs_js import redo
from encfs_js import state as room
from encfs_js.backing import META, Backing, give_to_owner
from encfs_js.cli_text import plural, shown
from encfs_js.encrypt import begins
from encfs_js.errors import DamageFoundError, StoreBusyError, StoreIoError, StoreUnsuitableError
from encfs_js.format import MAGIC, DamagedPageError
from encfs_js.keydocument import COPY, NAME
from encfs_js.sealed import RUN_BYTES, FileKeys, SealedFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from encfs_js.inspect import Entry
    from encfs_js.recordcheck import Records


def is_store(store: str) -> bool:
    """Tell whether a directory has a keyring."""
    return any(os.path.lexists(os.path.join(store, META, name)) for name in (NAME, COPY))


@contextlib.contextmanager
def alone(store: str) -> Iterator[None]:
    """Have the store to oneself; a directory .encfs_js that is made for that goes again when no keyring came into it.

    Whose the store is, his is what is made. Raises StoreBusyError, StoreUnsuitableError, OSError.
    """
    meta = os.path.join(store, META)
    with contextlib.ExitStack() as held:
        top = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        held.callback(os.close, top)
        try:
            fcntl.flock(top, fcntl.LOCK_EX | fcntl.LOCK_NB)  # what init takes
        except BlockingIOError:
            raise StoreBusyError(
                f"{store}: another command is making it a store", hint="Wait for it to end, and repeat the command."
            ) from None
        try:
            os.mkdir(META, 0o700, dir_fd=top)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(META, dir_fd=top, follow_symlinks=False).st_mode):
                raise StoreUnsuitableError(
                    f"{meta} is not a directory", hint="What is in there belongs to the store: put it there itself."
                ) from None
        else:
            made = os.open(META, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
            held.callback(os.close, made)
            give_to_owner(made, top)
        lock = room.lock(store, "", datetime.now(UTC).isoformat(timespec="seconds"))
        try:
            yield
        finally:
            if os.path.isdir(meta) and set(os.listdir(meta)) <= {"lock"}:
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(meta, "lock"))
                    os.rmdir(meta)
            os.close(lock)


@contextlib.contextmanager
def told(store: str) -> Iterator[None]:
    """Say what the operating system refused, and that the command can be repeated."""
    try:
        yield
    except MemoryError:
        raise StoreIoError(
            f"{store}: there is not enough memory for one of its files",
            hint="Nothing is lost. Repeat it with more memory.",
        ) from None
    except OSError as problem:
        if isinstance(problem, redo.UnfinishedError) and isinstance(problem.__cause__, OSError):
            problem.strerror = problem.__cause__.strerror
        where = os.fsdecode(problem.filename) if problem.filename is not None else store
        raise StoreIoError(
            f"{where}: {problem.strerror or problem}",
            hint="What is done stays done. When the cause is gone (a full or failing disk, permissions), repeat the command.",
        ) from None
    except KeyboardInterrupt:
        print("encfs-js: interrupted; what is done stays done, and the same command does the rest", file=sys.stderr)
        raise


def content(io: Backing, entry: Entry, file_keys: FileKeys) -> bytes:
    """Return the plain content of a file of the store, sealed or not. Raises OSError, DamagedPageError."""
    fd = io.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=entry.directory)
    try:
        file = SealedFile(io, fd, file_keys) if begins(io, fd) == MAGIC else redo.PlainFile(io, fd)
        return b"".join(bytes(file.read(at, RUN_BYTES)) for at in range(0, file.size, RUN_BYTES))
    except DamagedPageError as problem:
        raise DamageFoundError(
            f"{os.fsdecode(entry.path)} page {problem.page} does not authenticate",
            hint="Put the file back from a backup, and repeat the command.",
        ) from None
    finally:
        io.close(fd)


def print_records(found: Records) -> None:
    """Say what the last look found."""
    blocks, streams = plural(found.blocks, "block"), plural(found.streams, "stream or raft log", "streams or raft logs")
    print(f"Checked: {plural(found.records, 'record')} in {blocks} of {streams}")
    for line in found.damaged:
        print(f"Damaged, as it was before: {shown(line)}")
