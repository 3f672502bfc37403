"""A predictor of your own in one file, compared with two of ours at the same evaluations.

    python examples/own_predictor.py

A forecast that is a weighted sum of earlier features needs nothing but its weights.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.integration.forecasting import forecasting
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.predictors.base import History, LinearPredictor, Step
from foreseer.predictors.rules import Reuse, Taylor


class HalfTaylor(LinearPredictor):
    """Half of the way from the newest feature to the line through the last two, in the step."""

    window = 2

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """One weight per feature in the history, oldest first."""
        if len(history) < 2:
            return torch.ones(1)
        before, newest = history.steps[-2:]
        slope = 0.5 * (step.index - newest) / (newest - before)
        return torch.tensor([-slope, 1 + slope])


pipe = load_pipeline("zoo:fashion_dit")
settings = {"num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "pt"}
anchors = [0, 2, 4, 7, 10, 14]


def draw() -> torch.Tensor:
    return pipe([1, 8], generator=torch.Generator().manual_seed(0), **settings).images


full = draw()
for predictor in (Reuse(), HalfTaylor(), Taylor(1)):
    with forecasting(pipe, predictor, anchors, tap="hidden"):
        psnr = -10 * (draw() - full).square().flatten(1).mean(1).log10()
    print(f"{type(predictor).__name__:<11}{psnr.mean():.1f} dB at {len(anchors)} evaluations")
