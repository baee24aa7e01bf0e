"""How the commands that take long show how far they are."""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from encfs_js.cli_text import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def display(as_json: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that shows the progress (reencrypt.Progress.as_json): as a bar on a terminal, not at all elsewhere."""
    if as_json or not sys.stderr.isatty():
        yield lambda _progress: None
        return
    from rich import progress as bars  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(binary_units=True),
        bars.TextColumn("{task.fields[files]}"),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("counting", total=None, files="")

        def show(progress: dict[str, Any]) -> None:
            bar.update(
                task,
                description=progress["state"],
                total=progress.get("bytes") or None,
                completed=progress.get("bytes_done", 0),
                files=f"{progress.get('files_done', 0)} of {plural(progress.get('files', 0), 'file')}",
            )

        yield show


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt if somebody has pressed Ctrl-C, which does nothing by itself meanwhile."""
    interrupted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: interrupted.append(number))

    def look() -> None:
        if interrupted:
            raise KeyboardInterrupt

    try:
        yield look
    finally:
        signal.signal(signal.SIGINT, before)
