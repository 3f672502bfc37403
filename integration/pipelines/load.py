"""Load a pipeline from its folder, the bundled ones by name."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import is_accelerate_available, logging

from foreseer.checkpoints.strict import parse_json, read_plain
from foreseer.checkpoints.zoo import beside, resolve
from foreseer.errors import meant
from foreseer.integration.host.hosts import TURNS
from foreseer.integration.pipelines.pixel_pipeline import (
    PixelDiTPipeline,
    PixelFluxPipeline,
    PixelUNetPipeline,
)
from foreseer.integration.pipelines.sentence_wan_pipeline import SentenceWanPipeline
from foreseer.integration.pipelines.student_pipeline import StudentPipeline, StudentWanPipeline
from foreseer.moved import MOVED

OURS = {
    each.__name__: each
    for each in (
        PixelDiTPipeline,
        PixelFluxPipeline,
        PixelUNetPipeline,
        SentenceWanPipeline,
        StudentPipeline,
        StudentWanPipeline,
    )
}
INDEX_FILE = "model_index.json"
DTYPE = (
    "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"
)
"""Keyword of `from_pretrained`; the other one is left out without a word."""
MAX_INDEX_BYTES = 1_000_000
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FACTORY = re.compile(r"(?!zoo:)([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


def load_pipeline(
    name: str, dtype: torch.dtype | str = torch.float32, device: str | None = "cpu"
) -> Any:
    """A pipeline in diffusers format, of safetensors only: no pickle and no code of its own is run.

    Args:
        name: a folder, `zoo:<name>` for a bundled one, a hub repository `owner/name`, or
            `package.module:factory` for a function of yours that makes one.
        dtype: dtype of the weights, or its name; a factory that takes no `dtype` decides itself.
        device: where to put it; None takes a GPU where there is one; a factory that takes no
            `device` decides itself.

    Raises:
        FileNotFoundError: the folder is missing, is no pipeline, or has no safetensors.
        ValueError: it asks for code of its own, its index is malformed, or there is no such
            factory, or it makes no pipeline; or torch has no such dtype or device here.
    """
    dtype = floating(dtype)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    if factory := FACTORY.fullmatch(name):
        return _made(factory[1], factory[2], {"dtype": dtype, "device": device})
    try:
        if HUB_NAME.fullmatch(name) and not Path(name).exists():
            pipe = _from_hub(name, dtype)
        else:
            with no_bar() if name.startswith("zoo:") else nullcontext():
                pipe = _from_folder(resolve(name), dtype)
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise FileNotFoundError(
            f"{name} has weights that are no safetensors ({str(error)[:300]}); a pickle is never "
            "opened here. If you trust it, load it with diffusers and write it again with "
            "pipe.save_pretrained(FOLDER)."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    pipe.register_to_config(_name_or_path=name)  # as given: a bundled one's name, not its place
    return pipe.to(device)


def opened(pipeline: Any, dtype: torch.dtype | str = "float32", device: str | None = None) -> Any:
    """A pipeline, given itself or by its name.

    Args:
        pipeline: a pipeline, which is taken as it is, or the name of one to load.
        dtype: dtype of the weights of one that is loaded.
        device: where to put one that is loaded; None takes a GPU where there is one.

    Raises:
        FileNotFoundError: see `load_pipeline`.
        ValueError: see `load_pipeline`.
    """
    if isinstance(pipeline, str | os.PathLike):
        return load_pipeline(os.fspath(pipeline), dtype, device)
    return pipeline


def device_of(pipe: Any) -> torch.device:
    """Where a pipeline runs, offloaded or not."""
    return torch.device(getattr(pipe, "_execution_device", None) or pipe.device)


def _made(module: str, function: str, wanted: dict[str, Any]) -> Any:
    """What a factory of the user's makes; modules of the working directory are found too.

    Raises:
        ValueError: there is no such function, or what it returns has no transformer and scheduler.
    """
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"there is no {module}:{function} ({error}); expected package.module:factory, a "
            "function without required arguments that returns a pipeline."
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    takes = inspect.signature(factory).parameters
    pipe = factory(**{name: value for name, value in wanted.items() if name in takes})
    if not any(hasattr(pipe, name) for name in TURNS) or not hasattr(pipe, "scheduler"):
        raise ValueError(
            f"{module}:{function} returned {type(pipe).__name__}, expected a pipeline with a "
            "transformer and a scheduler."
        )
    return pipe


def floating(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype of weights, given itself or by its name.

    Raises:
        ValueError: torch has none of that name, or it is not of floating point.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype is {str(dtype)!r}, expected 'float32', 'bfloat16' or 'float16', or torch's own."
        )
    return found


def check_device(device: str) -> None:
    """Raise unless torch can use a device here.

    Raises:
        ValueError: it is no device, or a GPU that torch does not find.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(
            f"device is {device!r}, expected 'cpu', 'cuda' or 'cuda:<number>'."
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is {device!r}, and torch {torch.__version__} finds no GPU here; leave device "
            "out to run on the CPU, or install torch for your driver."
        )


def _from_hub(name: str, dtype: torch.dtype) -> Any:
    try:
        return DiffusionPipeline.from_pretrained(
            name, **{DTYPE: dtype}, use_safetensors=True, trust_remote_code=False
        )
    except OSError as error:
        if "safetensors" in str(error):
            raise
        told = str(error).strip().splitlines()
        raise FileNotFoundError(
            f"no folder {name} here{meant(name, beside(Path(name))).rstrip('.')}, and the hub's "
            f"{name} could not be had ({told[0] if told else type(error).__name__}); check the "
            "name, the network and HF_HUB_OFFLINE, or give a folder."
        ) from error


@contextmanager
def no_bar() -> Iterator[None]:
    """Let diffusers load without its bar: a bundled pipeline takes a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _from_folder(folder: Path, dtype: torch.dtype) -> Any:
    index = folder / INDEX_FILE
    if not index.exists():
        raise FileNotFoundError(f"{folder} has no {INDEX_FILE}; expected a diffusers pipeline.")
    # Without accelerate it cannot be had, and diffusers would warn; Wan in half precision needs it.
    return _class_of(index).from_pretrained(
        folder,
        **{DTYPE: dtype},
        low_cpu_mem_usage=is_accelerate_available(),
        use_safetensors=True,
        trust_remote_code=False,
    )


def _class_of(index: Path) -> Any:
    """The class to load a pipeline by: one of ours, or the diffusers one that finds the rest."""
    try:
        values = parse_json(read_plain(index, MAX_INDEX_BYTES))
    except ValueError as error:
        raise ValueError(f"{index} cannot be read: {error}; download it again.") from error
    name = values.get("_class_name") if isinstance(values, dict) else None
    if not isinstance(name, str):
        raise ValueError(
            f"{index}: _class_name is {str(name)[:100]!r}, expected the name of a class: a "
            "pipeline with code of its own is not loaded. Build it yourself and pass the object."
        )
    for entry in values.values():
        old = entry[0] if isinstance(entry, list) and entry else None
        new = MOVED.get(str(old).removeprefix("foreseer."))
        if new is not None:  # diffusers looks among imported modules for one that is not its own
            sys.modules[str(old)] = importlib.import_module(f"foreseer.{new}")
    return OURS.get(name, DiffusionPipeline)
