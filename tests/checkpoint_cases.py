"""Small predictors and specs that several test files save."""

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

from foreseer.checkpoints.spec import PredictorSpec
from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline
from foreseer.predictors.linear import L2P


def random_predictor(
    num_steps: int = 8,
    anchors: tuple[int, ...] = (0, 1, 3, 6),
    num_branches: int = 2,
    seed: int = 0,
) -> L2P:
    """L2P with random rows on its anchors."""
    predictor = L2P(num_steps, anchors, num_branches)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(predictor.weight.shape, generator=generator, dtype=torch.float64).tril(-1)
    mask = torch.zeros(num_steps, dtype=torch.float64)
    mask[list(anchors)] = 1
    predictor.weight.copy_(rows * mask)
    return predictor


def spec_for(predictor: L2P, **changes: object) -> PredictorSpec:
    """A spec that fits a predictor."""
    values: dict = {
        "tap": "output",
        "anchors": predictor.anchors,
        "sigmas": tuple(1.0 - step / predictor.num_steps for step in range(predictor.num_steps)),
        "host": {"class": "TinyTransformer", "parameters": 12, "weights_sha256": "ab"},
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "num_branches": predictor.num_branches,
        "guidance_scale": 3.0,
        "dtype": "float32",
        "recording_digest": "0123",
        "num_trajectories": 7,
        "metrics": {"psnr_db": 31.5, "psnr_db_start": 30.25},
    }
    return PredictorSpec(**{**values, **changes})


def tiny_pipe() -> PixelDiTPipeline:
    """A pipeline around a DiT with random weights."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=64,
        in_channels=1,
        num_layers=2,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=3,
    ).eval()
    pipe = PixelDiTPipeline(transformer, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
