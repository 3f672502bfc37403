"""pykan's layers in place of ours, to train with; the only file that imports pykan.

Source: pykan 0.2.8, `KANLayer`.
"""

from torch import nn

from .lesa import LesaPredictor


class PykanNet(nn.Module):
    """`SplineNet` made of pykan's `KANLayer`, with its initialisation."""


def with_pykan(predictor: LesaPredictor, seed: int | None = None) -> LesaPredictor:
    """A copy with pykan's layers in place of ours.

    Args:
        predictor: with a `kan` gate.
        seed: start afresh from pykan's initialisation; None copies the curves.
    """
    raise NotImplementedError


def without_pykan(predictor: LesaPredictor, tolerance: float = 1e-5) -> LesaPredictor:
    """A copy with our closed form in place of pykan's layers, checked against them.

    Raises:
        ValueError: the two differ by more than `tolerance`, or pykan's grid is no longer uniform.
    """
    raise NotImplementedError
