"""More text-to-video families."""

from typing import Any

from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)

from families.family import Family, prompt, silent, size, tiny
from families.images import gentle_betas
from families.videos import cogvideox


def cogvideox_dpm() -> Any:
    solver = CogVideoXDPMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return cogvideox(solver)


def mochi() -> Any:
    transformer = tiny(
        MochiTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=8,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=3,
    )
    euler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return silent(MochiPipeline(euler, None, None, None, transformer))


def allegro() -> Any:
    transformer = tiny(
        AllegroTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=4,
        sample_height=4,
        sample_frames=2,
        caption_channels=12,
    )
    euler = EulerAncestralDiscreteScheduler(**gentle_betas())
    return silent(AllegroPipeline(None, None, None, transformer, euler))


def latte() -> Any:
    transformer = tiny(
        LatteTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=4,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=12,
        video_length=2,
    )
    scheduler = DDIMScheduler(clip_sample=False, **gentle_betas())
    return silent(LattePipeline(None, None, None, transformer, scheduler))


def skyreels_v2() -> Any:
    transformer = tiny(
        SkyReelsV2Transformer3DModel,
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
    solver = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    return silent(SkyReelsV2Pipeline(None, None, transformer, None, solver))


def masked_prompt(seed: int) -> dict[str, Any]:
    return prompt(seed, 3, 12, mask=True)


def plain_prompt(seed: int) -> dict[str, Any]:
    return prompt(seed, 3, 12)


FAMILIES = [
    Family("cogvideox_dpm", cogvideox_dpm, plain_prompt, size(num_frames=5, guidance_scale=6.0), 2),
    Family(
        "mochi",
        mochi,
        lambda seed: prompt(seed, 3, 16, mask=True),
        size(num_frames=7, guidance_scale=4.5),
        2,
    ),
    Family(
        "allegro",
        allegro,
        masked_prompt,
        size(num_frames=8, guidance_scale=7.5, negative_prompt=None),
        2,
    ),
    Family(
        "latte",
        latte,
        plain_prompt,
        size(video_length=2, guidance_scale=7.5, negative_prompt=None),
        2,
    ),
    Family("skyreels_v2", skyreels_v2, plain_prompt, size(num_frames=5, guidance_scale=6.0), 2),
]
