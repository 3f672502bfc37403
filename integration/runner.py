"""What becomes of one call of a transformer: it runs, is forecast, or is decided on the way.

Hooks are in `Expert`; what to do is said by the schedule. Everything here answers for one call.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from foreseer.integration.host.call import Call, prediction
from foreseer.integration.host.expert import Expert
from foreseer.integration.host.outer import OuterBlocks
from foreseer.integration.host.taps import BEFORE_LAST, LAST_BLOCK
from foreseer.integration.host.trunk import modulations
from foreseer.integration.observers import Source
from foreseer.predictors.base import Step

Enter = Callable[[Tensor], Tensor]  # what enters the head, given what would have


@dataclass(frozen=True)
class Answer:
    """What became of a call.

    Args:
        output: what the pipeline is given.
        taps: captured where the network ran, of the samples it ran for; None where the call was
            forecast.
        feature: the forecast, if any.
        attention: attention outputs by block, where tokens are to be computed.
        partial: whether some tokens of a forecast were computed.
        shallow: whether the outer blocks ran, on a forecast of what lies between them.
    """

    output: Any
    taps: dict[str, Tensor] | None = None
    feature: Tensor | None = None
    attention: Mapping[str, Tensor] = field(default_factory=dict)
    partial: bool = False
    shallow: bool = False


class Runner:
    """How a call is run and how it is forecast."""

    def prove(self, expert: Expert, call: Call) -> None:
        """Check on a transformer's first call everything that is relied on.

        Raises:
            UnsupportedHost: something does not hold.
        """
        expert.prove(call)

    def run(self, expert: Expert, call: Call, step: Step) -> Answer:
        """Run the network and capture its taps."""
        with expert.capturing() as captured:
            output = call.run()
        taps = expert.complete(captured, output)
        expert.prove_rows(call, output)
        return Answer(output, taps)

    def forecast(self, expert: Expert, call: Call, step: Step, source: Source) -> Answer:
        """Put a forecast in the network's place."""
        if source.tap in expert.outer:
            return self.through(expert, call, step, source)
        if source.needs:
            return self._forecast_inside(expert, call, step, source)
        feature = source.forecast(step)
        if source.tap == "output":
            return Answer(as_output(expert, feature), None, feature)
        output = expert.skip(call, entering_head(source.tap, feature))
        return Answer(output, None, feature)

    def through(self, expert: Expert, call: Call, step: Step, source: Source) -> Answer:
        """Run the outer blocks on the step's own input and a forecast of what lies between them."""
        part, made = expert.outer[source.tap], []

        def entering(came: list[Tensor]) -> list[Tensor]:
            made.append(source.forecast(replace(step, tokens=came[0])))
            return part.put(made[-1], came)

        output = part(call.forward, call.args, call.kwargs, entering, weights=source.block_weights)
        return Answer(output, None, made[-1], shallow=source.tap != BEFORE_LAST)

    def shallow(self, expert: Expert, call: Call, step: Step, deep: Source) -> Answer:
        """Run the outer blocks, and capture what later forecasts of the output are made from."""
        with expert.capturing(deep.tap) as captured:
            answer = self.through(expert, call, step, deep)
        return replace(answer, taps=expert.complete(captured, answer.output, deep.tap))

    def _forecast_inside(self, expert: Expert, call: Call, step: Step, source: Source) -> Answer:
        """Forecast from what only the forward knows: its tokens and its modulation vector."""
        made: list[Tensor] = []

        def entering(tokens: Tensor) -> Tensor:
            inside = replace(step, tokens=tokens, modulation=vectors[-1] if vectors else None)
            made.append(source.forecast(inside))
            return entering_head(source.tap, made[-1])(tokens)

        telling: contextlib.AbstractContextManager[list[Tensor]] = contextlib.nullcontext([])
        if "modulation" in source.needs:
            telling = modulations(expert.transformer)
        with telling as vectors:
            output = expert.skip(call, entering)
        return Answer(output, None, made[-1])


def entering_head(tap: str, feature: Tensor) -> Enter:
    """What enters the head given what came through the empty trunk."""
    return functools.partial(_enter, tap, feature)


def _enter(tap: str, feature: Tensor, came: Tensor) -> Tensor:
    return came + feature if tap == "residual" else feature


def as_output(expert: Expert, sample: Tensor) -> Any:
    """A prediction in the form in which the host returns it."""
    assert expert.form is not None  # it has run
    return expert.form(sample)


def probe(expert: Expert, call: Call, step: Step, source: Source, known: bool) -> Answer:
    """Run the first block, then the rest of the network or a forecast.

    Args:
        expert: the transformer.
        call: the call.
        step: its step.
        source: its schedule is shown the first block.
        known: whether the call can be forecast.
    """
    first_look = expert.first_look
    assert first_look is not None  # made with the trunk
    forecasts: list[Tensor] = []

    def judge(statistic: Tensor) -> bool:
        return source.schedule.look(step, statistic) or not known

    def entering(tensor: Tensor) -> Tensor:
        forecasts.append(source.forecast(step))
        came = tensor if first_look.entered is None else first_look.entered
        if source.tap == "output":
            return tensor
        return entering_head(source.tap, forecasts[0])(came)

    try:
        with expert.capturing() as captured:
            output, ran = first_look(call.forward, call.args, call.kwargs, judge, entering)
            if "residual" in expert.taps and first_look.entered is not None:
                captured["trunk_in"] = first_look.entered
    finally:
        first_look.entered = None
    if ran:
        return Answer(output, expert.complete(captured, output))
    if source.tap == "output":
        output = as_output(expert, forecasts[0])
    return Answer(output, None, forecasts[0])


def check(expert: Expert, call: Call, step: Step, source: Source) -> Answer:
    """Forecast, check at the last block, and compute the samples that are refused."""
    inputs, feature = source.streams(step), source.forecast(step)
    schedule = source.schedule

    def judge(computed: Tensor) -> Tensor:
        # the forecast enters the head, as the release has it: what the block makes of its own
        # forecast input is 1 dB worse on the bundled model
        schedule.check(step, feature, computed)
        return feature

    last = expert.outer[LAST_BLOCK]
    assert isinstance(last, OuterBlocks)  # a U-Net's is refused
    output = last(call.forward, call.args, call.kwargs, lambda came: inputs, judge)
    refused = schedule.refused_at(step)
    if not refused:
        return Answer(output, None, feature)
    sample = prediction(output)
    per_branch = len(sample) // len(step.branches)
    rows = [b * per_branch + i for b in range(len(step.branches)) for i in refused]
    if len(refused) < per_branch:
        call = call.rows(rows, len(sample))
    with expert.capturing() as captured:
        computed = call.run()
    taps = expert.complete(captured, computed)
    merged = sample.clone()
    merged[torch.as_tensor(rows, device=sample.device)] = prediction(computed)
    return Answer(as_output(expert, merged), taps, feature)
