"""Joint refinement of all rows on the final error, by Gauss-Newton through the sampler.

Rows move in few directions: within a segment every forecast step's row moves by the same amount,
or in proportion to its distance from the anchor.
The effect of each direction on the final latents is a finite difference; the anchors before its
segment are replayed from memory, so it costs only the network evaluations after it, no gradients.

Shapes: n trajectories, P directions, S sampling steps, M elements of a latent.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from foreseer.integration.histories import Kept
from foreseer.integration.observers import Source, StepRecord
from foreseer.integration.policy import Anchors
from foreseer.integration.session import Session
from foreseer.predictors.base import Step
from foreseer.predictors.solve import ridge
from foreseer.predictors.weighted import combine
from foreseer.training.tracking import whitening
from foreseer.trajectories.prompts import Item, generate_batch

UNIT = 0.01  # a coordinate of one moves the state, or the feature, by this share of its RMS
DIFFERENCE = 0.25  # finite-difference step in coordinates
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Direction:
    """One way the rows may move.

    Args:
        segment: number of the segment whose forecast steps move.
        rows: the movement, `(branches, S, S)`, for one unit of the coordinate.
    """

    segment: int
    rows: Float[Tensor, "branches S S"]


@dataclass(frozen=True)
class Quadratics:
    """Each trajectory's final squared error as a quadratic of the coordinates z.

    q_i(z) = constant_i + 2 linear_i . z + z^T curvature_i z, from the linearised sampler.
    """

    constant: Float[Tensor, " n"]
    linear: Float[Tensor, "n P"]
    curvature: Float[Tensor, "n P P"]

    def at(self, z: Float[Tensor, " P"]) -> Float[Tensor, " n"]:
        """q_i(z), at least 2 % of q_i(0): the linearisation promises no more."""
        bent = torch.einsum("p,npq,q->n", z, self.curvature, z)
        return torch.maximum(self.constant + 2 * self.linear @ z + bent, 0.02 * self.constant)

    def solve(self, strength: float, num_rounds: int = 30) -> Float[Tensor, " P"]:
        """The z that minimises sum_i log q_i(z) with a relative ridge, by reweighted least squares.

        log q is concave in q, so weights 1 / q_i at the last z give a majorant to minimise.
        """
        z = torch.zeros(self.linear.shape[1], dtype=torch.float64)
        for _ in range(num_rounds):
            weights = self.at(z).reciprocal()
            normal = torch.einsum("n,npq->pq", weights, self.curvature)
            right, unit = -(weights @ self.linear)[:, None], normal.diagonal().mean()
            z = ridge(normal, right, strength, units=unit.expand(len(z)))[:, 0]
        return z

    def along(self, moves: Float[Tensor, "P Q"]) -> "Quadratics":
        """The same as quadratics of other coordinates y, where z = moves y."""
        return Quadratics(self.constant, self.linear @ moves, moves.mT @ self.curvature @ moves)

    @staticmethod
    def of(error: Float[Tensor, "n M"], jacobian: Float[Tensor, "n M P"]) -> "Quadratics":
        """Mean squares of error + jacobian z."""
        size = error.shape[1]
        return Quadratics(
            error.square().mean(1),
            torch.einsum("nm,nmp->np", error, jacobian) / size,
            torch.einsum("nmp,nmq->npq", jacobian, jacobian) / size,
        )

    @staticmethod
    def join(parts: Sequence["Quadratics"]) -> "Quadratics":
        """The quadratics of several batches as one."""
        return Quadratics(
            torch.cat([part.constant for part in parts]),
            torch.cat([part.linear for part in parts]),
            torch.cat([part.curvature for part in parts]),
        )


class Replayer(Source):
    """Forecast with given rows, the first anchors' features taken from an earlier run.

    Args:
        tap: tap that is forecast.
        anchors: steps at which the network runs.
    """

    schedule: Anchors

    def __init__(self, tap: str, anchors: Sequence[int]) -> None:
        self.tap = tap
        self.taps = frozenset({tap})
        self.anchors = list(anchors)
        self.rows = torch.empty(0)
        self.kept = Kept()  # of the run before
        self.features = Kept()
        self.schedule = Anchors(anchors)

    def replay(self, rows: Float[Tensor, "branches S S"], number: int) -> None:
        """What the next run does.

        Args:
            rows: rows to forecast with.
            number: first anchors that are put back.
        """
        self.rows, self.number = rows, number
        self.schedule.anchors = self.anchors[number:]

    def open(self, sigmas: list[float]) -> None:
        """Start a run from the replayed anchors alone."""
        self.features = self.kept.at_steps(self.anchors[: self.number])

    def on_step(self, record: StepRecord) -> None:
        """Use the features of anchors in this run."""
        for call in record.calls:
            if call.taps is not None:
                self.features.keep(call.step, call.taps[self.tap])

    def knows(self, step: Step, slot: Hashable = None) -> bool:
        """Whether an anchor of the call is there."""
        return bool(self.features.steps(step))

    def forecast(self, step: Step, slot: Hashable = None) -> Tensor:
        """A replayed anchor's feature, or the forecast of the rows."""
        if step.index in self.anchors:
            return self.features.at(step)
        past = [a for a in self.anchors if a < step.index]
        rows = self.rows[list(step.branches), step.index][:, past]
        return combine(rows.mT, [self.features.at(step, a) for a in past])


def directions(
    anchors: Sequence[int], bases: Sequence[Tensor], like: Tensor, ramps: bool = False
) -> list[Direction]:
    """One or two directions per column of each segment's basis, in units of `UNIT`.

    Args:
        anchors: steps at which the network runs.
        bases: per segment, columns over (branch, anchor so far), `(branches * (k + 1), r)`.
        like: rows whose shape the directions take, `(branches, S, S)`.
        ramps: beside moving all forecast steps of a segment alike, move them in proportion to their
            distance from the anchor. Under Euler this adds nothing on the `output` tap, where only
            the sum over a segment counts; on the `hidden` tap the head bends each step on its own.
    """
    ends = [*anchors[1:], like.shape[-1]]
    found = []
    for k, (anchor, end, basis) in enumerate(zip(anchors, ends, bases, strict=True)):
        num_forecasts = end - anchor - 1
        if not num_forecasts:
            continue
        known = list(anchors[: k + 1])
        shapes = [torch.ones(num_forecasts, dtype=like.dtype)]
        if ramps and num_forecasts > 1:
            distance = torch.arange(1, num_forecasts + 1, dtype=like.dtype)
            shapes.append(distance / distance.mean() - 1)  # no change of the segment's mean
        for column in basis.T:
            moved = UNIT * column.view(like.shape[0], 1, len(known))
            for shape in shapes:
                rows = torch.zeros_like(like)
                rows[:, anchor + 1 : end, known] = moved * shape[:, None]
                found.append(Direction(k, rows))
    return found


def feature_bases(
    grams: Float[Tensor, "n branches S S"], anchors: Sequence[int], cutoff: float = 1e-4
) -> list[Tensor]:
    """Per segment and branch, directions that each move the forecast feature by its own RMS."""
    mean = grams.double().mean(0)
    bases = []
    for k, anchor in enumerate(anchors):
        known = list(anchors[: k + 1])
        blocks = []
        for branch in mean:
            basis = whitening(branch[known][:, known], cutoff)
            blocks.append(basis * branch[anchor, anchor].sqrt())
        bases.append(torch.block_diag(*blocks))
    return bases


@torch.no_grad()
def linearise(
    pipe: Any,
    rows: Float[Tensor, "branches S S"],
    moves: Sequence[Direction],
    tap: str,
    anchors: Sequence[int],
    items: Sequence[Item],
    finals: Float[Tensor, " n *shape"],
    **settings: Any,
) -> Quadratics:
    """The quadratics of one batch around the given rows.

    Args:
        pipe: the pipeline.
        rows: rows to linearise at.
        moves: directions, in the order of the coordinates.
        tap: tap that is forecast.
        anchors: steps at which the network runs.
        items: the batch, one pipeline call.
        finals: its full run's final latents.
        settings: keyword arguments of the pipeline call.
    """
    replayer = Replayer(tap, anchors)
    session = Session(pipe, replayer, repeats=True)

    def run(moved: Tensor, num_replayed: int) -> Float[Tensor, "n M"]:
        replayer.replay(moved, num_replayed)
        latents = generate_batch(pipe, items, output_type="latent", **settings)[0]
        return latents.flatten(1).cpu().double()

    try:
        base = run(rows, 0)
        replayer.kept = replayer.features
        columns = [
            (run(rows + DIFFERENCE * move.rows, move.segment + 1) - base) / DIFFERENCE
            for move in tqdm(moves, desc="derivatives", unit="run", delay=2, leave=False)
        ]
    finally:
        session.detach()
    jacobian = torch.stack(columns, dim=-1)  # (n, M, P)
    return Quadratics.of(base - finals.flatten(1).double(), jacobian)
