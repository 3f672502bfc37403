"""A training that ends in a predictor file: what export, verdicts and `foreseer.fit` ask it for."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from foreseer.checkpoints.spec import PredictorSpec
from foreseer.integration.call_groups import CallGroups
from foreseer.integration.pipelines.load import device_of
from foreseer.predictors.base import Predictor
from foreseer.training.plumbing.resuming import Resumable, check_strategy
from foreseer.training.recorded import spec_of
from foreseer.training.verdict_callbacks import RivalsVerdict, Verdict
from foreseer.trajectories.recording import Recording


class PredictorFit(Resumable):
    """A fit on recordings, whose checkpoint says by itself what predictor it holds.

    Attributes:
        fit_name: what it is called on the console and in its checkpoint.
        recordings: fitted on; the predictor takes anchors and grid of the first where none are
            given.
        tap: forecast.
        anchors: steps at which the network runs.
        predictor: being fitted; None while its sizes are not known.
        num_trajectories: fitted on, a buffer.
        sums: what else is kept of the trajectories beside the predictor.
        token_groups: of a call, where the predictor goes by them.
    """

    fit_name = ""
    recordings: list[Recording]
    tap: str
    anchors: Sequence[int]
    predictor: Any
    num_trajectories: Tensor
    sums: Mapping[str, Tensor] = {}
    token_groups: CallGroups | None = None

    @property
    def recording(self) -> Recording:
        """The first recording."""
        return self.recordings[0]

    def deployed(self) -> Predictor:
        """The predictor as it forecasts, without what only training needs."""
        found: Predictor = self.predictor
        return found

    def spec(self) -> PredictorSpec:
        """What the predictor was fitted on."""
        first, *others = (recording.header for recording in self.recordings)
        return spec_of(first, self.tap, self.anchors, int(self.num_trajectories), others)

    def told(self, kind: type[Predictor], arguments: dict[str, Any] | None) -> dict[str, Any]:
        """The hyper-parameters of its checkpoints.

        Args:
            kind: class of the predictor.
            arguments: of its constructor; None where they are not known yet.
        """
        plain = arguments and {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in arguments.items()
        }
        return {
            "fit": self.fit_name,
            "recordings": [str(recording.folder) for recording in self.recordings],
            "digests": [recording.header.recipe_hash for recording in self.recordings],
            "anchors": list(self.anchors),
            "tap": self.tap,
            "class": kind.__name__,
            "arguments": plain,
        }


MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, in the place of its parameters


class Descent(PredictorFit):
    """A training whose measures are part of its checkpoint.

    Attributes:
        fit_seconds: time spent in training batches, over all resumed runs.
        start_error: held-out error of the start, in dB; infinite until it is measured.
        val_error: held-out error after the newest epoch, in dB.
    """

    home: torch.device | None = None  # where the pipeline runs, once it is known
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

    def follow(self, pipe: Any) -> None:
        """Train where the pipeline runs, wherever Lightning keeps its own numbers."""
        self.home = device_of(pipe)
        for child in self.children():
            child.to(self.home)

    def at_home(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch where the training is."""
        return move_data_to_device(batch, self.home) if self.home is not None else batch

    def on_train_start(self) -> None:
        """Start the clock: an epoch that is resumed in its middle does not begin."""
        check_strategy(self)
        for optimizer in self.trainer.optimizers:  # Lightning restores what they keep at its place
            for parameter, state in optimizer.state.items():
                state |= {k: v.to(parameter.device) for k, v in state.items() if k in MOMENTS}
        self._started = time.perf_counter()

    def on_train_epoch_start(self) -> None:
        """Start the clock after validation."""
        self._started = time.perf_counter()

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Add the batch's time."""
        now = time.perf_counter()
        self.fit_seconds.add_(now - self._started)
        self._started = now
