"""A Backing that does what it is asked to do and keeps a record of every call that changed something.

The record is what tests/disk.py plays power cuts with. Files and directories are named by a number that is given once,
so that an inode number that the file system uses again is not taken for the file that had it before. What lay in the
directory when the recording began is the first part of the record and counts as being on the disk.
"""

from __future__ import annotations

import os
import pickle
import stat
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from encfs_js.backing import FALLOC_FL_KEEP_SIZE, RENAME_EXCHANGE, Backing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROOT = 0
RESERVE = "reserve"  # FORMAT.md 4.5: its content means nothing; it is left empty, for it is large


@dataclass(frozen=True, slots=True)
class Enter:
    """A name appeared: create, link, mkdir, symlink, mknod. mode, inode: st_mode and st_ino of what it names."""

    directory: int
    name: bytes
    file: int
    mode: int
    inode: int
    target: bytes = b""


@dataclass(frozen=True, slots=True)
class Leave:
    """A name went: unlink, rmdir."""

    directory: int
    name: bytes
    file: int


@dataclass(frozen=True, slots=True)
class Move:
    """A rename. other: what it replaced or was exchanged with."""

    directory: int
    name: bytes
    new_directory: int
    new_name: bytes
    file: int
    other: int | None = None
    exchange: bool = False


@dataclass(frozen=True, slots=True)
class Write:
    file: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resize:
    """ftruncate, open with O_TRUNC, fallocate beyond the end."""

    file: int
    size: int


@dataclass(frozen=True, slots=True)
class Touch:
    """Only the inode changed: mode, owner, times."""

    file: int


@dataclass(frozen=True, slots=True)
class SyncBegin:
    """fsync or fdatasync was called. What is written from here on is not covered by it."""

    file: int


@dataclass(frozen=True, slots=True)
class Sync:
    """It returned. began: index of its SyncBegin; data: it was fdatasync."""

    file: int
    began: int
    data: bool


Op = Enter | Leave | Move | Write | Resize | Touch | SyncBegin | Sync


class Trace(NamedTuple):
    """What was recorded. The first `base` operations are what was there at the beginning."""

    ops: list[Op]
    base: int


class Recording(Backing):
    """Records what happens below `root`, into `ops` and, if `sink` is given, into that file as well, call by call.

    Calls may come from several threads: everything that changes something is done and recorded under one lock, but
    for the syncs, during which others go on. sync: False saves the time of real syncs; the record is the same.
    """

    def __init__(self, root: str | Path, sink: str | Path | None = None, *, sync: bool = True) -> None:
        self.root = os.fspath(root)
        self._really = sync
        self.ops: list[Op] = []
        self.numbers: dict[tuple[int, int], int] = {}
        self._next = 0
        self._lock = threading.RLock()
        self._sink = -1
        if sink is not None:
            self._sink = os.open(sink, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._new(os.stat(self.root))
        self._snapshot(self.root, ROOT)
        self.base = len(self.ops)
        self._put(self.base)

    @property
    def trace(self) -> Trace:
        with self._lock:
            return Trace(list(self.ops), self.base)

    # -- keeping the record

    def _put(self, what: Any) -> None:
        if self._sink >= 0:
            os.write(self._sink, pickle.dumps(what))

    def _note(self, op: Op) -> int:
        self.ops.append(op)
        self._put(op)
        return len(self.ops) - 1

    def _new(self, found: os.stat_result) -> int:
        number = self.numbers[found.st_dev, found.st_ino] = self._next
        self._next += 1
        return number

    def number(self, file: int | str | bytes, dir_fd: int | None = None, *, follow: bool = False) -> int:
        """The number of an open or a named file. A KeyError says that it was made behind this object's back."""
        found = os.fstat(file) if isinstance(file, int) else os.stat(file, dir_fd=dir_fd, follow_symlinks=follow)
        return self.numbers[found.st_dev, found.st_ino]

    def _there(self, path: str | bytes, dir_fd: int | None) -> int | None:
        with suppress(FileNotFoundError):
            return self.number(path, dir_fd)
        return None

    def _place(self, path: str | bytes, dir_fd: int | None) -> tuple[int, bytes]:
        directory, name = os.path.split(os.fsencode(path))
        found = os.stat(directory or b".", dir_fd=dir_fd)
        return self.numbers[found.st_dev, found.st_ino], name

    def _entered(self, path: str | bytes, dir_fd: int | None, target: bytes = b"") -> None:
        found = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        self._note(Enter(*self._place(path, dir_fd), self._new(found), found.st_mode, found.st_ino, target))

    def _snapshot(self, path: str, directory: int) -> None:
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                found = entry.stat(follow_symlinks=False)
                target = os.fsencode(os.readlink(entry.path)) if entry.is_symlink() else b""
                known = self.numbers.get((found.st_dev, found.st_ino))
                number = self._new(found) if known is None else known
                self._note(Enter(directory, os.fsencode(entry.name), number, found.st_mode, found.st_ino, target))
                if entry.is_dir(follow_symlinks=False):
                    self._snapshot(entry.path, number)
                elif stat.S_ISREG(found.st_mode) and known is None and entry.name != RESERVE:
                    with open(entry.path, "rb") as file:
                        self._note(Write(number, 0, file.read()))

    # -- the calls, which have the names and arguments of Backing's

    def open(self, path, flags, mode=0o777, *, dir_fd=None):
        with self._lock:
            made = flags & os.O_CREAT and self._there(path, dir_fd) is None
            fd = os.open(path, flags, mode, dir_fd=dir_fd)
            if made:
                self._entered(path, dir_fd)
            elif flags & os.O_TRUNC:
                self._note(Resize(self.number(fd), 0))
            return fd

    def pwrite(self, fd, data, offset):
        with self._lock:
            done = os.pwrite(fd, data, offset)
            if done:
                self._note(Write(self.number(fd), offset, bytes(memoryview(data)[:done])))
            return done

    def ftruncate(self, fd, size):
        with self._lock:
            os.ftruncate(fd, size)
            self._note(Resize(self.number(fd), size))

    def fallocate(self, fd, mode, offset, length):
        with self._lock:
            before = os.fstat(fd).st_size
            Backing.fallocate(fd, mode, offset, length)
            assert mode & ~FALLOC_FL_KEEP_SIZE == 0, "the record has no word for holes and ranges"
            after = os.fstat(fd).st_size
            self._note(Resize(self.number(fd), after) if after != before else Touch(self.number(fd)))

    def fsync(self, fd):
        self._sync(fd, os.fsync, data=False)

    def fdatasync(self, fd):
        self._sync(fd, os.fdatasync, data=True)

    def _sync(self, fd, call, *, data):
        with self._lock:
            file = self.number(fd)
            began = self._note(SyncBegin(file))
        if self._really:
            call(fd)
        with self._lock:
            self._note(Sync(file, began, data))

    def mkdir(self, path, mode=0o777, *, dir_fd=None):
        with self._lock:
            os.mkdir(path, mode, dir_fd=dir_fd)
            self._entered(path, dir_fd)

    def symlink(self, src, dst, target_is_directory=False, *, dir_fd=None):
        with self._lock:
            os.symlink(src, dst, target_is_directory, dir_fd=dir_fd)
            self._entered(dst, dir_fd, os.fsencode(src))

    def mknod(self, path, mode=0o600, device=0, *, dir_fd=None):
        with self._lock:
            os.mknod(path, mode, device, dir_fd=dir_fd)
            self._entered(path, dir_fd)

    def link(self, src, dst, *, src_dir_fd=None, dst_dir_fd=None, follow_symlinks=True):
        with self._lock:
            os.link(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=follow_symlinks)
            found = os.stat(dst, dir_fd=dst_dir_fd, follow_symlinks=False)
            file = self.numbers[found.st_dev, found.st_ino]
            self._note(Enter(*self._place(dst, dst_dir_fd), file, found.st_mode, found.st_ino))

    def unlink(self, path, *, dir_fd=None):
        self._leave(os.unlink, path, dir_fd)

    def rmdir(self, path, *, dir_fd=None):
        self._leave(os.rmdir, path, dir_fd)

    def _leave(self, call, path, dir_fd):
        with self._lock:
            file = self._there(path, dir_fd)
            call(path, dir_fd=dir_fd)
            assert file is not None
            self._note(Leave(*self._place(path, dir_fd), file))

    def rename(self, src, dst, *, src_dir_fd=None, dst_dir_fd=None):
        with self._lock:
            file, other = self._there(src, src_dir_fd), self._there(dst, dst_dir_fd)
            os.rename(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            self._moved(src, src_dir_fd, dst, dst_dir_fd, file, other, exchange=False)

    def renameat2(self, old_dir, old, new_dir, new, flags):
        with self._lock:
            file, other = self._there(old, old_dir), self._there(new, new_dir)
            Backing.renameat2(old_dir, old, new_dir, new, flags)
            self._moved(old, old_dir, new, new_dir, file, other, exchange=bool(flags & RENAME_EXCHANGE))

    def _moved(self, src, src_dir, dst, dst_dir, file, other, *, exchange):
        if file != other:  # a rename onto another link of the same file does nothing
            places = *self._place(src, src_dir), *self._place(dst, dst_dir)
            self._note(Move(*places, file, other, exchange))

    def chmod(self, path, mode, *, dir_fd=None, follow_symlinks=True):
        with self._lock:
            os.chmod(path, mode, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
            self._note(Touch(self.number(path, dir_fd, follow=follow_symlinks)))

    def chown(self, path, uid, gid, *, dir_fd=None, follow_symlinks=True):
        with self._lock:
            os.chown(path, uid, gid, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
            self._note(Touch(self.number(path, dir_fd, follow=follow_symlinks)))

    def utime(self, path, times=None, *, ns=None, dir_fd=None, follow_symlinks=True):
        with self._lock:
            when = {"times": times} if ns is None else {"ns": ns}
            os.utime(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks, **when)
            self._note(Touch(self.number(path, dir_fd, follow=follow_symlinks)))


def load(sink: str | Path) -> Trace:
    """Read what a Recording in another process has written so far; the last operation may be cut."""
    ops, base = [], 0
    for what, _ in _loaded(sink):
        if isinstance(what, int):
            base = what
        else:
            ops.append(what)
    return Trace(ops, base)


def ends(sink: str | Path) -> list[int]:
    """How long the file was after each operation."""
    return [end for what, end in _loaded(sink) if not isinstance(what, int)]


def _loaded(sink: str | Path) -> Iterator[tuple[Any, int]]:
    with open(sink, "rb") as file:
        while True:
            try:
                yield pickle.load(file), file.tell()
            except (EOFError, pickle.UnpicklingError):
                return
