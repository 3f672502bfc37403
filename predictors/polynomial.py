"""Training-free rules that extrapolate the newest anchors: reuse, Taylor and Newton.

All are sum_k c_k F_k with c depending on the steps alone. Shapes: K history length.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from .base import History, LinearPredictor, Step


class Reuse(LinearPredictor):
    """Repeat the newest anchor: c = (1) (FORA, arXiv 2407.01425)."""

    window = 1

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """One weight of 1."""
        return torch.ones(1, dtype=torch.float64)


class Taylor(LinearPredictor):
    """TaylorSeer exactly as its released code computes it (arXiv 2503.06923, eq. 7).

    Ladder at every anchor: D_0 = F_0, D_i = (D_{i-1} - D_{i-1} of the previous anchor) / g_1 with
    g_1 the last gap in steps; forecast F_hat = sum_i D_i j^i / i! at horizon j. For order >= 2 this
    is not polynomial interpolation: see `Newton` for that. The order grows with the anchors there
    are.

    Args:
        order: highest difference used, 1 to 4.

    Raises:
        ValueError: the order is out of range.
    """

    def __init__(self, order: int = 1) -> None:
        super().__init__()
        check_order(order)
        self.order = order
        self.window = order + 1

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Weights of the ladder, folded onto the features."""
        horizon = step.index - history.steps[-1]
        factors = [1.0]
        for i in range(1, self.order + 1):
            factors.append(factors[-1] * horizon / i)
        return ladder_weights(history.steps, factors)


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
        if clock not in ("step", "sigma"):
            raise ValueError(f"clock is {clock!r}, expected 'step' or 'sigma'.")
        self.order = order
        self.clock = clock
        self.window = order + 1

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Lagrange's weights."""
        if self.clock == "sigma":
            return lagrange_weights(torch.tensor(history.sigmas, dtype=torch.float64), step.sigma)
        return lagrange_weights(torch.tensor(history.steps, dtype=torch.float64), float(step.index))


def check_order(order: int) -> None:
    """Raise unless 1 <= order <= 4."""
    if not 1 <= order <= 4:
        raise ValueError(f"order is {order}, expected 1 to 4; order 0 is Reuse.")


def lagrange_weights(nodes: Float[Tensor, " K"], at: float) -> Float[Tensor, " K"]:
    """Weights w with p(at) = sum_k w_k p(nodes_k) for every polynomial p of degree < K."""
    others = ~torch.eye(len(nodes), dtype=torch.bool)
    gaps = (nodes[:, None] - nodes[None, :]).where(others, 1)
    ratio = ((at - nodes[None, :]) / gaps).where(others, 1)
    return ratio.prod(-1)


def ladder_weights(steps: list[int], factors: list[float]) -> Float[Tensor, " K"]:
    """Weights of sum_i factors_i D_i, D the released TaylorSeer ladder of backward differences.

    Args:
        steps: anchors, oldest first.
        factors: one per ladder level, the first for D_0; levels without enough anchors are left
            out.

    Returns:
        Float64 weights of the features at `steps`.
    """
    num = len(steps)
    ladder: list[Tensor] = []  # rows over the anchors: ladder[i] is D_i at the newest anchor seen
    for k in range(num):
        row = torch.zeros(num, dtype=torch.float64)
        row[k] = 1.0
        rows = [row]
        for i in range(1, min(len(factors), k + 1)):
            rows.append((rows[i - 1] - ladder[i - 1]) / (steps[k] - steps[k - 1]))
        ladder = rows
    return torch.stack([f * row for f, row in zip(factors, ladder, strict=False)]).sum(0)
