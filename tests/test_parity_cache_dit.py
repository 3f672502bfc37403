"""Where cache-dit's calibrators and our rules define the same forecast, the numbers agree."""

import pytest
import torch
from tiny_hosts import seeded

from foreseer.predictors.base import History, Step
from foreseer.predictors.rules import Taylor

pytest.importorskip("cache_dit")
calibrators = pytest.importorskip("cache_dit.caching.cache_contexts.calibrators.taylorseer")

NUM_STEPS = 24
ANCHORS = (0, 1, 2, 5, 8, 12, 14, 20)


def smooth_features():
    size, phase = torch.randn(2, 2, 3, 4, generator=seeded(1), dtype=torch.float64)
    return [size * torch.sin(0.2 * s + phase) for s in range(NUM_STEPS)]


def assert_agrees(state, rule, features):
    """Feed both the same anchors and compare every forecast."""
    history = History(rule.window)
    for s, feature in enumerate(features):
        step = Step(s, 1 - s / NUM_STEPS, NUM_STEPS)
        state.mark_step_begin()
        if s in ANCHORS:
            state.update(feature)
            history.push(step, feature)
        else:
            torch.testing.assert_close(rule(history, step), state.approximate(), atol=0, rtol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_state_object_is_taylor_with_a_warm_up_of_three(order):
    state = calibrators.TaylorSeerState(n_derivatives=order)
    assert_agrees(state, Taylor(order, warmup=3), smooth_features())


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_calibrator_in_its_first_use_is_one_warm_up_step_late(order):
    calibrator = calibrators.TaylorSeerCalibrator(n_derivatives=order)
    assert_agrees(calibrator, Taylor(order, warmup=4), smooth_features())


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_calibrator_that_was_reset_is_the_state_object(order):
    calibrator = calibrators.TaylorSeerCalibrator(n_derivatives=order)
    assert_agrees(calibrator, Taylor(order, warmup=4), smooth_features())
    calibrator.reset_cache()
    assert_agrees(calibrator, Taylor(order, warmup=3), smooth_features())
