"""Forecasts whose most telling tokens are computed: `forecasting(pipe, predictor, tokens=policy)`.

Shapes: B samples, M = branches * B rows of a call, N tokens, D channels, n selected tokens.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foreseer.integration.forecaster import Forecaster
from foreseer.integration.histories import Histories, most_bytes
from foreseer.integration.host.call import Call
from foreseer.integration.host.denoisers import transformer_of
from foreseer.integration.host.expert import Expert
from foreseer.integration.observers import Observer, Source, StepRecord
from foreseer.integration.partial import PartialTrunk, Pick
from foreseer.integration.runner import Answer, Runner
from foreseer.predictors.base import History, LinearPredictor, Step
from foreseer.predictors.rules import Reuse
from foreseer.predictors.tokens import TokenPolicy


class TokenRunner(Runner, Observer):
    """Compute a policy's tokens at forecast steps, on forecast attention outputs.

    The forecaster's histories are never altered.

    Args:
        pipe: a pipeline with one transformer of known blocks.
        source: the forecaster of the hidden tap.
        policy: which tokens are computed, and what follows for the others.
        attention_rule: forecasts the attention outputs that the computed tokens need; None reuses
            the newest anchor's.
    """

    def __init__(
        self,
        pipe: Any,
        source: Forecaster,
        policy: TokenPolicy,
        attention_rule: LinearPredictor | None = None,
    ) -> None:
        transformer_of(pipe)  # one, no experts
        self.source = source
        self.policy = policy
        self.attention_rule = Reuse() if attention_rule is None else attention_rule
        self.attention = Histories(self.attention_rule.window)  # by block
        self.trunk: PartialTrunk | None = None

    def prove(self, expert: Expert, call: Call) -> None:
        """Prove the tap, then that tokens can be computed alone."""
        super().prove(expert, call)
        expert.proven = False  # until the second proof, too, has passed
        assert expert.trunk is not None  # just traced
        self.trunk = PartialTrunk(expert.transformer, expert.trunk)
        proof = ("tokens", call.form)
        if proof not in expert.facts.proven:
            self.trunk.prove(call.forward, call.args, call.kwargs)
            expert.facts.proven.add(proof)
        expert.proven = True

    def run(self, expert: Expert, call: Call, step: Step) -> Answer:
        """Run the network and capture its attention outputs, too."""
        assert self.trunk is not None  # proven before the first call is run
        with self.trunk.capturing() as attention:
            answer = super().run(expert, call, step)
        return Answer(answer.output, answer.taps, attention=attention)

    def forecast(self, expert: Expert, call: Call, step: Step, source: Source) -> Answer:
        """Put a forecast in the network's place, with the policy's tokens computed."""
        selected = self.select(step)
        if selected is None or self.trunk is None:
            return super().forecast(expert, call, step, source)
        feature = source.forecast(step)

        def given(block: str, pick: Pick) -> Tensor:
            return self.forecast_attention(step, block, pick)

        def merge(fresh: Tensor) -> Tensor:
            return self.policy.merge(feature, fresh, selected)

        output = self.trunk(call.forward, call.args, call.kwargs, selected, given, merge)
        return Answer(output, None, feature, partial=True)

    def select(self, step: Step) -> Int[Tensor, "M n"] | None:
        """The tokens of a call to compute, the same in all branches; None for a pure forecast."""
        found = self.source.histories.at(step)
        assert found is not None  # only known calls are forecast
        (history,) = found[self.source.tap]
        if not self.policy.is_partial(step.index - history.steps[-1]):
            return None
        return self.policy.select(step.index).repeat(len(step.branches), 1)

    def forecast_attention(self, step: Step, block: str, pick: Pick) -> Float[Tensor, "M rows D"]:
        """The rule's forecast of the picked rows of a block's attention output."""
        found = self.attention.at(step)
        assert found is not None  # kept with the features
        (kept,) = found[block]
        rows = [pick(feature) for feature in kept.features]
        forecast: Tensor = self.attention_rule(
            History(kept.window, kept.steps, kept.sigmas, rows), step
        )
        return forecast

    def on_step(self, record: StepRecord) -> None:
        """Keep the attention outputs of an anchor and show it to the policy, all branches of it."""
        anchor: list[Tensor] = []
        for call in record.calls:
            if call.taps is None:
                continue
            found = None if call.starts else self.attention.at(call.step)
            if found is None:
                found = self.attention.start(call.step)
            for block, output in call.attention.items():
                (history,) = found.setdefault(block, [History(self.attention.window)])
                history.push(call.step, output)
            anchor.extend(call.taps["hidden"].chunk(len(call.step.branches)))
        if anchor:
            self.policy.observe(torch.cat(anchor, -1))

    def forget(self) -> None:
        """Let go of all attention outputs and clusters."""
        self.policy.reset()
        self.attention.clear()

    def state_bytes(self) -> int:
        """Bytes of all attention histories and of the policy."""
        return self.attention.state_bytes() + self.policy.state_bytes()

    def most_bytes(self, index: int, num_steps: int) -> int:
        """Bytes at most of all attention histories and of the policy."""
        to_come = self.source.schedule.to_come(index, num_steps)
        return self.policy.state_bytes() + sum(
            most_bytes(history, to_come if history.steps[-1] == index else 0)
            for history in self.attention
        )
