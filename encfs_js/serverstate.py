"""What nats-server remembers of a store, decrypted: index.db, o.dat, and the state of raft groups, purely.

As in `jetstream`: what is wrong is a FormatError that names path and offset, and no reader makes more than a fixed multiple
of what it is given, but for `assignments`, which makes MAX_ASSIGNMENTS bytes at most. `uv` and `sv` are varints.
Times are in nanoseconds since 1970 where nothing else is said.

Measured on stores of nats-server 2.10, 2.11, 2.12, 2.14 and 2.15, whose index.db is of versions 1, 2, 3, 4 and 4. After a
description only: o.dat of version 1, which none of them writes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from encfs_js.errors import FormatError
from encfs_js.jetstream import HASH, ended, hashed, json_of, naming, take
from encfs_js.natscodec import MalformedError, s2_block, uvarint, varint
from encfs_js.serverkeys import Seed, open_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    Bytes = bytes | memoryview

MAX_ASSIGNMENTS: Final = 64 << 20  # plain bytes of a snapshot of _meta_
_NODE: Final = {1: 64, 2: 32}  # version of a set of deleted sequences: u64 words of bits in a node
_PEER: Final = 8  # bytes of a node's id

# --- index.db ---------------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """How many messages of a subject there are, and the numbers of the blocks with the first and the last of them."""

    name: bytes
    total: int
    first_block: int
    last_block: int


class BlockState(NamedTuple):
    """What index.db knows of a block; `size` in bytes. `deleted`: (first sequence, bits from it on) of what is deleted."""

    number: int
    size: int
    first_seq: int
    first_time: int
    last_seq: int
    last_time: int
    ttls: int
    schedules: int
    deleted: tuple[tuple[int, int], ...]


class Index(NamedTuple):
    """A stream's state; `size` in bytes. Valid only for blocks of which the last is `last_block` and ends with `last_hash`."""

    version: int
    messages: int
    size: int
    first_seq: int
    first_time: int
    last_seq: int
    last_time: int
    subjects: tuple[Subject, ...]
    blocks: tuple[BlockState, ...]
    last_block: int
    last_hash: bytes


def open_index(raw: Bytes, seed: Seed | None, stream: str, path: str) -> tuple[bytes, bool]:
    """Check the hash of an index.db and decrypt it; no seed where there is no meta.key. Returns it and: was it encrypted.

    After its first run with a key nats-server leaves index.db plain. Raises FormatError, CipherMissingError.
    """
    body = bytes(hashed(raw, stream, path))
    if seed is None:
        return body, False
    try:
        return open_file(body, seed, path), True
    except FormatError:
        if body[:1] != b"\x0b":
            raise
    return body, False


def parse_index(body: Bytes, path: str) -> Index:
    """Read what `open_index` returns. Raises FormatError."""
    with naming(path):
        (magic, version), at = take(body, 0, 2)
        if magic != 11 or version not in range(1, 5):
            raise MalformedError(0, "no index.db of a version that is known")
        count, at = uvarint(body, at)
        size, at = uvarint(body, at)
        first, at = uvarint(body, at)
        first_time, at = varint(body, at)
        last, at = uvarint(body, at)
        last_time, at = varint(body, at)
        subjects, blocks = [], []
        number, at = uvarint(body, at)
        for _ in range(number):
            subject, at = _subject(body, at, version)
            subjects.append(subject)
        number, at = uvarint(body, at)
        for _ in range(number):
            block, at = _block_state(body, at, version, first_time)
            blocks.append(block)
        last_block, at = uvarint(body, at)
        last_hash, at = take(body, at, HASH)
        ended(body, at)
    return Index(
        version, count, size, first, first_time, last, last_time, tuple(subjects), tuple(blocks), last_block, last_hash
    )


def take_counted(data: Bytes, at: int) -> tuple[bytes, int]:
    """Read uv length | so many bytes: (these, offset behind them). Raises MalformedError."""
    size, at = uvarint(data, at)
    return take(data, at, size)


def _subject(body: Bytes, at: int, version: int) -> tuple[Subject, int]:
    name, at = take_counted(body, at)
    total, at = uvarint(body, at)
    first, at = uvarint(body, at)
    last = first
    if total > 1 or version >= 4:
        last, at = uvarint(body, at)
    return Subject(name, total, first, last), at


def _block_state(body: Bytes, at: int, version: int, base: int) -> tuple[BlockState, int]:
    number, at = uvarint(body, at)
    size, at = uvarint(body, at)
    first, at = uvarint(body, at)
    first_time, at = varint(body, at)
    last, at = uvarint(body, at)
    last_time, at = varint(body, at)
    deleted, at = uvarint(body, at)
    ttls = schedules = 0
    if version >= 2:
        ttls, at = uvarint(body, at)
    if version >= 3:
        schedules, at = uvarint(body, at)
    nodes: tuple[tuple[int, int], ...] = ()
    if deleted:
        nodes, at = _sequence_set(body, at, deleted)
    return BlockState(number, size, first, base + first_time, last, base + last_time, ttls, schedules, nodes), at


def _sequence_set(body: Bytes, at: int, expected: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """Read a set of sequences: u8 22, u8 version, u32 nodes, u32 entries, then u64 first, bits, u16 height a node."""
    start = at
    head, at = take(body, at, 10)
    magic, version, count, entries = struct.unpack("<BBII", head)
    if magic != 22 or version not in _NODE:
        raise MalformedError(start, "no set of sequences of a version that is known")
    nodes = []
    for _ in range(count):
        node, at = take(body, at, 8 + 8 * _NODE[version] + 2)
        nodes.append((int.from_bytes(node[:8], "little"), int.from_bytes(node[8:-2], "little")))
    if not sum(bits.bit_count() for _, bits in nodes) == entries == expected:
        raise MalformedError(start, "a set of sequences that has not as many as it says")
    return tuple(nodes), at


def deleted_sequences(block: BlockState) -> Iterator[int]:
    """Return the sequences that were deleted within a block, each node of the set in order."""
    for first, bits in block.deleted:
        left = bits
        while left:
            lowest = left & -left
            yield first + lowest.bit_length() - 1
            left ^= lowest


def is_of(index: Index, number: int, block: Bytes) -> bool:
    """Tell whether an index is that of a store whose last block is `number` with this plain content."""
    return index.last_block == number and index.last_hash == (bytes(block[-HASH:]) if block else bytes(HASH))


# --- o.dat ------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A place in a consumer's and in its stream's sequence."""

    consumer: int
    stream: int


class Pending(NamedTuple):
    """A delivery that is not acked: its consumer sequence (0 in version 1), and when, in whole seconds since 1970."""

    seq: int
    time: int


class ConsumerState(NamedTuple):
    """What a consumer remembers. `pending` and `redelivered` are by stream sequence; the latter counts."""

    version: int
    ack_floor: Place
    delivered: Place
    pending: dict[int, Pending]
    redelivered: dict[int, int]


def parse_consumer(body: Bytes, path: str) -> ConsumerState:
    """Read a decrypted o.dat, or the data of a snapshot of a consumer's raft group. Raises FormatError."""
    with naming(path):
        (magic, version), at = take(body, 0, 2)
        if magic != 22 or version not in {1, 2}:
            raise MalformedError(0, "no consumer state of a version that is known")
        numbers = []
        for _ in range(4):
            number, at = uvarint(body, at)
            numbers.append(number)
        ack_floor, delivered = Place(*numbers[:2]), Place(*numbers[2:])
        if version == 1:  # here it is what comes next, counted from the ack floor
            both = zip(delivered, ack_floor, strict=True)
            delivered = Place(*(max(0, ahead + floor - 1) for ahead, floor in both))
        pending: dict[int, Pending] = {}
        number, at = uvarint(body, at)
        if number:
            base, at = varint(body, at)
            for _ in range(number):
                (ahead, delivery, age), at = _pending(body, at, version)
                time = base - age if version == 2 else base + age
                pending[ack_floor.stream + ahead] = Pending(delivery and ack_floor.consumer + delivery, time)
        redelivered: dict[int, int] = {}
        number, at = uvarint(body, at)
        for _ in range(number):
            ahead, at = uvarint(body, at)
            redelivered[ack_floor.stream + ahead], at = uvarint(body, at)
        ended(body, at)
    return ConsumerState(version, ack_floor, delivered, pending, redelivered)


def _pending(body: Bytes, at: int, version: int) -> tuple[tuple[int, int, int], int]:
    ahead, at = uvarint(body, at)
    delivery = 0
    if version == 2:
        delivery, at = uvarint(body, at)
    age, at = varint(body, at)
    return (ahead, delivery, age), at


# --- raft groups ------------------------------------------------------------------------------------------------------


class Peers(NamedTuple):
    """Who belongs to a raft group: how many there should be, the ids that are known, and an extension for domains."""

    cluster_size: int
    ids: tuple[bytes, ...]
    extension: int


class Snapshot(NamedTuple):
    """A raft group's snapshot: up to which term and entry of the log, its peers, and `data` of the kind that the group has."""

    term: int
    last: int
    peers: Peers
    data: bytes


def parse_peers(raw: Bytes, path: str) -> Peers:
    """Read a peers.idx. Raises FormatError."""
    with naming(path):
        return _peers(raw, 0)


def _peers(raw: Bytes, base: int) -> Peers:
    """Read a list of peers that stands at `base` of its file."""
    try:
        head, at = take(raw, 0, 8)
        size, count = struct.unpack("<II", head)
        ids, at = take(raw, at, count * _PEER)
        extension, at = take(raw, at, 2)
        ended(raw, at)
    except MalformedError as problem:
        raise MalformedError(base + problem.offset, problem.reason) from None
    return Peers(
        size, tuple(ids[i : i + _PEER] for i in range(0, len(ids), _PEER)), int.from_bytes(extension, "little")
    )


def parse_vote(raw: Bytes, path: str) -> tuple[int, bytes]:
    """Read a tav.idx: the term, and whom this node voted for in it (empty: for nobody). Raises FormatError."""
    with naming(path):
        term, at = take(raw, 0, 8)
        if len(raw) != at:
            vote, at = take(raw, at, _PEER)
            ended(raw, at)
            return int.from_bytes(term, "little"), vote
    return int.from_bytes(term, "little"), b""


def parse_commit(raw: Bytes, group: str, path: str) -> int:
    """Read a commit.idx: the index up to which the log is committed. Raises FormatError."""
    body = hashed(raw, group, path)
    with naming(path):
        found, at = take(body, 0, 8)
        ended(body, at)
    return int.from_bytes(found, "little")


def parse_snapshot(raw: Bytes, group: str, path: str) -> Snapshot:
    """Read a snapshots/snap.<term>.<index>. Raises FormatError."""
    body = hashed(raw, group, path)
    with naming(path):
        head, at = take(body, 0, 20)
        term, last, size = struct.unpack("<QQI", head)
        peers, behind = take(body, at, size)
        return Snapshot(term, last, _peers(peers, at), bytes(body[behind:]))


def assignments(data: Bytes, path: str) -> Any:
    """Return the JSON in the data of a snapshot of _meta_: every stream and consumer of the cluster. Raises FormatError.

    Where there was none yet the data is empty.
    """
    if not data:
        return []
    with naming(path):
        plain = s2_block(data, MAX_ASSIGNMENTS)
    return json_of(plain, path)
