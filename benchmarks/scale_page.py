"""Put the tables of scale.json into docs/scale.md, between its markers.

python benchmarks/scale_page.py
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scale_estimates import GPUS, MODELS, PROMPTS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "scale.md"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def rates(section: dict[str, Any]) -> str:
    """Rows and megabytes per second, with the slowest round."""
    rows = [
        [name, f"{r['rows_per_s']:,.0f}", f"{r['mb_per_s']:,.0f}", f"{r['slowest_mb_per_s']:,.0f}"]
        for name, r in section.items()
    ]
    return table(["", "rows/s", "MB/s", "slowest round, MB/s"], rows)


def grams(section: dict[str, Any]) -> str:
    """Float64 products per second."""
    rows = [[name, f"{r['gflops']:.1f}", f"{r['mb_per_s']:,.0f}"] for name, r in section.items()]
    return table(["", "GFLOP/s", "MB/s of bfloat16"], rows)


def recorders(section: dict[str, Any]) -> str:
    """Trajectories per second of one and two processes."""
    one = section["1 process"]["trajectories_per_s"]
    rows = [
        [
            name,
            f"{r['trajectories_per_s']:.2f}",
            f"{r['rows_per_s']:,.0f}",
            f"{r['trajectories_per_s'] / one:.2f}",
            f"{r['seconds_with_start']:.0f}",
        ]
        for name, r in section.items()
    ]
    head = ["", "trajectories/s", "rows/s", "of one process", "seconds for 48, start included"]
    return table(head, rows)


def memory(rows: list[dict[str, Any]]) -> str:
    """Peak resident memory of every job at every size."""
    sizes = sorted({row["trajectories"] for row in rows})
    jobs = list(dict.fromkeys(row["job"] for row in rows))
    found = {(row["job"], row["trajectories"]): row for row in rows}
    lines = []
    for job in jobs:
        peaks = [f"{found[job, n]['peak_bytes'] / 1e6:,.0f}" for n in sizes]
        grown = [
            f"{(found[job, n]['peak_bytes'] - found[job, n]['before_bytes']) / 1e6:,.1f}"
            for n in sizes
        ]
        lines.append([job, *peaks, *grown])
    head = [f"peak MB, N = {n}" for n in sizes] + [f"above its start, N = {n}" for n in sizes]
    return table(["job", *head], lines)


def estimates(rows: list[dict[str, Any]]) -> str:
    """Hours and bytes per model."""
    lines = [
        [
            row["model"],
            *(f"{row[f'hours_{gpus}']:,.2f}" for gpus in GPUS),
            f"{row['all_grams_bytes'] / 1e6:,.0f} MB",
            f"{row['feature_bytes_each'] / 1e9:,.1f} GB",
            f"{row['all_features_bytes'] / 1e12:,.2f} TB",
            f"{row['gram_s_on_one_core_here'] / row['run_s']:.1%}",
            f"{row['write_s_here'] / row['run_s']:.1%}",
        ]
        for row in rows
    ]
    head = [
        f"{PROMPTS} trajectories of 50 steps",
        *(f"hours, {gpus} GPU" + "s" * (gpus > 1) for gpus in GPUS),
        "Grams of a tap, all",
        "features of `hidden`, each",
        "all",
        "time for a Gram, one core as here",
        "time to write features as here",
    ]
    sources = "\n".join(f"- {model.name}: {model.run_s:g} s; {model.source}." for model in MODELS)
    return f"{table(head, lines)}\n\nSeconds of one full run on one GPU:\n\n{sources}"


SECTIONS = {
    "write": rates,
    "read": rates,
    "gram": grams,
    "recorders": recorders,
    "memory": memory,
    "estimates": estimates,
}


def main() -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- /NAME -->`."""
    found = json.loads((RESULTS / "scale.json").read_text())
    text = PAGE.read_text()
    for name, render in SECTIONS.items():
        if name not in found:
            continue
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        _, _, after = rest.partition(f"<!-- /{name} -->")
        text = f"{before}<!-- {name} -->\n{render(found[name])}\n<!-- /{name} -->{after}"
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
