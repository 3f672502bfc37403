"""What the fits on Grams share: held-out errors over batches, and what several processes need.

Shapes: n trajectories, S sampling steps.
"""

from typing import Any

import lightning
import torch
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.training.predictor_fit import PredictorFit

ONE_PARAMETER = "needed_by_ddp"


class HeldOut:
    """The mean of the errors of all trajectories, of which each batch brings some."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, errors: Float[Tensor, "n branches S"]) -> None:
        """Count the errors of a batch."""
        total = errors.sum((0, 1))
        self.total = total if self.total is None else self.total + total
        self.count += errors.shape[0] * errors.shape[1]

    @property
    def by_step(self) -> Float[Tensor, " S"]:
        """Mean over trajectories and branches of every step."""
        assert self.total is not None  # a validation epoch has batches
        return self.total / self.count


class ClosedForm(PredictorFit):
    """A fit that is solved for, in one step: nothing is descended to.

    It may run on several processes: each gets the whole sum of the Grams (`GramDataModule`) and
    solves for the same rows.
    """

    def setup(self, stage: str) -> None:
        """Give DistributedDataParallel the parameter without which it refuses a module."""
        if self.trainer.world_size > 1 and not hasattr(self, ONE_PARAMETER):
            self.register_parameter(ONE_PARAMETER, nn.Parameter(torch.zeros(())))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is the same whatever the number of processes."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"].pop(ONE_PARAMETER, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Loading is strict."""
        super().on_load_checkpoint(checkpoint)
        if hasattr(self, ONE_PARAMETER):
            checkpoint["state_dict"][ONE_PARAMETER] = torch.zeros(())

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """Nothing to optimise step by step."""


def refuse_several_processes(module: lightning.LightningModule) -> None:
    """Raise when a fit that one process must make was started in several.

    Raises:
        ValueError: it was.
    """
    if (world := module.trainer.world_size) > 1:
        raise ValueError(
            f"{type(module).__name__} was started in {world} processes, expected one: each would "
            "choose rows by its own part of the data and call them the fit. Set "
            "`trainer.devices: 1` and `num_nodes: 1`."
        )
