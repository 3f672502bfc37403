"""Which calls run the network: a list of anchors, or a schedule that decides while the run goes on.

A schedule knows no hooks and no features of its own. The session asks it `before` every call; where
it says PROBE, the first block runs and `look` decides; where it says CHECK, the last block runs on
its forecast input and `check` decides, sample by sample.
"""

from collections.abc import Container, Sequence
from enum import Enum, auto

import torch
from torch import Tensor

from foreseer.integration.host.call import Narrowed
from foreseer.integration.report import Report
from foreseer.predictors.base import Step


class Action(Enum):
    """What becomes of a call."""

    RUN = auto()
    FORECAST = auto()
    PROBE = auto()  # the first block decides
    CHECK = auto()  # the last block decides on the forecast


class Schedule:
    """Which calls run the network; this one runs all.

    Attributes:
        probe: what `look` is shown of the first block: `modulated`, what enters its attention, or
            `first_block`, what it adds to the stream; None where nothing is PROBEd.
        checks: whether forecasts are CHECKed, so that every sample has anchors of its own.
    """

    probe: str | None = None
    checks: bool = False

    def open(self, num_steps: int, anchors: Sequence[int] = ()) -> None:
        """A run starts: forget the last one.

        Args:
            num_steps: its steps.
            anchors: steps that are computed whatever the schedule says.
        """

    def before(self, step: Step) -> Action:
        """What becomes of the next call, one of this step."""
        return Action.RUN

    def look(self, step: Step, statistic: Tensor) -> bool:
        """Whether the network runs at this step, given the first block's statistic."""
        raise NotImplementedError

    def check(self, step: Step, forecast: Tensor, computed: Tensor) -> None:
        """Accept or refuse each sample's forecast of what enters the head.

        Args:
            step: the step, with the branches of the call.
            forecast: the forecast.
            computed: what the last block made of its own forecast input.
        """
        raise NotImplementedError

    def refused_at(self, step: Step) -> list[int]:
        """Samples whose forecast at this step was refused, which are computed."""
        return []

    def computed(self, step: Step, num_samples: int, first: bool, known: bool) -> list[int] | None:
        """Which samples a computed call of a step that is over had; None for all, as one.

        Args:
            step: the step.
            num_samples: samples of a call that holds all.
            first: whether it was the first call of the step.
            known: whether an earlier anchor of the call is known.
        """
        return None

    def close(self, index: int) -> None:
        """A step is over, and its computed calls were told."""

    def to_come(self, index: int, num_steps: int) -> int:
        """Anchors after a step, at most."""
        return num_steps - 1 - index

    def narrow(self, narrowed: Narrowed) -> None:
        """A call goes on with some of the branches of an earlier one: guidance has stopped."""

    def forget(self) -> None:
        """The run is over: let go of its tensors."""

    def state_bytes(self) -> int:
        """Bytes kept between steps."""
        return 0

    def finish(self, report: Report) -> None:
        """The run is over; add to its report what only the schedule knows."""


class Anchors(Schedule):
    """Run the network at the steps of a list.

    Args:
        anchors: the steps; None takes those the run is opened with.
    """

    def __init__(self, anchors: Container[int] | None = None) -> None:
        self.given = anchors is not None
        self.anchors: Container[int] = () if anchors is None else anchors

    def open(self, num_steps: int, anchors: Sequence[int] = ()) -> None:
        """Take the anchors of the run."""
        if not self.given:
            self.anchors = anchors

    def before(self, step: Step) -> Action:
        """Run at the anchors, forecast elsewhere."""
        return Action.RUN if step.index in self.anchors else Action.FORECAST

    def to_come(self, index: int, num_steps: int) -> int:
        """Anchors of the list after a step."""
        return sum(step in self.anchors for step in range(index + 1, num_steps))


class ProbeSchedule(Schedule):
    """Make a step an anchor when a cheap tensor of this step says the feature has moved.

    The first call of a step decides for all its calls.

    Attributes:
        kept: the probe of an earlier step that the next one is compared with.
    """

    kept: Tensor | None = None

    def open(self, num_steps: int, anchors: Sequence[int] = ()) -> None:
        """Forget the last run."""
        self.planned = frozenset(anchors)
        self.decided: tuple[int, bool] = (-1, True)  # the newest step that was, and how
        self.kept = None

    def before(self, step: Step) -> Action:
        """Probe, unless an earlier call of this step has."""
        index, runs = self.decided
        if index != step.index:
            return Action.PROBE
        return Action.RUN if runs else Action.FORECAST

    def look(self, step: Step, statistic: Tensor) -> bool:
        """Judge the statistic; the answer holds for all calls of the step."""
        if not is_finite(statistic):
            raise ValueError(
                f"the first block of step {step.index} holds NaN or Inf, so nothing can be decided "
                "from it. Check the model's dtype and inputs."
            )
        runs = self.judge(step.index, statistic, step.index in self.planned)
        self.decided = step.index, runs
        return runs

    def judge(self, index: int, statistic: Tensor, planned: bool) -> bool:
        """Whether a step is an anchor; called once for every step of a run, in order.

        Args:
            index: the step.
            statistic: this step's probe, of all samples and branches of the first call.
            planned: the step is an anchor whatever the probe says.
        """
        raise NotImplementedError

    def compares(self, statistic: Tensor) -> bool:
        """Whether an earlier probe is there that a step's has the shape of."""
        return self.kept is not None and self.kept.shape == statistic.shape

    def narrow(self, narrowed: Narrowed) -> None:
        """Compare with the branches that are left alone."""
        if self.kept is not None and len(self.kept) == narrowed.rows:
            self.kept = narrowed.take(self.kept)

    def forget(self) -> None:
        """Let go of what is compared with."""
        self.kept = None

    def state_bytes(self) -> int:
        """Bytes of what is compared with."""
        return 0 if self.kept is None else self.kept.numel() * self.kept.element_size()


class TeaCache(ProbeSchedule):
    """Accumulate the polynomial-mapped relative change of the first block's modulated input.

    A step adds p(mean|m_s - m_{s-1}| / mean|m_{s-1}|) to a sum and is forecast while the sum stays
    below the threshold; an anchor sets it to 0 (arXiv 2411.19108, eq. 4 to 6). The first and the
    last step are anchors.

    Args:
        threshold: the paper's delta, > 0; larger skips more.
        coefficients: of p, highest power first; the default is p(x) = x, without calibration.

    Raises:
        ValueError: the threshold is not positive, or there are no coefficients.
    """

    probe = "modulated"

    def __init__(self, threshold: float, coefficients: Sequence[float] = (1.0, 0.0)) -> None:
        check_threshold(threshold)
        if not coefficients:
            raise ValueError("coefficients is empty, expected those of a polynomial.")
        self.threshold = threshold
        self.coefficients = tuple(coefficients)

    def open(self, num_steps: int, anchors: Sequence[int] = ()) -> None:
        """Forget the last run."""
        super().open(num_steps, anchors)
        self.last = num_steps - 1
        self.total = 0.0

    def judge(self, index: int, statistic: Tensor, planned: bool) -> bool:
        """Add this step's change; see the base class."""
        first = not self.compares(statistic)
        if self.kept is not None and not first:
            change = relative_l1(statistic, self.kept)
            mapped = 0.0
            for coefficient in self.coefficients:
                mapped = mapped * change + coefficient
            self.total += mapped
        self.kept = statistic
        if planned or first or index == self.last or not self.total < self.threshold:  # NaN, too
            self.total = 0.0
            return True
        return False


class FirstBlock(ProbeSchedule):
    """Forecast while the first block's residual is close to that of the last anchor.

    mean|r_s - r_a| / mean|r_a| < threshold (FirstBlockCache of ParaAttention and diffusers).

    Args:
        threshold: > 0; diffusers' default is 0.05.

    Raises:
        ValueError: the threshold is not positive.
    """

    probe = "first_block"

    def __init__(self, threshold: float = 0.05) -> None:
        check_threshold(threshold)
        self.threshold = threshold

    def judge(self, index: int, statistic: Tensor, planned: bool) -> bool:
        """Compare with the last anchor; see the base class."""
        if not planned and self.kept is not None and self.compares(statistic):
            if relative_l1(statistic, self.kept) < self.threshold:
                return False
        self.kept = statistic
        return True


def relative_l1(new: Tensor, old: Tensor) -> float:
    """mean|new - old| / mean|old| over all entries, in float32."""
    change = (new.float() - old.float()).abs().mean()
    return float(change / old.float().abs().mean())


def check_threshold(threshold: float) -> None:
    """Raise unless the threshold is positive."""
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}, expected a number > 0.")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf, by its sum in float32 or wider."""
    wide = torch.promote_types(tensor.dtype, torch.float32)  # float16 sums overflow at 65504
    return bool(torch.isfinite(tensor.sum(dtype=wide)))
