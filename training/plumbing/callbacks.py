"""A learning rate and a stop on the wall clock, as a Lightning callback."""

import math
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback


class ClockCosine(Callback):
    """Cosine learning-rate schedule on the wall clock that stops training when the budget is spent.

    rate(p) = rate_0 * (floor + (1 - floor) * (1 + cos(pi p)) / 2), where p is the share of the
    decay that has passed, after a linear warm-up over `warmup_steps`. With `decay_minutes` the rate
    stays at rate_0 until so much of the budget is left (warm-up, stable, decay: Hu et al., arXiv
    2404.06395, with a cosine): a run can then be given a longer budget, or be brought to its end,
    whenever it is resumed. The elapsed time is part of the checkpoint, so a resumed run goes on
    where it stopped.

    Args:
        minutes: wall-clock budget over all resumed runs, in minutes.
        warmup_steps: optimiser steps of linear warm-up.
        floor: final rate relative to the initial one.
        decay_minutes: the last minutes of the budget, in which the rate falls; None: all of it.

    Raises:
        ValueError: `decay_minutes` is not in (0, minutes].
    """

    def __init__(
        self,
        minutes: float,
        warmup_steps: int = 100,
        floor: float = 0.01,
        decay_minutes: float | None = None,
    ) -> None:
        if decay_minutes is not None and not 0 < decay_minutes <= minutes:
            raise ValueError(
                f"decay_minutes is {decay_minutes}, expected more than 0 and at most the {minutes} "
                "of `minutes`: the rate falls in the last part of the budget."
            )
        self.budget_s = 60.0 * minutes
        self.decay_s = self.budget_s if decay_minutes is None else 60.0 * decay_minutes
        self.warmup_steps = warmup_steps
        self.floor = floor
        self.elapsed_s = 0.0
        self._last = 0.0

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Start the clock; where nothing of the budget is left, train no more."""
        self._last = time.monotonic()
        trainer.should_stop = trainer.should_stop or self.elapsed_s >= self.budget_s

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
        left = min(self.decay_s, max(0.0, self.budget_s - self.elapsed_s))
        progress = 1 - left / self.decay_s
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
