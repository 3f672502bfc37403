"""The page of the HTML report: `string.Template` text, with its style and script inside."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>foreseer bench</title>
<style>
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1b1f24;
  --soft: #5b636e; --line: #dfe2e6; --good: #00694f; --bad: #a63c00; --accent: #0067a3; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1d2126; --ink: #e8eaed;
  --soft: #a2abb5; --line: #353b43; --good: #4ec9a2; --bad: #f2955a; --accent: #6db9ec; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; background: var(--page);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { max-width: 46rem; }
.verdict { font-size: 1.2rem; line-height: 1.45; max-width: 52rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.tiles { display: grid; gap: .75rem; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .8rem; font-size: .85rem; color: var(--soft); overflow-wrap: anywhere; }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.3; }
.ahead { color: var(--good); } .behind { color: var(--bad); }
details { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  margin: .6rem 0; }
summary { padding: .6rem .8rem; cursor: pointer; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .84rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-top: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { vertical-align: bottom; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--card); }
.text { text-align: left; }
td.steps { min-width: 13rem; white-space: normal; color: var(--soft); }
th button { all: unset; cursor: pointer; font-weight: 600; white-space: normal; }
th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tr.learned td:first-child { font-weight: 700; color: var(--accent); }
figure { margin: 1rem 0; }
.frame { overflow-x: auto; width: fit-content; max-width: 100%; background: #fff; padding: .5rem;
  border: 1px solid var(--line); border-radius: .5rem; }
.frame img { display: block; max-width: 100%; height: auto; }
@media (max-width: 40rem) { .frame img { max-width: 36rem; } }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .7rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>foreseer bench</h1>
<p class="soft">$context</p>
<p class="verdict">$verdict</p>
<ul class="tiles">
$tiles
</ul>
<h2>Quality against cost</h2>
$pareto
<h2>All methods</h2>
<p class="soft">Each method and tap on the best of its anchor lists, chosen by mean PSNR on the
samples of this report; every list is in results.csv. Brackets hold the bootstrap 95 % interval of
the mean. Click a heading to sort.</p>
$tables
<h2>Samples side by side</h2>
$contact_sheet
<h2>Where the network runs</h2>
$timeline
$extras
<h2>Run it again</h2>
<pre>$command</pre>
<dl>
$facts
</dl>
<script>
for (const button of document.querySelectorAll("th button")) {
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
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...[...body.rows].sort(order));
  });
}
</script>
</body>
</html>
"""
