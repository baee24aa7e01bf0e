"""Replace a file's whole content without changing its inode, so that a crash leaves the old or the new one (FORMAT.md 4.4).

rename(2) would do it with less writing, but gives the name another inode: hard links would part, open descriptors and the
kernel's node ids would mean the old file, and the old plaintext would stay readable on the disk.

Crash points. Until the rename of the redo file the target is untouched and the `.tmp` is removed at the next start. After
it the new content counts, and copying it over the target can be repeated any number of times. After the target's fsync the
redo file is of no use, and copying once more changes nothing.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from encfs_js import steps
from encfs_js.backing import FALLOC_FL_KEEP_SIZE
from encfs_js.format import HEADER, NONCE, PAGE, DamagedPageError, capacity, pages_for, plain_start
from encfs_js.sealed import RUN_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from encfs_js.backing import Backing
    from encfs_js.sealed import FileKeys
    from encfs_js.steps import Steps

MAGIC: Final = b"ENCFSJSR"
INFO: Final = b"encfs_js redo mac v1"
_HEAD: Final = struct.Struct("<8sQQH")
_MTIME: Final = struct.Struct("<q")
_MAC_AT: Final = PAGE - 32
_MTIME_AT: Final = _MAC_AT - _MTIME.size
LONGEST_PATH: Final = 4000
_RUN: Final = 1 << 20


class UnfinishedError(OSError):
    """The new content counts, but it could not be put in place completely: the next start does it (errno EIO).

    Until then the file must not change, for the redo file would undo that.
    """


class Source(Protocol):
    """What can be sealed: a file that is open for reading and writing, and its plain bytes."""

    @property
    def fd(self) -> int:
        """The file."""

    @property
    def size(self) -> int:
        """Plain bytes."""

    def read(self, offset: int, size: int) -> bytes | memoryview:
        """Return up to `size` plain bytes from `offset`, fewer only at the end. Raises OSError, DamagedPageError."""


class PlainFile:
    """A file that is not sealed yet, with the reading half of SealedFile's interface."""

    __slots__ = ("_io", "damage", "fd", "size")

    def __init__(self, io: Backing, fd: int) -> None:
        self._io = io
        self.fd = fd
        self.damage = None
        self.size = io.fstat(fd).st_size

    def read(self, offset: int, size: int, flags: int = 0) -> memoryview:
        """Return up to `size` bytes from `offset`; with os.RWF_NOWAIT raises BlockingIOError when they are not in memory."""
        end = min(offset + size, self.size)
        data = bytearray(max(end - offset, 0))
        got = self._io.preadv(self.fd, [data], offset, flags) if data else 0
        if got < len(data) and flags:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return memoryview(data)[:got]

    def sync(self, datasync: bool) -> None:
        """Bring the file to the disk."""
        (self._io.fdatasync if datasync else self._io.fsync)(self.fd)


def sealed_runs(source: Source, keys: FileKeys) -> Iterator[memoryview]:
    """Yield the pages of `source` sealed under a fresh file id, in runs of up to 1 MiB that are valid until the next."""
    cipher = keys.fresh()
    total = pages_for(source.size)
    per_run = RUN_BYTES // PAGE
    for first in range(0, total, per_run):
        count = min(per_run, total - first)
        start = plain_start(first)
        # A copy: the buffer that it was opened in is the one that it is sealed in.
        run = memoryview(bytes(source.read(start, min(source.size, plain_start(first + count)) - start)))
        plains: list[memoryview | bytes] = []
        length = 0
        for page in range(first, first + count):
            plain = run[plain_start(page) - start : plain_start(page + 1) - start]
            length = len(plain)
            full = length == capacity(page)
            plains.append(plain if full else bytes(plain) + bytes(capacity(page) - length))
        cipher.seal_run(keys.buffer, first, plains, length, keys.random(NONCE * count))
        yield keys.buffer.sealed[: count * PAGE]


@dataclass(frozen=True, slots=True)
class Staged:
    """A redo file that is complete and on the disk, and does not count yet. fd: open; pages: of the new content."""

    fd: int
    name: bytes
    pages: int
    mtime_ns: int


def seal_in_place(io: Backing, meta_fd: int, mac_key: bytes, source: Source, path: bytes, keys: FileKeys) -> None:
    """Replace the content of the open file `source` by its sealed form under a fresh id. `path`: its path in the store.

    Raises DamagedPageError and OSError before anything of the target was touched (ENOSPC), and UnfinishedError after.
    """
    staged = steps.run(stage(io, meta_fd, mac_key, source, path, keys))
    steps.run(put(io, meta_fd, staged, source.fd))


def stage(
    io: Backing,
    meta_fd: int,
    mac_key: bytes,
    source: Source,
    path: bytes,
    keys: FileKeys,
    *,
    mtime_ns: int = 0,
    tally: Callable[[int], None] = lambda _size: None,
) -> Steps[Staged]:
    """Write the sealed form of `source` to a redo file that does not count yet. The target is not touched.

    mtime_ns: the one that the file is to have then, 0 for the time of the replacement. tally: gets the size of every part.
    Raises DamagedPageError and OSError, and then leaves nothing behind; nor does closing the generator.
    """
    if len(path) > LONGEST_PATH:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    ino = io.fstat(source.fd).st_ino
    name = b"redo-%016x" % ino
    temporary = name + b".tmp"
    pages = pages_for(source.size)
    try:
        if pages:
            io.fallocate(source.fd, FALLOC_FL_KEEP_SIZE, 0, pages * PAGE)
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise
    # A file of its own: one that is given up in favour of another rewriting of the same target must not write into that one.
    with suppress(FileNotFoundError):
        io.unlink(temporary, dir_fd=meta_fd)
    redo = io.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=meta_fd)
    try:
        digest, at = hashlib.sha256(), PAGE
        for run in sealed_runs(source, keys):
            digest.update(run)
            _write_all(io, redo, run, at)
            at += len(run)
            tally(len(run))
            yield None
        head = _HEAD.pack(MAGIC, ino, pages, len(path)) + path
        head += bytes(_MTIME_AT - len(head)) + _MTIME.pack(mtime_ns)
        _write_all(io, redo, head + _mac(mac_key, head, digest.digest()), 0)
        yield partial(io.fsync, redo)
    except BaseException:
        discard(io, meta_fd, Staged(redo, name, 0, 0))
        raise
    return Staged(redo, name, pages, mtime_ns)


def holds(io: Backing, staged: Staged, source: Source, keys: FileKeys) -> bool:
    """Read a staged file back from the disk, and tell whether it authenticates and has what `source` has. Raises OSError."""
    io.fadvise(staged.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    buffer, cipher, done = keys.buffer, None, 0
    for first in range(0, staged.pages, buffer.pages):
        count = min(buffer.pages, staged.pages - first)
        sealed = buffer.sealed[: count * PAGE]
        if io.preadv(staged.fd, [sealed], (1 + first) * PAGE) != len(sealed):
            return False
        cipher = cipher or keys.of(bytes(sealed[:PAGE]))
        try:
            length = cipher.open_run(buffer, first, count, staged.pages - 1) if cipher else 0
        except DamagedPageError:
            return False
        start, last = plain_start(first), first + count - 1
        end = plain_start(last) + (length if last == staged.pages - 1 else capacity(last))
        at = HEADER if first == 0 else 0
        if cipher is None or bytes(buffer.plain[at : at + end - start]) != bytes(source.read(start, end - start)):
            return False
        done = end
    return done == source.size


def discard(io: Backing, meta_fd: int, staged: Staged) -> None:
    """Take away what was staged, and is not to count."""
    io.close(staged.fd)
    with suppress(FileNotFoundError):
        io.unlink(staged.name + b".tmp", dir_fd=meta_fd)


def put(io: Backing, meta_fd: int, staged: Staged, target: int) -> Steps[None]:
    """Have the staged content count, and copy it over the open file `target`, which nobody else may change meanwhile.

    Raises UnfinishedError. Must be run to its end: closing it in the middle leaves the same as that error.
    """
    try:
        io.rename(staged.name + b".tmp", staged.name, src_dir_fd=meta_fd, dst_dir_fd=meta_fd)
        yield partial(io.fsync, meta_fd)
        for at in range(0, staged.pages * PAGE, _RUN):
            _copy_run(io, staged.fd, target, staged.pages, at)
            yield None
        _end_copy(io, target, staged.pages, staged.mtime_ns)
        yield partial(io.fsync, target)
        io.unlink(staged.name, dir_fd=meta_fd)
        yield partial(io.fsync, meta_fd)
    except OSError as exc:
        raise UnfinishedError(errno.EIO, os.strerror(errno.EIO)) from exc
    finally:
        io.close(staged.fd)


def recover(io: Backing, root_fd: int, meta_fd: int, mac_key: bytes) -> list[str]:
    """Finish what a crash interrupted. Returns a line for the log for every file that was finished or set aside."""
    lines = []
    for name in sorted(io.listdir(meta_fd)):
        if not name.startswith(b"redo-") or name.endswith(b".orphan"):
            continue
        if name.endswith(b".tmp"):
            io.unlink(name, dir_fd=meta_fd)
            continue
        redo = io.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=meta_fd)
        try:
            path = _finish(io, redo, root_fd, mac_key)
        finally:
            io.close(redo)
        if path is None:
            io.rename(name, name + b".orphan", src_dir_fd=meta_fd, dst_dir_fd=meta_fd)
            lines.append(f"{os.fsdecode(name)} belongs to no file any more: kept as {os.fsdecode(name)}.orphan")
        else:
            io.unlink(name, dir_fd=meta_fd)
            lines.append(f"{os.fsdecode(path)}: finished the rewriting that a crash had interrupted")
        io.fsync(meta_fd)
    return lines


def _finish(io: Backing, redo: int, root_fd: int, mac_key: bytes) -> bytes | None:
    head = bytearray(PAGE)
    if io.preadv(redo, [head], 0) != PAGE:
        return None
    magic, ino, pages, length = _HEAD.unpack_from(head)
    digest = hashlib.sha256()
    run = memoryview(bytearray(_RUN))
    for at in range(PAGE, (pages + 1) * PAGE, _RUN):
        part = run[: min(_RUN, (pages + 1) * PAGE - at)]
        if io.preadv(redo, [part], at) != len(part):
            return None
        digest.update(part)
    if magic != MAGIC or not hmac.compare_digest(head[_MAC_AT:], _mac(mac_key, bytes(head[:_MAC_AT]), digest.digest())):
        return None
    path = bytes(head[_HEAD.size : _HEAD.size + length])
    if not _is_there(io, root_fd, path, ino):
        # A rename of the file, or of a directory above it, had not reached the disk when the power went.
        path = next(_named(io, root_fd, b"", ino), b"")
        if not path:
            return None
    target = open_target(io, root_fd, path)
    try:
        for at in range(0, pages * PAGE, _RUN):
            _copy_run(io, redo, target, pages, at)
        _end_copy(io, target, pages, _MTIME.unpack_from(head, _MTIME_AT)[0])
        io.fsync(target)
    finally:
        io.close(target)
    return path


def open_target(io: Backing, root_fd: int, path: bytes) -> int:
    """Open a file that has to be changed, also one of our own whose mode keeps even us out (opening.py).

    A crash between the two changes of the mode leaves it writable for its owner.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return io.open(path, flags, dir_fd=root_fd)
    except PermissionError:
        mode = stat.S_IMODE(io.stat(path, dir_fd=root_fd, follow_symlinks=False).st_mode)
        io.chmod(path, mode | stat.S_IRUSR | stat.S_IWUSR, dir_fd=root_fd)
        try:
            return io.open(path, flags, dir_fd=root_fd)
        finally:
            io.chmod(path, mode, dir_fd=root_fd)


def _is_there(io: Backing, root_fd: int, path: bytes, ino: int) -> bool:
    try:
        return io.stat(path, dir_fd=root_fd, follow_symlinks=False).st_ino == ino
    except (FileNotFoundError, NotADirectoryError):
        return False


def _named(io: Backing, root_fd: int, directory: bytes, ino: int) -> Iterator[bytes]:
    """Yield the paths below a directory under which the regular file of that inode number stands."""
    fd = io.open(directory or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root_fd)
    try:
        names = io.listdir(fd)
    finally:
        io.close(fd)
    for name in names:
        path = directory + b"/" + name if directory else name
        found = io.stat(path, dir_fd=root_fd, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            yield from _named(io, root_fd, path, ino)
        elif stat.S_ISREG(found.st_mode) and found.st_ino == ino:
            yield path


def _copy_run(io: Backing, redo: int, target: int, pages: int, at: int) -> None:
    part = bytearray(min(_RUN, pages * PAGE - at))
    if io.preadv(redo, [part], at + PAGE) != len(part):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    _write_all(io, target, part, at)


def _end_copy(io: Backing, target: int, pages: int, mtime_ns: int) -> None:
    io.ftruncate(target, pages * PAGE)
    if mtime_ns:
        io.utime(target, ns=(io.fstat(target).st_atime_ns, mtime_ns))


def _write_all(io: Backing, fd: int, data: bytes | bytearray | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        done = io.pwrite(fd, view, at)
        view, at = view[done:], at + done


def _mac(mac_key: bytes, head: bytes, digest: bytes) -> bytes:
    return hmac.digest(mac_key, head + digest, "sha256")
