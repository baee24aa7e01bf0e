"""How the report says things: numbers with units, ranges, ratios, dates, and what stands for the outcome of an attack."""

from __future__ import annotations

import datetime as dt
import math
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from encfs_js.compare.result import Better, Figure, Machine, Result, Spread, Target, Word

# The largest first; a value takes the first unit that is not above it, and the last one if all are.
_UNITS: Final[dict[str, tuple[tuple[float, str], ...]]] = {
    "1/s": ((1e9, " G/s"), (1e6, " M/s"), (1e3, " k/s"), (1, "/s")),
    "s": ((1, " s"), (1e-3, " ms"), (1e-6, " µs"), (1e-9, " ns")),
    "bytes": ((2**40, " TiB"), (2**30, " GiB"), (2**20, " MiB"), (2**10, " KiB"), (1, " B")),
}

Level = Literal["good", "noticed", "poor", "bad", "worst", "none"]
LEVELS: Final[dict[Word, Level]] = {
    "refused": "good",
    "hidden": "good",
    "intact": "good",
    "detected": "noticed",
    "partly found": "poor",
    "found": "bad",
    "unnoticed": "bad",
    "data destroyed": "worst",
    "not run": "none",
}
# Shapes that differ without colour, and that no font draws as an emoji.
SYMBOLS: Final[dict[Level, str]] = {"good": "✓", "noticed": "◆", "poor": "◐", "bad": "✗", "worst": "■", "none": "○"}
MEANINGS: Final[dict[Word, str]] = {
    "refused": "not let in, with an error that names it; nothing else was hurt",
    "hidden": "the search found nothing",
    "intact": "what may not be hurt was not",
    "detected": "not served as genuine, and an error or a log line says so",
    "partly found": "the search found a part",
    "found": "the search found it",
    "unnoticed": "served as genuine, or data went missing, and nobody said anything",
    "data destroyed": "the software itself removed or cut what was there",
    "not run": "see what was seen",
}
KINDS: Final = {
    "leak": "What leaks: a search through what lies on the disk",
    "attack": "Attacks: somebody changes what lies on the disk",
    "mistake": "Mistakes and accidents",
}

METHOD: Final = (
    "In each round every mode does the same work, one after the other, with a store and processes of its own.",
    "A ratio divides a value by that of the plain directory in the same round.",
    "The median of the ratios is given, not the ratio of the medians.",
)
METHOD_ROUNDS: Final = (
    "Brackets hold the least and the most of all rounds: no round was left out, unless it failed.",
    "Where the summary calls a mode faster or slower, the ranges of the ratios do not overlap.",
)
METHOD_CEILING: Final = (
    "The load generator has a ceiling of its own: the same load against a server that stores nothing on a disk. Where the "
    "fastest mode comes near to it, modes may be further apart than the ratios show."
)


def significant(value: float) -> str:
    """Return a number with three significant digits, without an exponent: 1,230, 12.3, 0.00123."""
    rounded = float(f"{value:.3g}")
    if not rounded:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{places}f}"


def ratio(value: float) -> str:
    """Return a ratio with two decimals; one that would be 0.00 with its first digit."""
    if value and abs(value) < 0.005:
        return f"{float(f'{value:.1g}'):f}".rstrip("0")
    return f"{value:,.2f}"


def _unit(value: float, unit: str) -> tuple[float, str]:
    rounded = max(abs(float(f"{value:.3g}")), abs(value))  # 999,600 is 1.00 M, and 1,024 bytes are a KiB
    units = _UNITS[unit]
    if not rounded:
        return units[-1] if unit != "s" else units[0]
    # 1 - 1e-9: 0.001 is a millisecond, whatever its last bit says.
    return next((pair for pair in units if rounded >= pair[0] * (1 - 1e-9)), units[-1])


def amount(value: float, unit: str) -> str:
    """Return a value of a unit ("1/s", "s", "bytes", "ratio" or any other) for people: "541 k/s", "345 µs", "1.20"."""
    if unit == "ratio":
        return ratio(value)
    if unit not in _UNITS:
        return f"{significant(value)} {unit}".rstrip()
    scale, name = _unit(value, unit)
    return significant(value / scale) + name


def scale(value: float, unit: str) -> float:
    """Return what one of the unit is that a value is shown in: 1048576 for a value of some MiB."""
    return _unit(value, unit)[0] if unit in _UNITS else 1.0


def tick(value: float, unit: str) -> str:
    """Return a value for an axis, without zeros at its end: "2 s", "1.5 ms"."""
    number, space, name = amount(value, unit).partition(" ")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + space + name


def between(found: Spread, unit: str) -> str:
    """Return the range in the unit that the median is shown in, "[510 .. 562]"; an empty string for one value only."""
    if len(found.values) < 2:
        return ""
    if unit == "ratio":
        return f"[{ratio(found.min)} .. {ratio(found.max)}]"
    name = ""
    if not found.median and found.max:  # the median is 0, of whatever unit
        name = amount(found.max, unit).lstrip("-0123456789.,")
    one = scale(found.median or found.max, unit)
    return f"[{significant(found.min / one)} .. {significant(found.max / one)}{name}]"


def spread(found: Spread, unit: str) -> str:
    """Return median and range in one: "541 k/s [510 .. 562]"."""
    return f"{amount(found.median, unit)} {between(found, unit)}".rstrip()


def of_plain(found: Spread, better: Better | None, of: str = "plain") -> str:
    """Return a ratio in words: "0.91 [0.88 .. 0.93] of plain", "1.30 [1.22 .. 1.38] times plain"."""
    return f"{spread(found, 'ratio')} {'of' if better == 'more' else 'times'} {of}"


def which_way(better: Better | None) -> str:
    """Return which way is better, in words; an empty string where neither is."""
    return {"more": "more is better", "less": "less is better", None: ""}[better]


def limit(target: Target, better: Better | None) -> str:
    """Return what a target asks for: "at least 0.78 of plain"."""
    if better == "more":
        return f"at least {ratio(target.limit)} of {target.of}"
    return f"at most {ratio(target.limit)} times {target.of}"


def counted(number: int, one: str, many: str = "") -> str:
    """Return "1 round", "3 rounds"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def rounds(figure: Figure, result: Result) -> str:
    """Return how many rounds a figure has where it is not all of them, else an empty string."""
    have = len(figure.value.values)
    return "" if have == result.rounds else f"{have} of {counted(result.rounds, 'round')}"


def cold(state: bool | None) -> str:
    """Return what a work found in the page cache, in words."""
    return {
        True: "cold: page cache dropped before",
        False: "not cold: the page cache could not be dropped",
        None: "warm",
    }[state]


def duration(seconds: float) -> str:
    """Return how long it took: "42 min", "2 h 5 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def date(made: str) -> str:
    """Return an ISO 8601 time of UTC for people, or as it is when it is none."""
    try:
        when = dt.datetime.fromisoformat(made)
    except ValueError:
        return made
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def listed(names: list[str]) -> str:
    """Return names as a phrase: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def machine(found: Machine) -> list[tuple[str, str]]:
    """Return a machine as names and values."""
    rows = [
        ("processor", f"{found.processor}, {counted(found.cores, 'core')}"),
        ("memory", amount(found.memory, "bytes")),
        ("kernel", found.kernel),
        ("file system", found.file_system),
        ("nats-server", found.nats_server),
        ("Python", f"{found.python}, cryptography {found.cryptography}, {found.openssl}"),
        ("beside it", ", ".join(found.references)),
        ("load before", f"{found.load_before:.2f} in the last minute"),
    ]
    return [(name, value) for name, value in rows if value]
