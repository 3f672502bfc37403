"""LESA without its networks, by alternating least squares.

F_hat_t = F_{t-1} + alpha[t] sum_j w[stage(t), j] F_{t-K+j}, per branch: a number per step and a
filter per stage, to which the published gate comes on a fixed grid (its input is a function of the
step alone). The constant is left out.
Shapes: S sampling steps, K taps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.training.lesa.windows import Quadratic, solve, window_steps


@dataclass(frozen=True)
class LinearEquivalent:
    """A fitted table.

    Args:
        alpha: gate of every step; 0 where nothing is forecast.
        taps: filter of every stage, oldest feature first.
        starts: first step of every stage.
        losses: summed squared error at the start and after every round.
    """

    alpha: Float[Tensor, "branches S"]
    taps: Float[Tensor, "branches stages K"]
    starts: list[int]
    losses: list[float]

    def filters(self) -> Float[Tensor, "branches S K"]:
        """alpha[t] w[stage(t)]: what is added to reuse at every step."""
        return self.alpha[..., None] * self.taps[:, stage_of(self.starts, self.alpha.shape[1])]

    def rows(self) -> Float[Tensor, "branches S S"]:
        """The same as rows over all earlier steps, to be folded onto anchors (`fold`)."""
        branches, num_steps = self.alpha.shape
        rows = torch.zeros(branches, num_steps, num_steps, dtype=torch.float64)
        for t, filters in enumerate(self.filters().unbind(1)):
            if t == 0:
                continue
            rows[:, t, t - 1] = 1.0
            seen = torch.tensor(window_steps(t, filters.shape[1]))
            rows[:, t].index_add_(1, seen, filters)
        return rows


def stage_of(starts: Sequence[int], num_steps: int) -> list[int]:
    """Stage of every step."""
    return [sum(step >= start for start in starts) - 1 for step in range(num_steps)]


def fit_linear_equivalent(
    quadratic: Quadratic, starts: Sequence[int], num_rounds: int = 50
) -> LinearEquivalent:
    """Solve for gates and filters in turns; the loss never rises.

    With the filters fixed, alpha[t] = (w . right_t) / (w^T normal_t w); with the gates fixed, the
    filter of a stage solves (sum_t alpha[t]^2 normal_t) w = sum_t alpha[t] right_t. The start is
    the best filter per stage with all gates 1.

    Args:
        quadratic: from a recording, or from the windows of runs that forecast.
        starts: first step of every stage.
        num_rounds: rounds of both solves.
    """
    branches, num_steps = quadratic.constant.shape
    stages = torch.tensor(stage_of(starts, num_steps))
    counted = (quadratic.constant != 0).double()
    alpha = counted.clone()
    taps = _solve_taps(quadratic, alpha, stages, len(starts))
    fitted = LinearEquivalent(alpha, taps, list(starts), [])
    losses = [float(quadratic.error(fitted.filters()).sum())]
    for _ in range(num_rounds):
        of_step = taps[:, stages]
        bent = torch.einsum("bsk,bskl,bsl->bs", of_step, quadratic.normal, of_step)
        slope = (of_step * quadratic.right).sum(-1)
        alpha = (slope / bent.where(bent > 0, 1.0)).where(bent > 0, 0.0) * counted
        taps = _solve_taps(quadratic, alpha, stages, len(starts))
        fitted = LinearEquivalent(alpha, taps, list(starts), losses)
        losses.append(float(quadratic.error(fitted.filters()).sum()))
    return fitted


def _solve_taps(
    quadratic: Quadratic, alpha: Tensor, stages: Tensor, num_stages: int
) -> Float[Tensor, "branches stages K"]:
    normal = torch.einsum("bs,bskl->bskl", alpha.square(), quadratic.normal)
    right = alpha[..., None] * quadratic.right
    sums = []
    for stage in range(num_stages):
        mine = stages == stage
        sums.append(solve(normal[:, mine].sum(1), right[:, mine].sum(1)))
    return torch.stack(sums, dim=1)
