"""Rows and errors of whole features, without the axis of parts that library functions have."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import Predictor
from foreseer.predictors.solve import least_squares_rows
from foreseer.trajectories.gram import relative_errors


def tabulate(rule: Predictor, anchors: Sequence[int], sigmas: Sequence[float]) -> Tensor:
    """The rows of a formula."""
    return rows_of(rule, anchors, sigmas)[0]


def rows_of(
    predictor: Predictor, anchors: Sequence[int], sigmas: Sequence[float]
) -> Float[Tensor, "branches S S"]:
    """The rows of every branch."""
    rows = predictor.rows(anchors, sigmas)
    assert rows is not None and rows.shape[1] == 1
    return rows[:, 0]


def rows_fitted(
    grams: Float[Tensor, "n *lead S S"],
    anchors: Sequence[int],
    ridge: float = 1e-4,
    expert_steps: Sequence[int] = (0,),
) -> Float[Tensor, "*lead S S"]:
    """The least-squares rows of trajectories."""
    return least_squares_rows(grams.sum(0), anchors, ridge, expert_steps)


def errors_of(
    grams: Float[Tensor, "*lead S S"], rows: Float[Tensor, "*lead2 S S"]
) -> Float[Tensor, "*lead S"]:
    """Relative error of every step."""
    return relative_errors(grams.unsqueeze(-3), rows.unsqueeze(-3))
