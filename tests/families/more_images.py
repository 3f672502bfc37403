"""More text-to-image families."""

from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
)

from families.family import Family, noise, prompt, silent, size, tiny
from families.images import gentle_betas


def chroma() -> Any:
    transformer = tiny(
        ChromaTransformer2DModel,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    euler = FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True)
    return silent(ChromaPipeline(euler, None, None, None, transformer))


def chroma_prompts(seed: int) -> dict[str, Any]:
    masked = prompt(seed, 3, 12, mask=True)
    return {name: value.float() for name, value in masked.items()}


def cogview4() -> Any:
    transformer = tiny(
        CogView4Transformer2DModel,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=4,
    )
    euler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    return silent(CogView4Pipeline(None, None, None, transformer, euler))


def cogview3() -> Any:
    transformer = tiny(
        CogView3PlusTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=4,
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return silent(CogView3PlusPipeline(None, None, None, transformer, scheduler))


def auraflow() -> Any:
    transformer = tiny(
        AuraFlowTransformer2DModel,
        gain=2.0,
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    euler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return silent(AuraFlowPipeline(None, None, None, transformer, euler))


def hunyuan_image() -> Any:
    transformer = tiny(
        HunyuanImageTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=12,
        text_embed_2_dim=10,
        rope_axes_dim=(4, 4),
    )
    euler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    guider = AdaptiveProjectedMixGuidance(guidance_scale=3.5, adaptive_projected_guidance_scale=4.0)
    return silent(HunyuanImagePipeline(euler, *[None] * 5, transformer, guider=guider))


def hunyuan_image_prompts(seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for start, sign in ((0, ""), (1000, "negative_")):
        found[f"{sign}prompt_embeds"] = noise(start + seed, 3, 12)
        found[f"{sign}prompt_embeds_mask"] = torch.ones(1, 3, dtype=torch.long)
        found[f"{sign}prompt_embeds_2"] = noise(start + 100 + seed, 2, 10)
        found[f"{sign}prompt_embeds_mask_2"] = torch.ones(1, 2, dtype=torch.long)
    return found


def lumina() -> Any:
    transformer = tiny(
        LuminaNextDiT2DModel,
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=12,
    )
    transformer.pad_token.data.normal_(generator=torch.Generator().manual_seed(2))
    euler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return silent(LuminaPipeline(transformer, euler, None, None, None))


def hunyuandit() -> Any:
    transformer = tiny(
        HunyuanDiT2DModel,
        sample_size=4,
        in_channels=4,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        hidden_size=16,
        num_layers=2,
        cross_attention_dim=12,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=3,
        text_len_t5=2,
    )
    ddpm = DDPMScheduler(prediction_type="v_prediction", clip_sample=False, **gentle_betas())
    return silent(HunyuanDiTPipeline(None, None, None, transformer, ddpm, None, None, False))


def hunyuandit_prompts(seed: int) -> dict[str, Any]:
    other = prompt(100 + seed, 2, 16, mask=True)
    return prompt(seed, 3, 12, mask=True) | {f"{name}_2": value for name, value in other.items()}


def masked_prompt(seed: int) -> dict[str, Any]:
    return prompt(seed, 3, 12, mask=True)


def plain_prompt(seed: int) -> dict[str, Any]:
    return prompt(seed, 3, 12)


FAMILIES = [
    Family("chroma", chroma, chroma_prompts, size(guidance_scale=5.0), 2),
    Family("cogview4", cogview4, plain_prompt, size(guidance_scale=5.0), 2),
    # it replaces negative embeddings by zeros
    Family(
        "cogview3",
        cogview3,
        lambda seed: {"prompt_embeds": noise(seed, 3, 12)},
        size(guidance_scale=5.0),
        2,
    ),
    Family("auraflow", auraflow, masked_prompt, size(guidance_scale=3.5), 2),
    Family("hunyuan_image", hunyuan_image, hunyuan_image_prompts, size(64), 2),
    Family("lumina", lumina, masked_prompt, size(guidance_scale=4.0), 2),
    Family(
        "hunyuandit",
        hunyuandit,
        hunyuandit_prompts,
        size(guidance_scale=5.0, use_resolution_binning=False),
        2,
    ),
]
