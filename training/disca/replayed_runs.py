"""Recorded runs played again, with a forecast taken through the head at every forecast step.

The recorded outputs stand in for the network, so a batch costs its forecasts and one evaluation,
which tells whether the pipeline is the recorded one. Every forecast is made from true features at
true states: the open loop. Tokens, modulation and head are the pipeline's own, so nothing here
knows a host.

Runs that forecast are differentiated in the predictor: the network's features at the anchors count
as constants, so no graph of the network is kept. A forecast moves the latents through the head, the
guidance and the sampler, and what the network would answer to moved latents is left out.
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
from foreseer.integration.host.call import Call, form_of, prediction
from foreseer.integration.host.expert import Expert
from foreseer.integration.host.hosts import transformer_of
from foreseer.integration.observers import Observer, Source, StepRecord
from foreseer.integration.runner import Answer, Runner, as_output
from foreseer.integration.session import Session
from foreseer.predictors.base import Predictor, Step
from foreseer.trajectories.prompts import Item, generate_batch, generate_with_gradients


class FrozenNetwork(Runner):
    """Runs whose anchors keep no graph."""

    @torch.no_grad()
    def prove(self, expert: Expert, call: Call) -> None:
        """Check on a transformer's first call everything that is relied on."""
        super().prove(expert, call)

    @torch.no_grad()
    def run(self, expert: Expert, call: Call, step: Step) -> Answer:
        """Run the network and capture its taps."""
        return super().run(expert, call, step)


def final_latents(
    pipe: Any,
    predictor: Predictor,
    tap: str,
    anchors: Sequence[int],
    items: Sequence[Item],
    **settings: Any,
) -> Float[Tensor, " B *shape"]:
    """The final latents of a batch, differentiable in the predictor.

    Args:
        pipe: the pipeline; its parameters get no gradient.
        predictor: the forecaster.
        tap: `output`, `hidden` or `residual`.
        anchors: steps at which the network runs.
        items: the batch.
        settings: keyword arguments of the pipeline call.

    Raises:
        ValueError: the pipeline or its scheduler cuts the graph.
    """
    transformer = transformer_of(pipe)
    wanted = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    source = Forecaster(predictor, tap, list(anchors))
    session = Session(pipe, source, runner=FrozenNetwork())
    transformer.requires_grad_(False)
    try:
        latents = generate_with_gradients(pipe, items, output_type="latent", **settings)[0]
    finally:
        session.detach()
        for parameter in wanted:
            parameter.requires_grad_(True)
    if not latents.requires_grad:
        raise ValueError(
            f"the final latents of {type(pipe).__name__} do not depend on the predictor: the "
            f"pipeline or {type(pipe.scheduler).__name__} works without gradients, or no step is "
            "forecast. Train on features instead (closed_loop_target: feature)."
        )
    return latents


REPEATED = 1e-3  # relative; a batch of another size rounds differently, in bfloat16 more


@dataclass(frozen=True)
class Forced:
    """One forecast of a replayed run.

    Args:
        step: the step.
        forecast: the output it leads to, differentiable in the predictor.
        target: the recorded output.
        x_t: the network's input; of more channels where it is given a picture beside the sample.
        next_sigma: flow time the step leads to.
        forward: the transformer's own forward, to be called again elsewhere.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """

    step: Step
    forecast: Float[Tensor, " B *shape"]
    target: Float[Tensor, " B *shape"]
    x_t: Float[Tensor, " B *given"]
    next_sigma: float
    forward: Callable
    args: tuple
    kwargs: dict[str, Any]


class Recorded(Runner, Observer):
    """Answers with recorded outputs and forecasts beside them.

    Args:
        hidden: recorded features of the forecast tap, a row per item of the call.
        outputs: recorded outputs.
    """

    def __init__(
        self,
        hidden: Float[Tensor, "B branches S *shape"],
        outputs: Float[Tensor, "B branches S *other"],
    ) -> None:
        self.hidden = hidden
        self.outputs = outputs
        self.forced: list[Forced] = []
        self.dtype = outputs.dtype  # of the network, once it has run
        self._compared: set[int] = set()  # branches
        self._made: list[tuple[Step, Tensor, Tensor, Call]] = []  # in the step in progress

    @torch.no_grad()
    def prove(self, expert: Expert, call: Call) -> None:
        """Check on a transformer's first call everything that is relied on."""
        super().prove(expert, call)

    def run(self, expert: Expert, call: Call, step: Step) -> Answer:
        """The recorded output and feature; a first call is computed, to compare them."""
        (tap,) = expert.taps
        branches = self._branches(call, step)
        recorded = _rows(self.outputs, branches, step)
        if not self._compared.issuperset(branches):
            with torch.no_grad():
                computed = call.run()
            expert.form = form_of(computed)
            self.dtype = prediction(computed).dtype
            check_repeated(prediction(computed), recorded)
            self._compared.update(branches)
        feature = _rows(self.hidden, branches, step).to(self.dtype)
        return Answer(as_output(expert, recorded.to(self.dtype)), {tap: feature})

    def forecast(self, expert: Expert, call: Call, step: Step, source: Source) -> Answer:
        """The recorded output; the forecast is put aside."""
        with torch.enable_grad():
            forecast = prediction(super().forecast(expert, call, step, source).output)
        recorded = _rows(self.outputs, self._branches(call, step), step)
        self._made.append((step, forecast, recorded, call))
        return Answer(as_output(expert, recorded.to(self.dtype)))

    def _branches(self, call: Call, step: Step) -> tuple[int, ...]:
        """Those of a call, which are not known in its first step; calls are alike."""
        assert call.x_t is not None  # recorded hosts take one tensor
        count, first = len(call.x_t) // len(self.hidden), step.branches[0]
        if len(step.branches) != count:  # the number of the call stands for its branches
            first *= count
        return tuple(range(first, first + count))

    def on_step(self, record: StepRecord) -> None:
        """The forecasts of a step, now that it is known where it leads to."""
        following = [*record.sigmas, 0.0][record.index + 1]
        for step, forecast, recorded, call in self._made:
            assert call.x_t is not None  # see above
            again = (call.forward, call.args, call.kwargs)
            self.forced.append(Forced(step, forecast, recorded, call.x_t, following, *again))
        self._made = []


def _rows(recorded: Tensor, branches: Sequence[int], step: Step) -> Tensor:
    """What was recorded at a step, branch after branch."""
    return torch.cat([recorded[:, branch, step.index] for branch in branches])


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
    runner = Recorded(hidden, outputs)
    source = Forecaster(predictor, tap, list(anchors))
    session = Session(pipe, source, [runner], runner)
    try:
        generate_batch(pipe, items, output_type="latent", **settings)
    finally:
        session.detach()
    return runner.forced


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
