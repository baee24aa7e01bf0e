"""One file of a store as nats-server keeps it, encrypted by itself or not, as a plain one; any part of it without the rest.

What is beside it decides: a stream, raft group, staged batch or consumer with a meta.key is encrypted, and so is a block with
an N.key. But both are written before what they are the keys of is encrypted, so the bytes themselves have the last word.
Of what is encrypted this room gives out what it decrypts to; meta.sum and the hash of index.db, which are over the bytes on
the disk, are made anew for the plain ones. Everything else is given out as it lies there.

Blocks are not authenticated: a block counts as decrypted when a whole record (or the head of a compressed block) shows up
in its first bytes. What is changed further on is for the reader of the records to notice, as it is for nats-server. But
records that some of its versions appended in the clear, before the first read after a start, are given out as such.

Nothing is followed: names are opened below an open directory, without symlinks.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import re
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

from encfs_js import jetstream, serverkeys, serverstate
from encfs_js.errors import FormatError, WrongKeyError
from encfs_js.format import MAGIC
from encfs_js.natscodec import hash_key, highwayhash64

if TYPE_CHECKING:
    from collections.abc import Sequence

    from encfs_js.backing import Backing
    from encfs_js.format import Suite
    from encfs_js.serverkeys import Asset, Keystream, Seed

_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# Bytes of a block that are looked at to tell whether it is encrypted, and a record that ends behind.
_HEAD: Final = 1 << 16
_MOST: Final = 1 << 30  # bytes of a file that is read whole; an index.db of 10 million subjects has a half of it
_MOST_BESIDE: Final = 4096  # bytes that are read of a key file or a meta.sum, which have 72 at most
_NEAR: Final = 1 << 32  # by how much the sequences of two records in a row differ at most
_BLOCK: Final = re.compile(rb"([1-9][0-9]*)\.(blk|new|key|idx)")
_MSGS: Final = frozenset({b"msgs", b"__msgs__", b"__new_msgs__"})
_JSON: Final = b"{"


class Kind(enum.Enum):
    """What a file is to its reader. OTHER: nothing that nats-server would encrypt."""

    OTHER = "other"
    KEY = "key file"
    META = "meta.inf"
    SUM = "meta.sum"
    CONSUMER = "o.dat"
    INDEX = "index.db"
    BLOCK = "block"
    OLD_INDEX = "block index of 2.9"


class Place(NamedTuple):
    """What the path of a file says of it.

    asset: whose key file would encrypt it; key: that file, seen from its directory. label: the name that its hashes are keyed
    with. staged: a leftover (.tmp, .new), which nats-server never reads. number: the block's.
    """

    kind: Kind
    asset: Asset | None = None
    key: bytes = b""
    label: str = ""
    staged: bool = False
    number: int = 0


_NOTHING: Final = Place(Kind.OTHER)


def place_of(path: bytes) -> Place:
    """Tell what a file is by its path in the store."""
    parts = path.split(b"/")
    if parts[0] == b"jetstream":
        parts = parts[1:]  # before 2.2 accounts lay directly in the store
    if len(parts) < 4 or parts[1] not in {b"streams", b"_js_"}:
        return _NOTHING
    account, where, owner, *rest = parts
    name = os.fsdecode(owner.removeprefix(b"."))  # a stream that is being deleted is renamed so
    asset = serverkeys.raft_group(name) if where == b"_js_" else serverkeys.stream(os.fsdecode(account), name)
    if rest[0] == b"batches" and len(rest) > 2:
        name, rest = os.fsdecode(rest[1]), rest[2:]
        asset = serverkeys.stream(os.fsdecode(account), name)
    leaf = rest[-1].removesuffix(b".tmp")
    staged = leaf != rest[-1]
    if len(rest) == 1:
        return _of_metafile(leaf, asset, name, staged=staged)
    if len(rest) == 3 and rest[0] == b"obs":
        consumer = os.fsdecode(rest[1])
        return _of_metafile(leaf, asset.consumer(consumer), f"{name}/{consumer}", staged=staged)
    if len(rest) == 2 and rest[0] in _MSGS:
        if leaf == b"index.db":
            return Place(Kind.INDEX, asset, b"../meta.key", name, staged)
        if match := _BLOCK.fullmatch(leaf):
            return _of_block(match, asset, name, staged=staged)
    return _NOTHING


_METAFILES: Final = {
    b"meta.inf": Kind.META,
    b"meta.sum": Kind.SUM,
    b"meta.key": Kind.KEY,
    b"o.dat": Kind.CONSUMER,
}


def _of_metafile(leaf: bytes, asset: Asset, label: str, *, staged: bool) -> Place:
    kind = _METAFILES.get(leaf)
    return _NOTHING if kind is None else Place(kind, asset, b"meta.key", label, staged)


def _of_block(match: re.Match[bytes], asset: Asset, name: str, *, staged: bool) -> Place:
    number, ending = int(match[1]), match[2]
    kind = {b"key": Kind.KEY, b"idx": Kind.OLD_INDEX}.get(ending, Kind.BLOCK)
    key = b"%s.key" % match[1]
    return Place(kind, asset.block(number), key, jetstream.block_name(name, number), staged or ending == b"new", number)


# --- contents ---------------------------------------------------------------------------------------------------------


class Content:
    """A file's plain content. `fd` is its backing file, open until `close`.

    size: plain bytes. suite: the cipher that it lies there in, None where it is plain. key: which of the keys opened it.
    damage: None, as everything that is given out could be read.
    """

    __slots__ = ("_clear", "_data", "_io", "_stream", "damage", "fd", "key", "size", "suite")

    def __init__(
        self, io: Backing, fd: int, seed: Seed | None, *, data: bytes | None = None, stream: Keystream | None = None
    ) -> None:
        self._io = io
        self.fd = fd
        self._data = data
        self._stream = stream
        self._clear: tuple[tuple[int, int], ...] = ()
        self.suite: Suite | None = seed.suite if seed is not None else None
        self.key = seed.key if seed is not None else 0
        self.size = io.fstat(fd).st_size if data is None else len(data)
        self.damage = None

    def read(self, offset: int, size: int) -> bytes | memoryview:
        """Return up to `size` plain bytes from `offset`, fewer only at the end. Raises OSError."""
        if self._data is not None:
            return memoryview(self._data)[offset : offset + size]
        raw = _read(self._io, self.fd, offset, min(size, max(self.size - offset, 0)))
        if self._stream is None:
            return raw
        plain = self._stream.xor(raw, offset)
        for start, end in self._clear:
            first, last = max(start - offset, 0), min(end - offset, len(raw))
            if first < last:
                plain = plain[:first] + raw[first:last] + plain[last:]
        return plain

    def except_for(self, clear: Sequence[tuple[int, int]]) -> None:
        """Take these parts, [start, end) in bytes, as they lie there."""
        self._clear = tuple(clear)

    def close(self) -> None:
        """Close the backing file."""
        self._io.close(self.fd)


def open_content(
    io: Backing, directory: int, name: bytes, path: bytes, keys: Sequence[bytes], *, closely: bool = True
) -> Content:
    """Open the regular file `name` of an open directory; `path` is its path in the store.

    keys: key, prev_key. closely: an encrypted block is looked through for records in the clear, which reads all of it; without
    that they are decrypted to nonsense, as nats-server does, and do not match their hash. Raises OSError (ELOOP: not a regular
    file), FormatError and WrongKeyError for what cannot be decrypted, CipherMissingError (FIPS).
    """
    fd = io.open(name, _FILE, dir_fd=directory)
    try:
        if not stat.S_ISREG(io.fstat(fd).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        place = place_of(path)
        match place.kind:
            case Kind.BLOCK:
                return _block(io, fd, directory, place, path, keys, closely=closely)
            case Kind.SUM:
                return _sum(io, fd, directory, place, path, keys)
            case Kind.META | Kind.CONSUMER | Kind.INDEX | Kind.OLD_INDEX:
                return _sealed(io, fd, directory, place, path, keys)
            case _:
                return Content(io, fd, None)
    except BaseException:
        io.close(fd)
        raise


def size_of(io: Backing, directory: int, name: bytes, path: bytes, keys: Sequence[bytes]) -> int:
    """Return the plain size of a regular file, that on the disk where it cannot be decrypted. Raises OSError."""
    if place_of(path).kind in {Kind.OTHER, Kind.BLOCK, Kind.SUM, Kind.KEY}:
        return io.stat(name, dir_fd=directory, follow_symlinks=False).st_size
    try:
        content = open_content(io, directory, name, path, keys)
    except (FormatError, WrongKeyError):
        return io.stat(name, dir_fd=directory, follow_symlinks=False).st_size
    content.close()
    return content.size


def _read(io: Backing, fd: int, offset: int, size: int) -> bytes:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        got = io.preadv(fd, [view[done:]], offset + done)
        if not got:
            break
        done += got
    return bytes(view[:done])


def _all(io: Backing, fd: int, path: str) -> bytes:
    """Read a whole file. Raises FormatError for one that is too large for that."""
    size = io.fstat(fd).st_size
    if size > _MOST:
        raise FormatError(f"{path}: {size} bytes are more than nats-server writes there", hint="Take it away.")
    return _read(io, fd, 0, size)


def _beside(io: Backing, directory: int, name: bytes, most: int = _MOST_BESIDE) -> bytes | None:
    """Return the content of a file beside another one, `most` bytes of it; None if there is none."""
    try:
        fd = io.open(name, _FILE, dir_fd=directory)
    except FileNotFoundError:
        return None
    try:
        return _read(io, fd, 0, min(io.fstat(fd).st_size, most))
    finally:
        io.close(fd)


def _key_path(place: Place, path: bytes) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(os.fsdecode(path)), os.fsdecode(place.key)))


def _seed(io: Backing, directory: int, place: Place, path: bytes, keys: Sequence[bytes]) -> Seed | None:
    """Return what the key file of a file holds, None if it has none. Raises FormatError, WrongKeyError."""
    raw = _beside(io, directory, place.key)
    if raw is None:
        return None
    assert place.asset is not None
    return serverkeys.open_key_file(raw, place.asset, keys, _key_path(place, path))


def _sealed(io: Backing, fd: int, directory: int, place: Place, path: bytes, keys: Sequence[bytes]) -> Content:
    """Open a file that is encrypted as a whole."""
    name = os.fsdecode(path)
    raw = _all(io, fd, name)
    try:
        seed = _seed(io, directory, place, path, keys)
        if seed is None and raw and not _begins_plain(place.kind, raw):
            raise FormatError(
                f"{name}: its key file {os.path.basename(_key_path(place, path))} is missing, or this file is damaged",
                hint="Put that file back from a backup: this one cannot be read without it.",
            )
        if seed is None or not raw:
            return Content(io, fd, None, data=raw)
        match place.kind:
            case Kind.INDEX:
                body, encrypted = serverstate.open_index(raw, seed, place.label, name)
                if not encrypted:
                    return Content(io, fd, None, data=raw)
                return Content(io, fd, seed, data=body + highwayhash64(hash_key(place.label), body))
            case Kind.OLD_INDEX:
                # Its nonce is that of the key file, for want of one of its own.
                return Content(io, fd, seed, data=serverkeys.open_file(seed.nonce + raw, seed, name))
            case _:
                return Content(io, fd, seed, data=serverkeys.open_file(raw, seed, name))
    except (FormatError, WrongKeyError):
        if _is_plain(io, directory, place, raw, name):
            return Content(io, fd, None, data=raw)
        raise


def _begins_plain(kind: Kind, raw: bytes) -> bool:
    """Tell whether a file begins as one that is not encrypted does. Of encrypted ones one in 2^15 does, or in 256 a meta.inf."""
    match kind:
        case Kind.META:
            return raw.lstrip()[:1] == _JSON
        case Kind.INDEX:
            return raw[0] == 11 and raw[1:2] < b"\x10"
        case _:
            return raw[0] == 22 and raw[1:2] < b"\x10"


def _is_plain(io: Backing, directory: int, place: Place, raw: bytes, path: str) -> bool:
    """Tell whether a file is whole and in the clear, although there is a key file: its encryption was never begun."""
    try:
        match place.kind:
            case Kind.META:
                checksum = _beside(io, directory, b"meta.sum") or b""
                if checksum[: len(MAGIC)] != MAGIC:  # sealed already, where the store is being sealed in place
                    jetstream.check_meta(raw, checksum, place.label, path)
                jetstream.parse_meta(raw, path)
            case Kind.CONSUMER:
                serverstate.parse_consumer(raw, path)
            case Kind.INDEX:
                serverstate.parse_index(serverstate.open_index(raw, None, place.label, path)[0], path)
            case _:
                return raw[:2] == b"\x16\x01"
    except FormatError:
        return False
    return True


def _sum(io: Backing, fd: int, directory: int, place: Place, path: bytes, keys: Sequence[bytes]) -> Content:
    """Open a meta.sum: made anew where its meta.inf is encrypted, and only if it is right for what lies there."""
    raw = _beside(io, directory, b"meta.inf", _MOST) if not place.staged else None
    if raw is not None:
        name = os.path.join(os.path.dirname(os.fsdecode(path)), "meta.inf")
        try:
            jetstream.check_meta(raw, _read(io, fd, 0, _MOST_BESIDE), place.label, name)
            seed = _seed(io, directory, place, path, keys)
            if seed is not None:
                plain = serverkeys.open_file(raw, seed, name)
                return Content(io, fd, seed, data=highwayhash64(hash_key(place.label), plain).hex().encode())
        except (FormatError, WrongKeyError):
            pass  # what is wrong shows when meta.inf is read
    return Content(io, fd, None)


def _block(
    io: Backing, fd: int, directory: int, place: Place, path: bytes, keys: Sequence[bytes], *, closely: bool
) -> Content:
    """Open a block: encrypted if it makes sense so, else plain if it makes sense as it is."""
    size, name = io.fstat(fd).st_size, os.fsdecode(path)
    if not size:
        return Content(io, fd, None)
    problem: FormatError | WrongKeyError | None = None
    try:
        seed = _seed(io, directory, place, path, keys)
    except (FormatError, WrongKeyError) as exc:
        seed, problem = None, exc
    if seed is not None and size <= serverkeys.MAX_STREAM:
        content = Content(io, fd, seed, stream=serverkeys.Keystream(seed))
        if _makes_sense(content, place.label):
            if closely and size <= jetstream.MAX_BLOCK:
                content.except_for(_in_clear(_read(io, fd, 0, size), bytes(content.read(0, size)), place.label))
            return content
        problem = jetstream.damaged(name, 0, "decrypts to nothing that makes sense")
    if problem is None:
        if _beside(io, directory, b"../meta.key") is None:
            return Content(io, fd, None)  # nothing is encrypted here
        problem = FormatError(
            f"{name}: its key file {os.path.basename(_key_path(place, path))} is missing",
            hint="Put the key file back from a backup: the block cannot be read without it.",
        )
    content = Content(io, fd, None)
    if _makes_sense(content, place.label):
        return content
    raise problem


def _in_clear(raw: bytes, plain: bytes, label: str) -> list[tuple[int, int]]:
    """Return the parts, [start, end), of an encrypted block that are records in the clear. plain: what all decrypts to.

    A record that lies there is looked at closely when its sequence is near the one before.
    """
    found: list[tuple[int, int]] = []
    if plain.startswith(b"cmp"):
        return found
    view, at, last = memoryview(raw), 0, -_NEAR
    while at < len(raw):
        head, clear = jetstream.head_of(raw, at), False
        if head is not None and abs(head.seq - last) < _NEAR and head.length <= len(raw) - at:
            with contextlib.suppress(FormatError):
                clear = next(jetstream.records(view[at : at + head.length], label, "")).length == head.length
        if not clear and (head := jetstream.head_of(plain, at)) is None:
            break
        assert head is not None
        if clear:
            found.append((at, at + head.length))
        at, last = at + head.length, head.seq
    return found


def _makes_sense(content: Content, label: str) -> bool:
    """Tell whether a block holds, in its first bytes, a record that is whole, or begins as a compressed one."""
    head = bytes(content.read(0, _HEAD))
    if (compressed := jetstream.begins_compressed(head)) is not None:
        return compressed
    if (first := jetstream.head_of(head, 0)) is not None and first.length > len(head):
        head = bytes(content.read(0, first.length))
    return jetstream.Finder(head, label).find(0) is not None
