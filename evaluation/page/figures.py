"""The figures of pages, PNG files and TensorBoard; each is one function here.

Shapes: S steps, T forecast steps, K anchors, L layers.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.evaluation.advice import best_rows
from foreseer.evaluation.page.charts import Axes, Curve, LineChart
from foreseer.evaluation.page.heat import HeatAxes, HeatMap
from foreseer.evaluation.results import BenchRow, decibels

Points = Sequence[tuple[int, float]]  # (step, value)
Curves = Mapping[str, Points]  # by label
Weights = tuple[Tensor, Sequence[int]]  # (S, S) rows of one branch, and the anchors

STEP = "step (0 is pure noise)"
PARETO = Axes("network evaluations", "PSNR against the full run, in dB (higher is better)")
STATE = Axes(STEP, "relative error of the sample (lower is better)", ".3g", log=True)
ERROR = Axes(STEP, "relative error of the feature (lower is better)", ".3g", log=True)
PART = Axes(STEP, "part of the feature's norm", ".3g", log=True)


def pareto(rows: Sequence[BenchRow]) -> dict[str, LineChart]:
    """PSNR against network evaluations, a chart per guidance scale that has a finite row.

    Args:
        rows: rows of one benchmark; each method is drawn on its best tap and anchor list.

    Returns:
        By name: `pareto`, or `pareto_<scale>` where there are several.
    """
    shown = [row for row in best_rows(rows, "method") if math.isfinite(row.psnr_db)]
    scales = sorted({row.guidance_scale for row in shown})
    return {
        f"pareto_{scale:g}" if len(scales) > 1 else "pareto": _pareto(
            [row for row in shown if row.guidance_scale == scale], scale
        )
        for scale in scales
    }


def _pareto(rows: Sequence[BenchRow], scale: float) -> LineChart:
    """One chart; `rows` hold every method at most once per number of evaluations."""
    curves = []
    for method, kind in {row.method: row.kind for row in rows}.items():
        points = sorted((row.num_anchors, row.psnr_db) for row in rows if row.method == method)
        curves.append(Curve(method, points, kind, decibels(points[-1][1])))
    best = best_rows(row for row in rows if row.kind == "learned")
    band = sorted((row.num_anchors, row.psnr_q10, row.psnr_q90) for row in best)
    caption = (
        f"Guidance {scale:g}. Each method on its best tap and anchor list. Thick: learned; in "
        f"colour: solvers; grey: formulas. Behind the names: dB at the most evaluations."
    )
    if len(band) > 1:
        caption += " Band: 10 to 90 % of the samples of the best learned."
    ranked = sorted(curves, key=lambda curve: -max(psnr for _, psnr in curve.points))
    return LineChart(caption, ranked, PARETO, band if len(band) > 1 else ())


def state_errors(rows: Sequence[BenchRow], curves: Curves) -> LineChart:
    """Relative error of the sampler's state after every step, a line per method.

    Args:
        rows: tell the kind of each method.
        curves: by method, maybe with words after a comma.
    """
    kinds = {row.method: row.kind for row in rows}
    lines = [
        Curve(label, points, kinds.get(label.split(",")[0], "formula"), f"{points[-1][1]:.3g}")
        for label, points in sorted(curves.items(), key=lambda item: item[1][-1][1])
    ]
    caption = (
        "||x - x(full run)|| / ||x(full run)|| of the sampler's state after each step, mean over "
        "the samples shown above. A few-step solver has a state at its own steps only. Behind the "
        "names: at the end."
    )
    return LineChart(caption, lines, STATE)


def step_errors(curves: Curves, caption: str = "Error per step") -> LineChart:
    """Relative error of a forecast at each step.

    Args:
        curves: the lines; an error of 0 (an anchor) breaks one.
        caption: what it shows.
    """
    return LineChart(caption, [Curve(*line) for line in curves.items()], ERROR)


def rule_errors(caption: str, curves: Curves, learned: str) -> LineChart:
    """Relative error per step of many rules, the best first; the best three formulas in colour.

    Args:
        caption: what it shows.
        curves: by rule; an error of 0 (an anchor) breaks a line.
        learned: the rule that is fitted.
    """
    mean = {
        label: sum(found) / len(found) if (found := [y for _, y in points if y > 0]) else 0.0
        for label, points in curves.items()
    }
    ranked = sorted(curves, key=lambda label: mean[label])
    kinds = kinds_of(ranked, learned)
    lines = [Curve(rule, curves[rule], kinds[rule], f"{mean[rule]:.3g}") for rule in ranked]
    return LineChart(caption, lines, ERROR)


def kinds_of(ranked: Sequence[str], learned: str) -> dict[str, str]:
    """How each rule is drawn: the fitted one strong, the best three formulas in colour.

    Args:
        ranked: best first.
        learned: the rule that is fitted.
    """
    formulas = [rule for rule in ranked if rule != learned]
    kinds = {rule: "solver" if rank < 3 else "formula" for rank, rule in enumerate(formulas)}
    return {**kinds, learned: "learned"}


def gates(
    alpha: Float[Tensor, "branches S"],
    sigmas: Sequence[float],
    boundaries: Sequence[float],
    anchors: Sequence[int],
) -> LineChart:
    """LESA's gate at the forecast steps, a curve per branch, a dashed line per boundary.

    Args:
        alpha: gate of every step.
        sigmas: flow time of every step.
        boundaries: between the stages, in flow time.
        anchors: steps at which the network runs: the gate is not used there, which breaks a line.
    """
    curves = []
    for branch, values in enumerate(alpha.detach().double().tolist()):
        shown = [math.nan if step in anchors else value for step, value in enumerate(values)]
        curves.append(Curve(f"branch {branch}", list(enumerate(shown))))
    edges = [sum(sigma > boundary for sigma in sigmas) - 0.5 for boundary in boundaries]
    return LineChart("Gate of every step", curves, Axes(STEP, "gate alpha"), edges=edges)


def parts_of_norm(caption: str, curves: Curves) -> LineChart:
    """What part of a feature's norm something is, per step.

    Args:
        caption: what it shows.
        curves: by tap.
    """
    lines = [Curve(label, points) for label, points in curves.items()]
    return LineChart(caption, lines, PART, wide=False)


def cosines(caption: str, matrix: Float[Tensor, "S S"]) -> HeatMap:
    """How alike the features of every two steps are."""
    steps = range(len(matrix))
    return HeatMap(caption, matrix, HeatAxes(steps, steps, "step", "step", "cosine", ".4f"))


def layers(caption: str, matrix: Float[Tensor, "L T"], names: Sequence[str]) -> HeatMap:
    """How every layer moves, from step 1 on.

    Args:
        caption: what it shows.
        matrix: a line per layer, in parts of its norm.
        names: of the layers.
    """
    steps = range(1, 1 + matrix.shape[1])
    return HeatMap(caption, matrix, HeatAxes(names, steps, "layer", "step", "part", ".3g"))


def weights(caption: str, rows: Float[Tensor, "S S"], anchors: Sequence[int]) -> HeatMap:
    """The weights of a linear forecaster: a line per forecast step, a column per anchor.

    Args:
        caption: whose weights they are.
        rows: weight of every step's feature in every step's forecast.
        anchors: steps at which the network runs.

    Raises:
        ValueError: every step is an anchor, so nothing is forecast.
    """
    steps = [step for step in range(rows.shape[-1]) if step not in anchors]
    if not steps:
        raise ValueError(f"all {rows.shape[-1]} steps are anchors; there are no weights to draw.")
    values = rows.detach().double().cpu()[steps][:, list(anchors)].clone()
    for place, step in enumerate(steps):
        values[place, [anchor > step for anchor in anchors]] = torch.nan  # yet to come
    axes = HeatAxes(steps, anchors, "forecast of step", "on the feature of step", "weight")
    return HeatMap(caption, values, axes, signed=True)


def weight_maps(found: Mapping[str, Weights]) -> dict[str, HeatMap]:
    """The maps of several rows, as `weights_<number>`."""
    return {
        f"weights_{number}": weights(caption, *rows)
        for number, (caption, rows) in enumerate(found.items(), 1)
    }
