"""What nats-server notes beside a stream's state: thw.db, sched.db and sources.db, purely.

They lie plain also where nats-server encrypts, subjects and the names of sources among them, and have no checksum:

    version u8 = 1 | how many u64 | stamp u64 | notes

As in `serverstate`: what is wrong is a FormatError that names path and offset, and no reader makes more than a fixed multiple
of what it is given. Times are in nanoseconds since 1970. Measured on stores of nats-server 2.15.1.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from encfs_js.jetstream import ended, naming, take
from encfs_js.natscodec import MalformedError, uvarint, varint
from encfs_js.serverstate import take_counted

if TYPE_CHECKING:
    from collections.abc import Callable

    Bytes = bytes | memoryview
    Note = TypeVar("Note")


class Expiry(NamedTuple):
    """When a message with a TTL of its own ends."""

    time: int
    seq: int


class Schedule(NamedTuple):
    """When a message that is a schedule is due next, and its subject."""

    subject: bytes
    time: int
    seq: int


class Source(NamedTuple):
    """Up to which sequence of a source a stream has copied it. `name` tells sources apart; `identity`: the source's, if known."""

    name: bytes
    seq: int
    identity: bytes


def parse_ttls(raw: Bytes, path: str) -> tuple[int, list[Expiry]]:
    """Read a thw.db: its stamp is the sequence that came next. Raises FormatError."""
    return _noted(raw, path, _expiry)


def parse_schedules(raw: Bytes, path: str) -> tuple[int, list[Schedule]]:
    """Read a sched.db: its stamp is the sequence that came next. Raises FormatError."""
    return _noted(raw, path, _schedule)


def parse_sources(raw: Bytes, path: str) -> tuple[int, list[Source]]:
    """Read a sources.db: its stamp is the sequence that came next. Raises FormatError."""
    return _noted(raw, path, _source)


def _noted(raw: Bytes, path: str, read: Callable[[Bytes, int], tuple[Note, int]]) -> tuple[int, list[Note]]:
    with naming(path):
        head, at = take(raw, 0, 17)
        version, count, stamp = struct.unpack("<BQQ", head)
        if version != 1:
            raise MalformedError(0, "no file of a version that is known")
        notes = []
        for _ in range(count):
            note, at = read(raw, at)
            notes.append(note)
        ended(raw, at)
    return stamp, notes


def _expiry(raw: Bytes, at: int) -> tuple[Expiry, int]:
    time, at = varint(raw, at)
    seq, at = uvarint(raw, at)
    return Expiry(time, seq), at


def _schedule(raw: Bytes, at: int) -> tuple[Schedule, int]:
    size, at = take(raw, at, 2)
    subject, at = take(raw, at, int.from_bytes(size, "little"))
    note, at = _expiry(raw, at)
    return Schedule(subject, *note), at


def _source(raw: Bytes, at: int) -> tuple[Source, int]:
    name, at = take_counted(raw, at)
    seq, at = uvarint(raw, at)
    identity, at = take_counted(raw, at)
    return Source(name, seq, identity), at
