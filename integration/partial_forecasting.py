"""Forecasts whose most telling tokens are computed: `with partially(pipe, predictor, policy): ...`.

Shapes: B samples, M = branches * B rows of a call, N tokens, D channels, n selected tokens.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foreseer.checkpoints.spec import PredictorMismatch, PredictorSpec
from foreseer.integration.controller import Controller
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.forecasting import Run, checked_forecaster
from foreseer.integration.host.call import Call
from foreseer.integration.host.call_rows import Narrowed
from foreseer.integration.host.denoisers import transformer_of
from foreseer.integration.host.expert import Expert
from foreseer.integration.memory import check_budget, most_bytes
from foreseer.integration.partial import PartialTrunk, Pick
from foreseer.integration.report import Report
from foreseer.integration.session import Session
from foreseer.predictors.base import History, LinearPredictor, Predictor, Step
from foreseer.predictors.rules import Reuse
from foreseer.predictors.tokens import TokenPolicy


class PartialForecaster(Controller):
    """Any forecaster of the hidden tap, corrected at some steps by freshly computed tokens.

    Args:
        base: decides the anchors and forecasts; its history is never altered.
        policy: which tokens are computed, and what follows for the others.
        attention_rule: forecasts the attention outputs that the computed tokens need.
    """

    def __init__(
        self, base: Forecaster, policy: TokenPolicy, attention_rule: LinearPredictor
    ) -> None:
        self.base = base
        self.taps = base.taps
        self.policy = policy
        self.attention_rule = attention_rule
        self.attention: dict[tuple[str, str], History] = {}  # (call key, block)
        self._anchor: list[Tensor] = []  # hidden of the branches of the step being closed

    def open(self, sigmas: list[float]) -> None:
        """Forget the last run."""
        self.base.settings = self.settings
        self.forget()
        self.base.open(sigmas)

    def forget(self) -> None:
        """Let go of all features, attention outputs and clusters."""
        self.base.forget()
        self.policy.reset()
        self.attention, self._anchor = {}, []

    def is_anchor(self, step: Step) -> bool:
        """The base decides."""
        return self.base.is_anchor(step)

    def observe(self, key: str, call: int, step: Step, taps: dict[str, Tensor]) -> None:
        """Hand the anchor to the base and keep it for the clusters."""
        self.base.observe(key, call, step, taps)
        self._anchor.extend(taps["hidden"].chunk(len(step.branches)))

    def observe_attention(self, key: str, step: Step, found: dict[str, Tensor]) -> None:
        """Keep the attention outputs of a call at an anchor."""
        for block, output in found.items():
            history = self.attention.setdefault((key, block), History(self.attention_rule.window))
            history.push(step, output)

    def adopt(self, key: str, narrowed: Narrowed) -> None:
        """Go on with the features and attention outputs of the branches that are left."""
        self.base.adopt(key, narrowed)
        for source, block in list(self.attention):
            if source == narrowed.source:
                history = self.attention.pop((source, block))
                self.attention[key, block] = history.map(narrowed.take)

    def knows(self, key: str) -> bool:
        """The base decides."""
        return self.base.knows(key)

    def forecast(self, key: str, step: Step) -> tuple[str, Tensor]:
        """The base's forecast."""
        return self.base.forecast(key, step)

    def select(self, key: str, step: Step) -> Int[Tensor, "M n"] | None:
        """The tokens of a call to compute, the same in all branches; None for a pure forecast."""
        history = self.base.histories.get(key)
        if history is None or not self.policy.is_partial(step.index - history.steps[-1]):
            return None
        return self.policy.select(step.index).repeat(len(step.branches), 1)

    def forecast_attention(
        self, key: str, step: Step, block: str, pick: Pick
    ) -> Float[Tensor, "M rows D"]:
        """The rule's forecast of the picked rows of a block's attention output."""
        kept = self.attention[key, block]
        rows = [pick(feature) for feature in kept.features]
        forecast: Tensor = self.attention_rule(
            History(kept.window, kept.steps, kept.sigmas, rows), step
        )
        return forecast

    def close(self, step_index: int, v: Tensor, before: Tensor, after: Tensor) -> None:
        """Show the policy an anchor once all branches of it are known."""
        if self._anchor:
            self.policy.observe(torch.cat(self._anchor, -1))
            self._anchor = []
        self.base.settings = self.settings
        self.base.close(step_index, v, before, after)

    def state_bytes(self) -> int:
        """Bytes of the base, of all attention histories and of the policy."""
        attention = sum(history.state_bytes() for history in self.attention.values())
        return self.base.state_bytes() + attention + self.policy.state_bytes()

    def most_bytes(self, index: int, num_steps: int) -> int:
        """Bytes at most of the base, of all attention histories and of the policy."""
        to_come = self.base.to_come(index, num_steps)
        attention = sum(
            most_bytes(history, to_come if history.steps[-1] == index else 0)
            for history in self.attention.values()
        )
        return self.base.most_bytes(index, num_steps) + attention + self.policy.state_bytes()


@dataclass
class PartialReport(Report):
    """A report that tells partial steps from pure forecasts; `forecasts` holds both.

    Attributes:
        partials: steps at which some tokens were computed.
        partial_seconds: wall-clock seconds of their calls; `seconds` holds the others.
    """

    partials: list[int] = field(default_factory=list)
    partial_seconds: list[float] = field(default_factory=list)

    def open(self) -> None:
        """Start over for a new run."""
        super().open()
        self.partials, self.partial_seconds = [], []

    def count(self, step_index: int, kind: str, seconds: float) -> None:
        """Add one call, to `partial_seconds` where tokens were computed."""
        super().count(step_index, kind, seconds)
        if step_index in self.partials:
            self.partial_seconds.append(self.seconds["forecast"].pop())

    def mark_partial(self, step_index: int) -> None:
        """The call about to be counted computes tokens."""
        if not self.partials or self.partials[-1] != step_index:
            self.partials.append(step_index)

    def __str__(self) -> str:
        """The report with the partial steps."""
        lines = [super().__str__()]
        if self.partials:
            cost = median(self.partial_seconds)
            share = cost / median(self.seconds["anchor"])
            lines.append(f"tokens computed at: {' '.join(map(str, self.partials))}")
            lines.append(f"median partial step: {1000 * cost:.2f} ms, {share:.2%} of an anchor")
        return "\n".join(lines)


class PartialSession(Session):
    """A session whose controller may ask for some tokens of a forecast to be computed."""

    controller: PartialForecaster
    report: PartialReport

    def __init__(self, pipe: Any, controller: Controller) -> None:
        self.partial: PartialTrunk | None = None
        transformer_of(pipe)  # one, no experts
        super().__init__(pipe, controller)
        self.report = PartialReport()

    def _prove(self, expert: Expert, call: Call) -> None:
        """Prove the tap, then that tokens can be computed alone."""
        super()._prove(expert, call)
        expert.proven = False  # until the second proof, too, has passed
        assert expert.trunk is not None  # just traced
        self.partial = PartialTrunk(expert.transformer, expert.trunk)
        proof = ("tokens", call.form)
        if proof not in expert.facts.proven:
            self.partial.prove(call.forward, call.args, call.kwargs)
            expert.facts.proven.add(proof)
        expert.proven = True

    def _run(self, expert: Expert, call: Call, key: str) -> Any:
        assert self.partial is not None  # proven before the first call is run
        step = self._step(self.clock.index, key, call.x_t)
        with self.partial.capturing() as attention:
            output = super()._run(expert, call, key)
        self.controller.observe_attention(key, step, attention)
        return output

    def _forecast(self, expert: Expert, call: Call, key: str, step: Step) -> Any:
        selected = self.controller.select(key, step)
        if selected is None or self.partial is None:
            return super()._forecast(expert, call, key, step)
        controller = self.controller
        _, forecast = controller.forecast(key, step)

        def given(block: str, pick: Pick) -> Tensor:
            return controller.forecast_attention(key, step, block, pick)

        def merge(fresh: Tensor) -> Tensor:
            return controller.policy.merge(forecast, fresh, selected)

        self.report.mark_partial(step.index)
        return self.partial(call.forward, call.args, call.kwargs, selected, given, merge)


def attach_partially(
    pipe: Any,
    predictor: Predictor,
    policy: TokenPolicy,
    anchors: Sequence[int] | None = None,
    attention_rule: LinearPredictor | None = None,
    memory_budget: int | None = None,
) -> Run:
    """Make a pipeline forecast its hidden tap, computing the policy's tokens, until `detach`.

    Args:
        pipe: a diffusers pipeline with a `transformer` of known blocks and a `scheduler`.
        predictor: the forecaster of the hidden tap, analytic or learned.
        policy: which tokens are computed at which forecast steps.
        anchors: steps at which the network runs; None takes the predictor's own.
        attention_rule: how attention outputs are forecast; None reuses the newest anchor's.
        memory_budget: bytes that features and attention outputs may take, see `attach`.

    Raises:
        PredictorMismatch: a learned predictor was fitted on another model or tap.
        ValueError: the attention rule is a learned one, or what `attach` refuses.
    """
    spec: PredictorSpec | None = predictor.spec
    if spec is not None and spec.tap != "hidden":
        raise PredictorMismatch(
            f"the predictor was fitted on the tap {spec.tap!r}; computed tokens need one fitted on "
            "'hidden', the stream that enters the head."
        )
    check_budget(memory_budget)
    rule = attention_rule or Reuse()
    if rule.learned:
        raise ValueError(
            f"the attention rule {type(rule).__name__} is learned, but nothing was recorded of the "
            "attention outputs; use Reuse() or Taylor(1)."
        )
    base = checked_forecaster(pipe, predictor, anchors, None if spec is not None else "hidden")
    controller = PartialForecaster(base, policy, rule)
    controller.memory_budget = memory_budget
    return Run(PartialSession(pipe, controller))


@contextlib.contextmanager
def partially(
    pipe: Any,
    predictor: Predictor,
    policy: TokenPolicy,
    anchors: Sequence[int] | None = None,
    attention_rule: LinearPredictor | None = None,
    memory_budget: int | None = None,
) -> Iterator[Run]:
    """`attach_partially` for the length of a `with` block."""
    run = attach_partially(pipe, predictor, policy, anchors, attention_rule, memory_budget)
    try:
        yield run
    finally:
        run.detach()
