"""What the fits on Grams share: a predictor with rows, its errors on held-out Grams, its figures.

Shapes: n trajectories, P parts (1 of the whole feature), S sampling steps.
"""

from collections.abc import Sequence
from typing import Any

import lightning
import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from foreseer.predictors.base import LinearPredictor
from foreseer.training.fit_figures import HELD_OUT, log_figures
from foreseer.training.predictor_fit import PredictorFit
from foreseer.training.verdict_callbacks import OpenLoopVerdict
from foreseer.trajectories.gram import relative_errors
from foreseer.trajectories.recording import Recording

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


Sum = tuple[Float[Tensor, "branches P _ _"], int]  # S x S, of as many steps as each recording has
"""Summed Grams of one recording, and of how many trajectories."""


class GramFit(PredictorFit):
    """A fit on the Grams of one or several recordings.

    Args:
        recordings: fitted on.
        anchors: steps at which the network runs, starting with 0.
        tap: forecast.
        predictor: as it starts.
        partition: name of the recorded partition whose Grams the data are; None of whole features.
    """

    def __init__(
        self,
        recordings: Sequence[Recording],
        anchors: Sequence[int],
        tap: str,
        predictor: LinearPredictor,
        partition: str | None = None,
    ) -> None:
        super().__init__()
        self.recordings, self.anchors, self.tap = list(recordings), tuple(anchors), tap
        self.partition = partition
        self.predictor = predictor
        told = self.told(type(predictor), predictor.arguments())
        self.save_hyperparameters(told | {"partition": partition})
        self.register_buffer("num_trajectories", torch.tensor(0))

    def on_fit_start(self) -> None:
        """Count the trajectories fitted on."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        parts = getattr(data, "parts", [data])
        self.num_trajectories.fill_(sum(len(part.train_items) for part in parts))

    def with_parts(self, grams: Tensor) -> Float[Tensor, "*lead P S S"]:
        """Grams with an axis of parts."""
        return grams if self.partition else grams.unsqueeze(-3)

    def open_loop_errors(
        self, grams: Float[Tensor, "n branches *parts S S"], place: int = 0
    ) -> Float[Tensor, "n branches S"]:
        """Relative error of every step's forecast from recorded features.

        Args:
            grams: of trajectories of one recording, as its data are.
            place: of the recording.
        """
        header = self.recordings[place].header
        rows = self.predictor.rows(self.anchors, header.sigmas, header.expert_steps)
        return relative_errors(self.with_parts(grams), rows)


class OpenLoopFit(GramFit):
    """A fit that is measured on held-out Grams, at every validation and by its verdict."""

    errors_label = HELD_OUT

    def configure_callbacks(self) -> Sequence[Callback]:
        """End the fit with its verdict."""
        return [OpenLoopVerdict()]

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch's errors."""
        self.held_out = [HeldOut() for _ in self.recordings]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Held-out error of some trajectories of one recording."""
        place = batch.get("recording", 0)
        self.held_out[place].add(self.open_loop_errors(batch["gram"], place))

    def on_validation_epoch_end(self) -> None:
        """Log the mean error over the recordings, which count alike; draw that of the first."""
        found = [errors.by_step for errors in self.held_out if errors.count]
        self.log("val/open_loop_error", torch.stack([each.mean() for each in found]).mean())
        if self.held_out[0].count:
            log_figures(self, self.anchors, {self.errors_label: self.held_out[0].by_step})


class ClosedGramFit(ClosedForm, OpenLoopFit):
    """A fit that is one solve (set `max_epochs: 1`): the one module behind all closed forms."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def solve(self, sums: Sequence[Sum]) -> None:
        """Make the closed form of these sums the predictor's.

        Args:
            sums: one of every recording.
        """
        raise NotImplementedError

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Solve; the error logged is that of all trajectories together."""
        grams, counts = batch.get("grams", [batch.get("gram")]), batch.get("counts")
        counts = [batch["count"]] if counts is None else counts
        pairs = zip(grams, counts, strict=True)
        self.solve([(self.with_parts(gram[0]), int(count)) for gram, count in pairs])
        errors = [self.open_loop_errors(gram, place).mean() for place, gram in enumerate(grams)]
        self.log("train/open_loop_error", torch.stack(errors).mean(), batch_size=1)
