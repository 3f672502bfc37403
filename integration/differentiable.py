"""A pipeline's `__call__` with gradients: diffusers decorates it with `torch.no_grad`."""

import functools
from collections.abc import Callable
from typing import Any


def differentiable(pipe: Any) -> Callable[..., Any]:
    """The pipeline's own `__call__` without its `no_grad` decorator.

    Raises:
        ValueError: `__call__` is not decorated in the way diffusers does it.
    """
    undecorated = getattr(type(pipe).__call__, "__wrapped__", None)
    if undecorated is None:
        raise ValueError(
            f"{type(pipe).__name__}.__call__ is not decorated with torch.no_grad(), so its body "
            "cannot be reached; refine this pipeline without gradients (learning_rate=0)."
        )
    return functools.partial(undecorated, pipe)
