"""A recording of a tiny guided DiT, and LESA modules, data and trainers on it."""

import functools
from pathlib import Path
from typing import Any

import lightning
import torch
from tiny_hosts import items, pipeline, settings

from foreseer.predictors.lesa import LesaPredictor
from foreseer.training.lesa.lesa_fit import LesaModule
from foreseer.trajectories.datamodule import RecordingDataModule
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

STEPS = 12
ANCHORS = (0, 1, 4, 8)
SMALL: dict[str, Any] = {"boundaries": (0.6,), "taps": (2, 3), "hidden": (4,), "grid_size": 3}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def factory(**changes: Any) -> functools.partial[LesaPredictor]:
    return functools.partial(LesaPredictor, **{**SMALL, **changes})


def make_recording(out: Path) -> Path:
    """Eight trajectories of the tiny guided DiT, with all features of the hidden tap."""
    call = settings("dit_guided", STEPS)
    options: dict[str, Any] = {"taps": ["hidden"], "features": "full", "batch_size": 4}
    return record(pipeline("dit_guided"), items("dit_guided", 8), out, **options, **call)


def module_for(recording: Path, **changes: Any) -> LesaModule:
    """A module on the tiny host, its pipeline given instead of loaded."""
    options: dict[str, Any] = {"predictor": factory(), "open_loop_epochs": 2} | changes
    module = LesaModule(str(recording), "none", ANCHORS, **options)
    module.pipe = pipeline("dit_guided")
    return module


def data_for(recording: Path, **changes: Any) -> RecordingDataModule:
    names = ["feature/hidden", "final"]
    options: dict[str, Any] = {"batch_size": 3, "validation_fraction": 0.3, "seed": 3} | changes
    return RecordingDataModule(recording, names, **options)


def trainer_for(max_epochs: int, **changes: Any) -> lightning.Trainer:
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False} | changes
    return lightning.Trainer(max_epochs=max_epochs, **QUIET, **options)


def synthetic(trajectories: int = 4, branches: int = 2) -> torch.Tensor:
    """Features that turn slowly, `(n, branches, S, tokens, channels)`."""
    t = torch.linspace(0, 1, STEPS)[:, None, None]
    a, b, c = torch.randn(3, trajectories, branches, 1, 5, 4)
    return a + b * t + c * torch.sin(3 * t)


def trained_predictor(recording: Path, **changes: Any) -> LesaPredictor:
    """One that forecasts unlike reuse."""
    header = Recording(recording).header
    predictor = factory(**changes)(header.sigmas, header.num_branches)
    with torch.no_grad():
        predictor.weight.normal_(std=0.2)
        predictor.offset.normal_(std=0.02)
    return predictor


def data_items(recording: Path) -> tuple[list[int], list[int]]:
    data = data_for(recording)
    data.setup()
    return data.train_items, data.val_items
