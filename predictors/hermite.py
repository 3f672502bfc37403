"""HiCache: TaylorSeer's ladder under contracted physicists' Hermite polynomials."""

from jaxtyping import Float
from torch import Tensor

from .base import History, LinearPredictor, Step
from .polynomial import check_order, ladder_weights


class HiCache(LinearPredictor):
    """F_hat = F_0 + sum_{i>=1} H~_i(j) / i! D_i, H~_n(x) = sigma^n H_n(sigma x).

    arXiv 2508.16984, eq. 11. j is the horizon in sampler steps and D the ladder of `Taylor`. At
    contraction 1/sqrt(2) the first order is Taylor's; at the published 0.5 it is half of it: a
    damped extrapolation.

    Args:
        order: highest Hermite order, 1 to 4.
        contraction: the paper's sigma, in (0, 1].

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, order: int = 2, contraction: float = 0.5) -> None:
        super().__init__()
        check_order(order)
        if not 0 < contraction <= 1:
            raise ValueError(f"contraction is {contraction}, expected a number in (0, 1].")
        self.order = order
        self.contraction = contraction
        self.window = order + 1

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Hermite factors folded onto the features."""
        horizon = float(step.index - history.steps[-1])
        hermite = [1.0, 2 * self.contraction * horizon]  # H_{n+1}(y) = 2 y H_n(y) - 2 n H_{n-1}(y)
        for n in range(1, self.order):
            hermite.append(2 * self.contraction * horizon * hermite[n] - 2 * n * hermite[n - 1])
        factors = [1.0]
        scale = 1.0
        for i in range(1, self.order + 1):
            scale *= self.contraction / i
            factors.append(scale * hermite[i])
        return ladder_weights(history.steps, factors)
