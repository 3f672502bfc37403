"""Which calls run the network: a list of anchors, or a schedule that decides while the run goes on.

A schedule knows no hooks and no features of its own. The session asks it `before` every call; where
it says PROBE, the first block runs and `look` decides; where it says CHECK, the last block runs on
its forecast input and `check` decides, sample by sample.
"""

import math
import warnings
from collections.abc import Container, Sequence
from enum import Enum, auto

import torch
from jaxtyping import Float
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
    SHALLOW = auto()  # the outer blocks run on a forecast of what lies between them


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
        shallow: those of them at which the outer blocks run alone.
    """

    def __init__(self, anchors: Container[int] | None = None, shallow: Container[int] = ()) -> None:
        self.given = anchors is not None
        self.shallow = shallow
        self.anchors: Container[int] = () if anchors is None else anchors

    def open(self, num_steps: int, anchors: Sequence[int] = ()) -> None:
        """Take the anchors of the run."""
        if not self.given:
            self.anchors = anchors

    def before(self, step: Step) -> Action:
        """Run at the anchors, all of the network or its outer blocks; forecast elsewhere."""
        if step.index in self.shallow:
            return Action.SHALLOW
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
                f"what step {step.index} is decided by, the first block or the sample, holds NaN "
                "or Inf. Check the model's dtype and inputs."
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

    probe: str | None = "modulated"

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


class SeaCache(TeaCache):
    """TeaCache's sum on the sample itself, behind a Wiener filter that follows the noise level.

    Along every axis the gain is a S / (a^2 S + b^2), S = 1 / |f|^power, a = 1 - sigma, b = sigma,
    f in cycles per entry; their product is divided by its mean (arXiv 2602.18993, eq. 7, on the
    latents as diffusers' SeaCache has it, where the paper filters TeaCache's input). No polynomial
    is calibrated, and no block runs to decide.

    Args:
        threshold: largest sum, > 0; larger skips more.
        power: of the falling spectrum, > 0; published is 3 for videos.
        grid: (height, width), or (frames, height, width), of packed latents `(B, N, C)` such as
            FLUX's; None takes the axes of latents `(B, C, ...)`.

    Raises:
        ValueError: an argument is out of range.
    """

    probe = None

    def __init__(
        self, threshold: float, power: float = 3.0, grid: Sequence[int] | None = None
    ) -> None:
        super().__init__(threshold)
        check_threshold(power, "power")
        self.power = power
        self.grid = None if grid is None else tuple(grid)

    def before(self, step: Step) -> Action:
        """Judge the sample at the first call of a step."""
        if self.decided[0] != step.index:
            self.look(step, self.filtered(step))
        return Action.RUN if self.decided[1] else Action.FORECAST

    def filtered(self, step: Step) -> Tensor:
        """The sample at a step behind the filter of its flow time.

        Raises:
            ValueError: the sample has no grid, or another than the one given.
        """
        x = step.x_t
        if x is not None and self.grid is not None and x.ndim == 3:
            fits = x.shape[1] == math.prod(self.grid)
            x = x.unflatten(1, self.grid).movedim(-1, 1) if fits else None
        if x is None or x.ndim < 4:
            found = "no sample" if step.x_t is None else f"a sample {tuple(step.x_t.shape)}"
            raise ValueError(
                f"SeaCache filters over height and width; found {found} with grid={self.grid}. "
                "Give the grid of packed latents in tokens, or use TeaCache."
            )
        axes, a = tuple(range(2, x.ndim)), min(max(1 - step.sigma, 1e-6), 1 - 1e-6)
        gain = torch.ones((), device=x.device)
        for axis in axes:
            rising = torch.fft.fftfreq(x.shape[axis], device=x.device).abs() ** self.power  # 1 / S
            own = a / (a**2 + (1 - a) ** 2 * rising)
            gain = gain * own.reshape(-1, *[1] * (x.ndim - 1 - axis))
        spectrum = torch.fft.fftn(x.float(), dim=axes)
        return torch.fft.ifftn(spectrum * (gain / gain.mean()), dim=axes).real


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


def check_threshold(threshold: float, name: str = "threshold") -> None:
    """Raise unless the threshold, or what the name says, is positive."""
    if not threshold > 0:
        raise ValueError(f"{name} is {threshold}, expected a number > 0.")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf, by its sum in float32 or wider."""
    wide = torch.promote_types(tensor.dtype, torch.float32)  # float16 sums overflow at 65504
    return math.isfinite(tensor.sum(dtype=wide).item())


class SpeCa(Schedule):
    """Check forecasts at the last block and compute a step again where they are off.

    The last block runs on its forecast input; a sample is accepted while
    ||F_hat - F|| / ||F|| <= max(threshold * decay^(s / S), floor), F_hat the forecast of what
    enters the head and F what the block makes of its input (arXiv 2509.11628, eq. 7 and 8). A
    refused sample is computed at the same step: the released code keeps it and computes the next
    one.

    Args:
        threshold: tolerance at step 0, >= 0.
        decay: factor by which it falls over the run, in (0, 1].
        floor: least tolerance, >= 0.
        min_run: forecasts after an anchor that are not checked, each check costs a block.
        max_run: most forecasts in a row, >= 1; None sets no limit.
        warmup: first steps that are all anchors, >= 1.

    Raises:
        ValueError: an argument is out of range.
    """

    checks = True

    def __init__(
        self,
        threshold: float,
        decay: float = 1.0,
        floor: float = 0.0,
        min_run: int = 0,
        max_run: int | None = None,
        warmup: int = 1,
    ) -> None:
        if threshold < 0 or floor < 0 or not 0 < decay <= 1:
            raise ValueError(
                f"found threshold {threshold}, decay {decay} and floor {floor}; expected a "
                "threshold and floor >= 0 and a decay in (0, 1]."
            )
        if min_run < 0 or (max_run is not None and max_run < 1) or warmup < 1:
            raise ValueError(
                f"found min_run {min_run}, max_run {max_run} and warmup {warmup}; expected "
                "min_run >= 0, max_run >= 1 and warmup >= 1."
            )
        self.threshold = threshold
        self.decay = decay
        self.floor = floor
        self.min_run = min_run
        self.max_run = max_run
        self.warmup = warmup
        self.open(0)

    def tolerance(self, index: int, num_steps: int) -> float:
        """Largest error accepted at a step."""
        return max(self.threshold * self.decay ** (index / num_steps), self.floor)

    def open(self, num_steps: int, anchors: Sequence[int] = ()) -> None:
        """Forget the last run."""
        self.planned = frozenset(anchors)
        self.runs: list[int] = []  # forecasts since each sample's anchor
        self.evaluations: list[int] = []
        self.refused: dict[int, list[int]] = {}
        self.checked = self.accepted = 0

    def before(self, step: Step) -> Action:
        """Compute, forecast, or forecast and check."""
        if step.index in self.refused:  # a later call of this step: the first has decided
            return Action.CHECK if self.refused[step.index] else Action.FORECAST
        if self._runs_all(step):
            return Action.RUN
        due = max(self.runs) >= self.min_run or self._forced()
        return Action.CHECK if due else Action.FORECAST

    def _runs_all(self, step: Step) -> bool:
        """Whether the network runs for all samples, unasked."""
        if not self.runs:  # the first step that is run, which img2img does not start at 0
            return True
        spent = self.max_run is not None and min(self.runs) >= self.max_run
        return step.index in self.planned or step.index < self.warmup or spent

    def _forced(self) -> list[int]:
        """Samples that have been forecast as often in a row as allowed."""
        limit = self.max_run
        return [] if limit is None else [i for i, run in enumerate(self.runs) if run >= limit]

    def check(self, step: Step, forecast: Tensor, computed: Tensor) -> None:
        """Accept or refuse every sample; see the base class."""
        if step.index in self.refused:
            return
        errors = relative_errors(forecast, computed, len(step.branches)).tolist()
        tolerance = self.tolerance(step.index, step.num_steps)
        forced = set(self._forced())
        due = [i for i, run in enumerate(self.runs) if run >= self.min_run and i not in forced]
        failed = [i for i in due if not errors[i] <= tolerance]  # NaN fails
        self.checked += len(due)
        self.accepted += len(due) - len(failed)
        self.refused[step.index] = sorted({*failed, *forced})

    def refused_at(self, step: Step) -> list[int]:
        """Samples to compute at this step."""
        return self.refused.get(step.index, [])

    def computed(self, step: Step, num_samples: int, first: bool, known: bool) -> list[int]:
        """The refused samples, or all; the first call of a step counts them."""
        samples = list(range(num_samples))
        if known:
            samples = self.refused_at(step) or samples
        elif first and num_samples != len(self.runs):  # the first step, or another batch
            self.evaluations = [0] * num_samples
            self.runs = [0] * num_samples
        if first:
            for i in samples:
                self.evaluations[i] += 1
                self.runs[i] = -1  # the end of the step makes it 0
        return samples

    def close(self, index: int) -> None:
        """Count the step."""
        self.runs = [run + 1 for run in self.runs]
        self.refused.pop(index, None)

    def finish(self, report: Report) -> None:
        """Tell what was checked, and warn where checking decided nothing."""
        report.checked, report.accepted = self.checked, self.accepted
        report.evaluations = list(self.evaluations)
        if self.checked and self.accepted in (0, self.checked):
            always = "accepted" if self.accepted else "refused"
            change = "lower" if self.accepted else "raise"
            warnings.warn(
                f"SpeCa {always} all {self.checked} forecasts it checked (accept rate "
                f"{self.accepted / self.checked:.0%}): {change} its threshold "
                f"{self.threshold:g}, or use a fixed list of anchors, which checks nothing.",
                stacklevel=2,
            )


def relative_errors(
    forecast: Float[Tensor, " B *shape"], computed: Float[Tensor, " B *shape"], num_branches: int
) -> Float[Tensor, " samples"]:
    """||forecast - computed|| / ||computed|| of each sample, the worst of its guidance branches.

    Args:
        forecast: rows of all branches, one branch after the other.
        computed: the same rows.
        num_branches: branches the rows hold.
    """
    wide = computed.float().flatten(1)
    errors = (forecast.float().flatten(1) - wide).norm(dim=1) / wide.norm(dim=1)
    return errors.view(num_branches, -1).amax(0)
