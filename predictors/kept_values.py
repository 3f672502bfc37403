"""Whether what was made of some tensors still holds: their values, looked at again."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def values_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """A copy of the values of tensors, one vector per device.

    Marks such as `data_ptr` and `_version` say nothing of a write through `.data`.
    """
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor.detach().flatten())
    return [torch.cat(vectors) for vectors in found.values()]


def same_values(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two results of `values_of` are equal."""
    return len(first) == len(second) and all(
        a.device == b.device and torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )
