"""Joint refinement of a predictor's segments on the final error, by Gauss-Newton.

Rows move in few directions: within a segment every forecast step's row moves by the same amount,
or in proportion to its distance from the anchor. What a readout adds there grows as a whole.
The effect of each direction on the final latents is a finite difference; the anchors before its
segment are replayed from memory, so it costs only the network evaluations after it, no gradients.

Shapes: n trajectories, P directions, S sampling steps, M elements of a latent.
"""

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from foreseer.integration.forecaster import Forecaster
from foreseer.integration.histories import Histories
from foreseer.integration.observers import StepRecord
from foreseer.integration.policy import Anchors
from foreseer.integration.session import Session
from foreseer.predictors.base import History, Step
from foreseer.predictors.linear import L2P
from foreseer.predictors.readout import Readout
from foreseer.predictors.solve import known_anchors, ridge
from foreseer.training.tracking import whitening
from foreseer.trajectories.prompts import Item, generate_batch

UNIT = 0.01  # a coordinate of one moves the state, or the feature, by this share of its RMS
DIFFERENCE = 0.25  # finite-difference step in coordinates
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Direction:
    """One way the forecasts of a segment may move, for one unit of the coordinate.

    Args:
        segment: number of the segment.
        rows: the movement of the rows, `(branches, S, S)`.
        gain: by which share what is read in the segment grows.
    """

    segment: int
    rows: Float[Tensor, "branches S S"]
    gain: float = 0.0


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


class Replayed(Forecaster):
    """Forecast, with the first anchors put back as an earlier run left them.

    Args:
        predictor: the forecaster.
        tap: tap that is forecast.
    """

    schedule: Anchors

    def __init__(self, predictor: L2P, tap: str) -> None:
        schedule = Anchors(list(predictor.anchors))
        super().__init__(predictor, tap, predictor.anchors, schedule=schedule)
        self.left: list[Histories] = []  # at every anchor of the run that puts none back
        self.number = 0
        self.gain = 0.0

    def replay(self, number: int, gain: float = 0.0) -> None:
        """What the next run does.

        Args:
            number: first anchors that are put back; a run of 0 is the one that later ones repeat.
            gain: by which share what was read at the last of them grows.
        """
        self.number, self.gain = number, gain
        self.schedule.anchors = self.anchors[number:]
        if number == 0:
            self.left = []

    def on_step(self, record: StepRecord) -> None:
        """Keep what an anchor leaves, in the run that puts none back."""
        super().on_step(record)
        if self.number == 0 and record.index in self.anchors:
            self.left.append(self.histories.mapped(same))

    def knows(self, step: Step, slot: Hashable = None) -> bool:
        """Whether an anchor of the call is there."""
        return step.index in self.anchors[: self.number] or super().knows(step, slot)

    def forecast(self, step: Step, slot: Hashable = None) -> Tensor:
        """A replayed anchor's feature, or the forecast."""
        if step.index not in self.anchors:
            return super().forecast(step, slot)
        number = self.anchors.index(step.index)
        if all(history.steps[-1] < step.index for history in self.histories):  # the first call
            self.histories = self.left[number].mapped(same)
            for history in self.histories if number == self.number - 1 else ():
                if history.reading is not None:
                    history.reading = (1 + self.gain) * history.reading
        found = self.histories.at(step, slot)
        assert found is not None  # the earlier run made the same calls
        feature: Tensor = found[self.tap][0].features[-1]
        return feature


def same(history: History) -> History:
    """A history of the same tensors that grows by itself."""
    return history.map(lambda tensor: tensor)


def moved(predictor: L2P, moves: Sequence[Direction], z: Float[Tensor, " P"]) -> L2P:
    """A copy of a predictor, moved by z."""
    found = copy.deepcopy(predictor)
    gains: dict[int, float] = {}
    for share, move in zip(z.tolist(), moves, strict=True):
        found.weight += share * move.rows.to(found.weight)
        gains[move.segment] = gains.get(move.segment, 0.0) + share * move.gain
    for segment, gain in gains.items():
        if gain:
            assert isinstance(found, Readout)  # other moves are of rows alone
            found.grow(segment, gain)
    return found


def directions(
    anchors: Sequence[int],
    bases: Sequence[Tensor],
    like: Tensor,
    ramps: bool = False,
    expert_steps: Sequence[int] = (0,),
) -> list[Direction]:
    """One or two directions per column of each segment's basis, in units of `UNIT`.

    Args:
        anchors: steps at which the network runs.
        bases: per segment, columns over (branch, anchor so far), `(branches * (k + 1), r)`.
        like: rows whose shape the directions take, `(branches, S, S)`.
        ramps: beside moving all forecast steps of a segment alike, move them in proportion to their
            distance from the anchor. Under Euler this adds nothing on the `output` tap, where only
            the sum over a segment counts; on the `hidden` tap the head bends each step on its own.
        expert_steps: first step of each transformer, starting with 0.
    """
    ends = [*anchors[1:], like.shape[-1]]
    found = []
    for k, (anchor, end, basis) in enumerate(zip(anchors, ends, bases, strict=True)):
        num_forecasts = end - anchor - 1
        if not num_forecasts:
            continue
        known = known_anchors(anchors, expert_steps, anchor)
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
    grams: Float[Tensor, "n branches S S"],
    anchors: Sequence[int],
    cutoff: float = 1e-4,
    expert_steps: Sequence[int] = (0,),
) -> list[Tensor]:
    """Per segment and branch, directions that each move the forecast feature by its own RMS."""
    mean = grams.double().mean(0)
    bases = []
    for anchor in anchors:
        known = known_anchors(anchors, expert_steps, anchor)
        blocks = []
        for branch in mean:
            basis = whitening(branch[known][:, known], cutoff)
            blocks.append(basis * branch[anchor, anchor].sqrt())
        bases.append(torch.block_diag(*blocks))
    return bases


@torch.no_grad()
def linearise(
    pipe: Any,
    predictor: L2P,
    moves: Sequence[Direction],
    tap: str,
    items: Sequence[Item],
    finals: Float[Tensor, " n *shape"],
    **settings: Any,
) -> Quadratics:
    """The quadratics of one batch around a predictor.

    Args:
        pipe: the pipeline.
        predictor: rows, or a readout, to linearise at; they are not changed.
        moves: directions, in the order of the coordinates.
        tap: tap that is forecast.
        items: the batch, one pipeline call.
        finals: its full run's final latents.
        settings: keyword arguments of the pipeline call.
    """
    trial = copy.deepcopy(predictor)
    source = Replayed(trial, tap)
    session = Session(pipe, source, repeats=True)

    def run(move: Direction | None = None) -> Float[Tensor, "n M"]:
        trial.weight.copy_(predictor.weight)
        if move is None:
            source.replay(0)
        else:
            trial.weight += DIFFERENCE * move.rows.to(trial.weight)
            source.replay(move.segment + 1, DIFFERENCE * move.gain)
        latents = generate_batch(pipe, items, output_type="latent", **settings)[0]
        return latents.flatten(1).cpu().double()

    try:
        base = run()
        bar = tqdm(moves, desc="derivatives", unit="run", delay=2, leave=False)
        columns = [(run(move) - base) / DIFFERENCE for move in bar]
    finally:
        session.detach()
    jacobian = torch.stack(columns, dim=-1)  # (n, M, P)
    return Quadratics.of(base - finals.flatten(1).double(), jacobian)
