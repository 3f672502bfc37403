"""Split a feature into parts that add up to it, and forecast each part by its own rule.

A partition is a set of orthogonal projectors, sum_p P_p = 1 and P_p P_q = 0 for p != q, so that a
feature is the sum of its parts and its Gram matrix the sum of theirs.
Shapes: B batch, N tokens, D channels, P parts, K history length, S sampling steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foreseer.predictors.weighted import combine, wide_dtype


class Partition:
    """Projectors that sum to the identity and are orthogonal to each other.

    Attributes:
        num_parts: number of projectors, P.
        smallest: (N, D) of the smallest token feature that can be split.
        kind: what the parts are called.
        of_calls: names of the parts, where every call says which tokens are of which.
    """

    kind: str
    num_parts: int
    smallest: tuple[int, int]
    of_calls: tuple[str, ...] = ()

    def at(self, groups: Int[Tensor, "B N"] | None) -> "Partition":
        """The partition of one call; the same of every call, unless groups arrive with it.

        Args:
            groups: group number of every row and token of the call, where it brings any.
        """
        return self

    def check(self, feature: Float[Tensor, " B *shape"]) -> None:
        """Raise unless a feature can be split.

        Raises:
            ValueError: it has another width or grid.
        """
        raise NotImplementedError

    def weigh(self, combined: Sequence[Float[Tensor, " B *shape"]]) -> Float[Tensor, " B *shape"]:
        """sum_p P_p u_p, one tensor u_p per part."""
        raise NotImplementedError

    def grams(self, features: Float[Tensor, " S *shape"]) -> Float[Tensor, "P S S"]:
        """<P_p F_s, P_p F_t> of every part in float64; they sum to the Gram of the features."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Plain JSON values that `partition_from` rebuilds the partition from."""
        raise NotImplementedError

    def split(self, feature: Float[Tensor, " B *shape"]) -> list[Float[Tensor, " B *shape"]]:
        """The parts P_p F, which sum to F."""
        zero = torch.zeros_like(feature)
        parts = range(self.num_parts)
        return [self.weigh([feature if p == q else zero for q in parts]) for p in parts]

    def combine(
        self, weights: Float[Tensor, "P K branches"], features: list[Tensor]
    ) -> Float[Tensor, " B *shape"]:
        """sum_p P_p sum_k w_pk F_k in float32 or wider, returned in the features' dtype.

        Args:
            weights: a weight per part, feature and equal part of the batch axis.
            features: tensors of one shape, batch first.

        Raises:
            ValueError: the features cannot be split.
        """
        self.check(features[-1])
        wide = [feature.to(wide_dtype(feature)) for feature in features]
        return self.weigh([combine(rows, wide) for rows in weights]).to(features[-1].dtype)


class Masks(Partition):
    """Parts that are 0/1 masks: every entry of a feature is of one of them."""

    def part_of(self, feature: Float[Tensor, " B *shape"]) -> Int[Tensor, "..."]:
        """Number of the part of every entry, in a shape that broadcasts to the feature's."""
        raise NotImplementedError

    def weigh(self, combined: Sequence[Float[Tensor, " B *shape"]]) -> Float[Tensor, " B *shape"]:
        """Every entry from the tensor of its part."""
        self.check(combined[0])
        numbers, total = self.part_of(combined[0]), combined[0]
        for part, other in enumerate(combined[1:], start=1):
            total = torch.where(numbers == part, other, total)
        return total


class ChannelGroups(Masks):
    """Groups of channels: of the last axis of tokens (B, N, D), of axis 1 of maps (B, C, H, W).

    Args:
        labels: the group of every channel, numbered from 0 without a gap.

    Raises:
        ValueError: a group is empty, or a label is no number >= 0.
    """

    kind = "channel groups"

    def __init__(self, labels: Sequence[int]) -> None:
        self.labels = tuple(labels)
        self.num_parts = len(set(self.labels))
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in self.labels)
        if not self.labels or not whole or set(self.labels) != set(range(self.num_parts)):
            raise ValueError(
                f"the labels are {sorted(set(self.labels), key=str)[:12]} on {len(self.labels)} "
                f"channels, expected the numbers 0 to {max(0, self.num_parts - 1)}, each used."
            )
        self.smallest = (1, len(self.labels))
        self.index = torch.tensor(self.labels, device="cpu")

    def check(self, feature: Float[Tensor, " B *shape"]) -> None:
        """Raise unless a feature has a channel per label."""
        if feature.ndim < 3 or feature.shape[_channel_axis(feature)] != len(self.labels):
            raise ValueError(
                f"found a feature of shape {tuple(feature.shape)}, but the groups are for "
                f"{len(self.labels)} channels: tokens (B, N, {len(self.labels)}) or maps "
                f"(B, {len(self.labels)}, H, W). Cluster the channels of this model and tap."
            )

    def part_of(self, feature: Float[Tensor, " B *shape"]) -> Int[Tensor, "..."]:
        """The group of every channel."""
        return _per_channel(self.index, feature)

    def combine(
        self, weights: Float[Tensor, "P K branches"], features: list[Tensor]
    ) -> Float[Tensor, " B *shape"]:
        """A weight per channel and feature: one pass over each feature for any number of groups."""
        newest = features[-1]
        self.check(newest)
        wide, num_branches = wide_dtype(newest), weights.shape[2]
        total: Tensor | None = None
        for values, feature in zip(weights.unbind(1), features, strict=True):  # (P, branches)
            if not values.any():
                continue
            scale = _per_channel(values[self.index].mT, feature).to(wide)  # (branches, 1, 1, D)
            term = feature.to(wide).unflatten(0, (num_branches, -1)) * scale
            total = term if total is None else total + term
        if total is None:
            return torch.zeros_like(newest)
        return total.flatten(0, 1).to(newest.dtype)

    def grams(self, features: Float[Tensor, " S *shape"]) -> Float[Tensor, "P S S"]:
        """Grams of the groups, one group in float64 at a time."""
        self.check(features)
        rows = []
        for part in range(self.num_parts):
            channels = (self.index == part).nonzero().flatten().to(features.device)
            inside = features.index_select(_channel_axis(features), channels).flatten(1).double()
            rows.append((inside @ inside.mT).cpu())
        return torch.stack(rows)

    def describe(self) -> dict[str, Any]:
        """The constructor's arguments and the class."""
        return {"class": "ChannelGroups", "labels": list(self.labels)}


def _channel_axis(feature: Tensor) -> int:
    return 2 if feature.ndim == 3 else 1


def _per_channel(values: Tensor, feature: Tensor) -> Tensor:
    """Values per channel (their last axis) on the feature's device, shaped to multiply it."""
    shape = [1] * feature.ndim
    shape[_channel_axis(feature)] = -1
    return values.reshape(*values.shape[:-1], *shape).to(feature.device)
