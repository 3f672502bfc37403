"""Learned solvers as masks of one class: which numbers are free, and what moves with what.

With the step w_i = sigma_i - sigma_{i+1} and W_ij = C_ij / -w_i of the start,

    sigma: sigma_0 as at the start, w = sigma_0 softmax(log w_start + theta_times)
    C_ij  = T_ij(sigma) - w_i theta_rows_ij      T: a closed form of the moved times, or -w_i W_ij
    alpha = alpha_start + theta_alpha,   s = sigma + xi_start + theta_xi

and theta = 0 is the start, whatever is free. DyWeight tells the network (1/2 + sigmoid theta_scale)
times the time that its rows, which need not sum to the step, have really reached.
Shapes: n network evaluations, T free numbers.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.evaluation.learned_solver import FORMULAS, LinearSolver, closed_form, lower


@dataclass(frozen=True)
class Family:
    """One published learned solver.

    Args:
        free: groups of theta: `times`, `xi`, `scale`, `alpha`, `rows`.
        theory: the closed form whose rows move with the times; `start` takes that of the start,
            None multiplies the start's weights by the step.
        window: newest outputs whose weights are free; None frees all.
        balanced: the free weights of a row sum to 0, so that rows sum to the step.
    """

    free: tuple[str, ...]
    theory: str | None = None
    window: int | None = None
    balanced: bool = False

    def without_times(self) -> "Family":
        """The same at times that stay where they are."""
        kept = tuple(group for group in self.free if group != "times")
        return Family(kept, self.theory, self.window, self.balanced)


FAMILIES = {
    "bns": Family(("times", "alpha", "rows")),
    "gs": Family(("times", "xi", "alpha", "rows"), theory="dpmpp_3m"),
    "ld3": Family(("times", "xi"), theory="start"),
    "neuralsolver": Family(("times", "rows"), balanced=True),
    "dyweight": Family(("scale", "rows"), window=2),
}
"""arXiv 2403.01329, 2510.17699 (no discriminator), 2405.15506 (no ball), 2505.21114, 2603.11607."""


class Parametrisation:
    """A family at a start: theta to the numbers of a solver, differentiable, in float64.

    Args:
        family: what is free.
        name: closed form of the start.
        sigmas: its times.
        first_time: what the start tells the network at step 0, in (0, 1]; None tells the truth.

    Raises:
        ValueError: the theory is to move with the times, but has no formula of them.
    """

    def __init__(
        self,
        family: Family,
        name: str,
        sigmas: Float[Tensor, " n"],
        first_time: float | None = None,
    ) -> None:
        self.family, self.sigmas = family, sigmas.double()
        self.start = closed_form(name, self.sigmas)
        self.told = torch.zeros_like(self.sigmas)  # what the start adds to the times
        if first_time is not None:
            self.told[0] = first_time - self.sigmas[0]
            self.start = replace(self.start, times=self.sigmas + self.told)
        self.theory = name if family.theory == "start" else family.theory
        if self.theory is not None and self.theory not in FORMULAS:
            raise ValueError(
                f"{self.theory} has no formula of its times, expected one of {', '.join(FORMULAS)}."
            )

    @property
    def num_steps(self) -> int:
        """Network evaluations."""
        return len(self.sigmas)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Free numbers of each group."""
        n = self.num_steps
        known = {"times": n, "xi": n, "scale": n, "alpha": n, "rows": int(self._mask.sum())}
        return {group: known[group] for group in self.family.free}

    @cached_property
    def _mask(self) -> Tensor:
        """Which of the rows' numbers are free."""
        mask = torch.ones(self.num_steps, self.num_steps).tril().bool()
        if self.family.balanced:
            mask &= ~torch.eye(self.num_steps, dtype=torch.bool)
        return mask if self.family.window is None else mask & mask.triu(1 - self.family.window)

    def zeros(self) -> Float[Tensor, " T"]:
        """The theta of the start."""
        return torch.zeros(sum(self.sizes.values()), dtype=torch.float64)

    def solver(self, theta: Float[Tensor, " T"]) -> LinearSolver:
        """The solver of a theta."""
        split = theta.split(list(self.sizes.values()))
        groups = dict(zip(self.sizes, split, strict=True))
        n = self.num_steps
        widths = -torch.cat([self.sigmas, self.sigmas.new_zeros(1)]).diff()
        weights = -self.start.rows / widths[:, None]
        sigmas = self.sigmas
        if "times" in groups:
            shares = torch.softmax(widths.log() + groups["times"], 0)
            widths = sigmas[0] * shares
            sigmas = sigmas[0] - torch.cat([widths.new_zeros(1), widths.cumsum(0)[:-1]])
        free = theta.new_zeros(n, n)
        if "rows" in groups:
            free[self._mask] = groups["rows"]
            if self.family.balanced:
                free = free - torch.diag(free.sum(1))
        if "scale" in groups:
            return self._calibrated(weights + free, groups["scale"])
        if self.theory is None:
            rows = -widths[:, None] * (weights + free)
        else:
            rows = closed_form(self.theory, sigmas).rows - widths[:, None] * free
        alpha = self.start.alpha + groups.get("alpha", torch.zeros_like(sigmas))
        moved = groups.get("xi", torch.zeros_like(sigmas))
        return LinearSolver(sigmas + self.told + moved, alpha, rows)

    def _calibrated(
        self, weights: Float[Tensor, "n n"], scale: Float[Tensor, " n"]
    ) -> LinearSolver:
        """DyWeight's: the time reached follows the weights, the network is told a share of it."""
        ends = torch.cat([self.sigmas[1:], self.sigmas.new_zeros(1)])
        reached = self.sigmas[0]
        times, rows = [], []
        for end, row, factor in zip(ends, weights, 0.5 + torch.sigmoid(scale), strict=True):
            times.append(factor * reached)
            rows.append((end - reached) * row)
            reached = reached + rows[-1].sum()
        return LinearSolver(torch.stack(times), self.start.alpha, torch.stack(rows))

    def jacobian(self, theta: Float[Tensor, " T"]) -> Float[Tensor, "P T"]:
        """How the solver's numbers move with theta."""
        moved = torch.autograd.functional.jacobian(lambda at: self.solver(at).flat(), theta)
        return moved


def coordinate(number: int, num_steps: int) -> tuple[int, int | None]:
    """Step and column of a number of `LinearSolver.flat`; None is its time, -1 the noise."""
    if number < num_steps:
        return number, None
    if number < 2 * num_steps:
        return number - num_steps, -1
    rows, columns = lower(num_steps)
    return int(rows[number - 2 * num_steps]), int(columns[number - 2 * num_steps])
