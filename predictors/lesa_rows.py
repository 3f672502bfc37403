"""LESA on given anchors as rows of weights: what it is to everything that works on Grams."""

from collections.abc import Sequence

import torch

from foreseer.predictors.base import History, Step
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.linear import L2P


def as_l2p(predictor: LesaPredictor, anchors: Sequence[int]) -> L2P:
    """The linear rule that a predictor is on given anchors, as rows.

    Args:
        predictor: one without constants.
        anchors: steps at which the network runs, starting with 0.

    Raises:
        ValueError: a constant b_k is not 0, or the predictor is not linear.
    """
    if type(predictor) is not LesaPredictor:
        raise ValueError(f"a {type(predictor).__name__} is no linear rule; expected LesaPredictor.")
    if predictor.offset is not None and bool((predictor.offset != 0).any()):
        raise ValueError(
            "the predictor adds a constant, which rows of weights cannot; fit it with bias=False."
        )
    linear = L2P(len(predictor.sigmas), anchors, predictor.num_branches)
    branches = tuple(range(predictor.num_branches))
    history = History(predictor.window)
    for index, sigma in enumerate(predictor.sigmas):
        step = Step(index, sigma, len(predictor.sigmas), branches)
        if index in linear.anchors:
            history.push(step, torch.empty(0))
        else:
            with torch.no_grad():
                weights = predictor.affine(history, step)[0]
            linear.weight[:, index] = 0.0
            linear.weight[:, index, history.steps] = weights.mT
    return linear
