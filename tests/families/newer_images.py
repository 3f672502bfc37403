"""Text-to-image families around language models."""

from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from families.family import Family, noise, prompt, silent, size, tiny


def qwenimage() -> Any:
    transformer = tiny(
        QwenImageTransformer2DModel,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    euler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return silent(QwenImagePipeline(euler, None, None, None, transformer))


def qwenimage_prompts(seed: int) -> dict[str, Any]:
    """An odd seed's prompt is one token shorter than the others."""
    masks = torch.ones(2, 1, 3, dtype=torch.long)
    masks[0, :, 2] = 1 - seed % 2
    named = {"prompt_embeds_mask": masks[0], "negative_prompt_embeds_mask": masks[1]}
    return prompt(seed, 3, 12) | named


def lumina2() -> Any:
    transformer = tiny(
        Lumina2Transformer2DModel,
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 16, 16),
        cap_feat_dim=12,
    )
    euler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return silent(Lumina2Pipeline(transformer, euler, None, None, None))


def zimage() -> Any:
    transformer = tiny(
        ZImageTransformer2DModel,
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 16, 16],
    )
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return silent(ZImagePipeline(euler, None, None, None, transformer))


def zimage_prompts(seed: int) -> dict[str, Any]:
    return {
        "prompt_embeds": [noise(seed, 3 + seed % 2, 12)[0]],
        "negative_prompt_embeds": [noise(1000 + seed, 2, 12)[0]],
    }


def sana() -> Any:
    transformer = tiny(
        SanaTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=4,
    )
    solver = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return silent(SanaPipeline(None, None, None, transformer, solver))


FAMILIES = [
    Family("qwenimage", qwenimage, qwenimage_prompts, size(true_cfg_scale=4.0), 2),
    Family(
        "lumina2", lumina2, lambda seed: prompt(seed, 3, 12, mask=True), size(guidance_scale=4.0), 2
    ),
    Family("zimage", zimage, zimage_prompts, size(guidance_scale=5.0), 2),
    Family(
        "sana",
        sana,
        lambda seed: prompt(seed, 3, 12, mask=True),
        size(128, guidance_scale=4.5, negative_prompt=None, use_resolution_binning=False),
        2,
    ),
]
