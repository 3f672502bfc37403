"""What a readout's segment is solved from: some trajectories at one anchor.

Shapes: n trajectories, M tokens, P elements of a token, D channels, Q outputs known so far (one per
branch and anchor, and per group where tokens are grouped), G token groups, E numbers read for a
token.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foreseer.trajectories.prompts import Item, digest

NUM_FOLDS = 5


@dataclass(frozen=True)
class Part:
    """Some trajectories at one segment.

    Args:
        hidden: sum_b g_b norm(H_b) at the segment's anchor and those before it that are read too,
            side by side; g the guidance weights.
        outputs: g_b F_{b,a} of all anchors so far, anchor by anchor.
        wanted: the guided forecast that lands the next state on the recorded one.
        newest: g_b F_{b,a} of the segment's anchor, summed over branches: the Euler forecast.
        folds: of each trajectory, equal where their prompts are.
        masks: of the token groups that have rows and readouts of their own; None of all tokens.
    """

    hidden: Float[Tensor, "n M D"]
    outputs: Float[Tensor, "Q n M P"]
    wanted: Float[Tensor, "n M P"]
    newest: Float[Tensor, "n M P"]
    folds: tuple[int, ...]
    masks: Bool[Tensor, "n M G"] | None = None

    def grouped(self, numbers: Int[Tensor, "n M"], num_groups: int) -> "Part":
        """The same with an output per branch, anchor and group, zero outside of the group.

        Args:
            numbers: of the tokens' groups.
            num_groups: G.
        """
        masks = torch.nn.functional.one_hot(numbers, num_groups).bool()
        outputs = self.outputs[:, None] * masks.movedim(2, 0)[None, ..., None]
        return replace(self, outputs=outputs.flatten(0, 1), masks=masks)

    def by_group(self, read: Float[Tensor, "n M D"]) -> Float[Tensor, "n M E"]:
        """What is read for a token, side by side for the groups, zero but for its own."""
        if self.masks is None:
            return read
        return (read[:, :, None] * self.masks[..., None]).flatten(2)


Parts = Callable[[], Iterator[Part]]
"""Trajectories of all folds, part by part, anew at every call."""


def of_folds(parts: Parts, folds: Collection[int]) -> Iterator[Part]:
    """The trajectories of some folds, part by part.

    Args:
        parts: of all folds.
        folds: which to keep.
    """
    for part in parts():
        kept = [place for place, fold in enumerate(part.folds) if fold in folds]
        yield Part(
            part.hidden[kept],
            part.outputs[:, kept],
            part.wanted[kept],
            part.newest[kept],
            tuple(part.folds[place] for place in kept),
            None if part.masks is None else part.masks[kept],
        )


def folds_of(items: Iterable[Item]) -> dict[int, int]:
    """A fold for every item, the same for items of the same inputs.

    Args:
        items: with what their pipeline calls are given.

    Returns:
        The fold by the item's number. Fewer kinds of input than folds are dealt item by item.
    """
    kinds: dict[str, int] = {}
    found = {}
    for item in items:
        kind = digest([Item(0, 0, item.inputs)], {})
        found[item.index] = kinds.setdefault(kind, len(kinds)) % NUM_FOLDS
    if len(kinds) < NUM_FOLDS:
        found = {item: place % NUM_FOLDS for place, item in enumerate(found)}
    return found
