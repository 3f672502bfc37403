"""L2P on the summed Grams of a recording: rows and mean Grams in closed form, and as published.

The closed-loop fit is in closed_loop.py. Shapes: n trajectories, P parts, S sampling steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.evaluation.rows import published_loss, reuse_weight
from foreseer.integration.schedule import check_anchors
from foreseer.predictors.any_anchors import L2PGram
from foreseer.predictors.linear import L2P, fitted_rows, fold
from foreseer.training.cross_validation import CrossValidation, cross_validate
from foreseer.training.gram_fit import ClosedGramFit, OpenLoopFit, Sum
from foreseer.training.recorded import open_recording, recorded_partition
from foreseer.trajectories.files.header import Header


def rows_predictor(header: Header, anchors: Sequence[int]) -> L2P:
    """The predictor of a recording's rows, of one transformer or several."""
    return L2P(len(header.sigmas), anchors, header.num_branches, header.expert_steps)


class L2PAdam(OpenLoopFit):
    """The published recipe on Grams: all earlier steps, reuse init, full-batch Adam.

    Every step is teacher forced. 201 iterations at rate 0.01 are the release's (set
    `max_epochs: 201`); the rows are folded onto the anchors exactly afterwards. The batch is the
    sum over all trajectories (`GramDataModule`).

    Args:
        recording: folder of the recording; must be that of the data module.
        anchors: steps at which the network runs, starting with 0.
        tap: recorded tap to forecast: `output` or `hidden`.
        learning_rate: Adam's rate.

    Raises:
        ValueError: the recording lacks the tap, or the anchors do not fit its steps.
    """

    fit_name = "adam"

    def __init__(
        self,
        recording: str,
        anchors: Sequence[int],
        tap: str = "output",
        learning_rate: float = 0.01,
    ) -> None:
        opened = open_recording(recording, tap)
        super().__init__([opened], anchors, tap, rows_predictor(opened.header, anchors))
        self.learning_rate = learning_rate
        header = opened.header
        self.rows = nn.Parameter(reuse_weight(header.num_branches, len(header.sigmas)))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Float[Tensor, ""]:
        """The mean squared one-step error, each step relative to nothing: the paper's MSE."""
        (total,) = batch["gram"]  # (branches, S, S)
        scale = total.diagonal(dim1=-2, dim2=-1).mean()  # its mean is what the loss is relative to
        loss = published_loss(self.rows, total / scale)
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Fold the rows onto the anchors; validation comes before the epoch's end."""
        self.predictor.set_rows(fold(self.rows.detach().double().tril(-1), self.anchors))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam as released: default betas, no decay."""
        return torch.optim.Adam([self.rows], self.learning_rate)


class L2PLeastSquares(ClosedGramFit):
    """The rows of least summed squared error on anchors, in closed form (set `max_epochs: 1`).

    With a partition, those of every part; its data are then a `GramDataModule` with the tap
    `<tap>/<partition>`.

    Args:
        recording: folder of the recording; must be that of the data module.
        anchors: steps at which the network runs, starting with 0.
        tap: recorded tap to forecast: `output` or `hidden`.
        ridge: shrinkage toward reuse, relative to each feature's squared norm; None takes the one
            with the least error on trajectories left out, see `cross_validate`.
        partition: name of a partition recorded at this tap, `bands` or `groups`; None fits the
            whole feature.

    Raises:
        ValueError: the recording lacks the tap or the partition, or the anchors do not fit its
            steps.
    """

    fit_name = "lstsq"

    def __init__(
        self,
        recording: str,
        anchors: Sequence[int],
        tap: str = "output",
        ridge: float | None = 1e-4,
        partition: str | None = None,
    ) -> None:
        opened = open_recording(recording, tap, experts=True)
        header = opened.header
        parts = None if partition is None else recorded_partition(header, tap, partition)
        sizes = len(header.sigmas), anchors, header.num_branches, header.expert_steps
        super().__init__([opened], anchors, tap, L2P(*sizes, parts), partition)
        self.ridge = ridge

    def solve(self, sums: Sequence[Sum]) -> None:
        """Solve for the rows, and for the ridge where it is left open."""
        ((total, _),), ridge = sums, self.ridge
        if ridge is None:
            found = self.cross_validation(total)
            self.print("\n".join(found.lines()))
            ridge = found.ridge
        steps = self.recording.header.expert_steps
        self.predictor.set_rows(fitted_rows(total, self.anchors, ridge, steps))
        self.log("train/ridge", ridge, batch_size=1)

    def cross_validation(self, total: Float[Tensor, "branches P S S"]) -> CrossValidation:
        """Leave every training trajectory out of the sum of all, by the data module's items.

        Args:
            total: summed Grams of the training trajectories.
        """
        batches = self.trainer.datamodule.train_grams  # type: ignore[attr-defined]
        chunks = (
            ([f"item {item}" for item in batch["items"]], self.with_parts(batch["gram"]))
            for batch in batches
        )
        steps = self.recording.header.expert_steps
        return cross_validate(total, chunks, self.anchors, expert_steps=steps)


class L2PGramModule(ClosedGramFit):
    """Average the Grams of the calibration trajectories (set `max_epochs: 1`): `L2PGram`.

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
        opened = open_recording(recording, tap)
        header = opened.header
        predictor = L2PGram(len(header.sigmas), header.num_branches, ridge, window)
        super().__init__([opened], check_anchors(anchors, len(header.sigmas)), tap, predictor)

    def solve(self, sums: Sequence[Sum]) -> None:
        """The mean Gram, which is all its closed form needs."""
        ((total, count),) = sums
        self.predictor.set_gram(total[:, 0] / count)
