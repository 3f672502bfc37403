"""The figures of a fit in TensorBoard: error per step, weights, anchors.

Tags: `figures/error_per_step`, `figures/weights_branch_<b>`, `figures/anchors`, and `samples` of
fits that run the pipeline; the slider of each is the epoch. Shapes: S sampling steps.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from foreseer.evaluation.measure import References
from foreseer.evaluation.page import figures
from foreseer.evaluation.page.heat import Timeline
from foreseer.evaluation.page.sheet import Row, sheet
from foreseer.integration.call_groups import CallGroups
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.session import Session
from foreseer.predictors.base import Predictor, Step
from foreseer.trajectories.prompts import Item, generate_batch

HELD_OUT = "held-out features, open loop"  # the usual label of a line
ERRORS, WEIGHTS, ANCHORS = (
    "figures/error_per_step",
    "figures/weights_branch_",
    "figures/anchors",
)
SAMPLES, NUM_SAMPLES = "samples", 4


class StepMeans:
    """Means of errors by step, of which each batch brings some."""

    def __init__(self) -> None:
        self.found: dict[int, list[Tensor]] = {}

    def add(self, errors: Iterable[tuple[Step, Float[Tensor, ""]]]) -> None:
        """Count the errors of a batch."""
        for step, error in errors:
            self.found.setdefault(step.index, []).append(error.detach())

    def by_step(self) -> dict[int, float]:
        """Mean of every step that has errors."""
        return {step: float(torch.stack(each).mean()) for step, each in sorted(self.found.items())}


def draws_now(module: lightning.LightningModule) -> bool:
    """Whether figures are due: after 1, 2, 4, 8, ... epochs and the last, in one process.

    A figure takes about a third of a second, an epoch of a fit on Grams a few milliseconds.

    Args:
        module: attached to a trainer.
    """
    trainer = module.trainer
    if not isinstance(module.logger, TensorBoardLogger):
        return False
    if trainer.sanity_checking or not trainer.is_global_zero:
        return False
    done = module.current_epoch + 1
    return done & (done - 1) == 0 or done == trainer.max_epochs


def log_figures(
    module: Any,
    anchors: Sequence[int],
    errors: Mapping[str, Float[Tensor, " S"] | Mapping[int, float]],
) -> None:
    """Draw what `draws_now` calls for; otherwise do nothing.

    Args:
        module: has a `predictor` and a `recording`; weights are drawn where it has some.
        anchors: steps at which the network runs.
        errors: label to the relative error of every step, or of some by their number; steps
            without an error, the anchors among them, are left out of the line.
    """
    if not draws_now(module):
        return
    board, epoch = module.logger.experiment, module.current_epoch
    sigmas = module.recording.header.sigmas
    curves = {label: _points(found, len(sigmas)) for label, found in errors.items()}
    board.add_figure(ERRORS, figures.step_errors(curves).figure(), epoch)
    lists = {f"{len(anchors)} evaluations": anchors}
    board.add_figure(ANCHORS, Timeline("Anchors", lists, len(sigmas)).figure(), epoch)
    rows = module.predictor.rows(anchors, sigmas, module.recording.header.expert_steps)
    if rows is None or rows.shape[1] > 1 or len(anchors) == len(sigmas):
        return
    for branch, matrix in enumerate(rows[:, 0]):
        chart = figures.weights(f"Branch {branch}", matrix, anchors)
        board.add_figure(f"{WEIGHTS}{branch}", chart.figure(), epoch)


class SampleLog:
    """Held-out samples in TensorBoard, in full and as forecast so far, under each other.

    Args:
        references: held-out trajectories, of which the first few are drawn.
        tap: forecast tap.
        anchors: steps at which the network runs.
        groups: token groups of a call, of fits that go by them.
    """

    def __init__(
        self,
        references: References,
        tap: str,
        anchors: Sequence[int],
        groups: CallGroups | None = None,
    ) -> None:
        self.items: Sequence[Item] = next(iter(references.batches), [])[:NUM_SAMPLES]
        self.settings = {**references.settings, "output_type": "np"}
        self.tap, self.anchors, self.groups = tap, anchors, groups
        self.full: Tensor | None = None

    def log(self, module: Any, predictor: Predictor) -> None:
        """Draw, where figures are due and something is held out.

        Args:
            module: attached to a trainer; has the pipeline as `pipe`.
            predictor: what the fit has come to.
        """
        if not self.items or not draws_now(module):
            return
        if self.full is None:
            self.full = self._drawn(module.pipe)
        source = Forecaster(predictor, self.tap, self.anchors)
        session = Session(module.pipe, source, groups=self.groups)
        try:
            forecast = self._drawn(module.pipe)
        finally:
            session.detach()
        label = f"forecast\n{len(self.anchors)} evaluations"
        picture = np.asarray(sheet([Row("full run", self.full), Row(label, forecast)]))
        board, epoch = module.logger.experiment, module.current_epoch
        board.add_image(SAMPLES, picture, epoch, dataformats="HWC")

    def _drawn(self, pipe: Any) -> Float[Tensor, "B C H W"]:
        """The samples, of videos their middle frames."""
        with torch.no_grad():
            drawn = torch.from_numpy(np.stack(generate_batch(pipe, self.items, **self.settings)[0]))
        if drawn.ndim == 5:  # (B, frames, H, W, C)
            drawn = drawn[:, drawn.shape[1] // 2]
        return drawn.movedim(-1, 1).float()


def _points(
    found: Float[Tensor, " S"] | Mapping[int, float], num_steps: int
) -> list[tuple[int, float]]:
    """A point per step; 0 where there is none, which breaks the line."""
    values = dict(enumerate(found.tolist())) if isinstance(found, Tensor) else dict(found)
    return [(step, float(values.get(step, 0.0))) for step in range(num_steps)]
