"""Readout fits on tiny hosts, and what their walks and their deployed runs pass through."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from foreseer.evaluation import measure
from foreseer.evaluation.measure import References
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.observers import Observer, StepRecord
from foreseer.integration.session import Session
from foreseer.predictors.readout import Readout
from foreseer.training.readout.readout_fit import ReadoutFit
from foreseer.training.readout.walk import Walk
from foreseer.trajectories.datamodule import ItemsDataModule
from foreseer.trajectories.prompts import Item, generate_batch
from foreseer.trajectories.recorder import record

ANCHORS = [0, 2, 5]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def recorded(pipe: Any, items: list[Item], folder: Path, settings: dict[str, Any]) -> str:
    """A recording with states."""
    return str(record(pipe, items, folder, batch_size=2, states=True, **settings))


def remember(items: list[Item], monkeypatch: Any) -> None:
    """Let fits have inputs that are tensors, of which recordings keep a digest only."""
    monkeypatch.setattr(measure, "item_of", lambda recording, index: items[index])


def module_of(
    recording: str, pipe: Any, anchors: list[int] = ANCHORS, rank: int = 4, **options: Any
) -> ReadoutFit:
    """A fit of a pipeline at hand, two trajectories at a time."""
    options = {"first_times": 2} | options
    module = ReadoutFit(recording, "none", anchors, rank, batch_size=2, **options)
    module.pipe = pipe
    return module


def trainer_of(*callbacks: lightning.Callback, **changes: Any) -> lightning.Trainer:
    settings = {**QUIET, "max_epochs": -1, "enable_checkpointing": False, **changes}
    return lightning.Trainer(callbacks=list(callbacks), **settings)


def fit(module: ReadoutFit, validation_fraction: float = 0.0) -> ReadoutFit:
    """Run a fit on all trajectories but those held out."""
    data = ItemsDataModule(module.recording.folder, validation_fraction, batch_size=2)
    trainer_of().fit(module, datamodule=data)
    return module


class Visits:
    """The latents at every anchor that the walk of a fit visited, batch by batch."""

    def __init__(self, monkeypatch: Any) -> None:
        self.states: dict[int, list[Tensor]] = {}
        on_step, visits = Walk.on_step, self.states

        def stepping(self: Walk, record: StepRecord) -> None:
            if record.index == self.goal:
                visits.setdefault(record.index, []).append(record.before.clone())
            on_step(self, record)

        monkeypatch.setattr(Walk, "on_step", stepping)


class Passing(Observer):
    """Keeps the latents at every anchor of a deployed run."""

    def __init__(self, anchors: Sequence[int]) -> None:
        self.anchors = anchors

    def on_step(self, record: StepRecord) -> None:
        """Keep the state."""
        if record.index == 0:
            self.states: dict[int, Tensor] = {}
        if record.index in self.anchors:
            self.states[record.index] = record.before.clone()


@torch.no_grad()
def deployed_states(pipe: Any, predictor: Readout, references: References) -> list[dict]:
    """The latents at the anchors of real runs, batch by batch."""
    passing = Passing(predictor.anchors)
    session = Session(pipe, Forecaster(predictor, "output", predictor.anchors), [passing])
    found = []
    for batch in references.batches:
        generate_batch(pipe, batch, output_type="latent", **references.settings)
        found.append(passing.states)
    session.detach()
    return found
