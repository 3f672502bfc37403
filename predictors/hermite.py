"""HiCache: TaylorSeer's ladder under contracted polynomials, Hermite's or plain powers."""

from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Step
from foreseer.predictors.polynomial import check_clock, check_order, clock_positions, ladder_weights


class HiCache(LinearPredictor):
    """F_hat = F_0 + sum_{i>=1} H~_i(j) / i! D_i, H~_n(x) = sigma^n H_n(sigma x).

    arXiv 2508.16984, eq. 11. j is the horizon, positive along the run, and D the ladder of
    `Taylor`. At contraction 1/sqrt(2) the first order is Taylor's; at the published 0.5 it is half
    of it: a damped extrapolation. H~_2 has a constant term, so the weights depend on the unit of
    the clock, which has to be one step.

    Args:
        order: highest Hermite order, 1 to 4.
        contraction: the paper's sigma, in (0, 1].
        clock: `step` is the published one; `sigma` measures in flow time, in units of its mean step
            1 / num_steps (see `clock_positions`).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, order: int = 2, contraction: float = 0.5, clock: str = "step") -> None:
        super().__init__()
        check_order(order)
        check_contraction(contraction)
        check_clock(clock)
        self.order = order
        self.contraction = contraction
        self.clock = clock
        self.window = order + 1

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Hermite factors folded onto the features."""
        nodes, at = clock_positions(history, step, self.clock)
        horizon = at - nodes[-1]
        hermite = [1.0, 2 * self.contraction * horizon]  # H_{n+1}(y) = 2 y H_n(y) - 2 n H_{n-1}(y)
        for n in range(1, self.order):
            hermite.append(2 * self.contraction * horizon * hermite[n] - 2 * n * hermite[n - 1])
        factors = [1.0]
        scale = 1.0
        for i in range(1, self.order + 1):
            scale *= self.contraction / i
            factors.append(scale * hermite[i])
        return ladder_weights(nodes, factors)


class ScaledTaylor(LinearPredictor):
    """F_hat = sum_i sigma^(2 i) j^i / i! D_i, HiCache's ablation "scaled Taylor".

    arXiv 2508.16984. The same contraction on the ladder of `Taylor`, without Hermite's polynomials:
    order 1 is damped by sigma^2, half of what `HiCache` keeps. At contraction 1 it is `Taylor`.

    Args:
        order: highest difference used, 1 to 4.
        contraction: the paper's sigma, in (0, 1].

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, order: int = 2, contraction: float = 0.5) -> None:
        super().__init__()
        check_order(order)
        check_contraction(contraction)
        self.order = order
        self.contraction = contraction
        self.window = order + 1

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Contracted powers folded onto the features."""
        nodes, at = clock_positions(history, step, "step")
        horizon = self.contraction**2 * (at - nodes[-1])
        factors = [1.0]
        for i in range(1, self.order + 1):
            factors.append(factors[-1] * horizon / i)
        return ladder_weights(nodes, factors)


def check_contraction(contraction: float) -> None:
    """Raise unless 0 < contraction <= 1."""
    if not 0 < contraction <= 1:
        raise ValueError(f"contraction is {contraction}, expected a number in (0, 1].")
