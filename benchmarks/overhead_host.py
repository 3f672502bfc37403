"""The host of `overhead.py`, `flux_70m`: a FLUX transformer of 71.1 M random parameters."""

import copy
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

TEXT_TOKENS, TEXT_CHANNELS, POOLED_CHANNELS = 64, 512, 512
GUIDANCE = 3.5  # the pipeline's default; the host has no guidance embedding, so it does nothing


def flux_70m() -> FluxTransformer2DModel:
    """FLUX with 4 double-stream and 8 single-stream blocks of width 512, 71.1 M parameters."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=TEXT_CHANNELS,
        pooled_projection_dim=POOLED_CHANNELS,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    ).eval()


def pipeline(transformer: FluxTransformer2DModel) -> FluxPipeline:
    """A pipeline of its own class, on a copy of the transformer that shares its weights.

    The class is its own because cache-dit patches the pipeline's class.
    """
    weights = [*transformer.parameters(), *transformer.buffers()]
    copied = copy.deepcopy(transformer, {id(weight): weight for weight in weights})
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler, None, None, None, None, None, copied)
    pipe.__class__ = type("FluxPipeline", (FluxPipeline,), {})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, num_steps: int) -> Tensor:
    """The final latents of one seeded call: 256 image tokens, 64 text tokens, no guidance."""
    prompt = torch.Generator().manual_seed(1)
    return pipe(
        prompt_embeds=torch.randn(1, TEXT_TOKENS, TEXT_CHANNELS, generator=prompt),
        pooled_prompt_embeds=torch.randn(1, POOLED_CHANNELS, generator=prompt),
        height=256,
        width=256,
        num_inference_steps=num_steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
