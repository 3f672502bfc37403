"""Lightning callbacks: a learning rate and a stop on the wall clock, and sample grids."""

import math
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback


class ClockCosine(Callback):
    """Cosine learning-rate schedule on the wall clock that stops training when the budget is spent.

    rate(p) = rate_0 * (floor + (1 - floor) * (1 + cos(pi p)) / 2), p = elapsed / budget, after a
    linear warm-up over `warmup_steps`. The elapsed time is part of the checkpoint, so a resumed run
    goes on where it stopped.

    Args:
        minutes: wall-clock budget over all resumed runs, in minutes.
        warmup_steps: optimiser steps of linear warm-up.
        floor: final rate relative to the initial one.
    """

    def __init__(self, minutes: float, warmup_steps: int = 100, floor: float = 0.01) -> None:
        self.budget_s = 60.0 * minutes
        self.warmup_steps = warmup_steps
        self.floor = floor
        self.elapsed_s = 0.0
        self._last = 0.0

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Start the clock."""
        self._last = time.monotonic()

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Set this step's learning rate."""
        now = time.monotonic()
        self.elapsed_s += now - self._last
        self._last = now
        progress = min(1.0, self.elapsed_s / self.budget_s)
        decay = self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2
        factor = decay * min(1.0, (trainer.global_step + 1) / self.warmup_steps)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * optimizer.defaults["lr"]
        pl_module.log("train/learning_rate", factor * trainer.optimizers[0].defaults["lr"])
        pl_module.log("train/elapsed_minutes", self.elapsed_s / 60)
        trainer.should_stop = trainer.should_stop or progress >= 1.0

    def state_dict(self) -> dict[str, Any]:
        """The time spent so far."""
        return {"elapsed_s": self.elapsed_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the time already spent."""
        self.elapsed_s = state_dict["elapsed_s"]


class SampleGrid(Callback):
    """Draw a grid of samples, one row per class, into TensorBoard every few steps.

    Args:
        every_n_steps: optimiser steps between grids.
        columns: samples per class.
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
        if trainer.global_step % self.every_n_steps or trainer.logger is None:
            return
        images = self.sample(pl_module)
        grid = images.reshape(-1, self.columns, *images.shape[1:])
        grid = torch.cat([torch.cat(list(row), dim=-1) for row in grid], dim=-2)
        logger: Any = trainer.logger  # only TensorBoard's has an `experiment` that takes images
        logger.experiment.add_image("samples", grid, trainer.global_step)

    @torch.no_grad()
    def sample(self, pl_module: Any) -> torch.Tensor:
        """Images `(classes * columns, C, H, W)` in [0, 1], one class after another, seed 0."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        from ..integration.pixel_pipeline import PixelDiTPipeline

        transformer = pl_module.transformer
        pipe: Any = PixelDiTPipeline(transformer, FlowMatchEulerDiscreteScheduler())
        pipe.set_progress_bar_config(disable=True)
        was_training = transformer.training
        transformer.eval()
        labels = [label for label in range(pl_module.num_classes) for _ in range(self.columns)]
        images = pipe(
            labels,
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.num_inference_steps,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        transformer.train(was_training)
        return images
