"""The one page that all HTML reports are: a frame, its sections, and what they share.

Whatever comes from data goes through `escape` or `island`, so no name can become markup.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from foreseer.evaluation.page.script import SCRIPT
from foreseer.evaluation.page.style import STYLE

Cell = tuple[str, int | float | str | None]  # text shown, value sorted by

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1><b>foreseer</b> $command</h1>
<p class="soft">$context</p>
<p class="verdict">$verdict</p>
$tiles
</header>
<nav aria-label="Sections"><ul>
$links
</ul></nav>
<main>
$sections
</main>
<footer class="soft">Written by foreseer $version. The page holds everything it shows.</footer>
<script>$script</script>
</body>
</html>
""")


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        key: its name in the address, of letters and dashes.
        title: its heading.
        body: markup; whatever comes from data is escaped by who made it.
        note: a sentence or two under the heading, plain text.
    """

    key: str
    title: str
    body: str
    note: str = ""

    def html(self) -> str:
        """The markup."""
        note = f'\n<p class="soft">{escape(self.note)}</p>' if self.note else ""
        return (
            f'<section id="{self.key}" aria-labelledby="{self.key}-title">\n'
            f'<h2 id="{self.key}-title">{escape(self.title)}</h2>{note}\n{self.body}\n</section>'
        )


def page(
    command: str,
    context: str,
    verdict: str,
    sections: Sequence[Section],
    version: str,
    tiles: Sequence[str] = (),
) -> str:
    """A whole page, which needs no other file and no network.

    Args:
        command: name of the command it reports on, plain text like the next two.
        context: a line on what was measured.
        verdict: the answer.
        sections: its parts.
        version: of foreseer.
        tiles: markup of list items, see `tile`.

    Raises:
        ValueError: there is no section, or two have the same key.
    """
    keys = [section.key for section in sections]
    if not keys or len(set(keys)) < len(keys):
        raise ValueError(f"a page needs sections with different keys, got {keys}.")
    return PAGE.substitute(
        title=escape(f"foreseer {command}"),
        style=STYLE,
        command=escape(command),
        context=escape(context),
        verdict=_sentence(verdict),
        tiles='<ul class="tiles">\n' + "\n".join(tiles) + "\n</ul>" if tiles else "",
        links="\n".join(f'<li><a href="#{s.key}">{escape(s.title)}</a></li>' for s in sections),
        sections="\n".join(section.html() for section in sections),
        version=escape(version),
        script=SCRIPT,
    )


def _sentence(text: str) -> str:
    """Plain text as markup: a capital first, and `commands` in the type of commands."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
    return marked[:1].upper() + marked[1:]


def tile(head: str, number: str, tail: str, ahead: bool | None = None) -> str:
    """One tile of the row under the verdict.

    Args:
        head: what the number is of.
        number: the number with its unit.
        tail: what it was compared with.
        ahead: whether it is good; None is neither good nor bad.
    """
    css = {None: "", True: ' class="ahead"', False: ' class="behind"'}[ahead]
    return f"<li>{escape(head)}<b{css}>{escape(number)}</b>{escape(tail)}</li>"


def island(content: Mapping[str, Any]) -> str:
    """Data for the page's script; `<` is written as an escape, so it cannot end the element."""
    text = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" class="data">{text}</script>'


def data_uri(content: bytes, kind: str = "png") -> str:
    """An image as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture(caption: str, path: Path) -> str:
    """A PNG inside the page, scrolling sideways where the screen is narrower than legible."""
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><div class="frame" tabindex="0" '
        f'role="group" aria-label="{escape(caption)}"><img alt="{escape(caption)}" '
        f'src="{data_uri(path.read_bytes())}"></div></figure>'
    )


def facts(content: Mapping[str, str]) -> str:
    """Names and values as a definition list."""
    items = "\n".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in content.items())
    return f"<dl>\n{items}\n</dl>"


def sortable(
    rows: Sequence[tuple[str, Mapping[str, Cell]]],
    label: str,
    words: Sequence[str] = (),
    long: Sequence[str] = (),
) -> str:
    """A table that sorts by the column whose heading is pressed.

    Args:
        rows: class and cells of each line, by column heading; the first line has all columns.
        label: what the table holds, for screen readers.
        words: columns that hold words.
        long: columns of words that may take several lines.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError(f"the table {label!r} has no row.")

    def css(name: str) -> str:
        kind = "text steps" if name in long else "text" if name in words else ""
        return f' class="{kind}"' if kind else ""

    heads = "".join(
        f'<th scope="col"{css(name)}><button>{escape(name)}</button></th>' for name in rows[0][1]
    )
    body = []
    for kind, cells in rows:
        line = "".join(
            f'<td{css(name)} data-value="{"" if value is None else escape(str(value))}">'
            f"{escape(shown)}</td>"
            for name, (shown, value) in cells.items()
        )
        body.append(f'<tr class="{escape(kind)}">{line}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(label)}"><table>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody></table></div>"
    )
