"""One call of a transformer, with everything that running it again or without its trunk takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .host import first_tensor


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
    def rows(self) -> int:
        """Samples of the call, each branch counted."""
        found = self._input()
        return len(found) if isinstance(found, Tensor | list | tuple) else 0

    def _input(self) -> Any:
        if self.args:
            return self.args[0]
        return self.kwargs.get("hidden_states", first_tensor((), self.kwargs))


@dataclass(frozen=True)
class Seen:
    """The taps of a call that was computed, kept until its step is over."""

    key: str
    call: int
    taps: dict[str, Tensor]
    x_t: Tensor | None
