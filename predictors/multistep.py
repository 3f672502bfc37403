"""The solvers HyCa picks from, as rules over the last two or three anchors of any spacing.

Source: HyCa, arXiv 2510.04188, gives them at unit spacing; the forms for other horizons and gaps
are reconstructions that agree there. D_0 = (F_0 - F_1) / g_1 and D_1 = (F_1 - F_2) / g_2 stand for
the derivatives at the two newest anchors, j is the horizon and r = j / g_1. Two anchors give
Taylor's first order, one gives reuse. Shapes: K history length.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Step
from foreseer.predictors.damped import Damped, slope_weights


class RungeKutta2(LinearPredictor):
    """F_hat = F_0 + j (F_0 - F_2) / (g_1 + g_2): one slope over two gaps.

    (1 + r/2, 0, -r/2) at equal gaps. Unequal gaps: the slope stays the mean over both, weighted by
    their lengths. Continues a ramp on any gaps.
    """

    window = 3

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Weights of the mean slope."""
        steps = history.steps
        horizon = float(step.index - steps[-1])
        if len(steps) < 3:
            return slope_weights(steps, horizon)
        share = horizon / (steps[-1] - steps[-3])
        return torch.tensor([-share, 0.0, 1 + share], dtype=torch.float64)


class AdamsBashforth2(LinearPredictor):
    """F_hat = F_0 + j ((1 + r/2) D_0 - r/2 D_1), the variable-step Adams-Bashforth-2 formula.

    (1 + r + r^2/2, -(r + r^2), r^2/2) at equal gaps. Unequal gaps: D_0 and D_1 count as lying g_1
    apart and D_1 is divided by its own gap. This is `Taylor(2)` on any gaps. Continues a ramp on
    any gaps.
    """

    window = 3

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Weights of the two slopes."""
        steps = history.steps
        horizon = float(step.index - steps[-1])
        if len(steps) < 3:
            return slope_weights(steps, horizon)
        half = horizon / (steps[-1] - steps[-2]) / 2
        return slope_weights(steps, horizon * (1 + half), -horizon * half)


class BDF2(Damped):
    """F_hat = F_0 + r/3 (F_0 - F_1): backward differentiation without its derivative.

    (4/3, -1/3) at unit spacing, drawn linearly to other horizons; `Damped(1/3)`. Unequal gaps: only
    the last gap enters. A ramp is continued at a third of its slope.
    """

    def __init__(self) -> None:
        super().__init__(1 / 3)


class AdamsMoulton(LinearPredictor):
    """F_hat = F_0 + g_1 (w_r f + w_0 D_0 + w_1 D_1), f the mean slope of `AdamsBashforth2`.

    The w integrate the parabola through slopes at r, 0 and -1 over [0, r]: w_r = r (3 + 2r) /
    (6 (1 + r)), w_0 = r (3 + r) / 6, w_1 = -r^3 / (6 (1 + r)). (55/24, -19/12, 7/24) at unit
    spacing. Unequal gaps: r counts in the last gap and D_1 is divided by its own gap. Continues a
    ramp on any gaps.
    """

    window = 3

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Weights of the two slopes."""
        steps = history.steps
        horizon = float(step.index - steps[-1])
        if len(steps) < 3:
            return slope_weights(steps, horizon)
        gap = steps[-1] - steps[-2]
        r = horizon / gap
        end = r * (3 + 2 * r) / (6 * (1 + r))
        newest = end * (1 + r / 2) + r * (3 + r) / 6
        previous = -end * r / 2 - r**3 / (6 * (1 + r))
        return slope_weights(steps, gap * newest, gap * previous)
