"""The command compare."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click

from encfs_js import cli_table
from encfs_js.cli_text import plural, shown
from encfs_js.compare import result as results
from encfs_js.compare import rounds, summary, wording
from encfs_js.compare.modes import MODES
from encfs_js.errors import CompareError, StoreIoError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from encfs_js.compare.result import Result
    from encfs_js.compare.runs import Progress

_FOR_REPORTS: Final = ("matplotlib", "jinja2")
_ABSENT: Final = "—"


@click.command(
    epilog="Exit code 41: something that should have run did not, or failed; the report says what. 40: there is no nats-server, "
    "or it is too old. 130: interrupted."
)
@click.option(
    "--report",
    metavar="DIR",
    help="Write index.html, compare.md, compare.svg and compare.json into DIR; it is made if it is missing.",
)
@click.option("--quick", is_flag=True, help="One round of little work: shows that it works, the figures mean little.")
@click.option(
    "--store-dir",
    metavar="DIR",
    help="Make the stores below DIR, on the file system to measure; without it, in the temporary directory.",
)
@click.option("--nats-server", metavar="PATH", help="Use this nats-server.")
@click.option(
    "--mode",
    "only",
    multiple=True,
    type=click.Choice([mode.name for mode in MODES]),
    metavar="MODE",
    help=f"Compare only this one with plain; may be repeated. {', '.join(mode.name for mode in MODES)}.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def compare(
    *,
    report: str | None,
    quick: bool,
    store_dir: str | None,
    nats_server: str | None,
    only: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compare encfs_js with the other ways to encrypt a JetStream store.

    The same work, and the same attacks, on a real nats-server in each mode: a plain directory, nats-server's own encryption with
    both ciphers, a mount with both ciphers, and gocryptfs and securefs where they are installed. Every run has a store of its
    own, which is removed. The modes take turns, for five rounds. As root the page cache is dropped where that matters.

    Let the machine do nothing else meanwhile. Ctrl-C ends it, and leaves nothing behind.
    """
    if report is not None:
        _check_report(report)
    options = rounds.Options(store_dir or tempfile.gettempdir(), nats_server, quick, only)
    try:
        with _display(as_json) as show:
            found = rounds.compare(options, show)
    except KeyboardInterrupt:
        print("encfs-js: interrupted; nothing was written, nothing is left", file=sys.stderr)
        raise click.Abort from None
    if report is not None:
        from encfs_js.compare import report as room  # noqa: PLC0415  matplotlib and jinja2 are for the report alone

        room.write(found, report)
        print(f"encfs-js: the report is {os.path.join(report, room.NAMES[0])}", file=sys.stderr)
    if as_json:
        print(results.encode(found).decode(), end="")
    elif report is None:
        _print(found)
    judge(found)


def judge(found: Result) -> None:
    """Raise CompareError when a comparison is not complete. An outside reference that is not installed is no fault."""
    absent = [mode for mode in found.modes if not mode.ran and mode.kind != "reference"]
    if not absent and not found.failures:
        return
    first = f"{absent[0].name}: {absent[0].why}" if absent else ""
    if found.failures:
        one = found.failures[0]
        where = f", round {one.round}" if one.round else ""
        first = f"{one.mode}, {one.work}{where}: {one.error.splitlines()[0]}"
    counts = [plural(len(found.failures), "run") + " failed"] if found.failures else []
    counts += [plural(len(absent), "mode") + " did not run"] if absent else []
    raise CompareError(
        f"the comparison is not complete: {', '.join(counts)}; {first}",
        hint="The report has all of it (--report DIR, or --json); the other figures are good.",
    )


def _check_report(directory: str) -> None:
    """Raise an error now rather than after the run: CompareError for a missing library, StoreIoError for the directory."""
    missing = [name for name in _FOR_REPORTS if importlib.util.find_spec(name) is None]
    if missing:
        raise CompareError(
            f"a report needs {' and '.join(missing)}, which cannot be found", hint="pip install 'encfs-js[compare]'"
        )
    above = os.path.abspath(directory)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise StoreIoError(f"{shown(above)}: not a directory", hint="Name another one: --report DIR")
    if not os.access(above, os.W_OK | os.X_OK):
        raise StoreIoError(f"{shown(above)}: no permission to write there", hint="Name another one: --report DIR")


@contextmanager
def _display(as_json: bool) -> Iterator[Callable[[Progress], None]]:
    """Yield a function that shows the progress: a bar on a terminal, elsewhere a line for each step, with --json nothing."""
    if not sys.stderr.isatty():
        yield (lambda _progress: None) if as_json else _line
        return
    from rich import progress as bars  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415

    columns = (
        bars.BarColumn(bar_width=20),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left:"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.description}", markup=False),
    )
    with bars.Progress(*columns, console=Console(stderr=True), speed_estimate_period=300) as bar:
        task = bar.add_task("", total=None)
        yield lambda now: bar.update(task, description=now.step, total=now.total, completed=now.done)


def _line(now: Progress) -> None:
    print(f"encfs-js: {now.step}", file=sys.stderr, flush=True)


def _print(found: Result) -> None:
    figures, modes = summary.by_name(found), summary.seen(found)
    rows = []
    for work, measure in summary.glance(found):
        cells = []
        for mode in modes:
            figure = figures.get((work.name, measure.name, mode.name))
            if figure is None:
                cells.append(_ABSENT)
            elif figure.ratio is None:
                cells.append(wording.amount(figure.value.median, measure.unit))
            else:
                cells.append(wording.ratio(figure.ratio.median))
        rows.append([f"{work.title} ({measure.title})", *cells])
    if found.quick:
        print("This was a quick run: the figures mean little.")
    if rows:
        print("Medians: plain as measured, the others as a ratio to plain in the same round; of times less is better.")
        cli_table.show(["", *(mode.name for mode in modes)], rows, {mode.name for mode in modes})
    if found.attacks:
        print("Attacks, leaks and mistakes:")
        rows = []
        for attack in found.attacks:
            outcomes = [summary.outcome(attack, mode) for mode in modes]
            rows.append([attack.title, *(one.word if one is not None else _ABSENT for one in outcomes)])
        cli_table.show(["", *(mode.name for mode in modes)], rows)
    lines = [summary.targets_line(found), *(f"missed: {line}" for line in summary.missed(found))]
    lines += [f"did not run: {mode.name}: {mode.why}" for mode in found.modes if not mode.ran]
    lines += [f"note: {note}" for note in found.notes]
    for line in lines:
        if line:
            print(line)
