"""The damped linear family, and the weights of a move along the last slopes.

Shapes: K history length.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Step


class Damped(LinearPredictor):
    """F_hat = F_0 + rho j / g_1 (F_0 - F_1): a part of the last slope.

    One number covers published rules: rho = 0 is `Reuse`, 1/3 `BDF2`, sigma^2 `ScaledTaylor(1)`,
    2 sigma^2 `HiCache(1)`, 1 `Taylor(1)`. Only the last gap enters. A ramp is continued at rho
    times its slope. With one anchor it is reuse.

    Args:
        rho: part of the slope, finite and >= 0.

    Raises:
        ValueError: rho is out of range.
    """

    window = 2

    def __init__(self, rho: float = 0.5) -> None:
        super().__init__()
        if not (math.isfinite(rho) and rho >= 0):
            raise ValueError(f"rho is {rho}, expected a finite number >= 0.")
        self.rho = rho

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """(1 + rho r, -rho r) with r = j / g_1."""
        horizon = float(step.index - history.steps[-1])
        return slope_weights(history.steps, self.rho * horizon)


def slope_weights(
    steps: Sequence[int], newest: float, previous: float = 0.0
) -> Float[Tensor, " K"]:
    """Weights of F_0 + newest (F_0 - F_1) / g_1 + previous (F_1 - F_2) / g_2.

    Args:
        steps: anchors, oldest first; the slope of a missing anchor is left out.
        newest: steps moved along the newest slope.
        previous: steps moved along the one before it.
    """
    weights = torch.zeros(len(steps), dtype=torch.float64)
    weights[-1] = 1.0
    for back, move in enumerate((newest, previous)[: len(steps) - 1], start=1):
        share = move / (steps[-back] - steps[-back - 1])
        weights[-back] += share
        weights[-back - 1] -= share
    return weights
