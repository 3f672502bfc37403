"""Text-to-video families."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from families.family import Family, noise, prompt, silent, size, tiny


def wan_transformer(seed: int = 0) -> Any:
    return tiny(
        WanTransformer3DModel,
        seed,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=16,
    )


def wan_solver() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def wan() -> Any:
    return silent(WanPipeline(None, None, None, wan_solver(), wan_transformer()))


def wan22() -> Any:
    """Two experts of different weights: 3 of 8 steps are the first one's."""
    experts = (wan_transformer(), wan_transformer(seed=1))
    return silent(WanPipeline(None, None, None, wan_solver(), *experts, boundary_ratio=0.875))


def hunyuan_video() -> Any:
    transformer = tiny(
        HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=12,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    euler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    return silent(HunyuanVideoPipeline(None, None, transformer, None, euler, None, None))


def hunyuan_video_prompt(seed: int) -> dict[str, Any]:
    pooled = {"pooled_prompt_embeds": noise(100 + seed, 8)}
    return prompt(seed, 3, 12, mask=True, negative=False) | pooled


def hunyuan_video15() -> Any:
    transformer = tiny(
        HunyuanVideo15Transformer3DModel,
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=12,
        text_embed_2_dim=10,
        image_embed_dim=8,
        rope_axes_dim=(2, 2, 4),
        target_size=32,
        task_type="t2v",
    )
    vae = tiny(
        AutoencoderKLHunyuanVideo15,
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    euler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    guider = ClassifierFreeGuidance(guidance_scale=6.0)
    pipe = HunyuanVideo15Pipeline(None, None, transformer, vae, euler, None, None, guider)
    pipe.vision_num_semantic_tokens = 2
    return silent(pipe)


def hunyuan_video15_prompts(seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for start, sign in ((0, ""), (1000, "negative_")):
        found[f"{sign}prompt_embeds"] = noise(start + seed, 3, 12)
        found[f"{sign}prompt_embeds_mask"] = torch.ones(1, 3)
        found[f"{sign}prompt_embeds_2"] = noise(start + 100 + seed, 2, 10)
        found[f"{sign}prompt_embeds_mask_2"] = torch.ones(1, 2)
    return found


def ltx() -> Any:
    transformer = tiny(
        LTXVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=12,
    )
    euler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        shift_terminal=0.1,
    )
    return silent(LTXPipeline(euler, None, None, None, transformer))


def cogvideox(scheduler: Any = None) -> Any:
    transformer = tiny(
        CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=3,
        use_rotary_positional_embeddings=True,
    )
    scheduler = scheduler or CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return silent(CogVideoXPipeline(None, None, None, transformer, scheduler))


FAMILIES = [
    Family("wan", wan, lambda seed: prompt(seed, 3, 12), size(num_frames=5, guidance_scale=5.0), 2),
    Family(
        "wan22",
        wan22,
        lambda seed: prompt(seed, 3, 12),
        size(num_frames=5, guidance_scale=4.0, guidance_scale_2=3.0),
        2,
    ),
    Family(
        "hunyuan_video",
        hunyuan_video,
        hunyuan_video_prompt,
        size(16, num_frames=5, guidance_scale=6.0),
    ),
    Family("hunyuan_video15", hunyuan_video15, hunyuan_video15_prompts, size(16, num_frames=5), 2),
    Family(
        "ltx",
        ltx,
        lambda seed: prompt(seed, 3, 12, mask=True),
        size(64, num_frames=9, guidance_scale=3.0),
        2,
    ),
    Family(
        "cogvideox",
        cogvideox,
        lambda seed: prompt(seed, 3, 12),
        size(num_frames=5, guidance_scale=6.0),
        2,
    ),
]
