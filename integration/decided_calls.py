"""Calls that are decided on the way: after a look at the first block, or by a check at the last."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foreseer.integration.controller import Controller
from foreseer.integration.host.call import Call
from foreseer.integration.host.expert import Expert
from foreseer.integration.host.prediction import prediction
from foreseer.predictors.base import Step

Enter = Callable[[Tensor], Tensor]  # what enters the head, given what would have


@dataclass(frozen=True)
class Decided:
    """What became of a call.

    Args:
        output: what the host returned.
        taps: those captured where the network ran; None where the call was forecast.
        sample: the prediction, where it is not the one in `output`.
    """

    output: Any
    taps: dict[str, Tensor] | None
    sample: Tensor | None = None


def entering_head(tap: str, feature: Tensor) -> Enter:
    """What enters the head given what came through the empty trunk."""
    return functools.partial(_enter, tap, feature)


def _enter(tap: str, feature: Tensor, came: Tensor) -> Tensor:
    return came + feature if tap == "residual" else feature


def look(controller: Controller, expert: Expert, call: Call, key: str, step: Step) -> Decided:
    """Run the first block, then the rest of the network or a forecast."""
    first_look = expert.first_look
    assert first_look is not None  # made with the trunk
    forecasts: list[tuple[str, Tensor]] = []

    def judge(seen: Tensor) -> bool:
        return controller.judge(step, seen) or not controller.knows(key)

    def entering(tensor: Tensor) -> Tensor:
        tap, feature = controller.forecast(key, step)
        forecasts.append((tap, feature))
        came = tensor if first_look.entered is None else first_look.entered
        return tensor if tap == "output" else entering_head(tap, feature)(came)

    try:
        with expert.capturing(controller.taps) as found:
            output, ran = first_look(call.forward, call.args, call.kwargs, judge, entering)
            if "residual" in controller.taps and first_look.entered is not None:
                found["trunk_in"] = first_look.entered
    finally:
        first_look.entered = None
    if ran:
        return Decided(output, found)
    tap, feature = forecasts[0]
    return Decided(output, None, feature if tap == "output" else None)


def check(controller: Controller, expert: Expert, call: Call, key: str, step: Step) -> Decided:
    """Forecast, check at the last block, and compute the samples that are refused."""
    assert expert.last_block is not None  # made with the trunk
    inputs = controller.check_inputs(key, step)
    judge = functools.partial(controller.check, key, step)
    output = expert.last_block(call.forward, call.args, call.kwargs, inputs, judge)
    rejected = controller.rejected(step)
    if not rejected:
        return Decided(output, None)
    sample = prediction(output)
    per_branch = len(sample) // len(step.branches)
    rows = [b * per_branch + i for b in range(len(step.branches)) for i in rejected]
    if len(rejected) < per_branch:
        call = call.rows(rows, len(sample))
    with expert.capturing(controller.taps) as found:
        computed = call.run()
    merged = sample.clone()
    merged[torch.as_tensor(rows, device=sample.device)] = prediction(computed)
    return Decided(computed, found, merged)
