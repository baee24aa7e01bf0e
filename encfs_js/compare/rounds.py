"""The whole comparison: in each round every mode does the same work, one after the other; then all of them are attacked."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from encfs_js import __version__
from encfs_js.compare import clocks, cluster, figures, interrupt, loads, machine, modes, processes, runs, server
from encfs_js.compare.modes import MODES, PLAIN
from encfs_js.compare.result import FORMAT, Result
from encfs_js.compare.result import Mode as Shown
from encfs_js.errors import StoreIoError

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.compare.loads import Size
    from encfs_js.compare.result import Work
    from encfs_js.compare.runs import Course, Progress

_LOADED: Final = 0.5  # load average from which on a machine is not quiet
_HELD: Final = 1 << 30  # bytes; see clocks.hold: some times what the largest work reads and writes
_HINT: Final = "Name a directory on the file system that is to be measured: --store-dir DIR"


@dataclass(frozen=True)
class Options:
    """What to compare. store_dir: where the stores are made; program: the nats-server, None for the usual places.

    only: the names of modes beside plain; none for all there are.
    """

    store_dir: str
    program: str | None = None
    quick: bool = False
    only: tuple[str, ...] = ()


def compare(options: Options, show: Callable[[Progress], None]) -> Result:
    """Compare all modes that can run here, and return what came out. Must be called in the main thread.

    A run that fails is in the result, and the others go on. Raises NatsServerError, StoreIoError, and KeyboardInterrupt at the
    first Ctrl-C or SIGTERM. In any case nothing is left behind: no process, no mount, no directory.
    """
    began, made = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    program = server.find(options.program)
    wanted = [mode for mode in MODES if not options.only or mode.name in options.only or mode is PLAIN]
    absent = {mode.name: why for mode in wanted if (why := modes.missing(mode))}
    chosen = [mode for mode in wanted if mode.name not in absent]
    directory = suitable(options.store_dir, loads.QUICK if options.quick else loads.Size())
    where = machine.look(directory, program, chosen)
    with interrupt.taken() as signals, processes.scratch(directory) as root, signals.raising():
        course = runs.Course(program, root, options.quick, show, chosen, absent)
        runs.plan(course)
        cold, counted = clocks.drop_caches(), clocks.written(root) is not None
        try:
            clocks.hold(0 if options.quick else min(_HELD, where.memory // 8))
            runs.probe(course)
            ceilings = runs.ceilings(course)
            runs.measure(course)
        finally:
            clocks.hold(0)
        attacked = runs.attack(course)
    found = figures.figures(course.values, MODES)
    works = figures.with_shares(figures.works(course.size, cold=cold, ceilings=ceilings), found)
    have = {figure.mode for figure in found}
    return Result(
        format=FORMAT,
        encfs_js=__version__,
        made=made,
        took=time.monotonic() - began,
        quick=options.quick,
        rounds=course.rounds,
        interrupted=False,
        machine=where,
        notes=notes(course, where.load_before, works, cold=cold, counted=counted),
        modes=[
            Shown(mode.name, mode.title, mode.kind, mode.cipher, mode.name in have, _why(course, mode.name, have))
            for mode in wanted
        ],
        works=works,
        measures=list(figures.MEASURES),
        figures=found,
        attacks=attacked,
        failures=course.failures,
    )


def _why(course: Course, mode: str, have: set[str]) -> str:
    """Say why a mode has no figures, "" for one that has."""
    if mode in have:
        return ""
    errors = [failure.error.splitlines()[0] for failure in course.failures if failure.mode == mode]
    return course.absent.get(mode) or next(iter(errors), "no run came to its end")


def suitable(store_dir: str, size: Size) -> str:
    """Return the real path of the directory for the stores. Raises StoreIoError when it cannot be used, or has no room."""
    if not os.path.isdir(store_dir):
        raise StoreIoError(f"{store_dir}: no such directory", hint=_HINT)
    if not os.access(store_dir, os.W_OK | os.X_OK):
        raise StoreIoError(f"{store_dir}: no permission to write there", hint=_HINT)
    needed, free = room(size), shutil.disk_usage(store_dir).free
    if free < needed:
        said = f"{store_dir}: a comparison needs {needed >> 20} MiB there, and {free >> 20} MiB are free"
        raise StoreIoError(said, hint=_HINT)
    return os.path.realpath(store_dir)


def room(size: Size) -> int:
    """Return how many bytes must be free: what the largest run writes, half as much again, and room for the attacks."""
    record = 64  # bytes of a message beside its payload, at most: record, subject, and its part in the indexes
    published = sum(
        messages * (each + record)
        for messages, each in (loads.published(size, work) for work in figures.SCENARIOS["publish"])
    )
    replicated = size.replicated * (512 + record) * cluster.NODES * 2  # in the stream, and before that in the raft log
    purged = size.purged * (512 + record) * 2  # a block lies beside the old one while it is rewritten
    largest = max(published, size.usual * (512 + record), purged, replicated)
    return largest * 3 // 2 + (512 << 20)


def notes(course: Course, load_before: float, works: list[Work], *, cold: bool, counted: bool) -> list[str]:
    """Return what a reader has to know before he believes a figure."""
    told = []
    if load_before > _LOADED:
        told.append(
            f"The machine was not quiet: its load average was {load_before} before anything ran. Figures are worth less."
        )
    if not cold:
        told.append(
            "Only root can drop the page cache, and this run could not: what is called cold elsewhere was warm here."
        )
    if not counted:
        told.append("What was written to the disk is missing: no one disk is below the directory of the stores.")
    near = [work.title for work in works if work.ceiling_share is not None and work.ceiling_share > figures.NEAR]
    if near:
        told.append(f"The load generator may be the limit of: {'; '.join(near)}.")
    if course.crowded:
        listed = "; ".join(f"{work} ({count} runs)" for work, count in course.crowded.items())
        told.append(f"Another process used more than a fifth of the machine during {listed}.")
    fewer = [mode.name for mode in course.chosen if mode.kind == "reference"]
    if course.rounds > runs.FEWER:
        beside = f", and {' and '.join(fewer)}, were" if fewer else " was"
        told.append(f"The cluster{beside} measured in {runs.FEWER} of {course.rounds} rounds only, to save time.")
    if course.given_up:
        times = runs.GIVEN_UP
        told.append(f"Not run again after {times} failures: {'; '.join(course.given_up)}.")
    return told
