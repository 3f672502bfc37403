"""What a benchmark shows of single runs: some samples, the error after each step, and weights.

Shapes: B samples, S sampling steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from foreseer.evaluation.advice import best_rows
from foreseer.evaluation.plan import Entry
from foreseer.evaluation.results import BenchRow
from foreseer.evaluation.runs import Samples, as_pictures, run_entry, run_plain
from foreseer.evaluation.solvers import SOLVERS, sampling_with, solver_scheduler
from foreseer.integration.host.clock import Clock
from foreseer.predictors.rules import RUN
from foreseer.trajectories.prompts import Item

SHEET_METHODS = (*SOLVERS, *RUN)
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Sheet:
    """Single runs of the main methods.

    Args:
        images: label to samples in [0, 1], the full run's first.
        step_errors: method to (step, ||x - x(full)|| / ||x(full)||) of the state after the step.
        weights: caption to the rows of a linear predictor's branch, and its anchors.
    """

    images: dict[str, Tensor]
    step_errors: dict[str, Curve]
    weights: dict[str, tuple[Tensor, tuple[int, ...]]]


def sheet(
    pipe: Any,
    ran: Sequence[tuple[Entry, BenchRow]],
    sigmas: Sequence[float],
    batches: Sequence[Sequence[Item]],
    settings: dict[str, Any],
) -> Sheet:
    """Run the full run and the main methods again on some items, at 8 evaluations or the middle.

    Args:
        pipe: the pipeline.
        ran: every entry with its row, the full run among them.
        sigmas: flow time of every step of the full run.
        batches: what to draw.
        settings: keyword arguments of every call.
    """
    budgets = sorted({len(entry.anchors) for entry, _ in ran if entry.kind != "full"})
    full = next(entry for entry, _ in ran if entry.kind == "full")
    reference, states = traced(pipe, full, sigmas, batches, settings)
    images = {"full run": as_pictures(pipe, reference, reference).images}
    if not budgets:
        return Sheet(images, {}, {})
    budget = 8 if 8 in budgets else budgets[len(budgets) // 2]
    errors: dict[str, Curve] = {}
    entry_of = {id(row): entry for entry, row in ran}
    chosen: list[Entry] = []
    best = best_rows([row for _, row in ran if row.num_anchors == budget], "method")
    for row in tqdm(best, desc="sheet", unit="method", delay=2, leave=False):
        if row.kind == "learned" or row.method in SHEET_METHODS:
            entry = entry_of[id(row)]
            chosen.append(entry)
            drawn, found = traced(pipe, entry, sigmas, batches, settings)
            drawn = as_pictures(pipe, drawn, reference)
            images[f"{row.method}\n{budget} evaluations"] = drawn.images
            errors[row.method] = [(step, relative(x, states[step])) for step, x in found.items()]
    return Sheet(images, errors, weights_of(chosen, sigmas))


def traced(
    pipe: Any,
    entry: Entry,
    sigmas: Sequence[float],
    batches: Sequence[Sequence[Item]],
    settings: dict[str, Any],
) -> tuple[Samples, dict[int, Tensor]]:
    """What a run came to, and the sampler's state after each step of the full run's grid.

    A few-step solver goes from anchor to anchor, so it has states before its anchors and at the
    end alone.

    Args:
        pipe: the pipeline.
        entry: what to run.
        sigmas: flow time of every step of the full run.
        batches: what to draw.
        settings: keyword arguments of every call.
    """
    parts = [_traced(pipe, entry, sigmas, batch, settings) for batch in batches]
    states = {step: torch.cat([found[step] for _, found in parts]) for step in parts[0][1]}
    images = torch.cat([samples.images for samples, _ in parts])
    latents = torch.cat([samples.latents for samples, _ in parts])
    return replace(parts[0][0], images=images, latents=latents), states


def _traced(
    pipe: Any,
    entry: Entry,
    sigmas: Sequence[float],
    items: Sequence[Item],
    settings: dict[str, Any],
) -> tuple[Samples, dict[int, Tensor]]:
    states: list[Tensor] = []

    def keep(index: int, v: Tensor, before: Tensor, after: Tensor) -> None:
        states.append(after.detach().float().cpu())

    def run(clocked: Any, plain: bool, **changes: Any) -> Samples:
        clock = Clock(clocked.scheduler, lambda _: None, keep)
        try:
            told = settings | changes
            if plain:
                return run_plain(clocked, [items], lambda _: None, **told)
            return run_entry(clocked, entry, sigmas, [items], lambda _: None, **told)
        finally:
            clock.detach()

    if entry.kind != "solver":
        return run(pipe, plain=False), dict(enumerate(states))
    scheduler = solver_scheduler(entry.method, [sigmas[anchor] for anchor in entry.anchors])
    with sampling_with(pipe, scheduler):
        samples = run(pipe, plain=True, num_inference_steps=len(entry.anchors))
    ends = [*(anchor - 1 for anchor in entry.anchors[1:]), len(sigmas) - 1]
    return samples, dict(zip(ends, states, strict=True))


def relative(found: Tensor, full: Tensor) -> float:
    """||found - full|| / ||full||, mean over samples."""
    gap = (found - full).flatten(1).norm(dim=1)
    return float((gap / full.flatten(1).norm(dim=1)).mean())


def weights_of(
    entries: Sequence[Entry], sigmas: Sequence[float]
) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """The rows of every learned predictor that has some, a map per branch, and the best formula's.

    Args:
        entries: best first.
        sigmas: flow time of every step.
    """
    found: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    formulas = [entry for entry in entries if entry.kind == "formula"]
    learned = [entry for entry in entries if entry.kind == "learned"]
    for entry in [*learned, *formulas[:1]]:
        anchors = entry.anchors
        rows = entry.predictor.rows(anchors, sigmas) if entry.predictor else None
        if rows is None or rows.shape[1] > 1 or len(anchors) == len(sigmas):
            continue
        for branch, matrix in enumerate(rows[:, 0]):
            name = f", branch {branch}" if len(rows) > 1 else ""
            found[f"{entry.method}, {entry.tap}{name}"] = (matrix, anchors)
    return found
