"""Where diffusers' hooks and ours define the same forecast, they produce the same numbers."""

import pytest
import torch
from diffusers import MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import apply_mag_cache
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from diffusers.hooks.taylorseer_cache import TaylorSeerState
from tiny_hosts import pipeline, run, seeded

from foreseer.integration.forecasting import forecasting
from foreseer.predictors.base import History, Step
from foreseer.predictors.rules import Reuse, Taylor

STEPS = 12
ANCHORS = (0, 1, 2, 4, 9)  # interval 5, warm-up 3, as the hook counts them
UNEVEN = (0, 1, 2, 5, 7, 11, 12, 17)
ROUNDING = 2e-6  # a few units in the last place of float32, carried through 12 sampler steps


def smooth_features(num_steps):
    """Features of two samples whose every difference is far from zero."""
    shape = (2, 3, 4)
    size, phase = torch.randn(2, *shape, generator=seeded(1), dtype=torch.float64)
    return [size * torch.sin(0.2 * s + phase) for s in range(num_steps)]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_taylor_is_the_state_object_of_diffusers_on_uneven_anchors(order):
    state = TaylorSeerState(taylor_factors_dtype=torch.float64, max_order=order)
    rule = Taylor(order)
    history = History(rule.window)
    for s, feature in enumerate(smooth_features(20)):
        step = Step(s, 1 - s / 20, 20)
        state.current_step += 1
        if s in UNEVEN:
            state.update((feature,))
            history.push(step, feature)
        else:
            # float64; orders up to 4 divide by gaps of 1 and multiply by horizons up to 4
            torch.testing.assert_close(rule(history, step), state.predict()[0], atol=0, rtol=1e-9)


def lite(host, order):
    """A pipeline under the lite mode, which forecasts what `proj_out` returns."""
    pipe = pipeline(host)
    config = TaylorSeerCacheConfig(
        use_lite_mode=True, max_order=order, taylor_factors_dtype=torch.float32
    )
    pipe.transformer.enable_cache(config)
    return pipe


@pytest.mark.parametrize("host", ["flux", "flux_two_calls"])
@pytest.mark.parametrize("order", [1, 2])
def test_lite_mode_is_taylor_on_the_output_tap(host, order):
    theirs = run(host, lite(host, order), num_inference_steps=STEPS)
    pipe = pipeline(host)
    uncached = run(host, pipe, num_inference_steps=STEPS)
    with forecasting(pipe, Taylor(order), ANCHORS, "output"):
        mine = run(host, pipe, num_inference_steps=STEPS)
    torch.testing.assert_close(mine, theirs, atol=ROUNDING, rtol=0)
    assert (theirs - uncached).abs().max() > 100 * ROUNDING  # something was forecast


def test_the_hook_computes_the_steps_its_formula_says():
    pipe = lite("flux", 1)
    block = pipe.transformer.single_transformer_blocks[0]
    reference = block._diffusers_hook._fn_refs[0]
    computed, own = [], reference.original_forward

    def counted(*args, **kwargs):
        computed.append(pipe.scheduler.step_index or 0)
        return own(*args, **kwargs)

    reference.original_forward = counted
    run("flux", pipe, num_inference_steps=50)
    assert computed == [s for s in range(50) if s < 3 or (s - 4) % 5 == 0]
    assert computed == [0, 1, 2, 4, 9, 14, 19, 24, 29, 34, 39, 44, 49]


@pytest.mark.parametrize("host", ["flux", "dit_guided"])
def test_magcache_is_reuse_on_the_residual_tap(host):
    config = MagCacheConfig(
        mag_ratios=FLUX_MAG_RATIOS, num_inference_steps=STEPS, threshold=10.0, max_skip_steps=3
    )
    pipe = pipeline(host)
    apply_mag_cache(pipe.transformer, config)
    theirs = run(host, pipe, num_inference_steps=STEPS)
    pipe = pipeline(host)
    uncached = run(host, pipe, num_inference_steps=STEPS)
    with forecasting(pipe, Reuse(), (0, 1, 5, 9), "residual"):  # a fifth kept, then 3 skips
        mine = run(host, pipe, num_inference_steps=STEPS)
    torch.testing.assert_close(mine, theirs, atol=ROUNDING, rtol=0)
    assert (theirs - uncached).abs().max() > 100 * ROUNDING
