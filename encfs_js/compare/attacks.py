"""All attacks on all modes: what each is called, in which order, and the run, several at a time.

Most of the time is waiting, so some are under way at once, each on a copy of its mode's store, and with its own server.
"""

from __future__ import annotations

import os
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from encfs_js.compare import judging, killing, leaks, mistakes, observing, tampering, telling, victim
from encfs_js.compare.forging import Target
from encfs_js.compare.processes import RunError
from encfs_js.compare.result import Attack, Failure, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from encfs_js.compare.modes import Mode
    from encfs_js.compare.result import Word
    from encfs_js.compare.victim import Victim

_AT_ONCE: Final = 4
_POLL: Final = 0.1  # seconds between two looks whether the user pressed Ctrl-C
PREPARE: Final = "prepare"  # the work that a Failure names when a mode's store could not be made


class Row(NamedTuple):
    """One attack. attempt: makes it on a victim, below a directory name of its own, and returns the word and what was seen."""

    name: str
    title: str
    what: str
    kind: Literal["leak", "attack", "mistake"]
    attempt: Callable[[Victim, str, Callable[[], None]], tuple[Word, str]]


def _tamper(attack: tampering.Tampering) -> Row:
    def attempt(of: Victim, name: str, check: Callable[[], None]) -> tuple[Word, str]:
        seen = []
        for i, variant in enumerate(attack.variants(of)):
            check()
            with of.copied(variant.state, f"{name}-{i}") as store:
                target = Target(of, store)
                unit = variant.do(target)
                seen.append((variant.label, observing.observe(of, store, target.undo, unit, check)))
        return telling.together(seen) if seen else ("not run", "There is no key.")

    return Row(attack.name, attack.title, attack.what, "attack", attempt)


def rows(*, quick: bool) -> list[Row]:
    """Return all attacks in the order of the report. quick: with fewer kills."""
    kills = 3 if quick else 6
    searches = (
        Row("payloads", "Payloads", "Searches all files for a mark that every payload has.", "leak", leaks.payloads),
        Row(
            "names",
            "Names",
            "Searches paths and contents for the names of account, streams and consumers.",
            "leak",
            leaks.names,
        ),
        Row(
            "subjects",
            "Subjects and configuration",
            "Searches for subjects, headers, descriptions and metadata.",
            "leak",
            leaks.subjects,
        ),
        Row("schedules", "Schedules", "Searches for the subjects of scheduled messages.", "leak", leaks.schedules),
        Row(
            "raft",
            "Raft snapshots",
            "Takes the raft snapshots of a cluster of three apart, and looks for the configuration of its streams.",
            "leak",
            leaks.raft,
        ),
        Row("sizes", "Sizes", "Computes how many bytes of messages each block holds.", "leak", leaks.sizes),
        Row(
            "two-versions",
            "Two versions of a block",
            "Has a block from before and from after nats-server compacted it, knows what was in the first, and XORs.",
            "leak",
            leaks.two_versions,
        ),
    )
    errors = (
        Row(
            "wrong-key",
            "A wrong key",
            "The store is used with a wrong key, by an application that creates its streams when it starts; then with the right.",
            "mistake",
            mistakes.wrong_key,
        ),
        Row(
            "not-mounted",
            "Not mounted",
            "The mount is not there, and nats-server is started all the same, on a directory that it may write to.",
            "mistake",
            mistakes.not_mounted,
        ),
        Row(
            "kill-key",
            "kill -9 while the key is changed",
            "Whoever changes the key is killed at different moments; then the change is made, or one of both keys taken.",
            "mistake",
            killing.kill_key_change(kills),
        ),
        Row(
            "kill-reencrypt",
            "kill -9 while all is encrypted anew",
            "Whoever encrypts the store anew (another cipher, or volume key) is killed at different moments; then it is done.",
            "mistake",
            killing.kill_reencrypt(kills),
        ),
    )
    return [*searches, *map(_tamper, tampering.ATTACKS), *errors]


def prepare(mode: Mode, program: str, root: str, check: Callable[[], None]) -> Victim:
    """Make a mode's store, and use it without an attack: all must be served as it was, and what is said then is no complaint.

    Raises RunError, OSError.
    """
    of = victim.prepare(mode, program, root, check)
    said: set[str] = set()
    for state in ("late", "unindexed"):
        with of.copied(state, "control") as store:
            run = observing.use(store, of, check)
        if run.refused or judging.count(judging.compare(run.reading, of.late)):
            raise RunError(f"{mode.name} without an attack: {run.refused or judging.compare(run.reading, of.late)}")
        said |= {observing.normal(line) for line in run.said}
    return replace(of, noise=frozenset(said))


def run(
    modes: Sequence[Mode],
    program: str,
    root: str,
    *,
    quick: bool,
    progress: Callable[[str, str], None],
    check: Callable[[], None],
    attacks: Sequence[Row] | None = None,
) -> tuple[list[Attack], list[Failure]]:
    """Make all attacks on all modes; return them in their order, and the runs that failed, which are `not run`.

    root: an existing directory for the stores, which the caller removes; progress: called with the attack's and the mode's name
    when one is done; attacks: others than `rows`. What `check` raises ends all of them, and is raised.
    """
    wanted = list(attacks) if attacks is not None else rows(quick=quick)
    outcomes: dict[tuple[str, str], Outcome] = {}
    failures: list[Failure] = []
    over = Event()

    def going_on() -> None:
        if over.is_set():
            raise RunError("interrupted")

    pool = ThreadPoolExecutor(_AT_ONCE, "attack")
    pending: dict[Future[Any], tuple[Row | None, Mode]] = {}
    try:
        for i, mode in enumerate(modes):
            pending[pool.submit(prepare, mode, program, os.path.join(root, f"victim-{i}"), going_on)] = None, mode
        while pending:
            check()
            done, _ = wait(list(pending), _POLL, FIRST_COMPLETED)
            for future in done:
                row, mode = pending.pop(future)
                error = future.exception()
                if isinstance(error, Exception):  # a bug in one must not take the others' results away
                    what = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
                    failures.append(Failure(mode.name, row.name if row else PREPARE, 0, what))
                    outcome = Outcome(mode.name, "not run", telling.sentence([f"it failed: {telling.short(what)}"]))
                    outcomes |= {(each.name, mode.name): outcome for each in ([row] if row else wanted)}
                elif row is None:
                    for each in sorted(wanted, key=lambda row: row.kind != "mistake"):  # the longest first
                        pending[pool.submit(each.attempt, future.result(), each.name, going_on)] = each, mode
                else:
                    outcomes[row.name, mode.name] = Outcome(mode.name, *future.result())
                if row is not None:
                    progress(row.name, mode.name)
    finally:
        over.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return [
        Attack(row.name, row.title, row.what, row.kind, [outcomes[row.name, mode.name] for mode in modes])
        for row in wanted
    ], failures
