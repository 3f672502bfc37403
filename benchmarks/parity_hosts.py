"""The two tiny hosts of the parity table, and how they are run. Random weights, a CPU, seconds."""

from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor, nn

from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline

NUM_STEPS = 20


def flux() -> FluxPipeline:
    """FLUX with two double-stream and three single-stream blocks of width 16."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler, None, None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit() -> PixelDiTPipeline:
    """A class-conditional DiT with three blocks of width 16."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=16,
        in_channels=1,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=3,
        norm_num_groups=1,
    ).eval()
    pipe = PixelDiTPipeline(transformer, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, num_steps: int = NUM_STEPS, **changes: Any) -> Tensor:
    """The final latents of one seeded call."""
    seeded = torch.Generator().manual_seed(0)
    shared = {"num_inference_steps": num_steps, "generator": seeded, "output_type": "latent"}
    if isinstance(pipe, PixelDiTPipeline):
        return pipe(**{"class_labels": [0, 2], "guidance_scale": 3.0, **shared, **changes}).images
    prompt = torch.Generator().manual_seed(1)
    names = ["prompt_embeds", "negative_prompt_embeds"]
    embeds: dict[str, Any] = {name: torch.randn(2, 3, 12, generator=prompt) for name in names}
    for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
        embeds[name] = torch.randn(2, 12, generator=prompt)
    return pipe(**{**embeds, "height": 64, "width": 64, **shared, **changes}).images


def give_context(transformer: nn.Module) -> None:
    """Name a cache context for every call, as the FLUX pipeline does for itself.

    diffusers' hooks refuse to run without one, and a DiT pipeline names none.
    """
    own = transformer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        _set_cache_context(transformer, CacheContext("cond"))
        try:
            return own(*args, **kwargs)
        finally:
            _set_cache_context(transformer, None)

    transformer.forward = forward


def has_hooks(module: nn.Module) -> bool:
    """Whether a diffusers hook wraps the module's forward."""
    return hasattr(module, "_diffusers_hook") and bool(module._diffusers_hook.hooks)
