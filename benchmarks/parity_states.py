"""Comparisons of state objects: the same features into theirs and into our rule."""

import math
from collections.abc import Callable, Iterable

import diffusers
import torch
from diffusers.hooks.taylorseer_cache import TaylorSeerState
from parity_rows import Row, largest
from torch import Tensor

from foreseer.integration.schedule import diffusers_interval
from foreseer.predictors.base import History, Predictor, Step
from foreseer.predictors.rules import Taylor

NUM_STEPS = 50
DIFFUSERS_ANCHORS = diffusers_interval(NUM_STEPS)


def trajectory(num_steps: int = NUM_STEPS, seed: int = 0) -> list[Tensor]:
    """Smooth random features of two samples in float64, with a little noise: (2, 6, 5) each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 2, 6, 5)
    size, phase = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    noise = 1e-3 * torch.randn(num_steps, 2, 6, 5, generator=generator, dtype=torch.float64)
    waves = torch.arange(1, 5, dtype=torch.float64).reshape(4, 1, 1, 1) * math.pi / num_steps
    return [(size * torch.sin(waves * s + phase)).sum(0) + noise[s] for s in range(num_steps)]


def state_forecasts(
    rule: Predictor, features: list[Tensor], anchors: Iterable[int]
) -> dict[int, Tensor]:
    """Our forecast at every step between the anchors."""
    history, found = History(rule.window), {}
    for s, feature in enumerate(features):
        step = Step(s, 1 - s / len(features), len(features))
        if s in anchors:
            history.push(step, feature)
        else:
            found[s] = rule(history, step)
    return found


def diffusers_state(order: int, dtype: torch.dtype) -> Callable:
    """A fresh TaylorSeerState of diffusers, as a function from features and anchors."""

    def forecasts(features: list[Tensor], anchors: Iterable[int]) -> dict[int, Tensor]:
        state, found = TaylorSeerState(taylor_factors_dtype=dtype, max_order=order), {}
        for s, feature in enumerate(features):
            state.current_step += 1
            if s in anchors:
                state.update((feature,))
            else:
                found[s] = state.predict()[0]
        return found

    return forecasts


def cache_dit_state(state: object) -> Callable:
    """A cache-dit state or calibrator, as a function from features and anchors."""

    def forecasts(features: list[Tensor], anchors: Iterable[int]) -> dict[int, Tensor]:
        found = {}
        for s, feature in enumerate(features):
            state.mark_step_begin()
            if s in anchors:
                state.update(feature)
            else:
                found[s] = state.approximate()
        return found

    return forecasts


def distance(first: dict[int, Tensor], second: dict[int, Tensor]) -> float:
    """The largest absolute difference over all forecasts."""
    if first.keys() != second.keys():
        raise ValueError(f"forecasts at {sorted(first)} and {sorted(second)}, expected the same.")
    return max(largest(first[s], second[s]) for s in first)


def differing(first: dict[int, Tensor], second: dict[int, Tensor], tolerance: float) -> list[int]:
    """The steps whose forecasts differ by more than the tolerance."""
    return [s for s in first if largest(first[s], second[s]) > tolerance]


def diffusers_rows() -> list[Row]:
    """The TaylorSeerState of diffusers against our Taylor, on its own schedule."""
    features, host = trajectory(), "random smooth trajectory, float64"
    name = f"diffusers {diffusers.__version__} TaylorSeerState"
    rows = []
    for order in (1, 2, 3, 4):
        theirs = diffusers_state(order, torch.float64)(features, DIFFUSERS_ANCHORS)
        mine = state_forecasts(Taylor(order), features, DIFFUSERS_ANCHORS)
        note = "Each level divides by the last gap only, on both sides; the order grows alike."
        rows.append(Row(f"Taylor({order})", name, host, distance(theirs, mine), True, note))
    theirs = diffusers_state(1, torch.bfloat16)(features, DIFFUSERS_ANCHORS)
    note = (
        "Their default stores the differences in bfloat16; ours keeps the anchors in the model's "
        "dtype and sums in float32 or wider."
    )
    mine = state_forecasts(Taylor(1), features, DIFFUSERS_ANCHORS)
    rows.append(
        Row("Taylor(1)", f"{name}, default dtype", host, distance(theirs, mine), False, note)
    )
    return rows
