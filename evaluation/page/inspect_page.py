"""The page and the Markdown of `foreseer inspect`: one look at a recording and what it speaks for.

Shapes: S sampling steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer import __version__
from foreseer.evaluation.motion import Motion
from foreseer.evaluation.offline import LEARNED, LEVEL_DB, LOSS_DB, OfflineRow, best_row, gain
from foreseer.evaluation.page.charts import Axes, Curve, line_chart, looks
from foreseer.evaluation.page.heat import HeatAxes, Weights, heat_map, timeline, weight_maps
from foreseer.evaluation.page.template import Cell, Section, facts, page, sortable, tile

STEP = "step (0 is pure noise)"
ESTIMATE = Axes("network evaluations", "offline estimate in dB (higher is better)", ".2f")
ERROR = Axes(STEP, "relative error of the feature (lower is better)", ".3g", log=True)
LIMITS = (
    "How the network reacts to a sample that is off: only a run shows it (foreseer bench).",
    "Guided samples: a Gram belongs to one branch and holds no products between branches.",
    "What the head of the network does with an error on hidden or residual.",
    "Other samplers than Euler, other guidance scales, other numbers of steps.",
    "Fits in closed loop, which need the network and may win where least squares loses.",
)
NOT_KNOWN = "What it cannot know"


@dataclass(frozen=True)
class Answer:
    """What the Grams say about the rules.

    Args:
        rows: every rule on every tap and budget, on the list searched for it and on the uniform.
        verdict: the line a person can act on.
        budgets: network evaluations, most first.
        lists: label to anchors, see `chosen_lists`.
        panels: title of a tap to method to (step, relative error) pairs, at the middle budget.
        weights: caption to the rows of a branch and its anchors, at the middle budget.
    """

    rows: Sequence[OfflineRow]
    verdict: str
    budgets: Sequence[int]
    lists: Mapping[str, Sequence[int]]
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
    weights: Mapping[str, Weights]

    @property
    def middle(self) -> int:
        """The budget that is shown step by step."""
        return self.budgets[len(self.budgets) // 2]


def inspect_page(
    told: Mapping[str, str],
    motions: Mapping[str, Motion],
    cosines: Mapping[str, Float[Tensor, "S S"]],
    answer: Answer | str,
) -> str:
    """The HTML page of a recording.

    Args:
        told: facts of the recording, see `motion.told`.
        motions: how the features of each tap move.
        cosines: mean cosine between the features of every two steps, by tap.
        answer: what was found, or why no rule was compared.
    """
    sections = [Section("recording", "The recording", facts(told))]
    verdict = answer if isinstance(answer, str) else answer.verdict
    tiles: list[str] = []
    if isinstance(answer, Answer):
        sections = [*_answered(answer), *_motion(motions, cosines), _limits(), *sections]
        tiles = _tiles(answer)
    else:
        sections = [*_motion(motions, cosines), *sections]
    context = f"{told['host']}; {told['scheduler']}; trajectories: {told['trajectories']}"
    return page("inspect", context, verdict, sections, __version__, tiles)


def _tiles(answer: Answer) -> list[str]:
    """One tile per budget: what learning gains over the best formula, by the estimate."""
    tiles = []
    for n in answer.budgets:
        here = [row for row in answer.rows if row.num_anchors == n]
        formula = best_row(here, learned=False)
        if not any(row.method == LEARNED for row in here):
            shown = f"{formula.method}, {formula.tap}"
            tiles.append(tile(f"{n} evaluations", decibels(formula.estimate_db), shown))
            continue
        learned = best_row(here, learned=True)
        found = gain(learned, formula)
        ahead = True if found >= LEVEL_DB else False if found <= -LOSS_DB else None
        tail = ", ".join(
            f"{row.method} ({row.tap}) {decibels(row.estimate_db)}" for row in (learned, formula)
        )
        tiles.append(
            tile(f"{n} evaluations, learned against formula", f"{found:+.1f} dB", tail, ahead)
        )
    return tiles


def _answered(answer: Answer) -> list[Section]:
    """The comparison of the rules, their errors, anchors and weights."""
    errors = "\n".join(
        line_chart(f"Tap {title}", _error_curves(curves), ERROR)
        for title, curves in answer.panels.items()
    )
    longest = 1 + max(int(step) for curves in answer.panels.values() for step in _steps(curves))
    caption = (
        "Steps at which the network would run: the lists found for the best formula and the "
        "least-squares fit of each tap, and the uniform one. Bold: of the fit."
    )
    strong = [label for label in answer.lists if LEARNED in label]
    note = (
        "A line per forecast step: how much of each computed feature goes into its forecast. "
        f"Least squares on the even half of the trajectories at {answer.middle} evaluations, and "
        "the best formula."
    )
    return [
        Section("rules", "Every rule, offline", _rules(answer), _rules_note(answer)),
        Section(
            "steps",
            "Error per step",
            errors,
            f"||F_hat - F|| / ||F|| at {answer.middle} evaluations on held-out trajectories, every "
            "rule on the anchors found for the tap's best formula. Beside the names: mean over "
            "forecast steps.",
        ),
        Section("anchors", "Where to run it", timeline(caption, answer.lists, longest, strong)),
        Section("weights", "What is added up", weight_maps(answer.weights), note),
    ]


def _steps(curves: Mapping[str, Sequence[tuple[int, float]]]) -> list[int]:
    return [step for points in curves.values() for step, _ in points]


def _rules_note(answer: Answer) -> str:
    """What the estimate is."""
    return (
        "-20 log10 of the error piled up during a run, from recorded features. Each rule on the "
        f"anchors searched for it. Gaps below {LEVEL_DB:g} dB say nothing."
    )


def _rules(answer: Answer) -> str:
    """The estimate against the budget, every method on its best tap; then all of them."""
    best: dict[tuple[str, int], OfflineRow] = {}
    for row in answer.rows:
        key = row.method, row.num_anchors
        if row.anchors_name == "searched" and (
            key not in best or row.accumulated_error < best[key].accumulated_error
        ):
            best[key] = row
    middle = {method: row for (method, n), row in best.items() if n == answer.middle}
    ranked = sorted(middle, key=lambda method: middle[method].accumulated_error)
    look = _looks(ranked)
    curves = [
        Curve(
            method,
            [(n, best[method, n].estimate_db) for n in sorted(answer.budgets)],
            look[method],
            method == LEARNED,
            decibels(middle[method].estimate_db),
        )
        for method in ranked
    ]
    caption = (
        f"Each rule on its best tap. Thick: fitted by least squares. Beside the names: dB at "
        f"{answer.middle} evaluations."
    )
    drawable = any(math.isfinite(y) for curve in curves for _, y in curve.points)
    chart = line_chart(caption, curves, ESTIMATE) if drawable else ""
    lines = [
        ("learned" if method == LEARNED else "formula", cells) for method, cells in _cells(answer)
    ]
    table = sortable(lines, "Every rule on every tap", ("method", "tap"))
    return (
        f'{chart}\n<details class="block"><summary>Every rule on every tap, on the anchors '
        f"searched for it and on uniform ones</summary>{table}</details>"
    )


def _cells(answer: Answer) -> list[tuple[str, dict[str, Cell]]]:
    """A line per method and tap, best first at the middle budget."""
    found = {(r.method, r.tap, r.num_anchors, r.anchors_name): r for r in answer.rows}
    keys = dict.fromkeys((row.method, row.tap) for row in answer.rows)
    ranked = sorted(keys, key=lambda k: found[*k, answer.middle, "searched"].accumulated_error)
    lines = []
    for method, tap in ranked:
        cells: dict[str, Cell] = {"method": (method, method), "tap": (tap, tap)}
        for n in answer.budgets:
            for name in ("searched", "uniform"):
                value = found[method, tap, n, name].estimate_db
                shown = min(value, 1e9)  # the page's script reads no infinity
                cells[f"{n} {name} (dB)"] = (decibels(value), shown)
        lines.append((method, cells))
    return lines


def _error_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> list[Curve]:
    """Lines of one tap, best first by their mean."""
    mean = {
        label: sum(found) / len(found) if (found := [y for _, y in points if y > 0]) else 0.0
        for label, points in curves.items()
    }
    ranked = sorted(curves, key=lambda label: mean[label])
    look = _looks(ranked)
    return [
        Curve(label, curves[label], look[label], label == LEARNED, f"{mean[label]:.3g}")
        for label in ranked
    ]


def _looks(ranked: Sequence[str]) -> dict[str, str]:
    """Warm for what is fitted; cold for the three best formulas, grey for the rest."""
    formulas = [label for label in ranked if label != LEARNED]
    learned = [label for label in ranked if label == LEARNED]
    return looks({"learned": learned, "solver": formulas[:3], "formula": formulas[3:]})


def _motion(
    motions: Mapping[str, Motion], cosines: Mapping[str, Float[Tensor, "S S"]]
) -> list[Section]:
    """How features move from step to step, and how alike those of any two steps are."""
    taps = [tap for tap in motions if not tap.startswith("blocks.")] or list(motions)
    look = looks({"solver": taps})
    charts = []
    for caption, name in (
        ("What earlier steps leave unexplained: ||F - P F|| / ||F||, P onto all of them", "rest"),
        ("Change since the step before: ||F_t - F_(t-1)|| / ||F_(t-1)||", "change"),
    ):
        curves = []
        for tap in taps:
            found = motions[tap].change if name == "change" else 1 - motions[tap].fidelity
            points = [(step, value) for step, value in enumerate(found.tolist()) if step]
            curves.append(Curve(tap, points, look[tap]))
        axes = Axes(STEP, "part of the feature's norm", ".3g", log=True)
        if any(value > 0 for curve in curves for _, value in curve.points):
            charts.append(line_chart(caption, curves, axes, wide=False))
    layers = [tap for tap in motions if tap.startswith("blocks.")]
    body = f'<div class="pair">{"".join(charts)}</div>' if charts else ""
    if len(layers) > 1:
        body += _layers(motions, layers)
    maps = "\n".join(
        heat_map(f"Tap {tap}", cosines[tap], _cosine_axes(len(cosines[tap])), False, square=True)
        for tap in taps
    )
    note = "Cosine between the features of two steps, mean over trajectories and branches."
    return [
        Section("motion", "Motion", body or "<p>Nothing moves.</p>"),
        Section("cosines", "Likeness of steps", f'<div class="pair">\n{maps}\n</div>', note),
    ]


def _cosine_axes(num_steps: int) -> HeatAxes:
    steps = range(num_steps)
    return HeatAxes(steps, steps, "step", "step", "cosine", ".4f")


def _layers(motions: Mapping[str, Motion], layers: Sequence[str]) -> str:
    """A heat map of the relative change, a line per layer."""
    change = torch.stack([motions[tap].change for tap in layers])[:, 1:]
    steps = range(1, 1 + change.shape[1])
    axes = HeatAxes(layers, steps, "layer", "step", "relative change", ".3g")
    return heat_map("Change of every layer since the step before", change, axes, signed=False)


def _limits() -> Section:
    items = "\n".join(f"<li>{escape(line)}</li>" for line in LIMITS)
    return Section("limits", NOT_KNOWN, f"<ul>\n{items}\n</ul>")


def decibels(value: float) -> str:
    """An estimate with one decimal; infinite where a rule is exact."""
    return "exact" if value == math.inf else f"{value:.1f}"
