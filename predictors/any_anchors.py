"""L2P for whatever anchors the history holds: its closed form, solved while sampling.

Shapes: S sampling steps, K history length.
Source: L2P, arXiv 2604.26365, fitted by least squares on anchors; the Gram of the calibration
trajectories is all that fit needs, so the predictor carries it instead of rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Step
from foreseer.predictors.ladder import lagrange_weights
from foreseer.predictors.solve import closed_form

MAX_SOLVED = 10_000  # weights kept; an adaptive schedule meets ever new lists of anchors


class L2PGram(LinearPredictor):
    """F_hat_t = sum_k c_k F_k with c = argmin ||F_t - sum_k c_k F_k||^2 over the calibration runs.

    c - e_newest solves (G_hh + ridge diag G_hh) delta = g_t - G_hh e_newest on the mean Gram of
    each branch, in float64 on the CPU: a shrinkage toward reuse. One predictor serves every anchor
    list of its grid, also one that changes during the run. Starts as plain reuse (unit Gram of a
    constant trajectory).

    Args:
        num_steps: sampling steps S.
        num_branches: guidance branches.
        ridge: strength relative to each feature's squared norm, >= 0.
        window: newest anchors to use; None uses all.

    Raises:
        ValueError: an argument is out of range.
    """

    learned = True
    any_anchors = True
    from_grams = True

    def __init__(
        self,
        num_steps: int,
        num_branches: int = 1,
        ridge: float = 1e-4,
        window: int | None = None,
    ) -> None:
        super().__init__()
        if num_steps < 1 or num_branches < 1 or ridge < 0 or (window is not None and window < 1):
            raise ValueError(
                f"found num_steps={num_steps}, num_branches={num_branches}, ridge={ridge}, "
                f"window={window}; expected at least 1, 1, 0 and 1 (or None)."
            )
        self.num_steps = num_steps
        self.num_branches = num_branches
        self.ridge = ridge
        self.window = window
        self.gram: Float[Tensor, "branches S S"]
        shape = (num_branches, num_steps, num_steps)
        self.register_buffer("gram", torch.ones(shape, dtype=torch.float64))
        self.solved: dict[tuple[tuple[int, ...], int], Tensor] = {}
        self.register_load_state_dict_post_hook(forget_solved)

    def set_gram(self, mean_gram: Float[Tensor, "branches S S"]) -> None:
        """Make this Gram, the mean over calibration trajectories, the predictor's."""
        self.gram.copy_(mean_gram)
        self.solved.clear()

    def coefficients(self, history: History, step: Step) -> Float[Tensor, "K branches"]:
        """The weights of each branch; solved once per list of anchors and step.

        Raises:
            ValueError: a branch or a run of steps the Gram does not have.
        """
        if max(step.branches) >= self.num_branches or step.num_steps != self.num_steps:
            raise ValueError(
                f"found branch {max(step.branches)} in a run of {step.num_steps} steps, but the "
                f"Gram is of {self.num_branches} branch(es) and {self.num_steps} steps."
            )
        key = (tuple(history.steps), step.index)
        if key not in self.solved:
            if len(self.solved) >= MAX_SOLVED:
                self.solved.clear()
            gram = self.gram.detach().cpu().double()
            found = closed_form(gram, history.steps, [step.index], [self.ridge])
            self.solved[key] = found[0, ..., 0]
        return self.solved[key][list(step.branches)].mT

    def refitted(
        self, total: Float[Tensor, "branches P S S"], count: int, strength: float
    ) -> "L2PGram":
        """One with the mean of a sum, see the base class."""
        new = L2PGram(self.num_steps, self.num_branches, strength, self.window)
        new.set_gram(total[:, 0] / count)
        return new


def forget_solved(module: L2PGram, keys: Any) -> None:
    """Forget the weights of the Gram that `load_state_dict` has just replaced."""
    module.solved.clear()


def regrid(predictor: L2PGram, sigmas: Sequence[float], new_sigmas: Sequence[float]) -> L2PGram:
    """The predictor for another grid: its Gram, interpolated in sigma.

    Recorded features are read between their steps by the cubic through the four nearest ones,
    F(s) = sum_i w_i(s) F_i, so the Gram becomes W G W^T. It holds as far as runs of both grids
    follow nearly the same path.

    Args:
        predictor: fitted on `sigmas`.
        sigmas: flow time of every step of the fit.
        new_sigmas: flow time of every step of the run to serve, inside the range of `sigmas`.

    Raises:
        ValueError: there are fewer than four steps to interpolate between, or the new grid leaves
            the old one's range.
    """
    weights = interpolation(sigmas, new_sigmas)
    other = L2PGram(len(new_sigmas), predictor.num_branches, predictor.ridge, predictor.window)
    other.set_gram(weights @ predictor.gram.detach().cpu().double() @ weights.mT)
    return other


def interpolation(sigmas: Sequence[float], new_sigmas: Sequence[float]) -> Float[Tensor, "new old"]:
    """Rows of cubic Lagrange weights on the four steps around each new sigma.

    Raises:
        ValueError: see `regrid`.
    """
    grid = torch.tensor(sigmas, dtype=torch.float64)
    low, high = min(sigmas), max(sigmas)
    slack = 1e-2 * (high - low)  # grids of different length end at slightly different sigmas
    if len(sigmas) < 4 or min(new_sigmas) < low - slack or max(new_sigmas) > high + slack:
        raise ValueError(
            f"cannot read {len(sigmas)} steps with sigmas from {high:g} to {low:g} at sigmas from "
            f"{max(new_sigmas):g} to {min(new_sigmas):g}; record on a grid that covers them."
        )
    weights = torch.zeros(len(new_sigmas), len(sigmas), dtype=torch.float64)
    for row, sigma in zip(weights, new_sigmas, strict=True):
        after = int((grid > sigma).sum())  # steps above it; the grid falls
        first = min(max(after - 2, 0), len(sigmas) - 4)
        row[first : first + 4] = lagrange_weights(grid[first : first + 4], sigma)
    return weights
