"""Tables for people: drawn on a terminal, in aligned columns elsewhere."""

from __future__ import annotations

import sys
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


def show(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()) -> None:
    """Print a table. right: the columns that stand at the right, numbers. Cells must be printable."""
    if sys.stdout.isatty():
        _draw(head, rows, right)
        return
    widths = [max(map(width, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [
            " " * (most - width(cell)) + cell if name in right else cell + " " * (most - width(cell))
            for name, cell, most in zip(head, row, widths, strict=True)
        ]
        print("  " + "  ".join(cells).rstrip())


def _draw(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str]) -> None:
    from rich import box  # noqa: PLC0415  only where it is seen
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD)
    for name in head:
        table.add_column(Text(name), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def width(text: str) -> int:
    """Return how many columns a printable text takes on a terminal."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in {"W", "F"} else 1 for c in text
    )
