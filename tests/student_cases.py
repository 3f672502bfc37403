"""Tiny students, their pipelines and the runs of their teachers."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_hosts import seeded, tiny_dit

from foreseer.distill.teacher_runs import TeacherRuns
from foreseer.integration.pipelines.average_velocity import IntervalConditioner, conditioner_for
from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline
from foreseer.integration.pipelines.student_pipeline import StudentPipeline

STEPS = 10
RANGE = {"max_interval": 0.25, "min_guidance": 1.0, "max_guidance": 4.0}


def awake(conditioner: IntervalConditioner, seed: int = 5) -> IntervalConditioner:
    """A conditioner whose last layer is not zero."""
    with torch.no_grad():
        conditioner.outer.weight.normal_(std=0.05, generator=seeded(seed))
    return conditioner


def student_pipeline(embed_guidance: bool = True) -> StudentPipeline:
    """A student around the tiny DiT, with random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    transformer = tiny_dit()
    conditioner = awake(conditioner_for(transformer, **RANGE, embed_guidance=embed_guidance))
    pipe = StudentPipeline(transformer, conditioner, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_teacher(folder: Path) -> str:
    """The tiny DiT as a pipeline folder."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    PixelDiTPipeline(tiny_dit(), FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    return str(folder)


def save_flux_conditions(path: Path) -> str:
    """What three prompts are to the tiny Flux."""
    conditions = {
        f"{kind}.{name}": torch.randn(3, *shape, generator=seeded(len(kind) + len(name)))
        for kind in ("own", "null")
        for name, shape in (("encoder_hidden_states", (3, 12)), ("pooled_projections", (12,)))
    }
    grid = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij"), -1)
    image = torch.cat([torch.zeros(4, 1), grid.reshape(4, 2).float()], 1)
    save_file(conditions | {"shared.img_ids": image, "shared.txt_ids": torch.zeros(3, 3)}, path)
    return str(path)


def runs_for(folder: Path, pipeline: str, **changes: Any) -> TeacherRuns:
    """Few short runs of a tiny teacher."""
    options: dict[str, Any] = {
        "num_runs": 6,
        "num_validation": 2,
        "num_inference_steps": STEPS,
        "runs_per_file": 4,
        "batch_size": 3,
    }
    return TeacherRuns(str(folder), pipeline, **(options | changes))
