"""Which guidance branches a call of the transformer holds.

A call is known by its network, its ordinal among that network's calls of the step and the shapes of
what the network is given (`CallForm`): pipelines put their branches into one call or several, or
into calls of two networks, leave some out for a part of the run (truncated guidance), or add one
(skip-layer guidance). A call of another shape is another call. Where it holds some of the branches
that an earlier call held, told by their conditions, it goes on with their history; otherwise, as
where latents grow in mid-run, it has none.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foreseer.integration.host.call import Call, Conditions, Narrowed

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


class CallForm(NamedTuple):
    """What a call of a transformer is known by.

    Args:
        expert: number of the transformer; those that run at one step share it.
        name: its name in the pipeline.
        ordinal: number of the call among those of this transformer in the step.
        outline: shapes of what the transformer is given.
    """

    expert: int
    name: str
    ordinal: int
    outline: tuple[tuple[int, ...], ...]


class Branches:
    """The branches of every call of a run, known once the call's first step is over."""

    def __init__(self) -> None:
        self._of: dict[CallForm, tuple[int, ...]] = {}
        self._step: list[tuple[CallForm, int]] = []
        self._new: dict[CallForm, Call] = {}  # calls of the step in progress not met before
        self._conditions: dict[CallForm, Conditions] = {}  # of calls with several branches
        self._remembered: set[CallForm] = set()  # from the run before
        self._followed: Sequence[tuple[int, tuple[int, ...]]] = ()

    @property
    def calls(self) -> int:
        """Calls of the step in progress that are over."""
        return len(self._step)

    def enter(self, expert: int, name: str, call: Call) -> tuple[CallForm, Narrowed | None]:
        """What the next call of a network is known by, and what it goes on from.

        Args:
            expert: number of the transformer.
            name: its name in the pipeline.
            call: the call.

        Returns:
            Its form, and at its first step the earlier call whose branches it holds, if any.
        """
        ordinal = 0
        for earlier, _ in self._step:
            ordinal += earlier.expert == expert and earlier.name == name
        form = CallForm(expert, name, ordinal, call.outline)
        if form not in self._of and len(self._step) < len(self._followed):
            before, branches = self._followed[len(self._step)]
            if before == expert:
                self._of[form] = branches
                self._remembered.add(form)
        if form in self._of:
            return form, None
        narrowed = self._narrowed(form, call)
        if narrowed is None:
            self._new[form] = call
        else:
            self._of[form] = narrowed.branches
        return form, narrowed

    def _narrowed(self, form: CallForm, call: Call) -> Narrowed | None:
        """The latest call of a network that held all branches of this one, and others."""
        taken = {branch for other, _ in self._step for branch in self.of(other) or ()}
        for other, conditions in reversed(self._conditions.items()):
            if (other.expert, other.name) != (form.expert, form.name) or other not in self._of:
                continue
            places = conditions.find((call.args, call.kwargs))
            branches = tuple(self._of[other][place] for place in places or ())
            if places and taken.isdisjoint(branches):
                return Narrowed(places, branches, conditions.count, conditions.rows)
        return None

    def of(self, form: CallForm) -> tuple[int, ...] | None:
        """Branch number of each equal part of a call's rows; None while it is not known."""
        return self._of.get(form)

    def count(self, form: CallForm, rows: int) -> None:
        """A call of the step in progress is over.

        Args:
            form: what it is known by.
            rows: rows of its prediction.
        """
        self._step.append((form, rows))

    def close(self, samples: int) -> set[CallForm]:
        """The step is over; number the branches of calls not met before.

        A call that was known by the same branches is not any more: latents that grow in mid-run
        make other calls of them.

        Args:
            samples: samples of the pipeline call.

        Returns:
            The calls not met before.

        Raises:
            ValueError: a call remembered from the run before holds another number of branches.
        """
        self._check_remembered(samples)
        if all(form in self._of for form, _ in self._step):
            self._step, self._new = [], {}
            return set()
        taken = {branch for form, _ in self._step for branch in self._of.get(form, ())}
        free = (number for number in itertools.count() if number not in taken)
        met = {form for form, _ in self._step if form in self._of}
        started: set[CallForm] = set()
        for form, rows in self._step:
            if form in met or form in started:
                continue
            count = max(1, rows // samples)
            branches = tuple(itertools.islice(free, count))
            self._drop(form.expert, branches)
            self._of[form] = branches
            started.add(form)
            if count > 1:
                call = self._new[form]
                arguments = (call.args, call.kwargs)
                self._conditions[form] = Conditions(arguments, count, rows, call.listed)
        self._step, self._new = [], {}
        return started

    def _drop(self, expert: int, branches: tuple[int, ...]) -> None:
        """Forget the calls of a transformer that hold any of some branches."""
        for form, held in list(self._of.items()):
            if form.expert == expert and not set(branches).isdisjoint(held):
                del self._of[form]

    def restart(self) -> None:
        """A run begins that makes the calls of the one before."""
        self._step, self._new = [], {}
        self._remembered = set(self._of)

    def follow(self, calls: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        """A run begins that goes on from another, whose steps made the same calls.

        Args:
            calls: transformer and branches of each, in order.
        """
        self._followed = calls

    def _check_remembered(self, samples: int) -> None:
        for form, rows in self._step:
            if form in self._remembered and len(self._of[form]) != max(1, rows // samples):
                raise ValueError(
                    f"a call of {rows} rows for {samples} samples held {len(self._of[form])} "
                    "guidance branches in the run before; runs that are repeated, or go on from "
                    "another, must keep their guidance."
                )
