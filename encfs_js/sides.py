"""The plain content of one side of a conversion: of a store that is plain, encrypted by nats-server, or sealed.

A store that a crash ended is read as the next mount would read it (FORMAT.md section 2.2), without being changed: of a file
that the crash may have touched, and that does not authenticate, a copy in memory is trimmed.
"""

from __future__ import annotations

import enum
import errno
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from encfs_js import crash, serverstore
from encfs_js.errors import FormatError, WrongKeyError
from encfs_js.format import MAGIC, PAGE, DamagedPageError, missing
from encfs_js.redo import PlainFile
from encfs_js.sealed import FileKeys, SealedFile
from encfs_js.serverstore import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from encfs_js.backing import Backing
    from encfs_js.redo import Source

_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_RUN: Final = 1 << 20


class Form(enum.Enum):
    """How a store lies on the disk. SERVER: encrypted by nats-server (option `key`). SEALED: by encfs_js."""

    PLAIN = "plain"
    SERVER = "server"
    SEALED = "sealed"


class UnreadableError(Exception):
    """A file's plain content cannot be had; the message says why. hint: what to do."""

    def __init__(self, why: str, hint: str = "") -> None:
        super().__init__(why)
        self.hint = hint


def _never(_ctime_ns: int) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Side:
    """One side and its keys. plaintext: a sealed store that may hold plain files.

    touched: ctime in ns -> may a crash have touched such a file?
    """

    form: Form
    server_keys: Sequence[bytes] = field(default=(), repr=False)
    file_keys: FileKeys | None = None
    plaintext: bool = False
    touched: Callable[[int], bool] = _never

    def shows(self, path: bytes) -> bool:
        """Tell whether a file is part of the plain store: key files of nats-server are not."""
        return self.form is not Form.SERVER or serverstore.place_of(path).kind is not Kind.KEY


class Reader:
    """A file's plain content, open until `close`. size: plain bytes. Every error of reading is an UnreadableError."""

    __slots__ = ("_io", "_source", "fd", "size")

    def __init__(self, io: Backing, source: Source) -> None:
        self._io = io
        self._source = source
        self.fd = source.fd
        self.size = source.size

    def read(self, offset: int, size: int) -> bytes | memoryview:
        """Return up to `size` bytes (at most 1 MiB) from `offset`, valid until the next call on a file of this side."""
        try:
            data = self._source.read(offset, size)
        except DamagedPageError as problem:
            raise UnreadableError(f"page {problem.page} does not authenticate") from None
        except OSError as problem:
            raise UnreadableError(problem.strerror or str(problem)) from None
        if len(data) < min(size, self.size - offset):
            raise UnreadableError("it became shorter while it was read")
        return data

    def all(self) -> bytes:
        """Return the whole content."""
        return b"".join(bytes(self.read(at, _RUN)) for at in range(0, self.size, _RUN))

    def close(self) -> None:
        """Close the backing file."""
        self._io.close(self.fd)


def open_reader(io: Backing, side: Side, directory: int, name: bytes, path: bytes) -> Reader:
    """Open the regular file `name` of an open directory; `path` is its path in the store. Raises UnreadableError."""
    try:
        if side.form is Form.SERVER:
            return Reader(io, serverstore.open_content(io, directory, name, path, side.server_keys))
        fd = io.open(name, _FILE, dir_fd=directory)
        try:
            if not stat.S_ISREG(io.fstat(fd).st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if side.form is Form.PLAIN:
                return Reader(io, PlainFile(io, fd))
            return Reader(io, _sealed(io, side, fd))
        except BaseException:
            io.close(fd)
            raise
    except (FormatError, WrongKeyError) as problem:
        raise UnreadableError(str(problem), problem.hint) from None
    except OSError as problem:
        raise UnreadableError(problem.strerror or str(problem)) from None


def _sealed(io: Backing, side: Side, fd: int) -> Source:
    """Open a file of a sealed store; where a crash cut it short, a copy of it takes its place behind the descriptor."""
    assert side.file_keys is not None
    start = bytearray(len(MAGIC))
    start = start[: io.preadv(fd, [start], 0)]
    if side.plaintext and start and start != MAGIC:
        return PlainFile(io, fd)
    file = SealedFile(io, fd, side.file_keys)
    if file.refused is not None:
        raise missing(file.refused)
    if side.touched(io.fstat(fd).st_ctime_ns) and _is_cut(io, file):
        copy = _copied(io, fd)  # in memory
        try:
            crash.trim(io, copy, side.file_keys, plaintext=side.plaintext)
            io.dup2(copy, fd, inheritable=False)
        finally:
            io.close(copy)
        file = SealedFile(io, fd, side.file_keys)
    if file.damage is not None:
        raise UnreadableError(f"page {file.damage} does not authenticate")
    return file


def _is_cut(io: Backing, file: SealedFile) -> bool:
    """Tell whether any page says what only a crash leaves: most do not, and then nothing has to be copied."""
    if file.damage is not None:
        return True
    try:
        for at in range(0, file.size, _RUN):
            file.read(at, _RUN)
    except DamagedPageError:
        return True
    return io.fstat(file.fd).st_size % PAGE != 0


def _copied(io: Backing, fd: int) -> int:
    copy = os.memfd_create("trimmed", os.MFD_CLOEXEC)
    part, at = memoryview(bytearray(_RUN)), 0
    while got := io.preadv(fd, [part], at):
        done = 0
        while done < got:
            done += io.pwrite(copy, part[done:got], at + done)
        at += got
    return copy
