"""The pipeline of a distilled student, with guidance embedded or in two branches.

Shapes: B batch, C channels, H height, W width.
Convention: x_r = x_t - (t - r) u(x_t, r, t), an Euler step with an average velocity.
"""

import numpy as np
import torch
from diffusers import (
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
)
from jaxtyping import Float, Int
from torch import Tensor

from foreseer.integration.host.trunk import time_facts
from foreseer.integration.pipelines.average_velocity import Conditioning, IntervalConditioner
from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline


class StudentPipeline(PixelDiTPipeline):
    """Draw images of given classes with a distilled pixel-space transformer in 4 to 20 steps.

    The student knows where each step ends. Where its guidance scale is embedded there is one
    branch, and a step is one evaluation; else both branches run in one call, the conditional half
    first, as in `PixelDiTPipeline`. Steps are uniform in flow time, t_i = 1 - i / n.

    Args:
        transformer: predicts the average velocity; an ordinary `DiTTransformer2DModel`.
        conditioner: tells it the interval and the guidance scale.
        scheduler: `FlowMatchEulerDiscreteScheduler`; any other treats an average velocity as an
            instantaneous one and is refused.
    """

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        conditioner: IntervalConditioner,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__(transformer, scheduler)
        self.register_modules(conditioner=conditioner)
        self.conditioning = Conditioning(transformer, conditioner)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int],
        guidance_scale: float = 3.0,
        num_inference_steps: int = 10,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Float[Tensor, "B C H W"] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image per class label.

        Args:
            class_labels: labels in `[0, num_embeds_ada_norm)`, one per image.
            guidance_scale: guidance strength, within the range trained on.
            num_inference_steps: sampler steps; at least 1 / R.
            generator: source of the initial noise, one for all images or one per image.
            latents: initial noise, instead of drawing it.
            output_type: `pil`, `np` or `pt` (in [0, 1]), or `latent` (the raw sample in [-1, 1]).
            return_dict: return an `ImagePipelineOutput` instead of a tuple.

        Returns:
            The images.

        Raises:
            ValueError: a label is out of range, an interval is longer than trained on, the scale
                was not trained, or the scheduler is no Euler flow scheduler.
        """
        labels = self._check_labels(class_labels)
        self._check_scheduler()
        self._guidance_scale = guidance_scale
        latents = self._initial(labels, generator, latents)
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device=latents.device)
        times = self.scheduler.sigmas.to(latents.device)
        for t, r in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            self.conditioner.check(t - r, guidance_scale)
        classes = torch.tensor(labels, device=latents.device)
        steps = list(zip(self.scheduler.timesteps, times[:-1], times[1:], strict=True))
        for timestep, t, r in self.progress_bar(steps):
            u = self._average_velocity(latents, t, r, classes)
            latents = self.scheduler.step(u, timestep, latents, return_dict=False)[0]
        return self._finish(latents, output_type, return_dict)

    def _average_velocity(
        self,
        x_t: Float[Tensor, "B C H W"],
        t: Float[Tensor, ""],
        r: Float[Tensor, ""],
        classes: Int[Tensor, " B"],
    ) -> Float[Tensor, "B C H W"]:
        """The guided average velocity of one step."""
        embedded = None
        if self.conditioner.takes_guidance:
            embedded = t.new_full((len(x_t),), float(self.guidance_scale))
        branches = embedded is None and self.guidance_scale > 1
        if branches:
            null = torch.full_like(classes, self.transformer.config.num_embeds_ada_norm)
            x_t, classes = torch.cat([x_t, x_t]), torch.cat([classes, null])
        timestep = time_facts(self.transformer).time_scale * t
        with self.conditioning.at((t - r).expand(len(x_t)), embedded, same=True):
            u = self.transformer(
                x_t,
                timestep=timestep.expand(len(x_t)),
                class_labels=classes,
                return_dict=False,
            )[0]
        if not branches:
            return u
        u_cond, u_uncond = u.chunk(2)
        return u_uncond + self.guidance_scale * (u_cond - u_uncond)

    def _check_scheduler(self) -> None:
        euler = FlowMatchEulerDiscreteScheduler
        if getattr(type(self.scheduler), "step", None) is not euler.step:
            raise ValueError(
                f"the student predicts average velocities, which {type(self.scheduler).__name__} "
                "would take for instantaneous ones; use FlowMatchEulerDiscreteScheduler."
            )
