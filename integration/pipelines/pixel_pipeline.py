"""Pipelines of small diffusion transformers that work on pixels: classes, and prompts.

Shapes: B batch, C channels, H height, W width, N = (H / p) (W / p) image tokens of p x p pixels,
D = C p p channels of a token, L text tokens, E text channels.
"""

from collections.abc import Sequence

import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    ImagePipelineOutput,
    ModelMixin,
    UNet2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.integration.pipelines.sentence_encoder import SentenceEncoder


class PixelPipeline(DiffusionPipeline):
    """What pipelines on pixels share: no autoencoder stands before the images."""

    image_processor: VaeImageProcessor

    @property
    def network(self) -> ModelMixin:
        """What predicts v."""
        return self.transformer

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the latest call."""
        return self._guidance_scale

    def _start(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Float[Tensor, "B ..."] | None,
    ) -> Float[Tensor, "B ..."]:
        """The initial noise, drawn or as given."""
        device, dtype = self._execution_device, self.network.dtype
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {shape}.")
        return latents.to(device, dtype)

    def _pixels(self, latents: Float[Tensor, "B ..."]) -> Float[Tensor, "B C H W"]:
        """Final latents as images in [-1, 1]."""
        return latents

    def _finish(
        self, latents: Float[Tensor, "B ..."], output_type: str, return_dict: bool
    ) -> ImagePipelineOutput | tuple:
        """The final latents in the form asked for."""
        images = latents
        if output_type != "latent":
            pixels = self._pixels(latents.float())
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class PixelDiTPipeline(PixelPipeline):
    """Draw images of given classes with a pixel-space `DiTTransformer2DModel`.

    With guidance, both branches run in one batched call, the conditional half first, and
    v = v_uncond + guidance_scale * (v_cond - v_uncond) (Ho & Salimans, arXiv 2207.12598, eq. 6).

    Args:
        transformer: predicts v = eps - x_0; the null class is index `num_embeds_ada_norm`.
        scheduler: any diffusers scheduler configured for flow prediction, such as
            `UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)`.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(
        self, transformer: DiTTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_convert_rgb=False)

    @property
    def num_classes(self) -> int:
        """Classes that can be drawn; the null class of guidance is the one after them."""
        return self.transformer.config.num_embeds_ada_norm

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int],
        guidance_scale: float = 3.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Float[Tensor, "B C H W"] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image per class label.

        Args:
            class_labels: labels in `[0, num_classes)`, one per image.
            guidance_scale: guidance strength; at 1 or below the unconditional branch is not run.
            num_inference_steps: sampler steps.
            generator: source of the initial noise, one for all images or one per image.
            latents: initial noise, instead of drawing it.
            output_type: `pil`, `np` or `pt` (in [0, 1]), or `latent` (the raw sample in [-1, 1]).
            return_dict: return an `ImagePipelineOutput` instead of a tuple.

        Returns:
            The images.

        Raises:
            ValueError: a label is out of range.
        """
        labels = self._check_labels(class_labels)
        self._guidance_scale = guidance_scale
        latents = self._initial(labels, generator, latents)
        guided = guidance_scale > 1
        classes = torch.tensor(labels, device=latents.device)
        if guided:
            null = torch.full_like(classes, self.num_classes)
            classes = torch.cat([classes, null])
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            x_t = torch.cat([latents, latents]) if guided else latents
            v = self.network(
                x_t, timestep=timestep.expand(len(x_t)), class_labels=classes, return_dict=False
            )[0]
            if guided:
                v_cond, v_uncond = v.chunk(2)
                v = v_uncond + guidance_scale * (v_cond - v_uncond)
            latents = self.scheduler.step(v, timestep, latents, return_dict=False)[0]
        return self._finish(latents, output_type, return_dict)

    def _initial(
        self,
        labels: list[int],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Float[Tensor, "B C H W"] | None,
    ) -> Float[Tensor, "B C H W"]:
        """The initial noise, drawn or as given."""
        config = self.network.config
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        return self._start(shape, generator, latents)

    def _check_labels(self, class_labels: int | list[int]) -> list[int]:
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        wrong = [label for label in labels if not 0 <= label < self.num_classes]
        if wrong or not labels:
            raise ValueError(
                f"class_labels holds {wrong or 'nothing'}, expected labels in "
                f"[0, {self.num_classes})."
            )
        return labels


class PixelUNetPipeline(PixelDiTPipeline):
    """Draw images of given classes with a pixel-space `UNet2DModel`, as `PixelDiTPipeline` does.

    Args:
        unet: predicts v = eps - x_0; the null class is its last.
        scheduler: any diffusers scheduler configured for flow prediction.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        PixelPipeline.__init__(self)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_convert_rgb=False)

    @property
    def network(self) -> ModelMixin:
        """What predicts v."""
        return self.unet

    @property
    def num_classes(self) -> int:
        """Classes that can be drawn; the null class of guidance is the one after them."""
        return self.unet.config.num_class_embeds - 1


class PixelFluxPipeline(PixelPipeline):
    """Draw images of plain prompts with a pixel-space `FluxTransformer2DModel`.

    With guidance, both branches run in one batched call, the conditional half first, and
    v = v_uncond + guidance_scale * (v_cond - v_uncond) (Ho & Salimans, arXiv 2207.12598, eq. 6).
    Latents are packed, `(B, N, D)`, as in diffusers' `FluxPipeline`.

    Args:
        transformer: predicts v = eps - x_0 of packed pixels.
        text_encoder: encodes prompts.
        scheduler: any diffusers scheduler configured for flow prediction.
        sample_size: image side in pixels.
        patch_size: pixels per token side.
        spacing: side r of the squares of pixels that this image's are averages over, where it is
            one stage of a larger one: see `image_ids`.
    """

    model_cpu_offload_seq = "text_encoder->transformer"

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        text_encoder: SentenceEncoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
        sample_size: int = 32,
        patch_size: int = 4,
        spacing: int = 1,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, text_encoder=text_encoder, scheduler=scheduler
        )
        self.register_to_config(sample_size=sample_size, patch_size=patch_size, spacing=spacing)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_convert_rgb=False)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Float[Tensor, "B N D"] | None = None,
        prompt_embeds: Float[Tensor, "B L E"] | None = None,
        pooled_prompt_embeds: Float[Tensor, "B E"] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image per prompt.

        Args:
            prompt: one prompt or several; None where `prompt_embeds` are given.
            guidance_scale: guidance strength; at 1 or below the unconditional branch is not run.
            num_inference_steps: sampler steps.
            generator: source of the initial noise, one for all images or one per image.
            latents: initial noise, packed, instead of drawing it.
            prompt_embeds: hidden states of the text encoder, instead of prompts.
            pooled_prompt_embeds: their pooled vectors.
            output_type: `pil`, `np` or `pt` (in [0, 1]), or `latent` (packed, in [-1, 1]).
            return_dict: return an `ImagePipelineOutput` instead of a tuple.

        Returns:
            The images.

        Raises:
            MissingExtra: a prompt is none the pipeline was saved with, and the package with
                the sentence encoder is not installed.
            ValueError: prompts and embeddings are both given, neither is, or shapes disagree.
        """
        embeds, pooled = self._encoded(prompt, prompt_embeds, pooled_prompt_embeds)
        self._guidance_scale = guidance_scale
        latents = self._initial(len(embeds), generator, latents)
        guided = guidance_scale > 1
        if guided:
            null_embeds, null_pooled = self.text_encoder([""] * len(embeds))
            embeds = torch.cat([embeds, null_embeds.to(embeds)])
            pooled = torch.cat([pooled, null_pooled.to(pooled)])
        img_ids = image_ids(self._side, self.config.spacing).to(latents.device)
        txt_ids = img_ids.new_zeros(embeds.shape[1], 3)
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            x_t = torch.cat([latents, latents]) if guided else latents
            v = self.transformer(
                x_t,
                timestep=(timestep / 1000).to(x_t.dtype).expand(len(x_t)),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                img_ids=img_ids,
                txt_ids=txt_ids,
                return_dict=False,
            )[0]
            if guided:
                v_cond, v_uncond = v.chunk(2)
                v = v_uncond + guidance_scale * (v_cond - v_uncond)
            latents = self.scheduler.step(v, timestep, latents, return_dict=False)[0]
        return self._finish(latents, output_type, return_dict)

    def _encoded(
        self,
        prompt: str | Sequence[str] | None,
        prompt_embeds: Float[Tensor, "B L E"] | None,
        pooled_prompt_embeds: Float[Tensor, "B E"] | None,
    ) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E"]]:
        """Embeddings on the pipeline's device and in its dtype."""
        given = (prompt_embeds is not None, pooled_prompt_embeds is not None)
        if given not in {(True, True), (False, False)} or given[0] == (prompt is not None):
            raise ValueError(
                "expected a prompt, or prompt_embeds and pooled_prompt_embeds together; found "
                f"prompt {prompt!r}, prompt_embeds {'given' if given[0] else 'not given'}, "
                f"pooled_prompt_embeds {'given' if given[1] else 'not given'}."
            )
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            if not prompts:
                raise ValueError("prompt is an empty list, expected at least one prompt.")
            prompt_embeds, pooled_prompt_embeds = self.text_encoder(prompts)
        place = {"device": self._execution_device, "dtype": self.transformer.dtype}
        return prompt_embeds.to(**place), pooled_prompt_embeds.to(**place)  # type: ignore[union-attr]

    def _initial(
        self,
        count: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Float[Tensor, "B N D"] | None,
    ) -> Float[Tensor, "B N D"]:
        """The initial noise, drawn or as given."""
        shape = (count, self._side**2, self.transformer.config.in_channels)
        return self._start(shape, generator, latents)

    @property
    def _side(self) -> int:
        """Tokens per side."""
        return int(self.config.sample_size // self.config.patch_size)

    def _pixels(self, latents: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        """The packed latents as images."""
        return unpack(latents, self.config.patch_size)


def image_ids(side: int, spacing: int = 1) -> Float[Tensor, "N 3"]:
    """Rotary positions (0, row, column) of a square of tokens, row by row.

    Args:
        side: tokens per side.
        spacing: tokens of the full grid per side of one token; a token lies at their mean,
            spacing * p + (spacing - 1) / 2, so that grids of all sizes cover the same picture.
    """
    places = spacing * torch.arange(side) + (spacing - 1) / 2
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()


def pack(images: Float[Tensor, "B C H W"], patch_size: int) -> Float[Tensor, "B N D"]:
    """Images as tokens of `patch_size` x `patch_size` pixels, row by row."""
    return nn.functional.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)


def unpack(tokens: Float[Tensor, "B N D"], patch_size: int) -> Float[Tensor, "B C H W"]:
    """Square images of their tokens, the inverse of `pack`."""
    side = round(tokens.shape[1] ** 0.5)
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))
    return nn.functional.pixel_shuffle(grid, patch_size)
