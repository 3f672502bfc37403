"""LESA: a gate over time times a filter over the last features, one expert per noise stage.

Shapes: K taps, S sampling steps, B batch.
Source: LESA, arXiv 2602.20497: h_hat = h_-1 + alpha_k(t) (w_k . [h_-K ... h_-1] + b_k) with
alpha_k = KAN_k(t - t_0, ..., t - t_S). The start at reuse, the padding and the folding onto anchors
are ours.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .base import History, Predictor, Step, combine
from .gates import build_gate


class LesaPredictor(Predictor):
    """F_hat = h_-1 + alpha_k(sigma) (w_k . [h_-K ... h_-1] + b_k), the expert k picked by sigma.

    With `feedback` the K features are those of the K steps before, forecasts among them, as
    published: forecasts are combinations of anchors, so the recursion is folded onto the anchors
    in the history and nothing else is kept. Without it they are the newest K anchors. Where there
    are fewer than K, the oldest stands for the missing ones. Starts (w = 0, b = 0) as plain reuse.

    Args:
        sigmas: flow time of every step of the run.
        num_branches: guidance branches; each has its own experts.
        boundaries: falling flow times between the stages; empty for one stage. Stage 0 is above
            the first.
        taps: K of every stage, one more than boundaries.
        gate: `kan`; `mlp` for a perceptron with as many weights; `table` for a free number per
            step, which every trained gate reduces to.
        hidden: widths of the gate's hidden layers (of the KAN; the perceptron's are scaled up).
        grid_size: intervals of the spline grid.
        grid_range: the spline grid covers -grid_range to grid_range.
        feedback: whether forecasts enter the history.
        bias: whether there is a b_k.

    Raises:
        ValueError: an argument is out of range.
    """

    learned = True

    def __init__(
        self,
        sigmas: Sequence[float],
        num_branches: int = 1,
        boundaries: Sequence[float] = (0.9, 0.5),
        taps: Sequence[int] = (4, 8, 8),
        gate: str = "kan",
        hidden: Sequence[int] = (256, 256),
        grid_size: int = 5,
        grid_range: float = 3.0,
        feedback: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.sigmas = tuple(float(sigma) for sigma in sigmas)
        self.num_branches = num_branches
        self.boundaries = tuple(float(sigma) for sigma in boundaries)
        self.taps = tuple(taps)
        self.gate = gate
        self.hidden = tuple(hidden)
        self.grid_size = grid_size
        self.grid_range = grid_range
        self.feedback = feedback
        self.bias = bias
        self.window = None if feedback else max(taps)
        stages = len(self.taps)
        self.weight: Float[Tensor, "branches stages K"]
        self.weight = nn.Parameter(torch.zeros(num_branches, stages, max(taps)))  # newest last
        self.offset: Float[Tensor, "branches stages"] | None
        self.offset = nn.Parameter(torch.zeros(num_branches, stages)) if bias else None

    def stage(self, sigma: float) -> int:
        """Number of the expert in charge at a flow time."""
        raise NotImplementedError

    def alpha(self) -> Float[Tensor, "branches S"]:
        """The gate of every step, differentiable."""
        raise NotImplementedError

    def correct(
        self, queue: Sequence[Float[Tensor, " B *shape"]], step: Step
    ) -> Float[Tensor, " B *shape"]:
        """The forecast from an explicit queue of features, differentiable in the parameters.

        What training calls: the queue holds recorded, computed or detached forecast features.

        Args:
            queue: features of the steps before (with `feedback`) or of the anchors so far, oldest
                first; only the newest K count, the oldest is repeated where there are fewer.
            step: the step to forecast.
        """
        raise NotImplementedError

    def affine(
        self, history: History, step: Step
    ) -> tuple[Float[Tensor, "K branches"], Float[Tensor, " branches"]]:
        """Weights of the features in `history` and the constant added: the folded form."""
        raise NotImplementedError

    def forward(self, history: History, step: Step) -> Float[Tensor, " B *shape"]:
        """The forecast from the anchors in `history`."""
        raise NotImplementedError
