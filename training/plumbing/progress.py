"""Fits without Lightning's advertisements: a bar where one takes long, and nothing else."""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
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
