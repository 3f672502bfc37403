"""Schedules that decide while the run goes on: by a first look, or by checking forecasts.

They know no hooks and no features of their own; `ProbedForecaster` and `VerifiedForecaster`
(adaptive_forecasting.py) carry them out with any predictor.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


class ProbeSchedule:
    """Make a step an anchor when a cheap tensor of this step says the feature has moved.

    Attributes:
        probe: `modulated`, what enters the attention of the first block, or `first_block`, what the
            first block adds to the stream.
        kept: the probe of an earlier step that the next one is compared with.
    """

    probe: str
    kept: Tensor | None = None

    def state_bytes(self) -> int:
        """Bytes kept between steps."""
        return 0 if self.kept is None else self.kept.numel() * self.kept.element_size()

    def compares(self, statistic: Tensor) -> bool:
        """Whether an earlier probe is there that a step's has the shape of."""
        return self.kept is not None and self.kept.shape == statistic.shape

    def open(self, num_steps: int) -> None:
        """Forget the last run."""
        raise NotImplementedError

    def judge(self, index: int, statistic: Tensor, planned: bool) -> bool:
        """Whether a step is an anchor; called once for every step of a run, in order.

        Args:
            index: the step.
            statistic: this step's probe, of all samples and branches of the first call.
            planned: the step is an anchor whatever the probe says.
        """
        raise NotImplementedError


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

    def open(self, num_steps: int) -> None:
        """Forget the last run."""
        self.last = num_steps - 1
        self.kept = None
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

    def open(self, num_steps: int) -> None:
        """Forget the last run."""
        self.kept = None

    def judge(self, index: int, statistic: Tensor, planned: bool) -> bool:
        """Compare with the last anchor; see the base class."""
        if not planned and self.kept is not None and self.compares(statistic):
            if relative_l1(statistic, self.kept) < self.threshold:
                return False
        self.kept = statistic
        return True


class SpeCa:
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

    def tolerance(self, index: int, num_steps: int) -> float:
        """Largest error accepted at a step."""
        return max(self.threshold * self.decay ** (index / num_steps), self.floor)


Schedule = ProbeSchedule | SpeCa


def relative_l1(new: Tensor, old: Tensor) -> float:
    """mean|new - old| / mean|old| over all entries, in float32."""
    change = (new.float() - old.float()).abs().mean()
    return float(change / old.float().abs().mean())


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


def check_threshold(threshold: float) -> None:
    """Raise unless the threshold is positive."""
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}, expected a number > 0.")
