"""Carry the files of a store over into the stage of another one, in another form: plain, encrypted by nats-server, or sealed.

SRC is only read. What DST goes through, and what a crash leaves of it, says `staging`. A file that is there in the stage was
complete and on the disk before it was renamed into it; when a conversion goes on it is kept if its mode, its time of change and
its size are those that SRC's file asks for. What a power cut undid is written again, and in the end `equal` compares all of it.

Directories are brought to the disk when they are full, not after each file in them: until the marker says `publish`
nothing depends on them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from encfs_js import serverkeys, serverwrite
from encfs_js.errors import FormatError, WrongKeyError
from encfs_js.format import PAGE, Suite, pages_for
from encfs_js.redo import sealed_runs
from encfs_js.serverstore import Kind, Place, place_of
from encfs_js.sides import Form, Reader, Side, UnreadableError, open_reader
from encfs_js.staging import TMP, remove
from encfs_js.survey import DIRECTORY, is_own

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from encfs_js.backing import Backing
    from encfs_js.serverkeys import Seed
    from encfs_js.staging import Stage

_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_RUN: Final = 1 << 20
_SMALL: Final = 1 << 16


LEFTOVER: Final = "a leftover of a rewriting, which nats-server never reads"


def is_left_out(source: Side, target: Side, path: bytes) -> bool:
    """Tell whether a file is not carried over: what a crash of nats-server has left of a rewriting, where it is encrypted.

    It has the keystream of the file that it was to replace, and the two of them would give each other away.
    """
    place = place_of(path)
    return (
        place.staged
        and place.kind is not Kind.OTHER
        and source.shows(path)
        and Form.SERVER in {source.form, target.form}
    )


@dataclass(slots=True)
class Outcome:
    """What came of it. failed, left_out, unequal: (path, why). no_owner: files whose owner could not be kept."""

    files: int = 0
    kept: int = 0
    failed: list[tuple[bytes, str, str]] = field(default_factory=list)
    left_out: list[tuple[bytes, str]] = field(default_factory=list)
    no_owner: int = 0


@dataclass(slots=True)
class Job:
    """One conversion. cipher: of DST, where nats-server encrypts it. tally: gets (files, plain bytes) that are done."""

    io: Backing
    source: Side
    target: Side
    stage: Stage
    cipher: Suite
    random: Callable[[int], bytes]
    tally: Callable[[int, int], None]
    outcome: Outcome = field(default_factory=Outcome)


def copy(job: Job, store: str) -> None:
    """Write everything that is not in the stage yet, and bring it to the disk.

    Files that cannot be read go into the outcome. Raises WrongKeyError (the stage was begun with another key),
    CipherMissingError, OSError of the target's file system.
    """
    source = job.io.open(store, DIRECTORY & ~os.O_NOFOLLOW)
    try:
        _directory(job, source, job.stage.tree, b"")
    finally:
        job.io.close(source)
    job.io.fsync(job.stage.fd)


def _directory(job: Job, source: int, target: int, prefix: bytes) -> None:
    io, names = job.io, set()
    for name in sorted(io.listdir(source)):
        path = prefix + name
        if is_own(prefix, name):
            continue
        status = io.stat(name, dir_fd=source, follow_symlinks=False)
        there = _status(io, target, name)
        if there is not None and stat.S_IFMT(there.st_mode) != stat.S_IFMT(status.st_mode):
            remove(io, target, name)
            there = None
        if stat.S_ISDIR(status.st_mode):
            _inner(job, source, target, name, path, status)
        elif stat.S_ISLNK(status.st_mode):
            _symlink(job, source, target, name, status)
        elif not (stat.S_ISREG(status.st_mode) and job.source.shows(path) and _file(job, source, target, path, status)):
            continue
        names.add(name)
    for name in set(io.listdir(target)) - names:
        if not _is_key(job, prefix + name, names):
            remove(io, target, name)  # of a file that has gone from SRC since the conversion was interrupted
    io.fsync(target)


def _status(io: Backing, directory: int, name: bytes) -> os.stat_result | None:
    try:
        return io.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _is_key(job: Job, path: bytes, names: set[bytes]) -> bool:
    """Tell whether a file that SRC has not is the key file of one that it has."""
    place = place_of(path)
    if job.target.form is not Form.SERVER or place.kind is not Kind.KEY or place.staged:
        return False
    stem = os.path.basename(path).removesuffix(b".key")
    return stem == b"meta" or not names.isdisjoint({stem + b".blk", stem + b".idx"})


def _inner(job: Job, source: int, target: int, name: bytes, path: bytes, status: os.stat_result) -> None:
    io = job.io
    with contextlib.suppress(FileExistsError):
        io.mkdir(name, 0o700, dir_fd=target)
    io.chmod(name, 0o700, dir_fd=target)
    theirs = io.open(name, DIRECTORY, dir_fd=source)
    try:
        ours = io.open(name, DIRECTORY, dir_fd=target)
        try:
            _directory(job, theirs, ours, path + b"/")
            dress(job, ours, status)
            io.fsync(ours)
        finally:
            io.close(ours)
    finally:
        io.close(theirs)


def _symlink(job: Job, source: int, target: int, name: bytes, status: os.stat_result) -> None:
    io = job.io
    with contextlib.suppress(FileNotFoundError):
        io.unlink(name, dir_fd=target)
    io.symlink(io.readlink(name, dir_fd=source), name, dir_fd=target)
    try:
        io.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
    except PermissionError:
        job.outcome.no_owner += 1
    io.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=target, follow_symlinks=False)


def dress(job: Job, fd: int, status: os.stat_result) -> None:
    """Give an open file or directory the owner, mode and times of SRC's."""
    io, now = job.io, job.io.fstat(fd)
    if (now.st_uid, now.st_gid) != (status.st_uid, status.st_gid):
        try:
            io.chown(fd, status.st_uid, status.st_gid)
        except PermissionError:
            job.outcome.no_owner += 1
    io.chmod(fd, stat.S_IMODE(status.st_mode))  # after chown, which takes bits away
    io.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))


def _file(job: Job, source: int, target: int, path: bytes, status: os.stat_result) -> bool:
    """Carry one regular file over. Returns whether it is there now, and is to be."""
    outcome, place = job.outcome, place_of(path)
    outcome.files += 1
    if is_left_out(job.source, job.target, path):
        outcome.left_out.append((path, LEFTOVER))
        return False
    name = os.path.basename(path)
    try:
        reader = open_reader(job.io, job.source, source, name, path)
        try:
            _carry(job, reader, source, target, place, path, status)
            job.tally(1, 0)
        finally:
            reader.close()
    except (UnreadableError, FormatError) as problem:
        outcome.failed.append((path, str(problem), problem.hint))
        return False
    return True


def _carry(
    job: Job, reader: Reader, source: int, target: int, place: Place, path: bytes, status: os.stat_result
) -> None:
    name, size = os.path.basename(path), reader.size
    parts: Iterable[bytes | memoryview]
    if job.target.form is Form.SEALED:
        assert job.target.file_keys is not None
        parts, size = sealed_runs(reader, job.target.file_keys), pages_for(size) * PAGE
    elif job.target.form is Form.SERVER and place.kind is Kind.SUM:
        checksum = _checksum(job, reader, source, target, place, path)
        size = len(checksum) if checksum == _beside(job.io, target, name) else -1
        parts = [checksum]
    elif job.target.form is Form.SERVER and place.kind in serverwrite.NEEDS_KEY:
        seed, is_new = _seed(job, target, place, path, status)
        parts = serverwrite.encrypted(reader, place, path, seed, job.random)
        size = -1 if is_new else serverwrite.encrypted_size(place.kind, size, seed.suite)
    else:
        parts = (reader.read(at, _RUN) for at in range(0, reader.size, _RUN))
    there = _status(job.io, target, name)
    if there is not None and (there.st_size, there.st_mtime_ns, there.st_mode) == (
        size, status.st_mtime_ns, status.st_mode
    ):  # fmt: skip
        job.outcome.kept += 1
        job.tally(0, reader.size)
        return
    _put(job, parts, target, name, status)


def _put(job: Job, parts: Iterable[bytes | memoryview], target: int, name: bytes, status: os.stat_result) -> None:
    """Write a file in the stage, bring it to the disk, and rename it into the open directory `target`."""
    io, stage = job.io, job.stage.fd
    with contextlib.suppress(FileNotFoundError):
        io.unlink(TMP, dir_fd=stage)
    fd = io.open(TMP, _NEW, 0o600, dir_fd=stage)
    try:
        at = 0
        for part in parts:
            view = memoryview(part)
            while view:
                done = io.pwrite(fd, view, at)
                view, at = view[done:], at + done
            job.tally(0, len(part))
        dress(job, fd, status)
        io.fsync(fd)
    finally:
        io.close(fd)
    io.rename(TMP, name, src_dir_fd=stage, dst_dir_fd=target)


# -- what nats-server keeps beside its files


def _seed(job: Job, target: int, place: Place, path: bytes, status: os.stat_result) -> tuple[Seed, bool]:
    """Return the seed of the key file that a file needs, and whether the key file was made just now."""
    assert place.asset is not None
    (key,) = job.target.server_keys[:1]
    raw = _beside(job.io, target, place.key)
    if raw is not None:
        where = os.path.join(job.stage.path, "tree", os.path.dirname(os.fsdecode(path)), os.fsdecode(place.key))
        try:
            return serverkeys.open_key_file(raw, place.asset, [key], os.path.normpath(where)), False
        except FormatError:
            pass  # not whole, so nothing was encrypted with it that could be kept
        except WrongKeyError as problem:
            raise WrongKeyError(
                str(problem),
                hint=f"This conversion was begun with another key for the target. Give that one; or remove {job.stage.path}, "
                "which holds nothing but a copy, and begin anew.",
            ) from None
    content, seed = serverwrite.new_key(place, path, key, job.cipher, job.random)
    _put(job, [content], target, place.key, status)
    return seed, True


def _checksum(job: Job, reader: Reader, source: int, target: int, place: Place, path: bytes) -> bytes:
    """Return the content of a meta.sum whose meta.inf was encrypted just before."""
    plain, raw = reader.all(), _beside(job.io, target, b"meta.inf")
    if raw is None:
        return plain
    meta = open_reader(job.io, job.source, source, b"meta.inf", os.path.join(os.path.dirname(path), b"meta.inf"))
    try:
        return serverwrite.checksum(plain, meta.all(), raw, place.label)
    finally:
        meta.close()


def _beside(io: Backing, directory: int, name: bytes) -> bytes | None:
    """Return the content of a small file of the stage, None where there is none."""
    try:
        fd = io.open(name, _FILE, dir_fd=directory)
    except FileNotFoundError:
        return None
    try:
        return b"".join(_parts(io, fd))
    finally:
        io.close(fd)


def _parts(io: Backing, fd: int) -> Iterator[bytes]:
    part, at = bytearray(_SMALL), 0
    while got := io.preadv(fd, [part], at):
        yield bytes(part[:got])
        at += got
