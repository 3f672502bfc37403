"""The walk of a readout fit: accelerated runs, taken from anchor to anchor over all trajectories.

A pipeline cannot be suspended, so a visit of an anchor is one more call of the unmodified pipeline:
what earlier visits computed is put back, the predictor forecasts between the anchors, and the call
is ended once the new anchor has run. What a batch of trajectories computed lies in a file between
two visits, so memory does not grow with their number.
Shapes: B batch, M tokens, D channels, P elements of a token.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from foreseer.integration.host.layout import Layout
from foreseer.integration.linear_sampler import SamplerMap, pristine, probe
from foreseer.integration.observers import CallRecord, Source, StepRecord
from foreseer.integration.policy import Anchors
from foreseer.predictors.base import History, Step
from foreseer.predictors.linear import L2P, expert_start
from foreseer.predictors.readout import Readout, normalised
from foreseer.training.tracking import check_guidance, guidance_weights
from foreseer.trajectories.prompts import Item, generate_batch


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
    """

    outputs: dict[Held, dict[int, Tensor]] = field(default_factory=dict)
    readings: dict[Held, dict[int, Tensor]] = field(default_factory=dict)
    hidden: dict[Held, dict[int, Tensor]] = field(default_factory=dict)
    layouts: dict[Held, Layout] = field(default_factory=dict)
    state: Tensor | None = None

    def by_branch(self, tensors: dict[Held, Tensor]) -> Float[Tensor, "branches B *shape"]:
        """Tensors of calls, taken apart by branch."""
        parts: dict[int, Tensor] = {}
        for (_, branches), tensor in tensors.items():
            parts.update(zip(branches, tensor.chunk(len(branches)), strict=True))
        return torch.stack([parts[branch] for branch in sorted(parts)])

    def at(self, anchor: int) -> Float[Tensor, "branches B *shape"]:
        """The outputs at an anchor, by branch."""
        return self.by_branch({k: o[anchor] for k, o in self.outputs.items() if anchor in o})

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
        found, calls = Visited(layouts=self.layouts), list(self.layouts)
        for name, tensor in load_file(path, str(device)).items():
            if name == "state":
                found.state = tensor
            else:
                kind, number, anchor = name.split("/")
                getattr(found, kind).setdefault(calls[int(number)], {})[int(anchor)] = tensor
        return found


KINDS = ("outputs", "readings", "hidden")


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
                self._keep(call, call.taps)
        if record.index in self.rows.anchors:
            self._measure(self.visited.at(record.index), record.v, record.index)
        if record.index == self.goal:
            self.visited.state = record.before.detach()
            raise Arrived

    def _keep(self, call: CallRecord, taps: dict[str, Tensor]) -> None:
        visited, index = self.visited, call.step.index
        held = call.step.expert, call.step.branches
        assert call.layout is not None  # it was asked for
        visited.layouts[held] = call.layout
        visited.outputs.setdefault(held, {})[index] = taps["output"]
        kept = visited.hidden.setdefault(held, {})
        kept[index] = call.layout.hidden(taps["hidden"])
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
        step = Step(anchor, 0.0, predictor.num_steps)
        read = predictor.read(kept[anchor], step, layout.grid, carried)
        assert read is not None  # the step is an anchor
        output = visited.outputs[key][anchor]
        visited.readings.setdefault(key, {})[anchor] = layout.place(read.values.to(output))

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
        if outputs[0].flatten(1).shape != v.flatten(1).shape:
            raise ValueError(
                f"the network's outputs have the shape {tuple(outputs.shape[1:])}, what the "
                f"sampler is given {tuple(v.shape)}; the fit needs one to combine the other."
            )
        found = guidance_weights(outputs.flatten(2), v.flatten(1))
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
