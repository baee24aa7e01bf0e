"""A sealed store as its plain one for rooms that only read: they get this in place of the operating system.

What a mount would show, without one: files that are sealed are read as plain ones, others as they lie there.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any

from encfs_js.backing import Backing
from encfs_js.format import MAGIC, DamagedPageError
from encfs_js.sealed import RUN_BYTES, SealedFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from encfs_js.sealed import FileKeys


class SealedError(OSError):
    """A sealed file, and there is no key."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "sealed, and no key was given")


class Unsealed(Backing):
    """The calls that reading takes. keys: None without a key; then opening a sealed file raises SealedError.

    A page that does not authenticate, or a cipher that this host refuses, is an OSError EIO that says so.
    """

    def __init__(self, io: Backing, keys: FileKeys | None) -> None:
        self._io = io
        self._keys = keys
        self._files: dict[int, SealedFile] = {}

    def open(self, path: str | bytes, flags: int, *, dir_fd: int | None = None) -> int:  # type: ignore[override]
        """Open a directory or a file. Raises OSError."""
        fd = self._io.open(path, flags, dir_fd=dir_fd)
        try:
            if not flags & os.O_DIRECTORY and stat.S_ISREG(self._io.fstat(fd).st_mode):
                start = bytearray(len(MAGIC))
                if self._io.preadv(fd, [start], 0) == len(start) and start == MAGIC:
                    self._files[fd] = self._sealed(fd)
        except BaseException:
            self._io.close(fd)
            raise
        return fd

    def _sealed(self, fd: int) -> SealedFile:
        if self._keys is None:
            raise SealedError
        file = SealedFile(self._io, fd, self._keys)
        if file.refused is not None:
            raise OSError(errno.EIO, f"the OpenSSL of this host refuses {file.refused.label}")
        if file.damage is not None:
            raise _damaged(file.damage)
        return file

    def close(self, fd: int) -> None:
        """Close what `open` returned."""
        self._files.pop(fd, None)
        self._io.close(fd)

    def fstat(self, fd: int) -> os.stat_result:
        """Return the status, with the plain size; of a sealed file with times in whole seconds only. Raises OSError."""
        status = self._io.fstat(fd)
        if (file := self._files.get(fd)) is None:
            return status
        return os.stat_result((*status[: stat.ST_SIZE], file.size, *status[stat.ST_SIZE + 1 : 10]))

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:  # type: ignore[override]
        """Read plain bytes into one buffer. Returns how many, fewer than it holds only at the end. Raises OSError."""
        if (file := self._files.get(fd)) is None:
            return self._io.preadv(fd, buffers, offset)
        (buffer,) = buffers
        done, view = 0, memoryview(buffer)
        try:
            while done < len(view) and (part := file.read(offset + done, min(len(view) - done, RUN_BYTES))):
                view[done : done + len(part)] = part
                done += len(part)
        except DamagedPageError as problem:
            raise _damaged(problem.page) from None
        return done

    def listdir(self, fd: int) -> list[bytes]:  # type: ignore[override]
        """Return the names in an open directory. Raises OSError."""
        return self._io.listdir(fd)

    def stat(self, *path: Any, **options: Any) -> os.stat_result:
        """Return the status, with the size on the disk. Raises OSError."""
        return self._io.stat(*path, **options)


def _damaged(page: int) -> OSError:
    return OSError(errno.EIO, f"page {page} does not authenticate")
