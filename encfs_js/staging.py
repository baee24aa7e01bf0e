"""Where a conversion writes: everything lies in a stage first, and comes into its place when all of it is there.

    DST/.encfs_js-convert/marker       JSON: format, version, source (real path), from, to, cipher, made, phase
    DST/.encfs_js-convert/tmp          the file that is being written
    DST/.encfs_js-convert/tree/...     files that are complete, under the names that they will have
    DST/.encfs_js-convert/.encfs_js/   the keyring of a store that is made here

What a crash or a power cut leaves after each call, and what the same command does then:

    mkdir DST, fsync of its parent     an empty directory, or none                      begins
    mkdir of the stage, fsync of DST   an empty stage in an otherwise empty DST         begins
    marker.tmp .. rename, fsync        the same, and a marker that counts, or not       begins
    keyring (keystore.write)           none, or a whole one; no file was sealed yet     makes one, or goes on with it
    mkdir in the tree, tmp .. fsync    whole files in the tree, and part of one in tmp  writes what is missing
    rename of tmp into the tree        the same; which renames a power cut undid does not matter
    fsync of every directory, check    all files, known to be equal to those of SRC     checks again
    marker with phase publish          the same; from here on nothing is written any more
    rename of the tree's entries       some are in DST, the others in the stage         renames these
    rename of .encfs_js, fsync of DST  all is in DST, the stage is empty                takes the stage away
    unlink of the marker               DST is complete, with an empty stage             compares, and takes the stage away
    rmdir of the stage                 DST is complete; its time of change may be newer refuses: DST is not empty

Until the rename of `jetstream` there is nothing in DST that a nats-server would look at, and afterwards all of it is there.
A sealed store that is made here gets its keyring last: nobody can mount it before.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from encfs_js.backing import META, RENAME_NOREPLACE
from encfs_js.errors import ConversionError, NotAStoreError, StoreBusyError, StoreNotEmptyError, StoreUnsuitableError
from encfs_js.state import STAGE

if TYPE_CHECKING:
    from encfs_js.backing import Backing

OWN: Final = frozenset({META.encode(), STAGE.encode()})  # what lies in a store's directory and is not part of the store
LOST: Final = b"lost+found"
TMP: Final = b"tmp"
_MARKER: Final = b"marker"
_STAGED_MARKER: Final = b"marker.tmp"
_TREE: Final = b"tree"
_FORMAT: Final = "encfs_js conversion"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LONGEST: Final = 1 << 16


@dataclass(slots=True)
class Found:
    """What there is at DST. marker: of an interrupted conversion. ended: all but the removal of its stage is done.

    keyring: there is an encfs_js store, or what is left of one.
    """

    exists: bool = False
    marker: dict[str, Any] | None = None
    ended: bool = False
    keyring: bool = False

    @property
    def published(self) -> bool:
        """Whether all files are in their place, or about to be: nothing is written any more."""
        return self.ended or (self.marker is not None and self.marker["phase"] == "publish")


@dataclass(slots=True)
class Stage:
    """An open stage: descriptors of DST, of the stage and of the tree in it. path: of the stage."""

    io: Backing
    path: str
    top: int
    fd: int
    tree: int
    marker: dict[str, Any]

    def close(self) -> None:
        """Give DST back."""
        for fd in (self.tree, self.fd, self.top):
            if fd >= 0:
                self.io.close(fd)


def look(io: Backing, target: str, wanted: dict[str, str]) -> Found:
    """See what is at DST, changing nothing.

    wanted: what the marker of this conversion says (source, from, to, cipher). Raises NotAStoreError (no parent directory),
    StoreUnsuitableError, StoreNotEmptyError, ConversionError (of another conversion), OSError.
    """
    if not os.path.lexists(target):
        parent = os.path.dirname(os.path.abspath(target))
        if not os.path.isdir(parent):
            raise NotAStoreError(f"{parent}: no such directory", hint=f"mkdir -p {parent}")
        return Found()
    if not os.path.isdir(target):
        raise StoreUnsuitableError(f"{target} is not a directory", hint="Name a directory, or a path that is free.")
    top = io.open(target, _DIRECTORY & ~os.O_NOFOLLOW)
    try:
        return _look(io, target, top, wanted)
    finally:
        io.close(top)


def _look(io: Backing, target: str, top: int, wanted: dict[str, str]) -> Found:
    names = set(io.listdir(top))
    others = sorted(names - OWN - {LOST})
    found = Found(exists=True, keyring=META.encode() in names)
    if STAGE.encode() in names:
        stage = io.open(STAGE, _DIRECTORY, dir_fd=top)
        try:
            found.marker = _read_marker(io, stage)
            inside = set(io.listdir(stage)) - {_STAGED_MARKER}
        finally:
            io.close(stage)
        if found.marker is not None:
            _check_marker(target, found.marker, wanted)
        elif inside:
            raise ConversionError(
                f"{os.path.join(target, STAGE)}: no marker of a conversion is in it",
                hint="Remove that directory, and repeat the command: what is in it is a copy.",
            )
        else:
            found.ended = bool(others)
    if found.keyring and wanted["to"] != "sealed":
        raise StoreNotEmptyError(f"{target} is an encfs_js store", hint="Name an empty directory, or one that is free.")
    if others and not found.published:
        first = os.fsdecode(others[0])
        raise StoreNotEmptyError(
            f"{target} is not empty ({first!r})" if not first.isprintable() else f"{target} is not empty ({first})",
            hint="Nothing is written over. Name an empty directory, or one that is free.",
        )
    return found


def _read_marker(io: Backing, stage: int) -> dict[str, Any] | None:
    try:
        fd = io.open(_MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=stage)
    except FileNotFoundError:
        return None
    try:
        raw = bytearray(_LONGEST)
        raw = raw[: io.preadv(fd, [raw], 0)]
    finally:
        io.close(fd)
    try:
        marker = json.loads(raw)
    except (ValueError, RecursionError):
        marker = None
    if not isinstance(marker, dict):
        return {}
    return marker


def _check_marker(target: str, marker: dict[str, Any], wanted: dict[str, str]) -> None:
    if marker.get("format") != _FORMAT or marker.get("version") != 1 or marker.get("phase") not in {"copy", "publish"}:
        raise ConversionError(
            f"{os.path.join(target, STAGE)}: its marker is of no version that is known here",
            hint="Use the version of encfs_js that began, or remove that directory: what is in it is a copy.",
        )
    if any(marker.get(name) != value for name, value in wanted.items()):
        said = {name: marker.get(name) for name in ("source", "from", "to", "cipher")}
        cipher = f" --cipher {said['cipher']}" if said["cipher"] else ""
        raise ConversionError(
            f"{target} holds another conversion that was interrupted: {said['source']} --from {said['from']} "
            f"--to {said['to']}{cipher}",
            hint=f"Repeat that one; or remove {os.path.join(target, STAGE)}, which holds nothing but a copy.",
        )


def begin(io: Backing, target: str, wanted: dict[str, str]) -> Stage:
    """Make DST and the stage, or open those of a conversion that was interrupted. Raises what `look` does, StoreBusyError."""
    made = False
    try:
        io.mkdir(target, 0o700)
        made = True
    except FileExistsError:
        pass
    parent = io.open(os.path.dirname(os.path.abspath(target)), _DIRECTORY & ~os.O_NOFOLLOW)
    try:
        io.fsync(parent)
    finally:
        io.close(parent)
    stage = Stage(io, os.path.join(target, STAGE), io.open(target, _DIRECTORY & ~os.O_NOFOLLOW), -1, -1, {})
    try:
        try:
            fcntl.flock(stage.top, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreBusyError(f"{target}: another conversion is at work there", hint="Wait for it to end.") from None
        found = _look(io, target, stage.top, wanted)  # again, now that nobody else can
        with contextlib.suppress(FileExistsError):
            io.mkdir(STAGE, 0o700, dir_fd=stage.top)
        io.fsync(stage.top)
        stage.fd = io.open(STAGE, _DIRECTORY, dir_fd=stage.top)
        if found.ended:
            stage.marker = {**wanted, "phase": "ended"}
            return stage
        stage.marker = found.marker or {"format": _FORMAT, "version": 1, **wanted, "made": made, "phase": "copy"}
        if found.marker is None:
            _write_marker(io, stage)
        if stage.marker["phase"] == "copy":
            with contextlib.suppress(FileExistsError):
                io.mkdir(_TREE, 0o700, dir_fd=stage.fd)
            io.fsync(stage.fd)
        with contextlib.suppress(FileNotFoundError):
            stage.tree = io.open(_TREE, _DIRECTORY, dir_fd=stage.fd)
        return stage
    except BaseException:
        stage.close()
        raise


def _write_marker(io: Backing, stage: Stage) -> None:
    with contextlib.suppress(FileNotFoundError):
        io.unlink(_STAGED_MARKER, dir_fd=stage.fd)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = io.open(_STAGED_MARKER, flags, 0o600, dir_fd=stage.fd)
    try:
        data, done = json.dumps(stage.marker).encode() + b"\n", 0
        while done < len(data):
            done += io.pwrite(fd, data[done:], done)
        io.fsync(fd)
    finally:
        io.close(fd)
    io.rename(_STAGED_MARKER, _MARKER, src_dir_fd=stage.fd, dst_dir_fd=stage.fd)
    io.fsync(stage.fd)


def publish(stage: Stage) -> None:
    """Bring everything into its place; all of it is on the disk, and was compared. Raises ConversionError, OSError."""
    io = stage.io
    if stage.marker["phase"] == "copy":
        stage.marker["phase"] = "publish"
        _write_marker(io, stage)
    if stage.tree >= 0:
        for name in sorted(io.listdir(stage.tree)):
            _move(io, stage.tree, name, stage.top)
        io.fsync(stage.top)
    if META.encode() in io.listdir(stage.fd):
        _move(io, stage.fd, META.encode(), stage.top)
    io.fsync(stage.top)


def _move(io: Backing, source: int, name: bytes, target: int) -> None:
    found = io.stat(name, dir_fd=source, follow_symlinks=False)
    if stat.S_ISDIR(found.st_mode) and not found.st_mode & stat.S_IWUSR:
        # Its entry `..` changes. The mode is set again afterwards, from that of SRC.
        io.chmod(name, stat.S_IMODE(found.st_mode) | stat.S_IWUSR, dir_fd=source)
    try:
        io.renameat2(source, name, target, name, RENAME_NOREPLACE)
        return
    except OSError as problem:
        if problem.errno == errno.EEXIST:
            raise _in_the_way(name) from None
        if problem.errno not in {errno.EINVAL, errno.ENOSYS}:
            raise
    with contextlib.suppress(FileNotFoundError):  # a file system without such renames
        io.stat(name, dir_fd=target, follow_symlinks=False)
        raise _in_the_way(name)
    io.rename(name, name, src_dir_fd=source, dst_dir_fd=target)


def _in_the_way(name: bytes) -> ConversionError:
    return ConversionError(
        f"{os.fsdecode(name)!r} has appeared in the target while the conversion was at work",
        hint="Take it away, and repeat the command. Nothing was written over.",
    )


def clear(stage: Stage) -> None:
    """Take the empty stage away, the marker last."""
    io = stage.io
    with contextlib.suppress(FileNotFoundError):
        io.rmdir(_TREE, dir_fd=stage.fd)
    for name in (TMP, _STAGED_MARKER):
        with contextlib.suppress(FileNotFoundError):
            io.unlink(name, dir_fd=stage.fd)
    io.fsync(stage.fd)
    with contextlib.suppress(FileNotFoundError):
        io.unlink(_MARKER, dir_fd=stage.fd)
    io.rmdir(STAGE, dir_fd=stage.top)
    io.fsync(stage.top)


def remove(io: Backing, directory: int, name: bytes) -> None:
    """Remove a file or a directory with all that is in it."""
    if not stat.S_ISDIR(io.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
        io.unlink(name, dir_fd=directory)
        return
    io.chmod(name, 0o700, dir_fd=directory)
    inner = io.open(name, _DIRECTORY, dir_fd=directory)
    try:
        for each in io.listdir(inner):
            remove(io, inner, each)
    finally:
        io.close(inner)
    io.rmdir(name, dir_fd=directory)
