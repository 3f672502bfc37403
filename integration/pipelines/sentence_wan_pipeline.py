"""Wan's pipeline with a sentence encoder in the place of UMT5, for small models on a CPU.

Shapes: B videos, L text tokens, E text channels, Z latent channels, f latent frames.
"""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from jaxtyping import Float
from torch import Tensor

from foreseer.integration.pipelines.sentence_encoder import SentenceEncoder


class SentenceWanPipeline(WanPipeline):
    """Draw short videos of plain prompts with a small `WanTransformer3DModel`.

    It is `WanPipeline` but for the text encoder, and for the size that a video has where none is
    asked for. Guidance takes two calls of the transformer, as there.

    Args:
        tokenizer: None; the encoder has its own.
        text_encoder: encodes prompts.
        vae: decodes latents.
        scheduler: any diffusers scheduler configured for flow prediction.
        transformer: predicts v = eps - x_0 of latents.
        transformer_2: of two, the one for low noise.
        boundary_ratio: flow time at which `transformer_2` takes over.
        expand_timesteps: a time for every token.
        sample_size: side in pixels that was trained on.
        num_frames: frames that were trained on.
    """

    _optional_components = [*WanPipeline._optional_components, "tokenizer"]

    def __init__(
        self,
        tokenizer: None,
        text_encoder: SentenceEncoder,
        vae: AutoencoderKLWan,
        scheduler: FlowMatchEulerDiscreteScheduler,
        transformer: WanTransformer3DModel | None = None,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        sample_size: int = 32,
        num_frames: int = 17,
    ) -> None:
        networks = (transformer, transformer_2, boundary_ratio, expand_timesteps)
        super().__init__(tokenizer, text_encoder, vae, scheduler, *networks)
        self.register_to_config(sample_size=sample_size, num_frames=num_frames)

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Float[Tensor, "B Z f height width"] | None = None,
        prompt_embeds: Float[Tensor, "B L E"] | None = None,
        negative_prompt_embeds: Float[Tensor, "B L E"] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        **settings: Any,
    ) -> Any:
        """Draw one video per prompt.

        Args:
            prompt: one prompt or several; None where `prompt_embeds` are given.
            negative_prompt: what to guide away from; None for the empty prompt.
            height: pixels; None for the size trained on, as for `width` and `num_frames`, 1 + 4 k.
            width: pixels.
            num_frames: frames.
            num_inference_steps: sampler steps.
            guidance_scale: guidance strength; at 1 or below the second branch is not run.
            num_videos_per_prompt: videos of each prompt.
            generator: source of the initial noise, one for all videos or one per video.
            latents: initial noise, instead of drawing it.
            prompt_embeds: hidden states of the text encoder, instead of prompts.
            negative_prompt_embeds: the same.
            output_type: `np`, `pt`, `pil`, or `latent`.
            return_dict: return a `WanPipelineOutput` instead of a tuple.
            settings: the further arguments of `WanPipeline`.

        Returns:
            The videos.

        Raises:
            MissingExtra: a prompt is not known, and the sentence encoder is not installed.
        """
        return super().__call__(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=self.config.sample_size if height is None else height,
            width=self.config.sample_size if width is None else width,
            num_frames=self.config.num_frames if num_frames is None else num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_videos_per_prompt=num_videos_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            return_dict=return_dict,
            **settings,
        )

    def _get_t5_prompt_embeds(
        self,
        prompt: str | list[str],
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = 226,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, "B L E"]:
        """The sentence encoder's hidden states, of its own 16 tokens."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        embeds = self.text_encoder(prompts)[0].to(device=device, dtype=dtype)
        return embeds.repeat_interleave(num_videos_per_prompt, 0)
