"""Features at anchors, by transformer and guidance branches.

Branches that are computed together have one history, so that nothing is put together at every step.
A call of some of them takes their rows out of it and goes on alone; one that holds them with others
starts anew. Where samples have anchors of their own, every sample has a history.

Shapes: B samples; a call holds the rows of its branches one branch after the other.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from foreseer.predictors.base import History, Predictor, Reading, Step

Key = tuple[int, tuple[int, ...], Hashable]
"""Transformer, branches, and what tells apart calls that hold the same branches."""


class Histories:
    """The histories of a run.

    Args:
        window: anchors kept; None keeps all.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self._of: dict[Key, dict[str, list[History]]] = {}

    def at(self, step: Step, slot: Hashable = None) -> dict[str, list[History]] | None:
        """The histories of a call by tap, of all samples together or one for each.

        Args:
            step: says the transformer and the branches.
            slot: see `Key`.

        Returns:
            None where no anchor of the call is known.
        """
        key = step.expert, step.branches, slot
        found = self._of.get(key)
        return self._narrowed(key) if found is None else found

    def _narrowed(self, key: Key) -> dict[str, list[History]] | None:
        """Let a call go on with what other branches are gone from."""
        expert, branches, slot = key
        for held in self._of:
            if (held[0], held[2]) == (expert, slot) and set(branches) <= set(held[1]):
                places = [held[1].index(branch) for branch in branches]
                take = functools.partial(take_parts, places, len(held[1]))
                taps = self._of.pop(held).items()
                self._of[key] = {tap: [h.map(take) for h in each] for tap, each in taps}
                return self._of[key]
        return None

    def start(self, step: Step, slot: Hashable = None) -> dict[str, list[History]]:
        """Begin the histories of a call, in place of all that hold any of its branches."""
        stale = [
            held
            for held in self._of
            if (held[0], held[2]) == (step.expert, slot)
            and not set(step.branches).isdisjoint(held[1])
        ]
        for held in stale:
            del self._of[held]
        self._of[step.expert, step.branches, slot] = {}
        return self._of[step.expert, step.branches, slot]

    def mapped(self, change: Callable[[History], History]) -> "Histories":
        """The same of other histories, made of each."""
        made = Histories(self.window)
        made._of = {
            key: {tap: [change(history) for history in each] for tap, each in taps.items()}
            for key, taps in self._of.items()
        }
        return made

    def clear(self) -> None:
        """Forget everything."""
        self._of = {}

    def __iter__(self) -> Iterator[History]:
        """All histories."""
        return (h for taps in self._of.values() for each in taps.values() for h in each)

    def state_bytes(self) -> int:
        """Bytes of all histories."""
        return sum(history.state_bytes() for history in self)


def push(
    histories: list[History],
    step: Step,
    feature: Tensor,
    samples: Sequence[int] | None,
    reading: Reading | None = None,
) -> None:
    """Add an anchor's feature.

    Args:
        histories: of all samples together, or one for each.
        step: the anchor.
        feature: rows of the samples that were computed, one branch after the other.
        samples: which those are; None where all samples have one history.
        reading: what was read off the anchor's hidden state.
    """
    if samples is None:
        histories[0].push(step, feature, reading)
        return
    for place, sample in enumerate(samples):
        rows = feature[place :: len(samples)].clone(memory_format=torch.contiguous_format)
        histories[sample].push(step, rows)  # a view would keep the whole batch


def predicted(predictor: Predictor, histories: Sequence[History], step: Step) -> Tensor:
    """A forecast of all samples: one per group with the same anchors, put together again."""
    if len(histories) == 1:
        forecast: Tensor = predictor(histories[0], step)
        return forecast
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for sample, history in enumerate(histories):
        groups[tuple(history.steps)].append(sample)
    branches = len(step.branches)
    out: Tensor | None = None
    for members in groups.values():
        joined = join([histories[sample] for sample in members])
        own = step
        if step.groups is not None:
            own = replace(
                step, groups=step.groups.unflatten(0, (branches, -1))[:, members].flatten(0, 1)
            )
        rows = predictor(joined, own).unflatten(0, (branches, len(members)))
        if out is None:
            out = rows.new_empty(branches, len(histories), *rows.shape[2:])
        out[:, members] = rows
    assert out is not None  # a run has samples
    return out.flatten(0, 1)


def join(histories: Sequence[History]) -> History:
    """The histories of samples with the same anchors as one, branch after branch.

    Args:
        histories: one per sample; each feature has a row per branch.
    """
    first = histories[0]
    if len(histories) == 1:
        return first
    features = [
        torch.stack([history.features[k] for history in histories], dim=1).flatten(0, 1)
        for k in range(len(first))
    ]
    return History(first.window, list(first.steps), list(first.sigmas), features)


def take_parts(places: Sequence[int], count: int, tensor: Tensor) -> Tensor:
    """Some of the `count` equal parts of a tensor's rows."""
    parts = tensor.chunk(count)
    return torch.cat([parts[place] for place in places])


def check_shape(
    histories: Sequence[History],
    feature: Tensor,
    tap: str,
    step: Step,
    samples: Sequence[int] | None,
) -> None:
    """Raise unless an anchor's feature has the shape of those before it.

    Args:
        histories: of all samples together, or one for each.
        feature: rows of the samples that were computed.
        tap: its name.
        step: the anchor.
        samples: see `push`.

    Raises:
        ValueError: it has another.
    """
    rows = feature.shape[0] // len(samples) if samples else feature.shape[0]
    shape = (rows, *feature.shape[1:])
    for place in samples or (0,):
        history = histories[place]
        if len(history) and history.features[-1].shape != shape:
            raise ValueError(
                f"the {tap} changed shape from {tuple(history.features[-1].shape)} to "
                f"{shape} at step {step.index}; a run must keep one shape."
            )


def most_bytes(history: History, to_come: int) -> int:
    """Bytes that a history holds at most once some more anchors are over.

    min(window, anchors held + anchors to come) * bytes of a feature

    Args:
        history: holds an anchor at least.
        to_come: anchors that may still be pushed to it.
    """
    count = len(history) + to_come
    if history.window is not None:
        count = min(count, history.window)
    newest = history.features[-1]
    count += history.reading is not None
    carried = 0 if history.carried is None else history.carried.nbytes
    return count * newest.numel() * newest.element_size() + carried


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
