"""Whoever takes part in a run: it is called back at the end of every step.

An `Observer` watches: a recorder, a timer. A `Source` also says which calls run the network and
what stands in for the others: a predictor, or features that are put back.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from foreseer.integration.host.layout import Layout
from foreseer.integration.policy import Schedule
from foreseer.integration.report import Report
from foreseer.predictors.base import Step


@dataclass(frozen=True)
class CallRecord:
    """One call of a transformer in a step that is over.

    Args:
        step: the step, with the transformer and the guidance branches of the call.
        taps: what was captured where the network ran, of the samples that it ran for; None where
            the call was forecast.
        feature: the forecast, where there was one and an observer asks for forecasts.
        starts: whether the branches were not known before, so that no history of theirs goes on.
        attention: attention outputs by block, where tokens are to be computed.
        image_tokens: which tokens of the head's input enter the picture, `(rows, tokens)` of bool;
            None where all do or no observer asks.
        layout: where the tokens of the head's input lie in the output; None where nobody asks.
        slot: tells apart calls that hold the same branches.
    """

    step: Step
    taps: dict[str, Tensor] | None
    feature: Tensor | None = None
    starts: bool = False
    attention: Mapping[str, Tensor] = field(default_factory=dict)
    image_tokens: Tensor | None = None
    layout: Layout | None = None
    slot: Hashable = None


@dataclass(frozen=True)
class StepRecord:
    """A step of a run that is over.

    Args:
        index: counted from the first step that is evaluated.
        sigmas: flow time of every step of the run.
        settings: what the pipeline call sets that changes the function, as the step ended.
        v: the guided prediction, which took the latents from `before` to `after`.
        before: the latents that the step started from.
        after: the latents that it ended at.
        calls: its calls, in order.
        opening: the settings as the run began; a pipeline may change them before its first step
            ends.
    """

    index: int
    sigmas: Sequence[float]
    settings: Mapping[str, float | None]
    v: Tensor
    before: Tensor
    after: Tensor
    calls: Sequence[CallRecord] = ()
    opening: Mapping[str, float | None] = field(default_factory=dict)


class Observer:
    """Called back at the end of every step of a run.

    Attributes:
        taps: taps to capture where the network runs.
        wants_forecasts: whether records shall hold forecasts.
        wants_image_tokens: whether the session shall find out which tokens of the head's input
            enter the picture.
        wants_layout: whether it shall find out where the head's tokens lie in the output.
        to_need_less: what a user can do, besides fewer samples, when memory is too little.
    """

    taps: frozenset[str] = frozenset()
    wants_forecasts: bool = False
    wants_image_tokens: bool = False
    wants_layout: bool = False
    to_need_less: str = ""

    def on_step(self, record: StepRecord) -> None:
        """A step is over; the first one of a run has index 0. What is raised ends the run."""

    def state_bytes(self) -> int:
        """Bytes of what is kept of the run."""
        return 0

    def most_bytes(self, index: int, num_steps: int) -> int:
        """Bytes of what is kept at most by the end of the run, known after a step `index`."""
        return 0

    def forget(self) -> None:
        """The run is over, finished or not: let go of what only its own steps could read."""


class Source(Observer):
    """Says which calls run the network and stands in for it at the others.

    Attributes:
        tap: `output`, `hidden`, `residual`, `before_last` or `deep.<d>`: what is put back.
        schedule: which calls run.
        deep: stands in for what lies between the outer blocks where these alone run; None where the
            schedule has no such steps.
        needs: `Step` fields that forecasts need and that exist only inside the forward: `tokens`,
            `modulation`.
        settings: what the pipeline call sets, set before `open`.
        memory_budget: bytes that cached features may take; None for what the device has.
        follows: transformer and guidance branches of the calls of a step, where the run goes on
            from one that made them; set by `open`.
    """

    tap: str
    schedule: Schedule
    deep: "Source | None" = None
    needs: frozenset[str] = frozenset()
    settings: Mapping[str, float | None] = {}
    memory_budget: int | None = None
    follows: Sequence[tuple[int, tuple[int, ...]]] = ()

    @property
    def block_weights(self) -> Mapping[str, Tensor] | None:
        """Weights of the last block where forecasts enter it, see `Predictor`."""
        return None

    def open(self, sigmas: list[float]) -> None:
        """A new run starts on this grid of sigmas; forget the last one."""

    def told(self, step: Step) -> float | None:
        """Flow time to tell the network where it runs at a step; None for the step's own."""
        return None

    def knows(self, step: Step, slot: Hashable = None) -> bool:
        """Whether a call can be forecast; one that cannot is computed."""
        raise NotImplementedError

    def forecast(self, step: Step, slot: Hashable = None) -> Tensor:
        """What is put back at the tap in a call that it knows."""
        raise NotImplementedError

    def reset(self, reason: str) -> None:
        """Forget what the run under way has computed; `reason` says what made it worthless."""
        raise ValueError(f"{type(self).__name__} cannot go on from the middle of a run ({reason}).")

    def beside(self) -> "Source":
        """One of the same kind for a run beside others; it knows nothing of this one's.

        Raises:
            ValueError: it follows one run at a time.
        """
        raise ValueError(f"{type(self).__name__} follows one run at a time; open it without a key.")

    def streams(self, step: Step) -> list[Tensor]:
        """Forecasts of what enters the last block, where the schedule checks forecasts."""
        raise NotImplementedError

    def finish(self, report: Report) -> None:
        """The run is over; add to its report what only the schedule knows."""
        self.schedule.finish(report)
