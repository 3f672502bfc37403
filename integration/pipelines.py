"""Load a pipeline from its folder, the bundled ones by name."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .pixel_pipeline import PixelDiTPipeline

ZOO = Path(__file__).resolve().parents[1] / "checkpoints" / "zoo"
"""Folder of the bundled pipelines and predictors."""


def resolve(name: str) -> Path:
    """The folder a name stands for: a path, or a bundled one such as `zoo:fashion_dit`.

    Raises:
        FileNotFoundError: nothing is there.
    """
    folder = ZOO / name.removeprefix("zoo:") if name.startswith("zoo:") else Path(name)
    if not folder.is_dir():
        bundled = sorted(f"zoo:{path.name}" for path in ZOO.iterdir() if path.is_dir())
        raise FileNotFoundError(f"no folder {folder}; bundled are {', '.join(bundled) or 'none'}.")
    return folder


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
    ours = json.loads(index.read_text()).get("_class_name") == PixelDiTPipeline.__name__
    pipeline_class = PixelDiTPipeline if ours else DiffusionPipeline
    pipe = pipeline_class.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
