"""The charts of the bench page: quality against cost, and the error after each step."""

import math
from collections.abc import Mapping, Sequence

from foreseer.evaluation.page.charts import Axes, Curve, line_chart, looks
from foreseer.evaluation.page.table import best_rows, decibels
from foreseer.evaluation.results import BenchRow

PARETO = Axes("network evaluations", "PSNR against the full run, in dB (higher is better)")
STATE = Axes(
    "step (0 is pure noise)", "relative error of the sample (lower is better)", ".3g", log=True
)


def pareto_charts(rows: Sequence[BenchRow]) -> list[str]:
    """PSNR against network evaluations, a chart per guidance scale that has a finite row.

    Args:
        rows: rows of one benchmark.
    """
    shown = [row for row in best_rows(rows, "method") if math.isfinite(row.psnr_db)]
    scales = sorted({row.guidance_scale for row in shown})
    return [_pareto([r for r in shown if r.guidance_scale == scale], scale) for scale in scales]


def _pareto(rows: Sequence[BenchRow], scale: float) -> str:
    """One chart; `rows` hold every method at most once per number of evaluations."""
    budgets = sorted({row.num_anchors for row in rows})
    noted = 8 if 8 in budgets else budgets[len(budgets) // 2]
    at = {row.method: row for row in rows if row.num_anchors == noted}
    kinds = {row.method: row.kind for row in rows}
    mean = {
        method: sum(row.psnr_db for row in mine) / len(mine)
        for method in kinds
        if (mine := [row for row in rows if row.method == method])
    }
    ranked = sorted(kinds, key=lambda m: (m not in at, -at[m].psnr_db if m in at else -mean[m]))
    look = _looks_of(ranked, kinds)
    curves = [
        Curve(
            method,
            sorted((row.num_anchors, row.psnr_db) for row in rows if row.method == method),
            look[method],
            kinds[method] == "learned",
            decibels(at[method].psnr_db) if method in at else "",
        )
        for method in ranked
    ]
    best = best_rows(row for row in rows if row.kind == "learned")
    band = sorted((row.num_anchors, row.psnr_q10, row.psnr_q90) for row in best)
    caption = (
        f"Guidance {scale:g}. Each method on its best tap and anchor list. Thick: learned; thin: "
        f"solvers; dashed: formulas. Beside the names: dB at {noted} evaluations."
    )
    if len(band) > 1:
        caption += " Band: 10 to 90 % of the samples of the best learned."
    return line_chart(caption, curves, PARETO, band if len(band) > 1 else ())


def step_error_chart(
    rows: Sequence[BenchRow], curves: Mapping[str, Sequence[tuple[int, float]]]
) -> str:
    """Relative error of the sampler's state after every step, a line per method.

    Args:
        rows: tell the kind of each method.
        curves: label to (step, error) pairs; a label is a method, maybe with words after a comma.
    """
    kind_of = {row.method: row.kind for row in rows}
    kinds = {label: kind_of.get(label.split(",")[0], "formula") for label in curves}
    last = {label: points[-1][1] for label, points in curves.items() if points}
    ranked = sorted(last, key=lambda label: last[label])
    look = _looks_of(ranked, kinds)
    lines = [
        Curve(label, curves[label], look[label], kinds[label] == "learned", f"{last[label]:.3g}")
        for label in ranked
    ]
    caption = (
        "||x - x(full run)|| / ||x(full run)|| of the sampler's state after each step, mean over "
        "the samples shown above. A few-step solver has a state at its own steps only. Beside the "
        "names: at the end."
    )
    return line_chart(caption, lines, STATE)


def _looks_of(ranked: Sequence[str], kinds: Mapping[str, str]) -> dict[str, str]:
    """Hue and dashes of every label, by its kind."""
    found: dict[str, list[str]] = {}
    for label in ranked:
        found.setdefault(kinds[label], []).append(label)
    return looks(found)
