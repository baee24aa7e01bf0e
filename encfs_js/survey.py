"""What a store has before it is converted: every name with its kind, size and times, and in which form it lies there."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from encfs_js import serverstore
from encfs_js.backing import META
from encfs_js.format import PAGE, pages_for
from encfs_js.inspect import kind_of
from encfs_js.serverstore import Kind
from encfs_js.sides import Form
from encfs_js.staging import LOST, OWN
from encfs_js.state import STAGE

if TYPE_CHECKING:
    from encfs_js.backing import Backing

DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_METAFILES: Final = frozenset({Kind.META, Kind.CONSUMER, Kind.INDEX, Kind.BLOCK})


@dataclass(slots=True)
class Survey:
    """What was found. entries: path to what must not change meanwhile; of files and symlinks also their size.

    files, size: regular files and their bytes on the disk. key_files: those of nats-server among them; keys: the paths of
    meta.key files. room_sealed, room_plain: bytes that all of it takes, sealed or not. linked: names of hard linked files.
    refused: (path, why) of what no conversion can carry.
    """

    entries: dict[bytes, tuple[int, ...]] = field(default_factory=dict)
    inodes: set[int] = field(default_factory=set)
    files: int = 0
    key_files: int = 0
    size: int = 0
    room_sealed: int = 0
    room_plain: int = 0
    linked: int = 0
    has_store: bool = False
    has_stage: bool = False
    has_metafiles: bool = False
    encrypted: bool = False
    keys: list[bytes] = field(default_factory=list)
    refused: list[tuple[bytes, str]] = field(default_factory=list)

    @property
    def form(self) -> Form:
        """How the store lies there."""
        return Form.SEALED if self.has_store else Form.SERVER if self.encrypted else Form.PLAIN

    @property
    def plain_files(self) -> int:
        """How many regular files there are in the clear: key files of nats-server are not, unless they are sealed."""
        return self.files - (self.key_files if self.form is Form.SERVER else 0)

    def may_be(self, form: Form) -> bool:
        """Tell whether it can be taken for that form: where nothing is that would be encrypted, plain is server as well."""
        return form is self.form or (form is Form.SERVER and self.form is Form.PLAIN and not self.has_metafiles)


def is_own(prefix: bytes, name: bytes) -> bool:
    """Tell whether an entry is none of the store's files: ours, or the file system's own lost+found."""
    return not prefix and (name in OWN or name == LOST)


def survey(io: Backing, store: str) -> Survey:
    """Look at everything in a store. Raises OSError when it cannot be opened."""
    found = Survey()
    top = io.open(store, DIRECTORY & ~os.O_NOFOLLOW)
    try:
        device = io.fstat(top).st_dev
        _below(io, found, top, b"", device)
    finally:
        io.close(top)
    return found


def _below(io: Backing, found: Survey, directory: int, prefix: bytes, device: int) -> None:
    try:
        names = sorted(io.listdir(directory))
    except OSError as problem:
        found.refused.append((prefix.rstrip(b"/"), problem.strerror or "unreadable"))
        return
    for name in names:
        if is_own(prefix, name):
            found.has_store |= name == META.encode()
            found.has_stage |= name == STAGE.encode()
            continue
        path = prefix + name
        try:
            status = io.stat(name, dir_fd=directory, follow_symlinks=False)
            _entry(io, found, directory, name, path, status, device)
        except OSError as problem:
            found.refused.append((path, problem.strerror or "unreadable"))


def _entry(
    io: Backing, found: Survey, directory: int, name: bytes, path: bytes, status: os.stat_result, device: int
) -> None:
    found.inodes.add(status.st_ino)
    kind = stat.S_IFMT(status.st_mode)
    if status.st_dev != device:
        found.refused.append((path, "another file system is mounted there"))
        return
    if kind == stat.S_IFDIR:
        inner = io.open(name, DIRECTORY, dir_fd=directory)
        try:
            found.room_sealed += PAGE
            found.room_plain += PAGE
            _below(io, found, inner, path + b"/", device)
        finally:
            io.close(inner)
    elif kind == stat.S_IFREG:
        _file(found, path, status)
    elif kind != stat.S_IFLNK:
        found.refused.append((path, f"a {kind_of(status.st_mode)}"))
    size = 0 if kind == stat.S_IFDIR else status.st_size
    found.entries[path] = (
        status.st_mode, status.st_ino, size, status.st_mtime_ns, status.st_ctime_ns, status.st_uid, status.st_gid
    )  # fmt: skip


def _file(found: Survey, path: bytes, status: os.stat_result) -> None:
    found.files += 1
    found.size += status.st_size
    found.room_sealed += pages_for(status.st_size) * PAGE
    found.room_plain += -(-status.st_size // PAGE) * PAGE
    found.linked += status.st_nlink > 1
    place = serverstore.place_of(path)
    found.has_metafiles |= place.kind in _METAFILES
    found.key_files += place.kind is Kind.KEY
    if place.kind is Kind.KEY and not place.staged:
        found.encrypted = True
        if path.endswith(b"/meta.key"):
            found.keys.append(path)
            found.room_plain += 2 * PAGE
    elif place.kind in {Kind.BLOCK, Kind.META}:
        found.room_plain += PAGE  # its key file, in the server's form
