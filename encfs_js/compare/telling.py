"""What was observed of an attack, in one or two sentences with numbers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from encfs_js.compare.judging import NOTHING, judge, plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from encfs_js.compare.judging import Seen
    from encfs_js.compare.result import Word

_LINE: Final = 150  # characters of a log line that are shown
_VERIFY: Final = 60  # and of what `verify` says
# From the worst for who owns the data.
_WORST: Final[tuple[Word, ...]] = ("unnoticed", "data destroyed", "detected", "refused", "intact")
_SECUREFS: Final = re.compile(r"\[Error\].* because it encounters exception ")
_STREAMS: Final = re.compile(r"jetstream/[^/ ]+/streams/")
_BEFORE: Final = re.compile(r"^\[Error\] \[int [^]]*\] *|^encfs-js: ")


def worst(words: Sequence[Word]) -> Word:
    """Return the worst of some words for who owns the data: what an attacker who tried several ways reached."""
    return min(words, key=_WORST.index)


def together(seen: Sequence[tuple[str, Seen]]) -> tuple[Word, str]:
    """Return the worst word of several ways, each with its label, and what was seen of all."""
    words = [judge(each) for _, each in seen]
    if len(seen) == 1:
        return words[0], tell(seen[0][1])
    told = [f"{label}, {word}: {inner(tell(each))}." for (label, each), word in zip(seen, words, strict=True)]
    return worst(words), " ".join(f"{each[:1].upper()}{each[1:]}" for each in told)


def tell(seen: Seen) -> str:
    """Say what was seen."""
    if seen.refused:
        return sentence([f'it did not start: "{short(seen.refused)}"', *_after(seen)])
    parts = []
    if seen.altered:
        parts.append(f"{_messages(seen.altered)} {_were(seen.altered)} served, and not as last stored")
    if seen.missing:
        parts.append(f"{_messages(seen.missing)} {_were(seen.missing)} answered with 404")
    if seen.unanswered:
        parts.append(f"{_messages(seen.unanswered)} {_were(seen.unanswered)} answered with an error")
    if seen.consumers:
        names = ", ".join(seen.consumers)
        parts.append(
            f"{plural(len(seen.consumers), 'consumer')} {_were(seen.consumers)} gone or set elsewhere ({names})"
        )
    if not seen.hurt:
        parts.append("every message and consumer was served as before")
    parts.append(f'log: "{short(_line(seen.said))}"' if seen.said else "nothing was logged")
    return sentence([*parts, *_after(seen)])


def _after(seen: Seen) -> list[str]:
    parts = []
    if seen.found == NOTHING:
        parts.append("verify finds nothing")
    elif seen.found:
        parts.append(f'verify: "{short(seen.found, _VERIFY)}"')
    if seen.lost:
        parts.append(f"{seen.lost[0]}{f' and {len(seen.lost) - 1} more' if len(seen.lost) > 1 else ''}")
    if not seen.undone:
        parts += [] if seen.back else [f"in the end gone: {short(seen.still)}"]
    elif not seen.back:
        parts.append(f"with the attack undone still missing: {short(seen.still)}")
    elif seen.lost:
        parts.append("a copy of the files that were attacked brings all back")
    elif seen.hurt or seen.refused:
        parts.append("with the attack undone all is back")
    return parts


def _line(said: Sequence[str]) -> str:
    """Return the line that says most: one that names the damage, and the daemon's before the server's."""
    for mark in ("does not authenticate", "corrupt", "checksum", "authentication failed"):
        for line in reversed(said):
            if mark in line:
                return line
    return said[0]


def short(line: str, most: int = _LINE) -> str:
    """Return a line of a log, shortened: without what stands before each, and paths from the stream on."""
    line = _STREAMS.sub("", _BEFORE.sub("", _SECUREFS.sub("", " ".join(line.split()))))
    return line if len(line) <= most else line[: most - 3].rstrip() + "..."


def sentence(parts: Sequence[str]) -> str:
    """Return parts as one sentence."""
    text = "; ".join(part.removesuffix(".") for part in parts)
    return f"{text[:1].upper()}{text[1:]}."


def inner(told: str) -> str:
    """Return a sentence as a part of another."""
    return f"{told[:1].lower()}{told[1:]}".removesuffix(".")


def _messages(names: Sequence[str]) -> str:
    stream = names[0].split()[0]
    short = [names[0], *(name.removeprefix(f"{stream} ") for name in names[1:])]
    which = " and ".join(short) if len(short) < 3 else f"{short[0]} to {short[-1]}"
    return f"{plural(len(names), 'message')} ({which})"


def _were(names: Sequence[str]) -> str:
    return "was" if len(names) == 1 else "were"
