"""What the trainings by descent share: what they measure, their clock, and several processes."""

import math
import time

import torch
from torch import Tensor

from .processes import check_strategy
from .resuming import Resumable
from .verdict_callbacks import RivalsVerdict, Verdict


class Descent(Resumable):
    """A training whose measures are part of its checkpoint.

    Attributes:
        num_trajectories: trajectories trained on.
        fit_seconds: time spent in training batches, over all resumed runs.
        start_error: held-out error of the start, in dB; infinite until it is measured.
        val_error: held-out error after the newest epoch, in dB.
    """

    num_trajectories: Tensor
    fit_seconds: Tensor
    start_error: Tensor
    val_error: Tensor

    def configure_callbacks(self) -> list[Verdict]:
        """End the training with its verdict."""
        return [RivalsVerdict()]

    def add_measures(self) -> None:
        """Buffers of what is measured, which the checkpoint keeps."""
        self.register_buffer("num_trajectories", torch.tensor(0))
        for name in ("fit_seconds", "start_error", "val_error"):
            start = 0.0 if name == "fit_seconds" else math.inf
            self.register_buffer(name, torch.tensor(start, dtype=torch.float64))

    def on_train_start(self) -> None:
        """Start the clock: an epoch that is resumed in its middle does not begin."""
        check_strategy(self)
        self._started = time.perf_counter()

    def on_train_epoch_start(self) -> None:
        """Start the clock after validation."""
        self._started = time.perf_counter()

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Add the batch's time."""
        now = time.perf_counter()
        self.fit_seconds.add_(now - self._started)
        self._started = now
