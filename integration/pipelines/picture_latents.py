"""Pictures as the latents of FLUX-type pipelines and back: of ours on pixels, and of diffusers'.

Shapes: B pictures, C channels, H height, W width, N tokens, D channels of a token.
"""

from typing import Any, TypeAlias

import torch
from diffusers import FluxPipeline
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foreseer.integration.pipelines.pixel_pipeline import PixelFluxPipeline, image_ids, pack

Embedded: TypeAlias = tuple[Tensor, Tensor]
"""Hidden states of the text encoder and their pooled vectors, a row per picture."""


class PixelLatents:
    """Pictures as the latents of a `PixelFluxPipeline`, which are their pixels.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: PixelFluxPipeline) -> None:
        self.pipe = pipe
        self.side, self.patch = pipe.config.sample_size, pipe.config.patch_size

    def encoded(self, images: Any) -> tuple[Float[Tensor, "B N D"], tuple[int, int]]:
        """Latents of pictures, and their height and width.

        Raises:
            ValueError: they are of another size.
        """
        pixels = _pixels(self.pipe, images)
        if tuple(pixels.shape[2:]) != (self.side, self.side):
            raise ValueError(
                f"the pictures have {pixels.shape[2]}x{pixels.shape[3]} pixels, expected "
                f"{self.side}x{self.side}; resize them."
            )
        return pack(pixels, self.patch), (self.side, self.side)

    def positions(self, size: tuple[int, int]) -> Float[Tensor, "N 3"]:
        """Rotary positions of the tokens."""
        return image_ids(self.side // self.patch)

    def prompts(self, words: list[str]) -> Embedded:
        """Prompts, encoded."""
        return self.pipe._encoded(words, None, None)

    def packed_mask(self, mask: Bool[Tensor, "B 1 H W"]) -> Bool[Tensor, "B N D"]:
        """A mask of pixels in the shape of latents."""
        return pack(mask.float().expand(-1, 3, -1, -1), self.patch).bool()

    def finished(self, latents: Tensor, size: tuple[int, int], output_type: str) -> Any:
        """Latents in the form asked for."""
        return self.pipe._finish(latents, output_type, return_dict=False)[0]


class AutoencoderLatents:
    """Pictures as the packed latents of diffusers' `FluxPipeline`.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: FluxPipeline) -> None:
        self.pipe = pipe
        self.pixels = 2 * pipe.vae_scale_factor  # of a token's side

    def encoded(self, images: Any) -> tuple[Float[Tensor, "B N D"], tuple[int, int]]:
        """Latents of pictures, and their height and width.

        Raises:
            ValueError: their sides are no multiples of a token's.
        """
        pixels = _pixels(self.pipe, images)
        height, width = pixels.shape[2:]
        if height % self.pixels or width % self.pixels:
            raise ValueError(
                f"the pictures have {height}x{width} pixels, expected multiples of {self.pixels}; "
                "resize or crop them."
            )
        vae = self.pipe.vae
        made = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
        made = (made - vae.config.shift_factor) * vae.config.scaling_factor
        return pack(made, 2).to(self.pipe.transformer.dtype), (height, width)

    def positions(self, size: tuple[int, int]) -> Float[Tensor, "N 3"]:
        """Rotary positions of the tokens, row by row."""
        rows, columns = (side // self.pixels for side in size)
        down, right = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        ids = torch.stack([torch.zeros_like(down), down, right], -1).flatten(0, 1)
        return ids.to(self.pipe.transformer.dtype)

    def prompts(self, words: list[str]) -> Embedded:
        """Prompts, encoded."""
        embeds, pooled, _ = self.pipe.encode_prompt(words, None)
        return embeds, pooled

    def packed_mask(self, mask: Bool[Tensor, "B 1 H W"]) -> Bool[Tensor, "B N D"]:
        """A mask of pixels in the shape of latents."""
        small = nn.functional.max_pool2d(mask.float(), self.pipe.vae_scale_factor)
        channels = self.pipe.transformer.config.in_channels // 4
        return pack(small.expand(-1, channels, -1, -1), 2).bool()

    def finished(self, latents: Tensor, size: tuple[int, int], output_type: str) -> Any:
        """Latents in the form asked for."""
        if output_type == "latent":
            return latents
        vae = self.pipe.vae
        made = self.pipe._unpack_latents(latents, *size, self.pipe.vae_scale_factor)
        made = made / vae.config.scaling_factor + vae.config.shift_factor
        pixels = vae.decode(made.to(vae.dtype), return_dict=False)[0]
        return self.pipe.image_processor.postprocess(pixels.float(), output_type=output_type)


def _pixels(pipe: Any, images: Any) -> Float[Tensor, "B C H W"]:
    """Pictures in [-1, 1] where a pipeline runs.

    Raises:
        ValueError: tensors of another shape or range, or PIL images that are not RGB or of several
            sizes.
    """
    if not isinstance(images, Tensor):
        _check_images(images)
        made: Tensor = pipe.image_processor.preprocess(images)
        images = made
    largest = float(images.abs().max()) if images.numel() else 0.0
    if images.ndim != 4 or images.shape[1] != 3 or not len(images) or not largest <= 1:
        raise ValueError(
            f"the pictures are {tuple(images.shape)} with values up to {largest:g}, expected "
            "(B, 3, H, W) in [-1, 1], or PIL images."
        )
    return images.to(pipe._execution_device, pipe.transformer.dtype)


def _check_images(images: Any) -> None:
    """Raise unless these are pictures that a pipeline would take as they are."""
    listed = list(images) if isinstance(images, list | tuple) else [images]
    kinds = {(getattr(each, "mode", "RGB"), getattr(each, "size", None)) for each in listed}
    if len(kinds) != 1 or next(iter(kinds))[0] != "RGB":
        told = ", ".join(f"{mode} of {size}" for mode, size in sorted(kinds, key=str)) or "none"
        raise ValueError(
            f"the pictures are {told}, expected RGB of one size: image.convert('RGB').resize(...), "
            "over a background of your own where they have an alpha channel."
        )
