"""Tiny U-Nets with random weights: a class-conditional one on pixels, and Stable Diffusion's."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tiny_hosts import seeded
from torch import Tensor

from foreseer.integration.pipelines.pixel_pipeline import PixelUNetPipeline

STEPS = 8


def class_pipe() -> PixelUNetPipeline:
    """Three levels on 8 x 8 pixels, three classes."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=2,
        num_class_embeds=4,
    ).eval()
    pipe = PixelUNetPipeline(unet, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **more: Any) -> Tensor:
    """Two samples, guided."""
    asked = {"num_inference_steps": STEPS, "generator": seeded(), "output_type": "latent", **more}
    return pipe([0, 2], **asked).images


def diffusion_pipe() -> StableDiffusionPipeline:
    """Stable Diffusion without its text encoder, on a VAE that divides sides by 8."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=2,
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=4,
    )
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae, None, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe: Any, height: int = 64, width: int = 64, **more: Any) -> Tensor:
    """One sample, guided."""
    embeds = torch.randn(2, 1, 3, 6, generator=seeded(1))
    asked = {"num_inference_steps": STEPS, "generator": seeded(), "output_type": "latent", **more}
    given = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    return pipe(height=height, width=width, **given, **asked).images
