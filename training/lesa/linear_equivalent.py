"""LESA without its networks, by alternating least squares.

F_hat_t = F_{t-1} + alpha[t] sum_j w[stage(t), j] F_{t-K+j}, per branch: a number per step and a
filter per stage, to which the published gate comes on a fixed grid (its input is a function of the
step alone). The constant is left out.
Shapes: S sampling steps, K taps.

The second phase runs the sampler with the filters so far, adds what their forecasts were made from
(lesa_samples.py) to all windows before, and solves again: the counterpart of closed-loop training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.evaluation.measure import References, log_error
from foreseer.predictors.lesa import LesaPredictor
from foreseer.training.lesa.lesa_samples import Sample, collect
from foreseer.training.lesa.stages import (
    Quadratic,
    add_sample,
    find_stages,
    from_grams,
    solve,
    stage_starts,
    window_steps,
)
from foreseer.trajectories.gram import sum_grams
from foreseer.trajectories.prompts import Item
from foreseer.trajectories.recording import Recording


@dataclass(frozen=True)
class LinearEquivalent:
    """A fitted table.

    Args:
        alpha: gate of every step; 0 where nothing is forecast.
        taps: filter of every stage, oldest feature first.
        starts: first step of every stage.
        losses: summed squared error at the start and after every round.
    """

    alpha: Float[Tensor, "branches S"]
    taps: Float[Tensor, "branches stages K"]
    starts: list[int]
    losses: list[float]

    def filters(self) -> Float[Tensor, "branches S K"]:
        """alpha[t] w[stage(t)]: what is added to reuse at every step."""
        return self.alpha[..., None] * self.taps[:, stage_of(self.starts, self.alpha.shape[1])]

    def rows(self) -> Float[Tensor, "branches S S"]:
        """The same as rows over all earlier steps, to be folded onto anchors (`fold`)."""
        branches, num_steps = self.alpha.shape
        rows = torch.zeros(branches, num_steps, num_steps, dtype=torch.float64)
        for t, filters in enumerate(self.filters().unbind(1)):
            if t == 0:
                continue
            rows[:, t, t - 1] = 1.0
            seen = torch.tensor(window_steps(t, filters.shape[1]))
            rows[:, t].index_add_(1, seen, filters)
        return rows


def stage_of(starts: Sequence[int], num_steps: int) -> list[int]:
    """Stage of every step."""
    return [sum(step >= start for start in starts) - 1 for step in range(num_steps)]


def fit_linear_equivalent(
    quadratic: Quadratic, starts: Sequence[int], num_rounds: int = 50
) -> LinearEquivalent:
    """Solve for gates and filters in turns; the loss never rises.

    With the filters fixed, alpha[t] = (w . right_t) / (w^T normal_t w); with the gates fixed, the
    filter of a stage solves (sum_t alpha[t]^2 normal_t) w = sum_t alpha[t] right_t. The start is
    the best filter per stage with all gates 1.

    Args:
        quadratic: from a recording, or from the windows of runs that forecast.
        starts: first step of every stage.
        num_rounds: rounds of both solves.
    """
    branches, num_steps = quadratic.constant.shape
    stages = torch.tensor(stage_of(starts, num_steps))
    counted = (quadratic.constant != 0).double()
    alpha = counted.clone()
    taps = _solve_taps(quadratic, alpha, stages, len(starts))
    fitted = LinearEquivalent(alpha, taps, list(starts), [])
    losses = [float(quadratic.error(fitted.filters()).sum())]
    for _ in range(num_rounds):
        of_step = taps[:, stages]
        bent = torch.einsum("bsk,bskl,bsl->bs", of_step, quadratic.normal, of_step)
        slope = (of_step * quadratic.right).sum(-1)
        alpha = (slope / bent.where(bent > 0, 1.0)).where(bent > 0, 0.0) * counted
        taps = _solve_taps(quadratic, alpha, stages, len(starts))
        fitted = LinearEquivalent(alpha, taps, list(starts), losses)
        losses.append(float(quadratic.error(fitted.filters()).sum()))
    return fitted


def _solve_taps(
    quadratic: Quadratic, alpha: Tensor, stages: Tensor, num_stages: int
) -> Float[Tensor, "branches stages K"]:
    normal = torch.einsum("bs,bskl->bskl", alpha.square(), quadratic.normal)
    right = alpha[..., None] * quadratic.right
    sums = []
    for stage in range(num_stages):
        mine = stages == stage
        sums.append(solve(normal[:, mine].sum(1), right[:, mine].sum(1)))
    return torch.stack(sums, dim=1)


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
