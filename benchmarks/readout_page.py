"""The tables of docs/readout.md and the README from what benchmarks/readout.py has measured.

python benchmarks/readout_page.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULT = Path("benchmarks/results/readout.json")
CURVE = Path("benchmarks/results/readout_curve.json")
COST = Path("benchmarks/results/readout_cost.json")
PAGE, README = Path("docs/readout.md"), Path("README.md")
ON_README = (8, 6)  # evaluations


def page() -> None:
    """Write the tables of both pages."""
    rows = json.loads(RESULT.read_text())
    hosts = dict.fromkeys(row["host"] for row in rows)
    text = "\n\n".join(
        [*(table(rows, host) for host in hosts), curve_table(), fit_table(rows), cost_table()]
    )
    put(PAGE, "readout", text)
    put(README, "table", readme_table(rows))


def put(path: Path, name: str, text: str) -> None:
    """Replace what stands between two marks of a page."""
    head, _, rest = path.read_text().partition(f"<!-- {name} -->\n")
    _, _, tail = rest.partition(f"<!-- /{name} -->")
    path.write_text(f"{head}<!-- {name} -->\n{text}\n<!-- /{name} -->{tail}")


def readme_table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean PSNR of the readout and of the best of every other kind, by model and evaluations."""
    lines = [
        "| model | evaluations of 50 | readout | rows of 0.2 | best formula | best few-step "
        "solver | ahead of the best of them by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    shown = [row for row in rows if row["num_anchors"] in ON_README]
    for mine in (row for row in shown if row["method"] == "readout"):
        beside = [r for r in rows if (r["host"], r["num_anchors"]) == place(mine)]
        kinds = [[row for row in beside if row["method"] == "l2p_closed_loop"]]
        kinds += [[r for r in beside if r["kind"] == kind] for kind in ("formula", "solver")]
        best = [max(kind, key=lambda row: row["psnr_db"]) if kind else None for kind in kinds]
        cells = ["" if row is None else f"{row['psnr_db']:.2f}" for row in best]
        gap = f"{mine['paired_db']:+.2f} ({mine['paired_low_db']:+.2f}"
        gap += f" to {mine['paired_high_db']:+.2f})"
        lines.append(
            f"| `zoo:{mine['host']}` | {mine['num_anchors']} | **{mine['psnr_db']:.2f}** | "
            f"{' | '.join(cells)} | {gap} |"
        )
    return "\n".join(lines)


def place(row: dict[str, Any]) -> tuple[str, int]:
    """What rows must share to be compared."""
    return row["host"], row["num_anchors"]


def table(rows: Sequence[dict[str, Any]], host: str) -> str:
    """Readout and the best of every kind of rival, by number of evaluations."""
    lines = [
        f"`zoo:{host}`, PSNR in dB against the full 50-step run: mean / median / 10 % quantile "
        f"over {rows[0]['num_samples']} judged samples. In brackets: the readout minus it on the "
        "same samples, with its 95 % interval, and on how many the readout is ahead.",
        "",
        "| evaluations | readout | the same rows alone | closed-loop rows of 0.2 | best formula | "
        "best solver |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for budget in sorted({row["num_anchors"] for row in rows if row["host"] == host}, reverse=True):
        mine = [row for row in rows if row["host"] == host and row["num_anchors"] == budget]
        kinds = [
            [row for row in mine if row["method"] == name]
            for name in ("readout", "rows", "l2p_closed_loop")
        ]
        kinds += [[row for row in mine if row["kind"] == kind] for kind in ("formula", "solver")]
        cells = [cell(max(kind, key=lambda row: row["psnr_db"])) if kind else "" for kind in kinds]
        lines.append(f"| {budget} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(row: dict[str, Any]) -> str:
    """One method's numbers."""
    told = f"{row['psnr_db']:.2f} / {row['psnr_median']:.2f} / {row['psnr_q10']:.2f}"
    if row["method"] == "readout":
        return f"**{told}**"
    name = "" if row["kind"] == "learned" else f"`{row['method']}` "
    gap, low, high = -row["paired_db"], -row["paired_high_db"], -row["paired_low_db"]
    ahead = row["num_samples"] - row["wins"]
    return f"{name}{told} ({gap:+.2f}, {low:+.2f} to {high:+.2f}; {ahead})"


def curve_table() -> str:
    """Gain over rows against the number of calibration trajectories."""
    rows = json.loads(CURVE.read_text())
    lines = [
        "The gain over the same rows against the number of trajectories fitted on, on the judged "
        "samples (mean PSNR in dB; 10 % quantile):",
        "",
        "| model | evaluations | trajectories | rows | readout | gain, 95 % interval | quantiles |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        gain = f"{r['mean']:+.2f} ({r['low']:+.2f} to {r['high']:+.2f})"
        quantiles = f"{r['rows_q10']:.2f}, {r['readout_q10']:.2f}"
        lines.append(
            f"| {r['host']} | {r['num_anchors']} | {r['trajectories']} | {r['rows_db']:.2f} | "
            f"{r['readout_db']:.2f} | {gain} | {quantiles} |"
        )
    return "\n".join(lines)


def fit_table(rows: Sequence[dict[str, Any]]) -> str:
    """What the fits took, and their lists."""
    lines = [
        "The fits behind the tables, and the anchors found for them (CPU, shared with other work):",
        "",
        "| model | anchors | trajectories | evaluations each | seconds, of them solving |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in (row for row in rows if row["method"] == "readout"):
        lines.append(
            f"| {r['host']} | {r['anchors']} | {r['num_trajectories']} | {r['fit_evaluations']} | "
            f"{r['fit_seconds']:.0f}, {r['solve_seconds']:.0f} |"
        )
    return "\n".join(lines)


def cost_table() -> str:
    """A forecast step beside L2P's."""
    lines = [
        "A forecast step at 8 evaluations on `zoo:fashion_dit` (guidance, both branches): CPU time "
        "over a full step's, the same for hooks at an anchor, and state per sample; one thread, in "
        "turns (`benchmarks/results/readout_cost.json`):",
        "",
        "| predictor | tap | forecast step | hooks at an anchor | state |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in json.loads(COST.read_text()):
        lines.append(
            f"| {r['method']} | {r['tap']} | {100 * r['forecast_step_ratio']:.1f} % | "
            f"{100 * r['anchor_overhead']:+.1f} % | {r['state_bytes'] / 1024:.0f} KiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    page()
