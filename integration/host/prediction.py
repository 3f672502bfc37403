"""A transformer's prediction, in whatever form the class returns it, as one tensor and back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foreseer.integration.host.trunk import UnsupportedHost


def prediction(output: Any) -> Tensor:
    """The prediction in a transformer's return value, a row per sample.

    Raises:
        UnsupportedHost: the return value holds no single tensor, nor a list of equal ones.
    """
    sample = _sample(output)
    if isinstance(sample, Tensor):
        return sample
    if isinstance(sample, list) and sample and all(isinstance(each, Tensor) for each in sample):
        if len({each.shape for each in sample}) == 1:
            return torch.stack(sample)
        shapes = [tuple(each.shape) for each in sample]
        raise UnsupportedHost(
            f"the samples of one call have the shapes {shapes}, expected one size per call; draw "
            "samples of another size in a call of their own."
        )
    raise UnsupportedHost(
        f"the transformer returned {type(output).__name__}, expected a tuple of one tensor, a list "
        "of tensors or an output with a `sample`."
    )


def form_of(output: Any) -> Callable[[Tensor], Any]:
    """What puts a prediction back into the form of this return value."""
    listed = isinstance(_sample(output), list)
    kind = type(output)

    def wrap(sample: Tensor) -> Any:
        content: Any = list(sample.unbind()) if listed else sample
        if kind is Tensor or kind is list:
            return content
        return (content,) if kind is tuple else kind(content)

    return wrap


def _sample(output: Any) -> Any:
    only = output[0] if isinstance(output, tuple) and len(output) == 1 else output
    return getattr(only, "sample", only)
