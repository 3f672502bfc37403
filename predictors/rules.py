"""The fixed rules: weighted sums of the newest anchors whose weights depend on the clock alone.

F_0 is the newest anchor, F_1 the one before, g_1 the gap between them, j the horizon, r = j / g_1.
`Ladder` rules weigh TaylorSeer's backward differences, `Slopes` rules move along the last slopes
D_0 = (F_0 - F_1) / g_1 and D_1 = (F_1 - F_2) / g_2. `Spectrum`, `FocaRecursive` and `MeanCache`
weigh every anchor of the run. With one anchor all repeat it.
Shapes: K history length.
"""

import math
from collections.abc import Sequence
from operator import mul

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Step
from foreseer.predictors.ladder import (
    Ladder,
    Slopes,
    checked_contraction,
    clock_positions,
    lagrange_weights,
    mean_weights,
    powers,
    slope_weights,
    with_end,
)


class Reuse(LinearPredictor):
    """Repeat the newest anchor: c = (1) (FORA, arXiv 2407.01425)."""

    window = 1

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """One weight of 1."""
        return torch.ones(1, dtype=torch.float64)


class Taylor(Ladder):
    """TaylorSeer exactly as its released code computes it: f_i = j^i / i!.

    arXiv 2503.06923, eq. 7. For order >= 2 this is not polynomial interpolation: see `Newton` for
    that. The order grows with the anchors there are, as in the TaylorSeer hook of diffusers, whose
    `max_order` is `order`.

    Args:
        order: highest difference used, 1 to 4.
        warmup: the release's `first_enhance` E, >= 1. Its ladder forms differences only at anchors
            s > E - 2, so the order counts those anchors and not all. None lets every anchor count;
            1 and 2 come to the same.
        clock: `step` as the release, or `sigma`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, order: int = 1, warmup: int | None = None, clock: str = "step") -> None:
        super().__init__(order, clock)
        if warmup is not None and warmup < 1:
            raise ValueError(f"warmup is {warmup}, expected None or at least 1, the first anchor.")
        self.warmup = warmup

    def factors(self, horizon: float) -> list[float]:
        """j^i / i!."""
        return powers(horizon, self.order)

    def levels(self, steps: Sequence[int]) -> int:
        """Differences the ladder holds, see the base class."""
        formed = super().levels(steps)
        if self.warmup is None:
            return formed
        return min(formed, sum(step > self.warmup - 2 for step in steps))


class ScaledTaylor(Ladder):
    """f_i = sigma^(2 i) j^i / i!, HiCache's ablation "scaled Taylor" (arXiv 2508.16984).

    Order 1 is damped by sigma^2, half of what `HiCache` keeps. At contraction 1 it is `Taylor`.

    Args:
        order: highest difference used, 1 to 4.
        contraction: the paper's sigma, in (0, 1].

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, order: int = 2, contraction: float = 0.5) -> None:
        super().__init__(order, "step")
        self.contraction = checked_contraction(contraction)

    def factors(self, horizon: float) -> list[float]:
        """(sigma^2 j)^i / i!."""
        return powers(self.contraction**2 * horizon, self.order)


class HiCache(Ladder):
    """f_i = H~_i(j) / i!, H~_n(x) = sigma^n H_n(sigma x), f_0 = 1 (arXiv 2508.16984, eq. 11).

    At contraction 1/sqrt(2) the first order is Taylor's; at the published 0.5 it is half of it: a
    damped extrapolation. H~_2 has a constant term, so the weights depend on the unit of the clock,
    which has to be one step.

    Args:
        order: highest Hermite order, 1 to 4.
        contraction: the paper's sigma, in (0, 1].
        clock: `step` is the published one, or `sigma`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, order: int = 2, contraction: float = 0.5, clock: str = "step") -> None:
        super().__init__(order, clock)
        self.contraction = checked_contraction(contraction)

    def factors(self, horizon: float) -> list[float]:
        """sigma^i H_i(sigma j) / i! by H_{n+1}(y) = 2 y H_n(y) - 2 n H_{n-1}(y)."""
        hermite = [1.0, 2 * self.contraction * horizon]
        for n in range(1, self.order):
            hermite.append(2 * self.contraction * horizon * hermite[n] - 2 * n * hermite[n - 1])
        scales = powers(self.contraction, self.order)
        return [scale * value for scale, value in zip(scales, hermite, strict=True)]


class Newton(Ladder):
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
        super().__init__(order, clock)

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Lagrange's weights."""
        nodes, at = clock_positions(history, step, self.clock)
        return lagrange_weights(torch.tensor(nodes, dtype=torch.float64), at)


class Damped(Slopes):
    """F_hat = F_0 + rho j D_0: a part of the last slope.

    One number covers published rules: rho = 0 is `Reuse`, 1/3 `BDF2`, sigma^2 `ScaledTaylor(1)`,
    2 sigma^2 `HiCache(1)`, 1 `Taylor(1)`. A ramp is continued at rho times its slope.

    Args:
        rho: part of the slope, finite and >= 0.

    Raises:
        ValueError: rho is out of range.
    """

    def __init__(self, rho: float = 0.5) -> None:
        super().__init__()
        if not (math.isfinite(rho) and rho >= 0):
            raise ValueError(f"rho is {rho}, expected a finite number >= 0.")
        self.rho = rho

    def moves(self, horizon: float, gap: float) -> tuple[float, ...]:
        """Rho j."""
        return (self.rho * horizon,)


class BDF2(Damped):
    """F_hat = F_0 + r/3 (F_0 - F_1) = `Damped(1/3)`: HyCa's, without its derivative.

    (4/3, -1/3) at unit spacing (arXiv 2510.04188), drawn linearly to other horizons.
    """

    def __init__(self) -> None:
        super().__init__(1 / 3)


class AdamsBashforth2(Taylor):
    """F_hat = F_0 + j ((1 + r/2) D_0 - r/2 D_1) = `Taylor(2)` on any gaps: HyCa's solver.

    Variable-step Adams-Bashforth-2 where D_0 and D_1 count as lying g_1 apart; (1 + r + r^2/2,
    -(r + r^2), r^2/2) at equal gaps.
    """

    def __init__(self) -> None:
        super().__init__(2)


class RungeKutta2(LinearPredictor):
    """F_hat = F_0 + j (F_0 - F_2) / (g_1 + g_2): HyCa's, one slope over two gaps.

    (1 + r/2, 0, -r/2) at equal gaps (arXiv 2510.04188); the slope of unequal ones is the mean over
    both, weighted by their lengths.
    """

    window = 3

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Weights of the mean slope; of two anchors Taylor's first order."""
        steps = history.steps
        horizon = float(step.index - steps[-1])
        if len(steps) < 3:
            return slope_weights(steps, horizon)
        share = horizon / (steps[-1] - steps[-3])
        return torch.tensor([-share, 0.0, 1 + share], dtype=torch.float64)


class AdamsMoulton(Slopes):
    """F_hat = F_0 + g_1 (w_r f + w_0 D_0 + w_1 D_1), f the mean slope of `AdamsBashforth2`: HyCa's.

    The w integrate the parabola through slopes at r, 0 and -1 over [0, r]: w_r = r (3 + 2r) /
    (6 (1 + r)), w_0 = r (3 + r) / 6, w_1 = -r^3 / (6 (1 + r)). (55/24, -19/12, 7/24) at unit
    spacing, as published (arXiv 2510.04188). D_1 is divided by its own gap.
    """

    window = 3

    def moves(self, horizon: float, gap: float) -> tuple[float, ...]:
        """g_1 (w_r (1 + r/2) + w_0) and g_1 (w_1 - w_r r/2)."""
        r = horizon / gap
        end = r * (3 + 2 * r) / (6 * (1 + r))
        newest = end * (1 + r / 2) + r * (3 + r) / 6
        return gap * newest, gap * (-end * r / 2 - r**3 / (6 * (1 + r)))


class Foca2Point(Slopes):
    """F_hat = F_0 + (1/6 + 5r/6) (F_0 - F_1): FoCa (arXiv 2508.16211) from anchors alone.

    A reconstruction, as no code was published; no parity with its numbers is claimed. BDF2's
    P = 4/3 F_0 - 1/3 F_1 + 2j/3 D_0 is corrected by Heun to F_0 + j/2 (D_0 + (P - F_0) / j). At
    r = 1 it is Taylor's first order; elsewhere it misses a ramp by (1 - r) / 6 of the last gap.
    """

    def moves(self, horizon: float, gap: float) -> tuple[float, ...]:
        """g_1 / 6 + 5j / 6."""
        return (gap / 6 + 5 * horizon / 6,)


class FocaRecursive(LinearPredictor):
    """F_hat = F_0 + j D_0 + (d_0 - D_0) (1 - 2^-j): FoCa stepped through its own forecasts.

    Also a reconstruction. After an anchor the step d_{i+1} = (D_0 + d_i) / 2 is added i times,
    with d_0 = F_0 - (feature used at the step before the anchor). That was itself forecast from
    older anchors, so the weights run over all anchors so far and every feature has to be kept; the
    last forecast's error comes back with the other sign from segment to segment and fades slowly.
    """

    window = None

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Weights of the recursion, unrolled over the anchors."""
        steps = history.steps
        unit = torch.eye(len(steps), dtype=torch.float64)
        slope, first = torch.zeros_like(unit[0]), torch.zeros_like(unit[0])  # D_0 and d_0
        for k in range(1, len(steps)):
            gap = steps[k] - steps[k - 1]
            used = unit[k - 1] + (gap - 1) * slope + (1 - 0.5 ** (gap - 1)) * (first - slope)
            slope, first = (unit[k] - unit[k - 1]) / gap, unit[k] - used
        j = step.index - steps[-1]
        return unit[-1] + j * slope + (1 - 0.5**j) * (first - slope)


class MeanCache(LinearPredictor):
    """F_hat_i = F_{i-1} - J (s_{i+1} - s_i), J = (F_{i-K} - u) / (s_i - s_{i-K}): a mean velocity.

    u = sum_{j=i-K}^{i-1} (s_{j+1} - s_j) F_j / (s_i - s_{i-K}) over the last K *steps*, F_j what
    the sampler was given there, an anchor or a forecast, and s flow times: what Euler moved the
    sample by, over the flow time that took (arXiv 2601.19961; its code's `jvp1_sK`). On an even
    grid (-1/4, 5/4) at K = 2, oldest first; K = 1 is `Reuse`. Unrolled over its own forecasts the
    weights run over all anchors so far. The release forecasts the velocity after guidance, with a K
    of its own for every gap of its lists.

    Args:
        length: the release's K, steps of the mean, >= 2; fewer while the run has no more.

    Raises:
        ValueError: the length is out of range.
    """

    window = None

    def __init__(self, length: int = 3) -> None:
        super().__init__()
        if length < 2:
            raise ValueError(f"length is {length}, expected at least 2 steps; 1 is Reuse.")
        self.length = length

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Weights of the recursion, unrolled over the anchors.

        Raises:
            ValueError: the step does not say the run's flow times, or they repeat.
        """
        if len(step.sigmas) != step.num_steps:
            raise ValueError(
                f"the step holds {len(step.sigmas)} flow times of a run of {step.num_steps} steps; "
                "MeanCache averages over steps between anchors: give Step all of them as sigmas."
            )
        if len(history) == 1:  # rounding would come in
            return torch.ones(1, dtype=torch.float64)
        grid, unit = with_end(step.sigmas), torch.eye(len(history), dtype=torch.float64).tolist()
        anchors = dict(zip(history.steps, unit, strict=True))
        rows: list[list[float]] = []  # of the steps from the first anchor on
        for index in range(history.steps[0], step.index + 1):
            row = anchors.get(index)
            if row is None:
                recent = rows[-self.length :]
                own = mean_weights(grid[index - len(recent) : index + 2])
                row = [sum(map(mul, own, column)) for column in zip(*recent, strict=True)]
            rows.append(row)
        return torch.tensor(rows[-1], dtype=torch.float64)


class Spectrum(LinearPredictor):
    """F_hat = w phi(t)^T (Phi^T Phi + lambda I)^-1 Phi^T F + (1 - w) (F_0 + j D_0): a global fit.

    phi = (T_0, ..., T_M), Chebyshev's polynomials at tau = 2 t / S - 1 of step t of S; Phi has a
    row for every anchor so far (arXiv 2603.01623, as its released code computes it, but for the
    code's rounding to bfloat16). The ridge shrinks: the fit's weights sum to less than 1.

    Args:
        blend: the release's w, the part of the fit, in [0, 1]; its paper has 1, its recommended
            command 0.5.
        degree: M, >= 1.
        ridge: lambda, > 0.

    Raises:
        ValueError: an argument is out of range.
    """

    window = None

    def __init__(self, blend: float = 0.5, degree: int = 4, ridge: float = 0.1) -> None:
        super().__init__()
        if not (0 <= blend <= 1 and degree >= 1 and math.isfinite(ridge) and ridge > 0):
            raise ValueError(
                f"found blend {blend}, degree {degree} and ridge {ridge}; expected a blend in "
                "[0, 1], a degree >= 1 and a finite ridge > 0."
            )
        self.blend = blend
        self.degree = degree
        self.ridge = ridge

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """The fit's weights, blended with Taylor's first order."""
        steps = history.steps
        if len(steps) == 1:  # the release computes five steps before it forecasts
            return torch.ones(1, dtype=torch.float64)
        times = torch.tensor([*steps, step.index], dtype=torch.float64)
        angles = (2 * times / step.num_steps - 1).acos()
        basis = (angles[:, None] * torch.arange(self.degree + 1)).cos()
        nodes, at = basis[:-1], basis[-1]
        ridge = self.ridge * torch.eye(self.degree + 1, dtype=torch.float64)
        fit = nodes @ torch.linalg.solve(nodes.T @ nodes + ridge, at)
        line = slope_weights(steps, float(step.index - steps[-1]))
        return self.blend * fit + (1 - self.blend) * line


RULES: dict[str, LinearPredictor] = {
    "reuse": Reuse(),
    "taylor_1": Taylor(1),
    "taylor_2": Taylor(2),
    "taylor_3": Taylor(3),
    "newton_1": Newton(1),
    "newton_2": Newton(2),
    "newton_3": Newton(3),
    "hicache_2": HiCache(2),
    "hicache_2_s71": HiCache(2, 0.71),
    "scaled_taylor_2": ScaledTaylor(2),
    "rk2": RungeKutta2(),
    "bdf2": BDF2(),
    "adams_moulton": AdamsMoulton(),
    "foca_2pt": Foca2Point(),
    "foca_recursive": FocaRecursive(),
    "damped_half": Damped(0.5),
    "meancache_3": MeanCache(3),
    "spectrum": Spectrum(),
}
"""The formulas every learned predictor is measured against, by the name used in tables."""

SHOWN = ("reuse", "taylor_1")
"""The formulas that every card, verdict and refit names, whatever else did best."""

RUN = (*SHOWN, "taylor_2")
"""Those that are run and drawn where running all would take too long."""

TABLED = (*RUN, "taylor_3", "newton_1", "newton_2", "hicache_2")
"""Those that have a line of their own in short tables."""
