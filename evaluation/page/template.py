"""The one page that all HTML reports are: a frame, its sections, and what they share.

Whatever comes from data goes through `escape` or `island`, so no name can become markup.
"""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from foreseer.evaluation.page.charts import Chart
from foreseer.evaluation.page.look import HUES, looking_alike
from foreseer.evaluation.page.script import SCRIPT
from foreseer.evaluation.page.style import STYLE

VARIABLES = {light: f"var(--{name})" for name, (light, _) in HUES.items()}
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
        body: markup under the figures; whatever comes from data is escaped by who made it.
        note: a sentence or two under the heading, plain text.
        figures: what is drawn, by the names of their PNG files.
    """

    key: str
    title: str
    body: str = ""
    note: str = ""
    figures: Mapping[str, Chart] = field(default_factory=dict)

    def html(self) -> str:
        """The markup."""
        note = f'\n<p class="soft">{escape(self.note)}</p>' if self.note else ""
        charts = "\n".join(drawn(chart) for chart in self.figures.values())
        if not all(chart.wide for chart in self.figures.values()):
            charts = f'<div class="pair">\n{charts}\n</div>'
        return (
            f'<section id="{self.key}" aria-labelledby="{self.key}-title">\n'
            f'<h2 id="{self.key}-title">{escape(self.title)}</h2>{note}\n{charts}\n{self.body}\n'
            "</section>"
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


def save_figures(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write the figures of a page as PNG files into a folder.

    Returns:
        Their paths.
    """
    figures = {name: chart for each in sections for name, chart in each.figures.items()}
    return [chart.save(folder / f"{name}.png") for name, chart in figures.items()]


def island(content: Mapping[str, Any]) -> str:
    """Data for the page's script; `<` is written as an escape, so it cannot end the element."""
    text = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" class="data">{text}</script>'


def data_uri(content: bytes, kind: str = "png") -> str:
    """An image as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def drawn(chart: Chart) -> str:
    """A figure in the hues of the page, and its numbers as a table."""
    file = io.StringIO()
    with looking_alike(salt=chart.caption):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        chart.figure().savefig(file, format="svg", transparent=True, metadata=nothing)
    label = f"{chart.caption.rstrip('.')}. {chart.words()}."
    heads, lines = chart.values()
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in lines
    )
    return (
        f'<figure class="drawn"><figcaption>{escape(chart.caption)}</figcaption>\n<div '
        f'class="drawing" tabindex="0" role="group" aria-label="{escape(label)}">'
        f"{_svg(file.getvalue(), label)}</div>\n"
        '<details class="values"><summary>Values</summary><div class="scroll" tabindex="0" '
        f'role="group" aria-label="Values of the figure"><table>\n<thead><tr>{head}</tr></thead>'
        f"\n<tbody>\n{body}\n</tbody></table></div></details></figure>"
    )


def _svg(text: str, label: str) -> str:
    """What matplotlib wrote, as an element of a page."""
    start, inside = text[text.index("<svg") :].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', start)
    assert box is not None  # matplotlib writes it
    inside = re.sub(r"<defs>\s*<style.*?</defs>", "", inside, count=1, flags=re.DOTALL)
    inside = re.sub(r'style="[^"]*"', _of_page, inside)
    inside = re.sub(r'<g id="[^"]*"/>', "", inside)
    inside = re.sub(r'<g id="mark(\d+)">', r'<g data-mark="\1">', inside)
    inside = re.sub(r'<(g|image)( [^>]*?)? id="[^"]*"', r"<\1\2", inside)
    inside = re.sub(r"\s*\n\s*", " ", inside.replace("xlink:href", "href"))
    return f'<svg {box[0]} role="img" aria-label="{escape(label)}">{inside}'


def _of_page(style: re.Match[str]) -> str:
    """A style with the page's letters and hues."""
    plain = re.sub(r"font-family: [^;\"]*(; )?", "", style[0])
    return re.sub("#[0-9a-f]{6}", lambda hue: VARIABLES.get(hue[0], hue[0]), plain)


def picture(caption: str, source: str) -> str:
    """An image inside the page, scrolling sideways where the screen is narrower than legible."""
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><div class="frame" tabindex="0" '
        f'role="group" aria-label="{escape(caption)}"><img alt="{escape(caption)}" '
        f'src="{source}"></div></figure>'
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
