"""The tables of docs/readout.md, docs/text_to_image.md and the README from what was measured.

python benchmarks/readout_page.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULT = Path("benchmarks/results/readout.json")
CURVE = Path("benchmarks/results/readout_curve.json")
COST = Path("benchmarks/results/readout_cost.json")
VIDEO = Path("benchmarks/results/video.json")
PAGE, README = Path("docs/readout.md"), Path("README.md")
TEXT_PAGE, TEXT_HOST = Path("docs/text_to_image.md"), "emoji_flux_2"
ON_README = ("fashion_dit", TEXT_HOST, "emoji_wan")
OURS = ("readout", "rows", "l2p_closed_loop")
KINDS = ("formula", "solver", "learned solver")


def page() -> None:
    """Write the tables of all three pages."""
    rows = json.loads(RESULT.read_text())
    hosts = dict.fromkeys(row["host"] for row in rows)
    text = "\n\n".join(
        [
            *(table(rows, host) for host in hosts),
            *(every_table(rows, host) for host in hosts),
            curve_table(),
            fit_table(rows),
            cost_table(),
        ]
    )
    put(PAGE, "readout", text)
    put(TEXT_PAGE, TEXT_HOST, table(rows, TEXT_HOST))
    put(README, "table", readme_table(rows + json.loads(VIDEO.read_text())))


def put(path: Path, name: str, text: str) -> None:
    """Replace what stands between two marks of a page."""
    head, _, rest = path.read_text().partition(f"<!-- {name} -->\n")
    _, _, tail = rest.partition(f"<!-- /{name} -->")
    path.write_text(f"{head}<!-- {name} -->\n{text}\n<!-- /{name} -->{tail}")


def readme_table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean PSNR of the readout and of the best of every other kind, by model and evaluations."""
    names = ("rows of 0.2", "best formula", "best few-step solver", "best learned solver")
    lines = [
        f"| model | evaluations of 50 | readout | {' | '.join(names)} | ahead of all but our own "
        "by |",
        f"|{' --- |' * (len(names) + 4)}",
    ]
    readouts = [row for row in rows if row["method"] == "readout" and row["host"] in ON_README]
    for mine in sorted(readouts, key=lambda row: ON_README.index(row["host"])):
        beside = [r for r in rows if (r["host"], r["num_anchors"]) == place(mine)]
        best = bests(beside)[2:]
        cells = ["" if row is None else f"{row['psnr_db']:.2f}" for row in best]
        gap, ends = behind(max(filter(None, best[1:]), key=mean)).split(", ")
        lines.append(
            f"| `zoo:{mine['host']}` | {mine['num_anchors']} | **{mine['psnr_db']:.2f}** | "
            f"{' | '.join(cells)} | {gap} ({ends}) |"
        )
    return "\n".join(lines)


def mean(row: dict[str, Any]) -> float:
    """PSNR of a row."""
    return float(row["psnr_db"])


def bests(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """Of the readout, our older fits, and every kind of rival the best row."""
    kinds = [[row for row in rows if row["method"] == name] for name in OURS]
    kinds += [[row for row in rows if row["kind"] == kind] for kind in KINDS]
    return [max(kind, key=mean) if kind else None for kind in kinds]


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
        "| evaluations | readout | its rows alone | closed-loop rows of 0.2 | best formula | best "
        "solver | best learned solver |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for budget in budgets(rows, host):
        mine = [row for row in rows if place(row) == (host, budget)]
        cells = [cell(row) if row else "" for row in bests(mine)]
        lines.append(f"| {budget} | {' | '.join(cells)} |")
    return "\n".join(lines)


def budgets(rows: Sequence[dict[str, Any]], host: str) -> list[int]:
    """Evaluations at which a model was measured, most first."""
    return sorted({row["num_anchors"] for row in rows if row["host"] == host}, reverse=True)


def every_table(rows: Sequence[dict[str, Any]], host: str) -> str:
    """Every method's mean and what the readout is ahead of it by."""
    counts = budgets(rows, host)
    lines = [
        f"`zoo:{host}`, every method on its better list and tap: mean PSNR in dB and, in brackets, "
        "the readout minus it with the 95 % interval of the paired difference.",
        "",
        f"| method | {' | '.join(f'{count} evaluations' for count in counts)} |",
        f"|{' --- |' * (len(counts) + 1)}",
    ]
    for method in dict.fromkeys(row["method"] for row in rows if row["host"] == host):
        mine = {place(row): row for row in rows if row["method"] == method}
        cells = [short(mine[host, n]) if (host, n) in mine else "" for n in counts]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(row: dict[str, Any]) -> str:
    """One method's numbers."""
    told = f"{row['psnr_db']:.2f} / {row['psnr_median']:.2f} / {row['psnr_q10']:.2f}"
    if row["method"] == "readout":
        return f"**{told}**"
    name = "" if row["kind"] == "learned" else f"`{row['method']}` "
    return f"{name}{told} ({behind(row)}; {row['num_samples'] - row['wins']})"


def short(row: dict[str, Any]) -> str:
    """The mean alone."""
    told = f"{row['psnr_db']:.2f}"
    if row["method"] == "readout":
        return f"**{told}**"
    return told if row["rival"] is None else f"{told} ({behind(row)})"


def behind(row: dict[str, Any]) -> str:
    """What the readout is ahead by, with the interval."""
    gap, low, high = -row["paired_db"], -row["paired_high_db"], -row["paired_low_db"]
    return f"{gap:+.2f}, {low:+.2f} to {high:+.2f}"


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
        "| model | anchors | time told at step 0 | trajectories | evaluations each | seconds, of "
        "them solving |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in (row for row in rows if row["method"] == "readout"):
        lines.append(
            f"| {r['host']} | {r['anchors']} | {r.get('first_time') or 1:.4f} | "
            f"{r['num_trajectories']} | {r['fit_evaluations']:.1f} | "
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
