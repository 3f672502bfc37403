"""The pipelines of distilled students, with guidance embedded or in two branches.

Shapes: B batch, C channels, H height, W width.
Convention: x_r = x_t - (t - r) u(x_t, r, t), an Euler step with an average velocity.
"""

import inspect
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    WanTransformer3DModel,
)
from jaxtyping import Float, Int
from torch import Tensor

from foreseer.integration.host.trunk import UnsupportedHost, time_facts
from foreseer.integration.pipelines.average_velocity import Conditioning, IntervalConditioner
from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline
from foreseer.integration.pipelines.sentence_encoder import SentenceEncoder
from foreseer.integration.pipelines.sentence_wan_pipeline import SentenceWanPipeline


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
        check_scheduler(self.scheduler)
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


class StudentWanPipeline(SentenceWanPipeline):
    """Draw videos of prompts with a distilled transformer, in the loop of Wan's own pipeline.

    The student knows where each step ends: its conditioner looks that up in the scheduler's times,
    which are the teacher's. Where its guidance scale is embedded, there is one branch.

    Args:
        tokenizer: None; the encoder has its own.
        text_encoder: encodes prompts.
        vae: decodes latents.
        scheduler: `FlowMatchEulerDiscreteScheduler`, as in `StudentPipeline`.
        conditioner: tells the transformer the interval and the guidance scale.
        transformer: predicts the average velocity; an ordinary `WanTransformer3DModel`.
        transformer_2: None; a student is one network.
        boundary_ratio: None.
        expand_timesteps: False.
        sample_size: side in pixels that was trained on.
        num_frames: frames that were trained on.
    """

    def __init__(
        self,
        tokenizer: None,
        text_encoder: SentenceEncoder,
        vae: AutoencoderKLWan,
        scheduler: FlowMatchEulerDiscreteScheduler,
        conditioner: IntervalConditioner,
        transformer: WanTransformer3DModel,
        transformer_2: None = None,
        boundary_ratio: None = None,
        expand_timesteps: bool = False,
        sample_size: int = 32,
        num_frames: int = 17,
    ) -> None:
        given = (tokenizer, text_encoder, vae, scheduler, transformer)
        super().__init__(*given, sample_size=sample_size, num_frames=num_frames)
        self.register_modules(conditioner=conditioner)
        self.conditioning = Conditioning(transformer, conditioner)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether there is a second branch: never where the scale is embedded."""
        return super().do_classifier_free_guidance and not self.conditioner.takes_guidance

    def __call__(  # type: ignore[override]  # the rest by keyword
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        **settings: Any,
    ) -> Any:
        """Draw one video per prompt.

        Args:
            prompt: one prompt or several; None where `prompt_embeds` are given.
            num_inference_steps: sampler steps, none of them longer than R.
            guidance_scale: guidance strength, within the range trained on.
            settings: the further arguments of `SentenceWanPipeline`.

        Returns:
            The videos.

        Raises:
            ValueError: an interval is longer than trained on, the scale was not trained, or the
                scheduler is no Euler flow scheduler.
        """
        check_scheduler(self.scheduler)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        times = self.scheduler.sigmas.clone()
        for t, r in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            self.conditioner.check(t - r, guidance_scale)
        embedded = guidance_scale if self.conditioner.takes_guidance else None
        given: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
        }
        with self.conditioning.along(times, embedded):
            return super().__call__(prompt, **given, **settings)


STUDENTS = {PixelDiTPipeline: StudentPipeline, SentenceWanPipeline: StudentWanPipeline}
"""Pipelines whose students can be drawn from, and the students' own."""


def student_of(pipe: Any, conditioner: IntervalConditioner) -> Any:
    """The pipeline of a student, with the components of its teacher's but for the transformer.

    Args:
        pipe: the teacher's pipeline, whose transformer has the student's weights by now.
        conditioner: tells it the interval and the guidance scale.

    Raises:
        UnsupportedHost: no pipeline of ours draws from such a student.
    """
    if type(pipe) not in STUDENTS:
        known = ", ".join(each.__name__ for each in STUDENTS)
        raise UnsupportedHost(
            f"found a {type(pipe).__name__}; students can be drawn from where the teacher is a "
            f"{known}. Its checkpoint is whole: add the pipeline's student to STUDENTS."
        )
    kind = STUDENTS[type(pipe)]
    taken = inspect.signature(kind).parameters
    given = {**pipe.config, **pipe.components}
    parts = {name: value for name, value in given.items() if name in taken}
    return kind(**parts, conditioner=conditioner)


def check_scheduler(scheduler: Any) -> None:
    """Raise unless a scheduler treats an average velocity as one.

    Raises:
        ValueError: it is no Euler flow scheduler.
    """
    euler = FlowMatchEulerDiscreteScheduler
    if getattr(type(scheduler), "step", None) is not euler.step:
        raise ValueError(
            f"the student predicts average velocities, which {type(scheduler).__name__} "
            "would take for instantaneous ones; use FlowMatchEulerDiscreteScheduler."
        )
