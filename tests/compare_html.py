"""HTML as a tree, and what must hold for any page of the report."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_VOID: Final = {"meta", "link", "br", "img", "hr", "input"}
_SPACES: Final = {"xmlns": "http://www.w3.org/2000/svg", "xmlns:xlink": "http://www.w3.org/1999/xlink"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    inside: list[Element | str] = field(default_factory=list)

    def all(self, tag: str = "", **attributes: str) -> Iterator[Element]:
        """Yield what is in it, in order: of a tag, with attributes that hold a word."""
        for each in self.inside:
            if isinstance(each, Element):
                if (not tag or each.tag == tag) and all(
                    word in each.attributes.get(name.rstrip("_"), "").split() for name, word in attributes.items()
                ):
                    yield each
                yield from each.all(tag, **attributes)

    def one(self, tag: str = "", **attributes: str) -> Element:
        found = list(self.all(tag, **attributes))
        assert len(found) == 1, (tag, attributes, len(found))
        return found[0]

    @property
    def text(self) -> str:
        """All text, words set apart by one space."""
        parts = [each if isinstance(each, str) else f" {each.text} " for each in self.inside]
        return " ".join("".join(parts).split())


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in <{tag}>"
        made = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].inside.append(made)
        if tag not in _VOID:
            self.open.append(made)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].inside.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> where <{self.open[-1].tag}> is open"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)


def parse(page: str) -> Element:
    """Return the root of a page; every tag that is opened must be closed in its place."""
    parser = _Parser()
    parser.feed(page)
    parser.close()
    assert len(parser.open) == 1, [each.tag for each in parser.open]
    return parser.open[0]


def sound(page: str) -> Element:
    """Check what must hold for every page, and return its root."""
    root = parse(page)
    everything = list(root.all())
    ids = [each.attributes["id"] for each in everything if "id" in each.attributes]
    assert len(ids) == len(set(ids)), sorted(each for each in ids if ids.count(each) > 1)
    assert root.one("html").attributes["lang"] == "en"
    assert [each.tag for each in everything].count("script") == 0
    for each in everything:
        for name, value in each.attributes.items():
            assert not name.startswith("on"), (each.tag, name)
            if name in {"href", "xlink:href"}:
                assert value == "data:," or (value.startswith("#") and value[1:] in ids), (each.tag, name, value)
            elif name in _SPACES:
                assert value == _SPACES[name]
            elif name in {"src", "srcset", "action", "data", "poster"}:
                raise AssertionError(f"<{each.tag}> fetches {value}")
            for target in re.findall(r"url\((.*?)\)", value):
                assert target.startswith("#"), target
                assert target[1:] in ids, target
            for target in value.split() if name in {"aria-labelledby", "aria-describedby"} else ():
                assert target in ids, target
    style = root.one("style").text
    assert "@import" not in style
    assert "url(" not in style
    used = set(re.findall(r"var\((--[\w-]+)\)", page))  # those with a fallback may be missing
    assert used <= set(re.findall(r"(--[\w-]+):", page)), "a colour that nobody sets"
    levels = [int(each.tag[1]) for each in everything if re.fullmatch(r"h[1-6]", each.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels
    for table in root.all("table"):
        assert table.one("caption").text
        _even(table)
        for head in table.all("th"):
            assert head.attributes.get("scope") in {"col", "row"}
    for figure in root.all("figure"):
        drawing = figure.one(role="img")
        assert drawing.attributes["aria-label"]
        assert drawing.one("svg").attributes["viewbox"]
    return root


def _even(table: Element) -> None:
    widths = set()
    for row in table.all("tr"):
        cells = [each for each in row.inside if isinstance(each, Element)]
        assert {each.tag for each in cells} <= {"td", "th"}
        widths.add(sum(int(each.attributes.get("colspan", "1")) for each in cells))
    assert len(widths) == 1, widths
