"""Let TeaCache decide during the run at which steps the network runs; any predictor does the rest.

    python examples/adaptive_schedule.py

A larger threshold skips more. The decision is one for the whole batch, as in the original.
"""

import torch

from foreseer.integration.forecasting import forecasting
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.schedules import TeaCache

pipe = load_pipeline("zoo:fashion_dit")
settings = {"num_inference_steps": 30, "guidance_scale": 3.0, "output_type": "pt"}


def draw() -> torch.Tensor:
    return pipe([4], generator=torch.Generator().manual_seed(0), **settings).images


full = draw()
for predictor in (Reuse(), Taylor(1)):  # the original reuses
    for threshold in (0.1, 0.3):
        schedule = TeaCache(threshold)
        with forecasting(pipe, predictor, (0,), tap="hidden", schedule=schedule) as run:
            psnr = float(-10 * (draw() - full).square().mean().log10())
        count = len(run.report().anchors)
        print(f"{type(predictor).__name__:<7}{threshold}: {count} of 30 evaluations, {psnr:.1f} dB")
