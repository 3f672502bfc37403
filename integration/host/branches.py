"""Which guidance branches a call of the transformer holds.

A call is known by its network, its ordinal among that network's calls of the step and the shapes of
what the network is given: pipelines put their branches into one call or several, or into calls of
two networks, leave some out for a part of the run (truncated guidance), or add one (skip-layer
guidance). A call of another shape is another call. Where it holds some of the branches that an
earlier call held, told by their conditions, it goes on with their history; otherwise, as where
latents grow in mid-run, it has none.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from foreseer.integration.host.call import Call
from foreseer.integration.host.call_rows import Conditions, Narrowed

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
        self._new: dict[str, Call] = {}  # calls of the step in progress not seen before
        self._conditions: dict[str, Conditions] = {}  # of calls with several branches

    @property
    def calls(self) -> int:
        """Calls of the step in progress that are over."""
        return len(self._step)

    def enter(self, expert: int, name: str, call: Call) -> tuple[str, Narrowed | None]:
        """What the next call of a network is known by, and what it goes on from.

        Args:
            expert: number of the transformer.
            name: its name in the pipeline; those that run at one step share a number.
            call: the call.

        Returns:
            Its key, and at its first step the earlier call whose branches it holds, if any.
        """
        known = f"{expert}.{name}."
        ordinal = sum(key.startswith(known) for key, _ in self._step)
        key = f"{known}{ordinal}x{call.outline}"
        if key in self._known:
            return key, None
        narrowed = self._narrowed(known, call)
        if narrowed is None:
            self._new[key] = call
        else:
            self._known[key] = narrowed.branches
        return key, narrowed

    def _narrowed(self, network: str, call: Call) -> Narrowed | None:
        """The latest call of a network that held all branches of this one, and others."""
        taken = {branch for key, _ in self._step for branch in self.of(key)}
        for key, conditions in reversed(self._conditions.items()):
            places = conditions.find((call.args, call.kwargs)) if key.startswith(network) else None
            branches = tuple(self._known[key][place] for place in places or ())
            if places and taken.isdisjoint(branches):
                return Narrowed(key, places, branches, conditions.count, conditions.rows)
        return None

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
        taken = {branch for key, _ in self._step for branch in self._known.get(key, ())}
        free = (number for number in itertools.count() if number not in taken)
        for key, rows in self._step:
            if key in self._known:
                continue
            count = max(1, rows // samples)
            self._known[key] = tuple(itertools.islice(free, count))
            call = self._new.get(key)
            if call is not None and count > 1:
                arguments = (call.args, call.kwargs)
                self._conditions[key] = Conditions(arguments, count, rows, call.listed)
        self._step, self._new = [], {}
