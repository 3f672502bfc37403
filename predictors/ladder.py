"""What fixed rules are made of: a ladder of differences, slopes, clocks and polynomials.

Shapes: K history length.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Step


class Ladder(LinearPredictor):
    """Base of F_hat = sum_i f_i(j) D_i, D_i = (D_{i-1} - D_{i-1} of the previous anchor) / g_1.

    Args:
        order: highest difference used, 1 to 4; lower while fewer anchors exist.
        clock: `step` measures gaps and horizon in steps, `sigma` in flow time, in units of its mean
            step 1 / num_steps (see `clock_positions`).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, order: int, clock: str) -> None:
        super().__init__()
        if not 1 <= order <= 4:
            raise ValueError(f"order is {order}, expected 1 to 4; order 0 is Reuse.")
        if clock not in ("step", "sigma"):
            raise ValueError(f"clock is {clock!r}, expected 'step' or 'sigma'.")
        self.order = order
        self.clock = clock
        self.window = order + 1

    def factors(self, horizon: float) -> list[float]:
        """f_0 to f_order at a horizon."""
        raise NotImplementedError

    def levels(self, steps: Sequence[int]) -> int:
        """Differences the ladder holds after the anchors `steps`, the newest `window` of a run."""
        return min(self.order, len(steps) - 1)

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """The ladder's factors, folded onto the features."""
        nodes, at = clock_positions(history, step, self.clock)
        factors = self.factors(at - nodes[-1])
        return ladder_weights(nodes, factors[: self.levels(history.steps) + 1])


class Slopes(LinearPredictor):
    """Base of F_hat = F_0 + m_0 D_0 + m_1 D_1, moves of so many steps along the last slopes.

    Two anchors of a rule that uses three give Taylor's first order.
    """

    window = 2

    def moves(self, horizon: float, gap: float) -> tuple[float, ...]:
        """m_0, and m_1 of a rule over three anchors, at a horizon after a last gap."""
        raise NotImplementedError

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """The moves, folded onto the features."""
        steps = history.steps[-(self.window or 0) :]
        horizon = float(step.index - steps[-1])
        if len(steps) == 1:
            return torch.ones(1, dtype=torch.float64)
        if len(steps) < (self.window or 0):
            return slope_weights(steps, horizon)
        return slope_weights(steps, *self.moves(horizon, float(steps[-1] - steps[-2])))


def clock_positions(history: History, step: Step, clock: str) -> tuple[list[float], float]:
    """Where the anchors and the step to forecast lie on a clock that rises along the run.

    Args:
        history: the anchors.
        step: the step to forecast.
        clock: `step` is the index. `sigma` is num_steps * (1 - sigma): flow time falls from 1 to 0
            in `num_steps` steps, so that its mean step is 1. A grid that starts at s_0 < 1 has the
            mean step s_0 on this clock; only rules that depend on the unit, as `HiCache` does, can
            tell. In an inversion it falls, of which no rule can tell: their terms are odd together.

    Returns:
        The anchors, oldest first, and the step.

    Raises:
        ValueError: two anchors lie at one sigma.
    """
    if clock == "sigma":
        if len(set(history.sigmas)) < len(history.sigmas):
            raise ValueError(
                f"the steps {history.steps} hold two anchors at one sigma, as samplers that "
                "evaluate twice have them; use clock='step', or one anchor of each pair."
            )
        nodes = [step.num_steps * (1 - sigma) for sigma in history.sigmas]
        return nodes, step.num_steps * (1 - step.sigma)
    return [float(index) for index in history.steps], float(step.index)


def lagrange_weights(nodes: Float[Tensor, " K"], at: float) -> Float[Tensor, " K"]:
    """Weights w with p(at) = sum_k w_k p(nodes_k) for every polynomial p of degree < K."""
    others = ~torch.eye(len(nodes), dtype=torch.bool)
    gaps = (nodes[:, None] - nodes[None, :]).where(others, 1)
    ratio = ((at - nodes[None, :]) / gaps).where(others, 1)
    return ratio.prod(-1)


def ladder_weights(nodes: Sequence[float], factors: Sequence[float]) -> Float[Tensor, " K"]:
    """Weights of sum_i factors_i D_i, D the released TaylorSeer ladder of backward differences.

    Args:
        nodes: anchors on the clock, oldest first.
        factors: one per ladder level, the first for D_0; levels without enough anchors are left
            out.

    Returns:
        Float64 weights of the features at `nodes`.
    """
    num = len(nodes)
    ladder: list[list[float]] = []  # rows over the anchors: ladder[i] is D_i at the newest anchor
    for k in range(num):
        rows = [[float(anchor == k) for anchor in range(num)]]
        for i in range(1, min(len(factors), k + 1)):
            gap = nodes[k] - nodes[k - 1]
            before = zip(rows[i - 1], ladder[i - 1], strict=True)
            rows.append([(new - old) / gap for new, old in before])
        ladder = rows
    terms = [[f * share for share in row] for f, row in zip(factors, ladder, strict=False)]
    return torch.tensor(terms, dtype=torch.float64).sum(0)


def slope_weights(
    steps: Sequence[int], newest: float, previous: float = 0.0
) -> Float[Tensor, " K"]:
    """Weights of F_0 + newest (F_0 - F_1) / g_1 + previous (F_1 - F_2) / g_2.

    Args:
        steps: anchors, oldest first; the slope of a missing anchor is left out.
        newest: steps moved along the newest slope.
        previous: steps moved along the one before it.
    """
    weights = torch.zeros(len(steps), dtype=torch.float64)
    weights[-1] = 1.0
    for back, move in enumerate((newest, previous)[: len(steps) - 1], start=1):
        share = move / (steps[-back] - steps[-back - 1])
        weights[-back] += share
        weights[-back - 1] -= share
    return weights


def rises(sigmas: Sequence[float]) -> bool:
    """Whether the flow times of a run rise, as those of an inversion do."""
    return len(sigmas) > 1 and sigmas[-1] > sigmas[0]


def with_end(sigmas: Sequence[float]) -> list[float]:
    """Flow times of a run's steps and its end: 0, or 1 where they rise."""
    return [*sigmas, 1.0 if rises(sigmas) else 0.0]


def mean_weights(sigmas: Sequence[float]) -> list[float]:
    """Weights of the last K steps' velocities in MeanCache's forecast, see there.

    Args:
        sigmas: flow times of these steps, oldest first, of the step to forecast, and of the next.

    Raises:
        ValueError: the K steps end at the flow time they began at.
    """
    gaps = [later - earlier for earlier, later in pairwise(sigmas)]
    span = sigmas[-2] - sigmas[0]
    if span == 0:
        raise ValueError(
            f"{len(gaps) - 1} steps begin and end at the flow time {sigmas[0]}, as samplers that "
            "evaluate twice have them; MeanCache needs one evaluation per step, such as Euler's."
        )
    weights = [gaps[-1] / span * gap / span for gap in gaps[:-1]]
    weights[0] -= gaps[-1] / span
    weights[-1] += 1
    return weights


def powers(x: float, order: int) -> list[float]:
    """x^i / i! for i from 0 to `order`."""
    found = [1.0]
    for i in range(1, order + 1):
        found.append(found[-1] * x / i)
    return found


def checked_contraction(contraction: float) -> float:
    """A contraction of HiCache's polynomials.

    Raises:
        ValueError: it is not in (0, 1].
    """
    if not 0 < contraction <= 1:
        raise ValueError(f"contraction is {contraction}, expected a number in (0, 1].")
    return contraction
