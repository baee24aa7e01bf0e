"""The report of a comparison: that every fact is in it, nothing else, and that it can be read everywhere."""

from __future__ import annotations

import functools
import io
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import compare_browser
import compare_sample
import msgspec
import pytest
from compare_html import Element, parse, sound
from matplotlib import image

from encfs_js.compare import drawing, markdown, page, plots, result, summary, wording
from encfs_js.compare.result import Attack, Failure, Figure, Measure, Mode, Outcome, Result, Target, Work, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from compare_browser import Browser

SAMPLE = compare_sample.full()
NASTY = """<script>alert("1")</script> & 'two' | $x_1$ `code` *b* _i_ ](javascript:x) </svg></style>"""
LONG = "x" * 20_000


def changed(given: Result = SAMPLE, **fields: Any) -> Result:
    return msgspec.structs.replace(given, **fields)


def without(*names: str) -> Result:
    """The sample where some modes did not run."""
    modes = [
        Mode(each.name, each.title, each.kind, each.cipher, ran=False, why=f"{each.name} is not installed")
        if each.name in names
        else each
        for each in SAMPLE.modes
    ]
    attacks = [
        msgspec.structs.replace(each, outcomes=[one for one in each.outcomes if one.mode not in names])
        for each in SAMPLE.attacks
    ]
    return changed(modes=modes, attacks=attacks, figures=[each for each in SAMPLE.figures if each.mode not in names])


def no_ratios() -> Result:
    return changed(figures=[msgspec.structs.replace(each, ratio=None, targets=[]) for each in SAMPLE.figures])


def zeroes() -> Result:
    nothing = spread([0.0, 0.0, 0.0])
    return changed(figures=[Figure(each.work, each.measure, each.mode, nothing, None, []) for each in SAMPLE.figures])


def failures_only() -> Result:
    failed = [Failure("mount aes", "publish-512", 1, LONG), Failure("plain", "gone", 0, NASTY + "\n~~~\n~~~~~\nmore")]
    return changed(modes=[], works=[], measures=[], figures=[], attacks=[], notes=[], failures=failed)


def nasty() -> Result:
    plain = [each.name for named in (SAMPLE.modes, SAMPLE.works, SAMPLE.attacks) for each in named]
    names = {each: f"{NASTY} {each}" for each in plain}
    made = changed(
        modes=[msgspec.structs.replace(each, name=names[each.name], title=NASTY) for each in SAMPLE.modes],
        works=[msgspec.structs.replace(each, name=names[each.name], title=NASTY, what=NASTY) for each in SAMPLE.works],
        figures=[
            msgspec.structs.replace(
                each, mode=names[each.mode], work=names[each.work], targets=[Target(NASTY, 1, 2, met=False)]
            )
            for each in SAMPLE.figures
        ],
        notes=[NASTY],
        failures=[Failure(NASTY, NASTY, 1, NASTY)],
        attacks=[
            Attack(
                names[each.name],
                NASTY,
                NASTY,
                each.kind,
                [Outcome(names[one.mode], one.word, NASTY) for one in each.outcomes],
            )
            for each in SAMPLE.attacks
        ],
    )
    return changed(
        made, machine=msgspec.structs.replace(SAMPLE.machine, processor=NASTY, references=[NASTY]), made=NASTY
    )


def sparse() -> Result:
    """Some works have no figures at all, some modes only a few, and one value is missing here and there."""
    return changed(figures=[each for number, each in enumerate(SAMPLE.figures) if number % 3 and each.work != "replay"])


ODD: dict[str, Callable[[], Result]] = {
    "sample": lambda: SAMPLE,
    "no mount": lambda: without("mount aes", "mount chachapoly", "gocryptfs", "securefs"),
    "no plain": lambda: without("plain"),
    "plain only": lambda: without(*(each.name for each in SAMPLE.modes if each.name != "plain")),
    "no attacks": lambda: changed(attacks=[]),
    "attacks only": lambda: changed(figures=[], works=[], measures=[]),
    "attacks without outcomes": lambda: changed(attacks=[msgspec.structs.replace(SAMPLE.attacks[0], outcomes=[])]),
    "failures only": failures_only,
    "nothing": lambda: changed(modes=[], works=[], measures=[], figures=[], attacks=[], failures=[], notes=[]),
    "one round": lambda: compare_sample.full(rounds=1),
    "no ratios": no_ratios,
    "zeroes": zeroes,
    "sparse": sparse,
    "nasty": nasty,
    "quick": lambda: changed(quick=True, interrupted=True),
}


@functools.cache
def shown(name: str) -> str:
    """The page of an odd result, made once: plots take a second."""
    return page.render(ODD[name]())


@pytest.fixture(params=ODD)
def odd(request: pytest.FixtureRequest) -> Result:
    return ODD[request.param]()


def test_the_sample_can_be_written_and_read() -> None:
    assert result.decode(result.encode(SAMPLE)) == SAMPLE
    assert compare_sample.full() == SAMPLE


@pytest.mark.parametrize("name", ODD)
def test_every_odd_result_makes_a_sound_page(name: str) -> None:
    odd, root = ODD[name](), sound(shown(name))
    assert root.one("title").text == root.one("h1").text
    for failure in odd.failures:
        assert " ".join(failure.error.split()) in root.one("section", id="failures").text
    for mode in odd.modes:
        assert " ".join(mode.name.split()) in root.one("section", id="modes").text
        assert " ".join(mode.why.split()) in root.one("section", id="modes").text


def rows_of(text: str) -> Iterator[list[list[str]]]:
    """Yield the tables of a Markdown text, as cells."""
    inside: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            assert line.endswith(" |")
            inside.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif inside:
            yield inside
            inside = []


def test_every_odd_result_makes_sound_markdown(odd: Result) -> None:
    text = markdown.render(odd)
    tables = list(rows_of(re.sub(r"^(~~~+)text$.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)))
    assert tables
    for table in tables:
        assert len({len(row) for row in table}) == 1, table
        assert all(re.fullmatch(r"---:?", cell) for cell in table[1])
    assert all(failure.error in text for failure in odd.failures)


def test_every_odd_result_makes_a_figure_for_the_readme_or_says_why_not(odd: Result) -> None:
    if not any(figure.ratio for figure in odd.figures):
        with pytest.raises(ValueError, match="no figure has a ratio"):
            plots.readme_figure(odd)
        return
    root = ET.fromstring(plots.readme_figure(odd))
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for work, measure in summary.telling(odd):
        assert work.title in words
        for figure in odd.figures:
            if (figure.work, figure.measure) == (work.name, measure.name) and figure.ratio:
                assert wording.ratio(figure.ratio.median) in words


def test_two_renderings_are_equal(odd: Result) -> None:
    assert markdown.render(odd) == markdown.render(odd)
    if any(figure.ratio for figure in odd.figures):
        assert plots.readme_figure(odd) == plots.readme_figure(odd)


@pytest.mark.parametrize("name", ["sample", "sparse", "nasty"])
def test_two_pages_are_equal(name: str) -> None:
    assert page.render(ODD[name]()) == shown(name)


def test_pages_of_two_processes_are_equal() -> None:
    """Also where sets come out in another order."""
    script = "import sys, compare_sample; from encfs_js.compare import page; sys.stdout.write(page.render(compare_sample.full()))"
    made = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=os.path.dirname(__file__),
            env={**os.environ, "PYTHONHASHSEED": seed, "SOURCE_DATE_EPOCH": seed, "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2")
    ]
    assert made[0] == made[1] == shown("sample").encode()


def cells(table: Element) -> dict[tuple[str, str], str]:
    """Return the cells of a table by the heads of their row and column, without what is said small below the head."""
    columns = [each.text for each in table.one("thead").all("th")]
    found: dict[tuple[str, str], str] = {}
    for row in table.one("tbody").all("tr"):
        inside = [each for each in row.inside if isinstance(each, Element)]
        small = [each.text for each in inside[0].all(class_="what")]
        name = inside[0].text.removesuffix(small[0]).strip() if small else inside[0].text
        found |= {(name, column): cell.text for column, cell in zip(columns[1:], inside[1:], strict=True)}
    return found


@pytest.mark.parametrize("name", ["sample", "one round", "sparse", "no plain"])
def test_every_figure_is_in_the_tables(name: str) -> None:
    given = ODD[name]()
    root = sound(shown(name))
    articles = {each.one("h3").text: cells(each.one("table")) for each in root.all("article")}
    sections = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", markdown.render(given), re.MULTILINE | re.DOTALL))
    works, measures = {each.name: each.title for each in given.works}, {each.name: each for each in given.measures}
    shape = {each.name: drawing.SHAPES[each.kind] for each in given.modes}
    assert given.figures
    for figure in given.figures:
        measure = measures[figure.measure]
        title = works[figure.work]
        told = [wording.amount(figure.value.median, measure.unit), wording.between(figure.value, measure.unit)]
        if figure.ratio:
            told += [f"× {wording.ratio(figure.ratio.median)}", wording.between(figure.ratio, "ratio")]  # noqa: RUF001
        if len(figure.value.values) < given.rounds:
            told.append(f"{len(figure.value.values)} of {given.rounds} rounds")
        text = " ".join(filter(None, told))
        assert articles[title][measure.title, f"{shape[figure.mode]} {figure.mode}"] == text
        (table,) = rows_of(sections[title])
        (row,) = [each for each in table if re.sub(r" \(.*", "", each[0]) == measure.title]
        assert row[table[0].index(figure.mode)].replace("<br>", " ") == text


def test_every_outcome_is_in_the_matrix_and_what_was_seen_below_it() -> None:
    root = sound(shown("sample"))
    bodies = {
        next(each for each in body.one("th").inside if isinstance(each, str)).strip(): list(body.all("tr"))
        for matrix in root.all("table", class_="matrix")
        for body in matrix.all("tbody")
    }
    tables = {
        row[0]: dict(zip(table[0], row, strict=True)) for table in rows_of(markdown.render(SAMPLE)) for row in table
    }
    assert len(bodies) == len(SAMPLE.attacks)
    for attack in SAMPLE.attacks:
        above, below = bodies[attack.title]
        found = [each.text for each in above.all("td")]
        for outcome, mode, cell in zip(attack.outcomes, SAMPLE.modes, found, strict=True):
            symbol = wording.SYMBOLS[wording.LEVELS[outcome.word]]
            assert cell == f"{drawing.SHAPES[mode.kind]} {mode.name} {symbol} {outcome.word}"
            assert outcome.saw in below.text
            assert tables[attack.title][mode.name] == f"{symbol} {outcome.word}"
    assert all(outcome.saw in markdown.render(SAMPLE) for attack in SAMPLE.attacks for outcome in attack.outcomes)


def test_outcomes_differ_without_colour() -> None:
    levels = list(wording.SYMBOLS.values())
    assert len(set(levels)) == len(levels)
    assert set(wording.LEVELS) == set(wording.MEANINGS)


def test_what_is_foreign_stays_text() -> None:
    root = sound(shown("nasty"))
    told = root.text
    assert told.count(" ".join(NASTY.split())) > 100
    assert "&lt;" not in told
    text = markdown.render(nasty())
    outside = re.sub(r"^(~~~+)text$.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in outside
    assert not re.search(r"[^\\]`code", outside)
    assert "](javascript" not in outside


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("a | b", "a \\| b"),
        ("# a", "\\# a"),
        ("1. a", "1\\. a"),
        ("1.5 a", "1.5 a"),
        ("sync_interval", "sync_interval"),
        ("__a__", "\\_\\_a\\_\\_"),
        ("a\n\n- b", "a - b"),
        ("<b>&", "&lt;b&gt;&amp;"),
    ],
)
def test_markdown_is_escaped(given: str, wanted: str) -> None:
    assert markdown.escape(given) == wanted


def test_banners_and_notes_are_there_only_when_they_are_true() -> None:
    plain, banners = sound(shown("sample")), sound(shown("quick"))
    assert not list(plain.all(class_="banner"))
    assert [each.one("strong").text for each in banners.all(class_="banner")] == [
        "This was a quick run.",
        "This run was interrupted.",
    ]
    assert "quick run" not in markdown.render(SAMPLE)
    assert "quick run" in markdown.render(changed(quick=True))
    assert "was interrupted" in markdown.render(changed(interrupted=True))
    assert all(note in plain.one("section", id="modes").text for note in SAMPLE.notes)


def test_failures_and_absent_modes_are_told_with_their_reasons() -> None:
    given = changed(without("securefs"), failures=[Failure("mount aes", "replay", 2, "lost 3 messages")])
    root = sound(page.render(given))
    assert "securefs did not run: securefs is not installed" in root.one("section", id="modes").text
    assert "mount aes, ordered replay, round 2 lost 3 messages" in root.one("section", id="failures").text
    assert "no: securefs is not installed" in markdown.render(given)
    assert "**mount aes, ordered replay, round 2**" in markdown.render(given)
    assert not any("securefs" in each.text for each in root.one("section", id="attacks").all("th"))


# --- numbers


@pytest.mark.parametrize(
    ("value", "unit", "wanted"),
    [
        (1_234_000, "1/s", "1.23 M/s"),
        (541_300, "1/s", "541 k/s"),
        (999_600, "1/s", "1.00 M/s"),
        (12.34, "1/s", "12.3/s"),
        (0, "1/s", "0/s"),
        (0.000345, "s", "345 µs"),
        (0.0009996, "s", "1.00 ms"),
        (0.001, "s", "1.00 ms"),
        (3e-9, "s", "3.00 ns"),
        (0, "s", "0 s"),
        (235.4, "s", "235 s"),
        (0, "bytes", "0 B"),
        (1023, "bytes", "1,020 B"),
        (1024, "bytes", "1.00 KiB"),
        (24 << 30, "bytes", "24.0 GiB"),
        (0.906, "ratio", "0.91"),
        (1.3, "ratio", "1.30"),
        (0.00123, "ratio", "0.001"),
        (12_345.6, "ratio", "12,345.60"),
        (7, "files", "7.00 files"),
        (-0.5, "s", "-500 ms"),
    ],
)
def test_numbers_are_for_people(value: float, unit: str, wanted: str) -> None:
    assert wording.amount(value, unit) == wanted


@pytest.mark.parametrize(
    ("values", "unit", "wanted"),
    [
        ([541_000, 510_000, 1_200_000], "1/s", "541 k/s [510 .. 1,200]"),
        ([0.9, 1.1, 1.0], "ratio", "1.00 [0.90 .. 1.10]"),
        ([0.5], "s", "500 ms"),
        ([0.0, 0.0, 0.02], "s", "0 s [0 .. 20.0 ms]"),
        ([0.0, 0.0, 3 << 20], "bytes", "0 B [0 .. 3.00 MiB]"),
    ],
)
def test_a_range_is_in_the_unit_of_its_median(values: list[float], unit: str, wanted: str) -> None:
    assert wording.spread(spread(values), unit) == wanted


def test_times_are_for_people() -> None:
    assert [wording.duration(each) for each in (45, 150, 3 * 3600 + 300, 7199)] == [
        "45 s",
        "2 min",
        "3 h 5 min",
        "2 h 0 min",
    ]
    assert wording.date("2026-03-04T05:06:07+00:00") == "4 March 2026, 05:06 UTC"
    assert wording.date("2026-03-04T05:06:07Z") == "4 March 2026, 05:06 UTC"
    assert wording.date("soon") == "soon"


# --- sentences


@pytest.mark.parametrize(
    ("ours", "theirs", "better", "wanted"),
    [
        ([0.9, 0.8], [0.7, 0.79], "more", "better"),
        ([0.9, 0.8], [0.7, 0.79], "less", "worse"),
        ([0.9, 0.8], [0.7, 0.80], "more", "even"),
        ([0.5, 0.6], [0.7, 0.8], "more", "worse"),
        ([0.9], [0.7], "more", "even"),
        ([0.9, 0.8], [0.7, 0.79], None, "even"),
    ],
)
def test_better_is_said_only_where_ranges_do_not_overlap(
    ours: list[float], theirs: list[float], better: result.Better | None, wanted: str
) -> None:
    assert summary.standing(spread(ours), spread(theirs), better) == wanted


def small(
    ours: list[float], theirs: list[float], better: result.Better, words: tuple[result.Word, result.Word]
) -> Result:
    """A comparison of one work and one attack."""
    measure = Measure("rate" if better == "more" else "time", "speed", "1/s" if better == "more" else "s", better)
    figures = [
        Figure("w", measure.name, mode, spread(values), spread(values), [])
        for mode, values in (("mount aes", ours), ("server aes", theirs))
    ]
    plain = Figure("w", measure.name, "plain", spread([1.0, 1.0]), None, [])
    outcomes = [Outcome(mode, word, "seen") for mode, word in zip(("mount aes", "server aes"), words, strict=True)]
    return changed(
        rounds=len(ours),
        works=[Work("w", "the work", "", None, None, None)],
        measures=[measure],
        figures=[plain, *figures],
        attacks=[Attack("a", "the attack", "", "attack", outcomes)],
    )


def test_the_summary_follows_the_figures() -> None:
    win = small([0.9, 0.8], [0.5, 0.6], "more", ("refused", "unnoticed"))
    loss = small([0.9, 0.8], [0.5, 0.6], "less", ("data destroyed", "detected"))
    even = small([0.9, 0.5], [0.5, 0.6], "more", ("refused", "detected"))
    ((title, lines),) = summary.comparisons(win)
    assert title == "mount aes beside server aes"
    assert lines == [
        "Faster in 1 of 1 works: the work (0.85 against 0.55).",
        "Slower in 0 of 1 works.",
        "The ranges overlap in 0 of 1.",
        "Attacks, leaks and mistakes: ended better in 1 of 1, worse in 0, alike in 0.",
    ]
    ((_, lines),) = summary.comparisons(loss)
    assert lines[1] == "Slower in 1 of 1 works: the work (0.85 against 0.55)."
    assert lines[3] == "Attacks, leaks and mistakes: ended better in 0 of 1, worse in 1: the attack, alike in 0."
    ((_, lines),) = summary.comparisons(even)
    assert lines[2:] == [
        "The ranges overlap in 1 of 1.",
        "Attacks, leaks and mistakes: ended better in 0 of 1, worse in 0, alike in 1.",
    ]
    assert summary.telling_lines(win) == [
        "the work (speed): plain 1.00/s; mount aes 0.85 [0.80 .. 0.90] of plain (server aes 0.55 [0.50 .. 0.60])."
    ]
    assert summary.extremes(loss) == [
        "mount aes came out worst against plain in the work (speed): 0.85 [0.80 .. 0.90] times plain."
    ]
    one = small([0.9], [0.5], "more", ("not run", "detected"))
    assert summary.comparisons(one) == [
        ("mount aes beside server aes", ["One round has no spread: which of the two is faster cannot be told from it."])
    ]
    for given in (win, loss, even, one):
        told = sound(page.render(given)).one("section", id="summary").text
        text = markdown.render(given)
        for _, each in summary.comparisons(given):
            assert all(line in told and line in text for line in each)


def test_where_the_mount_does_badly_is_said() -> None:
    root = sound(shown("sample"))
    told = root.one("section", id="summary").text
    bad = summary.shortcomings(SAMPLE)
    assert [title for title, _ in bad] == [
        "Names of streams: found (mount chachapoly and mount aes)",
        "An old block put back: unnoticed (mount chachapoly and mount aes)",
        "An old stream put back: unnoticed (mount chachapoly and mount aes)",
    ]
    for title, saw in bad:
        assert f"{title} {saw}" in told
        assert f"- {title}. {saw}" in markdown.render(SAMPLE)
    good = small([0.9, 0.8], [0.5, 0.6], "more", ("refused", "unnoticed"))
    spared = small([0.9, 0.8], [0.5, 0.6], "more", ("not run", "unnoticed"))
    withstood = (
        "No attack and no search that was run in a mount ended as partly found, found, unnoticed or data destroyed."
    )
    for given, wanted in ((good, withstood), (spared, "No attack and no search was run in a mount.")):
        assert wanted in sound(page.render(given)).one("section", id="summary").text
        assert wanted in markdown.render(given)
    assert withstood not in shown("no mount")
    assert "was run in a mount" not in shown("sample")


def test_what_did_not_happen_is_not_claimed() -> None:
    text = sound(shown("nothing")).text
    for claim in ("same attacks", "every mode has its turn", "Faster in", "Where the mount did badly"):
        assert claim not in text
        assert claim not in markdown.render(ODD["nothing"]())
    assert "Nothing: no mode ran." in text
    kept = changed(ODD["nothing"](), notes=["not root"])
    assert "- not root\n" in markdown.render(kept)
    assert "not root" in sound(page.render(kept)).one("section", id="modes").text
    assert "No attacks were run." in sound(shown("no attacks")).text
    assert "There are no figures: nothing was measured to its end." in sound(shown("attacks only")).text
    assert "No figure has a ratio to plain" in sound(shown("zeroes")).text


def test_how_often_each_outcome_came_is_counted() -> None:
    found = cells(sound(shown("sample")).one("table", class_="tally"))
    assert len(found) == len(SAMPLE.modes) * len(wording.LEVELS)
    (table,) = [each for each in rows_of(markdown.render(SAMPLE)) if each[0][:2] == ["mode", "✓ refused"]]
    for mode, row in zip(SAMPLE.modes, table[2:], strict=True):
        words = [one.word for attack in SAMPLE.attacks for one in attack.outcomes if one.mode == mode.name]
        for (word, level), cell in zip(wording.LEVELS.items(), row[1:], strict=True):
            wanted = str(words.count(word)) if word in words else "—"
            assert found[f"{drawing.SHAPES[mode.kind]} {mode.name}", f"{wording.SYMBOLS[level]} {word}"] == wanted
            assert cell == wanted


def test_targets_are_told_as_met_or_missed() -> None:
    root = sound(shown("sample"))
    rows = [
        [cell.text for cell in row.all() if cell.tag in {"td", "th"}]
        for row in root.one("table", class_="targets").all("tr")
    ]
    expected = []
    titles, measures = summary.titles(SAMPLE), {each.name: each for each in SAMPLE.measures}
    for figure in SAMPLE.figures:
        for target in figure.targets:
            asked = "at least" if measures[figure.measure].better == "more" else "at most"
            times = "of" if measures[figure.measure].better == "more" else "times"
            expected.append(
                [
                    figure.mode,
                    titles[figure.work],
                    measures[figure.measure].title,
                    f"{asked} {target.limit:.2f} {times} {target.of}",
                    f"{target.reached:.2f}",
                    "✓ met" if target.met else "✗ missed",
                ]
            )
    assert rows[1:] == expected
    assert {row[-1] for row in expected} == {"✓ met", "✗ missed"}
    assert [
        row for table in rows_of(markdown.render(SAMPLE)) for row in table if row[-1] in {"✓ met", "✗ missed"}
    ] == expected
    assert len(summary.missed(SAMPLE)) == sum(row[-1] == "✗ missed" for row in expected)
    assert all(line in root.one("section", id="summary").text for line in summary.missed(SAMPLE))


def test_a_ceiling_that_was_nearly_reached_is_said() -> None:
    near = [work.title for work in SAMPLE.works if (work.ceiling_share or 0) > 0.8]
    assert near == ["publish, 64 bytes"]
    root = sound(shown("sample"))
    assert f"nearly the limit in {near[0]}:" in root.one("section", id="summary").text
    (row,) = [each.text for each in root.one("table", class_="works").all("tr") if each.text.startswith(near[0])]
    assert row.endswith("near the limit")
    assert root.one("table", class_="works").text.count("near the limit") == 1


# --- plots


def test_plots_are_drawn_where_the_values_are() -> None:
    """Read back from the drawing: its axis by the labels of its ticks, and every mark and end of a range by that axis."""
    figures = summary.by_name(SAMPLE)
    checked = 0
    for work, plot in zip([work for work, _ in summary.glance(SAMPLE)], plots.ratios(SAMPLE), strict=True):
        root = ET.fromstring(plot.svg)
        names = {mode.name for mode in SAMPLE.modes}
        words = [each for each in root.iter("{http://www.w3.org/2000/svg}text") if each.text]
        ticks = [(float(each.attrib["x"]), math.log(float(str(each.text)))) for each in words if _is_tick(each)]
        assert len(ticks) > 2
        slope = (ticks[-1][0] - ticks[0][0]) / (ticks[-1][1] - ticks[0][1])
        lines = {each.text: float(each.attrib["y"]) for each in words if each.text in names}
        marks = [
            (float(each.attrib["x"]), float(each.attrib["y"])) for each in root.iter("{http://www.w3.org/2000/svg}use")
        ]
        measure = summary.lead(SAMPLE, work)
        assert measure is not None
        for mode, place in lines.items():
            ratio = figures[work.name, measure.name, str(mode)].ratio
            assert ratio is not None
            for value in (ratio.median, ratio.min, ratio.max):
                wanted = ticks[0][0] + slope * (math.log(value) - ticks[0][1])
                assert any(abs(x - wanted) < 0.2 and abs(y - place) < 6 for x, y in marks), (work.name, mode, value)
                checked += 1
    assert checked == len(SAMPLE.works) * 6 * 3


def _is_tick(element: ET.Element) -> bool:
    return "var(--muted)" in element.attrib["style"]


def test_plots_say_what_they_show() -> None:
    drawn = [
        *plots.ratios(SAMPLE),
        *plots.latencies(SAMPLE),
        *plots.cpu(SAMPLE),
        *plots.memory(SAMPLE),
        *plots.disk(SAMPLE),
    ]
    assert len({plot.name for plot in drawn}) == len(drawn)
    labels = [each.attributes["aria-label"] for each in sound(shown("sample")).all(role="img")]
    assert labels == [f"{plot.title}: {plot.says}" for plot in drawn]
    figures = summary.by_name(SAMPLE)
    for plot, work in zip(plots.cpu(SAMPLE), SAMPLE.works, strict=True):
        for mode in SAMPLE.modes:
            parts = [figures[work.name, name, mode.name].value.median for name in ("cpu.server", "cpu.daemon")]
            assert f"{mode.name} {wording.amount(parts[0], 's')} server" in plot.says
            assert f">{wording.amount(sum(parts), 's')}<" in plot.svg


def test_one_round_has_no_ranges() -> None:
    given = compare_sample.full(rounds=1)
    root = sound(shown("one round"))
    assert not re.search(r"\[[\d.,]+ \.\. ", root.text)
    assert "no figure has a spread" in root.text
    assert not re.search(r"\[[\d.,]+ \.\. ", markdown.render(given))


def test_colours_are_those_of_the_modes_everywhere() -> None:
    tones = drawing.tones(SAMPLE.modes)
    assert len(set(tones.values())) == len(SAMPLE.modes)
    text = shown("sample")
    assert "#00fe" not in text, "a place holder was left"
    assert b"#00fe" not in plots.readme_figure(SAMPLE)
    for tone in tones.values():
        assert f"stroke: var(--{tone})" in text
        assert f"color:var(--{tone})" in text
    many = [Mode(f"mount {number}", "", "mount", "", ran=True, why="") for number in range(5)]
    assert set(drawing.tones(many)) == {each.name for each in many}


# --- a real browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if compare_browser.CHROMIUM is None:
        pytest.skip("chromium is missing: apt-get install chromium")
    with compare_browser.browser() as started:
        yield started
    assert not compare_browser.of_profile(started.profile), "chromium outlived the tests"


@pytest.fixture
def show(chromium: Browser, tmp_path: Path) -> Callable[..., Browser]:
    """Open the page of a result, at a width."""

    def opened(name: str, width: int, *, mobile: bool = False, scheme: str = "light", kind: str = "") -> Browser:
        path = tmp_path / "compare.html"
        path.write_text(shown(name), encoding="utf-8")
        chromium.resize(width, 900, mobile=mobile)
        chromium.media(scheme=scheme, kind=kind)
        chromium.open(path)
        return chromium

    return opened


WIDTHS = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
# What is wider than its box: an element's name, where it ends, where the page ends.
TOO_WIDE = """[...document.querySelectorAll(SELECTOR)].filter(e => e.scrollWidth > e.clientWidth + 1)
    .map(e => e.getAttribute('aria-label') + ' ' + e.scrollWidth + ' > ' + e.clientWidth)"""
CONTRASTS = """(() => {
    const numbers = text => (text.match(/[\\d.]+/g) || []).map(Number)
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
    const behind = e => {
        for (; e; e = e.parentElement) {
            const found = numbers(getComputedStyle(e).backgroundColor)
            if (found.length === 3 || found[3] > 0) return found
        }
        return [255, 255, 255]
    }
    return [...document.querySelectorAll('p, li, th, td, dt, dd, .word, .between, .what, a, figcaption, svg text')].map(e => {
        const style = getComputedStyle(e)
        const pair = [light(numbers(e.tagName === 'text' ? style.fill : style.color)), light(behind(e))].sort((a, b) => b - a)
        return [(pair[0] + 0.05) / (pair[1] + 0.05), e.tagName + '.' + e.getAttribute('class') + ' ' + e.textContent.slice(0, 40)]
    }).filter(pair => pair[0] < 4.5)
})()"""


def quiet(browser: Browser) -> None:
    """Check that the page fetched nothing and complained of nothing."""
    asked = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [browser.evaluate("location.href")]
    told = {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}
    assert [event for event in browser.events if event["method"] in told] == []


def inked(png: bytes, width: int) -> float:
    """Check that a picture is as wide as it should be and has ink in each of its thirds; return how light it is."""
    pixels = image.imread(io.BytesIO(png), format="png")
    assert pixels.shape[1] == width
    assert pixels.shape[0] > 3000
    ground = pixels[0, 0, :3]
    for part in range(3):
        third = pixels[part * pixels.shape[0] // 3 : (part + 1) * pixels.shape[0] // 3, :, :3]
        share = float((abs(third - ground).max(axis=2) > 0.1).mean())
        assert share > 0.01, f"third {part} is nearly blank: {share}"
    colours = {tuple(colour) for colour in (pixels[::3, ::3, :3] * 255).astype(int).reshape(-1, 3).tolist()}
    assert len(colours) > 200
    return float(pixels[:, :, :3].mean())


@pytest.mark.parametrize(("width", "mobile"), [(1200, False), (390, True), (360, True)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read(show: Callable[..., Browser], width: int, scheme: str, *, mobile: bool) -> None:
    browser = show("sample", width, mobile=mobile, scheme=scheme)
    quiet(browser)
    scrolled, client = browser.evaluate(WIDTHS)
    assert client == width
    assert scrolled <= client
    assert browser.evaluate("[...document.images].every(each => each.naturalWidth > 0)")
    assert browser.evaluate("document.querySelectorAll('figure svg').length") == len(
        list(parse(shown("sample")).all("figure"))
    )
    big = "e => e.getBoundingClientRect().width > 250 && e.getBBox().height > 50"
    assert browser.evaluate(f"[...document.querySelectorAll('figure svg')].every({big})")
    light = inked(browser.screenshot(), width)
    assert light > 0.8 if scheme == "light" else light < 0.25
    assert browser.evaluate(CONTRASTS) == []


@pytest.mark.parametrize("name", ODD)
def test_no_odd_page_is_wider_than_a_phone(show: Callable[..., Browser], name: str) -> None:
    browser = show(name, 360, mobile=True)
    quiet(browser)
    scrolled, client = browser.evaluate(WIDTHS)
    assert scrolled <= client


def test_small_text_on_a_phone_is_not_too_small(show: Callable[..., Browser]) -> None:
    browser = show("sample", 360, mobile=True)
    smallest = browser.evaluate(
        """Math.min(...[...document.querySelectorAll('svg text')].map(e =>
        parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a))"""
    )
    assert smallest > 7.5


def test_outcomes_can_be_opened_and_links_lead_somewhere(show: Callable[..., Browser]) -> None:
    browser = show("sample", 1200)
    visible = "[...document.querySelectorAll('.seen')].filter(e => e.checkVisibility()).length"
    assert browser.evaluate(visible) == 0
    browser.evaluate("document.querySelector('summary').click()")
    assert browser.evaluate(visible) > 0
    browser.evaluate("document.querySelector('nav a[href=\"#machine\"]').click()")
    place = "document.getElementById('machine').getBoundingClientRect().top - innerHeight"
    assert browser.evaluate(place) < 0


def test_nothing_is_cut_in_print(show: Callable[..., Browser]) -> None:
    browser = show("sample", 695, kind="print")  # A4 without its margins, in CSS pixels
    assert browser.evaluate(TOO_WIDE.replace("SELECTOR", "'html, .scroll, pre, table'")) == []
    assert browser.evaluate(
        "[...document.querySelectorAll('.seen')].every(e => e.checkVisibility({contentVisibilityAuto: true}))"
    )
    assert browser.evaluate("getComputedStyle(document.querySelector('.matrix thead')).display") == "table-header-group"


def test_the_page_can_be_printed(show: Callable[..., Browser], tmp_path: Path) -> None:
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext is missing: apt-get install poppler-utils")
    browser = show("sample", 1200, scheme="dark")
    path = tmp_path / "compare.pdf"
    path.write_bytes(browser.pdf())
    printed = subprocess.run(["pdftotext", path, "-"], capture_output=True, text=True, check=True, timeout=60).stdout
    pages = printed.rstrip("\f").split("\f")
    assert len(pages) > 5
    assert "JetStream encrypted at rest, compared" in pages[0]
    assert all(each.strip() for each in pages)
    told = " ".join(printed.split())
    # Opened without anybody having clicked: once for each group of modes that saw the same, and in the summary.
    saw = "nats-server removed the stream's directory at its start"
    notes = {(attack.name, one.saw) for attack in SAMPLE.attacks for one in attack.outcomes if saw in one.saw}
    assert told.count(saw) == len(notes)
    medians = [wording.amount(each.value.median, "1/s") for each in SAMPLE.figures if each.measure == "rate"]
    assert all(each in told for each in medians)


def test_the_figure_for_the_readme_is_seen_on_white_and_on_black(chromium: Browser, tmp_path: Path) -> None:
    (tmp_path / "ratios.svg").write_bytes(plots.readme_figure(SAMPLE))
    for ground in ("ffffff", "000000"):
        path = tmp_path / "ground.html"
        path.write_text(
            f'<body style="margin:0;background:#{ground}"><img src="ratios.svg" style="width:800px"></body>'
        )
        chromium.resize(800, 200)
        chromium.media()
        chromium.open(path)
        assert chromium.evaluate("document.images[0].naturalWidth") > 400
        pixels = image.imread(io.BytesIO(chromium.screenshot()), format="png")[:, :, :3]
        ink = abs(pixels - pixels[0, 0]).max(axis=2)
        assert float(pixels[0, 0].mean()) == (1.0 if ground == "ffffff" else 0.0)
        assert float((ink > 0.35).mean()) > 0.01, f"hardly anything is seen on {ground}"
        shares = [float((part > 0.35).mean()) for part in (ink[:, :266], ink[:, 266:533], ink[:, 533:])]
        assert statistics.median(shares) > 0.005


def test_the_browser_leaves_nothing_behind_when_a_test_fails() -> None:
    if compare_browser.CHROMIUM is None:
        pytest.skip("chromium is missing: apt-get install chromium")
    profiles = []

    def fail() -> None:
        with compare_browser.browser() as started:
            profiles.append(started.profile)
            assert compare_browser.of_profile(started.profile)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not compare_browser.of_profile(profiles[0])
    assert not os.path.exists(profiles[0])
