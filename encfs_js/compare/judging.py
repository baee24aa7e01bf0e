"""What was observed of an attack, and the one word for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from encfs_js.compare.reading import MISSING

if TYPE_CHECKING:
    from encfs_js.compare.reading import Reading
    from encfs_js.compare.result import Word

NOTHING: Final = "nothing"  # what `verify` finds where all is sound


@dataclass(frozen=True, kw_only=True)
class Differences:
    """What a server served otherwise than before. Messages are named "TRANSFERS 3", consumers "TRANSFERS bookkeeper".

    altered: served, but not what was last stored there (different, or deleted before, or never published); missing: the server
    says that there is none; unanswered: an error or nothing instead; consumers: those that are gone or stand elsewhere.
    """

    altered: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unanswered: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()

    @property
    def hurt(self) -> bool:
        """Whether anything is otherwise."""
        return bool(self.altered or self.missing or self.unanswered or self.consumers)


def compare(seen: Reading, wanted: Reading) -> Differences:
    """Return what is otherwise than wanted."""
    found: dict[str, list[str]] = {"altered": [], "missing": [], "unanswered": []}
    for stream, messages in wanted.messages.items():
        for sequence, original in messages.items():
            answer = seen.messages.get(stream, {}).get(sequence, MISSING)
            if answer == original or (isinstance(answer, str) and isinstance(original, str)):
                continue
            what = "altered" if not isinstance(answer, str) else "missing" if answer == MISSING else "unanswered"
            found[what].append(f"{stream} {sequence}")
    consumers = []
    for (stream, name), state in wanted.consumers.items():
        now = seen.consumers.get((stream, name), "gone")
        # How many messages are left for it follows from which there are, and is not its own state.
        if now[:2] != state[:2]:
            consumers.append(f"{stream} {name}")
    return Differences(
        altered=tuple(found["altered"]),
        missing=tuple(found["missing"]),
        unanswered=tuple(found["unanswered"]),
        consumers=tuple(consumers),
    )


def count(differences: Differences) -> str:
    """Say how many messages and consumers are otherwise, "" if none is."""
    messages = len(differences.altered) + len(differences.missing) + len(differences.unanswered)
    parts = [plural(messages, "message")] if messages else []
    parts += [plural(len(differences.consumers), "consumer")] if differences.consumers else []
    return " and ".join(parts)


def plural(number: int, what: str) -> str:
    """Return a number with what it counts."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


@dataclass(frozen=True, kw_only=True)
class Seen(Differences):
    """What was observed of one attack.

    refused: what the mount or the server said when it did not start; said: log lines and error answers; lost: message blocks that
    are shorter by a record or more, or gone, since the attack; unit: how many messages lie in what was attacked; served: how many
    of them were served as they were; back: whether everything was there after the attack was undone; still: what was not;
    undone: false where there was nothing to undo, and `back` tells of the end; found: what `encfs-js verify` finds
    before the store is used, "" where it was not asked.
    """

    refused: str = ""
    said: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    unit: int = 0
    served: int = 0
    back: bool = True
    still: str = ""
    undone: bool = True
    found: str = ""


def judge(seen: Seen) -> Word:
    """Return the word for what was observed, the first that holds.

    unnoticed: something altered was served, and no log line and no error answer says anything.
    data destroyed: message blocks that the attack had left are gone, or shorter by a record or more; or undoing it does not bring
        everything back.
    refused: the mount or the server did not start, with an error.
    intact: everything was served as it was, and nobody complained. detected: the same, and somebody complained.
    unnoticed: messages or consumers are missing, and nobody complained.
    refused: of what was attacked nothing at all was served, and an error or a log line says so.
    detected: all else: the server goes on, the rest is served, and an error or a log line says so.
    """
    complained = bool(seen.said or seen.unanswered)
    if seen.altered and not complained:
        return "unnoticed"
    if seen.lost or not seen.back:
        return "data destroyed"
    if seen.refused:
        return "refused"
    if not seen.hurt:
        return "detected" if complained else "intact"
    if not complained:
        return "unnoticed"
    return "refused" if seen.unit and not seen.served and not seen.altered else "detected"
