"""What diffusers expects of its own caches, asked of attaching and detaching."""

import functools
from typing import Any

import pytest
import torch
from families import FAMILIES, call
from families.family import STEPS
from test_composition import ANCHORS, facts
from torch import Tensor

from foreseer.integration.forecasting import attach, forecasting
from foreseer.predictors.rules import HiCache, Reuse, Taylor

every_family = pytest.mark.parametrize("name", ["flux", "sd3", "wan", "qwenimage", "dit", "zimage"])
every_tap = pytest.mark.parametrize("tap", ["output", "hidden"])


class Interrupted(Exception):
    pass


def hosted(name: str) -> tuple[Any, Any, Tensor]:
    """A pipeline, a call of it, and what the call gives without a cache."""
    family = FAMILIES[name]
    pipe = family.build()
    run = functools.partial(call, family, pipe)
    return pipe, run, run()


@every_family
@every_tap
def test_attaching_and_detaching_turn_the_cache_on_and_off(name, tap):
    pipe, run, plain = hosted(name)
    before = facts(pipe)
    for _ in range(2):
        attached = attach(pipe, Reuse(), ANCHORS, tap)
        run()
        assert attached.report().anchors == list(ANCHORS)
        assert len(attached.report().forecasts) == STEPS - len(ANCHORS)
        attached.detach()
        assert facts(pipe) == before
        run()
        assert len(attached.report().forecasts) == STEPS - len(ANCHORS)


@every_family
def test_attaching_twice_raises_and_changes_nothing(name):
    pipe, run, plain = hosted(name)
    with forecasting(pipe, Reuse(), ANCHORS, "hidden"):
        forecast, during = run(), facts(pipe)
        for predictor in (Reuse(), Taylor(1)):
            with pytest.raises(ValueError, match="already attached to this transformer"):
                attach(pipe, predictor, ANCHORS)
        assert facts(pipe) == during
        assert torch.equal(run(), forecast)
    assert torch.equal(run(), plain)


@every_family
def test_attaching_is_seen_on_the_transformer_and_nowhere_below(name):
    pipe, run, _ = hosted(name)
    before = facts(pipe)
    with forecasting(pipe, Reuse(), ANCHORS, "hidden"):
        run()
        during = facts(pipe)
    assert {key for key in before if before[key] != during[key]} <= {"", "scheduler"}
    assert list(before) == list(during)


@every_family
@every_tap
@pytest.mark.parametrize("predictor", [Reuse(), Taylor(1), HiCache(2)], ids=lambda p: str(type(p)))
def test_a_cached_output_differs_and_an_uncached_one_does_not(name, tap, predictor):
    pipe, run, plain = hosted(name)
    with forecasting(pipe, predictor, ANCHORS, tap):
        forecast = run()
    assert forecast.shape == plain.shape and forecast.dtype == plain.dtype
    assert forecast.isfinite().all()
    assert not torch.allclose(forecast, plain, atol=1e-5)
    assert torch.equal(run(), plain)


@every_family
@every_tap
def test_a_with_block_attaches_and_detaches(name, tap):
    pipe, run, plain = hosted(name)
    before = facts(pipe)
    with forecasting(pipe, Reuse(), ANCHORS, tap) as attached:
        assert facts(pipe) != before
        assert not torch.equal(run(), plain)
    assert facts(pipe) == before
    assert torch.equal(run(), plain)
    assert attached.report().anchors == list(ANCHORS)


@every_family
@pytest.mark.parametrize("runs", [0, 1])
def test_a_with_block_detaches_on_an_exception(name, runs):
    pipe, run, plain = hosted(name)
    before = facts(pipe)
    with pytest.raises(Interrupted), forecasting(pipe, Reuse(), ANCHORS, "hidden"):
        for _ in range(runs):
            run()
        raise Interrupted
    assert facts(pipe) == before
    assert torch.equal(run(), plain)


@every_family
@every_tap
def test_nothing_of_a_run_is_left_in_the_next_one(name, tap):
    pipe, run, _ = hosted(name)
    with forecasting(pipe, Taylor(2), ANCHORS, tap):
        first = run()
        other = run(seeds=(2, 3))
        assert not torch.equal(other, first)
        assert torch.equal(run(), first)
    with forecasting(pipe, Taylor(2), ANCHORS, tap):
        assert torch.equal(run(seeds=(2, 3)), other)


@every_family
def test_a_run_of_other_size_is_forecast_from_its_own_anchors(name):
    pipe, run, _ = hosted(name)
    with forecasting(pipe, Taylor(1), ANCHORS, "hidden") as attached:
        first = run()
        one = run(seeds=(0,))
        assert len(one) == 1
        assert attached.report().anchors == list(ANCHORS)
        assert torch.equal(run(), first)
    with forecasting(pipe, Taylor(1), ANCHORS, "hidden"):
        assert torch.equal(run(seeds=(0,)), one)
