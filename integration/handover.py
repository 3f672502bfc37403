"""What a run begins with where it goes on from another: the features of that run's anchors.

Phases are runs of hosts of their own, whose histories begin with nothing. Where the second goes on
from the state that the first ended at, on a finer grid, what was computed on the coarse grid says
something of the steps to come: it is brought to the new grid and its clock.
Shapes: B samples, N tokens, D channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from foreseer.integration.histories import Histories, push
from foreseer.integration.observers import Observer, StepRecord
from foreseer.predictors.base import History

START_TOLERANCE = 1e-2  # of a state that was rounded to bfloat16 on its way, relative


@runtime_checkable
class Change(Protocol):
    """How a state and its features go from one run's grid to the next one's."""

    def lift(self, feature: Tensor) -> Tensor:
        """A feature on the new grid, `(rows, N, D)`."""

    def time(self, sigma: float) -> float:
        """The new run's flow time at one of the old run's."""

    def restricted(self, fine: Tensor, sigma: float) -> Tensor:
        """The old run's state, at its flow time `sigma`, that a new one's was made of."""


@dataclass(frozen=True)
class Handed:
    """What is left of a run for the one that goes on from it.

    Args:
        histories: features at its anchors, steps counted back from its end: -1 is its last.
        sigmas: flow time of all its steps, on its own clock.
        calls: transformer and guidance branches of the calls of its last step, in order.
        end: the state it came to.
        ends_at: its flow time there, on its own clock.
    """

    histories: Histories
    sigmas: Sequence[float]
    calls: Sequence[tuple[int, tuple[int, ...]]]
    end: Tensor
    ends_at: float


class Handover(Observer):
    """Keep a run's features at the tap of the run that goes on from it.

    Args:
        run: the run of `fs.forecasting` that comes before.
        change: from its grid to the other's.

    Raises:
        ValueError: it is detached.
    """

    to_need_less = "leave after= out"

    def __init__(self, run: Any, change: Change) -> None:
        if getattr(run, "session", None) is None:
            raise ValueError(
                f"found {run!r}, expected the run of a stage that is attached: inside of `with "
                "fs.forecasting(coarse, ...) as run:`."
            )
        self.session = run.session
        self.change = change
        self.tap = ""
        self._kept = Histories(None)
        self._left: Handed | None = None  # of the latest run, until the next one takes it

    def join(self, tap: str) -> None:
        """Keep this tap from the next run on."""
        self.tap, self.taps = tap, frozenset({tap})
        self.session.join(self)

    def leave(self) -> None:
        """Keep nothing any more."""
        self.session.leave(self)
        self._kept, self._left = Histories(None), None

    def on_step(self, record: StepRecord) -> None:
        """Keep the computed calls of a step; of the last one what the run came to.

        Raises:
            ValueError: samples have anchors of their own.
        """
        if record.index == 0:
            self._kept, self._left = Histories(None), None
        for call in record.calls:
            if call.taps is not None:
                self._keep(call.step, call.taps[self.tap], call.starts, len(record.before))
        if record.index == len(record.sigmas) - 1:
            calls = [(call.step.expert, call.step.branches) for call in record.calls]
            ends_at = float(self.session.host.scheduler.sigmas[len(record.sigmas)])
            self._left = Handed(self._kept, record.sigmas, calls, record.after, ends_at)
            self._kept = Histories(None)

    def _keep(self, step: Any, feature: Tensor, starts: bool, samples: int) -> None:
        if feature.shape[0] != samples * len(step.branches):
            raise ValueError(
                f"of {samples} samples some were computed at step {step.index} and others not; "
                "where a run goes on from this one all samples have the same anchors: use a list."
            )
        found = None if starts else self._kept.at(step)
        if found is None:
            found = self._kept.start(step)
        found.setdefault(self.tap, [History()])
        push(found[self.tap], step, feature, None)

    def take(self) -> Handed:
        """What the run before left, once.

        Raises:
            ValueError: there was none since.
        """
        left, self._left = self._left, None
        if left is None:
            raise ValueError(
                "no run of the stage before has ended since the last one of this stage, so there "
                "is nothing to go on from; run the stages in turn, or attach without after=."
            )
        return left

    def begun(self, left: Handed, window: int | None) -> Histories:
        """The histories that the next run begins with, on its grid and its clock.

        Args:
            left: of the run before.
            window: anchors to keep; None keeps all.
        """
        return left.histories.mapped(
            lambda history: history.resample(
                self.change.lift, self.change.time, len(left.sigmas), window
            )
        )

    def check_start(self, left: Handed, start: Tensor) -> None:
        """Raise unless a run starts from what the run before came to.

        Args:
            left: of the run before.
            start: the state of the first step.

        Raises:
            ValueError: it starts from another state.
        """
        found = self.change.restricted(start, left.ends_at)
        end = left.end.to(found)
        if found.shape == end.shape:
            gap = float((found - end).abs().max())
            if gap <= START_TOLERANCE * max(1.0, float(end.abs().max())):
                return
            told = f"their difference is up to {gap:.2g}"
        else:
            told = f"shapes {tuple(start.shape)} after {tuple(left.end.shape)}"
        raise ValueError(
            f"this run does not start from what the stage before came to ({told}), so its features "
            "say nothing of it; run the stages in turn, on the same samples."
        )

    def state_bytes(self) -> int:
        """Bytes of the features kept."""
        left = 0 if self._left is None else self._left.histories.state_bytes()
        return self._kept.state_bytes() + left

    def most_bytes(self, index: int, num_steps: int) -> int:
        """All steps to come at most."""
        return self.state_bytes() * num_steps // (index + 1)

    def forget(self) -> None:
        """A run is over: what it left stays until it is taken."""
        self._kept = Histories(None)


def same_rows(feature: Tensor, x_t: Tensor | None) -> bool:
    """Whether a feature has the rows of a call, and its tokens where those can be told."""
    if x_t is None:
        return True
    tokens = feature.ndim == x_t.ndim == 3 and feature.shape[1] != x_t.shape[1]
    return feature.shape[0] == x_t.shape[0] and not tokens
