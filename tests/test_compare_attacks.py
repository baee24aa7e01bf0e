"""The attacks of a comparison: on real stores of every mode that can run here, and the word for what was seen."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, get_args

import mounts
import nats_world as world
import pytest

from encfs_js.compare import attacks, forging, modes, processes, telling, victim
from encfs_js.compare.attacks import Row
from encfs_js.compare.judging import Differences, Seen, compare, judge
from encfs_js.compare.reading import MISSING, NO_ANSWER, Reading, time_of
from encfs_js.compare.result import Attack, Failure, Word

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from encfs_js.compare.modes import Mode
    from encfs_js.compare.victim import Victim

needs_server = pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-")
on_a_mount = pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")


def mode_of(name: str) -> Mode:
    return next(mode for mode in modes.MODES if mode.name == name)


# --- judging ----------------------------------------------------------------------------------------------------------

ONE = ("TRANSFERS 12",)
SAID = ("page 2 does not authenticate",)


@pytest.mark.parametrize(
    ("seen", "word"),
    [
        (Seen(), "intact"),
        (Seen(said=SAID), "detected"),
        (Seen(altered=ONE, unit=34, served=33), "unnoticed"),
        (Seen(altered=ONE, unit=34, served=33, said=SAID), "detected"),
        (Seen(altered=ONE, unit=1, said=SAID), "detected"),
        (Seen(altered=ONE, lost=("1.blk is gone",)), "unnoticed"),
        (Seen(missing=ONE, unit=34, served=33), "unnoticed"),
        (Seen(consumers=("TRANSFERS bookkeeper",)), "unnoticed"),
        (Seen(missing=ONE, unit=34, served=33, said=SAID), "detected"),
        (Seen(missing=ONE, unit=34, served=0, said=SAID), "refused"),
        (Seen(unanswered=ONE, unit=34, served=0), "refused"),
        (Seen(unanswered=ONE, unit=34, served=33), "detected"),
        (Seen(missing=ONE, unit=34, served=0, said=SAID, lost=("1.blk was cut",)), "data destroyed"),
        (Seen(missing=ONE, back=False, still="1 message"), "data destroyed"),
        (Seen(refused="wrong key"), "refused"),
        (Seen(refused="wrong key", back=False, still="everything"), "data destroyed"),
    ],
)
def test_judging(seen: Seen, word: Word) -> None:
    assert judge(seen) == word
    assert word in get_args(Word)
    told = telling.tell(seen)
    assert told.endswith(".")
    for part in (*seen.altered, *seen.missing, *seen.said, *seen.lost, seen.refused, seen.still):
        assert part in told
    assert ("nothing was logged" in told) == (not seen.said and not seen.refused)


def test_of_several_ways_the_worst_counts() -> None:
    ways = [("with keys", Seen(missing=ONE)), ("without", Seen(missing=ONE, said=SAID, unit=1))]
    word, told = telling.together(ways)
    assert word == "unnoticed"
    assert told.startswith("With keys, unnoticed: 1 message (TRANSFERS 12) was answered with 404; ")
    assert " Without, refused: 1 message " in told
    assert telling.together([("", Seen(refused="no"))]) == (
        "refused",
        'It did not start: "no"; with the attack undone all is back.',
    )


def test_what_is_otherwise() -> None:
    def message(payload: bytes) -> tuple[bytes, bytes]:
        return b"NATS/1.0\r\nNats-Sequence: 1\r\n\r\n", payload

    wanted = Reading(
        {"A": {1: message(b"a"), 2: message(b"b"), 3: message(b"c"), 4: MISSING, 5: MISSING}, "B": {1: message(b"x")}},
        {("A", "one"): (3, 4, 0), ("A", "two"): (1, 1, 2)},
    )
    seen = Reading(
        {
            "A": {1: message(b"a"), 2: message(b"other"), 3: MISSING, 4: message(b"back"), 5: NO_ANSWER},
            "B": {1: NO_ANSWER},
        },
        {("A", "one"): (3, 4, 7)},
    )
    assert compare(wanted, wanted) == Differences()
    assert not compare(wanted, wanted).hurt
    assert compare(seen, wanted) == Differences(
        altered=("A 2", "A 4"), missing=("A 3",), unanswered=("B 1",), consumers=("A two",)
    )


def test_the_time_of_a_message_to_the_nanosecond() -> None:
    stamp = b"NATS/1.0\r\nNats-Sequence: 4\r\nNats-Time-Stamp: 2026-11-24T20:18:28.9430374Z\r\n\r\n"
    assert time_of((stamp, b"")) == 1_795_551_508_943_037_400
    with pytest.raises(processes.RunError):
        time_of(MISSING)


# --- the run ----------------------------------------------------------------------------------------------------------


@contextmanager
def nothing_outlives(tmp_path: Path) -> Iterator[str]:
    """A scratch directory; whatever the run leaves running or mounted by itself is an error, and removed."""
    before, threads = set(processes.family(os.getpid())), threading.active_count()
    with processes.scratch(str(tmp_path)) as root:
        yield root
        # A process that was killed with its parent away is ours to reap.
        mounts.until(lambda: set(_alive(processes.family(os.getpid()))) <= before, "the end of all processes")
        assert [entry for entry in mounts.mount_entries() if str(entry.mountpoint).startswith(root)] == []
        assert threading.active_count() == threads
    assert os.listdir(tmp_path) == []


def _alive(pids: Sequence[int]) -> list[int]:
    found = []
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
                if file.read().rpartition(")")[2].split()[0] != "Z":
                    found.append(pid)
        except OSError:
            continue
    return found


def run(
    names: Sequence[str],
    root: str,
    rows: Sequence[Row] | None = None,
    check: Callable[[], None] = lambda: None,
    program: str = world.BINARY,
) -> tuple[list[Attack], list[Failure], list[tuple[str, str]]]:
    done: list[tuple[str, str]] = []
    found, failures = attacks.run(
        [mode_of(name) for name in names],
        program,
        root,
        quick=True,
        progress=lambda attack, mode: done.append((attack, mode)),
        check=check,
        attacks=rows,
    )
    return found, failures, done


def words(found: Sequence[Attack]) -> dict[str, tuple[str, ...]]:
    return {attack.name: tuple(outcome.word for outcome in attack.outcomes) for attack in found}


def saw(found: Sequence[Attack], name: str, mode: str) -> str:
    return next(
        outcome.saw for attack in found if attack.name == name for outcome in attack.outcomes if outcome.mode == mode
    )


# Every row: plain, server chachapoly, mount aes.
EVERY: dict[str, tuple[str, str, str]] = {
    "payloads": ("found", "hidden", "hidden"),
    "names": ("found", "found", "found"),
    "subjects": ("found", "hidden", "hidden"),
    "schedules": ("found", "found", "hidden"),
    "raft": ("found", "found", "hidden"),
    "sizes": ("found", "found", "found"),
    "two-versions": ("found", "found", "hidden"),
    "flip": ("unnoticed", "unnoticed", "refused"),
    "flip-unindexed": ("data destroyed", "data destroyed", "refused"),
    "flip-meta": ("detected", "detected", "detected"),
    "flip-key": ("not run", "unnoticed", "detected"),
    "forge": ("unnoticed", "unnoticed", "refused"),
    "cut": ("unnoticed", "unnoticed", "refused"),
    "empty": ("unnoticed", "unnoticed", "unnoticed"),
    "swap": ("data destroyed", "unnoticed", "data destroyed"),
    "swap-streams": ("unnoticed", "unnoticed", "unnoticed"),
    "old-block": ("unnoticed", "unnoticed", "unnoticed"),
    "old-stream": ("unnoticed", "unnoticed", "unnoticed"),
    "plant": ("unnoticed", "unnoticed", "refused"),
    "wrong-key": ("not run", "data destroyed", "refused"),
    "not-mounted": ("not run", "not run", "unnoticed"),
    "kill-key": ("not run", "data destroyed", "intact"),
}
# When nats-server is killed decides whether it loses something.
EITHER = {"kill-reencrypt": ("not run", ("intact", "data destroyed", "unnoticed"), "intact")}


@pytest.mark.mount
@pytest.mark.nats
@needs_server
@on_a_mount
def test_all_attacks(tmp_path: Path) -> None:
    names = ("plain", "server chachapoly", "mount aes")
    with nothing_outlives(tmp_path) as root:
        found, failures, done = run(names, root)
    assert failures == []
    assert [attack.name for attack in found] == [row.name for row in attacks.rows(quick=True)]
    assert sorted(done) == sorted((attack.name, mode) for attack in found for mode in names)
    seen = words(found)
    for name, (plain, server, mount) in EITHER.items():
        assert (seen[name][0], seen[name][2]) == (plain, mount)
        assert seen.pop(name)[1] in server
    assert seen == EVERY
    for attack in found:
        assert all(
            outcome.saw.endswith(".") and outcome.saw[:1].upper() == outcome.saw[:1] for outcome in attack.outcomes
        ), attack
        assert all(str(tmp_path) not in outcome.saw for outcome in attack.outcomes), attack
    assert saw(found, "plant", "plain").startswith(
        "19 messages (TRANSFERS 71 to 90) were served, and not as last stored; "
    )
    assert saw(found, "forge", "server chachapoly") == saw(found, "forge", "plain")
    for name in ("flip", "flip-unindexed", "forge", "cut", "plant"):
        told = saw(found, name, "mount aes")
        assert "does not authenticate" in told
        assert 'verify: "msgs/' in told
        assert told.endswith("with the attack undone all is back.")
    assert "not a byte of the store was changed" in saw(found, "wrong-key", "mount aes")
    assert "undone still missing: 181 messages and 2 consumers" in saw(found, "wrong-key", "server chachapoly")
    assert "is not empty" in saw(found, "not-mounted", "mount aes")


REFERENCES: dict[str, dict[str, str]] = {
    "gocryptfs": {
        "payloads": "hidden",
        "names": "hidden",
        "flip-key": "refused",
        "forge": "refused",
        "flip-unindexed": "data destroyed",
        "cut": "unnoticed",
        "wrong-key": "refused",
        "kill-key": "intact",
    }
}
REFERENCES["securefs"] = {name: word for name, word in REFERENCES["gocryptfs"].items() if name != "kill-key"}


@pytest.mark.mount
@pytest.mark.nats
@needs_server
@pytest.mark.parametrize("name", REFERENCES)
def test_outside_references(tmp_path: Path, name: str) -> None:
    if why := modes.missing(mode_of(name)):
        pytest.skip(why)
    wanted = REFERENCES[name]
    rows = [row for row in attacks.rows(quick=True) if row.name in wanted]
    with nothing_outlives(tmp_path) as root:
        found, failures, _ = run([name], root, rows)
    assert failures == []
    assert words(found) == {attack: (word,) for attack, word in wanted.items()}


def _never(_of: Victim, _name: str, _check: Callable[[], None]) -> tuple[Word, str]:
    raise AssertionError("a bug")


def _lost(_of: Victim, _name: str, _check: Callable[[], None]) -> tuple[Word, str]:
    raise processes.RunError("nats-server did not stop")


@pytest.mark.nats
@needs_server
def test_one_that_fails_leaves_the_others(tmp_path: Path) -> None:
    good = next(row for row in attacks.rows(quick=True) if row.name == "payloads")
    rows = [Row("bug", "Bug", "-", "attack", _never), good, Row("lost", "Lost", "-", "attack", _lost)]
    with nothing_outlives(tmp_path) as root:
        found, failures, done = run(["plain", "server aes"], root, rows)
    assert words(found) == {"bug": ("not run",) * 2, "payloads": ("found", "hidden"), "lost": ("not run",) * 2}
    assert saw(found, "lost", "plain") == "It failed: nats-server did not stop."
    assert {(failure.mode, failure.work, failure.error) for failure in failures} == {
        (mode, work, error)
        for mode in ("plain", "server aes")
        for work, error in (("bug", "AssertionError: a bug"), ("lost", "nats-server did not stop"))
    }
    assert len(done) == 6


@pytest.mark.nats
def test_a_mode_that_cannot_be_prepared(tmp_path: Path) -> None:
    broken = tmp_path / "nats-server"
    broken.write_text("#!/bin/sh\necho '[FTL] no'\nexit 3\n")
    broken.chmod(0o700)
    place = tmp_path / "place"
    place.mkdir()
    with nothing_outlives(place) as root:
        found, failures, _ = run(["plain"], root, program=str(broken))
    assert {word for each in words(found).values() for word in each} == {"not run"}
    assert [(failure.mode, failure.work) for failure in failures] == [("plain", attacks.PREPARE)]
    assert "nats ended with 3" in failures[0].error


@pytest.mark.mount
@pytest.mark.nats
@needs_server
@on_a_mount
def test_interrupted(tmp_path: Path) -> None:
    """Ctrl-C while attacks are under way: the threads end, and each of them what it has started."""
    began = time.monotonic()

    def check() -> None:
        if time.monotonic() - began > 3:
            raise KeyboardInterrupt

    with nothing_outlives(tmp_path) as root, pytest.raises(KeyboardInterrupt):
        run(["plain", "mount aes"], root, check=check)


@pytest.mark.nats
@needs_server
def test_what_is_taken_for_the_plain_text_is_it(tmp_path: Path) -> None:
    """The attacker's records are nats-server's, byte for byte."""

    with processes.scratch(str(tmp_path)) as root:
        of = victim.prepare(modes.PLAIN, world.BINARY, os.path.join(root, "victim"), lambda: None)
        block = forging.contents_of(os.path.join(of.stores["late"].backing, victim.block(victim.STREAM, 2)))
        assert block == b"".join(
            forging.record(
                victim.STREAM, 2, number, of.time(victim.STREAM, number), victim.payload(victim.STREAM, number)
            )
            for number in range(36, 71)
        )
