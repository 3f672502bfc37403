"""Load a pipeline from its folder, the bundled ones by name."""

import json
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..checkpoints.zoo import resolve
from .pixel_pipeline import PixelDiTPipeline
from .student_pipeline import StudentPipeline

OURS = {each.__name__: each for each in (PixelDiTPipeline, StudentPipeline)}


def load_pipeline(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline in diffusers format.

    Args:
        name: a folder, or `zoo:<name>` for a bundled one.
        dtype: dtype of the weights.

    Raises:
        FileNotFoundError: the folder is missing or is no pipeline.
    """
    folder = resolve(name)
    index = folder / "model_index.json"
    if not index.exists():
        raise FileNotFoundError(f"{folder} has no model_index.json; expected a diffusers pipeline.")
    name = json.loads(index.read_text()).get("_class_name")
    pipeline_class = OURS.get(name, DiffusionPipeline)
    pipe = pipeline_class.from_pretrained(folder, dtype=dtype, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
