"""What Grams alone say about every rule: its errors on recorded features, and its best anchors.

No network, no features. Shapes: n trajectories, S sampling steps.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from foreseer.checkpoints.standing import ESTIMATED_GAIN_DB, ESTIMATED_LOSS_DB
from foreseer.evaluation.search import beam_search, start_lists
from foreseer.integration.schedule import uniform
from foreseer.predictors.base import History, LinearPredictor, Step
from foreseer.predictors.rules import RULES
from foreseer.predictors.solve import least_squares_rows
from foreseer.trajectories.gram import accumulated_error, relative_errors, spread

LEARNED = "l2p_lstsq"
MAX_TRAJECTORIES = 64  # averages over more look the same and take longer
FORECAST_TAPS = ("output", "hidden", "residual")  # what a predictor can put back into a run
QUIET_SECONDS = 2  # before the progress bar shows
WIDTH = 16  # of the beam; 24 changes few lists, by some tenths of a dB, and takes longer
MEAN_GAPS = 2.5  # longest stretch between two anchors; the best lists stay below 2

Anchors = tuple[int, ...]


@dataclass(frozen=True)
class OfflineRow:
    """One method on one list of anchors, measured on trajectories it was not fitted on.

    Args:
        tap: the feature forecast.
        num_anchors: network evaluations.
        method: a name of `RULES`, or `l2p_lstsq`.
        anchors_name: `searched` or `uniform`.
        anchors: steps at which the network runs.
        open_loop_error: mean of ||F_hat_t - F_t|| / ||F_t|| over forecast steps, trajectories and
            branches.
        integrated_error: ||sum_t h_t (F_hat_t - F_t)|| over the whole run, RMS over trajectories
            and branches, divided by the RMS `spread` of the feature.
        accumulated_error: the same sum up to each step, RMS over the steps too.
    """

    tap: str
    num_anchors: int
    method: str
    anchors_name: str
    anchors: Anchors
    open_loop_error: float
    integrated_error: float
    accumulated_error: float

    @property
    def estimate_db(self) -> float:
        """-20 log10 of the accumulated error: higher is better; infinite when exact."""
        error = self.accumulated_error
        return -20 * math.log10(error) if error > 0 else math.inf


class Remembered(LinearPredictor):
    """A rule that computes its coefficients once per history and step: searches ask again."""

    def __init__(self, rule: LinearPredictor) -> None:
        super().__init__()
        self.rule = rule
        self.window = rule.window
        self.known: dict[tuple[int, ...], Tensor] = {}

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """The rule's own."""
        key = (*history.steps, step.index)
        if key not in self.known:
            self.known[key] = self.rule.coefficients(history, step).detach().double().flatten()
        return self.known[key]


class TapGrams:
    """The Grams of one tap, half of them to fit and search on and half to measure on.

    Args:
        tap: its name.
        grams: one Gram per trajectory and branch; of a single trajectory there is nothing to hold
            out, so formulas are searched and measured on it and nothing is learned.
        sigmas: flow time of every step.
        expert_steps: first step of each transformer, starting with 0; every rule begins anew there.
    """

    def __init__(
        self,
        tap: str,
        grams: Float[Tensor, "n branches S S"],
        sigmas: Sequence[float],
        expert_steps: Sequence[int] = (0,),
    ) -> None:
        self.tap = tap
        self.sigmas = sigmas
        self.expert_steps = expert_steps
        self.can_learn = len(grams) > 1
        self.fit = grams[::2].double()
        self.held = grams[1::2].double() if self.can_learn else self.fit
        self.mean = self.fit.mean(0)  # (branches, S, S): enough for a mean squared error

    def rows(self, method: str, anchors: Anchors) -> Float[Tensor, "branches S S"]:
        """The weights of a formula, or the least-squares fit on the even trajectories."""
        if method == LEARNED:
            return least_squares_rows(self.fit.sum(0), anchors, expert_steps=self.expert_steps)
        return RULES[method].rows(anchors, self.sigmas, self.expert_steps)[:, 0]

    def best(self, method: str, lists: Iterable[Anchors]) -> Anchors:
        """The list of least accumulated error on the even trajectories."""

        def error(anchors: Anchors) -> float:
            rows = self.rows(method, anchors)
            return float(accumulated_error(self.mean, rows, self.sigmas).square().mean())

        return min(dict.fromkeys(lists), key=error)

    def measure(self, method: str, name: str, anchors: Anchors) -> OfflineRow:
        """The errors of a method on the odd trajectories."""
        rows = self.rows(method, anchors)
        forecast = [t for t in range(len(self.sigmas)) if t not in anchors]
        errors = relative_errors(self.held.unsqueeze(-3), rows.unsqueeze(-3))[..., forecast]
        drift = accumulated_error(self.held, rows, self.sigmas).square()
        scale = _scale(self.held)
        return OfflineRow(
            self.tap,
            len(anchors),
            method,
            name,
            anchors,
            float(errors.mean()) if forecast else 0.0,
            float(drift[..., -1].mean().sqrt()) / scale,
            float(drift.mean().sqrt()) / scale,
        )


def offline_rows(
    grams: TapGrams,
    rules: Mapping[str, LinearPredictor],
    num_anchors: int,
    advance: Callable[[], object] = lambda: None,
) -> list[OfflineRow]:
    """Every rule and the learned rows on their own best list and on the uniform one.

    A rule takes the best of its `beam_search` on the even trajectories, the warped lists and the
    published one; the learned rows take the best of all lists tried for the rules.

    Args:
        grams: Grams of one tap.
        rules: `RULES`, or the same with remembered coefficients.
        num_anchors: network evaluations, below the number of steps, one per transformer at least.
        advance: called once per rule.
    """
    num_steps, starts = len(grams.sigmas), grams.expert_steps
    longest = max(2, round(MEAN_GAPS * num_steps / num_anchors))
    common = start_lists(num_anchors, num_steps, starts)
    best: dict[str, Anchors] = {}
    for name, rule in rules.items():
        found = beam_search(grams.fit, grams.sigmas, num_anchors, rule, WIDTH, longest, starts)
        best[name] = grams.best(name, [found[0], *common])
        advance()
    if grams.can_learn:
        best[LEARNED] = grams.best(LEARNED, [*best.values(), *common])
    even = uniform(num_anchors, num_steps, starts)
    return [
        grams.measure(method, name, anchors)
        for method, searched in best.items()
        for name, anchors in (("searched", searched), ("uniform", even))
    ]


def compared(taps: Sequence[TapGrams], budgets: Sequence[int]) -> list[OfflineRow]:
    """`offline_rows` of several taps and numbers of evaluations, under a bar."""
    rows: list[OfflineRow] = []
    rules = {name: Remembered(rule) for name, rule in RULES.items()}
    total = len(taps) * len(budgets) * len(rules)
    with tqdm(total=total, desc="anchors", unit="rule", delay=QUIET_SECONDS, leave=False) as bar:
        for grams in taps:
            for num_anchors in budgets:
                rows += offline_rows(grams, rules, num_anchors, bar.update)
    return rows


def best_row(rows: Sequence[OfflineRow], learned: bool) -> OfflineRow:
    """The row of least accumulated error among the learned or the formulas'."""
    chosen = [row for row in rows if (row.method == LEARNED) == learned]
    return min(chosen, key=lambda row: row.accumulated_error)


def verdict(rows: Sequence[OfflineRow], num_held_out: int) -> str:
    """One line a person can act on, which says what was compared and what was not.

    Args:
        rows: every budget's rows.
        num_held_out: trajectories measured on; 0 when there were too few to hold any out.

    Raises:
        ValueError: there are no rows.
    """
    budgets = sorted({row.num_anchors for row in rows}, reverse=True)
    if not budgets:
        raise ValueError("there is nothing to compare: no budget was measured.")
    at = {n: [row for row in rows if row.num_anchors == n] for n in budgets}
    formulas = {n: best_row(at[n], learned=False) for n in budgets}
    if not num_held_out:
        named = " and ".join(f"{_name(row)} at {n}" for n, row in formulas.items())
        return (
            f"offline estimate: the best formula is {named} evaluations; nothing learned was "
            "compared, because a single trajectory leaves none to hold out: record more."
        )
    learned = {n: best_row(at[n], learned=True) for n in budgets}
    gains = {n: gain(learned[n], formulas[n]) for n in budgets}
    parts = [
        f"at {n} evaluations {_name(learned[n])} {_outcome(gains[n])} {_name(formulas[n])}"
        for n in budgets
    ]
    return (
        f"offline estimate ({num_held_out} held-out trajectories): learned against the best "
        f"formula: {'; '.join(parts)}; {_advice(gains)}."
    )


def _outcome(gain: float) -> str:
    if -ESTIMATED_LOSS_DB < gain < ESTIMATED_GAIN_DB:
        return f"is not told apart ({gain:+.1f} dB) from"
    return f"gains {gain:.1f} dB over" if gain > 0 else f"loses {-gain:.1f} dB to"


def _advice(gains: Mapping[int, float]) -> str:
    """What to do, by the budgets at which the learned rows lose."""
    losing = [n for n, gain in gains.items() if gain <= -ESTIMATED_LOSS_DB]
    winning = [n for n, gain in gains.items() if gain >= ESTIMATED_GAIN_DB]
    fine = [n for n in gains if n not in losing]
    if not losing:
        if winning:
            return "confirm with `foreseer bench` before use"
        return "no reason to learn by this estimate; `foreseer bench` decides"
    if not fine:
        return "do not use it as it is: take the formula, or fit closed loop"
    if max(losing) < min(fine):
        return f"do not use it below {min(fine)}: take the formula there, or fit closed loop"
    named = " or ".join(str(n) for n in losing)
    return f"do not use it at {named}: take the formula there, or fit closed loop"


def gain(learned: OfflineRow, formula: OfflineRow) -> float:
    """Decibels by which the learned error is smaller; 0 when both are exact."""
    if learned.accumulated_error == formula.accumulated_error:
        return 0.0
    return learned.estimate_db - formula.estimate_db


def _name(row: OfflineRow) -> str:
    return f"{row.method} ({row.tap})"


def _scale(grams: Float[Tensor, "n branches S S"]) -> float:
    """RMS spread of the feature; a millionth of its norm for a constant one, where it is 0."""
    norm = grams.diagonal(dim1=-2, dim2=-1).mean().sqrt()
    tiny = torch.finfo(torch.float64).tiny
    return max(float(spread(grams).square().mean().sqrt()), 1e-6 * float(norm), tiny)
