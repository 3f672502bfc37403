"""The tables of docs/editing.md, from benchmarks/results/eedit.json.

python benchmarks/editing_page.py    # rewrites the tables in place
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "eedit.json"
PAGE = ROOT / "docs" / "editing.md"
QUALITIES = ("inside", "outside", "whole", "truth")
ORDER = (
    "readout by group",
    "readout common",
    "rows by group",
    "rows common",
    "taylor_1",
    "ab2",
    "spotedit",
    "euler",
    "region policy",
)


def regions(region: dict[str, Any]) -> str:
    """PSNR of every method by number of evaluations, and what the readout by group is ahead."""
    lines = [
        "| evaluations | method | inside | outside | whole | true target | s an edit | readout by "
        "group ahead, inside | outside |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    full = region["rows"]["full"]
    lines.append(
        f"| {region['steps']} | full | | | | {full['truth']:.2f} | {full['seconds']:.2f} | | |"
    )
    budgets = sorted({int(name.rsplit(", ", 1)[1]) for name in region["rows"] if ", " in name})
    for budget in reversed(budgets):
        names = [name for name in region["rows"] if name.endswith(f", {budget}")]
        for name in sorted(names, key=place):
            row = region["rows"][name]
            cells = [f"{row[key]:.2f}" for key in QUALITIES]
            ahead = region["differences"].get(f"readout by group - {name}")
            told = [interval(ahead[key]) if ahead else "" for key in ("inside", "outside")]
            method = name.rsplit(", ", 1)[0]
            lines.append(
                f"| {budget} | {method} | {' | '.join(cells)} | {row['seconds']:.2f} | "
                f"{' | '.join(told)} |"
            )
    return "\n".join(lines)


def place(name: str) -> int:
    """Where a method stands among those of its number of evaluations."""
    return next(number for number, each in enumerate(ORDER) if name.startswith(each))


def interval(values: list[float]) -> str:
    """A mean and its interval."""
    mean, low, high = values
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def by_kind(region: dict[str, Any]) -> str:
    """What the readout by group is ahead of the common one, by kind of edit."""
    lines = ["| edit | evaluations | inside | outside |", "|---|---|---|---|"]
    for name, found in region["by_kind"].items():
        kind, budget = name.rsplit(", ", 1)
        lines.append(
            f"| {kind} | {budget} | {interval(found['inside'])} | {interval(found['outside'])} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Rewrite the tables."""
    region, page = json.loads(RESULTS.read_text())["region"], PAGE.read_text()
    for name, text in {"regions": regions(region), "kinds": by_kind(region)}.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        page = re.sub(pattern, rf"\g<1>{text}\g<2>", page, flags=re.S)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
