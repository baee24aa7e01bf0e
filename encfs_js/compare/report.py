"""The report on the disk: some files in a directory, each replaced as a whole."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from encfs_js.compare import markdown, page, plots, result

if TYPE_CHECKING:
    from encfs_js.compare.result import Result

NAMES: Final = ("index.html", "compare.md", "compare.json")
FIGURE: Final = "compare.svg"  # for a README: where there are ratios to show


def write(found: Result, directory: str) -> None:
    """Make the directory where it is missing, and write NAMES and FIGURE into it; what else is there stays. Raises OSError.

    All are made and synced before the first is put in its place: who reads there never finds half a file.
    """
    rendered = (page.render(found).encode(), markdown.render(found).encode(), result.encode(found))
    contents = dict(zip(NAMES, rendered, strict=True))
    with contextlib.suppress(ValueError):
        contents[FIGURE] = plots.readme_figure(found)
    os.makedirs(directory, exist_ok=True)
    made: list[str] = []
    try:
        for name, content in contents.items():
            made.append(os.path.join(directory, f".{name}.new"))
            with open(made[-1], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, name in zip(made, contents, strict=True):
            os.replace(path, os.path.join(directory, name))
        if FIGURE not in contents:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, FIGURE))  # of an earlier report
    finally:
        for path in made:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
