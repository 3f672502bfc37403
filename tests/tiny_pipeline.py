"""A class-to-image pipeline of two blocks with random weights, saved to a folder."""

from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

from foreseer.integration.pixel_pipeline import PixelDiTPipeline


def save_tiny_pipeline(folder: Path) -> str:
    """Save it and give the folder back; it has three classes and draws 8 x 8 pixels."""
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
    PixelDiTPipeline(transformer, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    return str(folder)
