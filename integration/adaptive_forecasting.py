"""Forecasting under a schedule that decides while the run goes on.

Shapes: B samples; a call holds the rows of its branches one branch after the other.
"""

import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foreseer.checkpoints.spec import PredictorSpec
from foreseer.integration.adaptive import ProbeSchedule, SpeCa, relative_errors
from foreseer.integration.forecaster import Forecaster, check_shape, is_finite
from foreseer.integration.host.call_rows import Narrowed
from foreseer.integration.host.hook import LAST_BLOCK, own
from foreseer.integration.memory import most_bytes
from foreseer.integration.report import Report
from foreseer.predictors.base import History, Predictor, Step


class ProbedForecaster(Forecaster):
    """Let a `ProbeSchedule` choose the anchors; the first call of a step decides for all its calls.

    Args:
        schedule: the schedule.
        predictor: the forecaster.
        tap: `output`, `hidden` or `residual`.
        anchors: steps that are anchors whatever the schedule says, step 0 among them.
        spec: see `Forecaster`.
        pipe: see `Forecaster`.
    """

    def __init__(
        self,
        schedule: ProbeSchedule,
        predictor: Predictor,
        tap: str,
        anchors: Sequence[int],
        spec: PredictorSpec | None = None,
        pipe: Any = None,
    ) -> None:
        super().__init__(predictor, tap, anchors, spec, pipe)
        self.schedule = schedule
        self.probe = schedule.probe
        self.decided: dict[int, bool] = {}

    def open(self, sigmas: list[float]) -> None:
        """Forget the last run and check the new one's grid."""
        super().open(sigmas)
        self.decided = {}
        self.schedule.open(len(sigmas))

    def action(self, step: Step) -> str:
        """Look at the first block, unless an earlier call of this step has."""
        if step.index not in self.decided:
            return "look"
        return "anchor" if self.decided[step.index] else "forecast"

    def judge(self, step: Step, statistic: Tensor) -> bool:
        """Ask the schedule; its answer holds for all calls of the step."""
        if not is_finite(statistic):
            raise ValueError(
                f"the first block of step {step.index} holds NaN or Inf, so nothing can be decided "
                "from it. Check the model's dtype and inputs."
            )
        planned = step.index in self.anchors
        self.decided[step.index] = self.schedule.judge(step.index, statistic, planned)
        return self.decided[step.index]

    def adopt(self, key: str, narrowed: Narrowed) -> None:
        """Go on with the history of the branches that are left, and compare with them alone."""
        super().adopt(key, narrowed)
        kept = self.schedule.kept
        if kept is not None and len(kept) == narrowed.rows:
            self.schedule.kept = narrowed.take(kept)

    def to_come(self, index: int, num_steps: int) -> int:
        """Every later step may be an anchor."""
        return num_steps - 1 - index

    def forget(self) -> None:
        """Let go of all features, and of what the schedule compares with."""
        super().forget()
        self.schedule.kept = None

    def state_bytes(self) -> int:
        """Bytes of all histories and of what the schedule compares with."""
        return super().state_bytes() + self.schedule.state_bytes()

    def most_bytes(self, index: int, num_steps: int) -> int:
        """Bytes of all histories at most, and of what the schedule compares with."""
        return super().most_bytes(index, num_steps) + self.schedule.state_bytes()


class VerifiedForecaster(Forecaster):
    """Check forecasts at the last block as `SpeCa` says; every sample has anchors of its own.

    Args:
        schedule: tolerance and limits.
        predictor: the forecaster of the `hidden` tap and of what enters the last block.
        anchors: steps that are anchors of all samples, step 0 among them.
        spec: see `Forecaster`.
        pipe: see `Forecaster`.
    """

    def __init__(
        self,
        schedule: SpeCa,
        predictor: Predictor,
        anchors: Sequence[int],
        spec: PredictorSpec | None = None,
        pipe: Any = None,
    ) -> None:
        super().__init__(predictor, "hidden", anchors, spec, pipe)
        self.schedule = schedule
        self.taps = frozenset({"hidden", LAST_BLOCK})
        self._reset()

    def _reset(self) -> None:
        self.sample_histories: dict[tuple[str, str], list[History]] = {}
        self.runs: list[int] = []  # forecasts since each sample's anchor
        self.evaluations: list[int] = []
        self.refused: dict[int, list[int]] = {}
        self.checked = self.accepted = 0

    def open(self, sigmas: list[float]) -> None:
        """Forget the last run and check the new one's grid."""
        super().open(sigmas)
        self._reset()

    def is_anchor(self, step: Step) -> bool:
        """Whether the network runs for all samples, unasked."""
        limit = self.schedule.max_run
        if not self.runs:  # the first step that is run, which img2img does not start at 0
            return True
        spent = limit is not None and min(self.runs) >= limit
        return step.index in self.anchors or step.index < self.schedule.warmup or spent

    def action(self, step: Step) -> str:
        """Compute, forecast, or forecast and check."""
        if step.index in self.refused:  # a later call of this step: the first has decided
            return "check" if self.refused[step.index] else "forecast"
        if self.is_anchor(step):
            return "anchor"
        return "check" if max(self.runs) >= self.schedule.min_run or self._forced() else "forecast"

    def _forced(self) -> list[int]:
        """Samples that have been forecast as often in a row as allowed."""
        limit = self.schedule.max_run
        return [] if limit is None else [i for i, run in enumerate(self.runs) if run >= limit]

    def observe(self, key: str, call: int, step: Step, taps: dict[str, Tensor]) -> None:
        """Add the features of the samples just computed to their histories."""
        feature = taps["hidden"]
        self.check_feature(feature, step)
        branches = len(step.branches)
        samples = list(range(len(feature) // branches))
        if self.knows(key):
            samples = self.refused.get(step.index) or samples
        elif call == 0 and len(samples) != len(self.runs):  # the first step, or another batch
            self.evaluations = [0] * len(samples)
            self.runs = [0] * len(samples)
        if call == 0:
            for i in samples:
                self.evaluations[i] += 1
                self.runs[i] = -1  # the end of the step makes it 0
        for tap, rows in taps.items():
            histories = self.sample_histories.setdefault(
                (key, tap), [History(self.predictor.window) for _ in self.runs]
            )
            for place, i in enumerate(samples):
                mine = own(rows[place :: len(samples)])  # a view would keep the whole batch
                check_shape(histories[i], mine, tap, step)
                histories[i].push(step, mine)

    def adopt(self, key: str, narrowed: Narrowed) -> None:
        """Go on with the histories of the branches that are left."""
        for source, tap in list(self.sample_histories):
            if source == narrowed.source:
                histories = self.sample_histories.pop((source, tap))
                self.sample_histories[key, tap] = [h.map(narrowed.take) for h in histories]

    def knows(self, key: str) -> bool:
        """Whether the call has an anchor."""
        return (key, "hidden") in self.sample_histories

    def forecast(self, key: str, step: Step) -> tuple[str, Tensor]:
        """The forecast of what enters the head."""
        return "hidden", self._forecast(key, "hidden", step)

    def check_inputs(self, key: str, step: Step) -> list[Tensor]:
        """Forecasts of what enters the last block."""
        streams = sorted(tap for k, tap in self.sample_histories if k == key and tap != "hidden")
        return [self._forecast(key, tap, step) for tap in streams]

    def check(self, key: str, step: Step, computed: Tensor) -> Tensor:
        """Accept or refuse every sample; the forecast enters the head, as the release has it.

        On the bundled model what the block makes of its forecast input is 1 dB worse.
        """
        forecast = self._forecast(key, "hidden", step)
        if step.index not in self.refused:
            errors = relative_errors(forecast, computed, len(step.branches)).tolist()
            tolerance = self.schedule.tolerance(step.index, step.num_steps)
            due = [run >= self.schedule.min_run for run in self.runs]
            forced = set(self._forced())
            asked = [i for i, one in enumerate(due) if one and i not in forced]
            failed = [i for i in asked if not errors[i] <= tolerance]  # NaN fails
            self.checked += len(asked)
            self.accepted += len(asked) - len(failed)
            self.refused[step.index] = sorted({*failed, *forced})
        return forecast

    def rejected(self, step: Step) -> list[int]:
        """Samples to compute at this step."""
        return self.refused.get(step.index, [])

    def _forecast(self, key: str, tap: str, step: Step) -> Tensor:
        """One forecast per group of samples with the same anchors, put together again."""
        self.branches.update(step.branches)
        histories = self.sample_histories[key, tap]
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, history in enumerate(histories):
            groups[tuple(history.steps)].append(i)
        branches = len(step.branches)
        out: Tensor | None = None
        for members in groups.values():
            joined = join([histories[i] for i in members])
            rows = self.predictor(joined, step).unflatten(0, (branches, len(members)))
            if out is None:
                out = rows.new_empty(branches, len(histories), *rows.shape[2:])
            out[:, members] = rows
        assert out is not None  # a run has samples
        return out.flatten(0, 1)

    def close(self, step_index: int, v: Tensor, before: Tensor, after: Tensor) -> None:
        """Count the step."""
        super().close(step_index, v, before, after)
        self.runs = [run + 1 for run in self.runs]
        self.refused.pop(step_index, None)

    def forget(self) -> None:
        """Let go of all features."""
        super().forget()
        self.sample_histories = {}

    def state_bytes(self) -> int:
        """Bytes of all histories."""
        return sum(h.state_bytes() for all_ in self.sample_histories.values() for h in all_)

    def most_bytes(self, index: int, num_steps: int) -> int:
        """Bytes of all histories at most: every later step may be an anchor of every sample."""
        to_come = num_steps - 1 - index
        return sum(most_bytes(h, to_come) for all_ in self.sample_histories.values() for h in all_)

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
                f"{self.schedule.threshold:g}, or use a fixed list of anchors, which checks "
                "nothing.",
                stacklevel=2,
            )


def join(histories: Sequence[History]) -> History:
    """The histories of samples with the same anchors as one, branch after branch.

    Args:
        histories: one per sample; each feature has a row per branch.
    """
    first = histories[0]
    if len(histories) == 1:
        return first
    features = [
        torch.stack([history.features[k] for history in histories], dim=1).flatten(0, 1)
        for k in range(len(first))
    ]
    return History(first.window, list(first.steps), list(first.sigmas), features)
