"""What a comparison found, as the report shows it and as `compare.json` has it (format 1).

Rates are per second, times are seconds, sizes are bytes. Everything is as measured: rounding is the report's.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

FORMAT = 1

Better = Literal["more", "less"]
Kind = Literal["plain", "server", "mount", "reference"]
# What became of an attack. refused: it did not start, or nothing of what was attacked was served; an error or a log line says so,
# and nothing was destroyed. detected: the rest was served, and an error or a log line says so. unnoticed: what is not genuine was
# served, or data was missing, and nobody said anything. data destroyed: the software itself removed or cut what was there. A leak
# is `found`, `partly found` or `hidden`; what came through a crash or an attack whole is `intact`. `not run`: see what was seen.
Word = Literal[
    "refused", "detected", "unnoticed", "data destroyed", "hidden", "partly found", "found", "intact", "not run"
]


class Spread(msgspec.Struct, frozen=True):
    """One value for each round, in the order of the rounds, with median and range."""

    values: list[float]
    median: float
    min: float
    max: float


def spread(values: Iterable[float]) -> Spread:
    """Return the values with their median and range. Raises ValueError for none."""
    found = list(values)
    if not found:
        raise ValueError("no values")
    return Spread(found, statistics.median(found), min(found), max(found))


class Machine(msgspec.Struct, frozen=True):
    """Where it was measured."""

    cores: int
    processor: str
    memory: int  # bytes
    kernel: str
    file_system: str
    python: str
    cryptography: str
    openssl: str
    nats_server: str
    references: list[str]  # versions of the outside references: "gocryptfs 2.3"
    load_before: float  # of the last minute, before anything was run


class Mode(msgspec.Struct, frozen=True):
    """One way of keeping a store. why: why it did not run, or an empty string."""

    name: str  # "mount chachapoly"
    title: str
    kind: Kind
    cipher: str
    ran: bool
    why: str


class Work(msgspec.Struct, frozen=True):
    """One kind of work. cold: whether the page cache was dropped before; null where warm is meant."""

    name: str  # "publish-512"
    title: str
    what: str  # one sentence: what is done, with how much
    cold: bool | None
    ceiling: Spread | None  # the same load against a server that stores nothing on a disk, rate
    ceiling_share: float | None  # the highest rate of any mode as a part of it


class Measure(msgspec.Struct, frozen=True):
    """One kind of figure. better: which way; null where neither is meant."""

    name: str  # "rate", "p99"
    title: str
    unit: str  # "1/s", "s", "bytes", "ratio"
    better: Better | None


class Target(msgspec.Struct, frozen=True):
    """What encfs_js wants to reach. of: `plain` or the mode compared with; limit: of the median of the ratios."""

    of: str
    limit: float
    reached: float
    met: bool


class Figure(msgspec.Struct, frozen=True):
    """One measure of one work in one mode. ratio: to plain in the same round; null for plain and where plain has 0."""

    work: str
    measure: str
    mode: str
    value: Spread
    ratio: Spread | None
    targets: list[Target]


class Failure(msgspec.Struct, frozen=True):
    """A run that failed; the others went on."""

    mode: str
    work: str  # or the name of an attack
    round: int  # 0: not of a round
    error: str


class Outcome(msgspec.Struct, frozen=True):
    """What an attack came to in one mode. saw: what was seen, one or two sentences."""

    mode: str
    word: Word
    saw: str


class Attack(msgspec.Struct, frozen=True):
    """One attack, or one search for what leaks."""

    name: str
    title: str
    what: str  # what the attacker does, one or two sentences
    kind: Literal["leak", "attack", "mistake"]
    outcomes: list[Outcome]


class Result(msgspec.Struct, frozen=True):
    """All of it."""

    format: int
    encfs_js: str  # version
    made: str  # UTC, ISO 8601
    took: float
    quick: bool
    rounds: int
    interrupted: bool
    machine: Machine
    notes: list[str]  # what a reader has to know: "not root: ..."
    modes: list[Mode]
    works: list[Work]
    measures: list[Measure]
    figures: list[Figure]
    attacks: list[Attack]
    failures: list[Failure]


def encode(result: Result) -> bytes:
    """Return compare.json."""
    return msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"


def decode(data: bytes) -> Result:
    """Return what a compare.json holds. Raises msgspec.DecodeError."""
    return msgspec.json.decode(data, type=Result)
