"""The callbacks that a readout fit brings: its verdict, and its end after an interruption."""

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from foreseer.training.verdict_callbacks import RivalsVerdict


class Detaching(Callback):
    """Takes the hooks of a fit off after an interruption, of which Lightning tells no module."""

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Take them off."""
        detach: Any = pl_module.detach  # the fit brings this callback
        detach()


class LastVerdict(RivalsVerdict):
    """The verdict of a readout fit: rivals are run once the walk leaves the pipeline free."""

    def error(self, trainer: lightning.Trainer, module: Any) -> float:
        """The fit has measured it: its validation chooses nothing."""
        return float(module.val_error)

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Keep the formulas' errors in the checkpoints of a finished fit."""
        if pl_module.finished:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
