"""Pipelines of diffusion transformers that work on pixels; one that draws classes.

Shapes: B batch, C channels, H height, W width.
"""

import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor


class PixelPipeline(DiffusionPipeline):
    """What pipelines on pixels share: no autoencoder stands before the images."""

    image_processor: VaeImageProcessor

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
        device, dtype = self._execution_device, self.transformer.dtype
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
            class_labels: labels in `[0, num_embeds_ada_norm)`, one per image.
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
            null = torch.full_like(classes, self.transformer.config.num_embeds_ada_norm)
            classes = torch.cat([classes, null])
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            x_t = torch.cat([latents, latents]) if guided else latents
            v = self.transformer(
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
        config = self.transformer.config
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        return self._start(shape, generator, latents)

    def _check_labels(self, class_labels: int | list[int]) -> list[int]:
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        num_classes = self.transformer.config.num_embeds_ada_norm
        wrong = [label for label in labels if not 0 <= label < num_classes]
        if wrong or not labels:
            raise ValueError(
                f"class_labels holds {wrong or 'nothing'}, expected labels in [0, {num_classes})."
            )
        return labels
