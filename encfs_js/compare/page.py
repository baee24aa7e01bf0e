"""The report as one HTML page that needs nothing else: no network, no script, plots and style inside."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import jinja2
from markupsafe import Markup

from encfs_js.compare import drawing, plots, summary, wording

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from encfs_js.compare.plots import Plot
    from encfs_js.compare.result import Attack, Figure, Measure, Mode, Result, Word, Work

_HERE: Final = os.path.dirname(__file__)


@dataclass(frozen=True)
class _Cell:
    """One figure in a table, in words."""

    value: str
    between: str
    ratio: str
    ratio_between: str
    rounds: str


@dataclass(frozen=True)
class _Table:
    """All figures of a work: a line for each measure, a column for each mode."""

    work: Work
    modes: list[Mode]
    rows: list[tuple[Measure, list[_Cell | None]]]


@dataclass(frozen=True)
class _Row:
    """One attack, and its cells in the order of the modes; where several modes saw the same it is one note."""

    attack: Attack
    cells: list[tuple[Mode, Word | None]]
    notes: list[tuple[list[Mode], Word, str]]  # no modes: all of them


@dataclass(frozen=True)
class _Chapter:
    """A group of plots under one heading."""

    name: str
    title: str
    reads: str  # how to read them
    plots: list[Plot]


def _cell(figure: Figure, measure: Measure, result: Result) -> _Cell:
    return _Cell(
        wording.amount(figure.value.median, measure.unit),
        wording.between(figure.value, measure.unit),
        wording.ratio(figure.ratio.median) if figure.ratio else "",
        wording.between(figure.ratio, "ratio") if figure.ratio else "",
        wording.rounds(figure, result),
    )


def _tables(result: Result) -> list[_Table]:
    figures = summary.by_name(result)
    found = []
    for work in result.works:
        modes = [
            mode
            for mode in result.modes
            if any((work.name, each.name, mode.name) in figures for each in result.measures)
        ]
        rows: list[tuple[Measure, list[_Cell | None]]] = []
        for measure in result.measures:
            have = [figures.get((work.name, measure.name, mode.name)) for mode in modes]
            cells = [None if each is None else _cell(each, measure, result) for each in have]
            if any(cells):
                rows.append((measure, cells))
        if rows:
            found.append(_Table(work, modes, rows))
    return found


def _glance(result: Result, modes: Sequence[Mode]) -> list[tuple[Work, Measure, list[_Cell | None]]]:
    """Return the leading figures of all works that have a ratio to plain, a cell for each mode."""
    figures = summary.by_name(result)
    found = []
    for work, measure in summary.glance(result):
        have = [figures.get((work.name, measure.name, mode.name)) for mode in modes]
        found.append((work, measure, [None if each is None else _cell(each, measure, result) for each in have]))
    return found


def _matrix(result: Result, modes: Sequence[Mode]) -> list[tuple[str, list[_Row]]]:
    """Return the attacks by kind, those that there are."""
    found = []
    for kind, title in wording.KINDS.items():
        rows = []
        for attack in result.attacks:
            if attack.kind != kind:
                continue
            cells: list[tuple[Mode, Word | None]] = []
            notes: dict[tuple[Word, str], list[Mode]] = {}
            for mode in modes:
                outcome = summary.outcome(attack, mode)
                cells.append((mode, outcome.word if outcome else None))
                if outcome:
                    notes.setdefault((outcome.word, outcome.saw), []).append(mode)
            told = [([] if len(who) == len(cells) else who, word, saw) for (word, saw), who in notes.items()]
            rows.append(_Row(attack, cells, told))
        if rows:
            found.append((title, rows))
    return found


def _chapters(result: Result) -> list[_Chapter]:
    whisker = ", the bar from the least to the most of the rounds" if result.rounds > 1 else ""
    return [
        _Chapter(
            "ratios",
            "Speed beside a plain directory",
            f"One panel for each work. The mark is the median ratio to plain{whisker}; the line at 1 is plain, and the shaded "
            "side is worse than plain. All panels in which more is better share one logarithmic axis, all others another. The "
            "number is the median ratio.",
            plots.ratios(result),
        ),
        _Chapter(
            "latency",
            "Latency of single requests",
            "Filled: p50, which the number gives as well. Open diamond: p99. Upright stroke: the longest. Medians of the "
            "rounds, logarithmic axes, which differ from panel to panel.",
            plots.latencies(result),
        ),
        _Chapter(
            "cpu",
            "CPU",
            "Seconds of CPU for the whole work. Full: nats-server. Light: the daemon of the mount, on top of it. The number is "
            "the sum. The load generator is not counted.",
            plots.cpu(result),
        ),
        _Chapter(
            "room",
            "Memory and disk",
            "Memory as in CPU: full for nats-server, light for the daemon. On the disk: a mark for each work, the numbers are "
            "the least and the most of them; the line is at 1.",
            [*plots.memory(result), *plots.disk(result)],
        ),
    ]


def _style() -> Markup:
    """Return the page's style, with the palette as CSS variables."""
    with open(os.path.join(_HERE, "page.css"), encoding="utf-8") as file:
        text = file.read()
    light = "".join(f"--{name}:{shades[0]};" for name, shades in drawing.PALETTE.items())
    dark = "".join(f"--{name}:{shades[1]};" for name, shades in drawing.PALETTE.items())
    # Nothing of a Result is in it: only this package's own files and palette.
    return Markup(f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{text}")  # noqa: S704


def _svg(plot: Plot) -> Markup:
    """Return a plot for the page: matplotlib has escaped every text in it."""
    return Markup(plot.svg)  # noqa: S704


def _anchors(names: Sequence[str], prefix: str) -> Callable[[str], str]:
    """Return a function that gives a name its id: names may hold what an id may not."""
    places = {name: f"{prefix}-{place}" for place, name in enumerate(names)}
    return places.__getitem__


def render(result: Result) -> str:
    """Return the page as HTML. The same result gives the same page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    modes = summary.seen(result)
    works = {work.name: work for work in result.works}
    return environment.get_template("page.html.j2").render(
        result=result,
        modes=modes,
        absent=[mode for mode in result.modes if not mode.ran],
        tone=drawing.tones(result.modes),
        shapes=drawing.SHAPES,
        words=wording,
        style=_style(),
        svg=_svg,
        works=works,
        measures={measure.name: measure for measure in result.measures},
        titles=summary.titles(result),
        near=summary.near_ceiling,
        ceilings=[work for work in result.works if work.ceiling is not None],
        glance=_glance(result, modes),
        telling=summary.telling_lines(result),
        comparisons=summary.comparisons(result),
        extremes=summary.extremes(result),
        ceiling_line=summary.ceiling_line(result),
        tallies=[(mode, tally) for mode in modes if (tally := summary.tally(result, mode))],
        shortcomings=summary.shortcomings(result),
        no_shortcomings=summary.no_shortcomings(result),
        matrix=_matrix(result, [mode for mode in modes if any(summary.outcome(each, mode) for each in result.attacks)]),
        used=[
            word for word in wording.LEVELS if any(word == each.word for one in result.attacks for each in one.outcomes)
        ],
        chapters=[chapter for chapter in _chapters(result) if chapter.plots],
        tables=_tables(result),
        targets=summary.targets(result),
        targets_line=summary.targets_line(result),
        missed=summary.missed(result),
        anchor=_anchors(list(works), "work"),
    )
