"""Closed forms solved again from a sum of Grams, and again without each trajectory in turn.

Shapes: n trajectories, P parts (1 of the whole feature), S sampling steps.
"""

from collections.abc import Iterator
from itertools import islice

from jaxtyping import Float
from torch import Tensor

from foreseer.evaluation.verdict import Estimate, estimate
from foreseer.predictors.base import LinearPredictor

MAX_LEFT_OUT = 32  # trajectories that are left out, one by one


def leave_one_out(
    old: LinearPredictor,
    total: Float[Tensor, "branches P S S"],
    count: int,
    ridge: float,
    chunks: Iterator[tuple[list[str], Float[Tensor, "n branches P S S"]]],
) -> Estimate:
    """The estimate of the first `MAX_LEFT_OUT` trajectories, with rows solved without each of them.

    Args:
        old: determined by Grams (`from_grams`), with `spec`.
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
            old.refitted(total - gram, count - 1, ridge).rows(spec.anchors, spec.sigmas),
        )
        for gram in islice(each, MAX_LEFT_OUT)
    )
    return estimate(pairs, spec.anchors, spec.sigmas, spec.expert_steps)
