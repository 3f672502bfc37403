"""Features of earlier runs of the same inputs, by transformer, branch and step."""

import torch
from torch import Tensor

from foreseer.predictors.base import Step


class Kept:
    """Keep features branch by branch, and put them together for any call.

    Attributes:
        parts: feature by (transformer, branch), then by step.
    """

    def __init__(self) -> None:
        self.parts: dict[tuple[int, int], dict[int, Tensor]] = {}

    def keep(self, step: Step, feature: Tensor) -> None:
        """Keep the feature of a call, a part for each of its branches."""
        for branch, part in zip(step.branches, feature.chunk(len(step.branches)), strict=True):
            self.parts.setdefault((step.expert, branch), {})[step.index] = part

    def steps(self, step: Step) -> list[int]:
        """Steps of which all branches of a call are kept, in order."""
        of = [self.parts.get((step.expert, branch), {}) for branch in step.branches]
        return sorted(set(of[0]).intersection(*of[1:]))

    def at(self, step: Step, index: int | None = None) -> Tensor:
        """The feature of a call.

        Args:
            step: says the transformer and the branches.
            index: of which step; None for this one.
        """
        wanted = step.index if index is None else index
        parts = [self.parts[step.expert, branch][wanted] for branch in step.branches]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def by_branch(self, index: int) -> Tensor:
        """The features of a step, `(branches, rows of one, *shape)`, in the branches' order."""
        found = {branch: held[index] for (_, branch), held in self.parts.items() if index in held}
        return torch.stack([found[branch] for branch in sorted(found)])

    def at_steps(self, wanted: list[int]) -> "Kept":
        """What is kept of some steps only."""
        some = Kept()
        for key, held in self.parts.items():
            some.parts[key] = {index: held[index] for index in wanted if index in held}
        return some

    def state_bytes(self) -> int:
        """Bytes of the newest feature of every branch."""
        newest = [held[max(held)] for held in self.parts.values() if held]
        return sum(part.numel() * part.element_size() for part in newest)
