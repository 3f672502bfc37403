"""Script: train LESA and DisCa on recordings, alone or as one of several processes.

Usage: ddp_training.py LESA_RECORDING DISCA_RECORDING OUT [OTHER], with or without torchrun. Writes
the state of every training after its last update to OUT/<name>-<rank>.pt, as this rank sees it,
and a checkpoint after the first batch of its second epoch to OUT/<name>.ckpt. Some also go on from
the checkpoints in OTHER, of another number of processes, to OUT/crossed_<name>-<rank>.pt.
"""

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lesa_training_cases import QUIET, factory
from test_disca import ANCHORS, NAMES, STEPS
from test_disca import module_for as disca_module
from tiny_hosts import pipeline

from foreseer.training.disca import disca_fit as disca
from foreseer.training.lesa.lesa_fit import LesaModule
from foreseer.training.plumbing.resuming import UNUSED
from foreseer.trajectories.datamodule import RecordingDataModule
from foreseer.trajectories.recording import Recording

LESA_ANCHORS = (0, 1, 4, 8)
PHASES: dict[str, dict[str, Any]] = {
    "lesa_feature": {"open_loop_epochs": 2, "closed_loop_epochs": 1, "steps_per_update": 2},
    "lesa_sample": {
        "open_loop_epochs": 1,
        "closed_loop_epochs": 2,
        "closed_loop_target": "sample",
        "shuffle_steps": True,
    },
    "disca": {"mse_epochs": 1, "gan_epochs": 2, "closed_epochs": 1, "order": 1},
}
CROSSED = ("lesa_sample", "disca")
EPOCHS = {"lesa_feature": 3, "lesa_sample": 3, "disca": 4}


def made(name: str, recording: str) -> tuple[lightning.LightningModule, RecordingDataModule]:
    """A module and its data; a batch is 4 trajectories over all processes."""
    lightning.seed_everything(0, verbose=False)
    if name == "disca":
        module: Any = disca_module(Path(recording), **PHASES[name])
        module.adversary.accuracy.fill_(1.0)  # so that its verdict counts from the first update
        module.configure_optimizers = partial(above_rounding, module.configure_optimizers)
        return module, RecordingDataModule(recording, NAMES, 4, 0.25, 3)
    predictor = factory()
    module = LesaModule(recording, "none", LESA_ANCHORS, predictor, **PHASES[name])
    module.pipe = pipeline("dit_guided")
    return module, RecordingDataModule(recording, ["feature/hidden", "final"], 4, 0.3, 3)


def above_rounding(configure: Callable[[], Any]) -> Any:
    """Optimizers that a gradient of the size of its rounding moves by next to nothing.

    Adam divides by a gradient's size: without this, rows whose gradient is nothing but rounding
    move by the whole rate, in a direction that differs from one processor to the next.
    """
    made = configure()
    for optimizer in made if isinstance(made, list | tuple) else [made]:
        for group in optimizer.param_groups:
            group["eps"] = 1e-5
    return made


class MidEpoch(lightning.Callback):
    """Saves a checkpoint in the middle of the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: lightning.Trainer, *arguments: Any) -> None:
        """Save after its first batch."""
        if trainer.current_epoch == 1 and arguments[-1] == 0:
            trainer.save_checkpoint(self.path)


def train(name: str, recording: str, out: Path, start: Path | None = None) -> None:
    """Train, from a checkpoint if there is one, and save what came of it."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    module, data = made(name, recording)
    strategy = UNUSED if world > 1 else "auto"
    trainer = lightning.Trainer(
        max_epochs=EPOCHS[name],
        devices=world,
        strategy=strategy,
        enable_checkpointing=False,
        callbacks=[] if start else [MidEpoch(out / f"{name}.ckpt")],
        **{"logger": False, **QUIET},
    )
    trainer.fit(module, datamodule=data, ckpt_path=start)
    kept = {
        "state": module.state_dict(),
        "start": module.start_error,
        "metrics": {n: v for n, v in trainer.callback_metrics.items() if n.startswith("val/")},
        "steps": trainer.global_step,
        "anchors": [ANCHORS, STEPS],
        "items": len(Recording(recording)),
    }
    prefix = "crossed_" if start else ""
    torch.save(kept, out / f"{prefix}{name}-{trainer.global_rank}.pt")


def main(lesa: str, disca_recording: str, out: Path, other: Path | None) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    disca.opened_for = lambda *_, **__: pipeline("dit_guided")  # type: ignore[assignment]
    for name in PHASES:
        recording = disca_recording if name == "disca" else lesa
        train(name, recording, out)
        if other and name in CROSSED:
            train(name, recording, out, other / f"{name}.ckpt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]) if sys.argv[4:] else None)
