"""SpeCa: forecasts are checked at the last block, and refused samples computed at the same step."""

import warnings
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from foreseer.integration.policy import Action, Schedule
from foreseer.integration.report import Report
from foreseer.predictors.base import Step


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
