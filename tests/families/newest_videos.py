"""Text-to-video families of the latest generations, one of them with sound."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLMagvit,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

from families.family import Family, noise, prompt, silent, size, tiny


def kandinsky5() -> Any:
    transformer = tiny(
        Kandinsky5Transformer3DModel,
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=12,
        in_text_dim2=8,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
    )
    euler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    return silent(Kandinsky5T2VPipeline(transformer, None, None, None, None, None, euler))


def kandinsky5_prompts(seed: int) -> dict[str, Any]:
    """The cumulative lengths serve for the longest prompt alone, so joined ones do no harm."""
    found: dict[str, Any] = {}
    for start, sign in ((0, ""), (1000, "negative_")):
        found[f"{sign}prompt_embeds_qwen"] = noise(start + seed, 3, 12)
        found[f"{sign}prompt_embeds_clip"] = noise(start + 100 + seed, 8)
        found[f"{sign}prompt_cu_seqlens"] = torch.tensor([0, 3], dtype=torch.int32)
    return found


def easyanimate() -> Any:
    transformer = tiny(
        EasyAnimateTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=4,
        sample_height=4,
        num_layers=2,
        mmdit_layers=2,
        time_embed_dim=8,
        text_embed_dim=12,
    )
    vae = tiny(
        AutoencoderKLMagvit,
        latent_channels=4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    euler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    return silent(EasyAnimatePipeline(vae, None, None, transformer, euler))


def ltx2_video_vae() -> Any:
    return tiny(
        AutoencoderKLLTX2Video,
        latent_channels=4,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )


def ltx2() -> Any:
    transformer = tiny(
        LTX2VideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=16,
        rope_type="split",
    )
    audio_vae = tiny(
        AutoencoderKLLTX2Audio,
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )
    connectors = tiny(
        LTX2TextConnectors,
        caption_channels=16,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        rope_type="split",
    )
    euler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        shift_terminal=0.1,
    )
    vaes = (ltx2_video_vae(), audio_vae)
    return silent(LTX2Pipeline(euler, *vaes, None, None, connectors, transformer, None))


def ltx2_settings(**scales: Any) -> dict[str, Any]:
    return size(64, num_frames=9, guidance_scale=3.0, **scales)


FAMILIES = [
    Family("kandinsky5", kandinsky5, kandinsky5_prompts, size(num_frames=5, guidance_scale=5.0), 2),
    Family(
        "easyanimate",
        easyanimate,
        lambda seed: prompt(seed, 3, 12, mask=True),
        size(num_frames=5, guidance_scale=5.0),
        2,
    ),
    Family(
        "ltx2",
        ltx2,
        lambda seed: prompt(seed, 3, 32, mask=True),
        ltx2_settings(stg_scale=0, audio_stg_scale=0, modality_scale=1, audio_modality_scale=1),
        2,
    ),
    Family(
        "ltx2_all_guidance",
        ltx2,
        lambda seed: prompt(seed, 3, 32, mask=True),
        ltx2_settings(spatio_temporal_guidance_blocks=[1]),
        4,
    ),
]
