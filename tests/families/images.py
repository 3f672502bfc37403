"""Text-to-image and class-to-image families."""

from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from families.family import STEPS, Family, noise, prompt, silent, size, tiny


def flux_transformer(cls: type = FluxTransformer2DModel, **config: Any) -> Any:
    shape: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 1,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 12,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return tiny(cls, **{**shape, **config})


def dynamic_euler(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **config)


def gentle_betas() -> dict[str, Any]:
    """The usual ones, of less noise: random weights do not predict it, and x_0 would explode."""
    return {"beta_start": 0.0001, "beta_end": 0.005}


def flux() -> Any:
    pipe = FluxPipeline(dynamic_euler(), None, None, None, None, None, flux_transformer())
    return silent(pipe)


def flux_prompt(seed: int) -> dict[str, Any]:
    return {"prompt_embeds": noise(seed, 3, 12), "pooled_prompt_embeds": noise(100 + seed, 12)}


def flux_prompts(seed: int) -> dict[str, Any]:
    negative = flux_prompt(1000 + seed)
    return flux_prompt(seed) | {f"negative_{name}": value for name, value in negative.items()}


def flux2() -> Any:
    transformer = tiny(
        Flux2Transformer2DModel,
        gain=2.0,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=12,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return silent(Flux2Pipeline(dynamic_euler(), None, None, None, transformer))


def sd3_transformer() -> Any:
    return tiny(
        SD3Transformer2DModel,
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def sd3(cls: type = StableDiffusion3Pipeline, vae: Any = None) -> Any:
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return silent(cls(sd3_transformer(), euler, vae, *[None] * 6))


def pixart() -> Any:
    transformer = tiny(
        PixArtTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=4,
        caption_channels=12,
        use_additional_conditions=False,
    )
    solver = DPMSolverMultistepScheduler(**gentle_betas())
    return silent(PixArtSigmaPipeline(None, None, None, transformer, solver))


def image_vae(**config: Any) -> Any:
    shape: dict[str, Any] = {
        "block_out_channels": (8,),
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": 4,
    }
    return tiny(AutoencoderKL, **{**shape, **config})


def dit() -> Any:
    transformer = tiny(
        DiTTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=4,
    )
    vae = image_vae(scaling_factor=4.0)  # keeps the decoded pixels inside [0, 1]
    scheduler = DDIMScheduler(clip_sample=False, **gentle_betas())
    return silent(DiTPipeline(transformer, vae, scheduler))


LABELS = (0, 2, 7, 999)

FAMILIES = [
    Family("flux", flux, flux_prompt, size(guidance_scale=3.5)),
    Family("flux_cfg", flux, flux_prompts, size(guidance_scale=3.5, true_cfg_scale=2.0), 2),
    Family(
        "flux2",
        flux2,
        lambda seed: {"prompt_embeds": noise(seed, 3, 12)},
        size(guidance_scale=4.0),
    ),
    Family("sd3", sd3, flux_prompts, size(guidance_scale=5.0), 2),
    Family(
        "pixart",
        pixart,
        lambda seed: prompt(seed, 3, 12, mask=True),
        size(guidance_scale=4.5, negative_prompt=None, use_resolution_binning=False),
        2,
    ),
    Family(
        "dit",
        dit,
        lambda seed: {"class_labels": LABELS[seed % len(LABELS)]},
        {"num_inference_steps": STEPS, "guidance_scale": 4.0},
        2,
    ),
]
