"""What LESA is trained on: the features before a forecast step, and the full run's feature at it.

In the first phase they are recorded; in the second they are what a run that forecasts really sees.
The network runs under `no_grad` in both, so a gradient reaches the predictor alone.
Shapes: B batch, S sampling steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foreseer.integration.forecaster import Forecaster
from foreseer.integration.observers import Observer, StepRecord
from foreseer.integration.session import Session
from foreseer.predictors.base import Step
from foreseer.predictors.ladder import rises
from foreseer.predictors.lesa import LesaPredictor
from foreseer.training.recorded import open_recording
from foreseer.trajectories.prompts import Item, generate_batch
from foreseer.trajectories.recording import Recording


def open_features(folder: str, tap: str) -> Recording:
    """A recording that holds features of a tap.

    Raises:
        ValueError: it does not, or its flow time rises.
    """
    recording = open_recording(folder, tap)
    header = recording.header
    if rises(header.sigmas):
        raise ValueError(
            f"{folder} is of inversions: in its {header.num_steps} steps flow time rises from "
            f"{header.sigmas[0]:g} to {header.sigmas[-1]:g}, and this fit is for runs from noise "
            "to a sample. Fit method='readout', 'closed_loop' or 'lstsq'."
        )
    if header.features == "none":
        raise ValueError(
            f"{folder} holds Grams only; record it again with features: full (or tokens)."
        )
    return recording


def largest_values(
    recording: Recording, tap: str, items: Sequence[int]
) -> Float[Tensor, " branches"]:
    """Largest absolute value of the features of each branch."""
    largest = torch.zeros(recording.header.num_branches)
    for item in items:
        features = recording.load(item, [f"feature/{tap}"])[f"feature/{tap}"]
        largest = torch.maximum(largest, features.float().abs().flatten(1).amax(1))
    return largest


@dataclass(frozen=True)
class Sample:
    """One forecast to learn from; the branches lie one after the other on the batch axis.

    Args:
        step: the step that is forecast.
        queue: features before it, oldest first, as `LesaPredictor.correct` takes them.
        target: the full run's feature at the step.
    """

    step: Step
    queue: list[Tensor]
    target: Tensor


def recorded_samples(
    features: Float[Tensor, "B branches S *shape"],
    anchors: Sequence[int],
    predictor: LesaPredictor,
) -> list[Sample]:
    """The forecast steps of recorded runs, with recorded features in the queue.

    Args:
        features: recorded features of one tap.
        anchors: steps at which the network runs.
        predictor: says which features its queue holds.
    """
    num_branches, num_steps = features.shape[1:3]
    branches = tuple(range(num_branches))
    found = []
    for t in range(num_steps):
        if t in anchors:
            continue
        seen = [s for s in range(t) if predictor.feedback or s in anchors]
        queue = [_at(features, s, branches) for s in seen[-max(predictor.taps) :]]
        step = Step(t, predictor.sigmas[t], num_steps, branches)
        found.append(Sample(step, queue, _at(features, t, branches)))
    return found


class Collector(Observer):
    """Keeps what every forecast of a run was made from, its own forecasts among it.

    Args:
        predictor: forecasts as it does when deployed.
        tap: `output`, `hidden` or `residual`.
        tokens: tokens that were recorded, which alone are kept; None keeps all.
    """

    wants_forecasts = True

    def __init__(
        self, predictor: LesaPredictor, tap: str, tokens: Int[Tensor, " n"] | None = None
    ) -> None:
        self.lesa = predictor
        self.tap = tap
        self.tokens = tokens

    def on_step(self, record: StepRecord) -> None:
        """Put the queues of the step's forecasts aside, then add its features to them."""
        if record.index == 0:
            self.queues: dict[tuple[int, int], list[Tensor]] = {}  # by transformer and branch
            self.forecasts: list[tuple[Step, list[Tensor]]] = []
        for call in record.calls:
            step, feature = call.step, call.feature
            if call.taps is not None:
                feature = call.taps[self.tap]
            else:
                self.forecasts.append((step, self._queue(step)))
            if feature is not None and (call.taps is not None or self.lesa.feedback):
                self._push(step, feature)
        self.final = record.after.detach()

    def samples(self, features: Float[Tensor, "B branches S *shape"]) -> list[Sample]:
        """The forecasts of the run, with the full run's features as targets."""
        return [
            Sample(step, queue, _at(features, step.index, step.branches))
            for step, queue in self.forecasts
        ]

    def _push(self, step: Step, feature: Tensor) -> None:
        parts = self._kept(feature).chunk(len(step.branches))
        for branch, part in zip(step.branches, parts, strict=True):
            queue = self.queues.setdefault((step.expert, branch), [])
            queue.append(part)
            del queue[: -max(self.lesa.taps)]

    def _queue(self, step: Step) -> list[Tensor]:
        """The newest features of a call, branch after branch."""
        queues = [self.queues[step.expert, branch] for branch in step.branches]
        return [torch.cat(parts) for parts in zip(*queues, strict=True)]

    def _kept(self, feature: Tensor) -> Tensor:
        kept = feature if self.tokens is None else feature[:, self.tokens]
        return kept.detach().float().to(self.lesa.weight.device)


@torch.no_grad()
def collect(
    pipe: Any,
    predictor: LesaPredictor,
    tap: str,
    anchors: Sequence[int],
    items: Sequence[Item],
    tokens: Int[Tensor, " n"] | None = None,
    **settings: Any,
) -> Collector:
    """Run a batch while forecasting and keep what the forecasts were made from.

    Args:
        pipe: the pipeline.
        predictor: forecasts with the weights it has now, at every step of the run.
        tap: `output`, `hidden` or `residual`.
        anchors: steps at which the network runs.
        items: the batch.
        tokens: recorded tokens; None where all are.
        settings: keyword arguments of the pipeline call.
    """
    collector = Collector(predictor, tap, tokens)
    session = Session(pipe, Forecaster(predictor, tap, anchors), [collector])
    try:
        generate_batch(pipe, items, output_type="latent", **settings)
    finally:
        session.detach()
    return collector


def mean_absolute_error(predictor: LesaPredictor, samples: Sequence[Sample]) -> Float[Tensor, ""]:
    """Mean over samples and elements of |F_hat - F|, differentiable in the predictor."""
    errors = [
        (predictor.correct(sample.queue, sample.step) - sample.target).abs().mean()
        for sample in samples
    ]
    return torch.stack(errors).mean()


@torch.no_grad()
def sample_errors(
    predictor: LesaPredictor, samples: Sequence[Sample]
) -> list[tuple[Step, Float[Tensor, ""]]]:
    """||F_hat - F|| / ||F|| of every forecast, with its step."""
    found = []
    for sample in samples:
        forecast = predictor.correct(sample.queue, sample.step)
        error = (forecast - sample.target).norm() / sample.target.norm()
        found.append((sample.step, error))
    return found


def stage_errors(
    predictor: LesaPredictor, errors: Sequence[tuple[Step, Float[Tensor, ""]]]
) -> dict[int, Float[Tensor, ""]]:
    """Mean of `sample_errors` over the forecast steps of every stage that has some."""
    stages: dict[int, list[Tensor]] = {}
    for step, error in errors:
        stages.setdefault(predictor.stage(step.sigma), []).append(error)
    return {stage: torch.stack(found).mean() for stage, found in sorted(stages.items())}


def _at(features: Tensor, step: int, branches: Sequence[int]) -> Tensor:
    """Recorded features of one step, branch after branch on the batch axis."""
    return torch.cat([features[:, branch, step] for branch in branches]).float()
