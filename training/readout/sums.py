"""The normal equations of one segment of a readout fit, and their solution.

Everything a segment's rows and readout need is quadratic in the data, so batches and processes add
up, and strengths are compared on folds of trajectories without a second look at them.
Shapes: M tokens, P elements of a token, D numbers read for a token and a constant, Q outputs known
so far (one per branch and anchor), V = Q + 1 with the target, J folds.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.solve import ridge

NUM_FOLDS = 5
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
