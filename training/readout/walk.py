"""The walk of a readout fit, and what its segments are solved from.

A pipeline cannot be suspended, so a visit of an anchor is one more call of the unmodified pipeline:
what earlier visits computed is put back, the predictor forecasts between the anchors, and the call
is ended once the new anchor has run. What a batch of trajectories computed lies in a file between
two visits, so memory does not grow with their number.

The sampler is a linear map of the network's outputs, so the next state is a sum that the segment's
forecasts enter with one weight, and solving for the forecast that lands it is a subtraction.
Shapes: S sampling steps, B batch, M tokens, D channels, P elements of a token, Q outputs known so
far (one per branch and anchor).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from foreseer.errors import UnsupportedHost
from foreseer.evaluation.rows import formula_tables
from foreseer.integration.host.call import TIME_ROUNDING, retold
from foreseer.integration.host.layout import Layout
from foreseer.integration.linear_sampler import SamplerMap, pristine, probe
from foreseer.integration.observers import CallRecord, Source, StepRecord
from foreseer.integration.policy import Anchors
from foreseer.predictors.base import History, Step
from foreseer.predictors.ladder import with_end
from foreseer.predictors.linear import L2P
from foreseer.predictors.readout import Readout, normalised
from foreseer.predictors.solve import expert_start, known_anchors
from foreseer.training.readout.part import Part
from foreseer.training.tracking import check_branches, check_guidance, guidance_weights
from foreseer.trajectories.files.header import Header
from foreseer.trajectories.prompts import Item, generate_batch
from foreseer.trajectories.recording import Recording


class Arrived(Exception):
    """Ends a pipeline call once the wanted anchor has been evaluated."""


Held = tuple[int, tuple[int, ...]]
"""A call of a transformer: its number, and the guidance branches it holds."""


@dataclass
class Visited:
    """What one batch of trajectories has computed so far; tensors are per call of the transformer.

    Args:
        outputs: by call, then anchor.
        readings: what was read at an anchor, laid out like the output, likewise.
        hidden: hidden state of the picture's tokens at the newest anchors, like the outputs.
        layouts: of every call.
        state: latents at the newest anchor.
        groups: token groups of every call, where the fit goes by them.
    """

    outputs: dict[Held, dict[int, Tensor]] = field(default_factory=dict)
    readings: dict[Held, dict[int, Tensor]] = field(default_factory=dict)
    hidden: dict[Held, dict[int, Tensor]] = field(default_factory=dict)
    layouts: dict[Held, Layout] = field(default_factory=dict)
    state: Tensor | None = None
    groups: dict[Held, Tensor] = field(default_factory=dict)

    def by_branch(self, tensors: dict[Held, Tensor]) -> Float[Tensor, "branches B *shape"]:
        """Tensors of calls, taken apart by branch."""
        parts: dict[int, Tensor] = {}
        for (_, branches), tensor in tensors.items():
            parts.update(zip(branches, tensor.chunk(len(branches)), strict=True))
        return torch.stack([parts[branch] for branch in sorted(parts)])

    def at(self, anchor: int) -> Float[Tensor, "branches B *shape"]:
        """The outputs at an anchor, by branch."""
        return self.by_branch({k: o[anchor] for k, o in self.outputs.items() if anchor in o})

    def numbers(self, key: Held) -> Int[Tensor, "B M"] | None:
        """Token groups of the sample's tokens in a call, where the fit goes by them."""
        groups = self.groups.get(key)
        return None if groups is None else self.layouts[key].numbers(groups)

    def read_at(self, anchor: int) -> Float[Tensor, "branches B *shape"]:
        """What was read at an anchor, by branch."""
        return self.by_branch({k: r[anchor] for k, r in self.readings.items() if anchor in r})

    def save(self, path: Path) -> None:
        """Move the tensors into a file."""
        named = {
            f"{kind}/{number}/{anchor}": tensor.contiguous()
            for kind in KINDS
            for number, call in enumerate(self.layouts)
            for anchor, tensor in getattr(self, kind).get(call, {}).items()
        }
        if self.state is not None:
            named["state"] = self.state.contiguous()
        save_file(named, path)
        self.outputs, self.readings, self.hidden, self.state = {}, {}, {}, None

    def loaded(self, path: Path, device: torch.device | str) -> "Visited":
        """A copy with them."""
        found, calls = Visited(layouts=self.layouts, groups=self.groups), list(self.layouts)
        for name, tensor in load_file(path, str(device)).items():
            if name == "state":
                found.state = tensor
            else:
                kind, number, anchor = name.split("/")
                getattr(found, kind).setdefault(calls[int(number)], {})[int(anchor)] = tensor
        return found


KINDS = ("outputs", "readings", "hidden")


def check_times(scheduler: Any, sigmas: Sequence[float]) -> None:
    """Raise where timesteps keep no form of flow time, by which a network is told another.

    CogView4 shifts its sigmas and tells its network the times from before the shift.

    Args:
        scheduler: after `set_timesteps`.
        sigmas: flow time of the first steps.

    Raises:
        UnsupportedHost: a timestep is not what its flow time makes of the first.
    """
    timesteps = scheduler.timesteps[getattr(scheduler, "begin_index", None) or 0 :].double().cpu()
    rounding = 1e-3 * float(timesteps.abs().max())  # UniPC's are whole
    for sigma, time in zip(sigmas, timesteps.tolist(), strict=False):
        expected = float(retold(timesteps[:1], sigmas[0], sigma))
        if abs(expected - time) > TIME_ROUNDING * abs(time) + rounding:
            raise UnsupportedHost(
                f"the timestep at flow time {sigma:g} is {time:g}, expected {expected:g} after "
                f"{float(timesteps[0]):g} at {sigmas[0]:g}: timesteps are no form of sigma here."
            )


class Walk(Source):
    """Put back the anchors visited so far, forecast between them, evaluate one new anchor.

    Args:
        rows: of the steps and anchors of the fit.
        scheduler: the pipeline's.
        past: anchors before the newest whose hidden states are read with its own.

    Attributes:
        predictor: being fitted; its segments before the new anchor are. None until the sizes of
            the host are known, after the first visit.
        guidance: weights with which the pipeline combines the branches, by the first step of the
            transformer.
        first_time: flow time that the network is told at step 0; None for the step's own.
    """

    schedule: Anchors
    tap = "output"
    taps = frozenset({"output", "hidden"})
    wants_layout = True

    def __init__(self, rows: L2P, scheduler: Any, past: int = 0) -> None:
        self.rows = rows
        self.past = past
        self.predictor: Readout | None = None
        self.scheduler = scheduler
        self.visited = Visited()
        self.guidance: dict[int, Tensor] = {}
        self.sampler: SamplerMap | None = None
        self.first_time: float | None = None
        self.goal = 0
        self.schedule = Anchors([])  # anchors that were not visited yet

    def open(self, sigmas: list[float]) -> None:
        """Read the sampler's map off the first run.

        Raises:
            ValueError: the run has other steps than the recording.
        """
        if len(sigmas) != self.rows.num_steps:
            raise ValueError(
                f"the run has {len(sigmas)} steps, the recording {self.rows.num_steps}."
            )
        if self.sampler is None:
            self.sampler = probe(pristine(self.scheduler))

    def on_step(self, record: StepRecord) -> None:
        """Keep an anchor's outputs and hidden states; at the new one end the call.

        Raises:
            ValueError: the guidance is no fixed combination of the branches.
        """
        for call in record.calls:
            if call.taps is not None:
                self._keep(call, call.taps, record.before[0].numel())
        if record.index in self.rows.anchors:
            self._measure(self.visited.at(record.index), record.v, record.index)
        if record.index == self.goal:
            self.visited.state = record.before.detach()
            raise Arrived

    def _keep(self, call: CallRecord, taps: dict[str, Tensor], size: int) -> None:
        visited, index = self.visited, call.step.index
        held = call.step.expert, call.step.branches
        assert call.layout is not None  # it was asked for
        layout = visited.layouts[held] = call.layout.of_sample(size)
        if call.step.groups is not None:
            visited.groups[held] = call.step.groups
        visited.outputs.setdefault(held, {})[index] = taps["output"]
        kept = visited.hidden.setdefault(held, {})
        kept[index] = layout.hidden(taps["hidden"])
        for anchor in sorted(kept)[: -1 - self.past]:
            del kept[anchor]
        if index != self.goal and self.predictor is not None:
            self.read(self.predictor, held)

    def read(self, predictor: Readout, key: Held) -> None:
        """Read the newest hidden state of a call, whose segment is fitted."""
        visited, carried = self.visited, None
        kept, layout = visited.hidden[key], visited.layouts[key]
        *before, anchor = sorted(kept)
        for earlier in before:  # what is read there has been fitted since
            number = predictor.anchors.index(earlier)
            carried = predictor.carry(normalised(kept[earlier]), number, carried)
        step = Step(anchor, 0.0, predictor.num_steps, groups=visited.numbers(key))
        read = predictor.read(kept[anchor], step, layout.grid, carried)
        assert read is not None  # the step is an anchor
        output = visited.outputs[key][anchor]
        visited.readings.setdefault(key, {})[anchor] = layout.place(read.values.to(output))

    def told(self, step: Step) -> float | None:
        """The first time, at step 0."""
        return self.first_time if step.index == 0 else None

    def knows(self, step: Step, slot: Hashable = None) -> bool:
        """Whether an anchor of the call was visited."""
        return (step.expert, step.branches) in self.visited.outputs

    def forecast(self, step: Step, slot: Hashable = None) -> Tensor:
        """An output of an earlier visit, or the predictor's forecast."""
        held = step.expert, step.branches
        outputs = self.visited.outputs[held]
        if step.index in outputs:
            return outputs[step.index]
        past = sorted(anchor for anchor in outputs if anchor < step.index)
        features, reading = [outputs[a] for a in past], self.visited.readings[held][past[-1]]
        history = History(None, past, [0.0] * len(past), features, reading)
        assert self.predictor is not None  # there is a fitted segment
        forecast: Tensor = self.predictor(history, step)
        return forecast

    def _measure(self, outputs: Float[Tensor, "branches B *shape"], v: Tensor, index: int) -> None:
        size = v[0].numel()
        flat = outputs.flatten(2)
        if outputs.ndim == 4 and outputs.shape[2] > v.shape[1]:
            flat = flat[..., :size]  # a source picture's tokens follow
        if flat[0].shape != v.flatten(1).shape:
            raise ValueError(
                f"the network's outputs have the shape {tuple(outputs.shape[1:])}, what the "
                f"sampler is given {tuple(v.shape)}; the fit needs one to combine the other."
            )
        found = guidance_weights(flat, v.flatten(1))
        first = expert_start(self.rows.expert_steps, index)
        before = self.guidance.setdefault(first, found)
        check_guidance(before, found, index, outputs.dtype)

    def visit(self, pipe: Any, batch: Sequence[Item], anchor: int, settings: dict) -> None:
        """Take one batch to an anchor.

        Args:
            pipe: the pipeline.
            batch: the trajectories whose `visited` this is.
            anchor: an anchor whose earlier segments are fitted.
            settings: keyword arguments of the pipeline call.

        Raises:
            ValueError: the run ends before.
        """
        self.goal = anchor
        visited = {step for outputs in self.visited.outputs.values() for step in outputs}
        self.schedule.anchors = set(self.rows.anchors) - visited
        for key in self.visited.hidden:  # the newest segment was fitted since
            assert self.predictor is not None
            self.read(self.predictor, key)
        try:
            generate_batch(pipe, batch, output_type="latent", **settings)
        except Arrived:
            return
        raise ValueError(f"the run ended before step {anchor}; expected it among its steps.")


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

    @property
    def sigmas(self) -> Sequence[float]:
        """Flow time of every step."""
        return self.recording.header.sigmas

    @cached_property
    def tables(self) -> dict[str, Float[Tensor, "S S"]]:
        """The rows of every formula."""
        rows = self.walk.rows
        return formula_tables(rows.anchors, self.recording.header.sigmas, rows.expert_steps)

    def known(self, anchor: int) -> list[int]:
        """The anchors up to one, of its transformer."""
        return known_anchors(self.walk.rows.anchors, self.walk.rows.expert_steps, anchor)

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
        partition = self.walk.rows.partition
        times = branches * (1 if partition is None else partition.num_parts)
        return {name: each.repeat_interleave(times) for name, each in weights.items()}

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
        held, layout = next(iter(visited.layouts.items()))
        settled = layout.pick(self._settled(visited, outputs, anchor, end))
        missing = layout.pick(wanted) - settled
        response = float(sampler.response[end, anchor + 1 : end].sum())
        known = torch.stack([outputs[a] for a in self.known(anchor)])  # (anchors, branches, B, ...)
        part = Part(
            torch.cat([self._hidden(visited, a) for a in self.recent(anchor)], -1),
            layout.pick(known.flatten(0, 2)).unflatten(0, (-1, len(items))),
            missing / response,
            layout.pick(known[-1].sum(0)),
            tuple(self.folds[item.index] for item in items),
        )
        if self.walk.rows.partition is None:
            return part
        numbers = visited.numbers(held)
        assert numbers is not None  # the session was given them
        return part.grouped(numbers[: len(items)], self.walk.rows.partition.num_parts)

    def _settled(
        self, visited: Visited, outputs: dict[int, Tensor], anchor: int, end: int
    ) -> Float[Tensor, " B *shape"]:
        """What the outputs and forecasts up to the anchor still add on the way to the next one."""
        sampler, predictor = self.walk.sampler, self.walk.predictor
        assert sampler is not None and predictor is not None
        change = sampler.response[end] - sampler.response[anchor]  # (S,), per output of a step
        partition, anchors = predictor.partition, list(outputs)
        rows = predictor.weight.to("cpu", torch.float64, copy=True)
        rows = rows[:, None] if partition is None else rows  # (branches, P, S, S)
        rows[..., anchors, :] = torch.eye(rows.shape[-1], dtype=rows.dtype)[anchors]
        sums = [torch.zeros_like(next(iter(outputs.values()))[0]) for _ in rows[0]]
        for a, guided in outputs.items():
            weights = rows[..., : anchor + 1, a] @ change[: anchor + 1]  # (branches, P)
            for total, own in zip(sums, weights.unbind(1), strict=True):
                total += torch.einsum("b,b...->...", own.to(guided), guided)
        total = sums[0]
        if partition is not None:
            groups = next(iter(visited.groups.values()))[: len(total)]
            total = partition.at(groups).weigh(sums)
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
        **({} if rows.partition is None else {"partition": rows.partition.describe()}),
    }


def later_times(sigmas: Sequence[float], count: int) -> list[float]:
    """Flow times between the first step's and the second step's, in even steps.

    Args:
        sigmas: of the run's steps.
        count: how many.
    """
    first, last = with_end(sigmas)[:2]
    return [first + (last - first) * place / (count + 1) for place in range(1, count + 1)]


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
