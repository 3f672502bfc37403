"""TensorBoard, opening on what a fit tells."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

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
