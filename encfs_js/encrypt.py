"""Sealing a whole store in place: one that a plain nats-server wrote, or one that nats-server has encrypted itself.

File by file: the sealed form is written beside it, brought to the disk, read back and compared, and only then put in the place
of the old content (redo.py). So there is at any time one complete copy on the disk, and what is done shows in the files
themselves: whoever repeats this does the rest.

Crash points. Each file: those of redo.py. A plain store has `plaintext: read` in its keyring from the start, and can be
mounted in any state between; at the end that becomes `refuse`. A store that nats-server has encrypted cannot: a mount would
show what is not sealed yet as it lies there. A mark (state.py) says so from before its keyring is written until everything is
sealed and the key files are removed, and mounting it is refused that long. The key files go last, when all that they are
the keys of is on the disk; which of them a crash leaves does not matter then.

The order within a store that nats-server has encrypted: every meta.sum before any meta.inf, which it is made from.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import stat
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from encfs_js import crash, redo, serverstore, steps
from encfs_js.backing import META
from encfs_js.errors import ConversionError, EncfsError, FormatError, StoreIoError, WrongKeyError
from encfs_js.format import MAGIC, PAGE, pages_for
from encfs_js.inspect import open_file, walk
from encfs_js.redo import PlainFile, open_target
from encfs_js.serverstore import Kind, place_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from encfs_js.backing import Backing
    from encfs_js.inspect import Entry
    from encfs_js.reencrypt import Progress
    from encfs_js.sealed import FileKeys
    from encfs_js.serverstore import Content

STAGED: Final = b"decrypted.tmp"  # what a decrypt that was killed has left in .encfs_js
DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAMED: Final = 5  # files that an error names


# --- a look before anything is changed --------------------------------------------------------------------------------


@dataclass(slots=True)
class Look:
    """What there is to do. files, size: to be sealed, and their plain bytes. room: bytes of disk that are needed meanwhile.

    sealed: files that are it already. key_files: nats-server's. leftovers: staged files that cannot be decrypted. links:
    symlinks, which are left alone. inodes: of all regular files.
    """

    files: int = 0
    size: int = 0
    room: int = 0
    sealed: int = 0
    key_files: int = 0
    leftovers: list[bytes] = field(default_factory=list)
    links: list[bytes] = field(default_factory=list)
    inodes: set[int] = field(default_factory=set)


def recover(io: Backing, store: str, mac_key: bytes) -> None:
    """Finish the file that a run which was killed was at; before anything is read, for its content may be half old, half new.

    mac_key: of redo files. Raises OSError, and ConversionError once for a redo file whose file is not there: it is kept.
    """
    top = io.open(store, DIRECTORY & ~os.O_NOFOLLOW)
    meta = io.open(META, DIRECTORY, dir_fd=top)
    try:
        before = set(io.listdir(meta))
        redo.recover(io, top, meta, mac_key)
        lost = sorted(name for name in set(io.listdir(meta)) - before if name.endswith(b".orphan"))
        with contextlib.suppress(FileNotFoundError):
            io.unlink(STAGED, dir_fd=meta)
    finally:
        io.close(meta)
        io.close(top)
    if lost:
        raise ConversionError(
            f"{store}: {META}/{os.fsdecode(lost[0])}: the rewriting of a file was interrupted, and cannot be finished: the "
            "file is gone, or this is damaged",
            hint="If a file of the store is missing or half written now, put it back from a backup. Then repeat the command.",
        )


def look(
    io: Backing,
    store: str,
    keys: Sequence[bytes] | None,
    *,
    crashed: tuple[FileKeys, Callable[[int], bool]] | None = None,
    plaintext: bool = True,
) -> Look:
    """Open every file that is to be sealed, and see whether all of it can be. Changes nothing but what the crash rule says.

    keys: those of nats-server's own encryption, None where files are taken as they lie there. crashed: ctime in ns -> whether
    the crash rule is for the file, and what it needs; plaintext: whether the store may hold some. Raises WrongKeyError when no
    key file opens, ConversionError that names what cannot be read or has names elsewhere, StoreIoError without room.
    """
    found, largest, growth, opened = Look(), 0, 0, 0
    problems: list[tuple[bytes, Exception]] = []
    linked: dict[int, Entry] = {}
    for entry in _everything(io, store):
        place = place_of(entry.path)
        if stat.S_ISLNK(entry.status.st_mode):
            found.links.append(entry.path)
            if keys is not None and (place.kind is not Kind.OTHER or _leads_to_directory(io, entry)):
                problems.append((entry.path, OSError(errno.ELOOP, "a symlink: what it leads to would stay encrypted")))
        if not stat.S_ISREG(entry.status.st_mode):
            continue
        found.inodes.add(entry.status.st_ino)
        if keys is not None and place.kind is Kind.KEY:
            found.key_files += 1
            continue
        try:
            if len(entry.path) > redo.LONGEST_PATH:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            if crashed is not None and crashed[1](entry.status.st_ctime_ns):
                _trim(io, entry, crashed[0], plaintext=plaintext)
            fd = open_file(io, entry)
            if fd is None:
                raise OSError(errno.EAGAIN, "somebody changes the store")
            try:
                start = begins(io, fd)
                if start == MAGIC:
                    found.sealed += 1
                if start in {b"", MAGIC}:
                    continue
                if entry.status.st_nlink > 1:
                    linked[entry.status.st_ino] = entry
                source = _source(io, entry, fd, keys)
                opened += isinstance(source, _Decrypted) and source.content.suite is not None
                sealed = pages_for(source.size) * PAGE
                largest = max(largest, sealed + PAGE)
                growth += max(sealed - io.fstat(fd).st_blocks * 512, 0)
                found.files, found.size = found.files + 1, found.size + source.size
                _let_go(source)
            finally:
                io.close(fd)
        except (FormatError, WrongKeyError, OSError) as problem:
            if place.staged and not isinstance(problem, OSError):
                found.leftovers.append(entry.path)
            else:
                problems.append((entry.path, problem))
    _judge(store, problems, some_open=opened > 0)
    _check_links(io, store, linked)
    found.room = largest + growth
    check_room(io, store, found.room)
    return found


def _trim(io: Backing, entry: Entry, file_keys: FileKeys, *, plaintext: bool) -> None:
    fd = open_target(io, entry.directory, entry.name)
    try:
        crash.trim(io, fd, file_keys, plaintext=plaintext)
    finally:
        io.close(fd)


def _leads_to_directory(io: Backing, entry: Entry) -> bool:
    try:
        return stat.S_ISDIR(io.stat(entry.name, dir_fd=entry.directory).st_mode)
    except OSError:
        return False


def _check_links(io: Backing, store: str, linked: dict[int, Entry]) -> None:
    """Raise ConversionError if a file has a name outside of the store, where its content would change as well."""
    if not linked:
        return
    names: Counter[int] = Counter()
    top = io.open(store, DIRECTORY & ~os.O_NOFOLLOW)
    try:
        names.update(ino for _, ino, _ in io.entries(top))
    finally:
        io.close(top)
    for entry in _everything(io, store):
        if stat.S_ISDIR(entry.status.st_mode):
            fd = io.open(entry.name, DIRECTORY, dir_fd=entry.directory)
            try:
                names.update(ino for _, ino, _ in io.entries(fd))
            finally:
                io.close(fd)
    for ino, entry in linked.items():
        if names[ino] != entry.status.st_nlink:
            raise ConversionError(
                f"{store}: {os.fsdecode(entry.path)} has {entry.status.st_nlink - names[ino]} more names (hard links) outside "
                "of the store, and would be sealed there as well",
                hint="A copy that was made with cp -al or rsync --link-dest shares its files. Remove it, or seal a real copy "
                f"(cp -a {shlex.quote(store)} NEW).",
            )


def _judge(store: str, problems: list[tuple[bytes, Exception]], *, some_open: bool) -> None:
    if not problems:
        return
    wrong = [problem for _, problem in problems if isinstance(problem, WrongKeyError)]
    if wrong and not some_open:
        raise WrongKeyError(
            f"{store}: the key opens none of nats-server's key files",
            hint="Give the `key` that nats-server has in its configuration, and the `prev_key` if it was changed.",
        )
    for _, problem in problems:
        if isinstance(problem, EncfsError) and not isinstance(problem, FormatError | WrongKeyError):
            raise problem
    lines = [_reason(path, problem) for path, problem in problems[:_NAMED]]
    more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    count = f"{len(problems)} file{'s' * (len(problems) > 1)}"
    raise ConversionError(
        f"{store}: {count} cannot be read, so nothing was changed: {'; '.join(lines)}{more}",
        hint="Put them back from a backup, or take them away, and repeat the command.",
    )


def _reason(path: bytes, problem: Exception) -> str:
    return f"{os.fsdecode(path)}: {problem.strerror}" if isinstance(problem, OSError) else str(problem)


def check_room(io: Backing, store: str, need: int) -> None:
    """Raise StoreIoError if the disk has fewer than `need` bytes free."""
    fd = io.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        disk = io.statvfs(fd)
    finally:
        io.close(fd)
    free = disk.f_bavail * disk.f_frsize
    if free < need:
        raise StoreIoError(
            f"{store}: {need} bytes of free disk space are needed meanwhile, and there are {free}",
            hint="Make room: every file is written anew beside the old one before it takes its place.",
        )


# --- the files --------------------------------------------------------------------------------------------------------


class _Decrypted:
    """A file that nats-server has encrypted, as something to be sealed: `fd` can be written."""

    __slots__ = ("content", "fd", "read", "size")

    def __init__(self, fd: int, content: Content) -> None:
        self.fd = fd
        self.content = content
        self.size = content.size
        self.read = content.read


def _source(io: Backing, entry: Entry, fd: int, keys: Sequence[bytes] | None) -> PlainFile | _Decrypted:
    if keys is None:
        return PlainFile(io, fd)
    return _Decrypted(fd, serverstore.open_content(io, entry.directory, entry.name, entry.path, keys))


def _let_go(source: PlainFile | _Decrypted) -> None:
    if isinstance(source, _Decrypted):
        source.content.close()


def begins(io: Backing, fd: int) -> bytes:
    """Return the first eight bytes of an open file."""
    start = bytearray(len(MAGIC))
    return bytes(start[: io.preadv(fd, [start], 0)])


def entries(io: Backing, store: str) -> Iterator[Entry]:
    """Yield every regular file of a store. Raises OSError for what cannot be looked at."""
    return (entry for entry in _everything(io, store) if stat.S_ISREG(entry.status.st_mode))


def _everything(io: Backing, store: str) -> Iterator[Entry]:
    def failed(path: bytes, problem: OSError) -> None:
        raise OSError(problem.errno, problem.strerror, os.path.join(store, os.fsdecode(path)))

    return walk(io, store, failed)


@contextlib.contextmanager
def naming(store: str, entry: Entry) -> Iterator[None]:
    """Have an OSError name the file by its whole path: calls on an open directory know its last part only."""
    try:
        yield
    except OSError as problem:
        problem.filename = os.path.join(store, os.fsdecode(entry.path))
        raise


def seal_all(
    io: Backing,
    store: str,
    keys: Sequence[bytes] | None,
    file_keys: FileKeys,
    mac_key: bytes,
    progress: Progress,
    between: Callable[[], None],
) -> None:
    """Seal every file that is not sealed yet, but for nats-server's key files and the leftovers; then sync.

    mac_key: of redo files. between: is called after every file; what it raises ends this, and no file is half done then.
    Raises OSError, FormatError and WrongKeyError: the file at hand is as it was, or its redo file counts.
    """
    top = io.open(store, DIRECTORY & ~os.O_NOFOLLOW)
    meta = io.open(META, DIRECTORY, dir_fd=top)
    try:
        for sums in (True, False) if keys is not None else (None,):
            for entry in entries(io, store):
                place = place_of(entry.path)
                if keys is not None and (place.kind is Kind.KEY or (place.kind is Kind.SUM) is not sums):
                    continue
                try:
                    with naming(store, entry):
                        size = _seal(io, meta, mac_key, entry, keys, file_keys)
                except (FormatError, WrongKeyError):
                    if not place.staged:
                        raise
                    continue
                if size is not None:
                    progress.files_done += 1
                    progress.bytes_done += size
                between()
        io.syncfs(top)
    finally:
        io.close(meta)
        io.close(top)


def _seal(
    io: Backing, meta: int, mac_key: bytes, entry: Entry, keys: Sequence[bytes] | None, file_keys: FileKeys
) -> int | None:
    """Seal one file. Returns its plain bytes, None when there is nothing to do."""
    fd = open_target(io, entry.directory, entry.name)
    try:
        if begins(io, fd) in {b"", MAGIC}:
            return None
        source = _source(io, entry, fd, keys)
        try:
            mtime = io.fstat(fd).st_mtime_ns
            staged = steps.run(redo.stage(io, meta, mac_key, source, entry.path, file_keys, mtime_ns=mtime))
            if not redo.holds(io, staged, source, file_keys):
                redo.discard(io, meta, staged)
                raise OSError(errno.EIO, "what was written is not what was read", entry.path)
            steps.run(redo.put(io, meta, staged, fd))
            return source.size
        finally:
            _let_go(source)
    finally:
        io.close(fd)


def remove_keys(io: Backing, store: str) -> tuple[int, list[bytes]]:
    """Remove nats-server's key files and the leftovers that cannot be decrypted, durably, when everything else is on the disk.

    Returns how many key files, and the paths of the leftovers. Raises ConversionError when something is not sealed.
    """
    left: list[bytes] = []
    top = io.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for entry in entries(io, store):
            fd = open_file(io, entry)
            if fd is None:
                continue
            try:
                start, place = begins(io, fd), place_of(entry.path)
            finally:
                io.close(fd)
            if place.kind is Kind.KEY or start in {b"", MAGIC}:
                continue
            if not place.staged:
                raise ConversionError(f"{os.fsdecode(entry.path)} is not sealed", hint="Repeat the command.")
            left.append(entry.path)
        gone = 0
        for entry in entries(io, store):
            if place_of(entry.path).kind is Kind.KEY or entry.path in left:
                gone += entry.path not in left
                with naming(store, entry):
                    io.unlink(entry.name, dir_fd=entry.directory)
        io.syncfs(top)
    finally:
        io.close(top)
    return gone, left
