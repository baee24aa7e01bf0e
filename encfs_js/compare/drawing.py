"""How plots are drawn: colours, text, and SVG from matplotlib that can stand inside a page.

A figure is drawn with place holders for colours. Inside the page they become CSS variables, so that a plot follows dark mode and
print as the page does; in a file of its own they become fixed colours that can be read on white and on black.
"""

from __future__ import annotations

import io
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from matplotlib.axes import Axes

    from encfs_js.compare.result import Kind, Mode

# name: on white, on black, in a file that may lie on either. The modes' hues differ also for the colour-blind: grey,
# orange, blue, purple; within a kind it is lightness that differs.
PALETTE: Final[dict[str, tuple[str, str, str]]] = {
    "ink": ("#1c2024", "#e6e8eb", "#7d848d"),
    "muted": ("#5b636c", "#a3abb5", "#7d848d"),
    "grid": ("#dfe3e8", "#353b43", "#7d848d"),
    "worse": ("#f4efe9", "#25211d", "#7d848d"),
    "paper": ("#ffffff", "#15181c", "#7d848d"),
    "plain-0": ("#6b737c", "#a3abb5", "#8a9199"),
    "server-0": ("#a8480a", "#f09a5b", "#c8641f"),
    "server-1": ("#d9822b", "#ffc48a", "#e0913f"),
    "mount-0": ("#0b4f8a", "#62b0f0", "#2f7fc4"),
    "mount-1": ("#2b8fd6", "#a9d6fb", "#4fa6e6"),
    "reference-0": ("#6d3f9c", "#bf93ea", "#9467bd"),
    "reference-1": ("#a977cf", "#dcc2f5", "#b98fdc"),
}
_NAMES: Final = tuple(PALETTE)
MARKERS: Final[dict[Kind, str]] = {"plain": "s", "server": "D", "mount": "o", "reference": "^"}
SHAPES: Final[dict[Kind, str]] = {"plain": "■", "server": "◆", "mount": "●", "reference": "▲"}

SIZE: Final = 9.5  # of text, in units of the drawing: CSS pixels where a plot is as wide as it was drawn


def colour(name: str) -> str:
    """Return the place holder for a colour of the palette."""
    return f"#00fe{_NAMES.index(name):02x}"


def tones(modes: list[Mode]) -> dict[str, str]:
    """Return the palette's colour for each mode: a hue for its kind, a tone for its place among them."""
    found: dict[str, str] = {}
    count: dict[Kind, int] = {}
    for mode in modes:
        place = count.get(mode.kind, 0)
        count[mode.kind] = place + 1
        choice = [name for name in PALETTE if name.startswith(f"{mode.kind}-")]
        found[mode.name] = choice[place % len(choice)]
    return found


def _style() -> dict[Any, Any]:
    """Return matplotlib's settings for all plots: text stays text, nothing depends on the time or on chance."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "encfs_js",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": SIZE,
        "axes.linewidth": 0.8,
        "axes.edgecolor": colour("grid"),
        "axes.labelcolor": colour("muted"),
        "text.color": colour("ink"),
        "xtick.color": colour("muted"),
        "ytick.color": colour("ink"),
        "text.parse_math": False,  # a name with dollars is a name
        "path.simplify": False,
    }


def blank(width: float, height: float) -> Figure:
    """Return an empty figure of a size in units of the drawing, without a background."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.patch.set_visible(False)
    return figure


def bare(axes: Axes) -> None:
    """Take away what says nothing: frame, background, tick marks."""
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, pad=3)
    axes.set_axisbelow(True)


def _svg(figure: Figure, metadata: Mapping[str, str | None]) -> str:
    file = io.StringIO()
    figure.savefig(
        file, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None, **metadata}
    )
    return file.getvalue()


@contextmanager
def settings() -> Iterator[None]:
    """Have figures made and written with the settings that all plots have."""
    with mpl.rc_context(_style()):
        yield


def inline(figure: Figure, name: str) -> str:
    """Return a figure as an <svg> element whose ids begin with `name`, with CSS variables for colours and no size."""
    text = _svg(figure, {})
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', head)
    assert box is not None, "matplotlib writes one"
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', rest))
    rest = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", rest)
    rest = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", rest)
    for index, each in enumerate(_NAMES):
        rest = rest.replace(f"#00fe{index:02x}", f"var(--{each})")
    start = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'{start} viewBox="{box[1]}" aria-hidden="true" focusable="false">{rest.strip()}'


def standalone(figure: Figure, title: str) -> bytes:
    """Return a figure as an SVG file with colours that can be read on white and on black."""
    text = _svg(figure, {"Title": title})
    for index, each in enumerate(_NAMES):
        text = text.replace(f"#00fe{index:02x}", PALETTE[each][2])
    text = text.replace("'DejaVu Sans'", "system-ui, 'Segoe UI', Roboto, Helvetica, Arial, 'DejaVu Sans'")
    return text.encode()
