"""What a person sees of a training, and how long it lasts: a bar, TensorBoard, a clock."""

import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm.auto import tqdm

QUIET_SECONDS = 2  # before the bar shows
LOGGERS = ("lightning.pytorch", "lightning.fabric")


class Progress(Callback):
    """A bar over the batches of all epochs, which shows after two seconds."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Open it; a fit that ends by itself has no known end before this."""
        epochs = trainer.max_epochs
        total = epochs * int(trainer.num_training_batches) if epochs and epochs > 0 else None
        name = getattr(pl_module, "fit_name", "fit")
        self.bar = tqdm(total=total, desc=name, unit="batch", delay=QUIET_SECONDS, leave=False)

    def on_train_batch_end(self, *told: Any) -> None:
        """Count the batch."""
        self.bar.update()

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Close it."""
        self.bar.close()

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Close it, if it was opened."""
        if self.bar is not None:
            self.bar.close()


def watched(batches: Iterable[Any], name: str) -> Iterable[Any]:
    """Batches under a bar of that name, which shows after two seconds."""
    watched_batches: Iterable[Any] = tqdm(
        batches, name, unit="batch", delay=QUIET_SECONDS, leave=False
    )
    return watched_batches


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Lightning says about devices, loggers and its own deprecations."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


UNTOLD = "epoch"  # a straight line over the steps, which Lightning adds to all that is logged


class Board(TensorBoardLogger):
    """Lightning's logger without `hp_metric`, which is always -1, and without the epoch's line.

    Args:
        save_dir: folder of all logs.
        name: folder of these fits in it.
        version: folder of this fit in that.
    """

    def __init__(
        self, save_dir: str, name: str | None = "fit", version: int | str | None = None
    ) -> None:
        super().__init__(save_dir, name, version, default_hp_metric=False)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write numbers down, but not which epoch it is."""
        super().log_metrics({k: v for k, v in metrics.items() if k != UNTOLD}, step)


class LastUpdate(Callback):
    """Write `last.ckpt` after the update at which a training stops.

    Lightning writes it every so many updates and not at the end, so what the last ones learned, at
    the lowest rate, was lost. It stands behind all other callbacks.
    """

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write it, if this was the last one."""
        for saver in trainer.checkpoint_callbacks if trainer.should_stop else ():
            if isinstance(saver, ModelCheckpoint) and saver.last_model_path:
                trainer.save_checkpoint(saver.last_model_path)


class ClockCosine(Callback):
    """Cosine learning-rate schedule on the wall clock that stops training when the budget is spent.

    rate(p) = rate_0 * (floor + (1 - floor) * (1 + cos(pi p)) / 2), where p is the share of the
    decay that has passed, after a linear warm-up over `warmup_steps`. With `decay_minutes` the rate
    stays at rate_0 until so much of the budget is left (warm-up, stable, decay: Hu et al., arXiv
    2404.06395, with a cosine): a run can then be given a longer budget, or be brought to its end,
    whenever it is resumed. The elapsed time is part of the checkpoint, so a resumed run goes on
    where it stopped. The last update is in the checkpoint that the trainer keeps.

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
        found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [*found, LastUpdate()]  # type: ignore[attr-defined]

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
