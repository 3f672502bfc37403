"""A small editor of the FLUX Kontext kind: the source picture enters as 64 more image tokens.

Shapes: B samples, C = 3 channels, H = W = 32 pixels, N = 64 tokens of 4 x 4 pixels, D = 48
channels of a token, L text tokens, E text channels.
Convention: x_t = (1 - sigma) x_0 + sigma eps, v = eps - x_0, sigma runs 1 to 0.
Source: FLUX.1 Kontext, arXiv 2506.15742, section 3: the tokens of the source follow those of the
image, with 1 in the first of their three rotary positions.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, ImagePipelineOutput
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foreseer.integration.pipelines.load import DTYPE
from foreseer.integration.pipelines.pixel_pipeline import PixelFluxPipeline, image_ids, pack
from foreseer.integration.pipelines.sentence_encoder import SentenceEncoder
from foreseer.predictors.token_groups import region_groups

SIDE = 8
PATCH_SIZE = 4
SHIPPED = Path(__file__).resolve().parent / "shipped"


class EmojiEditPipeline(PixelFluxPipeline):
    """Edit pictures by instructions.

    Without guidance (a scale of 1) a step is one evaluation, as in FLUX Kontext's own default.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: Float[Tensor, "B C H W"],
        prompt: str | Sequence[str],
        mask_image: Bool[Tensor, "B H W"] | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 28,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Float[Tensor, "B N D"] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Edit one picture per instruction.

        Args:
            image: source pictures in [0, 1].
            prompt: instructions, such as "make it dark skin tone".
            mask_image: pixels that the instruction is about; the network is not shown them, and
                `regions` makes token groups of them.
            guidance_scale: guidance strength; at 1 or below the branch without an instruction is
                not run.
            num_inference_steps: sampler steps.
            generator: source of the initial noise, one for all images or one per image.
            latents: initial noise, packed, instead of drawing it.
            output_type: `pil`, `np` or `pt` (in [0, 1]), or `latent` (packed, in [-1, 1]).
            return_dict: return an `ImagePipelineOutput` instead of a tuple.

        Raises:
            ValueError: there is not one picture for every instruction.
        """
        embeds, pooled = self._encoded(prompt, None, None)
        if len(image) != len(embeds):
            raise ValueError(
                f"found {len(image)} pictures and {len(embeds)} instructions, expected as many."
            )
        self._guidance_scale = guidance_scale
        latents = self._initial(len(embeds), generator, latents)
        reference = source_tokens(image).to(latents)
        guided = guidance_scale > 1
        if guided:
            null_embeds, null_pooled = self.text_encoder([""] * len(embeds))
            embeds = torch.cat([embeds, null_embeds.to(embeds)])
            pooled = torch.cat([pooled, null_pooled.to(pooled)])
            reference = torch.cat([reference, reference])
        img_ids = editing_ids().to(latents.device)
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            x_t = torch.cat([latents, latents]) if guided else latents
            v = self.transformer(
                torch.cat([x_t, reference], 1),
                timestep=(timestep / 1000).to(x_t.dtype).expand(len(x_t)),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                img_ids=img_ids,
                txt_ids=img_ids.new_zeros(embeds.shape[1], 3),
                return_dict=False,
            )[0][:, : latents.shape[1]]
            if guided:
                v_cond, v_uncond = v.chunk(2)
                v = v_uncond + guidance_scale * (v_cond - v_uncond)
            latents = self.scheduler.step(v, timestep, latents, return_dict=False)[0]
        return self._finish(latents, output_type, return_dict)


def source_tokens(image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
    """Pictures in [0, 1] as the tokens that follow those of the image."""
    return pack(2 * image - 1, PATCH_SIZE)


def editing_ids() -> Float[Tensor, "2N 3"]:
    """Rotary positions (0, row, column) of the image and (1, row, column) of the source."""
    ids = image_ids(SIDE)
    return torch.cat([ids, ids + torch.tensor([1.0, 0.0, 0.0])])


def regions(arguments: Mapping[str, Any]) -> Int[Tensor, "B 2N"]:
    """The token groups of a call: what its `mask_image` edits, a ring, the rest, the source.

    Args:
        arguments: of the call, as `forecasting(..., groups=regions)` passes them on.
    """
    return region_groups(arguments["mask_image"], (SIDE, SIDE), rings=1, num_reference=SIDE**2)


def load_editor(instructions: Sequence[str] = (), folder: Path = SHIPPED) -> EmojiEditPipeline:
    """The shipped editor, in float32.

    Args:
        instructions: encoded now, which asks for `pip install "foreseer[text]"`.
        folder: of the transformer.
    """
    transformer = FluxTransformer2DModel.from_pretrained(folder, **{DTYPE: torch.float32})
    pipe = edit_pipeline(transformer.eval(), instructions)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit_pipeline(
    transformer: FluxTransformer2DModel, instructions: Sequence[str]
) -> EmojiEditPipeline:
    """A pipeline that knows some instructions without the sentence encoder."""
    encoder = SentenceEncoder.knowing(instructions)
    return EmojiEditPipeline(transformer, encoder, FlowMatchEulerDiscreteScheduler())
