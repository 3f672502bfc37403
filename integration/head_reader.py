"""The hidden state that enters the head of a network, taken while a function calls it."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn

from foreseer.integration.host.call import Call, prediction
from foreseer.integration.host.expert import Expert
from foreseer.integration.host.hook import own, refuse_other_caches
from foreseer.integration.host.layout import Layout
from foreseer.integration.host.methods import replace_method, restore_method
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.predictors.base import Predictor


class Reader:
    """What enters the head of a network when a function calls it.

    Args:
        model: the network.
        predictor: reads the hidden state.

    Raises:
        UnsupportedHost: there is no network to take it from.
        ValueError: it has a cache.
    """

    def __init__(self, model: nn.Module | None, predictor: Predictor) -> None:
        if model is None or not hasattr(model, "config"):
            raise UnsupportedHost(
                f"{type(predictor).__name__} reads the hidden state that enters the "
                "head, which a function does not show; pass model=, the diffusers transformer that "
                "it calls, or use a predictor without a readout, such as L2P."
            )
        refuse_other_caches(model)
        self.model = model
        self.expert = Expert(0, "transformer", model, frozenset({"output", "hidden"}))

    def __call__(
        self, compute: Callable[[], Tensor], key: Hashable, layouts: dict[Hashable, Layout]
    ) -> tuple[Tensor, Tensor]:
        """What a function returns and what entered the head of the network meanwhile.

        Args:
            compute: the function.
            key: of the call.
            layouts: where the tokens of the head lie in the output, by call; added to.

        Raises:
            UnsupportedHost: it did not call the network once, or returned another shape.
        """
        calls: list[tuple[Tensor, tuple[int, ...]]] = []
        through = functools.partial(self._call, calls, key, layouts)
        replaced = replace_method(self.model, "forward", through)
        try:
            out = compute()
        finally:
            restore_method(self.model, "forward", replaced)
        if len(calls) != 1 or calls[0][1] != tuple(out.shape):
            shapes = [shape for _, shape in calls]
            raise UnsupportedHost(
                f"the function returned {tuple(out.shape)} and its network was called for "
                f"{shapes}, "
                "expected one call with that output: what is read off the hidden state is laid out "
                "like it. Guide and unpack outside of the function."
            )
        return out, calls[0][0]

    def _call(
        self,
        calls: list[tuple[Tensor, tuple[int, ...]]],
        key: Hashable,
        layouts: dict[Hashable, Layout],
        forward: Callable,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        call = Call(self.model, forward, args, kwargs)
        if not self.expert.proven:
            self.expert.prove(call)
        with self.expert.capturing() as captured:
            output = call.run()
        sample, hidden = prediction(output), own(captured["hidden"])
        if key not in layouts:
            layouts[key] = self.expert.layout(call, hidden, sample)
        calls.append((hidden, tuple(sample.shape)))
        return output
