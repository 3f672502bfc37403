"""L2P as Lightning modules: `L2PAdam`, the published recipe, and `L2PLeastSquares`, in closed form.

Both need only the summed Grams of a recording. The closed-loop fit is in closed_loop.py.
Shapes: n trajectories, S sampling steps.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from foreseer.checkpoints.call_settings import as_settings
from foreseer.checkpoints.spec import VALUES, PredictorSpec
from foreseer.evaluation.rows import published_loss, reuse_weight
from foreseer.integration.pipelines.load import HUB_NAME
from foreseer.predictors.linear import L2P, fitted_rows, fold
from foreseer.training.closed_form import ClosedForm, HeldOut
from foreseer.training.cross_validation import CrossValidation, cross_validate
from foreseer.training.fit_figures import HELD_OUT, log_figures
from foreseer.training.plumbing.resuming import Resumable
from foreseer.training.verdict_callbacks import OpenLoopVerdict
from foreseer.trajectories.files.header import Header
from foreseer.trajectories.gram import relative_errors
from foreseer.trajectories.recording import Recording


class L2PModule(Resumable):
    """What the three fits share: the predictor being fitted and what it was fitted on.

    Args:
        recording: folder of the recording; must be that of the data module.
        anchors: steps at which the network runs, starting with 0.
        tap: recorded tap to forecast: `output` or `hidden`.

    Raises:
        ValueError: the recording lacks the tap, or the anchors do not fit its steps.
    """

    fit_name = ""
    fits_experts = False

    def __init__(self, recording: str, anchors: Sequence[int], tap: str = "output") -> None:
        super().__init__()
        self.recording = open_recording(recording, tap, self.fits_experts)
        header = self.recording.header
        self.save_hyperparameters(
            {"recording": recording, "anchors": list(anchors), "tap": tap, "fit": self.fit_name}
        )
        self.tap = tap
        self.predictor = rows_predictor(header, anchors)
        self.num_trajectories: Tensor
        self.register_buffer("num_trajectories", torch.tensor(0))

    def configure_callbacks(self) -> Sequence[Callback]:
        """End the fit with its verdict."""
        return [OpenLoopVerdict()]

    def set_rows(self, rows: Float[Tensor, "branches S S"]) -> None:
        """Make these rows the predictor's."""
        self.predictor.set_rows(rows)

    def spec(self) -> PredictorSpec:
        """What the predictor was fitted on."""
        num_trajectories = int(self.num_trajectories)
        return spec_of(self.recording.header, self.tap, self.predictor.anchors, num_trajectories)

    def on_fit_start(self) -> None:
        """Count the trajectories fitted on."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.num_trajectories.fill_(len(data.train_items))

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch's errors."""
        self.held_out = HeldOut()

    def open_loop_errors(
        self, grams: Float[Tensor, "n branches S S"]
    ) -> Float[Tensor, "n branches S"]:
        """Relative error of every step's forecast from recorded features."""
        rows = self.predictor.rows(self.predictor.anchors, self.recording.header.sigmas)
        return relative_errors(grams.unsqueeze(-3), rows)

    def log_step_errors(self) -> None:
        """Log the held-out open-loop error of every forecast step, and their mean; draw both."""
        errors = self.held_out.by_step
        self.log("val/open_loop_error", errors.mean())
        log_figures(self, self.predictor.anchors, {HELD_OUT: errors})


def rows_predictor(header: Header, anchors: Sequence[int]) -> L2P:
    """The predictor of a recording's rows: of one transformer, or of each of several."""
    return L2P(len(header.sigmas), anchors, header.num_branches, header.expert_steps)


def open_recording(folder: str, tap: str, experts: bool = False) -> Recording:
    """A recording that has a tap.

    Args:
        folder: of the recording.
        tap: recorded tap.
        experts: whether it may be of a pipeline with several transformers.

    Raises:
        ValueError: it lacks the tap, or has several transformers.
    """
    recording = Recording(folder)
    steps = recording.header.expert_steps
    if len(steps) > 1 and not experts:
        raise ValueError(
            f"{folder} was recorded of {len(steps)} transformers that take over at the steps "
            f"{steps}; the fit that takes them apart is L2PLeastSquares."
        )
    if tap not in recording.header.taps:
        raise ValueError(f"{folder} has the taps {recording.header.taps}, not {tap!r}; record it.")
    return recording


def spec_of(
    header: Header,
    tap: str,
    anchors: Sequence[int],
    num_trajectories: int,
    digest: str | None = None,
    others: Sequence[Header] = (),
) -> PredictorSpec:
    """The circumstances of a fit on a recording with this header.

    Args:
        header: of the recording.
        tap: forecast tap.
        anchors: steps at which the network runs.
        num_trajectories: trajectories fitted on.
        digest: of all recordings, where there were several; None takes this one's.
        others: headers of the other recordings, whose latents may have other shapes.
    """
    shapes = dict.fromkeys(tuple(each.latent_shape) for each in (header, *others))
    return PredictorSpec(
        tap=tap,
        anchors=tuple(anchors),
        sigmas=tuple(header.sigmas),
        host=header.host | base_model(header.pipeline) | told_values(header),
        scheduler=header.scheduler["class"],
        num_branches=header.num_branches,
        guidance_scale=header.scheduler["guidance_scale"],
        dtype=header.dtype,
        recording_digest=header.recipe_hash if digest is None else digest,
        num_trajectories=num_trajectories,
        guidance=as_settings(header.guidance),
        latent_shapes=tuple(shapes),
        branch_steps=tuple(header.branch_steps),
        expert_steps=tuple(header.expert_steps),
        first_branch=header.first_branch,
    )


def told_values(header: Header) -> dict[str, str]:
    """The weights' digest in any layout, where the recording tells it."""
    return {VALUES: header.values_digest} if header.values_digest else {}


def base_model(pipeline: str) -> dict[str, str]:
    """What a card says a predictor is for: the hub's name of its pipeline, where it has one."""
    named = HUB_NAME.fullmatch(pipeline) and not Path(pipeline).exists()
    return {"base_model": pipeline} if named else {}


class L2PAdam(L2PModule):
    """The published recipe on Grams: all earlier steps, reuse init, full-batch Adam.

    Every step is teacher forced. 201 iterations at rate 0.01 are the release's (set
    `max_epochs: 201`); the rows are folded onto the anchors exactly afterwards. The batch is the
    sum over all trajectories (`GramDataModule`).

    Args:
        recording: folder of the recording.
        anchors: steps at which the network runs.
        tap: recorded tap to forecast.
        learning_rate: Adam's rate.
    """

    fit_name = "adam"

    def __init__(
        self,
        recording: str,
        anchors: Sequence[int],
        tap: str = "output",
        learning_rate: float = 0.01,
    ) -> None:
        super().__init__(recording, anchors, tap)
        self.learning_rate = learning_rate
        header = self.recording.header
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
        self.set_rows(fold(self.rows.detach().double().tril(-1), self.predictor.anchors))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Held-out error of the folded rows."""
        self.held_out.add(self.open_loop_errors(batch["gram"]))

    def on_validation_epoch_end(self) -> None:
        """Log it."""
        self.log_step_errors()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam as released: default betas, no decay."""
        return torch.optim.Adam([self.rows], self.learning_rate)


class L2PLeastSquares(ClosedForm, L2PModule):
    """The rows of least summed squared error on anchors, in closed form (set `max_epochs: 1`).

    Args:
        recording: folder of the recording.
        anchors: steps at which the network runs.
        tap: recorded tap to forecast.
        ridge: shrinkage toward reuse, relative to each feature's squared norm; None takes the one
            with the least error on trajectories left out, see `cross_validate`.
    """

    fit_name = "lstsq"
    fits_experts = True

    def __init__(
        self,
        recording: str,
        anchors: Sequence[int],
        tap: str = "output",
        ridge: float | None = 1e-4,
    ) -> None:
        super().__init__(recording, anchors, tap)
        self.automatic_optimization = False
        self.ridge = ridge

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Solve for the rows; the error logged is that of all trajectories together."""
        steps, ridge = self.recording.header.expert_steps, self.ridge
        if ridge is None:
            found = self.cross_validation(batch["gram"][0])
            self.print("\n".join(found.lines()))
            ridge = found.ridge
        total = batch["gram"].sum(0).unsqueeze(-3)
        self.predictor.set_rows(fitted_rows(total, self.predictor.anchors, ridge, steps))
        error = self.open_loop_errors(batch["gram"]).mean()
        self.log_dict({"train/open_loop_error": error, "train/ridge": ridge}, batch_size=1)

    def cross_validation(self, total: Float[Tensor, "branches S S"]) -> CrossValidation:
        """Leave every training trajectory out of the sum of all, by the data module's items.

        Args:
            total: summed Grams of the training trajectories.
        """
        batches = self.trainer.datamodule.train_grams  # type: ignore[attr-defined]
        chunks = (
            ([f"item {item}" for item in batch["items"]], batch["gram"].unsqueeze(2))
            for batch in batches
        )
        steps = self.recording.header.expert_steps
        return cross_validate(total[:, None], chunks, self.predictor.anchors, expert_steps=steps)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Held-out error."""
        self.held_out.add(self.open_loop_errors(batch["gram"]))

    def on_validation_epoch_end(self) -> None:
        """Log it."""
        self.log_step_errors()
