"""Forecast most network evaluations of the bundled model, and see what that does to the images.

python examples/forecast.py
"""

import torch

from foreseer.checkpoints.format import load_predictor
from foreseer.integration.forecasting import forecasting
from foreseer.integration.pipelines.load import load_pipeline

pipe = load_pipeline("zoo:fashion_dit")
labels = [0, 5, 9]


def draw() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(labels, guidance_scale=3.0, generator=generator, output_type="pt").images


full = draw()
for budget in (11, 8, 6):
    with forecasting(pipe, load_predictor(f"zoo:fashion_dit_l2p_{budget}")) as run:
        images = draw()
    psnr = -10 * (images - full).square().flatten(1).mean(1).log10()
    report = run.report()
    print(f"{len(report.anchors):>2} of {report.num_steps} evaluations: {psnr.mean():.1f} dB PSNR")
