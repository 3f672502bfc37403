"""Text-to-image families of the latest generations."""

from typing import Any

import torch
from diffusers import (
    BriaPipeline,
    BriaTransformer2DModel,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    PRXPipeline,
)
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel

from families.family import Family, noise, prompt, silent, size, tiny
from families.images import dynamic_euler, image_vae


def prx() -> Any:
    transformer = tiny(
        PRXTransformer2DModel,
        in_channels=4,
        context_in_dim=12,
        hidden_size=16,
        num_heads=2,
        depth=2,
        axes_dim=[4, 4],
    )
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return silent(PRXPipeline(transformer, euler, None, None))


def prx_prompts(seed: int) -> dict[str, Any]:
    """Without guidance: with it, the pipeline takes one prompt at a time."""
    found = prompt(seed, 3, 12, mask=True, negative=False)
    return {k: value.bool() if k.endswith("mask") else value for k, value in found.items()}


def ovis_image() -> Any:
    transformer = tiny(
        OvisImageTransformer2DModel,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    return silent(OvisImagePipeline(dynamic_euler(), None, None, None, transformer))


def bria() -> Any:
    transformer = tiny(
        BriaTransformer2DModel,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=12,
        axes_dims_rope=[4, 6, 6],
    )
    vae = image_vae(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        shift_factor=0.0,
    )
    return silent(BriaPipeline(transformer, dynamic_euler(), vae, None, None))


def krea2() -> Any:
    transformer = tiny(
        Krea2Transformer2DModel,
        in_channels=16,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=24,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 4),
    )
    euler = dynamic_euler(max_image_seq_len=6400)
    layers = (1, 2)
    return silent(Krea2Pipeline(euler, None, None, None, transformer, layers))


def krea2_prompts(seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for start, sign in ((0, ""), (1000, "negative_")):
        found[f"{sign}prompt_embeds"] = noise(start + seed, 3, 2, 24)
        found[f"{sign}prompt_embeds_mask"] = torch.ones(1, 3, dtype=torch.bool)
    return found


def ernie_image() -> Any:
    transformer = tiny(
        ErnieImageTransformer2DModel,
        hidden_size=24,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=8,
        out_channels=8,
        text_in_dim=12,
        rope_axes_dim=(4, 4, 4),
    )
    euler = FlowMatchEulerDiscreteScheduler(shift=4.0)
    return silent(ErnieImagePipeline(transformer, None, None, None, euler))


def ernie_prompts(seed: int) -> dict[str, Any]:
    return {
        "prompt_embeds": [noise(seed, 3 + seed % 2, 12)[0]],
        "negative_prompt_embeds": [noise(1000 + seed, 2, 12)[0]],
    }


FAMILIES = [
    Family("prx", prx, prx_prompts, size(guidance_scale=1.0, use_resolution_binning=False)),
    Family(
        "ovis_image",
        ovis_image,
        lambda seed: prompt(seed, 3, 12),
        size(guidance_scale=5.0, negative_prompt=None),
        2,
    ),
    Family("bria", bria, lambda seed: prompt(seed, 3, 12), size(16, guidance_scale=5.0), 2),
    Family("krea2", krea2, krea2_prompts, size(guidance_scale=4.5), 2),
    Family("ernie_image", ernie_image, ernie_prompts, size(guidance_scale=4.0), 2),
]
