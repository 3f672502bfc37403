"""One call of a transformer, with everything that running it again or without its trunk takes."""

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from foreseer.integration.host.call_rows import take_rows
from foreseer.integration.host.denoisers import TIME_ARGUMENTS
from foreseer.integration.host.host_facts import form_of_call
from foreseer.integration.host.trunk import first_tensor


@dataclass(frozen=True)
class Call:
    """One call of a transformer, to be run, repeated or replaced.

    Args:
        transformer: the host.
        forward: its own forward.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """

    transformer: nn.Module
    forward: Callable
    args: tuple
    kwargs: dict[str, Any]

    def run(self) -> Any:
        """What the host itself returns."""
        return self.forward(*self.args, **self.kwargs)

    @property
    def x_t(self) -> Tensor | None:
        """The network's input; None where it is no tensor, as in hosts that take lists."""
        found = self._input()
        return found if isinstance(found, Tensor) else None

    @property
    def form(self) -> Hashable:
        """The kinds of its arguments, see `form_of_call`."""
        return form_of_call(self.args, self.kwargs)

    @property
    def listed(self) -> bool:
        """Whether the host takes lists with a tensor per row."""
        return isinstance(self._input(), list)

    def rows(self, rows: Sequence[int], num_rows: int) -> "Call":
        """The call with some of its rows only.

        Args:
            rows: their numbers.
            num_rows: how many it has.
        """
        args, kwargs = take_rows((self.args, self.kwargs), rows, num_rows, self.listed)
        return replace(self, args=args, kwargs=kwargs)

    @property
    def outline(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all tensors that the network is given, in order."""
        return tuple(_shapes((self.args, self.kwargs)))

    @property
    def time(self) -> Tensor | None:
        """The time the network is told; None where its arguments do not show it."""
        names = list(inspect.signature(type(self.transformer).forward).parameters)[1:]
        given = dict(zip(names, self.args, strict=False)) | self.kwargs
        found = next((given[name] for name in TIME_ARGUMENTS if name in given), None)
        return found if isinstance(found, Tensor) else None

    def _input(self) -> Any:
        if self.args:
            return self.args[0]
        return self.kwargs.get("hidden_states", first_tensor((), self.kwargs))


def _shapes(value: Any) -> Iterator[tuple[int, ...]]:
    if isinstance(value, Tensor):
        yield tuple(value.shape)
    elif isinstance(value, list | tuple | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _shapes(entry)
