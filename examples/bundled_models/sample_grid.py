"""Grids of samples in TensorBoard while a bundled model trains, as a Lightning callback."""

from typing import Any

import lightning
from flow_teacher import FlowTeacher
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger


class SampleGrid(Callback):
    """Draw a grid of a teacher's samples, a row per class or one of each prompt, every few steps.

    It goes into TensorBoard; a run without `TensorBoardLogger` draws none. With a `WeightAveraging`
    callback in the trainer the averaged weights draw, as they do in validation: its validation
    hooks swap them in and out. After n steps an average with decay d still holds a share d^n of
    the initial weights, so the first grids show noise.

    Args:
        every_n_steps: optimiser steps between grids.
        columns: samples per row.
        num_inference_steps: sampler steps per grid.
        guidance_scale: classifier-free guidance scale.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        columns: int = 8,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.columns = columns
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Draw when the step count asks for it."""
        logger = trainer.logger
        if trainer.global_step % self.every_n_steps or not isinstance(logger, TensorBoardLogger):
            return
        if not isinstance(pl_module, FlowTeacher):
            raise TypeError(f"SampleGrid draws a FlowTeacher, got {type(pl_module).__name__}.")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averages = [each for each in callbacks if isinstance(each, WeightAveraging)]
        for average in averages:
            average.on_validation_epoch_start(trainer, pl_module)
        pl_module.transformer.eval()
        try:
            grid = pl_module.sample_grid(
                self.columns, self.num_inference_steps, self.guidance_scale
            )
        finally:
            pl_module.transformer.train()
            for average in averages:
                average.on_validation_epoch_end(trainer, pl_module)
        logger.experiment.add_image("samples", grid, trainer.global_step)
