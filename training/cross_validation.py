"""Leave one trajectory out, from Grams: what a closed form is worth on what it was not fitted on.

The rows without a trajectory are solved from the sum minus its Gram, so no refit reads anything.
Shapes: n trajectories, P parts (1 of the whole feature), S sampling steps, K anchors, T steps of a
segment, R ridges.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.evaluation.verdict import Estimate, estimate, rivals_on
from foreseer.predictors.base import LinearPredictor
from foreseer.predictors.solve import closed_form, segments

RIDGES = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
MAX_LEFT_OUT = 32  # trajectories whose rows are solved for a verdict
STANDS_OUT = 4.0
"""Times the median left-out error, or the median norm, from which a trajectory is named."""


@dataclass(frozen=True)
class CrossValidation:
    """Errors of trajectories that were left out of the fit.

    Args:
        ridges: strengths tried.
        items: what to call each trajectory.
        errors: relative error, mean over branches and steps, anchors included with 0.
        norms: of each trajectory's features over all steps. One far larger than the others rules
            the sum, so that the others' errors rise to its own.
    """

    ridges: tuple[float, ...]
    items: tuple[str, ...]
    errors: Float[Tensor, "R n"]
    norms: Float[Tensor, " n"]

    @property
    def times_median(self) -> Float[Tensor, "2 n"]:
        """Error, at its best ridge, and norm of each trajectory over the median ones."""
        own = torch.stack([self.errors.amin(0), self.norms])
        return own / own.median(1, keepdim=True).values

    @property
    def standing_out(self) -> dict[str, str]:
        """What trajectories have `STANDS_OUT` times the median of, or more: damaged, or rare."""
        found = {}
        for item, error, norm in zip(self.items, *self.times_median.tolist(), strict=True):
            if not norm < STANDS_OUT:
                found[item] = f"features of {norm:.1f} times the median norm"
            elif not error < STANDS_OUT:
                found[item] = f"a left-out error of {error:.1f} times the median"
        return found

    @property
    def means(self) -> Float[Tensor, " R"]:
        """Mean error of every ridge over the trajectories that do not stand out."""
        return self.errors[:, (self.times_median < STANDS_OUT).all(0)].mean(1)

    @property
    def ridge(self) -> float:
        """The ridge with the least mean error."""
        return self.ridges[int(self.means.argmin())]

    def lines(self) -> list[str]:
        """The result in words: every ridge, the best, and what stands out."""
        pairs = zip(self.ridges, self.means.tolist(), strict=True)
        tried = ", ".join(f"{ridge:g}: {error:.5f}" for ridge, error in pairs)
        return [
            f"left-out error of {len(self.items)} trajectories by ridge: {tried}; least at "
            f"{self.ridge:g}",
            *(
                f"{item} stands out with {what}; look at it, and record without it if it is damaged"
                for item, what in self.standing_out.items()
            ),
        ]


def cross_validate(
    total: Float[Tensor, "branches P S S"],
    chunks: Iterable[tuple[Sequence[str], Float[Tensor, "n branches P S S"]]],
    anchors: Sequence[int],
    ridges: Sequence[float] = RIDGES,
    expert_steps: Sequence[int] = (0,),
    window: int | None = None,
) -> CrossValidation:
    """Leave every trajectory of the chunks out of `total`, one by one.

    Args:
        total: summed Grams of these trajectories and any others, at least two in all.
        chunks: names and Grams of some trajectories at a time; one chunk is held.
        anchors: steps at which the network runs, starting with 0.
        ridges: strengths to try, relative to each feature's squared norm, >= 0.
        expert_steps: first step of each transformer.
        window: newest anchors to use; None uses all.

    Raises:
        ValueError: no trajectory, or a ridge that is negative.
    """
    names: list[str] = []
    errors, norms = [], []
    if not ridges or min(ridges) < 0:
        raise ValueError(f"the ridges are {list(ridges)}, expected some, all >= 0.")
    for labels, grams in chunks:
        names += labels
        errors.append(left_out_errors(total, grams, anchors, ridges, expert_steps, window))
        norms.append(grams.diagonal(dim1=-2, dim2=-1).flatten(1).sum(1).sqrt())
    if not names:
        raise ValueError("found no trajectories to leave out, expected at least one; record some.")
    found = torch.cat(errors, 1)
    if not found.isfinite().any():
        raise ValueError(
            f"nothing is left of the sum without any one of {len(names)} trajectories, expected at "
            "least two in all; record more."
        )
    return CrossValidation(tuple(ridges), tuple(names), found, torch.cat(norms))


def left_out_errors(
    total: Float[Tensor, "branches P S S"],
    grams: Float[Tensor, "n branches P S S"],
    anchors: Sequence[int],
    ridges: Sequence[float],
    expert_steps: Sequence[int] = (0,),
    window: int | None = None,
) -> Float[Tensor, "R n"]:
    """`open_loop_errors` of each trajectory, by rows solved from all others, for every ridge.

    All steps between two anchors share (G_hh + ridge diag G_hh), which one eigendecomposition
    solves for every ridge. A trajectory without which nothing is left has the error inf.

    Args:
        total: summed Grams, these included.
        grams: the trajectories to leave out.
        anchors: steps at which the network runs.
        ridges: strengths to try.
        expert_steps: first step of each transformer.
        window: newest anchors to use; None uses all.
    """
    norms = grams.diagonal(dim1=-2, dim2=-1).sum(2)  # (n, branches, S)
    errors = torch.zeros(len(ridges), *norms.shape, dtype=torch.float64)
    rest = total - grams
    for history, steps in segments(anchors, total.shape[-1], expert_steps, window):
        weights = closed_form(rest, history, steps, ridges)  # (R, n, branches, P, K, T)
        cross, bent = (
            grams[..., history, :][..., steps],
            grams[..., history, :][..., history] @ weights,
        )
        squared = grams.diagonal(dim1=-2, dim2=-1)[..., steps]
        squared = squared + (weights * (bent - 2 * cross)).sum(-2)
        errors[..., steps] = (squared.clamp_min(0).sum(-2) / norms[..., steps]).sqrt()
    nothing_left = rest.diagonal(dim1=-2, dim2=-1).flatten(1).sum(1) <= 0
    means = errors.mean((2, 3)).masked_fill(nothing_left, torch.inf)
    return torch.nan_to_num(means, torch.inf, torch.inf)


def leave_one_out(
    old: LinearPredictor,
    total: Float[Tensor, "branches P S S"],
    count: int,
    ridge: float,
    chunks: Iterator[tuple[list[str], Float[Tensor, "n branches P S S"]]],
    prompts: Sequence[int],
) -> Estimate:
    """The estimate of the first `MAX_LEFT_OUT` trajectories, with rows solved without each of them.

    Args:
        old: determined by Grams (`from_grams`), with `spec`.
        total: summed Grams, of the trajectories in `chunks` too.
        count: of how many trajectories.
        ridge: shrinkage toward reuse.
        chunks: names and Grams.
        prompts: of every trajectory of the chunks, a number.
    """
    spec = old.spec
    each = (gram for _, grams in chunks for gram in grams)
    pairs = (
        (
            gram[None],
            old.refitted(total - gram, count - 1, ridge).rows(spec.anchors, spec.sigmas),
        )
        for gram in islice(each, MAX_LEFT_OUT)
    )
    grid = len(spec.anchors), spec.sigmas
    rivals = rivals_on(total.sum(1) / count, *grid, spec.expert_steps, [spec.anchors])
    return estimate(pairs, rivals, *grid, prompts[:MAX_LEFT_OUT])
