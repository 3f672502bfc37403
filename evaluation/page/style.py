"""The style of the HTML reports: light and dark, from 360 px up, and on paper."""

from foreseer.evaluation.page.look import HUES


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
