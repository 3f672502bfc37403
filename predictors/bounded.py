"""A bound on how far a rule may extrapolate its last gap.

Shapes: K history length.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Step


class GapBounded(LinearPredictor):
    """A rule that falls back to its order 0 where it would reach too far beyond its last gap.

    While r = j / g_1 <= max_ratio (horizon over last gap, in steps) the weights are the rule's.
    Above it the rule is given the newest anchor alone, which makes every fixed rule repeat it. All
    orders go at once, because a lower one still holds the term r: after the anchors 0, 1, 2 even
    `Taylor(1)` has the weights (6, -5) at step 7. The originals have no such bound: a bounded rule
    deviates from them, and its forecast jumps back to the anchor at the step where the bound is
    passed.

    Args:
        rule: a fixed rule.
        max_ratio: largest horizon / last gap, > 0.

    Raises:
        ValueError: the ratio is out of range, or the rule is learned.
    """

    def __init__(self, rule: LinearPredictor, max_ratio: float) -> None:
        super().__init__()
        if not (math.isfinite(max_ratio) and max_ratio > 0):
            raise ValueError(f"max_ratio is {max_ratio}, expected a finite number > 0.")
        if rule.learned:
            raise ValueError(
                f"found the learned {type(rule).__name__}, expected a fixed rule; learned weights "
                "belong to their anchors and have no lower order."
            )
        self.rule = rule
        self.max_ratio = max_ratio
        self.window = rule.window
        self.needs = rule.needs

    def coefficients(
        self, history: History, step: Step
    ) -> Float[Tensor, " K"] | Float[Tensor, "K branches"]:
        """The rule's weights, or its weights on the newest anchor and zeros before it."""
        steps = history.steps
        if len(steps) < 2 or step.index - steps[-1] <= self.max_ratio * (steps[-1] - steps[-2]):
            return self.rule.coefficients(history, step)
        newest = History(1, steps[-1:], history.sigmas[-1:], history.features[-1:])
        weights = self.rule.coefficients(newest, step)
        zeros = weights.new_zeros(len(steps) - 1, *weights.shape[1:])
        return torch.cat([zeros, weights])
