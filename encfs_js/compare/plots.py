"""The plots of the report: ratios to plain, latencies, CPU, memory and disk, one small panel for each work.

A panel is as wide as a phone, so that its text can be read everywhere; the page sets them side by side where there is room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from encfs_js.compare import summary, wording
from encfs_js.compare.drawing import MARKERS, SIZE, bare, blank, colour, inline, settings, standalone, tones

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

    from encfs_js.compare.result import Better, Figure, Measure, Mode, Result, Spread, Work

WIDTH: Final = 340.0
_ROW: Final = 17.0  # height of a mode's line
_BELOW: Final = 22.0  # height of the axis' labels
_ABOVE: Final = 4.0
_LEFT: Final = 112.0  # for the names of the modes
_RIGHT: Final = 62.0  # for the values
_ROUND: Final = (1, 2, 2.5, 5, 10)  # steps between ticks
# The ticks of a decade, the most first: the first set of which no more than six fall on the axis.
_TICKS: Final = ((1, 1.5, 2, 3, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,))


@dataclass(frozen=True)
class Plot:
    """A panel for the page. svg: the drawing, safe to be put into HTML; says: what it shows, for who cannot see it."""

    name: str  # unique, an id
    title: str
    note: str  # behind the title
    says: str
    svg: str


@dataclass(frozen=True)
class _Line:
    """One line of a panel: a mode, and what is written at its right end."""

    mode: Mode
    tone: str
    value: str


def _panel(lines: Sequence[_Line]) -> tuple[Drawing, Axes]:
    """Return a figure with a line for each mode from the top down, at -0, -1, ..."""
    height = _ABOVE + _ROW * len(lines) + _BELOW
    figure = blank(WIDTH, height)
    inner = (WIDTH - _LEFT - _RIGHT) / WIDTH
    axes = figure.add_axes((_LEFT / WIDTH, _BELOW / height, inner, _ROW * len(lines) / height))
    bare(axes)
    axes.set_ylim(-len(lines) + 0.5, 0.5)
    axes.set_yticks([-place for place in range(len(lines))], [line.mode.name for line in lines])
    axes.tick_params(axis="y", length=0, pad=8)
    for place, line in enumerate(lines):
        axes.text(
            1 + 8 / (WIDTH - _LEFT - _RIGHT), -place, line.value, transform=axes.get_yaxis_transform(),
            va="center_baseline", ha="left", fontsize=SIZE,
        )  # fmt: skip
    axes.tick_params(axis="x", labelsize=SIZE - 1)
    axes.grid(visible=True, axis="x", color=colour("grid"), linewidth=0.7)
    return figure, axes


def _draw(name: str, title: tuple[str, str], says: str, lines: Sequence[_Line], put: Callable[[Axes], None]) -> Plot:
    with settings():
        figure, axes = _panel(lines)
        put(axes)
        return Plot(name, *title, says, inline(figure, name))


def _ratio_axis(axes: Axes, low: float, high: float, better: Better | None, shade: float = 1.0) -> None:
    """Make the x axis one of ratios: logarithmic, 1 marked, and shaded where it is worse than plain."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks: list[float] = []
    for steps in _TICKS:
        ticks = [tick for power in range(-4, 5) for step in steps if low <= (tick := step * 10.0**power) <= high]
        if len(ticks) <= 6:
            break
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if better is not None:
        worse = (low, 1.0) if better == "more" else (1.0, high)
        axes.axvspan(*worse, color=colour("worse"), alpha=shade, linewidth=0, zorder=0)
    axes.axvline(1, color=colour("muted"), linewidth=1.1, zorder=1)


def _dot(axes: Axes, place: float, found: Spread, mode: Mode, tone: str) -> None:
    """Draw a median with its range; what a logarithm cannot show is left out."""
    if found.median <= 0:
        return
    if len(found.values) > 1 and found.min > 0:
        axes.plot(
            [found.min, found.max], [place, place], color=colour(tone), linewidth=2, solid_capstyle="butt", zorder=3
        )
        for end in (found.min, found.max):
            axes.plot([end], [place], marker="|", markersize=7, markeredgewidth=1.3, color=colour(tone), zorder=3)
    axes.plot(
        [found.median], [place], marker=MARKERS[mode.kind], markersize=6.5, color=colour(tone),
        markeredgecolor=colour("paper"), markeredgewidth=0.8, zorder=4,
    )  # fmt: skip


def _span(spreads: Sequence[Spread], better: Better | None) -> tuple[float, float]:
    """Return the limits of an axis that holds all ratios, 1 and a good part of the side that is worse."""
    ends = [end for each in spreads for end in (each.min, each.max) if end > 0]
    least = [1.0] if better == "less" else [0.5]
    most = [1.0] if better == "more" else [2.0]
    return min(ends + least) / 1.12, max(ends + most) * 1.12


def _spans(parts: Sequence[tuple[Measure, Sequence[Figure | None]]]) -> dict[Better | None, tuple[float, float]]:
    """Return an axis for each way that is better, which holds the ratios of all measures of that way."""
    found: dict[Better | None, list[Spread]] = {}
    for measure, figures in parts:
        found.setdefault(measure.better, []).extend(each.ratio for each in figures if each and each.ratio)
    return {better: _span(spreads, better) for better, spreads in found.items()}


def ratios(result: Result) -> list[Plot]:
    """Return a panel for every work with a ratio to plain: its leading measure, on one axis for each way that is better."""
    figures = summary.by_name(result)
    modes = summary.seen(result)
    tone = tones(result.modes)
    chosen: list[tuple[Work, Measure, dict[str, Figure]]] = []
    for work in result.works:
        measure = summary.lead(result, work)
        if measure is not None:
            names = [mode.name for mode in modes if (work.name, measure.name, mode.name) in figures]
            chosen.append((work, measure, {name: figures[work.name, measure.name, name] for name in names}))
    spans = _spans([(measure, list(have.values())) for _, measure, have in chosen])
    found: list[Plot] = []
    for work, measure, have in chosen:
        shown = [mode for mode in modes if mode.kind != "plain" and mode.name in have]
        if not any(have[mode.name].ratio for mode in shown):
            continue

        def put(
            axes: Axes, shown: list[Mode] = shown, have: dict[str, Figure] = have, measure: Measure = measure
        ) -> None:
            _ratio_axis(axes, *spans[measure.better], measure.better)
            for place, mode in enumerate(shown):
                spread = have[mode.name].ratio
                if spread is not None:
                    _dot(axes, -place, spread, mode, tone[mode.name])

        lines = []
        for mode in shown:
            spread = have[mode.name].ratio
            lines.append(_Line(mode, tone[mode.name], "—" if spread is None else wording.ratio(spread.median)))
        note = ", ".join(filter(None, [measure.title, wording.which_way(measure.better)]))
        found.append(_draw(f"ratio-{len(found)}", (work.title, note), summary.work_line(result, work), lines, put))
    return found


def latency_measures(result: Result) -> list[Measure]:
    """Return the measures that are latencies of single requests, the middle first: p50, p99, max."""
    order = ("p50", "p99", "max")
    return sorted((each for each in result.measures if each.name in order), key=lambda each: order.index(each.name))


def latencies(result: Result) -> list[Plot]:
    """Return a panel for every work of which more than one latency is known: medians of p50, p99 and the longest."""
    figures, tone, measures = summary.by_name(result), tones(result.modes), latency_measures(result)
    marks = {"p50": ("o", 6.0), "p99": ("D", 5.0), "max": ("|", 9.0)}
    found: list[Plot] = []
    for work in result.works:
        shown, lines, said = [], [], []
        for mode in summary.seen(result):
            have = [(each, figures[key]) for each in measures if (key := (work.name, each.name, mode.name)) in figures]
            have = [(each, figure) for each, figure in have if figure.value.median > 0]
            if len(have) > 1:
                shown.append((mode, have))
                lines.append(_Line(mode, tone[mode.name], wording.amount(have[0][1].value.median, "s")))
                values = [f"{each.title} {wording.spread(figure.value, each.unit)}" for each, figure in have]
                said.append(f"{mode.name} {', '.join(values)}")
        if not shown:
            continue

        def put(axes: Axes, shown: list[tuple[Mode, list[tuple[Measure, Figure]]]] = shown) -> None:
            axes.set_xscale("log")
            for place, (mode, have) in enumerate(shown):
                values, shade = [figure.value.median for _, figure in have], colour(tone[mode.name])
                axes.plot([min(values), max(values)], [-place, -place], color=shade, linewidth=1.2, alpha=0.6, zorder=2)
                for each, figure in have:
                    marker, size = marks[each.name]
                    axes.plot(
                        [figure.value.median], [-place], marker=marker, markersize=size, markeredgecolor=shade,
                        markeredgewidth=1.5, markerfacecolor=shade if each.name == "p50" else colour("paper"), zorder=3,
                    )  # fmt: skip
            low, high = axes.get_xlim()
            axes.set_xlim(min(low, high / 12), high)  # so that a decade's tick is among them
            axes.xaxis.set_major_locator(LogLocator(10))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: wording.tick(value, "s")))

        found.append(_draw(f"latency-{len(found)}", (work.title, ""), f"{'; '.join(said)}.", lines, put))
    return found


def _stacked(result: Result, work: Work, first: str, second: str) -> list[tuple[Mode, float, float]]:
    """Return the medians of two measures for each mode that has one of them; 0 for what is missing."""
    figures = summary.by_name(result)
    found = []
    for mode in summary.seen(result):
        pair = [figures.get((work.name, name, mode.name)) for name in (first, second)]
        if any(pair):
            values = [0.0 if each is None else each.value.median for each in pair]
            found.append((mode, values[0], values[1]))
    return found


def _bars(result: Result, name: str, title: str, unit: str, parts: Sequence[tuple[Mode, float, float]]) -> Plot:
    """Return a panel of stacked bars: the server's part full, the daemon's part in outline."""
    tone = tones(result.modes)
    lines = [_Line(mode, tone[mode.name], wording.amount(server + daemon, unit)) for mode, server, daemon in parts]
    said = [
        f"{mode.name} {wording.amount(server, unit)} server"
        + (f" + {wording.amount(daemon, unit)} daemon" if daemon else "")
        for mode, server, daemon in parts
    ]

    def put(axes: Axes) -> None:
        for place, (mode, server, daemon) in enumerate(parts):
            shade = colour(tone[mode.name])
            axes.barh(-place, server, height=0.62, color=shade, edgecolor=shade, linewidth=0.9, zorder=2)
            if daemon:
                axes.barh(-place, daemon, height=0.62, left=server, color=colour("paper"), zorder=2)
                axes.barh(
                    -place, daemon, height=0.62, left=server, color=shade, alpha=0.3, linewidth=0, zorder=3,
                )  # fmt: skip
                axes.barh(
                    -place, daemon, height=0.62, left=server, fill=False, edgecolor=shade, linewidth=0.9, zorder=4
                )
        axes.set_xlim(0, max([server + daemon for _, server, daemon in parts] + [1e-9]) * 1.04)
        scale = wording.scale(max(server + daemon for _, server, daemon in parts), unit)
        ticks = [tick * scale for tick in MaxNLocator(3, steps=list(_ROUND)).tick_values(0, axes.get_xlim()[1] / scale)]
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick <= axes.get_xlim()[1]]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: wording.tick(value, unit)))

    return _draw(name, (title, ""), f"{'; '.join(said)}.", lines, put)


def cpu(result: Result) -> list[Plot]:
    """Return a panel for every work with CPU seconds: nats-server's and the daemon's on top of it."""
    found: list[Plot] = []
    for work in result.works:
        parts = _stacked(result, work, "cpu.server", "cpu.daemon")
        if parts:
            found.append(_bars(result, f"cpu-{len(found)}", work.title, "s", parts))
    return found


def memory(result: Result) -> list[Plot]:
    """Return one panel: for each mode the work in which server and daemon together had most memory."""
    most: dict[str, tuple[Mode, float, float]] = {}
    for work in result.works:
        for mode, server, daemon in _stacked(result, work, "memory.server", "memory.daemon"):
            if mode.name not in most or server + daemon > sum(most[mode.name][1:]):
                most[mode.name] = (mode, server, daemon)
    parts = [most[mode.name] for mode in summary.seen(result) if mode.name in most]
    return [_bars(result, "memory", "Memory, in the work with the most", "bytes", parts)] if parts else []


def _strip(result: Result, name: str, title: str, picked: dict[str, list[float]], better: Better | None) -> Plot:
    """Return a panel with a mark for each work on each mode's line, and its range at the right."""
    tone = tones(result.modes)
    shown = [mode for mode in summary.seen(result) if picked.get(mode.name)]
    lines, said = [], []
    for mode in shown:
        ends = [wording.ratio(end) for end in (min(picked[mode.name]), max(picked[mode.name]))]
        lines.append(_Line(mode, tone[mode.name], ends[0] if ends[0] == ends[1] else " .. ".join(ends)))
        said.append(f"{mode.name} {lines[-1].value}")

    def put(axes: Axes) -> None:
        everything = [value for values in picked.values() for value in values]
        low, high = min([*everything, 1.0]), max([*everything, 1.0])
        room = max(high - low, 0.1) * 0.08
        axes.set_xlim(low - room, high + room)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=list(_ROUND)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if better == "less":
            axes.axvspan(1, high + room, color=colour("worse"), linewidth=0, zorder=0)
        axes.axvline(1, color=colour("muted"), linewidth=1.1, zorder=1)
        for place, mode in enumerate(shown):
            axes.plot(
                picked[mode.name], [-place] * len(picked[mode.name]), linestyle="none", marker=MARKERS[mode.kind],
                markersize=5.5, color=colour(tone[mode.name]), markeredgecolor=colour("paper"), markeredgewidth=0.6,
                zorder=3,
            )  # fmt: skip

    return _draw(name, (title, ""), f"{'; '.join(said)}.", lines, put)


def disk(result: Result) -> list[Plot]:
    """Return the panels on the disk: bytes for each byte of payload, and bytes written beside plain."""
    found: list[Plot] = []
    for measure in result.measures:
        if measure.name not in {"overhead", "written"}:
            continue
        picked: dict[str, list[float]] = {}
        for figure in result.figures:
            value = figure.value if measure.unit == "ratio" else figure.ratio
            if figure.measure == measure.name and value is not None:
                picked.setdefault(figure.mode, []).append(value.median)
        if any(picked.values()):
            title = measure.title if measure.unit == "ratio" else f"{measure.title}, beside plain"
            found.append(_strip(result, f"disk-{measure.name}", title[:1].upper() + title[1:], picked, measure.better))
    return found


def readme_figure(result: Result) -> bytes:
    """Return an SVG file for the README, readable on white and on black: ratios to plain of the most telling works.

    Raises ValueError where nothing has a ratio.
    """
    figures, tone = summary.by_name(result), tones(result.modes)
    chosen = summary.telling(result)
    if not chosen:
        raise ValueError("no figure has a ratio to plain")
    shown = [mode for mode in summary.seen(result) if mode.kind != "plain"]
    table = [(work, each, [figures.get((work.name, each.name, mode.name)) for mode in shown]) for work, each in chosen]
    spans = _spans([(measure, have) for _, measure, have in table])
    left, gap, column, value, row = 118.0, 10.0, 98.0, 30.0, 20.0
    head, foot = 44.0, _BELOW + 22
    width, height = left + len(chosen) * (column + value + gap), head + row * len(shown) + foot
    with settings():
        drawing = blank(width, height)
        for index, (work, measure, have) in enumerate(table):
            start = left + index * (column + value + gap)
            axes = drawing.add_axes((start / width, foot / height, column / width, row * len(shown) / height))
            bare(axes)
            axes.set_ylim(-len(shown) + 0.5, 0.5)
            _ratio_axis(axes, *spans[measure.better], measure.better, shade=0.13)
            axes.tick_params(axis="x", labelsize=SIZE - 1)
            axes.set_yticks([-place for place in range(len(shown))], [mode.name for mode in shown] if not index else [])
            axes.tick_params(axis="y", length=0, pad=8)
            way = ", ".join(filter(None, [measure.title, wording.which_way(measure.better)]))
            for text, size, weight, above in ((work.title, SIZE, "bold", 18), (way, SIZE - 1.5, "normal", 5)):
                axes.annotate(
                    text, (0, 1), (0, above), xycoords="axes fraction", textcoords="offset points", ha="left", va="bottom",
                    fontsize=size, fontweight=weight,
                )  # fmt: skip
            for place, (mode, figure) in enumerate(zip(shown, have, strict=True)):
                if figure is not None and figure.ratio is not None:
                    _dot(axes, -place, figure.ratio, mode, tone[mode.name])
                    axes.text(
                        1 + 5 / column, -place, wording.ratio(figure.ratio.median), transform=axes.get_yaxis_transform(),
                        va="center_baseline", ha="left", fontsize=SIZE - 0.5,
                    )  # fmt: skip
        many = f"median, with the range of {result.rounds} rounds" if result.rounds > 1 else "one round"
        told = f"Ratio to a plain directory ({many}). The line is plain, the shaded side worse than it."
        drawing.text(left / width, 7 / height, told, fontsize=SIZE - 0.5, va="bottom", ha="left")
        return standalone(drawing, told)
