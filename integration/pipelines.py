"""Load a pipeline from its folder, the bundled ones by name."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..checkpoints.zoo import resolve
from .pixel_pipeline import PixelDiTPipeline
from .student_pipeline import StudentPipeline

OURS = {each.__name__: each for each in (PixelDiTPipeline, StudentPipeline)}


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_pipeline(name: str, dtype: torch.dtype = torch.float32, device: str | None = "cpu") -> Any:
    """A pipeline in diffusers format.

    Args:
        name: a folder, `zoo:<name>` for a bundled one, or a hub repository `owner/name`.
        dtype: dtype of the weights.
        device: where to put it; None takes a GPU where there is one.

    Raises:
        FileNotFoundError: the folder is missing or is no pipeline.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if HUB_NAME.fullmatch(name) and not Path(name).exists():
        pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype)
    else:
        pipe = _from_folder(resolve(name), dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _from_folder(folder: Path, dtype: torch.dtype) -> Any:
    index = folder / "model_index.json"
    if not index.exists():
        raise FileNotFoundError(f"{folder} has no model_index.json; expected a diffusers pipeline.")
    name = json.loads(index.read_text()).get("_class_name")
    pipeline_class = OURS.get(name, DiffusionPipeline)
    return pipeline_class.from_pretrained(folder, dtype=dtype, low_cpu_mem_usage=False)
