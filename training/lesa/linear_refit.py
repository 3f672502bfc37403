"""The linear equivalent of LESA in two phases: solved on recorded windows, then on those of runs.

The second phase runs the sampler with the filters so far, adds what their forecasts were made from
(lesa_samples.py) to all windows before, and solves again: the counterpart of closed-loop training.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foreseer.evaluation.measure import References, log_error
from foreseer.predictors.lesa import LesaPredictor
from foreseer.training.lesa.lesa_samples import Sample, collect
from foreseer.training.lesa.linear_equivalent import LinearEquivalent, fit_linear_equivalent
from foreseer.training.lesa.stages import find_stages, stage_starts
from foreseer.training.lesa.windows import Quadratic, add_sample, from_grams
from foreseer.trajectories.gram_sums import sum_grams
from foreseer.trajectories.prompts import Item
from foreseer.trajectories.recording import Recording


def table_predictor(
    equivalent: LinearEquivalent, sigmas: Sequence[float], boundaries: Sequence[float]
) -> LesaPredictor:
    """A `LesaPredictor` with these numbers in its table and filters.

    Args:
        equivalent: fitted on stages with these boundaries.
        sigmas: flow time of every step.
        boundaries: between the stages.
    """
    branches, stages, window = equivalent.taps.shape
    predictor = LesaPredictor(
        sigmas, branches, boundaries, (window,) * stages, gate="table", bias=False
    )
    with torch.no_grad():
        predictor.table.copy_(equivalent.alpha)
        predictor.weight.copy_(equivalent.taps)
    return predictor


def add_samples(quadratic: Quadratic, samples: Sequence[Sample]) -> None:
    """Add the forecasts of a run, branch by branch, in place."""
    for sample in samples:
        missing = quadratic.window - len(sample.queue)
        queue = [sample.queue[0]] * missing + sample.queue[-quadratic.window :]
        parts = [feature.chunk(len(sample.step.branches)) for feature in [*queue, sample.target]]
        for place, branch in enumerate(sample.step.branches):
            *seen, target = [part[place] for part in parts]
            add_sample(quadratic, branch, sample.step.index, seen, target)


def refit(
    pipe: Any,
    recording: Recording,
    anchors: Sequence[int],
    train_items: Sequence[int],
    val_items: Sequence[int],
    tap: str = "hidden",
    window: int = 8,
    num_stages: int = 3,
    num_runs: int = 3,
    ridge: float = 1e-2,
    batch_size: int = 16,
) -> list[tuple[LesaPredictor, float]]:
    """Predictors of both phases, each with its closed-loop error on `val_items` in dB.

    Args:
        pipe: the recorded pipeline.
        recording: with all features of the tap.
        anchors: steps at which the network runs.
        train_items: trajectories to fit on.
        val_items: trajectories to measure on.
        tap: `hidden` or `output`.
        window: taps of every stage.
        num_stages: stages; their boundaries are found on the recording.
        num_runs: runs over `train_items` in the second phase, each followed by a solve.
        ridge: draws the filters to reuse, relative to the squared norm of each feature. Windows of
            a run hold combinations of few features, so that without it the filters explode.
        batch_size: trajectories per pipeline call.

    Returns:
        The predictor of the first phase, then one per run.
    """
    sigmas = recording.header.sigmas
    name = f"gram/{tap}"
    grams = sum_grams(recording, [name], train_items)[name][None]  # both only need the sum
    boundaries = find_stages(grams, sigmas, (window,) * num_stages, anchors)
    starts = stage_starts(sigmas, boundaries)
    quadratic = from_grams(grams, window, anchors)
    found: list[tuple[LesaPredictor, float]] = []
    training = References(recording, train_items, batch_size)
    validation = References(recording, val_items, batch_size)
    for number in range(num_runs + 1):
        equivalent = fit_linear_equivalent(quadratic.relative().damped(ridge), starts)
        predictor = table_predictor(equivalent, sigmas, boundaries)
        finals = []
        for batch in validation.batches:
            finals.append(_run(pipe, predictor, recording, anchors, tap, batch)[1])
        error = float(log_error(torch.cat(finals), validation.finals).mean())
        found.append((predictor, error))
        if number == num_runs:
            break
        for batch in training.batches:
            add_samples(quadratic, _run(pipe, predictor, recording, anchors, tap, batch)[0])
    return found


def _run(
    pipe: Any,
    predictor: LesaPredictor,
    recording: Recording,
    anchors: Sequence[int],
    tap: str,
    batch: Sequence[Item],
) -> tuple[list[Sample], Tensor]:
    """Samples and final latents of one batch."""
    settings = References(recording, []).settings
    collector = collect(pipe, predictor, tap, anchors, batch, **settings)
    assert collector.final is not None  # a run has steps
    features = recording.stack(f"feature/{tap}", [item.index for item in batch])
    return collector.samples(features), collector.final
