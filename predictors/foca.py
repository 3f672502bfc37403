"""FoCa: two reconstructions of a forecast-then-calibrate rule whose code was never published.

Source: FoCa, arXiv 2508.16211: a BDF2 predictor and a Heun corrector on the feature trajectory. The
paper leaves open which features stand for past ones and how derivatives are scaled; these are two
readings. Neither claims to reproduce published numbers. Shapes: K history length.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Step
from foreseer.predictors.damped import slope_weights


class Foca2Point(LinearPredictor):
    """F_hat = F_0 + (1/6 + 5r/6) (F_0 - F_1), r = j / g_1: FoCa from anchors alone.

    A reconstruction, no parity with published numbers is claimed. The predictor P = 4/3 F_0 -
    1/3 F_1 + 2j/3 D with D = (F_0 - F_1) / g_1 is corrected to F_0 + j/2 (D + (P - F_0) / j).
    At r = 1 it is Taylor's first order and continues a ramp; elsewhere it misses it by
    (1 - r) / 6 of the last difference, also as r goes to 0. Only the last gap enters. With one
    anchor it is reuse.
    """

    window = 2

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """(7/6 + 5r/6, -(1/6 + 5r/6))."""
        steps = history.steps
        if len(steps) < 2:
            return slope_weights(steps, 0.0)
        gap = steps[-1] - steps[-2]
        return slope_weights(steps, gap / 6 + 5 * (step.index - steps[-1]) / 6)


class FocaRecursive(LinearPredictor):
    """FoCa stepped through its own forecasts, one sampler step at a time.

    A reconstruction, no parity with published numbers is claimed. After an anchor the step
    d_{i+1} = (D + d_i) / 2 is added i times, with D = (F_0 - F_1) / g_1 and d_0 = F_0 - (feature
    used at the step before the anchor), so

        F_hat = F_0 + j D + (d_0 - D) (1 - 2^-j).

    The feature used there was itself forecast from older anchors, so the weights run over all
    anchors so far and every feature has to be kept. d_0 holds the last forecast's error; errors
    come back with the other sign from segment to segment and fade slowly. Up to the second anchor
    it is reuse. A ramp is continued if the first two anchors are adjacent.
    """

    window = None

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Weights of the recursion, unrolled over the anchors."""
        steps = history.steps
        unit = torch.eye(len(steps), dtype=torch.float64)
        slope, first = torch.zeros_like(unit[0]), torch.zeros_like(unit[0])  # D and d_0
        for k in range(1, len(steps)):
            gap = steps[k] - steps[k - 1]
            used = _unrolled(unit[k - 1], slope, first, gap - 1)
            slope, first = (unit[k] - unit[k - 1]) / gap, unit[k] - used
        return _unrolled(unit[-1], slope, first, step.index - steps[-1])


def _unrolled(
    newest: Float[Tensor, " K"], slope: Float[Tensor, " K"], first: Float[Tensor, " K"], j: int
) -> Float[Tensor, " K"]:
    """The recursion `j` steps after an anchor, in closed form."""
    return newest + j * slope + (1 - 0.5**j) * (first - slope)
