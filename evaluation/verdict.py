"""One line after every fit that a person can act on: at so many evaluations, is it worth using?

The rival is the best formula on its own list of anchors, which its search on Grams finds; on the
list of the fit a formula may be far worse than it can be. A fit in open loop knows held-out Grams,
not samples: it is judged by the error that forecasts pile up on them, which orders methods as
samples do better than errors per step (docs/inspect.md). A fit in closed loop knows the finished
latents. Neither measures PSNR: `foreseer bench` does.
Shapes: n trajectories, P parts (1 of the whole feature), S sampling steps.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.checkpoints.standing import (
    ESTIMATED_GAIN_DB,
    ESTIMATED_LOSS_DB,
    Standing,
    interval,
    standing,
)
from foreseer.evaluation.metrics import Paired, paired_squares
from foreseer.evaluation.offline import MEAN_GAPS
from foreseer.evaluation.rows import formula_tables
from foreseer.evaluation.search import beam_search
from foreseer.integration.schedule import common_lists, warped
from foreseer.predictors.rules import RULES, SHOWN
from foreseer.trajectories.gram import accumulated_error, spread

BENCH = (
    "foreseer bench --pipeline PIPELINE --predictors FOLDER --budgets {budgets} --out REPORT "
    "measures PSNR and solvers"
)
ADVICE: Mapping[Standing, str] = {
    "ahead": "use it",
    "level": "no reason to prefer it",
    "behind": "use the formula",
}
EXACT = 1e-30  # smallest squared error that is told from none: 300 dB
SEARCHED = ("taylor_2",)  # formulas whose beam searches find lists for all
WIDTH = 8  # of the beam: half of what `inspect` takes, for tenths of a dB
GAMMAS = (1.0, 1.2, 1.4)  # of the warped lists tried

Chunks = Iterable[tuple[Float[Tensor, "n branches P S S"], Float[Tensor, "branches P S S"]]]


class Rival(NamedTuple):
    """A formula on its own list of anchors, and the square of what piles up there on Grams."""

    name: str
    anchors: tuple[int, ...]
    table: Float[Tensor, "S S"] | Float[Tensor, "1 S S"]
    error: float


def rivals_on(
    mean_gram: Float[Tensor, "branches S S"],
    num_anchors: int,
    sigmas: Sequence[float],
    expert_steps: Sequence[int] = (0,),
    others: Sequence[Sequence[int]] = (),
) -> list[Rival]:
    """Every formula on the list that suits it best by Grams, the best first.

    Lists tried: that of a beam search for Taylor 2, the common and a few warped ones, and `others`.

    Args:
        mean_gram: of trajectories that are not judged on, of the whole feature.
        num_anchors: network evaluations.
        sigmas: flow time of every step.
        expert_steps: first step of each transformer, starting with 0.
        others: further lists, such as that of the fit.
    """
    num_steps, mean_gram = len(sigmas), mean_gram.double()
    longest = max(2, round(MEAN_GAPS * num_steps / num_anchors))
    grid = num_anchors, num_steps
    lists = [*map(tuple, others), *common_lists(*grid, expert_steps).values()]
    for gamma in GAMMAS:
        try:
            lists.append(warped(*grid, gamma, expert_steps))
        except ValueError:  # two anchors fell on one step
            continue
    for name in SEARCHED:
        search = mean_gram[None], sigmas, num_anchors, RULES[name], WIDTH, longest, expert_steps
        lists.append(beam_search(*search)[0])
    best: dict[str, Rival] = {}
    for anchors in dict.fromkeys(lists):
        for name, table in formula_tables(anchors, sigmas, expert_steps).items():
            error = float(accumulated_error(mean_gram, table, sigmas).square().mean())
            if name not in best or error < best[name].error:
                best[name] = Rival(name, tuple(anchors), table, error)
    return sorted(best.values(), key=lambda rival: rival.error)


@dataclass(frozen=True)
class Estimate:
    """What Grams of trajectories that were not fitted on say about rows, on one list of anchors.

    Args:
        num_anchors: network evaluations.
        learned: squared accumulated error of the rows, of every trajectory.
        formulas: the same of every formula, on its own list.
        lists: the formulas' lists.
        scale: mean squared spread of the feature.
        prompts: of every trajectory, a number, see `metrics.summarise`.
    """

    num_anchors: int
    learned: Float[Tensor, " n"]
    formulas: Mapping[str, Float[Tensor, " n"]]
    lists: Mapping[str, Sequence[int]]
    scale: float
    prompts: Sequence[int] | None = None

    @property
    def learned_db(self) -> float:
        """-10 log10 of the mean squared error over the squared spread; higher is better."""
        return self._decibels(self.learned)

    @property
    def formulas_db(self) -> dict[str, float]:
        """The same of every formula."""
        return {name: self._decibels(squares) for name, squares in self.formulas.items()}

    def _decibels(self, squares: Float[Tensor, " n"]) -> float:
        return -10 * math.log10(max(float(squares.mean()) / max(self.scale, EXACT), EXACT))

    @property
    def best(self) -> str:
        """The best formula."""
        return min(self.formulas, key=lambda name: float(self.formulas[name].mean()))

    @property
    def gap(self) -> Paired:
        """By how much the rows are better than it."""
        return paired_squares(self.learned, self.formulas[self.best], self.prompts)

    @property
    def standing(self) -> Standing:
        """Ahead or behind where the interval leaves out what the estimate is known to miss."""
        return standing(self.gap.low, self.gap.high, estimated=True)

    def metrics(self) -> dict[str, float]:
        """What a card shows, by its keys."""
        shown = dict.fromkeys((*SHOWN, self.best))
        errors = self.formulas_db
        means = {f"estimate_db_{name}": errors[name] for name in shown}
        return {"estimate_db": self.learned_db} | means | kept(self.gap)

    def words(self) -> str:
        """Number of evaluations, standing, gain, what to do."""
        return _words(self.num_anchors, self.standing, self.gap, self.best, self.lists[self.best])


def kept(gap: Paired) -> dict[str, float]:
    """A comparison as numbers of a checkpoint and a card."""
    return {"paired_db": gap.mean, "paired_low_db": gap.low, "paired_high_db": gap.high}


def estimate(
    chunks: Chunks,
    rivals: Sequence[Rival],
    num_anchors: int,
    sigmas: Sequence[float],
    prompts: Sequence[int] | None = None,
) -> Estimate:
    """Rows and formulas on the same held-out Grams.

    Args:
        chunks: Grams of some trajectories, and the rows for them; at least one trajectory.
        rivals: the formulas, see `rivals_on`.
        num_anchors: network evaluations.
        sigmas: flow time of every step.
        prompts: of every trajectory, a number.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in ("", *(each.name for each in rivals))}
    scales: list[Tensor] = []
    for grams, rows in chunks:
        scales.append(spread(grams.sum(2)).square().mean(1))
        found[""].append(_piled_up(grams, rows, sigmas))
        for rival in rivals:
            found[rival.name].append(_piled_up(grams, rival.table.expand_as(rows), sigmas))
    squares = {name: torch.cat(parts).clamp_min(EXACT) for name, parts in found.items()}
    lists = {rival.name: rival.anchors for rival in rivals}
    mine, scale = squares.pop(""), float(torch.cat(scales).mean())
    return Estimate(num_anchors, mine, squares, lists, scale, prompts)


def _piled_up(grams: Tensor, rows: Tensor, sigmas: Sequence[float]) -> Float[Tensor, " n"]:
    """Squared accumulated error, summed over parts, mean over branches and steps."""
    squares = accumulated_error(grams.double(), rows, sigmas).square()  # (n, branches, P, S)
    return squares.sum(2).mean((1, 2))


def open_loop_line(estimates: Sequence[Estimate]) -> str:
    """The verdict of a fit on Grams, for each number of evaluations."""
    told = "; ".join(each.words() for each in estimates)
    count = len(estimates[0].learned)
    return (
        f"verdict: {told}. Estimated from recorded features of {count} trajectories that were not "
        f"fitted on, which tells a gain of {ESTIMATED_GAIN_DB:g} dB or a loss of "
        f"{ESTIMATED_LOSS_DB:g}; {_bench([each.num_anchors for each in estimates])}."
    )


def closed_loop_line(num_anchors: int, gap: Paired, rival: str, anchors: Sequence[int]) -> str:
    """The verdict of a fit that ran the network.

    Args:
        num_anchors: network evaluations.
        gap: in dB of the final latents, of held-out trajectories, which chose nothing.
        rival: the best formula of those that ran.
        anchors: its list.
    """
    return (
        f"verdict: {_words(num_anchors, gap.standing, gap, rival, anchors)}. Measured on the final "
        f"latents of {gap.count} held-out trajectories, which chose nothing; "
        f"{_bench([num_anchors])}."
    )


def _words(
    num_anchors: int, word: Standing, gap: Paired, rival: str, anchors: Sequence[int]
) -> str:
    """Number of evaluations, standing, difference, what to do."""
    listed = " ".join(map(str, anchors))
    preposition = {"ahead": "of ", "level": "with ", "behind": ""}[word]
    against = f"the best formula on its own list ({rival}, anchors {listed})"
    return (
        f"{num_anchors} evaluations: {word} {preposition}{against}, "
        f"{gap.mean:+.1f} dB ({interval(gap.low, gap.high)}), {ADVICE[word]}"
    )


def _bench(budgets: Sequence[int]) -> str:
    return BENCH.format(budgets=",".join(map(str, dict.fromkeys(budgets))))
