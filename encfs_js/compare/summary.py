"""What the figures and outcomes of a comparison say in plain words. Every sentence is made from the data, none is asserted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from encfs_js.compare import wording
from encfs_js.compare.wording import LEVELS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from encfs_js.compare.result import (
        Attack,
        Better,
        Figure,
        Measure,
        Mode,
        Outcome,
        Result,
        Spread,
        Target,
        Word,
        Work,
    )
    from encfs_js.compare.wording import Level

Figures = dict[tuple[str, str, str], "Figure"]  # by work, measure and mode

# Saturated, synced, read, restarted, and one more of each: as far as they were measured.
_TELLING: Final = ("publish-512", "publish-always", "replay", "restart", "get", "publish-4k", "kv")
# What is worse than what, for a comparison of two modes: whether it was refused or detected is no difference then.
_RANKS: Final[dict[Level, int]] = {"good": 0, "noticed": 0, "poor": 1, "bad": 2, "worst": 3}
_NEAR_CEILING: Final = 0.8  # of what the load generator can do: beyond it a ratio says little about a mode


def by_name(result: Result) -> Figures:
    """Return the figures by the names of work, measure and mode."""
    return {(figure.work, figure.measure, figure.mode): figure for figure in result.figures}


def titles(result: Result) -> dict[str, str]:
    """Return the titles of works and attacks by their names."""
    return {**{work.name: work.title for work in result.works}, **{each.name: each.title for each in result.attacks}}


def seen(result: Result) -> list[Mode]:
    """Return the modes that have anything to show: those that ran, and those with a figure or an outcome."""
    named = {figure.mode for figure in result.figures} | {
        outcome.mode for attack in result.attacks for outcome in attack.outcomes
    }
    return [mode for mode in result.modes if mode.ran or mode.name in named]


def lead(result: Result, work: Work) -> Measure | None:
    """Return the measure that stands for a work: its rate, else its first time, else its first figure; None without any."""
    have = {figure.measure for figure in result.figures if figure.work == work.name}
    found = [measure for measure in result.measures if measure.name in have]
    rates = [measure for measure in found if measure.unit == "1/s"]
    times = [measure for measure in found if measure.unit == "s" and "." not in measure.name]
    return next(iter(rates + times + found), None)


def standing(ours: Spread, theirs: Spread, better: Better | None) -> Literal["better", "worse", "even"]:
    """Compare two spreads: better or worse only where the ranges do not overlap, and both have more than one value."""
    if better is None or min(len(ours.values), len(theirs.values)) < 2:
        return "even"
    if ours.min > theirs.max:
        return "better" if better == "more" else "worse"
    if ours.max < theirs.min:
        return "better" if better == "less" else "worse"
    return "even"


def near_ceiling(work: Work) -> bool:
    """Whether the load generator was nearly as slow as the fastest mode."""
    return work.ceiling_share is not None and work.ceiling_share > _NEAR_CEILING


def work_line(result: Result, work: Work) -> str:
    """Return one sentence: what a work came to in plain, and in each other mode beside it. Empty without figures."""
    measure, figures = lead(result, work), by_name(result)
    if measure is None:
        return ""
    base, others = [], []
    for mode in seen(result):
        figure = figures.get((work.name, measure.name, mode.name))
        if figure is None:
            continue
        if mode.kind == "plain":
            base.append(f"{mode.name} {wording.spread(figure.value, measure.unit)}")
        elif figure.ratio is not None:
            others.append(f"{mode.name} {wording.spread(figure.ratio, 'ratio')}")
        else:
            others.append(f"{mode.name} {wording.spread(figure.value, measure.unit)}, no ratio")
    told = f"{measure.title}: " + "; ".join(base)
    word = "of plain: " if measure.better == "more" else "times plain: "
    return told + (("; " if base else "") + (word if base else "") + ", ".join(others) if others else "") + "."


def _leads(result: Result, mode: Mode) -> Iterator[tuple[Work, Measure, Figure]]:
    """Yield the leading figure of every work of a mode that has a ratio and a better way."""
    figures = by_name(result)
    for work in result.works:
        measure = lead(result, work)
        if measure is not None and measure.better is not None:
            figure = figures.get((work.name, measure.name, mode.name))
            if figure is not None and figure.ratio is not None:
                yield work, measure, figure


def _gain(measure: Measure, ratio: Spread) -> float:
    """Return a ratio so that more is better."""
    return ratio.median if measure.better == "more" else 1 / max(ratio.median, 1e-9)


def _said(work: Work, measure: Measure, figure: Figure) -> str:
    assert figure.ratio is not None, "only figures with one are asked for"
    return f"{work.title} ({measure.title}): {wording.of_plain(figure.ratio, measure.better)}"


def extremes(result: Result) -> list[str]:
    """Return a sentence for each mount: in which work it came out worst and best against plain."""
    told = []
    for mode in seen(result):
        found = sorted(_leads(result, mode), key=lambda each: _gain(each[1], each[2].ratio or each[2].value))
        if mode.kind == "mount" and found:
            worst = f"{mode.name} came out worst against plain in {_said(*found[0])}"
            told.append(f"{worst}; best in {_said(*found[-1])}." if len(found) > 1 else f"{worst}.")
    return told


def rivals(result: Result) -> list[tuple[Mode, Mode]]:
    """Return the pairs of a mount and the server's own encryption with the same cipher."""
    modes = seen(result)
    return [
        (ours, theirs)
        for ours in modes
        if ours.kind == "mount"
        for theirs in modes
        if theirs.kind == "server" and theirs.cipher == ours.cipher
    ]


def against(result: Result, ours: Mode, theirs: Mode) -> dict[str, list[str]]:
    """Return what `ours` did better, worse and evenly, by works: the leading figure of each, its ratio to plain."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "even": []}
    others = {work.name: figure for work, _, figure in _leads(result, theirs)}
    for work, measure, figure in _leads(result, ours):
        other = others.get(work.name)
        if other is not None and figure.ratio is not None and other.ratio is not None:
            said = f"{work.title} ({wording.ratio(figure.ratio.median)} against {wording.ratio(other.ratio.median)})"
            found[standing(figure.ratio, other.ratio, measure.better)].append(said)
    return found


def glance(result: Result) -> list[tuple[Work, Measure]]:
    """Return the works that have a ratio to plain in any mode, with their leading measures."""
    have = {(figure.work, figure.measure) for figure in result.figures if figure.ratio is not None}
    found = [(work, lead(result, work)) for work in result.works]
    return [(work, measure) for work, measure in found if measure is not None and (work.name, measure.name) in have]


def telling(result: Result) -> list[tuple[Work, Measure]]:
    """Return five of them at most, those that say most about a mode first."""
    found = {work.name: (work, measure) for work, measure in glance(result)}
    return [found[name] for name in dict.fromkeys((*_TELLING, *found)) if name in found][:5]


def telling_lines(result: Result) -> list[str]:
    """Return a sentence for each of these works: plain, each mount beside it, and the server's own with the same cipher."""
    figures, lines = by_name(result), []
    plain = next((mode.name for mode in result.modes if mode.kind == "plain"), "")
    beside = {ours.name: theirs for ours, theirs in rivals(result)}
    for work, measure in telling(result):
        base = figures.get((work.name, measure.name, plain))
        parts = []
        for mode in seen(result):
            figure = figures.get((work.name, measure.name, mode.name))
            if mode.kind != "mount" or figure is None or figure.ratio is None:
                continue
            said = f"{mode.name} {wording.of_plain(figure.ratio, measure.better)}"
            rival = beside.get(mode.name)
            other = figures.get((work.name, measure.name, rival.name)) if rival else None
            if rival and other is not None and other.ratio is not None:
                said += f" ({rival.name} {wording.spread(other.ratio, 'ratio')})"
            parts.append(said)
        if parts:
            start = f"{plain} {wording.amount(base.value.median, measure.unit)}" if base else "no value for plain"
            lines.append(f"{work.title} ({measure.title}): {start}; {'; '.join(parts)}.")
    return lines


def comparisons(result: Result) -> list[tuple[str, list[str]]]:
    """Return for each mount what it did beside the server's own encryption: a heading, and sentences below it."""
    told = []
    for ours, theirs in rivals(result):
        lines = []
        found = against(result, ours, theirs)
        works = sum(map(len, found.values()))
        if works and result.rounds > 1:
            for key, word in (("better", "Faster"), ("worse", "Slower")):
                lines.append(f"{word} in {len(found[key])} of {works} works" + _all(found[key]))
            lines.append(f"The ranges overlap in {len(found['even'])} of {works}.")
        elif works:
            lines.append("One round has no spread: which of the two is faster cannot be told from it.")
        lines += _under_attack(result, ours, theirs)
        if lines:
            told.append((f"{ours.name} beside {theirs.name}", lines))
    return told


def _all(names: list[str]) -> str:
    return f": {'; '.join(names)}." if names else "."


def _under_attack(result: Result, ours: Mode, theirs: Mode) -> list[str]:
    """Return how the attacks ended in two modes, one line; none where none ran in both."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "even": []}
    for attack in result.attacks:
        pair = [outcome(attack, mode) for mode in (ours, theirs)]
        ranks = [_RANKS.get(LEVELS[one.word]) for one in pair if one is not None]
        if len(ranks) == 2 and ranks[0] is not None and ranks[1] is not None:
            key = "even" if ranks[0] == ranks[1] else "better" if ranks[0] < ranks[1] else "worse"
            found[key].append(attack.title)
    number = sum(map(len, found.values()))
    if not number:
        return []
    worse = ": " + "; ".join(found["worse"]) if found["worse"] else ""
    counts = f"ended better in {len(found['better'])} of {number}, worse in {len(found['worse'])}{worse}"
    return [f"Attacks, leaks and mistakes: {counts}, alike in {len(found['even'])}."]


def ceiling_line(result: Result) -> str:
    """Return a sentence on the works in which the load generator was nearly the limit, or an empty string."""
    close = [work.title for work in result.works if near_ceiling(work)]
    if not close:
        return ""
    where = "; ".join(close)
    return f"The load generator was itself nearly the limit in {where}: there the modes may differ more than the ratios show."


def outcome(attack: Attack, mode: Mode) -> Outcome | None:
    """Return what an attack came to in a mode; None where there is nothing."""
    return next((each for each in attack.outcomes if each.mode == mode.name), None)


def tally(result: Result, mode: Mode) -> dict[Word, int]:
    """Return how often each outcome came in a mode; empty where no attack was run."""
    words = [one.word for attack in result.attacks if (one := outcome(attack, mode)) is not None]
    return {word: words.count(word) for word in LEVELS if word in words}


def shortcomings(result: Result) -> list[tuple[str, str]]:
    """Return what the mount did badly under attack: what happened in which mode, and what was seen."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for attack in result.attacks:
        for mode in seen(result):
            one = outcome(attack, mode)
            if mode.kind == "mount" and one is not None and LEVELS[one.word] in {"poor", "bad", "worst"}:
                found.setdefault((attack.title, one.word, one.saw), []).append(mode.name)
    return [(f"{title}: {word} ({wording.listed(modes)})", saw) for (title, word, saw), modes in found.items()]


def no_shortcomings(result: Result) -> str:
    """Return what is said where there are none: that a mount withstood, or that none was attacked."""
    mounts = {mode.name for mode in seen(result) if mode.kind == "mount"}
    if any(one.mode in mounts and one.word != "not run" for attack in result.attacks for one in attack.outcomes):
        return (
            "No attack and no search that was run in a mount ended as partly found, found, unnoticed or data destroyed."
        )
    return "No attack and no search was run in a mount."


def targets(result: Result) -> list[tuple[Figure, Target]]:
    """Return every target with its figure, in the order of the figures."""
    return [(figure, target) for figure in result.figures for target in figure.targets]


def targets_line(result: Result) -> str:
    """Return one sentence on the targets: how many were met. Empty without targets."""
    found = targets(result)
    if not found:
        return ""
    met = sum(target.met for _, target in found)
    return f"{met} of {wording.counted(len(found), 'target')} met, {len(found) - met} missed."


def missed(result: Result) -> list[str]:
    """Return the targets that were missed, a sentence without an end for each."""
    works = {work.name: work for work in result.works}
    measures = {measure.name: measure for measure in result.measures}
    told = []
    for figure, target in targets(result):
        if not target.met:
            measure = measures[figure.measure]
            asked = wording.limit(target, measure.better)
            where = f"{figure.mode}, {works[figure.work].title} ({measure.title})"
            told.append(f"{where}: {wording.ratio(target.reached)}, asked for {asked}")
    return told
