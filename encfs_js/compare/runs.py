"""The runs of a comparison: which there are, in which order, one after the other, each on a store that is removed after it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from encfs_js.compare import attacks, ceiling, cluster, figures, loads, modes, processes
from encfs_js.compare.modes import MODES
from encfs_js.compare.processes import RunError
from encfs_js.compare.result import Attack, Failure, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from encfs_js.compare.loads import Run, Size
    from encfs_js.compare.modes import Mode, Store
    from encfs_js.compare.result import Spread

SCENARIOS: Final[dict[str, Callable[[Run], None]]] = {
    "publish": loads.publish,
    "stream": loads.stream,
    "single": loads.single,
    "always": loads.always,
    "cluster": cluster.cluster,
}
ROUNDS: Final = 5
FEWER: Final = 3  # rounds of the cluster, and of the outside references, which are slow
GIVEN_UP: Final = 2  # failures of a mode in a scenario after which it is not run again
GENERATOR: Final = "load generator"  # what a Failure names as the mode when a ceiling could not be measured
MOUNT: Final = "mount"  # the work that a Failure names when a mode cannot be used at all
_REPETITIONS: Final = 3  # of each ceiling
_LOG_LINES: Final = 8  # of each log that a failure shows
# Seconds that things take, quick and full, as far as the progress is concerned; the outside references take longer.
_PROBE: Final = 0.8
_CEILING: Final = (0.06, 0.2)
_TAKES: Final = {"publish": (0.6, 8), "stream": (0.9, 9), "single": (1.1, 5), "always": (0.5, 2), "cluster": (2, 4)}
_REFERENCE: Final = (3, 5)  # times as long
_ATTACK: Final = (0.55, 0.7)
# What a broken server or daemon can make of an answer: all of it is a run that failed, and no reason to end the others.
_PROBLEMS: Final = (RunError, OSError, ValueError, LookupError, subprocess.SubprocessError)


@dataclass(frozen=True)
class Progress:
    """How far it is. done, total: seconds, roughly; step: what is being done, on one line."""

    done: float
    total: float
    step: str


@dataclass
class Course:
    """A comparison under way. absent: why a mode does not run, by its name; crowded: works that another process disturbed."""

    program: str
    root: str
    quick: bool
    show: Callable[[Progress], None]
    chosen: list[Mode] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    values: figures.Values = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    crowded: dict[str, int] = field(default_factory=dict)
    given_up: list[str] = field(default_factory=list)
    done: float = 0.0
    total: float = 0.0

    @property
    def size(self) -> Size:
        """How much of everything."""
        return loads.QUICK if self.quick else loads.Size()

    @property
    def rounds(self) -> int:
        """How many rounds."""
        return 1 if self.quick else ROUNDS

    @property
    def kind(self) -> int:
        """Which of two estimates: of a quick run, or of a full one."""
        return 0 if self.quick else 1

    def begin(self, step: str) -> None:
        """Say what is being done."""
        self.show(Progress(min(self.done, self.total), self.total, step))


def rotated(chosen: Sequence[Mode], number: int) -> list[Mode]:
    """Return the modes in the order of a round (from 1): each round begins one later, so that none is always first."""
    at = (number - 1) % len(chosen) if chosen else 0
    return [*chosen[at:], *chosen[:at]]


def order(chosen: Sequence[Mode], rounds: int) -> Iterator[tuple[int, str, Mode]]:
    """Yield round, scenario and mode of every run: within a scenario the modes take turns."""
    for number in range(1, rounds + 1):
        for scenario in SCENARIOS:
            for mode in rotated(chosen, number):
                fewer = scenario == "cluster" or mode.kind == "reference"
                if number <= (min(FEWER, rounds) if fewer else rounds):
                    yield number, scenario, mode


def plan(course: Course) -> None:
    """Estimate how long all of it takes, with the modes that are left."""
    kind = course.kind
    course.total = (
        _PROBE * len(MODES)
        + _CEILING[kind] * len(ceiling.WORKS) * _REPETITIONS
        + sum(_takes(course, scenario, mode) for _, scenario, mode in order(course.chosen, course.rounds))
        + _ATTACK[kind] * len(attacks.rows(quick=course.quick)) * len(course.chosen)
    )


def _takes(course: Course, scenario: str, mode: Mode) -> float:
    return _TAKES[scenario][course.kind] * (_REFERENCE[course.kind] if mode.kind == "reference" else 1)


def probe(course: Course) -> None:
    """Mount every mode that has a daemon once, and leave out those that cannot even do that."""
    for mode in list(course.chosen):
        if mode.kind in {"mount", "reference"}:
            course.begin(f"trying {mode.name}")
            why = _attempt(course, mode, _mount)
            if why:
                course.chosen.remove(mode)
                course.absent[mode.name] = why.splitlines()[0]
                course.failures.append(Failure(mode.name, MOUNT, 0, why))
    course.done += _PROBE * len(MODES)
    plan(course)


def _mount(store: Store) -> None:
    with modes.mounted(store):
        pass


def ceilings(course: Course) -> dict[str, Spread]:
    """Measure what the load generator alone can do; return the rates by work."""
    found: dict[str, list[float]] = {work: [] for work in ceiling.WORKS}
    for repetition in range(1, _REPETITIONS + 1):
        for work in ceiling.WORKS:
            course.begin(f"the load generator alone, {repetition} of {_REPETITIONS}: {work}")
            try:
                found[work].append(ceiling.rate(work, course.size))
            except _PROBLEMS as problem:
                course.failures.append(Failure(GENERATOR, work, repetition, str(problem)))
            course.done += _CEILING[course.kind]
    return {work: spread(rates) for work, rates in found.items() if rates}


def measure(course: Course) -> None:
    """Make all runs of all rounds."""
    failed: dict[tuple[str, str], int] = {}
    for number, scenario, mode in order(course.chosen, course.rounds):
        course.begin(f"round {number} of {course.rounds}: {scenario}, {mode.name}")
        if failed.get((scenario, mode.name), 0) < GIVEN_UP:
            problem = _run(course, number, scenario, mode)
            if problem:
                failed[scenario, mode.name] = failed.get((scenario, mode.name), 0) + 1
                if failed[scenario, mode.name] == GIVEN_UP and number < course.rounds:
                    course.given_up.append(f"{mode.name} ({scenario})")
        course.done += _takes(course, scenario, mode)


def _run(course: Course, number: int, scenario: str, mode: Mode) -> bool:
    """Make one run, keep its values, and return whether it failed.

    What was complete before the failure counts; the work that failed, and what comes after it, does not.
    """
    runs: list[Run] = []

    def do(store: Store) -> None:
        runs.append(loads.Run(store, course.program, course.size, lambda: None))
        SCENARIOS[scenario](runs[0])

    why = _attempt(course, mode, do)
    found = runs[0].figures if runs else {}
    works = figures.SCENARIOS[scenario]
    complete = [work for work in works if figures.lead(work) in found.get(work, {})]
    if why:
        broken = next((work for work in works if work not in complete), works[-1])
        complete = list(works[: works.index(broken)])
        course.failures.append(Failure(mode.name, broken, number, why))
    for work in complete:
        for name, value in found[work].items():
            course.values.setdefault((work, name, mode.name), {})[number] = value
        if runs[0].bounds.get(work) == "others":
            course.crowded[work] = course.crowded.get(work, 0) + 1
    return bool(why)


def _attempt(course: Course, mode: Mode, do: Callable[[Store], None]) -> str:
    """Do something with an empty store in a directory of its own, and leave nothing of it; return what went wrong, or nothing."""
    root = os.path.join(course.root, "run")
    before = set(processes.family(os.getpid()))
    try:
        do(modes.create(mode, root))
    except _PROBLEMS as problem:
        return _told(root, problem)
    finally:
        processes.clear(root, before)
    return ""


def _told(root: str, problem: Exception) -> str:
    """Return what went wrong in a run, and the ends of its logs, which lie beside the stores and never have a key in them."""
    parts = [str(problem) if isinstance(problem, RunError) else f"{type(problem).__name__}: {problem}"]
    for directory in (root, *(os.path.join(root, f"n{number}") for number in range(2, cluster.NODES + 1))):
        names = os.listdir(directory) if os.path.isdir(directory) else []
        for name in sorted(names):
            path = os.path.join(directory, name)
            if name.endswith(".log") and (end := processes.tail(path, _LOG_LINES).strip()):
                parts.append(f"{os.path.relpath(path, root)}:\n{end}")
    return "\n".join(parts)


def attack(course: Course) -> list[Attack]:
    """Make all attacks on all modes that are left, and return what they came to."""
    root = os.path.join(course.root, "attacks")
    os.mkdir(root, 0o700)
    share = _ATTACK[course.kind]

    def show(name: str, mode: str) -> None:
        course.done += share
        course.begin(f"attacks: {name}, {mode}")

    course.begin("attacks")
    found, failures = attacks.run(
        course.chosen, course.program, root, quick=course.quick, progress=show, check=lambda: None
    )
    course.failures += failures
    return found
