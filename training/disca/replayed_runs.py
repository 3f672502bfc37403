"""Recorded runs played again, with a forecast taken through the head at every forecast step.

The recorded outputs stand in for the network, so a batch costs its forecasts and one evaluation,
which tells whether the pipeline is the recorded one. Every forecast is made from true features at
true states: the open loop. Tokens, modulation and head are the pipeline's own, so nothing here
knows a host.
Shapes: B batch, S sampling steps.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.integration.forecaster import Forecaster
from foreseer.integration.host.call import Call, Seen
from foreseer.integration.host.expert import Expert
from foreseer.integration.host.prediction import form_of, prediction
from foreseer.integration.session import Session
from foreseer.predictors.base import Predictor, Step
from foreseer.trajectories.prompts import Item, generate_batch

REPEATED = 1e-3  # relative; a batch of another size rounds differently, in bfloat16 more


@dataclass(frozen=True)
class Forced:
    """One forecast of a replayed run.

    Args:
        step: the step.
        forecast: the output it leads to, differentiable in the predictor.
        target: the recorded output.
        x_t: the network's input.
        next_sigma: flow time the step leads to.
        forward: the transformer's own forward, to be called again elsewhere.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """

    step: Step
    forecast: Float[Tensor, " B *shape"]
    target: Float[Tensor, " B *shape"]
    x_t: Float[Tensor, " B *shape"]
    next_sigma: float
    forward: Callable
    args: tuple
    kwargs: dict[str, Any]


class ForcedForecaster(Forecaster):
    """A forecaster whose history holds recorded features; every step is computed."""

    def action(self, step: Step) -> str:
        """Compute."""
        return "anchor"

    def observe(self, key: str, call: int, step: Step, taps: dict[str, Tensor]) -> None:
        """Keep the features of anchors only."""
        if step.index in self.anchors:
            super().observe(key, call, step, taps)


class ReplayedRun(Session):
    """A session that answers with recorded outputs and forecasts beside them.

    Args:
        pipe: the recorded pipeline.
        controller: the forecaster.
        hidden: recorded features of its tap, a row per item of the call.
        outputs: recorded outputs.
    """

    def __init__(
        self,
        pipe: Any,
        controller: ForcedForecaster,
        hidden: Float[Tensor, "B branches S *shape"],
        outputs: Float[Tensor, "B branches S *other"],
    ) -> None:
        super().__init__(pipe, controller)
        self.forecaster = controller
        self.hidden = hidden
        self.outputs = outputs
        self.forced: list[Forced] = []
        self.dtype = outputs.dtype  # of the network, once it has run

    def _prove(self, *call: Any) -> None:
        with torch.no_grad():
            super()._prove(*call)

    def _run(self, expert: Expert, call: Call, key: str) -> Any:
        index, x_t = self.clock.index, call.x_t
        assert x_t is not None  # recorded hosts take one tensor
        per_call = len(x_t) // len(self.hidden)
        first = self._branches.calls * per_call
        branches = range(first, first + per_call)
        recorded = torch.cat([self.outputs[:, branch, index] for branch in branches])
        if key not in self._forms:  # the first step shows the form of an output
            with torch.no_grad():
                computed = call.run()
            self._forms[key] = form_of(computed)
            self.dtype = prediction(computed).dtype
            check_repeated(prediction(computed), recorded)
        output = self._forms[key](recorded.to(self.dtype))
        if index not in self.forecaster.anchors:
            with torch.enable_grad():
                step = self._step(index, key, x_t)
                made = self._forecast(expert, call, key, step)
                forecast = prediction(made)
            following = [*self._sigmas, 0.0][index + 1]
            repeated = (call.forward, call.args, call.kwargs)
            self.forced.append(Forced(step, forecast, recorded, x_t, following, *repeated))
        feature = torch.cat([self.hidden[:, branch, index] for branch in branches])
        taps = {self.forecaster.tap: feature.to(self.dtype)}
        self._pending.append(Seen(key, self._branches.calls, taps, None))
        return output


def replayed(
    pipe: Any,
    predictor: Predictor,
    tap: str,
    anchors: Sequence[int],
    items: Sequence[Item],
    hidden: Float[Tensor, "B branches S *shape"],
    outputs: Float[Tensor, "B branches S *other"],
    **settings: Any,
) -> list[Forced]:
    """The forecasts of recorded runs at all steps but the anchors.

    Args:
        pipe: the recorded pipeline.
        predictor: the forecaster.
        tap: `hidden` or `output`.
        anchors: steps whose features enter the history.
        items: the recorded items.
        hidden: their recorded features.
        outputs: their recorded outputs.
        settings: keyword arguments of the recorded pipeline call.

    Raises:
        ValueError: the pipeline is not the recorded one.
    """
    session = ReplayedRun(pipe, ForcedForecaster(predictor, tap, list(anchors)), hidden, outputs)
    try:
        generate_batch(pipe, items, output_type="latent", **settings)
    finally:
        session.detach()
    return session.forced


def check_repeated(computed: Tensor, recorded: Tensor) -> None:
    """Raise unless the network still computes what was recorded.

    Raises:
        ValueError: it does not.
    """
    gap = float((computed - recorded).norm() / recorded.norm())
    if not gap <= max(REPEATED, 8 * torch.finfo(computed.dtype).eps):
        raise ValueError(
            f"the pipeline's first output differs from the recorded one by {gap:.1e} (relative), "
            "expected the recorded pipeline and settings; record it again."
        )


def velocity_error(forced: Sequence[Forced]) -> Float[Tensor, ""]:
    """Mean squared error of the outputs the forecasts lead to."""
    return torch.stack([(each.forecast - each.target).square().mean() for each in forced]).mean()


def longest_gap(sigmas: Sequence[float], anchors: Sequence[int]) -> float:
    """The longest distance in sigma from a step to the newest anchor."""
    ends = [*anchors[1:], len(sigmas)]
    return max(sigmas[a] - sigmas[end - 1] for a, end in zip(anchors, ends, strict=True))


def draw_anchors(sigmas: Sequence[float], max_gap: float, source: random.Random) -> list[int]:
    """A random list of anchors that starts with 0 and leaves no step further than `max_gap`.

    Args:
        sigmas: flow time of every step.
        max_gap: longest distance in sigma from a step to the anchor before it.
        source: source of randomness.
    """
    anchors = [0]
    while anchors[-1] < len(sigmas) - 1:
        last = anchors[-1]
        reach = [
            step
            for step in range(last + 1, len(sigmas))
            if sigmas[last] - sigmas[step - 1] <= max_gap + 1e-6
        ]
        anchors.append(source.choice(reach))
    return anchors
