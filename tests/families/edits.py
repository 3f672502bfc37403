"""Families that start from a picture or follow one."""

from typing import Any

from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
)

from families.family import Family, noise, silent, size
from families.images import (
    dynamic_euler,
    flux_prompt,
    flux_prompts,
    flux_transformer,
    image_vae,
    sd3,
)


def picture_vae() -> Any:
    """One that shrinks pictures eightfold."""
    return image_vae(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.36,
        shift_factor=0.11,
    )


def flux_controlnet() -> Any:
    vae, transformer = picture_vae(), flux_transformer()
    controlnet = flux_transformer(FluxControlNetModel, num_layers=1, num_single_layers=1)
    nothing = [None] * 4
    pipe = FluxControlNetPipeline(dynamic_euler(), vae, *nothing, transformer, controlnet)
    return silent(pipe)


def flux_img2img() -> Any:
    pipe = FluxImg2ImgPipeline(dynamic_euler(), picture_vae(), *[None] * 4, flux_transformer())
    return silent(pipe)


def sd3_img2img() -> Any:
    return sd3(StableDiffusion3Img2ImgPipeline, picture_vae())


def with_picture(prompts: Any, name: str) -> Any:
    """The inputs of a seed, with a picture."""
    return lambda seed: prompts(seed) | {name: noise(500 + seed, 3, 32, 32).sigmoid()}


FAMILIES = [
    Family(
        "flux_controlnet",
        flux_controlnet,
        with_picture(flux_prompt, "control_image"),
        size(guidance_scale=3.5, controlnet_conditioning_scale=0.7),
    ),
    Family(
        "flux_img2img",
        flux_img2img,
        with_picture(flux_prompt, "image"),
        size(guidance_scale=3.5, strength=0.75),
    ),
    Family(
        "sd3_img2img",
        sd3_img2img,
        with_picture(flux_prompts, "image"),
        size(guidance_scale=5.0, strength=0.75),
        2,
    ),
]
