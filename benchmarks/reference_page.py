"""Write the tables of docs/reference.md and docs/lesa.md from the results beside this file.

python benchmarks/reference_page.py
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
LISTS = ("uniform", "published", "searched")
Row = dict[str, Any]


def main() -> None:
    """Write both pages."""
    rows = [row for row in load("reference_table.json") if row["kind"] != "full"]
    tables: dict[str, str] = {
        f"evaluations {budget}": by_list([row for row in rows if row["num_anchors"] == budget])
        for budget in (11, 8, 6)
    }
    tables["adaptive"] = adaptive(load("adaptive.json"))
    write(DOCS / "reference.md", tables)
    rows = [row for row in load("lesa.json") if row["kind"] != "full" and row["tap"] != "output"]
    write(DOCS / "lesa.md", {"evaluations": by_budget(rows)})


def write(page: Path, tables: dict[str, str]) -> None:
    """Replace what stands between each pair of markers of a page.

    Raises:
        ValueError: a table has no markers.
    """
    text = page.read_text()
    for name, table in tables.items():
        marked = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if not re.search(marked, text, flags=re.S):
            raise ValueError(f"{page} has no markers for the table {name!r}.")
        made = table
        text = re.sub(marked, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.S)
    page.write_text(text)


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


def by_budget(rows: Sequence[Row]) -> str:
    """A line per method with mean PSNR and its interval at each budget, and its training time."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        found.setdefault((row["method"], row["kind"]), {})[row["num_anchors"]] = row
    budgets = sorted({row["num_anchors"] for row in rows}, reverse=True)
    lines = [f"| method | {' | '.join(map(str, budgets))} | training, s |"]
    lines.append(f"|---|{'---|' * len(budgets)}---|")
    order = sorted(found.items(), key=lambda item: -max(r["psnr_db"] for r in item[1].values()))
    for (method, kind), by_num in order:
        cells = [with_interval(by_num.get(budget)) for budget in budgets]
        seconds = [f"{by_num[b]['fit_seconds']:.0f}" for b in budgets if b in by_num]
        told = " / ".join(seconds) if kind == "learned" else ""
        lines.append(f"| `{method}` | {' | '.join(cells)} | {told} |")
    return "\n".join(lines)


def with_interval(row: Row | None) -> str:
    """Mean and 95 % interval of a row."""
    if row is None:
        return ""
    return f"{row['psnr_db']:.2f} ({row['psnr_ci_low']:.1f} to {row['psnr_ci_high']:.1f})"


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
