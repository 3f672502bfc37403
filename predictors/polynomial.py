"""Training-free rules that extrapolate the newest anchors: reuse, Taylor and Newton.

All are sum_k c_k F_k with c depending on the clock alone. Shapes: K history length.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Step


class Reuse(LinearPredictor):
    """Repeat the newest anchor: c = (1) (FORA, arXiv 2407.01425)."""

    window = 1

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """One weight of 1."""
        return torch.ones(1, dtype=torch.float64)


class Taylor(LinearPredictor):
    """TaylorSeer exactly as its released code computes it (arXiv 2503.06923, eq. 7).

    Ladder at every anchor: D_0 = F_0, D_i = (D_{i-1} - D_{i-1} of the previous anchor) / g_1 with
    g_1 the last gap; forecast F_hat = sum_i D_i j^i / i! at horizon j. For order >= 2 this is not
    polynomial interpolation: see `Newton` for that. The order grows with the anchors there are,
    as in the TaylorSeer hook of diffusers, whose `max_order` is `order`.

    Args:
        order: highest difference used, 1 to 4.
        warmup: the release's `first_enhance` E, >= 1. Its ladder forms differences only at anchors
            s > E - 2, so the order counts those anchors and not all. None lets every anchor count;
            1 and 2 come to the same.
        clock: `step` measures gaps and horizon in steps as the release does, `sigma` in flow time.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, order: int = 1, warmup: int | None = None, clock: str = "step") -> None:
        super().__init__()
        check_order(order)
        check_clock(clock)
        if warmup is not None and warmup < 1:
            raise ValueError(f"warmup is {warmup}, expected None or at least 1, the first anchor.")
        self.order = order
        self.warmup = warmup
        self.clock = clock
        self.window = order + 1

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Weights of the ladder, folded onto the features."""
        nodes, at = clock_positions(history, step, self.clock)
        horizon = at - nodes[-1]
        factors = [1.0]
        for i in range(1, self.levels(history.steps) + 1):
            factors.append(factors[-1] * horizon / i)
        return ladder_weights(nodes, factors)

    def levels(self, steps: Sequence[int]) -> int:
        """Differences the ladder holds after the anchors `steps`, the newest `window` of a run."""
        formed = len(steps) - 1
        if self.warmup is not None:
            formed = min(formed, sum(step > self.warmup - 2 for step in steps))
        return min(self.order, formed)


class Newton(LinearPredictor):
    """The polynomial through the newest `order + 1` anchors: Newton's, which is Lagrange's.

    c_k = prod_{m != k} (u - u_m) / (u_k - u_m), exact on polynomials of degree `order` in the
    clock u.

    Args:
        order: degree, 1 to 4; lower while fewer anchors exist.
        clock: `step` extrapolates in the step index, `sigma` in flow time.

    Raises:
        ValueError: the order or the clock is unknown.
    """

    def __init__(self, order: int = 1, clock: str = "step") -> None:
        super().__init__()
        check_order(order)
        check_clock(clock)
        self.order = order
        self.clock = clock
        self.window = order + 1

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Lagrange's weights."""
        nodes, at = clock_positions(history, step, self.clock)
        return lagrange_weights(torch.tensor(nodes, dtype=torch.float64), at)


def check_order(order: int) -> None:
    """Raise unless 1 <= order <= 4."""
    if not 1 <= order <= 4:
        raise ValueError(f"order is {order}, expected 1 to 4; order 0 is Reuse.")


def check_clock(clock: str) -> None:
    """Raise unless the clock is `step` or `sigma`."""
    if clock not in ("step", "sigma"):
        raise ValueError(f"clock is {clock!r}, expected 'step' or 'sigma'.")


def clock_positions(history: History, step: Step, clock: str) -> tuple[list[float], float]:
    """Where the anchors and the step to forecast lie on a clock that rises along the run.

    Args:
        history: the anchors.
        step: the step to forecast.
        clock: `step` is the index. `sigma` is num_steps * (1 - sigma): flow time falls from 1 to 0
            in `num_steps` steps, so that its mean step is 1. A grid that starts at s_0 < 1 has the
            mean step s_0 on this clock; only rules that depend on the unit, as `HiCache` does, can
            tell.

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
    ladder: list[Tensor] = []  # rows over the anchors: ladder[i] is D_i at the newest anchor seen
    for k in range(num):
        row = torch.zeros(num, dtype=torch.float64)
        row[k] = 1.0
        rows = [row]
        for i in range(1, min(len(factors), k + 1)):
            rows.append((rows[i - 1] - ladder[i - 1]) / (nodes[k] - nodes[k - 1]))
        ladder = rows
    return torch.stack([f * row for f, row in zip(factors, ladder, strict=False)]).sum(0)
