"""What a damaged page means in NATS's words, purely: which stream, which block, which messages are gone with it.

A message block is records in a row (jetstream.py). Behind a hole in it the next record is found by its hash; what was
between the last record before the hole and the next one behind it is what may be lost.
"""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from encfs_js.jetstream import BEFORE_SUBJECT, Finder, head_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from encfs_js.jetstream import Head, Record

    Bytes = bytes | memoryview

_BLOCK: Final = re.compile(r"([1-9][0-9]*)\.(blk|key|idx|fss)")


class Subject(NamedTuple):
    """What a file is. what: "" for a message block, else in words; account, stream or group: None where it is of none."""

    what: str
    account: str | None = None
    stream: str | None = None
    group: str | None = None
    consumer: str | None = None
    block: int | None = None

    @property
    def owner(self) -> str:
        """The name that the hashes of its blocks are made with: the stream's or raft group's."""
        return self.stream or self.group or ""

    def __str__(self) -> str:
        """Say it: `stream ORDERS of account $G, block 3`."""
        parts = []
        if self.stream is not None:
            parts.append(f"stream {_shown(self.stream)} of account {_shown(self.account or '')}")
        elif self.group is not None:
            parts.append(f"raft group {_shown(self.group)}")
        if self.consumer is not None:
            parts.append(f"consumer {_shown(self.consumer)}")
        if self.block is not None:
            parts.append(f"block {self.block}")
        if self.what:
            parts.append(self.what)
        return ", ".join(parts)


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)


_METAFILES: Final = {
    "meta.inf": "its configuration",
    "meta.sum": "the checksum of its configuration",
    "meta.key": "nats-server's own key for it",
    "o.dat": "its state: what was delivered and acked",
}
_STATES: Final = {
    "index.db": "its index, which nats-server rebuilds; what limits or a purge removed may come back",
    "thw.db": "when its messages expire, which nats-server rebuilds",
    "sched.db": "its scheduled messages, which nats-server rebuilds",
}
_OWN: Final = {
    "sources.db": "how far it has copied from its sources",
    "peers.idx": "its peers",
    "tav.idx": "its term and vote",
    "commit.idx": "how far its log is committed",
}
_OF_BLOCK: Final = {
    "key": "nats-server's own key for it",
    "idx": "its index (nats-server 2.9)",
    "fss": "its subjects (nats-server 2.9)",
}


def subject(path: bytes) -> Subject:
    """Tell what a file is by its path in the store."""
    parts = os.fsdecode(path).split("/")
    for i in range(1, len(parts) - 2):
        if parts[i] in {"streams", "_js_"}:
            name, rest = parts[i + 1], parts[i + 2 :]
            if parts[i] == "_js_":
                return _of(rest, Subject("", group=name))
            return _of(rest, Subject("", account=parts[i - 1], stream=name.removeprefix(".")))
    return Subject("")


def _of(rest: list[str], owner: Subject) -> Subject:
    leaf = rest[-1].removesuffix(".tmp")
    left = " (a leftover of nats-server's)" if leaf != rest[-1] or rest[0] in {"__msgs__", "__new_msgs__"} else ""
    if len(rest) == 1 and (what := _METAFILES.get(leaf) or _OWN.get(leaf)):
        return owner._replace(what=what + left)
    if len(rest) == 3 and rest[0] == "obs" and (what := _METAFILES.get(leaf)):
        return owner._replace(consumer=rest[1], what=what + left)
    if len(rest) == 2 and rest[0] in {"msgs", "__msgs__", "__new_msgs__"}:
        if what := _STATES.get(leaf):
            return owner._replace(what=what + left)
        if match := _BLOCK.fullmatch(leaf):
            what = _OF_BLOCK.get(match[2], "")
            return owner._replace(block=int(match[1]), what=what or (f"a block{left}" if left else ""))
    if len(rest) == 2 and rest[0] == "snapshots":
        return owner._replace(what="a snapshot of its state")
    return owner._replace(what="/".join(_shown(part) for part in rest))


# --- sequences --------------------------------------------------------------------------------------------------------


class Bounds(NamedTuple):
    """What is known of a block from elsewhere: its first and its last sequence, None for not known; what is deleted in it."""

    first: int | None = None
    last: int | None = None
    deleted: Collection[int] = ()


class Lost(NamedTuple):
    """What a hole may have cost: ranges (first, last) of sequences, in order; None for an end that is not known."""

    ranges: tuple[tuple[int | None, int | None], ...]

    def told(self, things: str) -> str:
        """Say it: `messages 1201..1217, 1219`. things: what has these sequences."""
        if not self.ranges:
            return f"no {things}"
        if self == UNKNOWN:
            return f"{things} unknown"
        return f"{things} " + ", ".join(
            str(first) if first == last else f"{'?' if first is None else first}..{'?' if last is None else last}"
            for first, last in self.ranges
        )


UNKNOWN: Final = Lost(((None, None),))


class _Gap(NamedTuple):
    """Bytes that could not be read, and the sequences that were there: from `low` up to `high`, None where unknown."""

    start: int
    end: float
    low: int | None
    high: int | None


def lost(block: Bytes, holes: Sequence[tuple[int, int]], name: str, bounds: Bounds) -> list[Lost]:
    """Return what each hole of a message block may have cost; UNKNOWN where that cannot be told.

    block: its plain bytes, anything in the holes. holes: (start, end) of bytes, in order; one that ends behind `block` says
    that more was there. name: jetstream.block_name. A message that a tombstone of this block, or `bounds`, calls deleted is
    not lost.

    Pages that authenticate hold what was written to them, so the head of a record in one of them is taken at its word; only
    the first record, and the first one behind a hole, must match its hash.
    """
    view = memoryview(block)
    if bytes(view[:3]) == b"cmp" and holes[0][0] >= 3:  # of a compressed block nothing can be read without the whole
        whole = [_Gap(0, math.inf, bounds.first, bounds.last)]
        return [_cost(whole, set(bounds.deleted), hole) for hole in holes]
    first = head_of(view, 0)
    if first is not None and first.length <= len(view) and not _overlaps(holes, 0, first.length):
        found = Finder(view[: first.length], name).find(0)
        if found is None:
            return [UNKNOWN for _ in holes]
    gaps: list[_Gap] = []
    deleted = set(bounds.deleted)
    seen = 0  # the last sequence
    start: int | None = None  # where the gap begins that no message has ended

    def fits(record: Record) -> bool:
        return record.tombstone or (seen < record.seq and (bounds.last is None or record.seq <= bounds.last))

    def low() -> int | None:
        return max(seen + 1, bounds.first or 1) if seen or bounds.first is not None else None

    for at, end, head in _heads(view, holes, name, fits):
        if head is None:
            start = at if start is None else start
        elif head.tombstone:
            deleted.add(head.seq)
        else:
            if start is not None:
                gaps.append(_Gap(start, at, low(), head.seq - 1))
                start = None
            if not head.erased and _overlaps(holes, at, end):
                gaps.append(_Gap(at, end, head.seq, head.seq))
            seen = max(seen, head.seq)
    if start is not None:
        gaps.append(_Gap(start, math.inf, low(), bounds.last))
    return [_cost(gaps, deleted, hole) for hole in holes]


def edges(block: Bytes) -> tuple[int, int] | None:
    """Return the first and the last sequence of a sound plain block; None if it has none, or is none of plain records."""
    heads = [head for _, _, head in _heads(memoryview(block), [], "", lambda _: False)]
    if None in heads:
        return None
    found = [head.seq for head in heads if head is not None and not head.tombstone]
    return (min(found), max(found)) if found else None


def _heads(
    view: memoryview, holes: Sequence[tuple[int, int]], name: str, fits: Callable[[Record], bool]
) -> Iterator[tuple[int, int, Head | None]]:
    """Yield (start, end, head) of the records whose head can be read, and None for bytes in between.

    fits: whether a record that was found behind a hole can be the next one.
    """
    at, limit, finder = 0, len(view), Finder(view, name)
    while at < limit:
        hole = next(((start, end) for start, end in holes if end > at), (limit, limit))
        if at + BEFORE_SUBJECT <= hole[0]:
            head = head_of(view, at)
            if head is None or (at + head.length > limit and holes[-1:] and holes[-1][1] <= limit):
                yield at, limit, None  # no record, although it can be read
                return
            yield at, at + head.length, head
            at += head.length
            continue
        end = hole[1]
        while end < limit:
            record = finder.find(end)
            if record is None:
                end = limit
            elif (next_hole := _overlaps(holes, record.offset, record.offset + record.length)) or not fits(record):
                end = next_hole or record.offset + 1
            else:
                end = record.offset
                break
        yield at, min(end, limit), None
        at = end
    if holes and holes[-1][1] > limit:
        yield max(at, limit), holes[-1][1], None


def _overlaps(holes: Sequence[tuple[int, int]], start: int, end: int) -> int:
    """Return the end of the first hole that has a part in start..end, 0 if none has."""
    return next((high for low, high in holes if low < end and start < high), 0)


def _cost(gaps: Sequence[_Gap], deleted: Collection[int], hole: tuple[int, int]) -> Lost:
    """Return what the gaps that a hole has a part in have cost."""
    ranges: list[tuple[int | None, int | None]] = []
    for gap in gaps:
        if not (gap.start < hole[1] and hole[0] < gap.end):
            continue
        start = gap.low
        if start is None or gap.high is None:
            ranges.append((start, gap.high))
            continue
        for seq in sorted(seq for seq in deleted if start <= seq <= gap.high):
            if start < seq:
                ranges.append((start, seq - 1))
            start = seq + 1
        if start <= gap.high:
            ranges.append((start, gap.high))
    joined: list[tuple[int | None, int | None]] = []
    for first, last in ranges:
        if joined and first is not None and joined[-1][1] == first - 1:
            joined[-1] = joined[-1][0], last
        else:
            joined.append((first, last))
    return Lost(tuple(joined))
