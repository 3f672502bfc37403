"""Readout fits on a pipeline at hand, for refits, benchmarks and many of them in a search."""

from collections.abc import Sequence
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from foreseer.training.plumbing.progress import quiet
from foreseer.training.readout.readout_fit import Detaching, ReadoutFit
from foreseer.trajectories.datamodule import ItemsDataModule


def run_fit(module: ReadoutFit, pipe: Any, data: ItemsDataModule) -> None:
    """Let a trainer without logs and checkpoints run a fit on a pipeline that is at hand."""
    module.pipe = pipe
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with quiet():
        trainer.fit(module, datamodule=data)


def held_out_error(
    pipe: Any, recording: str, anchors: Sequence[int], num_trajectories: int
) -> float:
    """Error in dB of a readout on the quarter of some trajectories that it was not fitted on.

    Args:
        pipe: the recorded pipeline.
        recording: folder of the recording, with states.
        anchors: steps at which the network runs.
        num_trajectories: of the recording, from the first on.
    """
    module = QuietFit(recording, "", anchors)
    run_fit(module, pipe, ItemsDataModule(recording, 0.25, num_trajectories=num_trajectories))
    return float(module.val_error)


class QuietFit(ReadoutFit):
    """A fit among many, which says nothing and is measured against nothing."""

    quiet = True

    def configure_callbacks(self) -> list[Callback]:
        """No verdict."""
        return [Detaching()]

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Say nothing."""
