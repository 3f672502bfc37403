"""Which guidance branches a call of the transformer holds.

A call is known by its network, its ordinal among that network's calls of the step and the shapes of
what the network is given: pipelines put their branches into one call or several, or into calls of
two networks, leave some out for a part of the run (truncated guidance), or add one (skip-layer
guidance). A call of another shape, as of latents that grow in mid-run, is another call, which has
no history.
"""

from typing import Any

import torch
from torch import Tensor

DOUBLED_LATENTS = ("DiTPipeline",)
"""Pipelines that hand the scheduler every sample twice, once per guidance branch."""


def rows_per_branch(pipe: Any, latents: Tensor) -> int:
    """Samples of a pipeline call, given the latents its scheduler works on.

    Args:
        pipe: the pipeline.
        latents: the sample of a scheduler step, batch first.
    """
    half = len(latents) // 2
    doubled = type(pipe).__name__ in DOUBLED_LATENTS and 2 * half == len(latents)
    if doubled and torch.equal(latents[:half], latents[half:]):
        return half
    return max(1, len(latents))


class Branches:
    """The branches of every call of a run, known once the call's first step is over."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, ...]] = {}
        self._step: list[tuple[str, int]] = []

    @property
    def calls(self) -> int:
        """Calls of the step in progress that are over."""
        return len(self._step)

    def key(self, expert: int, name: str, outline: str) -> str:
        """What the next call of a network is known by.

        Args:
            expert: number of the transformer.
            name: its name in the pipeline; those that run at one step share a number.
            outline: the shapes of what it is given.
        """
        known = f"{expert}.{name}."
        ordinal = sum(key.startswith(known) for key, _ in self._step)
        return f"{known}{ordinal}x{outline}"

    def expert_of(self, key: str) -> int:
        """Number of the transformer of a call."""
        return int(key.partition(".")[0])

    def of(self, key: str) -> tuple[int, ...]:
        """Branch number of each equal part of a call's rows; one per call while it is not known."""
        return self._known.get(key, (self.calls,))

    def count(self, key: str, rows: int) -> None:
        """A call of the step in progress is over.

        Args:
            key: what it is known by.
            rows: rows of its prediction.
        """
        self._step.append((key, rows))

    def close(self, samples: int) -> None:
        """The step is over; number the branches of calls not seen before.

        Args:
            samples: samples of the pipeline call.
        """
        first = 0
        for key, rows in self._step:
            count = max(1, rows // samples)
            self._known.setdefault(key, tuple(range(first, first + count)))
            first += count
        self._step = []
