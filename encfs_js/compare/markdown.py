"""The report as Markdown: the same facts as the page, without the plots."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from encfs_js.compare import summary, wording
from encfs_js.compare.wording import LEVELS, SYMBOLS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from encfs_js.compare.result import Figure, Result, Work


def render(result: Result) -> str:
    """Return the report as Markdown. The same result gives the same text."""
    blocks = [
        *_head(result),
        *_summary(result),
        *_modes(result),
        *_attacks(result),
        *_targets(result),
        *_figures(result),
        *_failures(result),
        *_how(result),
        *_machine(result),
        "Every value of every round is in `compare.json`, beside this file.",
    ]
    return "\n\n".join(blocks) + "\n"


def escape(text: str) -> str:
    """Return a text that Markdown shows as it is: on one line, without markup, also within a table."""
    line = " ".join(text.split())
    line = re.sub(r"([\\`*|~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", line)
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("](", "]\\(")
    # What would begin a heading or a list; "1." becomes "1\\.".
    return re.sub(r"^(?:([#+-])|(\d+)([.)])(?=\s|$))", lambda found: f"{found[2] or ''}\\{found[1] or found[3]}", line)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: int | None = None) -> str:
    """Return a table of cells that are escaped already; from column `right` on they stand at the right."""
    rules = ["---:" if right is not None and place >= right else "---" for place in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rules, *rows))


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def _head(result: Result) -> Iterator[str]:
    machine = result.machine
    yield "# JetStream encrypted at rest, compared"
    yield (
        f"encfs_js {escape(result.encfs_js)}, `encfs-js compare`, {escape(wording.date(result.made))}: the same work"
        f"{' and the same attacks' if result.attacks else ''} on nats-server {escape(machine.nats_server)} in "
        f"{wording.counted(len(summary.seen(result)), 'way')} of keeping a store. "
        f"{wording.counted(result.rounds, 'round')} in {wording.duration(result.took)} on "
        f"{wording.counted(machine.cores, 'core')} of {escape(machine.processor)}."
    )
    if result.quick:
        yield "**This was a quick run.** It shows that everything works; its figures mean little."
    if result.interrupted:
        yield "**This run was interrupted.** What is here is what had been measured until then."


def _summary(result: Result) -> Iterator[str]:
    yield "## Summary"
    yield "Made from the figures below: no sentence here was written by hand."
    glance = summary.glance(result)
    if not result.figures:
        yield "There are no figures: nothing was measured to its end."
    elif not glance:
        yield "No figure has a ratio to plain: see all figures."
    lines = [*summary.telling_lines(result), *summary.extremes(result), summary.ceiling_line(result)]
    if any(lines):
        yield "### Speed"
        yield _bullets(list(filter(None, lines)))
    if glance:
        yield "### Ratios to plain"
        figures, modes = summary.by_name(result), summary.seen(result)
        rows = []
        for work, measure in glance:
            have = [figures.get((work.name, measure.name, mode.name)) for mode in modes]
            way = ", ".join(filter(None, [measure.title, wording.which_way(measure.better)]))
            rows.append([escape(work.title), escape(way), *(_glance(each, measure.unit) for each in have)])
        yield _table(["work", "measure", *(escape(mode.name) for mode in modes)], rows, 2)
    comparisons = summary.comparisons(result)
    if comparisons:
        yield "### The mount beside the server's own encryption"
    for title, each in comparisons:
        yield f"**{escape(title)}**"
        yield _bullets(each)
    tallies = [(mode, tally) for mode in summary.seen(result) if (tally := summary.tally(result, mode))]
    if tallies:
        words = [word for word in LEVELS if any(word in tally for _, tally in tallies)]
        yield "### Attacks, leaks and mistakes"
        rows = [[escape(mode.name), *(str(tally.get(word, "—")) for word in words)] for mode, tally in tallies]
        yield _table(["mode", *(f"{SYMBOLS[LEVELS[word]]} {word}" for word in words)], rows, 1)
        yield "### Where the mount did badly under attack"
        bad = [f"{title}. {saw}" for title, saw in summary.shortcomings(result)]
        yield _bullets(bad) if bad else summary.no_shortcomings(result)
    elif not result.attacks:
        yield "No attacks were run."


def _glance(figure: Figure | None, unit: str) -> str:
    if figure is None:
        return "—"
    return wording.spread(figure.value, unit) if figure.ratio is None else wording.spread(figure.ratio, "ratio")


def _modes(result: Result) -> Iterator[str]:
    yield "## What was compared"
    if not result.modes:
        yield "Nothing: no mode ran."
    else:
        rows = [
            [
                escape(mode.name),
                escape(mode.title),
                escape(mode.cipher) or "—",
                "yes" if mode.ran else f"no: {escape(mode.why)}",
            ]
            for mode in result.modes
        ]
        yield _table(["mode", "what it is", "cipher", "ran"], rows)
    if result.notes:
        yield _bullets(result.notes)


def _attacks(result: Result) -> Iterator[str]:
    if not result.attacks:
        return
    yield "## Attacks and leaks"
    used = [word for word in LEVELS if any(word == each.word for attack in result.attacks for each in attack.outcomes)]
    yield _table(
        ["outcome", "what it means"], [[f"{SYMBOLS[LEVELS[word]]} {word}", wording.MEANINGS[word]] for word in used]
    )
    modes = [mode for mode in summary.seen(result) if any(summary.outcome(attack, mode) for attack in result.attacks)]
    for kind, title in wording.KINDS.items():
        attacks = [attack for attack in result.attacks if attack.kind == kind]
        if not attacks:
            continue
        rows = []
        for attack in attacks:
            found = [summary.outcome(attack, mode) for mode in modes]
            cells = [f"{SYMBOLS[LEVELS[one.word]]} {one.word}" if one else "no outcome" for one in found]
            rows.append([escape(attack.title), *cells])
        yield f"### {title}"
        yield _table(["attack", *(escape(mode.name) for mode in modes)], rows)
        for attack in attacks:
            seen: dict[tuple[str, str], list[str]] = {}
            for outcome in attack.outcomes:
                seen.setdefault((outcome.word, outcome.saw), []).append(outcome.mode)
            yield f"**{escape(attack.title)}.** {escape(attack.what)}"
            if seen:
                yield _bullets([f"{', '.join(names)}: {word}. {saw}" for (word, saw), names in seen.items()])


def _targets(result: Result) -> Iterator[str]:
    if not summary.targets(result):
        return
    works, measures = {work.name: work for work in result.works}, {each.name: each for each in result.measures}
    yield "## Targets"
    yield summary.targets_line(result)
    rows = []
    for figure, target in summary.targets(result):
        measure = measures[figure.measure]
        rows.append(
            [
                escape(figure.mode),
                escape(works[figure.work].title),
                escape(measure.title),
                escape(wording.limit(target, measure.better)),
                wording.ratio(target.reached),
                "✓ met" if target.met else "✗ missed",
            ]
        )
    yield _table(["mode", "work", "measure", "asked for", "reached", "outcome"], rows)


def _cell(figure: Figure | None, unit: str, result: Result) -> str:
    if figure is None:
        return "—"
    parts = [wording.spread(figure.value, unit)]
    if figure.ratio is not None:
        parts.append(f"\N{MULTIPLICATION SIGN} {wording.spread(figure.ratio, 'ratio')}")
    return "<br>".join(filter(None, [*parts, wording.rounds(figure, result)]))


def _figures(result: Result) -> Iterator[str]:
    if not result.figures:
        return
    yield "## All figures"
    first = "Median [least .. most] of the rounds" if result.rounds > 1 else "The value of the one round"
    yield f"{first}; after \N{MULTIPLICATION SIGN} the ratio to plain of the same round."
    figures = summary.by_name(result)
    for work in result.works:
        measures = [each for each in result.measures if any((work.name, each.name) == key[:2] for key in figures)]
        if not measures:
            continue
        modes = [
            mode for mode in result.modes if any((work.name, each.name, mode.name) in figures for each in measures)
        ]
        yield f"### {escape(work.title)}"
        yield _about(work)
        rows = []
        for measure in measures:
            way = f" ({wording.which_way(measure.better)})" if measure.better else ""
            found = [figures.get((work.name, measure.name, mode.name)) for mode in modes]
            rows.append([escape(measure.title) + way, *(_cell(each, measure.unit, result) for each in found)])
        yield _table(["measure", *(escape(mode.name) for mode in modes)], rows, 1)


def _about(work: Work) -> str:
    told = f"{escape(work.what)} {wording.cold(work.cold).capitalize()}."
    if work.ceiling is not None:
        told += f" Ceiling of the load generator: {wording.spread(work.ceiling, '1/s')}."
    if work.ceiling_share is not None:
        told += f" The fastest mode came to {wording.ratio(work.ceiling_share)} of it"
        told += ": nearly the limit." if summary.near_ceiling(work) else "."
    return told


def _failures(result: Result) -> Iterator[str]:
    if not result.failures:
        return
    titles = summary.titles(result)
    yield "## What failed"
    for failure in result.failures:
        where = f", round {failure.round}" if failure.round else ""
        yield f"**{escape(f'{failure.mode}, {titles.get(failure.work, failure.work)}')}{where}**"
        # Longer than any row of tildes in it, so that nothing in it ends the block.
        fence = "~" * max([3, *(len(row) + 1 for row in re.findall("~+", failure.error))])
        yield f"{fence}text\n{failure.error}\n{fence}"


def _how(result: Result) -> Iterator[str]:
    yield "## How it was measured"
    lines = [*wording.METHOD]
    if result.rounds > 1:
        lines += wording.METHOD_ROUNDS
    if any(work.ceiling is not None for work in result.works):
        lines.append(wording.METHOD_CEILING)
    yield _bullets(lines)
    works = [work for work in result.works if not any(figure.work == work.name for figure in result.figures)]
    if works:
        yield _table(["work without figures", "what is done"], [[escape(work.title), _about(work)] for work in works])


def _machine(result: Result) -> Iterator[str]:
    yield "## Machine"
    yield _table(["what", "which"], [[name, escape(value)] for name, value in wording.machine(result.machine)])
