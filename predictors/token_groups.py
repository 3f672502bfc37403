"""Groups of tokens that only a call knows, such as what an edit's mask covers.

A 0/1 mask of tokens is an orthogonal projector of its sample, so group-wise Grams add up over
samples and every group can have rows of its own; see `partition.py`.
Shapes: B samples, M = branches * B rows of a call, N tokens, D channels, P groups, K history
length, S sampling steps, H x W pixels, h x w tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foreseer.predictors.partition import Masks
from foreseer.predictors.weighted import wide_dtype

REGIONS = ("edit", "near", "keep", "reference")
"""The groups of an editing model: what is edited, the rings around it, the rest of the picture, and
the tokens of a source picture that follow those of the picture (FLUX Kontext, Qwen-Image-Edit)."""


class TokenGroups(Masks):
    """Tokens with the same group number; the numbers arrive with every call.

    F_hat = sum_g P_g sum_k c_gk F_k, with P_g the sample's own 0/1 mask of group g.

    Args:
        names: of the groups, in the order of their numbers.
        numbers: of a call; None of a partition that has not met one.

    Raises:
        ValueError: there are not two groups at least, or two of one name.
    """

    def __init__(
        self, names: Sequence[str] = REGIONS, numbers: Int[Tensor, "M N"] | None = None
    ) -> None:
        self.names = tuple(names)
        if len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise ValueError(f"the groups are {list(self.names)}, expected two or more names.")
        self.of_calls = self.names
        self.num_parts = len(self.names)
        self.smallest = (self.num_parts, 4)
        self.kind = f"token groups ({', '.join(self.names)})"
        self.numbers = numbers

    def at(self, groups: Int[Tensor, "M N"] | None) -> "TokenGroups":
        """The partition of a call.

        Raises:
            ValueError: it brings no groups, or numbers without a name.
        """
        if groups is None:
            raise ValueError(
                f"this predictor has rows for the token groups {', '.join(self.names)}, and the "
                "call brings no groups; pass groups=, a group number per sample and token."
            )
        return TokenGroups(self.names, groups)

    def check(self, feature: Float[Tensor, " M *shape"]) -> None:
        """Raise unless a feature has a token per group number."""
        numbers = self._numbers()
        if feature.ndim != 3 or feature.shape[:2] != numbers.shape:
            raise ValueError(
                f"found a feature of shape {tuple(feature.shape)}, but the token groups are for "
                f"{len(numbers)} rows of {numbers.shape[1]} tokens. Give a group number for every "
                "token of the tap, those of a source picture included; on maps (B, C, H, W) use "
                "the tap 'hidden'."
            )

    def _numbers(self) -> Int[Tensor, "M N"]:
        if self.numbers is None:
            raise ValueError("the token groups have not met a call; ask for those `at` one.")
        return self.numbers

    def part_of(self, feature: Float[Tensor, "M N D"]) -> Int[Tensor, "M N 1"]:
        """The group of every token."""
        return self._numbers()[..., None]

    def combine(
        self, weights: Float[Tensor, "P K branches"], features: list[Tensor]
    ) -> Float[Tensor, "M N D"]:
        """A weight per token and feature: one pass over each feature for any number of groups."""
        newest = features[-1]
        self.check(newest)
        wide, num_branches = wide_dtype(newest), weights.shape[2]
        numbers = self._numbers().unflatten(0, (num_branches, -1))  # (branches, B, N)
        branch = torch.arange(num_branches, device=numbers.device)[:, None, None]
        total = torch.zeros_like(newest, dtype=wide)
        for values, feature in zip(weights.unbind(1), features, strict=True):  # (P, branches)
            if values.any():
                scale = values.mT.to(newest.device, wide)[branch, numbers].flatten(0, 1)
                total.addcmul_(feature.to(wide), scale[..., None])
        return total.to(newest.dtype)

    def grams(self, features: Float[Tensor, "S N D"]) -> Float[Tensor, "P S S"]:
        """Grams of the groups of one sample, zero where it has no token of a group."""
        numbers = self._numbers()[0]
        rows = []
        for part in range(self.num_parts):
            inside = features[:, numbers == part].flatten(1).double()
            rows.append((inside @ inside.mT).cpu())
        return torch.stack(rows)

    def describe(self) -> dict[str, Any]:
        """The class and the names."""
        return {"class": "TokenGroups", "names": list(self.names)}


def region_groups(
    mask: Any,
    grid: tuple[int, int],
    rings: int = 1,
    num_reference: int = 0,
) -> Int[Tensor, "B N"]:
    """The `REGIONS` of an edit's mask: a token is `edit` if any of its pixels is.

    Args:
        mask: pixels that may change, True or non-zero, a tensor (B, H, W).
        grid: height and width in tokens, which divide those of the mask.
        rings: steps of 8-neighbour dilation that are `near`, >= 0.
        num_reference: tokens of a source picture that follow those of the picture.

    Returns:
        Numbers of h w tokens row by row, then of the source's. A mask of all pixels has no `near`
        and no `keep`, which is no error: rows of absent groups are not used.

    Raises:
        ValueError: a mask is empty, or has other sides than a multiple of the grid's.
    """
    inner = edited_tokens(mask, grid)
    outer = dilated(inner, rings)
    numbers = torch.where(inner, 0, torch.where(outer, 1, 2)).flatten(1)
    reference = numbers.new_full((len(numbers), num_reference), 3)
    return torch.cat([numbers, reference], 1)


def edited_tokens(mask: Any, grid: tuple[int, int]) -> Bool[Tensor, "B h w"]:
    """Tokens with an edited pixel, see `region_groups`."""
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"the mask is a {type(mask).__name__}, expected a tensor (samples, height, width); of "
            "a call without a mask there are no regions: leave groups out of it."
        )
    height, width = grid
    sides = tuple(mask.shape[1:])
    if mask.ndim != 3 or min(sides) < 1 or sides[0] % height or sides[1] % width:
        raise ValueError(
            f"found a mask of shape {tuple(mask.shape)}, expected (samples, height, width) with a "
            f"height that {height} tokens divide and a width that {width} do; scale it to the "
            "picture's size."
        )
    cells = (sides[0] // height, sides[1] // width)
    inner = nn.functional.max_pool2d((mask != 0).float(), cells) > 0
    if empty := (~inner.flatten(1).any(1)).nonzero().flatten().tolist():
        raise ValueError(
            f"the masks of the samples {empty} are empty, expected pixels that may change: with "
            "none there is nothing to edit. Is the mask inverted, or of another range?"
        )
    return inner


def dilated(mask: Bool[Tensor, "B h w"], rings: int) -> Bool[Tensor, "B h w"]:
    """A mask and the tokens within so many steps of it, diagonal ones included.

    Raises:
        ValueError: the number is below 0.
    """
    if rings < 0:
        raise ValueError(f"rings is {rings}, expected 0 or more.")
    side = 2 * rings + 1
    return nn.functional.max_pool2d(mask.float(), side, 1, rings) > 0
