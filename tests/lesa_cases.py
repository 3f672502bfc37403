"""Random LESA predictors and histories that several test files use."""

from typing import Any

import torch
from torch import Tensor

from foreseer.predictors.base import History, Step
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.lesa_values import LesaValues

STEPS = 12
SIGMAS = tuple(1.0 - step / STEPS for step in range(STEPS))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomize(module: torch.nn.Module, size: float = 0.3, seed: int = 0) -> None:
    """Random numbers in every parameter."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(size * draw)


def lesa(seed: int | None = 0, **arguments: Any) -> LesaPredictor:
    """A small predictor; `seed=None` leaves it at its start."""
    values = {"sigmas": SIGMAS, "num_branches": 2, "taps": (2, 4, 3), "hidden": (5,)}
    predictor = LesaPredictor(**{**values, **arguments})
    if seed is not None:
        randomize(predictor, seed=seed)
    return predictor


def lesa_values(seed: int | None = 0, **arguments: Any) -> LesaValues:
    """The same with curves on the values."""
    values = {"sigmas": SIGMAS, "num_branches": 2, "taps": (2, 4, 3), "hidden": (5,)}
    predictor = LesaValues(**{**values, **arguments})
    if seed is not None:
        randomize(predictor, seed=seed)
    predictor.set_value_range(torch.tensor([2.0, 3.0][: predictor.num_branches]))
    return predictor


def step_at(index: int, branches: tuple[int, ...] = (0, 1)) -> Step:
    return Step(index, SIGMAS[index], STEPS, branches)


def history_on(
    steps: tuple[int, ...], window: int | None = None, dtype: torch.dtype = torch.float32
) -> History:
    """Random features of shape (4, 3, 5); equal steps have equal features."""
    history = History(window)
    for index in steps:
        history.push(step_at(index), feature_at(index).to(dtype))
    return history


def feature_at(index: int) -> Tensor:
    return torch.randn(4, 3, 5, generator=seeded(100 + index))
