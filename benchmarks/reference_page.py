"""Write the tables of docs/reference.md from the results beside this file.

python benchmarks/reference_page.py
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "reference.md"
LISTS = ("uniform", "published", "searched")
Row = dict[str, Any]


def main() -> None:
    """Replace what stands between each pair of markers."""
    text = PAGE.read_text()
    rows = [row for row in load("reference_table.json") if row["kind"] != "full"]
    tables: dict[str, str] = {
        f"evaluations {budget}": by_list([row for row in rows if row["num_anchors"] == budget])
        for budget in (11, 8, 6)
    }
    tables["adaptive"] = adaptive(load("adaptive.json"))
    for name, table in tables.items():
        marked = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if not re.search(marked, text, flags=re.S):
            raise ValueError(f"{PAGE} has no markers for the table {name!r}.")
        made = table
        text = re.sub(marked, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.S)
    PAGE.write_text(text)


def load(name: str) -> list[Row]:
    """Rows of a results file."""
    rows: list[Row] = json.loads((RESULTS / name).read_text())
    return rows


def by_list(rows: Sequence[Row]) -> str:
    """A line per method and tap with the mean PSNR on each list, best on any list first."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        label = row["anchors_name"]
        found.setdefault((row["method"], row["tap"]), {})[label] = row["psnr_db"]
    best = {label: max(f.get(label, 0.0) for f in found.values()) for label in LISTS}
    lines = ["| method | tap | uniform | published | searched |", "|---|---|---|---|---|"]
    for (method, tap), values in sorted(found.items(), key=lambda item: -max(item[1].values())):
        cells = [cell(values.get(label), best[label]) for label in LISTS]
        lines.append(f"| `{method}` | {'' if tap == 'none' else tap} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(value: float | None, best: float) -> str:
    """A number with two digits, bold where it is the column's best."""
    if value is None:
        return ""
    return f"**{value:.2f}**" if value == best else f"{value:.2f}"


def adaptive(rows: Sequence[Row]) -> str:
    """A line per predictor and schedule with means and quantiles."""
    columns: dict[str, Callable[[Row], str]] = {
        "mean evaluations": lambda r: str(r["target"]),
        "predictor": lambda r: f"`{r['predictor']}`",
        "schedule": lambda r: r["schedule"],
        "evaluations": lambda r: (
            f"{r['evaluations']:.2f} ({min(r['samples']['evaluations'])} to "
            f"{max(r['samples']['evaluations'])})"
        ),
        "with checks": lambda r: f"{r['cost']:.2f}",
        "mean": lambda r: f"{r['psnr_db']:.2f}",
        "median": lambda r: f"{r['psnr_median']:.2f}",
        "10 %": lambda r: f"{r['psnr_q10']:.2f}",
        "worst": lambda r: f"{r['psnr_min']:.2f}",
    }
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in sorted(rows, key=lambda r: (r["target"], -r["psnr_db"])):
        lines.append(f"| {' | '.join(make(row) for make in columns.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
