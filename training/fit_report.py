"""What a fit achieved, step by step: its ceilings, its open-loop error, its closed-loop error.

Shapes: S sampling steps, n trajectories, B batch.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from foreseer.evaluation.measure import References
from foreseer.evaluation.page.figures import step_errors
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.observers import Observer, StepRecord
from foreseer.integration.session import Session
from foreseer.predictors.linear import L2P
from foreseer.training.gram_fit import GramFit
from foreseer.training.verdict_callbacks import held_out
from foreseer.trajectories.gram import projection_fidelity, relative_errors
from foreseer.trajectories.prompts import generate_batch
from foreseer.trajectories.recording import Recording

CURVES = {
    "oracle_all": "oracle, all earlier steps",
    "oracle_anchors": "oracle, anchors only",
    "open_loop": "shared rows, open loop",
    "closed_loop": "shared rows, closed loop (state)",
}
"""The curves of the report in drawing order, with their labels."""

REPORT = "figures/fit_report"  # its tag in TensorBoard
Curve = list[tuple[int, float]]


def fit_report(
    recording: Recording,
    items: Sequence[int],
    rows: Float[Tensor, "branches P S S"],
    anchors: Sequence[int],
    tap: str,
    closed_loop: Curve | None,
    out: Path,
) -> dict[str, Curve]:
    """Write `fit_report.json` and `fit_report.png`: up to four relative errors per step.

    `oracle_all` and `oracle_anchors` project each held-out feature on its own trajectory's earlier
    steps, or anchors: the ceiling of any linear forecaster, and of any on this schedule.
    `open_loop` is the error of the fitted rows on true features. `closed_loop` is that of the
    sampler's states, and the only one of an actual run.

    Args:
        recording: holds the Grams of the tap.
        items: trajectories that were not fitted on.
        rows: the fitted rows.
        anchors: steps at which the network runs.
        tap: forecast tap.
        closed_loop: (step, error) pairs, see `closed_loop_state_errors`; None leaves the curve out.
        out: folder, made when missing.

    Returns:
        The curves by name.

    Raises:
        ValueError: `items` is empty.
    """
    if not len(items):
        raise ValueError(
            "a fit report needs held-out trajectories; set validation_fraction above 0."
        )
    grams = recording.stack(f"gram/{tap}", items)
    curves = {
        "oracle_all": _curve(1 - projection_fidelity(grams)),
        "oracle_anchors": _curve(1 - projection_fidelity(grams, anchors)),
        "open_loop": _curve(relative_errors(grams.unsqueeze(-3), rows)),
    }
    if closed_loop is not None:
        curves["closed_loop"] = closed_loop
    out.mkdir(parents=True, exist_ok=True)
    content = {"tap": tap, "anchors": list(anchors), "items": list(items), "relative_error": curves}
    (out / "fit_report.json").write_text(json.dumps(content, indent=1) + "\n")
    step_errors(labelled(curves)).save(out / "fit_report.png")
    return curves


def labelled(curves: dict[str, Curve]) -> dict[str, Curve]:
    """The curves of a report in drawing order, by their labels."""
    return {label: curves[name] for name, label in CURVES.items() if name in curves}


def _curve(errors: Float[Tensor, "n branches S"]) -> Curve:
    """Mean over trajectories and branches of every step that has something before it."""
    means = errors.mean((0, 1)).clamp_min(0).tolist()
    return [(step, error) for step, error in enumerate(means) if step]


class StateKeeper(Observer):
    """Keeps the sampler's states of a run."""

    def on_step(self, record: StepRecord) -> None:
        """Keep the state that the step led to."""
        if record.index == 0:
            self.states: list[Tensor] = []
        self.states.append(record.after.detach().float())


def closed_loop_state_errors(
    pipe: Any,
    predictor: L2P,
    tap: str,
    recording: Recording,
    items: Sequence[int],
    batch_size: int = 16,
) -> Curve:
    """||x_t - x_t(full run)|| / ||x_t(full run)|| after every step of a run that forecasts.

    Args:
        pipe: the recorded pipeline.
        predictor: rows to forecast with, on its own anchors.
        tap: forecast tap.
        recording: holds the states of the full run.
        items: trajectories to run again.
        batch_size: trajectories per pipeline call.

    Returns:
        (step, error) pairs, the error averaged over trajectories.
    """
    references = References(recording, items, batch_size)
    keeper = StateKeeper()
    session = Session(pipe, Forecaster(predictor, tap, predictor.anchors), [keeper])
    errors = []
    try:
        for batch in references.batches:
            generate_batch(pipe, batch, output_type="latent", **references.settings)
            reached = torch.stack(keeper.states, dim=1).flatten(2).cpu()  # (B, S, M)
            states = recording.stack("states", [item.index for item in batch])
            full = states[:, 1:].flatten(2)
            errors.append((reached - full).norm(dim=-1) / full.norm(dim=-1))
    finally:
        session.detach()
    return list(enumerate(torch.cat(errors).mean(0).tolist()))


class FitReport(Callback):
    """Write the report of an L2P fit when it ends, on the trajectories its verdict judges by.

    TensorBoard shows it as `figures/fit_report`, where the trainer logs there.

    The closed-loop curve needs the network and is there for fits that run it (`L2PClosedLoop`).

    Args:
        out: folder of the report.
    """

    def __init__(self, out: str) -> None:
        self.out = Path(out)

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Refuse a fit that could not be reported before it takes any time.

        Raises:
            TypeError: the module is no L2P fit.
            ValueError: no trajectory is held out.
        """
        if not isinstance(pl_module, GramFit):
            raise TypeError(f"FitReport reports on a GramFit, got {type(pl_module).__name__}.")
        if not held_out(trainer):
            raise ValueError("FitReport needs held-out trajectories; raise validation_fraction.")

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write it, from one process only."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, GramFit)
        items = held_out(trainer)
        predictor, tap, recording = pl_module.predictor, pl_module.tap, pl_module.recording
        pipe, closed_loop = getattr(pl_module, "pipe", None), None
        if pipe is not None:
            closed_loop = closed_loop_state_errors(pipe, predictor, tap, recording, items)
        anchors = predictor.anchors
        rows = predictor.rows(anchors, recording.header.sigmas)
        curves = fit_report(recording, items, rows, anchors, tap, closed_loop, self.out)
        if isinstance(trainer.logger, TensorBoardLogger):
            figure = step_errors(labelled(curves)).figure()
            trainer.logger.experiment.add_figure(REPORT, figure, trainer.current_epoch)
