"""The page of `foreseer inspect`: one look at a recording and what it speaks for.

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
from foreseer.checkpoints.standing import ESTIMATED_GAIN_DB, ESTIMATED_LOSS_DB
from foreseer.evaluation.motion import Motion
from foreseer.evaluation.offline import LEARNED, OfflineRow, best_row, gain
from foreseer.evaluation.page import figures
from foreseer.evaluation.page.charts import Axes, Chart, Curve, LineChart
from foreseer.evaluation.page.figures import Curves, Weights
from foreseer.evaluation.page.heat import Timeline
from foreseer.evaluation.page.template import Cell, Section, facts, page, sortable, tile

ESTIMATE = Axes("network evaluations", "offline estimate in dB (higher is better)", ".2f")
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
    panels: Mapping[str, Curves]
    weights: Mapping[str, Weights]

    @property
    def middle(self) -> int:
        """The budget that is shown step by step."""
        return self.budgets[len(self.budgets) // 2]


def inspect_page(told: Mapping[str, str], answer: Answer | str, sections: Sequence[Section]) -> str:
    """The HTML page of a recording.

    Args:
        told: facts of the recording, see `motion.told`.
        answer: what was found, or why no rule was compared.
        sections: see `sections_of`.
    """
    context = f"{told['host']}; {told['scheduler']}; trajectories: {told['trajectories']}"
    verdict = answer if isinstance(answer, str) else answer.verdict
    tiles = [] if isinstance(answer, str) else _tiles(answer)
    return page("inspect", context, verdict, sections, __version__, tiles)


def sections_of(
    told: Mapping[str, str],
    motions: Mapping[str, Motion],
    cosines: Mapping[str, Float[Tensor, "S S"]],
    answer: Answer | str,
) -> list[Section]:
    """Everything the page shows.

    Args:
        told: facts of the recording, see `motion.told`.
        motions: how the features of each tap move.
        cosines: mean cosine between the features of every two steps, by tap.
        answer: what was found, or why no rule was compared.
    """
    moving, header = _motion(motions, cosines), Section("recording", "The recording", facts(told))
    if isinstance(answer, str):
        return [*moving, header]
    items = "\n".join(f"<li>{escape(line)}</li>" for line in LIMITS)
    limits = Section("limits", NOT_KNOWN, f"<ul>\n{items}\n</ul>")
    return [*_answered(answer), *moving, limits, header]


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
        ahead = (
            True if found >= ESTIMATED_GAIN_DB else False if found <= -ESTIMATED_LOSS_DB else None
        )
        tail = ", ".join(
            f"{row.method} ({row.tap}) {decibels(row.estimate_db)}" for row in (learned, formula)
        )
        tiles.append(
            tile(f"{n} evaluations, learned against formula", f"{found:+.1f} dB", tail, ahead)
        )
    return tiles


def _answered(answer: Answer) -> list[Section]:
    """The comparison of the rules, their errors, anchors and weights."""
    errors = {
        f"errors_{number}": figures.rule_errors(f"Tap {title}", curves, LEARNED)
        for number, (title, curves) in enumerate(answer.panels.items(), 1)
    }
    num_steps = 1 + max(
        step for curves in answer.panels.values() for line in curves.values() for step, _ in line
    )
    caption = (
        "Steps at which the network would run: the lists found for the best formula and the "
        "least-squares fit of each tap, and the uniform one. Bold: of the fit."
    )
    strong = [label for label in answer.lists if LEARNED in label]
    lists = {"anchors": Timeline(caption, answer.lists, num_steps, strong)}
    errors_note = (
        f"||F_hat - F|| / ||F|| at {answer.middle} evaluations on held-out trajectories, every "
        "rule on the anchors found for the tap's best formula. Behind the names: mean over "
        "forecast steps."
    )
    weights_note = (
        "A line per forecast step: how much of each computed feature goes into its forecast. "
        f"Least squares on the even half of the trajectories at {answer.middle} evaluations, and "
        "the best formula."
    )
    maps = figures.weight_maps(answer.weights)
    rules_note = (
        "-20 log10 of the error piled up during a run, from recorded features. Each rule on the "
        f"anchors searched for it. Gaps below {ESTIMATED_GAIN_DB:g} dB say nothing."
    )
    return [
        Section("rules", "Every rule, offline", _table(answer), rules_note, _rules(answer)),
        Section("steps", "Error per step", note=errors_note, figures=errors),
        Section("anchors", "Where to run it", figures=lists),
        Section("weights", "What is added up", note=weights_note, figures=maps),
    ]


def _rules(answer: Answer) -> dict[str, LineChart]:
    """The estimate against the budget, every method on its best tap."""
    best: dict[tuple[str, int], OfflineRow] = {}
    for row in answer.rows:
        key = row.method, row.num_anchors
        if row.anchors_name == "searched" and (
            key not in best or row.accumulated_error < best[key].accumulated_error
        ):
            best[key] = row
    middle = {method: row for (method, n), row in best.items() if n == answer.middle}
    ranked = sorted(middle, key=lambda method: middle[method].accumulated_error)
    kinds = figures.kinds_of(ranked, LEARNED)
    curves = [
        Curve(
            method,
            [(n, best[method, n].estimate_db) for n in sorted(answer.budgets)],
            kinds[method],
            decibels(best[method, max(answer.budgets)].estimate_db),
        )
        for method in ranked
    ]
    caption = (
        "Each rule on its best tap. Thick: fitted by least squares; in colour: the best three "
        f"formulas. Behind the names: dB at {max(answer.budgets)} evaluations."
    )
    drawable = any(math.isfinite(y) for curve in curves for _, y in curve.points)
    return {"rules": LineChart(caption, curves, ESTIMATE)} if drawable else {}


def _table(answer: Answer) -> str:
    """Every rule on every tap."""
    lines = [
        ("learned" if method == LEARNED else "formula", cells) for method, cells in _cells(answer)
    ]
    table = sortable(lines, "Every rule on every tap", ("method", "tap"))
    return (
        '<details class="block"><summary>Every rule on every tap, on the anchors '
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


def _motion(
    motions: Mapping[str, Motion], cosines: Mapping[str, Float[Tensor, "S S"]]
) -> list[Section]:
    """How features move from step to step, and how alike those of any two steps are."""
    taps = [tap for tap in motions if not tap.startswith("blocks.")] or list(motions)
    layers = [tap for tap in motions if tap.startswith("blocks.")]
    measures = {
        "unexplained": (
            "What earlier steps leave unexplained: ||F - P F|| / ||F||, P onto all of them",
            {tap: 1 - found.fidelity for tap, found in motions.items()},
        ),
        "change": (
            "Change since the step before: ||F_t - F_(t-1)|| / ||F_(t-1)||",
            {tap: found.change for tap, found in motions.items()},
        ),
    }
    drawn: dict[str, Chart] = {}
    for name, (caption, found) in measures.items():
        curves = {tap: list(enumerate(found[tap].tolist()))[1:] for tap in taps}
        if any(value > 0 for points in curves.values() for _, value in points):
            drawn[name] = figures.parts_of_norm(caption, curves)
        if len(layers) > 1:
            values = torch.stack([found[tap] for tap in layers])[:, 1:]
            drawn[f"layers_{name}"] = figures.layers(f"Every layer. {caption}", values, layers)
    maps = {
        f"cosines_{number}": figures.cosines(f"Tap {tap}", cosines[tap])
        for number, tap in enumerate(taps, 1)
    }
    note = "Cosine between the features of two steps, mean over trajectories and branches."
    return [
        Section("motion", "Motion", "" if drawn else "<p>Nothing moves.</p>", figures=drawn),
        Section("cosines", "Likeness of steps", note=note, figures=maps),
    ]


def decibels(value: float) -> str:
    """An estimate with one decimal; infinite where a rule is exact."""
    return "exact" if value == math.inf else f"{value:.1f}"
