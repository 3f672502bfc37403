"""What a segment of a readout fit is solved from, made of what a walk has visited.

The sampler is a linear map of the network's outputs, so the next state is a sum that the segment's
forecasts enter with one weight, and solving for the forecast that lands it is a subtraction.
Shapes: S sampling steps, B batch, Q outputs known so far (one per branch and anchor).
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.evaluation.rows import formula_tables
from foreseer.predictors.linear import L2P, expert_start
from foreseer.predictors.readout import normalised
from foreseer.training.readout.segment import Part
from foreseer.training.readout.sums import NUM_FOLDS
from foreseer.training.readout.walk import Visited, Walk
from foreseer.training.tracking import check_branches
from foreseer.trajectories.files.header import Header
from foreseer.trajectories.prompts import Item, digest
from foreseer.trajectories.recording import Recording


class SegmentParts:
    """The data of every segment of a walk.

    Args:
        recording: of the full runs, with states.
        walk: what visits the anchors.
        folds: of every item.
    """

    def __init__(self, recording: Recording, walk: Walk, folds: dict[int, int]) -> None:
        self.recording = recording
        self.walk = walk
        self.folds = folds
        anchors, num_steps = walk.rows.anchors, walk.rows.num_steps
        pairs = zip(anchors, [*anchors[1:], num_steps], strict=True)
        self.segments = [(anchor, end) for anchor, end in pairs if end > anchor + 1]

    @cached_property
    def tables(self) -> dict[str, Float[Tensor, "S S"]]:
        """The rows of every formula."""
        rows = self.walk.rows
        return formula_tables(rows.anchors, self.recording.header.sigmas, rows.expert_steps)

    def known(self, anchor: int) -> list[int]:
        """The anchors up to one, of its transformer."""
        first = expert_start(self.walk.rows.expert_steps, anchor)
        return [a for a in self.walk.rows.anchors if first <= a <= anchor]

    def recent(self, anchor: int) -> list[int]:
        """The anchors whose hidden states are read at one, newest first."""
        return self.known(anchor)[: -2 - self.walk.past : -1]

    def guidance(self, step: int) -> Float[Tensor, " branches"]:
        """Weights of the branches at a step."""
        return self.walk.guidance[expert_start(self.walk.rows.expert_steps, step)]

    def formulas(self, anchor: int, end: int) -> dict[str, Float[Tensor, " Q"]]:
        """Weights of the known outputs in a segment's forecast, by name of the formula.

        Args:
            anchor: where the segment starts.
            end: the next anchor.
        """
        assert self.walk.sampler is not None  # it has visited an anchor
        steps = slice(anchor + 1, end)
        response = self.walk.sampler.response[end, steps]
        known, branches = self.known(anchor), self.walk.rows.num_branches
        weights = {
            n: response @ t[steps][:, known] / response.sum() for n, t in self.tables.items()
        }
        return {name: each.repeat_interleave(branches) for name, each in weights.items()}

    def part(self, items: Sequence[Item], visited: Visited, anchor: int, end: int) -> Part:
        """One batch at one segment.

        Args:
            items: the batch.
            visited: what it has computed, the anchor included.
            anchor: where the segment starts.
            end: the next anchor.
        """
        sampler, state = self.walk.sampler, visited.state
        assert sampler is not None and state is not None
        recorded = [self.recording.load(item.index, ["states"])["states"] for item in items]
        first, target = (
            torch.stack([states[step] for states in recorded]).to(state.device).float()
            for step in (0, end)
        )
        noise = (sampler.start[end] - sampler.start[anchor]) / sampler.start[0]
        wanted = target - state.float() - float(noise) * first
        outputs = {a: self._guided(visited.at(a), a) for a in self.walk.rows.anchors if a <= anchor}
        settled = self._settled(visited, outputs, anchor, end)
        wanted = wanted.reshape(settled.shape) - settled  # Z-Image adds an axis of one frame
        response = float(sampler.response[end, anchor + 1 : end].sum())
        layout = next(iter(visited.layouts.values()))
        known = torch.stack([outputs[a] for a in self.known(anchor)])  # (anchors, branches, B, ...)
        return Part(
            torch.cat([self._hidden(visited, a) for a in self.recent(anchor)], -1),
            layout.pick(known.flatten(0, 2)).unflatten(0, (-1, len(items))),
            layout.pick(wanted / response),
            layout.pick(known[-1].sum(0)),
            tuple(self.folds[item.index] for item in items),
        )

    def _settled(
        self, visited: Visited, outputs: dict[int, Tensor], anchor: int, end: int
    ) -> Float[Tensor, " B *shape"]:
        """What the outputs and forecasts up to the anchor still add on the way to the next one."""
        sampler, predictor = self.walk.sampler, self.walk.predictor
        assert sampler is not None and predictor is not None
        change = sampler.response[end] - sampler.response[anchor]  # (S,), per output of a step
        rows = predictor.weight.to("cpu", torch.float64, copy=True)
        anchors = list(outputs)
        rows[:, anchors] = torch.eye(rows.shape[-1], dtype=rows.dtype)[anchors]
        total = torch.zeros_like(next(iter(outputs.values()))[0])
        for a, guided in outputs.items():
            weights = rows[:, : anchor + 1, a] @ change[: anchor + 1]  # (branches,)
            total += torch.einsum("b,b...->...", weights.to(guided), guided)
        for a, following in self.segments:
            share = float(change[a + 1 : following].sum())
            if a < anchor and share:
                total += share * self._guided(visited.read_at(a), a).sum(0)
        return total

    def _hidden(self, visited: Visited, anchor: int) -> Float[Tensor, "B M D"]:
        """sum_b g_b norm(H_b) at an anchor."""
        hidden = {key: kept[anchor] for key, kept in visited.hidden.items() if anchor in kept}
        return self._guided(normalised(visited.by_branch(hidden)), anchor).sum(0)

    def _guided(
        self, tensor: Float[Tensor, "branches B *shape"], step: int
    ) -> Float[Tensor, "branches B *shape"]:
        """A tensor's branches times their guidance weights, in float32."""
        wide = tensor.float()
        return torch.einsum("b,b...->b...", self.guidance(step).to(wide), wide)


def sizes_of(rows: L2P, visited: Visited, rank: int, neighbours: bool, past: int) -> dict[str, Any]:
    """Arguments of a `Readout` for the host that computed a batch.

    Args:
        rows: of the fit's steps and anchors.
        visited: the batch.
        rank: directions to read at most.
        neighbours: whether neighbours are read where the host tells the tokens' grid.
        past: earlier anchors to read too.
    """
    layout, kept = next(iter(visited.layouts.values())), next(iter(visited.hidden.values()))
    hidden = kept[max(kept)]
    if neighbours and layout.grid is None:
        print(
            "Nothing tells on which grid the tokens of this host lie, so each token is read alone, "
            "without its neighbours."
        )
    return {
        "num_steps": rows.num_steps,
        "anchors": list(rows.anchors),
        "num_branches": rows.num_branches,
        "expert_steps": list(rows.expert_steps),
        "width": hidden.shape[-1],
        "patch": layout.elements.shape[1],
        "rank": min(rank, hidden.shape[-1]),
        "neighbours": neighbours and layout.grid is not None,
        "past": past,
    }


def check_header(header: Header, recording: str) -> None:
    """Raise unless a readout can be fitted on a recording.

    Args:
        header: of the recording.
        recording: its folder, for the message.

    Raises:
        ValueError: it has no states, or its guidance ends in mid-run.
    """
    if not header.states:
        raise ValueError(f"{recording} holds no states; record it again with states: true.")
    check_branches(header, recording)


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
