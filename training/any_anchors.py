"""The fit of `L2PGram`: the mean Gram, which is all its closed form needs.

Shapes: n trajectories, S sampling steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.checkpoints.spec import PredictorSpec
from foreseer.integration.schedule import check_anchors
from foreseer.predictors.any_anchors import L2PGram
from foreseer.training.closed_form import ClosedForm, HeldOut
from foreseer.training.fit_figures import HELD_OUT, log_figures
from foreseer.training.l2p import open_recording, spec_of
from foreseer.trajectories.gram import relative_errors


class L2PGramModule(ClosedForm):
    """Average the Grams of the calibration trajectories (set `max_epochs: 1`).

    Args:
        recording: folder of the recording; must be that of the data module.
        anchors: the list the predictor takes when a run gives none, and is validated on.
        tap: recorded tap to forecast: `output` or `hidden`.
        ridge: shrinkage toward reuse, relative to each feature's squared norm.
        window: newest anchors to use; None uses all.

    Raises:
        ValueError: the recording lacks the tap, or the anchors do not fit its steps.
    """

    fit_name = "gram"

    def __init__(
        self,
        recording: str,
        anchors: Sequence[int],
        tap: str = "output",
        ridge: float = 1e-4,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.recording = open_recording(recording, tap)
        header = self.recording.header
        self.anchors = check_anchors(anchors, len(header.sigmas))
        self.save_hyperparameters(
            {
                "recording": recording,
                "anchors": list(anchors),
                "tap": tap,
                "fit": self.fit_name,
                "ridge": ridge,
                "window": window,
            }
        )
        self.tap = tap
        self.predictor = L2PGram(len(header.sigmas), header.num_branches, ridge, window)
        self.num_trajectories: Tensor
        self.register_buffer("num_trajectories", torch.tensor(0))

    def spec(self) -> PredictorSpec:
        """What the predictor was fitted on."""
        header = self.recording.header
        return spec_of(header, self.tap, self.anchors, int(self.num_trajectories))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Average the Grams of the batch, which is their sum (`GramDataModule`)."""
        self.num_trajectories.fill_(batch["count"])
        self.predictor.set_gram(batch["gram"][0] / batch["count"])
        error = self.open_loop_errors(batch["gram"]).mean()
        self.log("train/open_loop_error", error, batch_size=1)

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch's errors."""
        self.held_out = HeldOut()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Held-out error on the module's anchors."""
        self.held_out.add(self.open_loop_errors(batch["gram"]))

    def on_validation_epoch_end(self) -> None:
        """Log it, and draw it beside the weights on the module's anchors."""
        errors = self.held_out.by_step
        self.log("val/open_loop_error", errors.mean())
        log_figures(self, self.anchors, {HELD_OUT: errors})

    def open_loop_errors(
        self, grams: Float[Tensor, "n branches S S"]
    ) -> Float[Tensor, "n branches S"]:
        """Relative error of the forecasts on the module's anchors."""
        rows = self.predictor.rows(self.anchors, self.recording.header.sigmas)
        return relative_errors(grams.unsqueeze(-3), rows)
