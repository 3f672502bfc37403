"""Unedited tokens are led to the source picture, not forecast: the rule of SpotEdit.

Shapes: M rows, N tokens, half of them the picture's and half the source's, D channels.
Convention: x_t = (1 - sigma) x_0 + sigma eps, v = eps - x_0.
Source: SpotEdit, arXiv 2512.22323.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Predictor, Step
from foreseer.predictors.rules import Reuse
from foreseer.predictors.token_groups import REGIONS


class SpotEdit(Predictor):
    """v = (x_t - x_src) / sigma for the tokens of the group `keep`, a formula for all others.

    That velocity ends at the source whatever the state is. The source picture is the second half of
    the network's input, as editing models of FLUX Kontext's kind take it. The release finds the
    tokens itself, by comparing a one-step estimate of x_0 with the source, and does not run the
    network on them at all; here they are those of the call's groups, and anchors compute them.

    Args:
        base: formula of the other tokens; None takes `Reuse`, the release's.
    """

    needs = frozenset({"x_t"})

    def __init__(self, base: LinearPredictor | None = None) -> None:
        super().__init__()
        self.base = Reuse() if base is None else base
        self.window = self.base.window

    @property
    def group_names(self) -> tuple[str, ...]:
        """See the base class."""
        return REGIONS

    def forward(self, history: History, step: Step) -> Float[Tensor, "M N D"]:
        """The forecast on the `output` tap.

        Raises:
            ValueError: the network is not given a source picture beside the sample.
        """
        forecast: Tensor = self.base(history, step)
        x_t, groups = step.x_t, step.groups
        assert groups is not None  # whoever attaches it has asked for them
        if x_t is None or x_t.shape != forecast.shape or x_t.shape[1] % 2:
            found = "no tensor" if x_t is None else f"{tuple(x_t.shape)}"
            raise ValueError(
                f"SpotEdit takes the source picture from the second half of the network's input; "
                f"found the input {found} and an output {tuple(forecast.shape)}. Use it on editing "
                "models whose source has the size of the picture (FLUX Kontext), tap 'output'."
            )
        count = x_t.shape[1] // 2
        led = (x_t[:, :count] - x_t[:, count:]) / step.sigma
        kept = (groups[:, :count] == REGIONS.index("keep"))[..., None]
        picture = torch.where(kept, led.to(forecast.dtype), forecast[:, :count])
        return torch.cat([picture, forecast[:, count:]], 1)
