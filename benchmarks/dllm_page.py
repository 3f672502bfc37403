"""Write the table of docs/language_models.md from `benchmarks/results/dllm.json`.

python benchmarks/dllm_page.py
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULT = Path("benchmarks/results/dllm.json")
PAGE = Path("docs/language_models.md")
HEADS = (
    "method",
    "evaluations",
    "exact match %",
    "ahead of parallel, points",
    "ahead of threshold, points",
    "as the full run %",
    "tokens/s",
    "cost",
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per row, the full decoding first."""
    lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    for row in rows:
        name = f"**{row['method']}**" if row["kind"] == "learned" else row["method"]
        if "computed_share" in row:
            name += f" ({row['computed_share']:.2f} of the tokens)"
        right = f"{100 * row['exact_match']:.1f}"
        right += f" ({100 * row['wilson_low']:.1f}-{100 * row['wilson_high']:.1f})"
        cells = [name, f"{row['evaluations']:g}", right]
        cells += [ahead(row.get(f"ahead_of_{rival}")) for rival in ("parallel", "threshold")]
        cells.append(f"{100 * row['token_agreement']:.1f}")
        cells += [f"{row['tokens_per_second']:.0f}", f"{row['cost_ratio']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ahead(found: dict[str, Any] | None) -> str:
    """A paired difference with its interval, in points."""
    if found is None:
        return ""
    mean, low, high = (100 * found[name] for name in ("mean", "paired_low", "paired_high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def main() -> None:
    """The command."""
    made = table(json.loads(RESULT.read_text())["rows"])
    text = PAGE.read_text()
    pattern = r"(<!-- results -->\n).*?(\n<!-- /results -->)"
    PAGE.write_text(re.sub(pattern, rf"\g<1>{made}\g<2>", text, flags=re.S))


if __name__ == "__main__":
    main()
