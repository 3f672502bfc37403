"""FLOPs of a full step and of a forecast step, counted on one call of the transformer.

Matrix products are counted by `torch.utils.flop_counter`, with attention on its plain path, since
the fused CPU kernel counts as 0. The counter knows no elementwise work, so a forecast's own 2 K
operations per element are added by hand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from foreseer.integration.host.call import prediction
from foreseer.integration.host.hook import TrunkSkipper, capturing
from foreseer.integration.host.trunk import TrunkTracer

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


@dataclass(frozen=True)
class StepFlops:
    """Cost of one call of the transformer.

    Args:
        full: FLOPs when the network runs.
        base: FLOPs of a forecast call before its sum over the history: the head on the `hidden` and
            `residual` taps, nothing on `output`.
        elements: elements of the feature that is forecast.
    """

    full: int
    base: int
    elements: int

    def forecast(self, num_features: int) -> int:
        """FLOPs of a forecast from `num_features` anchors."""
        return self.base + 2 * num_features * self.elements


class _Stop(Exception):
    """Ends a pipeline call once the transformer's inputs are known."""


def first_call(transformer: nn.Module, run: Callable[[], Any]) -> Call:
    """The arguments of the first call of a transformer within `run()`, which is cut short there.

    Raises:
        ValueError: `run` never calls the transformer.
    """

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Stop

    seen: list[Call] = []
    handle = transformer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Stop:
        return seen[0]
    finally:
        handle.remove()
    raise ValueError(
        f"the run never called {type(transformer).__name__}, so its inputs are unknown."
    )


@torch.no_grad()
def step_flops(transformer: nn.Module, call: Call, tap: str) -> StepFlops:
    """Count a full call and a forecast call on one tap.

    Args:
        transformer: the host, with nothing attached.
        call: arguments of one call, as `first_call` gives them.
        tap: `output`, `hidden` or `residual`.

    Raises:
        ValueError: the tap is unknown.
    """
    if tap not in ("output", "hidden", "residual"):
        raise ValueError(f"tap is {tap!r}, expected 'output', 'hidden' or 'residual'.")
    args, kwargs = call
    forward = transformer.forward
    full, output = _counted(lambda: forward(*args, **kwargs))
    if tap == "output":
        return StepFlops(full, 0, prediction(output).numel())
    with TrunkTracer(transformer) as tracer:
        forward(*args, **kwargs)
    trunk = tracer.trunk()
    with capturing(transformer, trunk, {"hidden"}) as found:
        forward(*args, **kwargs)
    hidden: Tensor = found["hidden"]
    skipper = TrunkSkipper(transformer, trunk)
    base, _ = _counted(lambda: skipper(forward, args, kwargs, lambda entering: hidden))
    return StepFlops(full, base, hidden.numel())


def run_flops(
    cost: StepFlops, anchors: Sequence[int], num_steps: int, window: int | None
) -> tuple[int, int]:
    """FLOPs of an accelerated run and of the full run.

    Args:
        cost: cost of each kind of step.
        anchors: steps at which the network runs.
        num_steps: steps of the run.
        window: anchors a forecast looks at; None means all there are.
    """
    total = cost.full * len(anchors)
    for step in range(num_steps):
        if step not in anchors:
            known = sum(anchor < step for anchor in anchors)
            total += cost.forecast(known if window is None else min(known, window))
    return total, cost.full * num_steps


def _counted(call: Callable[[], Any]) -> tuple[int, Any]:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result
