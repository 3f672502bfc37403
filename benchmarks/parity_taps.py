"""Where other packages put their forecasts, with our predictors in their place.

Ours forecasts one tensor per step. These two harnesses forecast at module level and behind the
first block, on hosts that call every module once per step, so that the same definition can be
compared there too.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import Tensor, nn

from foreseer.predictors.base import History, Predictor, Step


class Stream:
    """One tensor of a module, forecast by a predictor between the anchors."""

    def __init__(self, rule: Predictor, num_steps: int) -> None:
        self.rule = rule
        self.num_steps = num_steps
        self.history = History(rule.window)

    def step(self, index: int) -> Step:
        """The step of that index; the rules used here look at nothing else."""
        return Step(index, 1 - index / self.num_steps, self.num_steps)


@contextlib.contextmanager
def module_forecasts(
    modules: Collection[nn.Module], rule: Predictor, anchors: Collection[int], num_steps: int
) -> Iterator[None]:
    """Forecast every output tensor of every module between the anchors, for one pipeline call."""
    for module in modules:
        module.forward = _forecasting(module, rule, anchors, num_steps)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _forecasting(
    module: nn.Module, rule: Predictor, anchors: Collection[int], num_steps: int
) -> Callable:

    own, streams, calls = module.forward, [], 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        index, calls = calls, calls + 1
        if index not in anchors:
            found = [stream.rule(stream.history, stream.step(index)) for stream in streams]
            return found[0] if len(found) == 1 else tuple(found)
        output = own(*args, **kwargs)
        tensors = (output,) if isinstance(output, Tensor) else output
        streams.extend(Stream(rule, num_steps) for _ in tensors[len(streams) :])
        for stream, tensor in zip(streams, tensors, strict=True):
            stream.history.push(stream.step(index), tensor)
        return output

    return forward


@contextlib.contextmanager
def tail_forecasts(
    blocks: list[nn.Module], rule: Predictor, anchors: Collection[int], num_steps: int
) -> Iterator[None]:
    """Run `blocks[0]` at every step and forecast what the others add, for one pipeline call.

    The first block runs on the current input; the other blocks' sum of residuals is forecast for
    each stream (FirstBlockCache and DBCache F1B0 place their caches there).
    """
    first, middle, last = blocks[0], blocks[1:-1], blocks[-1]
    streams: list[Stream] = []
    after_first: list[Tensor] = []
    calls = 0
    own = {block: block.forward for block in blocks}

    def head(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls, after_first
        output = own[first](*args, **kwargs)
        after_first = list(tensors_of(output))
        index, calls = calls, calls + 1
        head.anchor = index in anchors
        head.index = index
        if head.anchor:
            return output
        found = [s.rule(s.history, s.step(index)) for s in streams]
        sums = [tensor + add for tensor, add in zip(after_first, found, strict=True)]
        return sums[0] if isinstance(output, Tensor) else tuple(sums)

    def between(block: nn.Module) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return own[block](*args, **kwargs) if head.anchor else passed(args, kwargs)

        return forward

    def tail(*args: Any, **kwargs: Any) -> Any:
        if not head.anchor:
            return passed(args, kwargs)
        output = own[last](*args, **kwargs)
        tensors = tensors_of(output)
        streams.extend(Stream(rule, num_steps) for _ in tensors[len(streams) :])
        for stream, tensor, entered in zip(streams, tensors, after_first, strict=True):
            stream.history.push(stream.step(head.index), tensor - entered)
        return output

    first.forward, last.forward = head, tail
    for block in middle:
        block.forward = between(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def tensors_of(output: Any) -> tuple[Tensor, ...]:
    """A block's output tensors, in the order it returns them."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


def passed(args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a skipped block returns: its streams as they came, the text first as FLUX does."""
    named = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
    text = named.get("encoder_hidden_states")
    return named["hidden_states"] if text is None else (text, named["hidden_states"])
