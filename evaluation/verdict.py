"""One line after every fit that a person can act on: at so many evaluations, is it worth using?

A fit in open loop knows held-out Grams, not samples: it is judged by the error that forecasts pile
up on them, which orders methods as samples do better than errors per step (docs/inspect.md). A fit
in closed loop knows the finished latents. Neither measures PSNR: `foreseer bench` does.
Shapes: n trajectories, P parts (1 of the whole feature), S sampling steps.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from foreseer.evaluation.offline import LEVEL_DB, LOSS_DB
from foreseer.evaluation.rows import formula_tables
from foreseer.predictors.rules import SHOWN
from foreseer.trajectories.gram import accumulated_error, spread

BENCH = (
    "foreseer bench --pipeline PIPELINE --predictors FOLDER --budgets {budgets} --out REPORT "
    "measures PSNR and solvers"
)
EXACT = 1e-30  # smallest squared error that is told from none: 300 dB

Chunks = Iterable[tuple[Float[Tensor, "n branches P S S"], Float[Tensor, "branches P S S"]]]


@dataclass(frozen=True)
class Estimate:
    """What Grams of trajectories that were not fitted on say about rows, on one list of anchors.

    Args:
        num_anchors: network evaluations.
        count: trajectories measured on.
        learned_db: -10 log10 of the mean squared accumulated error of the rows over the squared
            spread of the feature; higher is better.
        formulas_db: the same of every formula, on the same anchors.
    """

    num_anchors: int
    count: int
    learned_db: float
    formulas_db: dict[str, float]

    @property
    def best(self) -> str:
        """The best formula."""
        return max(self.formulas_db, key=lambda name: self.formulas_db[name])

    @property
    def gain_db(self) -> float:
        """By how much the rows are better than it."""
        return self.learned_db - self.formulas_db[self.best]

    def metrics(self) -> dict[str, float]:
        """What a card shows, by its keys."""
        shown = dict.fromkeys((*SHOWN, self.best))
        return {"estimate_db": self.learned_db} | {
            f"estimate_db_{name}": self.formulas_db[name] for name in shown
        }

    def words(self) -> str:
        """Number of evaluations, gain, grade."""
        if self.gain_db >= LEVEL_DB:
            grade = "good"
        else:
            grade = "undecided" if self.gain_db > -LOSS_DB else "do not use"
        against = f"the best formula on these anchors ({self.best})"
        return f"{self.num_anchors} evaluations: {_apart(self.gain_db)} {against}, {grade}"


def estimate(
    chunks: Chunks, anchors: Sequence[int], sigmas: Sequence[float], expert_steps: Sequence[int]
) -> Estimate:
    """Rows and formulas on the same held-out Grams.

    Args:
        chunks: Grams of some trajectories, and the rows for them; at least one trajectory.
        anchors: steps at which the network runs.
        sigmas: flow time of every step.
        expert_steps: first step of each transformer, starting with 0.
    """
    tables = _formula_tables(tuple(anchors), tuple(sigmas), tuple(expert_steps))
    totals = dict.fromkeys(["", *tables], 0.0)
    scale, count = 0.0, 0
    for grams, rows in chunks:
        count += len(grams)
        scale += float(spread(grams.sum(2)).square().mean(1).sum())
        totals[""] += _piled_up(grams, rows, sigmas)
        for name, table in tables.items():
            totals[name] += _piled_up(grams, table.expand_as(rows), sigmas)
    squares = {name: max(total / max(scale, EXACT), EXACT) for name, total in totals.items()}
    decibels = {name: -10 * math.log10(square) for name, square in squares.items()}
    return Estimate(len(anchors), count, decibels.pop(""), decibels)


@functools.lru_cache(maxsize=8)  # a fit that saves every epoch asks for the same ones every time
def _formula_tables(
    anchors: tuple[int, ...], sigmas: tuple[float, ...], expert_steps: tuple[int, ...]
) -> dict[str, Float[Tensor, "1 S S"] | Float[Tensor, "S S"]]:
    """The rows of every formula, and of Adams-Bashforth-2 where one transformer runs."""
    return formula_tables(anchors, sigmas, expert_steps)


def _piled_up(grams: Tensor, rows: Tensor, sigmas: Sequence[float]) -> float:
    """Squared accumulated error, summed over parts and trajectories, mean over branches, steps."""
    squares = accumulated_error(grams.double(), rows, sigmas).square()  # (n, branches, P, S)
    return float(squares.sum(2).mean((1, 2)).sum())


def open_loop_line(estimates: Sequence[Estimate]) -> str:
    """The verdict of a fit on Grams, for each number of evaluations.

    Good from `LEVEL_DB` on, not to be used from a loss of `LOSS_DB` on, undecided between: losses
    of least-squares rows are overstated, and smaller gaps order two methods badly.
    """
    told = "; ".join(each.words() for each in estimates)
    return (
        f"verdict: {told}. Estimated from recorded features of {estimates[0].count} trajectories "
        f"that were not fitted on; {_bench([each.num_anchors for each in estimates])}."
    )


def closed_loop_line(
    num_anchors: int, error_db: float, rivals_db: dict[str, float], count: int
) -> str:
    """The verdict of a fit that ran the network.

    Good from a gain of `LEVEL_DB` on, marginal below; not to be used where there is none.

    Args:
        num_anchors: network evaluations.
        error_db: 10 log10 of the mean squared error of the final latents.
        rivals_db: the same of formulas on the same anchors and tap; not empty.
        count: held-out trajectories, which chose nothing.
    """
    best = min(rivals_db, key=lambda name: rivals_db[name])
    gain = rivals_db[best] - error_db
    grade = "no gain, do not use"
    if gain > 0:
        grade = "good" if gain >= LEVEL_DB else "marginal"
    return (
        f"verdict: {num_anchors} evaluations: {_apart(gain)} the best formula on these anchors "
        f"({best}), {grade}. Measured on the final latents of {count} held-out trajectories, "
        f"which chose nothing; "
        f"{_bench([num_anchors])}."
    )


def _apart(gain_db: float) -> str:
    return f"{abs(gain_db):.1f} dB {'below' if gain_db < 0 else 'above'}"


def _bench(budgets: Sequence[int]) -> str:
    return BENCH.format(budgets=",".join(map(str, dict.fromkeys(budgets))))
