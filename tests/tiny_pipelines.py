"""A pipeline small enough to run hundreds of times in a test."""

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline


def tiny_pipeline(num_layers: int = 2) -> PixelDiTPipeline:
    """Random weights, large enough for SSIM's window, three classes."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=32,
        in_channels=1,
        num_layers=num_layers,
        sample_size=16,
        patch_size=4,
        num_embeds_ada_norm=3,
    ).eval()
    pipe = PixelDiTPipeline(transformer, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
