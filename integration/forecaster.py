"""A predictor at work in a run: the histories it forecasts from, and the checks against its fit."""

import copy
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foreseer.checkpoints.spec import (
    PredictorMismatch,
    PredictorSpec,
    check_host,
    check_run,
)
from foreseer.integration.handover import Handed, Handover, same_rows
from foreseer.integration.histories import Histories, check_shape, most_bytes, predicted, push
from foreseer.integration.host.hosts import host_of
from foreseer.integration.host.taps import LAST_BLOCK, captured_streams
from foreseer.integration.observers import CallRecord, Source, StepRecord
from foreseer.integration.policy import Anchors, Schedule, is_finite
from foreseer.integration.schedule import check_anchors
from foreseer.predictors.base import History, Predictor, Reading, Step
from foreseer.predictors.tokens import TokenPolicy


class Forecaster(Source):
    """Forecast with a predictor wherever the schedule does not run the network.

    Args:
        predictor: the forecaster.
        tap: `output`, `hidden`, `residual` or `before_last`.
        anchors: steps at which the network runs, whatever the schedule says.
        spec: what a learned predictor was fitted on; its grid, guidance and dtype are checked.
        pipe: asked for its `guidance_scale`, where it has one.
        schedule: which other calls run the network; None for none.
        before: keeps the features that every run begins with, of the run before; None for none.
        tokens: the token policy that runs beside it; None for none.
        deep: forecasts what lies between the outer blocks at the steps where these alone run.

    Raises:
        ValueError: the predictor was fitted with a token policy, and none runs.
    """

    to_need_less = (
        "use a predictor that looks at fewer anchors (Reuse at 1, Taylor(1) at 2); memory_budget "
        "sets another limit"
    )

    def __init__(
        self,
        predictor: Predictor,
        tap: str,
        anchors: Sequence[int],
        spec: PredictorSpec | None = None,
        pipe: Any = None,
        schedule: Schedule | None = None,
        before: Handover | None = None,
        tokens: TokenPolicy | None = None,
        deep: "Forecaster | None" = None,
    ) -> None:
        if tokens is None and predictor.tokens is not None:
            raise ValueError(
                f"this {type(predictor).__name__} was fitted with a "
                f"{type(predictor.tokens).__name__}, which runs in forecasting(pipe, predictor) "
                "only; without it the forecasts are others."
            )
        self.predictor = predictor
        self.before = before
        self.handed: Handed | None = None  # of the run before, until the first step is over
        self.tap = tap
        self.deep: Forecaster | None = deep
        self.schedule = Anchors() if schedule is None else schedule
        self.taps = frozenset({tap, "hidden"} if predictor.reads else {tap})
        if self.schedule.checks:
            self.taps |= {LAST_BLOCK}
        if deep is not None:
            self.taps |= deep.taps
        self.wants_layout = predictor.reads
        self.needs = predictor.needs - {"x_t"}
        self.anchors = tuple(anchors)
        self.spec = spec
        self.pipe = pipe
        self.branches: set[int] = set()  # of the step in progress
        self.guidance_checked = False
        self.guidance_scale: float | None = None  # as the run began
        self.last_step = -1  # of the run
        self.narrow = False  # whether forecasts are float16, whose largest number is 65504
        self.histories = Histories(predictor.window)

    @property
    def block_weights(self) -> dict[str, Tensor] | None:
        """See `Source`."""
        return self.predictor.block_weights

    def open(self, sigmas: list[float]) -> None:
        """Forget the last run and check the new one's grid and the weights it runs on.

        Raises:
            PredictorMismatch: another grid, or weights that changed since attaching.
        """
        self.histories.clear()
        self.branches = set()
        self.guidance_checked = False
        self.guidance_scale = self.settings.get(
            "guidance_scale", getattr(self.pipe, "guidance_scale", None)
        )
        self.last_step, self.narrow = len(sigmas) - 1, False
        self.handed, self.follows = None, ()
        if self.before is not None:
            self.handed = left = self.before.take()
            self.predictor.check_before(left.sigmas)
            self.histories, self.follows = (
                self.before.begun(left, self.predictor.window),
                left.calls,
            )
        if self.spec is not None:
            check_run(self.spec, self.predictor, sigmas)
            self._check_weights(self.spec)
        check_anchors(self.anchors, len(sigmas), begun=self.before is not None)
        self.schedule.open(len(sigmas), self.anchors)
        if self.deep is not None:
            self.deep.settings = self.settings
            self.deep.open(sigmas)

    def _check_weights(self, spec: PredictorSpec) -> None:
        """Look at the weights of this run: a LoRA may have been loaded since attaching."""
        if self.pipe is not None:
            host = host_of(self.pipe)
            check_host(spec, host.fingerprint(), host.scheduler)

    def reset(self, reason: str) -> None:
        """Forget the anchors of the run under way; its next calls are computed.

        Raises:
            PredictorMismatch: a learned predictor, whose weights are for anchors of one whole run.
        """
        if self.spec is not None and not self.predictor.any_anchors:
            raise PredictorMismatch(
                f"the run was reset in its middle ({reason}), and this "
                f"{type(self.predictor).__name__} was fitted for runs that keep their anchors "
                f"{list(self.anchors)}; leave the loop and begin a new run, or use a formula."
            )
        self.histories.clear()
        if self.deep is not None:
            self.deep.reset(reason)

    def beside(self) -> "Forecaster":
        """See `Source`."""
        schedule, deep = copy.copy(self.schedule), None if self.deep is None else self.deep.beside()
        found = Forecaster(
            self.predictor, self.tap, self.anchors, self.spec, self.pipe, schedule, deep=deep
        )
        found.memory_budget = self.memory_budget
        return found

    def told(self, step: Step) -> float | None:
        """The predictor's time at step 0, where it has one."""
        return self.predictor.first_time if step.index == 0 else None

    def knows(self, step: Step, slot: Hashable = None) -> bool:
        """Whether the call has an anchor: one that starts in mid-run is computed first."""
        return self.histories.at(step, slot) is not None

    def forecast(self, step: Step, slot: Hashable = None) -> Tensor:
        """The predictor's forecast for one call that it knows."""
        return self._forecast(self.tap, step, slot)

    def streams(self, step: Step) -> list[Tensor]:
        """Forecasts of what enters the last block, one per stream."""
        found = self.histories.at(step)
        assert found is not None  # only known calls are checked
        return [self._forecast(tap, step, None) for tap in captured_streams(found, LAST_BLOCK)]

    def _forecast(self, tap: str, step: Step, slot: Hashable) -> Tensor:
        if self.spec is not None:
            self.spec.check_expert(step.index, step.expert)
        found = self.histories.at(step, slot)
        assert found is not None  # asked for before
        self._check_handed(found[tap][0].features[-1], step)
        return predicted(self.predictor, found[tap], step)

    def _check_handed(self, feature: Tensor, step: Step) -> None:
        """Raise unless what the run before left is of this run's samples and grid, at its start."""
        if self.handed is not None and not same_rows(feature, step.x_t):
            assert step.x_t is not None
            raise ValueError(
                f"the features of the stage before were brought to {tuple(feature.shape)}, this "
                f"call has {tuple(step.x_t.shape)}; expected the same rows and tokens: run the "
                "stages in turn on the same samples, under the same guidance, with the lift of "
                "these two grids."
            )

    def on_step(self, record: StepRecord) -> None:
        """Keep the features of the step's computed calls, and check what the step has shown.

        Raises:
            PredictorMismatch: a learned predictor meets other branches, settings, latents or dtype.
            ValueError: a feature is not finite, or a forecast left the range of float16.
        """
        if self.handed is not None and self.before is not None:
            self.before.check_start(self.handed, record.before)
        for number, call in enumerate(record.calls):
            self.branches.update(call.step.branches)
            if call.taps is not None:
                self.keep(call, first=number == 0)
        self.handed = None
        self.schedule.close(record.index)
        self.close(record)
        if self.deep is not None:
            self.deep.on_step(without_shallow(record, self.deep.tap))

    def keep(self, call: CallRecord, first: bool = True) -> None:
        """Add an anchor's features to the histories of its branches.

        Args:
            call: a computed call.
            first: whether it was the first of its step.

        Raises:
            PredictorMismatch: a learned predictor meets another dtype.
            ValueError: the feature is not finite, or has another shape than before.
        """
        assert call.taps is not None  # the network ran
        step, feature = call.step, call.taps[self.tap]
        self.branches.update(step.branches)
        self._check_feature(feature, step)
        found = None if call.starts else self.histories.at(step, call.slot)
        count = feature.shape[0] // len(step.branches)
        samples = self.schedule.computed(step, count, first, found is not None)
        if found is None:
            found = self.histories.start(step, call.slot)
        streams = captured_streams(call.taps, LAST_BLOCK) if self.schedule.checks else []
        for tap in (self.tap, *streams):
            rows = call.taps[tap]
            if tap not in found:
                num = 1 if samples is None else len(samples)
                found[tap] = [History(self.predictor.window) for _ in range(num)]
            if len(found[tap][0]):
                self._check_handed(found[tap][0].features[-1], step)
            check_shape(found[tap], rows, tap, step, samples)
            read = self._read(call, found[tap][0]) if self.predictor.reads else None
            push(found[tap], step, rows, samples, read)

    def _read(self, call: CallRecord, history: History) -> Reading | None:
        """What the predictor reads off an anchor's hidden state, laid out like the output."""
        layout = call.layout
        assert layout is not None and call.taps is not None  # both were asked for
        hidden = layout.hidden(call.taps["hidden"])
        read = self.predictor.read(hidden, call.step, layout.grid, history.carried)
        if read is None:
            return None
        return Reading(layout.place(read.values.to(call.taps[self.tap])), read.carried)

    def _check_feature(self, feature: Tensor, step: Step) -> None:
        if self.spec is not None:
            self.spec.check_expert(step.index, step.expert)
            self.spec.check_dtype(str(feature.dtype).removeprefix("torch."))
        self.narrow = feature.dtype == torch.float16
        if not is_finite(feature):
            raise ValueError(
                f"the network's {self.tap} at step {step.index} holds NaN or Inf; forecasting "
                "from it would spread it over the run. Check the model's dtype and inputs."
            )

    def close(self, record: StepRecord) -> None:
        """Check what the call sets, now that the step has shown its branches, and the last sample.

        Raises:
            PredictorMismatch: a learned predictor meets other branches, settings or latents.
            ValueError: a forecast left the range of float16 after the last anchor.
        """
        index, branches, self.branches = record.index, self.branches, set()
        if self.narrow and index == self.last_step and not is_finite(record.after):
            raise ValueError(
                f"the sample of the run holds NaN or Inf, though the network's {self.tap} did not: "
                "a forecast left the range of float16, 65504. Run the model in bfloat16 or "
                "float32, or use more anchors or a lower order."
            )
        if self.spec is not None:
            if not self.guidance_checked:
                self.spec.check_guidance(len(branches), self.guidance_scale)
                self.guidance_checked = True
            self.spec.check_settings(index, record.settings)
            self.spec.check_latents(tuple(record.before.shape[1:]))
            self.spec.check_branches(index, branches)

    def forget(self) -> None:
        """Let go of all features, and of what the schedule compares with."""
        self.histories.clear()
        self.handed = None
        self.schedule.forget()
        if self.deep is not None:
            self.deep.forget()

    def state_bytes(self) -> int:
        """Bytes of all histories and of what the schedule compares with."""
        deep = 0 if self.deep is None else self.deep.state_bytes()
        return self.histories.state_bytes() + self.schedule.state_bytes() + deep

    def most_bytes(self, index: int, num_steps: int) -> int:
        """The same at most; histories without an anchor at this step get no more.

        Where samples have anchors of their own, one that has none here may have some later.
        """
        to_come, every = self.schedule.to_come(index, num_steps), self.schedule.checks
        deep = 0 if self.deep is None else self.deep.most_bytes(index, num_steps)
        return (
            self.schedule.state_bytes()
            + deep
            + sum(
                most_bytes(history, to_come if every or history.steps[-1] == index else 0)
                for history in self.histories
            )
        )


def without_shallow(record: StepRecord, tap: str) -> StepRecord:
    """A step's record in which only calls that ran in full count as computed.

    Args:
        record: the record.
        tap: is captured in those alone.
    """
    calls = [
        call if call.taps is None or tap in call.taps else replace(call, taps=None)
        for call in record.calls
    ]
    return replace(record, calls=calls)
