"""The closed-loop fit of L2P: start at the best formula, track the full run, refine jointly.

Shapes: S sampling steps, n trajectories.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from foreseer.evaluation.measure import References, closed_loop_errors, opened_for
from foreseer.evaluation.rows import analytic_rows
from foreseer.training.fit_figures import HELD_OUT, SampleLog, draws_now, log_figures
from foreseer.training.gauss_newton import (
    RIDGES,
    Direction,
    Quadratics,
    directions,
    feature_bases,
    linearise,
    moved,
)
from foreseer.training.gram_fit import GramFit, refuse_several_processes
from foreseer.training.l2p import rows_predictor
from foreseer.training.recorded import open_recording
from foreseer.training.tracking import check_branches, track
from foreseer.training.verdict_callbacks import BestRowsVerdict, Verdict
from foreseer.trajectories.gram import sum_grams

LINEARISED = "linearised"  # what the checkpoint keeps of an epoch's batches
MOVES = "moves"  # and of the start: LAPACK may round otherwise in another process


class L2PClosedLoop(GramFit):
    """Fit rows on the error of the finished sample, never ending below the best analytic rule.

    1. The formula or solver with the least closed-loop error on these anchors is the start.
    2. On the `output` tap, trajectory tracking (tracking.py) proposes rows; the best point on the
       line from the start to them is the base.
    3. Every epoch is one Gauss-Newton step of all rows together on mean log squared error of the
       final latents, which is what PSNR averages (gauss_newton.py), with the ridge that does best.
    The rows with the least error on the validation split are kept: the start is among them.

    An epoch costs at most (A^3 - A) / 6 network evaluations per branch and trajectory, A the number
    of anchors: 84 at 8 anchors, 35 at 6.

    Args:
        recording: folder of the recording, with states.
        pipeline: the pipeline, its folder or name, or `zoo:<name>`.
        anchors: steps at which the network runs.
        tap: `output` or `hidden`.
        ridge: shrinkage of tracking toward the start.
        num_probe: calibration trajectories the start and the base are chosen on.
        batch_size: trajectories per pipeline call where it is free to choose.
        device: where to put a pipeline that is loaded; None takes this process's GPU, if any.
        dtype: dtype to load it in; None takes that of the recording.

    Raises:
        ValueError: the recording has no states.
    """

    fit_name = "closed_loop"

    def __init__(
        self,
        recording: str,
        pipeline: Any,
        anchors: Sequence[int],
        tap: str = "output",
        ridge: float = 1e-2,
        num_probe: int = 16,
        batch_size: int = 16,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        opened = open_recording(recording, tap)
        super().__init__([opened], anchors, tap, rows_predictor(opened.header, anchors))
        self.automatic_optimization = False
        if not self.recording.header.states:
            raise ValueError(f"{recording} holds no states; record it again with states: true.")
        if tap == "output":
            check_branches(self.recording.header, recording)  # tracking needs them all
        self.pipe: Any = None
        self.pipeline, self.place = pipeline, (dtype, device)
        self.ridge = ridge
        self.num_probe = num_probe
        self.batch_size = batch_size
        self.start_name = ""
        self.start_error: Tensor
        self.best_error: Tensor
        for name in ("start_error", "best_error"):
            self.register_buffer(name, torch.tensor(float("inf"), dtype=torch.float64))
        self.moves: list[Direction] = []
        self.parts: list[Quadratics] = []

    def configure_callbacks(self) -> list[Verdict]:
        """End the fit with its verdict."""
        return [BestRowsVerdict()]

    def on_fit_start(self) -> None:
        """Choose the start and the base; a resumed fit goes on from its best rows."""
        refuse_several_processes(self)
        super().on_fit_start()
        if self.pipe is None:
            self.pipe = opened_for(self.recording, self.pipeline, *self.place)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.validation = self._references(data.val_items)
        self.calibration = self._references(data.train_items)
        self.samples = SampleLog(self.validation, self.tap, self.predictor.anchors)
        if self.moves:
            return
        start = self._choose_start()
        bases = self._track(start) if self.tap == "output" else self._feature_bases()
        ramps = self.tap != "output"
        self.moves = directions(self.predictor.anchors, bases, start, ramps)

    def _choose_start(self) -> Float[Tensor, "branches S S"]:
        anchors, sigmas = self.predictor.anchors, self.recording.header.sigmas
        branches = self.predictor.num_branches
        probe = self._references(self.calibration.items[: self.num_probe])
        formulas = analytic_rows(anchors, sigmas)
        rows = {name: rule.repeat(branches, 1, 1) for name, rule in formulas.items()}
        bar = tqdm(rows.items(), desc="formulas", unit="formula", delay=2, leave=False)
        errors = {name: self._error(each, probe) for name, each in bar}
        errors = {name: error for name, error in errors.items() if math.isfinite(error)}
        self.start_name = min(errors, key=lambda name: errors[name])
        start = rows[self.start_name]
        self.print(f"start: {self.start_name}, the best formula on {len(probe.items)} trajectories")
        if not torch.isfinite(self.best_error):
            self.start_error.fill_(self._error(start, self.validation))
            self._consider(start, float(self.start_error))
        return start

    def _track(self, start: Float[Tensor, "branches S S"]) -> list[Tensor]:
        tracked, bases = track(
            self.pipe,
            self.calibration.batches,
            self.calibration.states,
            self.predictor.anchors,
            start,
            self.ridge,
            **self.calibration.settings,
        )
        for share in (0.5, 1.0):
            rows = torch.lerp(start, tracked, share)
            self._consider(rows, self._error(rows, self.validation))
        return bases

    def _feature_bases(self) -> list[Tensor]:
        name = f"gram/{self.tap}"
        total = sum_grams(self.recording, [name], self.calibration.items)[name]
        mean = total / len(self.calibration.items)
        return feature_bases(mean[None], self.predictor.anchors)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was found at the start, and what the epoch's batches have told so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[LINEARISED] = [dict(vars(part)) for part in self.parts]
        moves = [dict(vars(move)) for move in self.moves]
        checkpoint[MOVES] = {"start_name": self.start_name, "moves": moves}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with it; a checkpoint between two epochs has none."""
        super().on_load_checkpoint(checkpoint)
        self.parts = [Quadratics(**part) for part in checkpoint.get(LINEARISED, [])]
        if found := checkpoint.get(MOVES):
            self.start_name = found["start_name"]
            self.moves = [Direction(**move) for move in found["moves"]]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Linearise the sampler around the best rows so far, for one batch; step after the last."""
        references = self._references([int(item) for item in batch["item"]])
        part = linearise(
            self.pipe,
            self.predictor,
            self.moves,
            self.tap,
            [item for items in references.batches for item in items],
            batch["final"],
            **references.settings,
        )
        self.parts.append(part)
        self.log("train/error_db", 10 * part.constant.log10().mean(), prog_bar=True, batch_size=1)
        if self.trainer.is_last_batch:
            self._move()
        self.optimizers().step()  # type: ignore[union-attr]

    def on_train_epoch_end(self) -> None:
        """Move by what there is of an epoch that was cut short, log and draw."""
        if self.parts:
            self._move()
        self.log("val/error_db", self.best_error, prog_bar=True)
        self.log("val/gain_over_start_db", self.start_error - self.best_error, prog_bar=True)
        if draws_now(self):
            grams = self.recording.stack(f"gram/{self.tap}", self.validation.items)
            errors = self.open_loop_errors(grams).mean((0, 1))
            log_figures(self, self.predictor.anchors, {HELD_OUT: errors})
            self.samples.log(self, self.predictor)

    def _move(self) -> None:
        """Take the Gauss-Newton step that does best on the validation split, if any does."""
        quadratics = Quadratics.join(self.parts)
        self.parts = []
        at = copy.deepcopy(self.predictor)
        for ridge in tqdm(RIDGES, desc="shrinkages", unit="run", delay=2, leave=False):
            z = quadratics.solve(ridge)
            rows = moved(at, self.moves, z).weight
            error = self._error(rows, self.validation)
            self._consider(rows, error)
            self.print(f"ridge {ridge:g}: {error:.2f} dB, best so far {float(self.best_error):.2f}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One that changes nothing, since steps are solved for: Lightning counts its steps.

        Without a count its `ModelCheckpoint` takes every epoch for one that is saved already.
        """
        return torch.optim.SGD([self.predictor.weight], lr=0.0)

    def _consider(self, rows: Float[Tensor, "branches S S"], error: float) -> None:
        if error < float(self.best_error):
            self.best_error.fill_(error)
            self.predictor.set_rows(rows)

    def _error(self, rows: Float[Tensor, "branches S S"], references: References) -> float:
        errors = closed_loop_errors(
            self.pipe,
            rows,
            self.predictor.anchors,
            self.tap,
            references.batches,
            references.finals,
            **references.settings,
        )
        return float(errors.mean())

    def _references(self, items: Sequence[int]) -> References:
        return References(self.recording, list(items), self.batch_size)
