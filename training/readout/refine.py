"""Refine the segments of a readout together, on the finished sample.

The walk of a fit lands every segment's end on the recorded state. Here all rows, and how much is
read in each segment, take one Gauss-Newton step on mean log squared error of the final latents
(gauss_newton.py). It is linearised on trajectories that the walk is not fitted on: on its own, what
it leaves is smaller and of another kind. Others choose the ridge, and none of them judges the fit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from foreseer.evaluation.measure import References
from foreseer.predictors.linear import L2P
from foreseer.predictors.readout import Readout
from foreseer.training.gauss_newton import (
    RIDGES,
    UNIT,
    Direction,
    Quadratics,
    directions,
    feature_bases,
    linearise,
    moved,
)
from foreseer.trajectories.gram import sum_grams
from foreseer.trajectories.recording import Recording

NUM_REFINED = 32
"""Trajectories that a refinement is linearised on at most."""
NUM_CHOOSING = 64
"""Trajectories that choose its ridge at most."""
SHARES = 8, 6
"""Of so many trajectories one is kept for either."""
GROWTH = 8 * UNIT
"""By which share what is read grows for a coordinate of one: it is a small part of a forecast."""


def apart(items: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Trajectories to walk with, to linearise a refinement on, and to choose its ridge on.

    Raises:
        ValueError: there are too few.
    """
    if len(items) < max(SHARES):
        raise ValueError(
            f"found {len(items)} trajectories to fit on, expected {max(SHARES)} at least: a "
            "refinement is linearised on an eighth of them. Record more, or set refine: 0."
        )
    refined = min(NUM_REFINED, len(items) // SHARES[0])
    choosing = min(NUM_CHOOSING, len(items) // SHARES[1])
    first, second = len(items) - refined - choosing, len(items) - choosing
    return list(items[:first]), list(items[first:second]), list(items[second:])


@dataclass(frozen=True)
class Refined:
    """A refined readout.

    Args:
        predictor: the readout; the one that was given where no step is better.
        gain_db: by how much its error on the choosing trajectories is lower.
        ridge: of the step; None where none is better.
    """

    predictor: L2P
    gain_db: float
    ridge: float | None


def refine(
    pipe: Any,
    predictor: Readout,
    moves: Sequence[Direction],
    references: References,
    error: Callable[[L2P], float],
    quiet: bool = False,
) -> Refined:
    """Take the Gauss-Newton step whose ridge does best, if any does better than none.

    Args:
        pipe: the pipeline, with nothing attached.
        predictor: the readout; it is not changed.
        moves: how it may move.
        references: trajectories to linearise on.
        error: in dB, of a predictor on other trajectories.
        quiet: show no bar.
    """
    finals = references.finals.split(references.batch_size)
    pairs = zip(references.batches, finals, strict=True)
    bar = tqdm(pairs, "refine", len(finals), unit="batch", disable=quiet, delay=2, leave=False)
    settings = references.settings
    parts = [linearise(pipe, predictor, moves, "output", *pair, **settings) for pair in bar]
    quadratics = Quadratics.join(parts)
    best = Refined(predictor, 0.0, None)
    before = error(predictor)
    for ridge in tqdm(RIDGES, "shrinkages", unit="run", disable=quiet, delay=2, leave=False):
        tried = moved(predictor, moves, quadratics.solve(ridge))
        gain = before - error(tried)
        if gain > best.gain_db:
            best = Refined(tried, gain, ridge)
    return best


def readout_moves(
    recording: Recording, predictor: Readout, items: Sequence[int]
) -> list[Direction]:
    """How rows and readout may move: each by a share of the features it weighs.

    Args:
        recording: of the host, with Grams.
        predictor: the readout.
        items: trajectories whose features say how large they are.
    """
    grams, experts = sum_grams(recording, ["gram/output"], items), predictor.expert_steps
    mean, anchors = grams["gram/output"][None] / len(items), predictor.anchors
    bases = feature_bases(mean, anchors, expert_steps=experts)
    rows = directions(anchors, bases, predictor.weight.cpu(), expert_steps=experts)
    read = [n for n, each in enumerate(predictor.outer) if bool(each.count_nonzero())]
    still = torch.zeros_like(predictor.weight.cpu())
    return [*rows, *(Direction(number, still, GROWTH) for number in read)]
