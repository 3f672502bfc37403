"""Closed forms solved again from a sum of Grams, and again without each trajectory in turn.

Shapes: n trajectories, P parts (1 of the whole feature), S sampling steps.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from jaxtyping import Float
from torch import Tensor

from foreseer.checkpoints.format import argument_names
from foreseer.evaluation.rows import expert_rows
from foreseer.evaluation.verdict import Estimate, estimate, row_table
from foreseer.predictors.any_anchors import L2PGram
from foreseer.predictors.base import Predictor
from foreseer.predictors.parted import PartedL2P
from foreseer.training.parts import least_squares_parts

MAX_LEFT_OUT = 32  # trajectories that are left out, one by one


def leave_one_out(
    old: Any,
    total: Float[Tensor, "branches P S S"],
    count: int,
    ridge: float,
    chunks: Iterator[tuple[list[str], Float[Tensor, "n branches P S S"]]],
) -> Estimate:
    """The estimate of the first `MAX_LEFT_OUT` trajectories, with rows solved without each of them.

    Args:
        old: of one of `FROM_GRAMS`, with `spec`.
        total: summed Grams, of the trajectories in `chunks` too.
        count: of how many trajectories.
        ridge: shrinkage toward reuse.
        chunks: names and Grams.
    """
    spec = old.spec
    each = (gram for _, grams in chunks for gram in grams)
    pairs = (
        (
            gram[None],
            row_table(solved(old, total - gram, count - 1, ridge), spec.anchors, spec.sigmas),
        )
        for gram in islice(each, MAX_LEFT_OUT)
    )
    return estimate(pairs, spec.anchors, spec.sigmas, spec.expert_steps)


def solved(old: Any, total: Float[Tensor, "branches P S S"], count: int, ridge: float) -> Predictor:
    """A predictor like `old` with the closed form of a sum.

    Args:
        old: of one of `FROM_GRAMS`, with `spec`.
        total: summed Grams.
        count: of how many trajectories.
        ridge: shrinkage toward reuse.
    """
    arguments = {name: getattr(old, name) for name in argument_names(type(old).__name__)}
    if isinstance(old, L2PGram):
        new: Any = L2PGram(**arguments | {"ridge": ridge})
        new.set_gram(total[:, 0] / count)
        return new
    new = type(old)(**arguments)
    anchors, steps = old.spec.anchors, old.spec.expert_steps
    if isinstance(old, PartedL2P):
        new.weight.copy_(least_squares_parts(total[None], anchors, ridge))
    else:
        new.weight.copy_(expert_rows(total[None, :, 0], anchors, steps, ridge))
    return new
