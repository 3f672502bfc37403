"""Put the host and overhead tables into docs/pipelines.md.

python benchmarks/pipelines_page.py
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def overhead_table() -> str:
    """The rows of overhead.json as Markdown, cheapest first."""
    rows = json.loads((RESULTS / "overhead.json").read_text())
    lines = ["| system | tap | of a full step | MiB cached |", "| --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: row["forecast_step_ratio"]):
        ratio, size = row["forecast_step_ratio"], row["state_bytes"] / 2**20
        lines.append(f"| {row['system']} | {row['tap']} | {ratio:.2%} | {size:.2f} |")
    return "\n".join(lines)


def fill(page: Path, name: str, table: str) -> None:
    """Replace what stands between a page's two marks."""
    marks = f"(<!-- {name} -->).*?(<!-- /{name} -->)"
    text, count = re.subn(marks, rf"\1\n{table}\n\2", page.read_text(), flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{page} holds the marks of {name!r} {count} times, expected once.")
    page.write_text(text)


def main() -> None:
    """Fill the page."""
    page = ROOT / "docs" / "pipelines.md"
    fill(page, "hosts", (RESULTS / "hosts.md").read_text().strip())
    fill(page, "overhead", overhead_table())


if __name__ == "__main__":
    main()
