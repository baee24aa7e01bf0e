"""What streams, consumers and raft groups hold: their configuration and their state, read from their files.

Messages are counted from index.db where it is that of the last block, else from the heads of the records of all blocks,
one block at a time. Nothing is proved: the hashes of records are for `verify`. What cannot be read is listed, and the rest is
read all the same. A store that is in use changes meanwhile: what goes away is left out, and what does not make sense
is read again before it is called unreadable.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from encfs_js import jetstream, serverstate, serverstore
from encfs_js.census import opened
from encfs_js.errors import FormatError, WrongKeyError
from encfs_js.serverstore import Kind
from encfs_js.unsealing import SealedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from encfs_js.backing import Backing
    from encfs_js.census import Owner
    from encfs_js.serverstore import Content

T = TypeVar("T")

MOST: Final = 128 << 20  # bytes of a file that is read whole
MOST_SUBJECTS: Final = 1 << 20  # that are counted without index.db
_TRIES: Final = 3
_DEEPEST: Final = 32  # objects and lists in each other in a configuration
_PAUSE: Final = 0.02  # seconds; nats-server writes index.db and o.dat within that
_SNAPSHOT: Final = re.compile(rb"snap\.\d+\.\d+")


class State(NamedTuple):
    """What a stream or raft log holds. size: bytes, as nats-server counts them; times: ns since 1970, 0 for none.

    subjects: how many different ones, None for more than MOST_SUBJECTS. source: "index.db" or "blocks".
    """

    source: str
    messages: int
    size: int
    first_seq: int
    first_time: int
    last_seq: int
    last_time: int
    subjects: int | None

    @property
    def deleted(self) -> int:
        """Sequences between the first and the last that have no message."""
        return max(self.last_seq - self.first_seq + 1 - self.messages, 0)


class Progress(NamedTuple):
    """How far a consumer is. pending, redelivered: how many."""

    ack_floor: serverstate.Place
    delivered: serverstate.Place
    pending: int
    redelivered: int


@dataclass(slots=True)
class Consumer:
    """A consumer. config: its meta.inf; state: of its o.dat; None for what was not read."""

    name: str
    config: dict[str, Any] | None = None
    state: Progress | None = None


@dataclass(slots=True)
class Holding:
    """What an owner holds; None for what was not read. sealed: something can be read only with a key.

    compressed: how many of its blocks are compressed.
    """

    config: dict[str, Any] | None = None
    state: State | None = None
    compressed: int | None = None
    consumers: list[Consumer] = field(default_factory=list)
    sealed: bool = False


@dataclass(slots=True)
class Raft:
    """What a raft group remembers beside its log; None for what was not read, or is not there.

    snapshot: term, index and cluster size of the newest one; snapshots: how many.
    """

    term: int | None = None
    voted: bool | None = None
    cluster_size: int | None = None
    peers: int | None = None
    committed: int | None = None
    snapshots: int = 0
    snapshot: tuple[int, int, int] | None = None


@dataclass(slots=True)
class Reader:
    """Reads files of a store. keys: of nats-server's own encryption; none: what they are for is left out, not unreadable.

    busy: somebody has the store mounted, so what was appended last may be on the disk in part only.
    unreadable: (path, why), in the order in which it was met.
    """

    io: Backing
    top: int
    keys: Sequence[bytes] = field(repr=False)
    busy: bool = False
    sleep: Callable[[float], None] = time.sleep
    unreadable: list[tuple[bytes, str]] = field(default_factory=list)
    sealed: bool = False

    def names(self, path: bytes) -> list[bytes]:
        """Return what is in a directory, in order; nothing when it is not there."""
        try:
            with opened(self.io, path, self.top) as fd:
                return sorted(self.io.listdir(fd))
        except OSError as problem:
            self.failed(path, problem)
        return []

    def read(self, path: bytes, use: Callable[[Content, str], T]) -> T | None:
        """Return what `use` makes of a file's plain content; None for what is not there, or cannot be read."""
        name = os.fsdecode(path)
        for trial in range(_TRIES):
            try:
                with opened(self.io, os.path.dirname(path), self.top) as directory:
                    self._check_size(directory, path)
                    content = serverstore.open_content(self.io, directory, os.path.basename(path), path, self.keys)
                    try:
                        return use(content, name)
                    finally:
                        content.close()
            except (FormatError, WrongKeyError, OSError) as problem:
                retry = isinstance(problem, FormatError) or getattr(problem, "errno", 0) == errno.EIO
                if retry and trial < _TRIES - 1:
                    self.sleep(_PAUSE)
                    continue
                self.failed(path, problem)
                return None
        return None

    def _check_size(self, directory: int, path: bytes) -> None:
        """Raise FormatError for a file that would be read whole, it or its key file, and is too large for that."""
        place = serverstore.place_of(path)
        if place.kind in {Kind.META, Kind.CONSUMER, Kind.INDEX, Kind.OLD_INDEX, Kind.SUM}:
            _check_size(self.io.stat(os.path.basename(path), dir_fd=directory, follow_symlinks=False).st_size, path)
        if place.key:
            with contextlib.suppress(FileNotFoundError):
                _check_size(self.io.stat(place.key, dir_fd=directory, follow_symlinks=False).st_size, path)

    def failed(self, path: bytes, problem: FormatError | WrongKeyError | OSError) -> None:
        """Note that something could not be read; not what is gone, and not what there is no key for."""
        if isinstance(problem, SealedError) or (isinstance(problem, WrongKeyError) and not self.keys):
            self.sealed = True
        elif isinstance(problem, OSError):
            if problem.errno != errno.ENOENT:
                self.unreadable.append((path, problem.strerror or "unreadable"))
        else:
            self.unreadable.append((path, str(problem).removeprefix(f"{os.fsdecode(path)}: ")))


def _check_size(size: int, path: bytes | str) -> None:
    if size > MOST:
        raise FormatError(f"{os.fsdecode(path)}: {size} bytes, more than nats-server writes")


def _whole(content: Content, path: str) -> bytes:
    _check_size(content.size, path)
    return bytes(content.read(0, content.size))


def look(reader: Reader, owner: Owner) -> Holding:
    """Return what a stream, a staged batch or the log of a raft group holds."""
    before, reader.sealed = reader.sealed, False
    found = Holding(config=_config(reader, owner.path, owner.name))
    numbers = _numbers(reader, owner.path)
    found.compressed = _compressed(reader, owner, numbers)
    found.state = _from_index(reader, owner, numbers)
    if found.state is None and not reader.sealed:
        found.state = _from_blocks(reader, owner, numbers)
    for name in owner.consumers:
        path = owner.path + b"/obs/" + os.fsencode(name)
        config = _config(reader, path, f"{owner.name}/{name}")
        found.consumers.append(Consumer(name, config, reader.read(path + b"/o.dat", _progress)))
    found.sealed = reader.sealed
    reader.sealed = before or found.sealed
    return found


def _config(reader: Reader, path: bytes, label: str) -> dict[str, Any] | None:
    """Return what a meta.inf holds. One that does not match its meta.sum is unreadable: nats-server leaves it out."""

    def checked(content: Content, name: str) -> dict[str, Any]:
        plain = _whole(content, name)
        if total is not None:  # of an encrypted one it was made anew, if it was right
            jetstream.check_meta(plain, total, label, name)
        found = jetstream.parse_meta(plain, name)
        if not _is_usual(found):
            raise jetstream.damaged(name, 0, "JSON that nats-server does not write")
        return found

    total = reader.read(path + b"/meta.sum", _whole)
    return reader.read(path + b"/meta.inf", checked)


def _is_usual(value: object, depth: int = 0) -> bool:
    """Tell whether JSON is such as nats-server writes: numbers of 64 bits, finite ones, and not too deep."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return depth < _DEEPEST and all(_is_usual(each, depth + 1) for each in inner)
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or -(1 << 63) <= value < 1 << 64


def _progress(content: Content, path: str) -> Progress:
    found = serverstate.parse_consumer(_whole(content, path), path)
    return Progress(found.ack_floor, found.delivered, len(found.pending), len(found.redelivered))


def _numbers(reader: Reader, path: bytes) -> list[int]:
    return jetstream.block_numbers(reader.names(path + b"/msgs"))


def _block(owner: Owner, number: int) -> bytes:
    return owner.path + b"/msgs/%d.blk" % number


def _compressed(reader: Reader, owner: Owner, numbers: Sequence[int]) -> int | None:
    def begins(content: Content, _: str) -> bool:
        return bool(jetstream.begins_compressed(content.read(0, 32)))

    found = 0
    for number in numbers:
        before, reader.sealed = reader.sealed, False
        found += bool(reader.read(_block(owner, number), begins))
        if reader.sealed:
            return None  # at the first: to find out that a block is encrypted takes long without the key
        reader.sealed = before
    return found


def _from_index(reader: Reader, owner: Owner, numbers: Sequence[int]) -> State | None:
    """Return the state that index.db has, if it is that of the last block."""

    def index_of(content: Content, name: str) -> serverstate.Index:
        raw = _whole(content, name)
        # Of an encrypted one the hash was checked before it was decrypted.
        body = raw[: -jetstream.HASH] if content.suite else serverstate.open_index(raw, None, owner.name, name)[0]
        return serverstate.parse_index(body, name)

    def tail(content: Content, _: str) -> bytes:
        return bytes(content.read(max(content.size - jetstream.HASH, 0), jetstream.HASH))

    index = reader.read(owner.path + b"/msgs/index.db", index_of)
    if index is None or not numbers:
        return None
    before = len(reader.unreadable)
    end = reader.read(_block(owner, numbers[-1]), tail)
    del reader.unreadable[before:]  # it has been noted when its head was read
    if end is None or not serverstate.is_of(index, numbers[-1], end):
        return None
    return State("index.db", index.messages, index.size, index.first_seq, index.first_time, index.last_seq,
                 index.last_time, len(index.subjects))  # fmt: skip


class _Counted(NamedTuple):
    """A record's head."""

    length: int
    seq: int
    time: int
    subject: bytes


def _from_blocks(reader: Reader, owner: Owner, numbers: Sequence[int]) -> State:
    """Count what is in the blocks, from the last to the first: a tombstone is in the block of its message or behind it."""
    dead: set[int] = set()
    subjects: set[bytes] | None = set()
    messages = size = first_seq = first_time = last_seq = last_time = 0
    before = len(reader.unreadable)
    noted = {path for path, _ in reader.unreadable}
    for number in reversed(numbers):

        def count(
            content: Content, name: str, number: int = number
        ) -> tuple[list[_Counted], int, int, FormatError | None]:
            block, _ = jetstream.plain_block(
                _whole(content, name), None, jetstream.block_name(owner.name, number), name
            )
            return _heads(block, dead, name)

        if (found := reader.read(_block(owner, number), count)) is None:
            continue
        here, top, top_time, problem = found
        if problem is not None and not (reader.busy and number == numbers[-1]):
            reader.failed(_block(owner, number), problem)
        if top > last_seq:
            last_seq, last_time = top, top_time
        for head in here:
            if head.seq in dead:
                dead.discard(head.seq)
                continue
            messages, size = messages + 1, size + head.length
            if subjects is not None:
                subjects.add(head.subject)
                if len(subjects) > MOST_SUBJECTS:
                    subjects = None
            if not first_seq or head.seq < first_seq:
                first_seq, first_time = head.seq, head.time
    reader.unreadable[before:] = [each for each in reader.unreadable[before:] if each[0] not in noted]
    return State("blocks", messages, size, first_seq or last_seq + 1, first_time, last_seq, last_time,
                 None if subjects is None else len(subjects))  # fmt: skip


def _heads(block: bytes, dead: set[int], path: str) -> tuple[list[_Counted], int, int, FormatError | None]:
    """Return the messages of a block, the highest sequence that it names and its time, and what ended it too early.

    Adds to `dead`.
    """
    found: list[_Counted] = []
    last = highest = highest_time = at = 0
    while at < len(block):
        head = jetstream.head_of(block, at)
        if head is None or head.length > len(block) - at:
            cut = head is not None or len(block) - at < jetstream.SHORTEST
            problem = "the block ends within a record" if cut else "no record begins here"
            return found, highest, highest_time, jetstream.damaged(path, at, problem)
        # An erased one has no time, its tombstone has it.
        if head.seq > highest or (head.seq == highest and not highest_time):
            highest, highest_time = head.seq, head.time
        if head.tombstone:
            dead.add(head.seq)
        elif head.seq > last:
            last = head.seq
            if not head.erased:
                start = at + jetstream.BEFORE_SUBJECT
                found.append(_Counted(head.length, head.seq, head.time, block[start : start + head.subject]))
        at += head.length
    return found, highest, highest_time, None


def look_at_group(reader: Reader, owner: Owner) -> Raft:
    """Return what a raft group remembers beside its log."""
    found, path = Raft(), owner.path
    if vote := reader.read(path + b"/tav.idx", lambda c, p: serverstate.parse_vote(_whole(c, p), p)):
        found.term, found.voted = vote[0], bool(vote[1])
    if peers := reader.read(path + b"/peers.idx", lambda c, p: serverstate.parse_peers(_whole(c, p), p)):
        found.cluster_size, found.peers = peers.cluster_size, len(peers.ids)
    found.committed = reader.read(
        path + b"/commit.idx", lambda c, p: serverstate.parse_commit(_whole(c, p), owner.name, p)
    )
    snapshots = [name for name in reader.names(path + b"/snapshots") if _SNAPSHOT.fullmatch(name)]
    found.snapshots = len(snapshots)
    if snapshots:
        newest = max(snapshots, key=lambda name: [int(part) for part in name.split(b".")[:0:-1]])
        snapshot = reader.read(
            path + b"/snapshots/" + newest, lambda c, p: serverstate.parse_snapshot(_whole(c, p), owner.name, p)
        )
        if snapshot is not None:
            found.snapshot = snapshot.term, snapshot.last, snapshot.peers.cluster_size
    return found
