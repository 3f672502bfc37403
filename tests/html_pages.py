"""A strict reader of the HTML reports: unbalanced markup fails, and everything can be asked for."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "img", "input", "br", "source"}
CLOSED = {"path", "rect", "use", "image"}  # written with a closing slash


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: "Element | None" = None
    children: list["Element"] = field(default_factory=list)
    text: str = ""

    @property
    def css(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def all(self, tag: str | None = None, css: str | None = None) -> list["Element"]:
        """Elements below this one, in order."""
        found = []
        for child in self.children:
            if tag in (None, child.tag) and (css is None or css in child.css):
                found.append(child)
            found += child.all(tag, css)
        return found

    def one(self, tag: str | None = None, css: str | None = None) -> "Element":
        (found,) = self.all(tag, css)
        return found

    def words(self) -> str:
        """All text below, whitespace folded."""
        parts = [self.text, *(child.words() for child in self.children)]
        return " ".join(" ".join(parts).split())

    def island(self) -> Any:
        """The data the page's script reads."""
        return json.loads(self.one("script", "data").text)


class Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("root", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert self.open == [self.root], f"not closed: {[e.tag for e in self.open[1:]]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice: {names}"
        element = Element(tag, {name: value or "" for name, value in attrs}, self.open[-1])
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in CLOSED, f"<{tag}/> closes itself"
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


def read_page(text: str) -> Element:
    """The `html` element of a page whose markup is balanced."""
    return Reader(text).root.one("html")


def check_page(html: Element) -> None:
    """What every report promises: nothing from outside, everything labelled, links that lead on."""
    everything = html.all()
    ids = [e.attributes["id"] for e in everything if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    for element in everything:
        where = element.attributes
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            address = where.get(name)
            assert address is None or address.startswith(("data:image/", "#")), (name, address)
            if address and address.startswith("#"):
                assert address[1:] in ids
        assert element.tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in where), where
        if element.tag == "img":
            assert "alt" in where
        if element.tag == "svg":
            assert where.get("aria-hidden") == "true" or (
                where.get("role") == "img" and where.get("aria-label")
            )
    for figure in html.all("figure"):
        assert figure.one("figcaption").words()
        named = [e for e in figure.all() if e.attributes.get("alt") or e.attributes.get("role")]
        assert named, figure.words()
    assert html.attributes["lang"] == "en" and html.one("h1") and html.all("main")
    assert any(m.attributes.get("name") == "viewport" for m in html.all("meta"))
    levels = [int(e.tag[1]) for e in everything if e.tag in ("h1", "h2", "h3")]
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    for style in [s.text for s in html.all("style")]:
        assert "url(" not in style and "@import" not in style and "prefers-color-scheme" in style
