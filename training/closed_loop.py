"""The closed-loop fit of L2P: start at the best formula, track the full run, refine the end.

Shapes: S sampling steps, n trajectories, B batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from ..integration.pipelines import load_pipeline
from ..predictors.linear import L2P
from ..trajectories.prompts import Item
from ..trajectories.recording import Recording
from .l2p import L2PModule
from .refinement import SegmentRows, closed_loop_errors, feature_bases, generate, log_error
from .rows import analytic_rows
from .tracking import track


class L2PClosedLoop(L2PModule):
    """Fit rows on the error of the finished sample, never ending below the best analytic rule.

    1. The formula (or AB2) with the least closed-loop error on these anchors is the start.
    2. On the `output` tap, trajectory tracking (tracking.py) proposes rows; the best point on the
       line from the start to them is the base.
    3. Gradients through the sampler refine one correction per segment on mean 10 log10 MSE of the
       final latents, which is what PSNR averages.
    The rows with the least error on the validation split are kept: the start is among them.

    Args:
        recording: folder of the recording, with states.
        pipeline: folder of the pipeline, or `zoo:<name>`.
        anchors: steps at which the network runs.
        tap: `output` or `hidden`.
        ridge: shrinkage of tracking toward the start.
        learning_rate: Adam's rate on coordinates that each move the state by 1 % of its RMS.
        num_probe: calibration trajectories the start and the base are chosen on.
        batch_size: trajectories per pipeline call outside the training steps.
    """

    fit_name = "closed_loop"
    prepared: Tensor
    best_error: Float[Tensor, ""]
    start_error: Float[Tensor, ""]

    def __init__(
        self,
        recording: str,
        pipeline: str,
        anchors: Sequence[int],
        tap: str = "output",
        ridge: float = 1e-2,
        learning_rate: float = 0.1,
        num_probe: int = 16,
        batch_size: int = 16,
    ) -> None:
        super().__init__(recording, anchors, tap)
        header = self.recording.header
        if not header.states:
            raise ValueError(f"{recording} holds no states; record it again with states: true.")
        self.pipe: Any = None
        self.pipeline = pipeline
        self.ridge = ridge
        self.learning_rate = learning_rate
        self.num_probe = num_probe
        self.batch_size = batch_size
        self.settings = settings_of(self.recording)
        self.rows = SegmentRows(len(header.sigmas), anchors, header.num_branches)
        self.register_buffer("prepared", torch.tensor(False))
        self.register_buffer("best_error", torch.tensor(float("inf"), dtype=torch.float64))
        self.register_buffer("start_error", torch.tensor(float("inf"), dtype=torch.float64))
        self.start_name = ""

    def on_fit_start(self) -> None:
        """Choose the start and the base, unless a checkpoint brought them along."""
        if self.pipe is None:
            self.pipe = load_pipeline(self.pipeline)
        self.pipe.transformer.requires_grad_(False)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.val_batches, self.val_finals = self._references(data.val_items)
        if not self.prepared:
            self._prepare(data.train_items)
            self.prepared.fill_(True)

    def _prepare(self, items: Sequence[int]) -> None:
        sigmas = self.recording.header.sigmas
        anchors = self.predictor.anchors
        probe, finals = self._references(items[: self.num_probe])
        formulas = {
            name: rows.repeat(self.predictor.num_branches, 1, 1)
            for name, rows in analytic_rows(anchors, sigmas).items()
        }
        errors = {name: self._error(rows, probe, finals) for name, rows in formulas.items()}
        self.start_name = min(errors, key=lambda name: errors[name])
        start = formulas[self.start_name]
        self.print(f"start: {self.start_name} at {errors[self.start_name]:.2f} dB on {len(finals)}")
        self.start_error.fill_(self._error(start, self.val_batches, self.val_finals))
        self._consider(start, self.start_error)
        if self.tap == "output":
            base, bases = self._track(items, start, probe, finals, errors[self.start_name])
        else:
            grams = self.recording.stack(f"gram/{self.tap}", items)
            base, bases = start, feature_bases(grams, anchors, 1)
        self.rows.prepare(base, bases)
        self._consider(base, self._error(base, self.val_batches, self.val_finals))

    def _track(
        self,
        items: Sequence[int],
        start: Float[Tensor, "branches S S"],
        probe: list[list[Item]],
        finals: Tensor,
        start_error: float,
    ) -> tuple[Float[Tensor, "branches S S"], list[Tensor]]:
        states = self.recording.stack("states", items)
        batches = self._batches(items)
        tracked, bases = track(
            self.pipe, batches, states, self.predictor.anchors, start, self.ridge, **self.settings
        )
        found = {0.0: start_error}
        for share in (0.25, 0.5, 0.75, 1.0):
            found[share] = self._error(torch.lerp(start, tracked, share), probe, finals)
        share = min(found, key=lambda share: found[share])
        self.print(f"tracking: share {share} of the way, {found[share]:.2f} dB")
        return torch.lerp(start, tracked, share), bases

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Float[Tensor, ""]:
        """Mean error in dB of a batch generated with the current rows."""
        items = [self._item(int(item)) for item in batch["item"]]
        predictor = L2P(
            self.predictor.num_steps, self.predictor.anchors, self.predictor.num_branches
        )
        predictor.weight = self.rows()
        latents = generate(self.pipe, predictor, self.tap, items, gradients=True, **self.settings)
        loss = log_error(latents, batch["final"]).mean()
        self.log("train/error_db", loss, prog_bar=True, batch_size=len(items))
        return loss

    def on_train_epoch_end(self) -> None:
        """Measure the current rows on the validation split; keep them if they are the best yet."""
        rows = self.rows().detach()
        error = self._error(rows, self.val_batches, self.val_finals)
        self._consider(rows, error)
        self.log("val/error_db", error, prog_bar=True)
        self.log("val/gain_over_start_db", self.start_error - self.best_error, prog_bar=True)

    def on_train_end(self) -> None:
        """Say what came of it."""
        gain = float(self.start_error - self.best_error)
        if gain > 0:
            self.print(f"validation: {gain:.2f} dB better than the start ({self.start_name})")
        else:
            self.print(
                f"no gain over the start ({self.start_name}): its rows are returned unchanged"
            )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam with a cosine to zero over the run."""
        optimizer = torch.optim.Adam(self.rows.parameters(), self.learning_rate, betas=(0.9, 0.95))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _consider(self, rows: Float[Tensor, "branches S S"], error: Any) -> None:
        if float(error) < float(self.best_error):
            self.best_error.fill_(float(error))
            self.set_rows(rows)

    def _error(self, rows: Tensor, batches: list[list[Item]], finals: Tensor) -> float:
        errors = closed_loop_errors(
            self.pipe, rows, self.predictor.anchors, self.tap, batches, finals, **self.settings
        )
        return float(errors.mean())

    def _references(self, items: Sequence[int]) -> tuple[list[list[Item]], Tensor]:
        return self._batches(items), self.recording.stack("final", items)

    def _batches(self, items: Sequence[int]) -> list[list[Item]]:
        found = [self._item(item) for item in items]
        return [found[i : i + self.batch_size] for i in range(0, len(found), self.batch_size)]

    def _item(self, item: int) -> Item:
        return item_of(self.recording, item)


def item_of(recording: Recording, item: int) -> Item:
    """The item a trajectory was recorded from, read off its manifest line."""
    meta = dict(recording.meta(item))
    seed = int(meta.pop("seed"))
    return Item(item, seed, dict(meta))


def settings_of(recording: Recording) -> dict[str, Any]:
    """The pipeline settings of a recording that a fit must repeat: steps and guidance."""
    header = recording.header
    return {
        "num_inference_steps": len(header.sigmas),
        "guidance_scale": header.scheduler["guidance_scale"],
    }
