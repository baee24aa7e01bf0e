"""What somebody does to the files of a store that is at rest. Each attack is made on a copy, by who has no key.

The attacker knows what is public (`forging`), and the messages that he sent himself or was allowed to read. In each mode he takes
what is best for him.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NamedTuple

from encfs_js.compare import victim
from encfs_js.compare.forging import Target, boundary, contents_of, place, record
from encfs_js.compare.victim import OTHER, STREAM

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from encfs_js.compare.observing import Unit
    from encfs_js.compare.victim import Victim

FORGED: Final = 12  # the message that is forged, or in whose payload a bit is flipped; it lies in block 1
LIE: Final = (b"transfer 99999 EUR to mally", 5)  # what it says then; and how many of the last messages are cut off
FIRST_BLOCK: Final[Unit] = {STREAM: range(1, 36)}
_STREAM: Final[Unit] = {STREAM: range(1, victim.FILLED + victim.MORE + 1)}
ALL: Final[Unit] = _STREAM | {OTHER: _STREAM[STREAM], victim.REMINDERS: range(1, 6)}


def lie(number: int) -> bytes:
    """Return the payload of a message of STREAM as the attacker wants it."""
    return LIE[0] + victim.payload(STREAM, number)[len(LIE[0]) :]


# --- the attacks: each on one target, and what the messages are that lie in what is attacked ------------------------------


class Variant(NamedTuple):
    """One way of doing it. state: of the victim; do: what is done."""

    label: str
    state: str
    do: Callable[[Target], Unit]


class Tampering(NamedTuple):
    """An attack. variants: the ways to be tried in a mode, all of them; none: it makes no sense there."""

    name: str
    title: str
    what: str
    variants: Callable[[Victim], Sequence[Variant]]


def _flip(target: Target) -> Unit:
    plain = victim.block(STREAM, 1)
    inside = (FORGED - 1) * victim.record_length(STREAM, FORGED) + 300
    target.flip(target.path(plain), place(target.store.mode.name, inside))
    return FIRST_BLOCK


def _flip_meta(target: Target) -> Unit:
    path = target.path(f"{victim.directory(STREAM)}/meta.inf")
    target.flip(path, place(target.store.mode.name, 60))
    return _STREAM


def _flip_key(name: str, unit: Unit) -> Callable[[Target], Unit]:
    def do(target: Target) -> Unit:
        path = target.path(f"{victim.directory(STREAM)}/{name}")
        target.flip(path, os.path.getsize(path) // 2)
        return unit

    return do


def _flip_file(mark: bytes, *names: str) -> Callable[[Target], Unit]:
    """Flip a bit of some bytes behind a mark in files of the store's own: in a wrapped key."""

    def do(target: Target) -> Unit:
        for name in names:
            path = os.path.join(target.store.backing, name)
            target.flip(path, contents_of(path).rindex(mark) + len(mark) + 12)
        return ALL

    return do


def _keys(of: Victim) -> list[Variant]:
    if of.mode.kind == "server":
        return [
            Variant("a block's key file", "late", _flip_key("msgs/1.key", FIRST_BLOCK)),
            Variant("the stream's meta.key", "late", _flip_key("meta.key", _STREAM)),
        ]
    if of.mode.kind == "mount":
        one, both = ".encfs_js/keyring", ".encfs_js/keyring.bak"
        mark = b'"wrapped":'
        return [
            Variant("keyring", "late", _flip_file(mark, one)),
            Variant("keyring and keyring.bak", "late", _flip_file(mark, one, both)),
        ]
    if of.mode.name == "gocryptfs":
        return [Variant("gocryptfs.conf", "late", _flip_file(b'"EncryptedKey":', "gocryptfs.conf"))]
    if of.mode.name == "securefs":
        return [Variant(".securefs.json", "late", _flip_file(b'"key" :', ".securefs.json"))]
    return []


def _forge(target: Target) -> Unit:
    time, at = target.of.time(STREAM, FORGED), (FORGED - 1) * victim.record_length(STREAM, FORGED)
    old = record(STREAM, 1, FORGED, time, victim.payload(STREAM, FORGED))
    new = record(STREAM, 1, FORGED, time, lie(FORGED))
    target.xor(victim.block(STREAM, 1), at, bytes(a ^ b for a, b in zip(old, new, strict=True)))
    return FIRST_BLOCK


def _last(of: Victim) -> Unit:
    """Return the messages that lie in the last block of STREAM."""
    return {STREAM: range((of.last - 1) * 35 + 1, victim.FILLED + victim.MORE + 1)}


def _cut(target: Target) -> Unit:
    of = target.of
    plain = victim.block(STREAM, of.last)
    least = sum(victim.record_length(STREAM, victim.FILLED + victim.MORE - i) for i in range(LIE[1]))
    path = target.path(plain)
    target.write(path, contents_of(path)[: boundary(of.mode.name, of.sizes[plain], least)])
    return _last(of)


def _empty(target: Target) -> Unit:
    target.write(target.path(victim.block(STREAM, target.of.last)), b"")
    return _last(target.of)


def _swap(other: tuple[str, int], *, keys: bool) -> Callable[[Target], Unit]:
    def do(target: Target) -> Unit:
        first, second = victim.block(STREAM, 1), victim.block(*other)
        for suffix in (".blk", ".key") if keys else (".blk",):
            paths = [target.path(plain.removesuffix(".blk") + suffix) for plain in (first, second)]
            contents = [contents_of(path) for path in paths]
            for path, data in zip(paths, reversed(contents), strict=True):
                target.write(path, data)
        numbers = range(1, 36)
        return {STREAM: range(1, 71)} if other[0] == STREAM else {STREAM: numbers, OTHER: numbers}

    return do


def _swaps(other: tuple[str, int]) -> Callable[[Victim], list[Variant]]:
    def variants(of: Victim) -> list[Variant]:
        if of.mode.kind == "server":
            return [
                Variant("with their key files", "late", _swap(other, keys=True)),
                Variant("without their key files", "late", _swap(other, keys=False)),
            ]
        return [Variant("", "late", _swap(other, keys=False))]

    return variants


def _old_block(target: Target) -> Unit:
    of = target.of
    plain = victim.block(STREAM, of.last)
    target.write(target.path(plain), contents_of(os.path.join(of.stores["early"].backing, of.paths[plain])))
    return _last(of)


def _old_stream(target: Target) -> Unit:
    target.replace_directory(f"{victim.directory(STREAM)}/meta.inf", target.of.stores["early"])
    return _STREAM


def _plant(target: Target) -> Unit:
    of = target.of
    numbers = _last(of)[STREAM]
    at = of.time(STREAM, numbers[-1])
    planted = b"".join(
        record(STREAM, of.last, number, at + number, lie(number)) for number in numbers if number not in victim.DELETED
    )
    plain = victim.block(STREAM, of.last)
    target.write(target.path(plain), planted)
    if of.mode.kind == "server":  # without a key file it is a block from before there was a key
        target.remove(target.path(plain.removesuffix(".blk") + ".key"))
    return _last(of)


def _one(state: str, do: Callable[[Target], Unit]) -> Callable[[Victim], list[Variant]]:
    return lambda _: [Variant("", state, do)]


ATTACKS: Final = (
    Tampering(
        "flip",
        "A bit flipped in a block",
        "One bit of a message is flipped in a block that the server does not read at its start: index.db is there.",
        _one("late", _flip),
    ),
    Tampering(
        "flip-unindexed",
        "A bit flipped, without index.db",
        "The same where the server reads all blocks at its start, as after a crash: index.db is not there.",
        _one("unindexed", _flip),
    ),
    Tampering(
        "flip-meta", "A bit flipped in meta.inf", "One bit of a stream's metafile is flipped.", _one("late", _flip_meta)
    ),
    Tampering("flip-key", "A bit flipped in a key file", "One bit of a wrapped key is flipped.", _keys),
    Tampering(
        "forge",
        "A forged message",
        "Of a message that the attacker knows, what is stored is XORed so that it names another amount and another payee;"
        " its hash, which anybody can compute, is changed to fit.",
        _one("late", _forge),
    ),
    Tampering(
        "cut",
        "A block cut at its end",
        "The last block loses its last messages: cut where a record ends, or where a page or an encrypted block does.",
        _one("unindexed", _cut),
    ),
    Tampering("empty", "A block emptied", "The last block becomes a file of zero bytes.", _one("unindexed", _empty)),
    Tampering(
        "swap",
        "Two blocks of a stream swapped",
        "The contents of two message blocks of one stream change places.",
        _swaps((STREAM, 2)),
    ),
    Tampering(
        "swap-streams",
        "Blocks of two streams swapped",
        "The contents of the first blocks of two streams change places.",
        _swaps((OTHER, 1)),
    ),
    Tampering(
        "old-block",
        "An older block put back",
        "The last block is put back as it was before messages were deleted and others were published.",
        _one("unindexed", _old_block),
    ),
    Tampering(
        "old-stream",
        "An older stream put back",
        "The stream's whole directory is put back as it was then.",
        _one("late", _old_stream),
    ),
    Tampering(
        "plant",
        "Plaintext planted",
        "The last block is replaced by one of the attacker's making, in plain text, with other messages in it.",
        _one("unindexed", _plant),
    ),
)
