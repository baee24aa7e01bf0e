"""What is measured and what is wanted: the tables of works, measures and targets, and how runs become figures."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final, NamedTuple

from encfs_js.compare.loads import WINDOW
from encfs_js.compare.modes import PLAIN
from encfs_js.compare.result import Figure, Measure, Target, Work, spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from encfs_js.compare.loads import Size
    from encfs_js.compare.modes import Mode
    from encfs_js.compare.result import Spread

# Values by work, measure and mode, of each round that has one.
Values = dict[tuple[str, str, str], dict[int, float]]

SCENARIOS: Final = {  # the works of each function of `loads`, and of `cluster`, in their order
    "publish": ("publish-64", "publish-4k", "publish-64k"),
    "stream": ("publish-512", "restart", "replay", "get", "restart-kill"),
    "single": ("publish-one", "kv", "purge"),
    "always": ("publish-always",),
    "cluster": ("cluster",),
}
COLD: Final = {"restart", "replay", "get", "restart-kill"}
NEAR: Final = 0.85  # of the load generator's ceiling: a mode beyond it may have been held up by the load generator

MEASURES: Final = (
    Measure("rate", "rate", "1/s", "more"),
    Measure("synced", "rate until all is on the disk", "1/s", "more"),
    Measure("time", "time", "s", "less"),
    Measure("p50", "median latency", "s", "less"),
    Measure("p99", "99th percentile of latency", "s", "less"),
    Measure("max", "longest latency", "s", "less"),
    Measure("cpu.server", "CPU of nats-server", "s", "less"),
    Measure("cpu.daemon", "CPU of the daemon", "s", "less"),
    Measure("memory.server", "memory of nats-server", "bytes", "less"),
    Measure("memory.daemon", "memory of the daemon", "bytes", "less"),
    Measure("disk", "on the disk", "bytes", "less"),
    Measure("disk.payload", "on the disk for each byte of payload", "ratio", "less"),
    Measure("blocks", "message blocks", "bytes", "less"),
    Measure("written", "written to the disk", "bytes", "less"),
)
_SPEEDS: Final = ("rate", "p50", "p99", "max")
_COSTS: Final = ("cpu.server", "cpu.daemon", "memory.server", "memory.daemon")


class Rule(NamedTuple):
    """A target of the mounts. of: a mode, or "server" for the server's own encryption with the same cipher."""

    works: tuple[str, ...]
    measure: str
    of: str
    limit: float


_SATURATED: Final = ("publish-64", "publish-512", "publish-4k", "publish-64k")
_ALL: Final = tuple(work for works in SCENARIOS.values() for work in works)
_TIMED: Final = ("purge", "restart", "restart-kill")
RULES: Final = (
    Rule(_SATURATED, "rate", PLAIN.name, 0.90),
    Rule(_SATURATED, "rate", "server", 1.1),
    Rule(("replay",), "rate", PLAIN.name, 0.95),
    Rule(("publish-always",), "p50", PLAIN.name, 1.3),
    Rule(("restart", "restart-kill"), "time", PLAIN.name, 1.2),
    Rule(("publish-512",), "blocks", PLAIN.name, 1.01),
    Rule(tuple(w for w in _ALL if w not in (*_TIMED, "publish-always")), "rate", "gocryptfs", 1.0),
    Rule(_TIMED, "time", "gocryptfs", 1.0),
    Rule(("publish-always",), "p50", "gocryptfs", 1.0),
)


def lead(work: str) -> str:
    """Return the measure that a work comes to last, and that stands for it."""
    return "time" if work in _TIMED else "rate"


def expected(work: str, *, daemon: bool, disk: bool) -> set[str]:
    """Return the measures that a work comes to. daemon: whether a daemon serves it; disk: whether writes can be counted."""
    extra = {
        **dict.fromkeys(_SATURATED, ("synced", "written")),
        "publish-512": ("synced", "written", "disk", "disk.payload", "blocks"),
        "cluster": ("written",),
        "purge": ("written",),
    }
    speeds = (lead(work),) if work in (*_TIMED, "replay") else _SPEEDS
    found = {*speeds, *_COSTS, *extra.get(work, ())}
    return found - (set() if daemon else {"cpu.daemon", "memory.daemon"}) - (set() if disk else {"written"})


def works(size: Size, *, cold: bool, ceilings: dict[str, Spread]) -> list[Work]:
    """Return what is done, with how much. cold: whether the page cache can be dropped; ceilings: rates by work."""
    usual = f"{size.usual:,} messages of 512 bytes"
    told = {
        "publish-64": ("publish, 64 bytes", _saturating(size.small, "64 bytes")),
        "publish-4k": ("publish, 4 KiB", _saturating(size.page, "4 KiB")),
        "publish-64k": ("publish, 64 KiB", _saturating(size.large, "64 KiB")),
        "publish-512": ("publish, 512 bytes", _saturating(size.usual, "512 bytes")),
        "restart": ("restart", f"nats-server is started on {usual} after a clean stop, until it has counted them."),
        "replay": ("replay", f"An ordered push consumer reads {usual}."),
        "get": ("get at random", f"{size.gets:,} of {usual} are read one after the other, by direct gets."),
        "restart-kill": ("restart after kill -9", "As restart, but after SIGKILL: index.db lacks the last messages."),
        "publish-one": ("publish, one at a time", f"{size.one:,} messages of 512 bytes, each after the ack before."),
        "kv": ("key-value puts", f"{size.puts:,} puts of 128 bytes to 1,000 keys, history 5, 16 at a time."),
        "purge": ("purge by subject", _purged(size.purged)),
        "publish-always": (
            "publish, each synced",
            f"{size.always:,} messages of 512 bytes one at a time, to a server with sync_interval: always.",
        ),
        "cluster": (
            "publish to three replicas",
            f"{size.replicated:,} messages of 512 bytes into a stream of three replicas, in a cluster of three servers.",
        ),
    }
    return [Work(name, *told[name], cold if name in COLD else None, ceilings.get(name), None) for name in _ALL]


def _saturating(messages: int, size: str) -> str:
    return f"{messages:,} messages of {size}, as fast as the server acknowledges them, {WINDOW} chunks in flight."


def _purged(messages: int) -> str:
    return (
        f"Two of three subjects are purged from {messages:,} messages of 512 bytes. The time is that of the requests; CPU and "
        "bytes written count until the server has compacted the blocks."
    )


def figures(values: Values, modes: Sequence[Mode]) -> list[Figure]:
    """Return a figure for each work, measure and mode that has values, with ratios to plain and targets."""
    found = []
    for work in _ALL:
        for measure in MEASURES:
            for mode in modes:
                mine = values.get((work, measure.name, mode.name))
                if mine:
                    plain = None if mode.kind == "plain" else ratio(mine, values.get((work, measure.name, PLAIN.name)))
                    marks = list(_targets(values, work, measure, mode, modes)) if mode.kind == "mount" else []
                    found.append(Figure(work, measure.name, mode.name, spread(_in_order(mine)), plain, marks))
    return found


def _in_order(values: dict[int, float]) -> list[float]:
    return [values[number] for number in sorted(values)]


def ratio(mine: dict[int, float], other: dict[int, float] | None) -> Spread | None:
    """Return the ratios of values of the same round; None where no round has both, or the other's are 0."""
    have = [number for number in sorted(mine) if (other or {}).get(number)]
    return spread([mine[number] / other[number] for number in have]) if have and other else None


def _targets(values: Values, work: str, measure: Measure, mode: Mode, modes: Sequence[Mode]) -> Iterable[Target]:
    for rule in RULES:
        if work in rule.works and measure.name == rule.measure:
            of = rule.of
            if of == "server":
                of = next((m.name for m in modes if m.kind == "server" and m.cipher == mode.cipher), "")
            found = ratio(values[work, measure.name, mode.name], values.get((work, measure.name, of)))
            if found is not None:
                met = found.median >= rule.limit if measure.better == "more" else found.median <= rule.limit
                yield Target(of, rule.limit, found.median, met)


def with_shares(listed: Sequence[Work], found: Sequence[Figure]) -> list[Work]:
    """Return the works with the highest median rate of any mode as a part of the load generator's ceiling."""
    told = []
    for work in listed:
        rates = [figure.value.median for figure in found if figure.work == work.name and figure.measure == "rate"]
        share = max(rates) / statistics.median(work.ceiling.values) if work.ceiling is not None and rates else None
        told.append(Work(work.name, work.title, work.what, work.cold, work.ceiling, share))
    return told
