"""L2P as a function of sigma: learned corrections of Newton's form, for many grids at once.

Shapes: K history length, M corrections, P basis functions.
Source: Newton's divided differences in flow time; the learned part is ours.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Step
from foreseer.predictors.ladder import lagrange_weights


class L2PContinuous(LinearPredictor):
    """F_hat = P_1 + sum_i a_i (P_i - P_{i-1}), P_i the polynomial in sigma through i + 1 anchors.

    P_i - P_{i-1} is Newton's term (x)(x + g_1)...[F_0 ... F_i] of the newest anchors, so the
    weights sum to 1 whatever a_i is. a_i = sum_j theta_ij psi_j with psi all monomials up to
    `degree` in where the step lies, how far beyond the newest anchor, and how wide the last gap is;
    theta is learned per guidance branch and number of anchors at hand. Starts (theta = 0) as
    `Newton(1, clock="sigma")`. One anchor is reused.

    Args:
        grids: flow times of the runs it was fitted on, one list each.
        num_branches: guidance branches.
        order: highest difference used, 1 to 3.
        degree: of the basis, 0 to 3.
        min_steps: fewest steps of a run it serves.
        max_steps: most steps of a run it serves.
        sigma_margin: how far a run's sigmas may lie outside of the fitted grids, compared at the
            same share of the run: 0.01 holds for one shift, more lets other shifts in.

    Raises:
        ValueError: an argument is out of range.
    """

    learned = True
    any_anchors = True
    any_grid = True

    def __init__(
        self,
        grids: Sequence[Sequence[float]],
        num_branches: int = 1,
        order: int = 1,
        degree: int = 1,
        min_steps: int = 2,
        max_steps: int = 1000,
        sigma_margin: float = 0.01,
    ) -> None:
        super().__init__()
        if not grids or min(len(grid) for grid in grids) < 2 or num_branches < 1:
            raise ValueError(
                f"found {len(grids)} grids and {num_branches} branches, expected at least one grid "
                "of two or more sigmas, and one branch."
            )
        if not 1 <= order <= 3 or not 0 <= degree <= 3:
            raise ValueError(f"order is {order}, degree {degree}; expected 1 to 3 and 0 to 3.")
        if not 2 <= min_steps <= max_steps or sigma_margin < 0:
            raise ValueError(
                f"found min_steps={min_steps}, max_steps={max_steps}, sigma_margin={sigma_margin}; "
                "expected 2 <= min_steps <= max_steps and sigma_margin >= 0."
            )
        self.grids = [[float(sigma) for sigma in grid] for grid in grids]
        self.num_branches = num_branches
        self.order = order
        self.degree = degree
        self.min_steps = min_steps
        self.max_steps = max_steps
        self.sigma_margin = sigma_margin
        self.window = order + 1
        size = len(exponents(degree))
        self.theta: Float[Tensor, "branches order order P"]
        theta = torch.zeros(num_branches, order, order, size, dtype=torch.float64)
        self.register_buffer("theta", theta)

    def check_grid(self, sigmas: Sequence[float]) -> None:
        """Raise unless a run is one of those this predictor serves.

        Args:
            sigmas: flow time of every step of the run.

        Raises:
            ValueError: too few or too many steps, or sigmas off the fitted grids.
        """
        if not self.min_steps <= len(sigmas) <= self.max_steps:
            raise ValueError(
                f"this run has {len(sigmas)} steps, the predictor serves {self.min_steps} to "
                f"{self.max_steps} (fitted on {[len(grid) for grid in self.grids]}); change "
                "num_inference_steps, or fit on such runs too."
            )
        for index, sigma in enumerate(sigmas):
            share = index / (len(sigmas) - 1)
            fitted = [sigma_at(grid, share) for grid in self.grids]
            if not min(fitted) - self.sigma_margin <= sigma <= max(fitted) + self.sigma_margin:
                raise ValueError(
                    f"step {index} of {len(sigmas)} has sigma {sigma:.4f}, expected "
                    f"{min(fitted):.4f} to {max(fitted):.4f} within {self.sigma_margin:g} (another "
                    "shift or schedule?); record and fit on this grid too."
                )

    def coefficients(self, history: History, step: Step) -> Float[Tensor, "K branches"]:
        """The weights of each branch.

        Raises:
            ValueError: a branch that was not fitted.
        """
        if max(step.branches) >= self.num_branches:
            raise ValueError(
                f"found branch {max(step.branches)}, but the predictor has {self.num_branches} "
                "branch(es)."
            )
        start, columns = self.design(history.sigmas, step.sigma)
        branches = list(step.branches)
        if not len(columns):
            return start[:, None].repeat(1, len(branches))
        theta = self.correction(len(start) - 1).detach().cpu().double()[branches]
        return (start + theta @ columns).mT

    def correction(self, order: int) -> Float[Tensor, "branches M"]:
        """The theta used when `order + 1` anchors are at hand."""
        return self.theta[:, order - 1, :order].flatten(1)

    def set_correction(self, order: int, theta: Float[Tensor, "branches M"]) -> None:
        """Set the theta used when `order + 1` anchors are at hand."""
        self.theta[:, order - 1, :order] = theta.unflatten(1, (order, -1)).to(self.theta)

    def design(
        self, sigmas: Sequence[float], sigma: float
    ) -> tuple[Float[Tensor, " K"], Float[Tensor, "M K"]]:
        """Weights of the start, and how each theta changes them: weights = start + theta @ columns.

        Args:
            sigmas: of the anchors at hand, oldest first, at most `window`.
            sigma: of the step to forecast.
        """
        nodes = torch.tensor(sigmas, dtype=torch.float64)
        polynomials = [padded(nodes, count, sigma) for count in range(1, len(nodes) + 1)]
        if len(nodes) == 1:
            return polynomials[0], torch.zeros(0, 1, dtype=torch.float64)
        terms = torch.stack(polynomials).diff(dim=0)  # (K - 1, K)
        psi = basis(sigmas[-2], sigmas[-1], sigma, self.degree)
        return polynomials[1], (terms[:, None] * psi[None, :, None]).flatten(0, 1)


def padded(nodes: Float[Tensor, " K"], count: int, sigma: float) -> Float[Tensor, " K"]:
    """Weights of the polynomial through the newest `count` nodes, zero on the others."""
    weights = torch.zeros_like(nodes)
    weights[-count:] = lagrange_weights(nodes[-count:], sigma)
    return weights


def exponents(degree: int) -> list[tuple[int, int, int]]:
    """Powers of the three variables in every monomial of at most this degree."""
    powers = itertools.product(range(degree + 1), repeat=3)
    return [(a, b, c) for a, b, c in powers if a + b + c <= degree]


def basis(before: float, newest: float, sigma: float, degree: int) -> Float[Tensor, " P"]:
    """psi: monomials in three variables of about -1 to 1.

    The variables are `2 sigma - 1`; `2 r / (1 + r) - 1` with r the horizon over the last gap; and
    `4 (newest - sigma) - 1`, the horizon in flow time.

    Args:
        before: sigma of the anchor before the newest.
        newest: sigma of the newest anchor.
        sigma: of the step to forecast.
        degree: highest total power.
    """
    horizon, gap = newest - sigma, before - newest
    place = (2 * sigma - 1, 2 * horizon / (horizon + gap) - 1, 4 * horizon - 1)
    values = [
        math.prod(z**power for z, power in zip(place, powers, strict=True))
        for powers in exponents(degree)
    ]
    return torch.tensor(values, dtype=torch.float64)


def sigma_at(grid: Sequence[float], share: float) -> float:
    """Flow time at a share of the run from 0 to 1, linear between its steps."""
    place = share * (len(grid) - 1)
    low = min(int(place), len(grid) - 2)
    return grid[low] + (place - low) * (grid[low + 1] - grid[low])
