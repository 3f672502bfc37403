"""The rows and the readout of one segment, in closed form from a few sweeps over its trajectories.

Forecasts of a segment are alike up to their rows, so what they should be is one tensor: `wanted`,
the forecast that would land the next state on the recorded one. Rows explain what they can of it,
then a reduced-rank regression finds which r directions of the hidden state tell most of the rest,
of the token itself and of its neighbours, and last rows and readout are solved for together.
Everything a segment's rows and readout need is quadratic in the data, so batches and processes add
up, and strengths are compared on folds of trajectories without a second look at them.
Shapes: n trajectories of a part, M tokens, P elements of a token, D channels (in the sums: numbers
read for a token, and a constant), Q outputs known so far (one per branch and anchor), V = Q + 1
with the target, J folds, r directions read, k * k tokens of a neighbourhood.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import Grid
from foreseer.predictors.readout import STORED, neighbourhood
from foreseer.predictors.solve import ridge
from foreseer.training.readout.part import NUM_FOLDS, Part, Parts

INFINITE = float("inf")
STRENGTHS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
"""Ridge strengths of a readout, relative to the diagonal of its normal matrix."""


@dataclass
class SegmentSums:
    """Weighted inner products of one segment, fold by fold, in float64.

    z is what is read for a token, the constant's share last, and u its elements of the known
    outputs and, last, of the target: what the formula's forecast lacks.

    Args:
        normal: sum w z z^T.
        cross: sum w z u^T, for every element of the token.
        inner: sum w u u^T over all tokens and elements.
        count: trajectories.
    """

    normal: Float[Tensor, "J D D"]
    cross: Float[Tensor, "J D V P"]
    inner: Float[Tensor, "J V V"]
    count: Float[Tensor, " J"]

    @classmethod
    def empty(
        cls, width: int, num_outputs: int, patch: int, device: torch.device | str = "cpu"
    ) -> "SegmentSums":
        """Of no trajectory.

        Args:
            width: D.
            num_outputs: Q.
            patch: P.
            device: where to add up.
        """
        known = num_outputs + 1
        shapes = (width, width), (width, known, patch), (known, known), ()
        zeros = [torch.zeros(NUM_FOLDS, *s, dtype=torch.float64, device=device) for s in shapes]
        return cls(*zeros)

    def add(
        self,
        fold: int,
        hidden: Float[Tensor, "M D"],
        outputs: Float[Tensor, "V M P"],
        weight: float,
    ) -> None:
        """Add one trajectory.

        Args:
            fold: in [0, J).
            hidden: z of its tokens.
            outputs: u of its tokens.
            weight: w, so that each trajectory counts by its relative error.
        """
        side_by_side = outputs.transpose(0, 1).flatten(1)  # (M, V * P)
        flat = outputs.flatten(1)
        self.normal[fold] += weight * (hidden.T @ hidden)
        self.cross[fold] += weight * (hidden.T @ side_by_side).view_as(self.cross[fold])
        self.inner[fold] += weight * (flat @ flat.T)
        self.count[fold] += 1

    @property
    def tensors(self) -> list[Tensor]:
        """The sums, which add up over processes."""
        return [self.normal, self.cross, self.inner, self.count]


@dataclass(frozen=True)
class Solved:
    """What a segment's sums say.

    Args:
        delta: movement of the rows from their start.
        readout: R transposed, the row of the constant last; zeros where nothing is read.
        strength: ridge strength of the readout; infinite where nothing is read.
        rows_error: error that the rows alone leave on folds left out, weights included.
        readout_error: what both leave there.
        total: the sums that were solved.
    """

    delta: Float[Tensor, " Q"]
    readout: Float[Tensor, "D P"]
    strength: float
    rows_error: float
    readout_error: float
    total: "Total"


def solve(sums: SegmentSums, rows_strength: float, known: "Total | None" = None) -> Solved:
    """Rows by ridge toward the start and the readout by ridge toward zero, together.

    min sum w || y - u^T delta - R z ||^2 + rows_strength || delta ||^2 + strength || R ||^2, both
    relative to the diagonals. The strength is the one with the least error on the folds left out;
    where none is below that of the rows alone, nothing is read.

    Args:
        sums: of the segment.
        rows_strength: ridge of the rows.
        known: sums of other trajectories, which are solved for too and choose nothing.
    """
    folds = [fold for fold in range(NUM_FOLDS) if sums.count[fold] > 0]
    errors = {strength: 0.0 for strength in (INFINITE, *STRENGTHS)}
    for fold in folds:
        rest = Total.of(sums, [other for other in folds if other != fold], known)
        judge = Total.of(sums, [fold])
        for strength in errors:
            errors[strength] += judge.error(*rest.solve(rows_strength, strength)) / len(folds)
    best = min(errors, key=errors.__getitem__)
    total = Total.of(sums, folds, known)
    delta, readout = total.solve(rows_strength, best)
    return Solved(delta, readout, best, errors[INFINITE], errors[best], total)


@dataclass(frozen=True)
class Total:
    """The sums of some folds; see `SegmentSums`."""

    normal: Float[Tensor, "D D"]
    cross: Float[Tensor, "D V P"]
    inner: Float[Tensor, "V V"]

    @classmethod
    def of(cls, sums: SegmentSums, folds: list[int], known: "Total | None" = None) -> "Total":
        """Of these folds, and of what is known beside them."""
        found = [tensor[folds].sum(0) for tensor in (sums.normal, sums.cross, sums.inner)]
        if known is not None:
            pairs = zip(found, (known.normal, known.cross, known.inner), strict=True)
            found = [mine + other.to(mine) for mine, other in pairs]
        return cls(*found)

    def solve(
        self, rows_strength: float, strength: float
    ) -> tuple[Float[Tensor, " Q"], Float[Tensor, "D P"]]:
        """The minimum over rows and readout together.

        With S = (N + strength diag N)^-1 C the best R for any rows is linear in them, which leaves
        a quadratic of the rows alone.
        """
        pulled = torch.zeros_like(self.cross)
        left = self.inner
        if strength < INFINITE:
            pulled = ridge(self.normal, self.cross.flatten(1), strength).view_as(self.cross)
            left = left - torch.einsum("dvp,dwp->vw", self.cross, pulled)
        known, right = (left + left.T)[:-1, :-1] / 2, left[:-1, -1:]
        delta = ridge(known, right, rows_strength, units=self.inner.diagonal()[:-1])[:, 0]
        return delta, pulled[:, -1] - torch.einsum("dqp,q->dp", pulled[:, :-1], delta)

    def error(self, delta: Float[Tensor, " Q"], readout: Float[Tensor, "D P"]) -> float:
        """Sum w || y - u^T delta - R z ||^2."""
        c = torch.cat([-delta, torch.ones_like(delta[:1])])
        rows = c @ self.inner @ c
        both = torch.einsum("dvp,v,dp->", self.cross, c, readout)
        return float(rows - 2 * both + (readout * (self.normal @ readout)).sum())


def add_up(tensors: list[Tensor]) -> None:
    """Add tensors up over all processes, in place; nothing happens where there is one."""
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


ROWS_RIDGE = 1e-3  # of the rows toward their formula, relative to the diagonal
DIRECTIONS_RIDGE = 3e-2  # of the regression that chooses what is read
FLOOR = 1e-3  # of what is wanted, squared: an error near 0 must not rule a fit


@dataclass(frozen=True)
class Segment:
    """What was found for a segment, and what it takes to go on with it.

    Args:
        start: weights of the outputs in the formula that the rows started at.
        delta: movement of the rows from it.
        inner: V, in the dtype it is stored in.
        outer: U, zeros where nothing is read; of every token group where they have their own.
        constant: c, likewise.
        sums: what was solved.
    """

    start: Float[Tensor, " Q"]
    delta: Float[Tensor, " Q"]
    inner: Float[Tensor, "r D"]
    outer: Float[Tensor, "*G P r k k"]
    constant: Float[Tensor, "*G P"]
    sums: Total

    @property
    def matrix(self) -> Float[Tensor, "D P"]:
        """R transposed, see `Solved`."""
        outer = self.outer.movedim((-2, -1, -3, -4), (-4, -3, -2, -1)).flatten(-4, -2)
        both = torch.cat([outer, self.constant.to(outer)[..., None, :]], -2)
        return both.flatten(0, -2)


@dataclass(frozen=True)
class SegmentFit:
    """A segment, and how it came about.

    Args:
        segment: what was found.
        origin: name of the formula that the rows started at, or of what was extended.
        strength: ridge strength of U; infinite where nothing is read.
        gain_db: by how much the readout lowers the error on left-out prompts.
    """

    segment: Segment
    origin: str
    strength: float
    gain_db: float


@torch.no_grad()
def fit_segment(
    parts: Parts,
    formulas: Mapping[str, Float[Tensor, " Q"]],
    rank: int,
    grid: Grid | None,
    total: Callable[[list[Tensor]], None],
    guided: float,
) -> SegmentFit:
    """Choose the formula, the directions and their strength, and solve.

    Args:
        parts: yields this process's trajectories anew at every call.
        formulas: weights of the outputs in a forecast of the segment, by name of the formula.
        rank: r at most.
        grid: of the tokens, to read neighbours; None reads each token alone.
        total: adds sums up over all processes, in place.
        guided: sum of the guidance weights, which multiplies the constant.
    """
    name, weights = _rows(parts, formulas, total)
    inner = _directions(parts, weights, rank, grid, total)
    sums = _readout_sums(parts, formulas[name], weights, inner, grid, guided)
    total(sums.tensors)
    found = solve(sums, ROWS_RIDGE)
    return _as_fit(found, formulas[name].to(found.delta), inner, grid, found.rows_error, name)


@torch.no_grad()
def extend_segment(
    parts: Parts,
    fitted: Segment,
    grid: Grid | None,
    total: Callable[[list[Tensor]], None],
    guided: float,
) -> SegmentFit:
    """Solve a segment again, with more trajectories; what it starts at and reads stays.

    Args:
        parts: yields this process's new trajectories anew at every call.
        fitted: the segment so far.
        grid: of the tokens, as it was fitted.
        total: adds sums up over all processes, in place.
        guided: sum of the guidance weights.

    Returns:
        The fit, whose `gain_db` is that over the segment so far, on left-out prompts of the new
        trajectories.
    """
    weights = fitted.start + fitted.delta
    sums = _readout_sums(parts, fitted.start, weights, fitted.inner, grid, guided)
    total(sums.tensors)
    folds = [fold for fold, count in enumerate(sums.count) if count > 0]
    before = fitted.matrix.to(sums.normal)
    delta = fitted.delta.to(sums.normal)
    error = sum(Total.of(sums, [fold]).error(delta, before) for fold in folds) / len(folds)
    found = solve(sums, ROWS_RIDGE, fitted.sums)
    return _as_fit(found, fitted.start, fitted.inner, grid, error, "the predictor")


@torch.no_grad()
def left_by(
    segment: Segment, parts: Iterable[Part], grid: Grid | None, guided: float
) -> Float[Tensor, " n"]:
    """Mean squared error that a segment leaves of what is wanted, of every trajectory.

    Args:
        segment: the segment.
        parts: the trajectories.
        grid: of the tokens, as it was fitted.
        guided: sum of the guidance weights.
    """
    weights, errors = segment.start + segment.delta, []
    for part in parts:
        read = _read(part, segment.inner, grid, guided)
        told = read @ segment.matrix.to(read)
        errors.append((_left(part, weights) - told).square().mean((1, 2)))
    return torch.cat(errors)


def _as_fit(
    found: Solved,
    start: Float[Tensor, " Q"],
    inner: Float[Tensor, "r D"],
    grid: Grid | None,
    before: float,
    origin: str,
) -> SegmentFit:
    side = 1 if grid is None else 3
    each = found.readout.unflatten(0, (-1, side * side * len(inner) + 1))  # a row per group
    outer = each[:, :-1].unflatten(1, (side, side, len(inner))).permute(0, 4, 3, 1, 2)
    gain = 10 * torch.log10(torch.tensor(before / found.readout_error))
    outer, constant = outer.contiguous(), each[:, -1]
    if len(each) == 1:
        outer, constant = outer[0], constant[0]
    segment = Segment(start, found.delta, inner, outer, constant, found.total)
    return SegmentFit(segment, origin, found.strength, float(gain))


def _rows(
    parts: Parts,
    formulas: Mapping[str, Float[Tensor, " Q"]],
    total: Callable[[list[Tensor]], None],
) -> tuple[str, Float[Tensor, " Q"]]:
    """The formula with the least error, and the weights of the outputs by ridge toward it."""
    inner: Tensor | None = None
    for part in parts():
        size = (part.wanted - part.newest).square().mean((1, 2))
        weight = _weights(part, size).sqrt()[:, None, None]
        u = torch.cat([part.outputs, part.wanted[None]]) * weight
        u = u.flatten(1)
        product = (u @ u.T).double()
        inner = product if inner is None else inner + product
    assert inner is not None  # a fit has trajectories
    total([inner])
    last = torch.ones_like(inner[:1, 0])
    errors = {}
    for name, weights in formulas.items():
        c = torch.cat([-weights.to(inner), last])
        errors[name] = float(c @ inner @ c)
    best = min(errors, key=errors.__getitem__)
    start = formulas[best].to(inner)
    known, right = inner[:-1, :-1], inner[:-1, -1] - inner[:-1, :-1] @ start
    return best, start + ridge(known, right[:, None], ROWS_RIDGE)[:, 0]


def _directions(
    parts: Parts,
    weights: Float[Tensor, " Q"],
    rank: int,
    grid: Grid | None,
    total: Callable[[list[Tensor]], None],
) -> Float[Tensor, "r D"]:
    """The directions of the hidden state that tell most of what the rows leave.

    Reduced-rank regression (Izenman 1975): B = (N + ridge)^-1 C maps the hidden state to what the
    rows leave at the token and its neighbours; the leading eigenvectors Q of B^T N B span what is
    predicted best, so V = (B Q)^T, scaled to a root mean square of one.
    """
    normal: Tensor | None = None
    cross: Tensor | None = None
    for part in parts():
        left = _left(part, weights)
        weight = _weights(part, left.square().mean((1, 2))).sqrt()[:, None, None]
        near = left if grid is None else neighbourhood(left, grid)
        z, y = (part.hidden * weight).flatten(0, 1), (near * weight).flatten(0, 1)
        products = (z.T @ z).double(), (z.T @ y).double()
        normal = products[0] if normal is None else normal + products[0]
        cross = products[1] if cross is None else cross + products[1]
    assert normal is not None and cross is not None
    total([normal, cross])
    b = ridge(normal, cross, DIRECTIONS_RIDGE)
    vectors = torch.linalg.eigh(b.T @ normal @ b).eigenvectors
    v = b @ vectors[:, -min(rank, *b.shape) :]
    power = (v * (normal @ v)).sum(0)
    power = power.clamp_min(1e-6 * float(power.max()) + 1e-300)  # normalised channels sum to 0
    v = v * (normal.trace() / len(normal) / power).sqrt()  # hidden states have a mean square of one
    return v.T.float().to(STORED)


def _readout_sums(
    parts: Parts,
    start: Float[Tensor, " Q"],
    weights: Float[Tensor, " Q"],
    inner: Float[Tensor, "r D"],
    grid: Grid | None,
    guided: float,
) -> SegmentSums:
    """The normal equations of what is read and of the rows, from the formula on."""
    sums: SegmentSums | None = None
    for part in parts():
        near = _read(part, inner, grid, guided)
        size = _left(part, weights).square().mean((1, 2))
        missing = part.wanted - torch.einsum("q,qnmp->nmp", start.to(part.wanted), part.outputs)
        u = torch.cat([part.outputs, missing[None]])
        if sums is None:
            sizes = near.shape[-1], len(part.outputs), part.wanted.shape[-1]
            sums = SegmentSums.empty(*sizes, near.device)
        for number, (fold, weight) in enumerate(zip(part.folds, _weights(part, size), strict=True)):
            sums.add(fold, near[number], u[:, number], float(weight))
    assert sums is not None
    return sums


def _read(
    part: Part, inner: Float[Tensor, "r D"], grid: Grid | None, guided: float
) -> Float[Tensor, "n M E"]:
    """What is read for every token, and the constant's share, by group where there are some."""
    read = part.hidden @ inner.to(part.hidden).T
    near = read if grid is None else neighbourhood(read, grid)
    return part.by_group(torch.cat([near, torch.full_like(near[..., :1], guided)], -1))


def _left(part: Part, weights: Float[Tensor, " Q"]) -> Float[Tensor, "n M P"]:
    """What the rows leave of what is wanted."""
    return part.wanted - torch.einsum("q,qnmp->nmp", weights.to(part.wanted), part.outputs)


def _weights(part: Part, size: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """One over each trajectory's squared error, so that each counts by its decibels."""
    return (size + FLOOR * part.wanted.square().mean((1, 2))).reciprocal()
