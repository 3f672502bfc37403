"""The weights any linear or affine forecaster gives the computed features, as rows over all steps.

Shapes: S sampling steps, K history length.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Predictor, Step
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.linear import L2P, tabulate


def weight_rows(
    predictor: Predictor, anchors: Sequence[int], sigmas: Sequence[float]
) -> Float[Tensor, "branches S S"] | None:
    """F_hat_t = sum_a W[branch, t, a] F_a (+ a constant, for LESA), W at the given anchors.

    Rows of anchors mean nothing. Formulas have one branch, which stands for all.

    Args:
        predictor: any forecaster.
        anchors: steps at which the network runs.
        sigmas: flow time of every step.

    Returns:
        The rows; None where a forecast is no weighted sum with a number per feature, as of a
        network or of parts with rows of their own.
    """
    if isinstance(predictor, L2P):
        return predictor.weight
    if isinstance(predictor, LesaPredictor):
        return _lesa_rows(predictor, anchors, sigmas)
    if not isinstance(predictor, LinearPredictor):
        return None
    if hasattr(predictor, "num_branches"):
        return rows_of(predictor, anchors, sigmas)
    return tabulate(predictor, anchors, sigmas)[None]


@torch.no_grad()
def _lesa_rows(
    predictor: LesaPredictor, anchors: Sequence[int], sigmas: Sequence[float]
) -> Float[Tensor, "branches S S"]:
    """The linear part of LESA, forecasts that are fed back taken apart into anchors."""
    branches, num_steps = tuple(range(predictor.num_branches)), len(sigmas)
    rows = torch.zeros(len(branches), num_steps, num_steps, dtype=torch.float64)
    history = History(predictor.window)
    for t in range(num_steps):
        step = Step(t, sigmas[t], num_steps, branches)
        if t in anchors:
            history.push(step, torch.empty(0))
            rows[:, t, t] = 1.0
        else:
            weights, _ = predictor.affine(history, step)
            rows[:, t, history.steps] = weights.double().cpu().mT
    return rows


def rows_of(
    predictor: LinearPredictor, anchors: Sequence[int], sigmas: Sequence[float]
) -> Float[Tensor, "branches S S"]:
    """The weights of every branch of a learned predictor on given anchors, as rows over all steps.

    The row of an anchor is its unit row.

    Args:
        predictor: the predictor; it has `num_branches`.
        anchors: steps at which the network runs.
        sigmas: flow time of every step.
    """
    branches = tuple(range(predictor.num_branches))  # type: ignore[arg-type]
    num_steps = len(sigmas)
    rows = torch.zeros(len(branches), num_steps, num_steps, dtype=torch.float64)
    history = History(predictor.window)
    for t in range(num_steps):
        step = Step(t, sigmas[t], num_steps, branches)
        if t in anchors:
            history.push(step, torch.empty(0))
            rows[:, t, t] = 1.0
        else:
            rows[:, t, history.steps] = predictor.coefficients(history, step).double().mT
    return rows
