"""Tables and picture of docs/robot_policies.md from what benchmarks/vla.py has measured.

python benchmarks/vla_page.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from readout_page import put

from foreseer.evaluation.page.charts import Axes, Curve, LineChart

RESULT = Path("benchmarks/results/vla.json")
PAGE, IMAGES = Path("docs/robot_policies.md"), Path("docs/images")
LOOKS = {"fitted": "learned", "formula": "formula", "modules": "formula"}
NAMES = {"lstsq": "rows (least squares)", "efficient_vla": "EfficientVLA", "bac": "BAC"}
NAMES |= {"bns": "BNS (learned solver)", "full": "the head alone"}


def page() -> None:
    """Write the tables and the picture."""
    rows = json.loads(RESULT.read_text())
    put(PAGE, "vla", f"{table(rows)}\n\n{success_table(rows)}")
    error_chart(rows).save(IMAGES / "robot_error.png")


def named(row: dict[str, Any]) -> str:
    """A method as the page calls it."""
    return NAMES.get(row["method"], row["method"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Action error and cost of every method at every number of evaluations."""
    lines = [
        "| evaluations | method | steps | action error | against the best rival, dB | FLOPs | ms a "
        "tick |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: (-row["evaluations"], row["action_mse"])):
        if row["kind"] == "reference":
            ahead = ""
        else:
            ahead = f"{row['paired_mean']:+.1f} ({row['paired_low']:+.1f} to "
            ahead += f"{row['paired_high']:+.1f}), {row['rival']}"
        steps = row.get("chosen", "")
        steps = " ".join(map(str, steps)) if isinstance(steps, list) else steps
        steps = "of each module" if isinstance(steps, dict) else steps
        spent = f"{row['milliseconds']:.1f}" if "milliseconds" in row else ""
        bold = "**" if row["kind"] == "fitted" else ""
        lines.append(
            f"| {row['evaluations']} | {bold}{named(row)}{bold} | {steps} | "
            f"{row['action_mse']:.2e} | {ahead} | {100 * row['cost_ratio']:.0f} % | "
            f"{spent} |"
        )
    return "\n".join(lines)


def success_table(rows: Sequence[dict[str, Any]]) -> str:
    """Episodes that succeeded, of the methods that were let loose in the simulator."""
    tried = [row for row in rows if "success" in row]
    tasks = list(dict.fromkeys(task for row in tried for task in row["success_by_task"]))
    lines = [
        f"| evaluations | method | {' | '.join(tasks)} | all | 95 % interval | episodes |",
        "| --- " * (len(tasks) + 5) + "|",
    ]
    for row in sorted(tried, key=lambda row: (-row["evaluations"], row["method"])):
        each = " | ".join(f"{100 * row['success_by_task'][task]:.0f} %" for task in tasks)
        interval = f"{100 * row['success_low']:.0f} to {100 * row['success_high']:.0f} %"
        lines.append(
            f"| {row['evaluations']} | {named(row)} | {each} | {100 * row['success']:.1f} % | "
            f"{interval} | {row['episodes']} |"
        )
    return "\n".join(lines)


def curves(rows: Sequence[dict[str, Any]], value: str) -> list[Curve]:
    """A number of every method against its evaluations."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows if value in row):
        own = [row for row in rows if row["method"] == method and value in row]
        points = sorted((row["evaluations"], row[value]) for row in own)
        found.append(Curve(named(own[0]), points, LOOKS.get(own[0]["kind"], "solver")))
    return sorted(found, key=lambda curve: curve.kind != "learned")


def error_chart(rows: Sequence[dict[str, Any]]) -> LineChart:
    """Action error against evaluations."""
    shown = [row for row in rows if row["kind"] != "reference"]
    axes = Axes("evaluations of 10", "action error", ".1e", log=True)
    caption = "Mean squared action error to the head's own chunks"
    return LineChart(caption, curves(shown, "action_mse"), axes)


if __name__ == "__main__":
    page()
