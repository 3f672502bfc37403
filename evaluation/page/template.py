"""The one page that all HTML reports are: a frame, its sections, and what they share.

Whatever comes from data goes through `escape` or `island`, so no name can become markup.

Without it the pages still show everything but the slider. Text from data enters by `textContent`
alone, so no name can become markup.
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

SCRIPT = """
"use strict";
const all = (root, query) => [...root.querySelectorAll(query)];
const data = (figure) => JSON.parse(figure.querySelector("script.data").textContent);
for (const button of all(document, "th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table");
    const down = head.getAttribute("aria-sort") !== "descending";
    const body = table.tBodies[0], column = head.cellIndex;
    const value = (row) => row.cells[column].dataset.value;
    const order = (a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const difference = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -difference : difference;
    };
    for (const other of all(table, "th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...[...body.rows].sort(order));
  });
}

for (const figure of all(document, "figure.drawn")) {
  const marks = all(figure, "[data-mark]");
  for (const mark of marks) {
    const light = (on) => {
      figure.classList.toggle("some", on);
      for (const other of marks)
        other.classList.toggle("on", other.dataset.mark === mark.dataset.mark);
    };
    mark.addEventListener("pointerenter", () => light(true));
    mark.addEventListener("pointerleave", () => light(false));
  }
}

for (const figure of all(document, "figure.samples")) {
  const told = data(figure), stage = figure.querySelector(".stage");
  const [under, over] = all(stage, "img"), range = stage.querySelector("input");
  const chooser = figure.querySelector("select"), score = figure.querySelector(".score");
  const names = all(figure, ".ends span"), note = figure.querySelector(".note");
  let sample = 0;
  const draw = () => {
    const method = told.methods[chooser.value];
    under.src = told.full.images[sample];
    over.src = method.images[sample];
    under.alt = told.full.label + ", sample " + (sample + 1);
    over.alt = method.label + ", sample " + (sample + 1);
    names[1].textContent = method.label;
    score.textContent = method.psnr[sample];
    note.textContent = "PSNR of " + method.label + " on sample " + (sample + 1) +
      " against the " + told.full.label + "; mean of the " + told.full.images.length +
      " samples: " + method.mean;
  };
  const slide = () => {
    stage.style.setProperty("--x", range.value + "%");
    range.setAttribute("aria-valuetext", range.value + " % " + told.full.label);
  };
  range.addEventListener("input", slide);
  chooser.addEventListener("change", draw);
  figure.querySelector("[type=checkbox]").addEventListener("change", (event) =>
    stage.classList.toggle("differs", event.target.checked));
  for (const button of all(figure, ".thumbs button")) {
    button.addEventListener("click", () => {
      sample = +button.dataset.sample;
      for (const other of all(figure, ".thumbs button"))
        other.setAttribute("aria-pressed", other === button);
      draw();
    });
  }
  draw();
  slide();
}
"""


def _hues(page: int) -> str:
    """The hues of the figures as variables, for light (0) or dark (1) pages."""
    return "".join(f" --{name}: {hue[page]};" for name, hue in HUES.items())


STYLE = (
    f"""
:root {{{_hues(0)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{{_hues(1)} }} }}
"""
    + """
:root { color-scheme: light dark; --page: #f6f7f9; --line: #dce0e6; --good: #00694f; --bad: #a63c00;
  --accent: #0b62a4; --tint: #eaf2f9; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #101316;
  --line: #313842; --good: #4ec9a2; --bad: #f2955a; --accent: #74bdf0; --tint: #1d2a36; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.2rem; -webkit-text-size-adjust: 100%; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 1rem/1.55 system-ui,
  -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer { max-width: 84rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.75rem; }
footer { padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.05rem; font-weight: 600; margin: 0 0 .15rem; letter-spacing: .01em; }
h1 b { color: var(--accent); }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.75rem 0 .35rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { max-width: 46rem; margin: .35rem 0 .75rem; }
a { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: .2rem; }
.verdict { font-size: clamp(1.1rem, .95rem + .8vw, 1.45rem); line-height: 1.4;
  max-width: 56rem; margin: .75rem 0 1.25rem; }
code { font-size: .92em; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
figcaption { max-width: 46rem; margin-bottom: .6rem; }
nav { position: sticky; top: 0; z-index: 5; background: var(--page);
  border-bottom: 1px solid var(--line); }
nav ul { max-width: 84rem; margin: 0 auto; padding: .5rem 1rem; display: flex; gap: 1.25rem;
  list-style: none; flex-wrap: wrap; row-gap: .2rem; white-space: nowrap; }
nav a { color: var(--soft); text-decoration: none; font-size: .9rem; }
nav a:hover { color: var(--accent); text-decoration: underline; }
.tiles { display: grid; gap: .75rem; padding: 0; margin: 0 0 1.25rem; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.tiles li, figure, details.block, .card { background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
.tiles li { padding: .7rem .9rem; font-size: .87rem; color: var(--soft);
  overflow-wrap: anywhere; }
.tiles b { display: block; font-size: 1.6rem; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.ahead { color: var(--good); } .behind { color: var(--bad); }
figure { margin: .9rem 0; padding: .9rem 1rem 1rem; min-width: 0; }
figure figure { border: 0; padding: 0; margin: 0; }
.pair { display: grid; gap: .9rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.pair figure { margin: 0; }
.pair + figure, figure + .pair { margin-top: .9rem; }
details.block { margin: .6rem 0; }
details.block > summary { padding: .65rem .9rem; cursor: pointer; }
details.values { margin-top: .6rem; font-size: .85rem; }
details.values summary { cursor: pointer; color: var(--soft); }
.scroll { overflow-x: auto; max-width: 100%; }
.values .scroll { max-height: 22rem; overflow: auto; margin-top: .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .84rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .45rem; border-top: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { vertical-align: bottom; font-weight: 600; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--card); }
tbody tr:hover td { background: var(--tint); }
.text { text-align: left; }
td.steps { min-width: 9rem; white-space: normal; color: var(--soft); font-size: .75rem;
  line-height: 1.25; }
@media (max-width: 64rem) { th, td { padding: .3rem .2rem; } table { font-size: .72rem; }
  td { white-space: normal; line-height: 1.3; } td.steps { min-width: 5rem; font-size: .66rem; } }
th button { all: unset; cursor: pointer; white-space: normal; }
th button:hover { color: var(--accent); }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tr.learned td:first-child, tr.learned th { font-weight: 700; color: var(--accent); }
@media (max-width: 40rem) { th:first-child, td:first-child { min-width: 6.5rem; max-width: 9.5rem;
  white-space: normal; overflow-wrap: break-word; } }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.1rem; margin: .5rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.frame { overflow-x: auto; width: fit-content; max-width: 100%; background: #fff;
  border-radius: .35rem; }
.frame img { display: block; max-width: 100%; height: auto; }
@media (max-width: 40rem) { .frame img { max-width: 36rem; } }
"""
    + (  # figures
        """
.drawing { overflow-x: auto; }
.drawing svg { display: block; width: 100%; height: auto; max-width: 72rem; min-width: 44rem;
  stroke-linejoin: round; }
.pair .drawing svg { max-width: 28rem; min-width: 15rem; }
.drawing text { font-variant-numeric: tabular-nums; }
[data-mark] { transition: opacity .12s; }
.some [data-mark]:not(.on) { opacity: .12; }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; align-items: center;
  margin: .2rem 0 .8rem; font-size: .9rem; }
.controls select { font: inherit; font-size: .9rem; color: var(--ink); background: var(--page);
  border: 1px solid var(--line); border-radius: .4rem; padding: .35rem .5rem; max-width: 100%; }
.controls label { display: flex; flex-wrap: wrap; gap: .45rem; align-items: center; min-width: 0; }
.compare { display: grid; gap: 1rem 1.5rem;
  grid-template-columns: minmax(0, 28rem) minmax(0, 1fr); }
@media (max-width: 52rem) { .compare { grid-template-columns: minmax(0, 28rem); } }
.stage { position: relative; isolation: isolate; overflow: hidden; border-radius: .4rem;
  background: #000; --x: 50%; user-select: none; }
.stage img { display: block; width: 100%; height: 100%; object-fit: contain; }
.stage.pixel img, .thumbs.pixel img { image-rendering: pixelated; }
.stage .over { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--x)); }
.stage.differs { filter: brightness(4); }
.stage.differs .over { clip-path: none; mix-blend-mode: difference; }
.stage.differs ~ .ends, .stage.differs .grip { visibility: hidden; }
.grip { position: absolute; top: 0; bottom: 0; left: var(--x); width: 0; pointer-events: none;
  border-left: 2px solid #fff; box-shadow: 0 0 0 1px rgb(0 0 0 / .55); }
.grip::after { content: "\\2194"; position: absolute; top: 50%; left: -1.2rem; width: 2.3rem;
  height: 2.3rem; margin-top: -1.15rem; border-radius: 50%; background: #fff; color: #111;
  display: grid; place-items: center; font-size: 1.2rem; box-shadow: 0 1px 6px rgb(0 0 0 / .5); }
.stage input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: ew-resize; touch-action: pan-y; }
.stage:has(input:focus-visible) { outline: 3px solid var(--accent); outline-offset: 2px; }
.ends { display: flex; justify-content: space-between; gap: 1rem; font-size: .82rem;
  color: var(--soft); margin-top: .35rem; }
.thumbs { display: flex; flex-wrap: wrap; gap: .4rem; margin: .3rem 0 .8rem; }
.thumbs button { padding: 2px; border: 2px solid transparent; border-radius: .4rem;
  background: none; cursor: pointer; line-height: 0; }
.thumbs button[aria-pressed=true] { border-color: var(--accent); }
.thumbs img { width: 4.4rem; height: 4.4rem; object-fit: cover; border-radius: .2rem; }
.score { font-size: 1.6rem; font-weight: 700; line-height: 1.2; display: block;
  font-variant-numeric: tabular-nums; }
@media print { body { background: #fff; font-size: 10pt; } nav, .controls, .stage, .ends, .thumbs,
  .tip, .cursor { display: none !important; } figure, .tiles li { break-inside: avoid; }
  h2 { break-after: avoid; } header, main, footer { max-width: none; } td.steps { min-width: 0; } }
"""
    )
)


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
    verdict: str | Sequence[str],
    sections: Sequence[Section],
    version: str,
    tiles: Sequence[str] = (),
) -> str:
    """A whole page, which needs no other file and no network.

    Args:
        command: name of the command it reports on, plain text like the next two.
        context: a line on what was measured.
        verdict: the answer, or one for every number of evaluations.
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
        verdict="<br>\n".join(map(_sentence, [verdict] if isinstance(verdict, str) else verdict)),
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
