"""Forecasting next to what else people do to a pipeline: share it, stop it, copy it, save it."""

import contextlib
import copy
import functools
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FluxImg2ImgPipeline,
    FluxPipeline,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_first_block_cache
from families import FAMILIES, MORE, call
from families.family import STEPS
from torch import Tensor, nn

from foreseer.evaluation.verify import Replay
from foreseer.integration.forecasting import attach, forecasting
from foreseer.integration.session import Session
from foreseer.predictors.rules import Reuse, Taylor

EVERY = FAMILIES | MORE
ANCHORS = (0, 1, 4)
ODD = list(range(1, STEPS, 2))


@contextlib.contextmanager
def replaying(pipe: Any, run: Any, tap: str = "hidden") -> Any:
    """A session that has recorded one run and replays it from now on."""
    session = Session(pipe, Replay(tap))
    try:
        run()
        session.source.replay()
        yield session
    finally:
        session.detach()


def check_replay(pipe: Any, run: Any, plain: Tensor, tap: str = "hidden") -> None:
    """A run with the taps of its odd steps put back must be the plain run."""
    with replaying(pipe, run, tap) as session:
        if tap == "residual":  # (hidden - entered) + entered rounds
            torch.testing.assert_close(run(), plain)
        else:
            assert torch.equal(run(), plain)
        assert session.report.forecasts == ODD


def facts(pipe: Any) -> dict[str, Any]:
    """Everything that attaching could leave on a pipeline."""
    found: dict[str, Any] = {"pipe": sorted(vars(pipe)), "scheduler": sorted(vars(pipe.scheduler))}
    for name, module in pipe.transformer.named_modules():
        hooks = {k: len(v) for k, v in vars(module).items() if k.endswith("_hooks")}
        found[name] = (type(module), sorted(vars(module)), list(module._modules), hooks)
    return found


def first_call(pipe: Any, run: Any) -> tuple[tuple, dict[str, Any]]:
    """What the pipeline gives its transformer in the first step."""
    calls: list[tuple[tuple, dict[str, Any]]] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    run()
    handle.remove()
    return calls[0]


def by_hand(transformer: nn.Module, given: tuple[tuple, dict[str, Any]]) -> Tensor:
    with torch.no_grad():
        return transformer(*given[0], **given[1])[0]


# --------------------------------------------------------------------- several pipelines at a time


def test_two_pipelines_of_one_class_take_turns():
    family = FAMILIES["flux_cfg"]
    pipes, predictors = [family.build(), family.build()], [Taylor(2), Reuse()]
    for parameter in pipes[1].transformer.parameters():
        parameter.data.mul_(1.01)
    alone = []
    for pipe, predictor in zip(pipes, predictors, strict=True):
        with forecasting(pipe, predictor, ANCHORS, "hidden"):
            alone.append(call(family, pipe))
    inner: list[Tensor] = []

    def the_other_one(pipe, step, timestep, kwargs):
        if step in (2, 5):
            inner.append(call(family, pipes[1]))
        return kwargs

    with (
        forecasting(pipes[0], predictors[0], ANCHORS, "hidden"),
        forecasting(pipes[1], predictors[1], ANCHORS, "hidden"),
    ):
        for expected, pipe in zip(alone * 2, pipes * 2, strict=True):
            assert torch.equal(call(family, pipe), expected)
        found = call(family, pipes[0], callback_on_step_end=the_other_one)
    assert torch.equal(found, alone[0])
    assert [torch.equal(other, alone[1]) for other in inner] == [True, True]


class Interrupted(Exception):
    pass


def interrupted_at(step: int) -> Any:
    def interrupt(pipe, index, timestep, kwargs):
        if index == step:
            raise Interrupted
        return kwargs

    return interrupt


def sharing(own_scheduler: bool) -> tuple[Any, Any]:
    """An image-to-image pipeline and a text-to-image pipeline around its transformer."""
    other = EVERY["flux_img2img"].build()
    scheduler = copy.deepcopy(other.scheduler) if own_scheduler else other.scheduler
    pipe = FluxPipeline(scheduler, other.vae, None, None, None, None, other.transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe, other


own_or_shared = pytest.mark.parametrize("own_scheduler", [True, False])


@own_or_shared
@pytest.mark.parametrize("swapped", [False, True])
def test_a_pipeline_with_the_same_transformer_is_left_alone(own_scheduler, swapped):
    names = ["flux", "flux_img2img"]
    pipes = list(sharing(own_scheduler))
    if swapped:
        names, pipes = names[::-1], pipes[::-1]
    mine, others = EVERY[names[0]], EVERY[names[1]]
    expected = call(others, pipes[1])
    with forecasting(pipes[0], Reuse(), ANCHORS, "hidden"):
        forecast = call(mine, pipes[0])
    with forecasting(pipes[0], Reuse(), ANCHORS, "hidden") as attached:
        assert torch.equal(call(others, pipes[1]), expected)
        assert torch.equal(call(mine, pipes[0]), forecast)
        report = str(attached.report())
        assert torch.equal(call(others, pipes[1]), expected)
        assert str(attached.report()) == report
        assert torch.equal(call(mine, pipes[0]), forecast)
    assert torch.equal(call(others, pipes[1]), expected)


def test_a_pipeline_made_from_the_attached_ones_components_is_left_alone():
    pipe, other = sharing(own_scheduler=False)
    family, others = FAMILIES["flux"], EVERY["flux_img2img"]
    expected = call(others, other)
    with forecasting(pipe, Reuse(), ANCHORS, "hidden") as attached:
        forecast = call(family, pipe)
        made = FluxImg2ImgPipeline(**pipe.components)
        made.set_progress_bar_config(disable=True)
        assert torch.equal(call(others, made), expected)
        assert attached.report().anchors == list(ANCHORS)
        assert torch.equal(call(family, pipe), forecast)


@own_or_shared
@pytest.mark.parametrize("step", [0, 2, 4])
def test_after_an_abort_the_other_pipeline_is_still_left_alone(own_scheduler, step):
    pipe, other = sharing(own_scheduler)
    family, others = FAMILIES["flux"], EVERY["flux_img2img"]
    expected = call(others, other)
    with forecasting(pipe, Reuse(), ANCHORS, "hidden"):
        forecast = call(family, pipe)
        with pytest.raises(Interrupted):
            call(family, pipe, callback_on_step_end=interrupted_at(step))
        assert torch.equal(call(others, other), expected)
        assert torch.equal(call(family, pipe), forecast)


def test_the_other_pipeline_may_run_in_the_middle_of_a_run():
    pipe, other = sharing(own_scheduler=True)
    family, others = FAMILIES["flux"], EVERY["flux_img2img"]
    expected = call(others, other)
    inner: list[Tensor] = []

    def the_other_one(pipe, step, timestep, kwargs):
        if step in (0, 3):
            inner.append(call(others, other))
        return kwargs

    with forecasting(pipe, Reuse(), ANCHORS, "hidden") as attached:
        forecast = call(family, pipe)
        assert torch.equal(call(family, pipe, callback_on_step_end=the_other_one), forecast)
        assert attached.report().anchors == list(ANCHORS)
    assert [torch.equal(found, expected) for found in inner] == [True, True]


@own_or_shared
def test_one_transformer_takes_one_predictor(own_scheduler):
    pipe, other = sharing(own_scheduler)
    call(FAMILIES["flux"], pipe)
    call(EVERY["flux_img2img"], other)
    before, others_before = facts(pipe), facts(other)
    attached = attach(pipe, Reuse(), ANCHORS)
    with pytest.raises(ValueError, match="already attached to this transformer"):
        attach(other, Taylor(1), ANCHORS)
    attached.detach()
    assert facts(pipe) == before and facts(other) == others_before
    with forecasting(other, Taylor(1), ANCHORS):
        call(EVERY["flux_img2img"], other)
    assert facts(pipe) == before


def test_a_transformer_exchanged_after_attaching_is_noticed_at_the_next_run():
    family = FAMILIES["flux"]
    pipe = family.build()
    own, other = pipe.transformer, family.build().transformer
    with forecasting(pipe, Reuse(), ANCHORS, "hidden"):
        forecast = call(family, pipe)
        pipe.transformer = other
        with pytest.raises(ValueError, match="attach"):
            call(family, pipe)
        pipe.transformer = own
        assert torch.equal(call(family, pipe), forecast)


def test_two_transformers_on_one_scheduler_can_be_attached_and_detached_in_any_order():
    family = FAMILIES["flux"]
    pipe, other = family.build(), family.build()
    other.scheduler = pipe.scheduler
    plain = call(family, pipe)
    before = facts(pipe)
    with forecasting(pipe, Reuse(), ANCHORS):
        alone = call(family, pipe)
    first, second = attach(pipe, Reuse(), ANCHORS), attach(other, Reuse(), ANCHORS)
    assert torch.equal(call(family, pipe), alone)
    assert torch.equal(call(family, other), alone)
    first.detach()
    assert torch.equal(call(family, pipe), plain)
    assert torch.equal(call(family, other), alone)
    second.detach()
    assert torch.equal(call(family, other), plain)
    assert facts(pipe) == before


# --------------------------------------------------------------------------------- broken-off runs


class Trap:
    """Raises at one step of a session's run, until it has."""

    def __init__(self, error: type, step: int) -> None:
        self.error = error
        self.step = step
        self.session: Any = None

    def __call__(self, *_: Any) -> None:
        if self.session is not None and self.session.clock.index == self.step:
            self.session = None
            raise self.error


def trap(where: str, pipe: Any, spring: Trap, monkeypatch: Any) -> Any:
    """Set a trap; returns what takes it away."""
    if where != "scheduler":
        lists = [m for m in pipe.transformer.children() if isinstance(m, nn.ModuleList)]
        module = lists[-1][-1] if where == "block" else pipe.transformer.norm_out
        return module.register_forward_pre_hook(spring)
    scheduler = type(pipe.scheduler)
    step = scheduler.step

    @functools.wraps(step)
    def failing(self, *args, **kwargs):
        spring()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(scheduler, "step", failing)
    return None


PLACES = [
    ("block", 0),
    ("block", 4),
    ("head", 0),
    ("head", 2),  # of a forecast
    ("head", 4),
    ("scheduler", 0),
    ("scheduler", 2),
    ("callback", 0),
    ("callback", 2),
]


@pytest.mark.parametrize(("where", "step"), PLACES)
@pytest.mark.parametrize(("name", "error"), [("flux", KeyboardInterrupt), ("wan", RuntimeError)])
def test_a_broken_off_run_leaves_a_host_as_it_was(name, where, step, error, monkeypatch):
    family = FAMILIES[name]
    pipe = family.build()
    run = functools.partial(call, family, pipe)
    given = first_call(pipe, run)
    plain, expected = run(), by_hand(pipe.transformer, given)
    before = facts(pipe)
    with forecasting(pipe, Taylor(1), ANCHORS, "hidden"):
        forecast = run()
    spring = Trap(error, step)
    handle = None
    more: dict[str, Any] = {}
    if where == "callback":
        spring.step += 1  # the scheduler's step is over
        more["callback_on_step_end"] = lambda pipe, step, timestep, kwargs: spring() or kwargs
    else:
        handle = trap(where, pipe, spring, monkeypatch)
    with forecasting(pipe, Taylor(1), ANCHORS, "hidden") as attached:
        spring.session = attached.session
        with pytest.raises(error):
            run(**more)
        if handle is not None:
            handle.remove()
        lists = [m for m in pipe.transformer.modules() if isinstance(m, nn.ModuleList)]
        assert {type(blocks) for blocks in lists} == {nn.ModuleList}
        assert not any(m._forward_pre_hooks for m in pipe.transformer.modules())
        assert torch.equal(by_hand(pipe.transformer, given), expected)
        assert torch.equal(run(), forecast)
    assert facts(pipe) == before
    assert torch.equal(run(), plain)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_run_can_be_broken_off_while_the_host_is_looked_over(calls):
    family = FAMILIES["flux"]
    pipe = family.build()
    given = first_call(pipe, lambda: call(family, pipe))
    expected = by_hand(pipe.transformer, given)
    before, left = facts(pipe), [calls]

    def breaking(*_):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    handle = pipe.transformer.single_transformer_blocks[1].register_forward_pre_hook(breaking)
    with forecasting(pipe, Reuse(), ANCHORS, "residual") as attached:
        with pytest.raises(KeyboardInterrupt):
            call(family, pipe)
        handle.remove()
        assert type(pipe.transformer.transformer_blocks) is nn.ModuleList
        assert torch.equal(by_hand(pipe.transformer, given), expected)
        call(family, pipe)
        assert attached.report().anchors == list(ANCHORS)
    assert facts(pipe) == before


# ------------------------------------------------------------------------------------------ copies


def changed(transformer: Any) -> None:
    for parameter in transformer.parameters():
        parameter.data.mul_(1.01)


@pytest.mark.parametrize("name", ["flux_cfg", "wan", "dit"])
def test_a_copy_of_an_attached_transformer_is_a_plain_one_of_its_own(name):
    family = FAMILIES[name]
    pipe = family.build()
    run = functools.partial(call, family, pipe)
    given = first_call(pipe, run)
    expected = by_hand(pipe.transformer, given)
    other = copy.deepcopy(pipe.transformer)
    changed(other)
    others = by_hand(other, given)
    with forecasting(pipe, Taylor(1), ANCHORS, "hidden") as attached:
        forecast = run()
        made = copy.deepcopy(pipe.transformer)
        assert torch.equal(by_hand(made, given), expected)
        changed(made)
        assert torch.equal(by_hand(made, given), others)
        assert torch.equal(by_hand(pipe.transformer, given), expected)
        assert torch.equal(run(), forecast)
        assert attached.report().anchors == list(ANCHORS)
    assert torch.equal(by_hand(made, given), others)
    made.load_state_dict(pipe.transformer.state_dict())
    pipe.transformer = made
    with forecasting(pipe, Taylor(1), ANCHORS, "hidden"):
        assert torch.equal(run(), forecast)


@pytest.mark.parametrize("name", ["flux_cfg", "wan"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_pipeline_copied_in_mid_run_is_a_plain_one_of_its_own(name, step):
    family = FAMILIES[name]
    pipe = family.build()
    plain = call(family, pipe)
    copies: list[Any] = []
    inner: list[Tensor] = []

    def copying(pipe, index, timestep, kwargs):
        if index == step:
            copies.append(copy.deepcopy(pipe))
            inner.append(call(family, copies[0]))
        return kwargs

    with forecasting(pipe, Taylor(1), ANCHORS, "hidden") as attached:
        forecast = call(family, pipe)
        assert torch.equal(call(family, pipe, callback_on_step_end=copying), forecast)
        assert attached.report().anchors == list(ANCHORS)
        assert torch.equal(inner[0], plain)
        with forecasting(copies[0], Taylor(1), ANCHORS, "hidden"):
            assert torch.equal(call(family, copies[0]), forecast)
            assert torch.equal(call(family, pipe), forecast)
        assert torch.equal(call(family, copies[0]), plain)
        changed(copies[0].transformer)
        assert not torch.equal(call(family, copies[0]), plain)
        assert torch.equal(call(family, pipe), forecast)
    assert torch.equal(call(family, pipe), plain)


def test_a_copy_outlives_its_original():
    family = FAMILIES["flux"]
    pipe = family.build()
    plain = call(family, pipe)
    with forecasting(pipe, Reuse(), ANCHORS, "hidden"):
        call(family, pipe)
        made = copy.deepcopy(pipe)
    del pipe
    assert torch.equal(call(family, made), plain)
    attach(made, Reuse(), ANCHORS).detach()
    assert torch.equal(call(family, made), plain)


# ---------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("name", ["flux", "wan", "dit"])
def test_a_transformer_saved_while_attached_is_the_transformer(name, tmp_path):
    family = FAMILIES[name]
    pipe = family.build()
    plain, before = call(family, pipe), copy.deepcopy(pipe.transformer.state_dict())
    with forecasting(pipe, Reuse(), ANCHORS, "hidden"):
        assert list(pipe.transformer.state_dict()) == list(before)
        call(family, pipe)
        assert list(pipe.transformer.state_dict()) == list(before)
        pipe.transformer.save_pretrained(tmp_path)
    loaded = type(pipe.transformer).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())
    pipe.transformer = loaded.eval()
    assert torch.equal(call(family, pipe), plain)


def test_a_pipeline_saved_while_attached_is_the_pipeline(tmp_path):
    family = FAMILIES["dit"]
    pipe = family.build()
    plain = call(family, pipe)
    with forecasting(pipe, Reuse(), ANCHORS, "hidden"):
        forecast = call(family, pipe)
        pipe.save_pretrained(tmp_path)
        assert torch.equal(call(family, pipe), forecast)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe) and type(loaded.scheduler) is type(pipe.scheduler)
    assert torch.equal(call(family, loaded), plain)
    with forecasting(loaded, Reuse(), ANCHORS, "hidden"):
        assert torch.equal(call(family, loaded), forecast)


# ----------------------------------------------------------------------------- what is kept or not


CACHES = {
    "FirstBlockCacheConfig": FirstBlockCacheConfig(threshold=0.1),
    "TaylorSeerCacheConfig": TaylorSeerCacheConfig(),
    "MagCacheConfig": MagCacheConfig(calibrate=True),
    "PyramidAttentionBroadcastConfig": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "FasterCacheConfig": FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        is_guidance_distilled=True,
        tensor_format="BCHW",
        current_timestep_callback=lambda: 500,
    ),
}
every_cache = pytest.mark.parametrize("cache", CACHES)


@every_cache
def test_a_cache_that_is_on_is_refused(cache):
    family = FAMILIES["flux"]
    pipe = family.build()
    plain, before = call(family, pipe), sorted(vars(pipe.scheduler))
    pipe.transformer.enable_cache(CACHES[cache])
    with pytest.raises(ValueError, match=rf"already has a cache \({cache}\)"):
        attach(pipe, Reuse(), ANCHORS)
    pipe.transformer.disable_cache()
    assert sorted(vars(pipe.scheduler)) == before
    assert torch.equal(call(family, pipe), plain)
    with forecasting(pipe, Reuse(), ANCHORS):
        call(family, pipe)


@every_cache
def test_a_cache_turned_on_after_attaching_is_refused_at_the_next_run(cache):
    family = FAMILIES["flux"]
    pipe = family.build()
    plain = call(family, pipe)
    with forecasting(pipe, Reuse(), ANCHORS, "hidden") as attached:
        forecast = call(family, pipe)
        pipe.transformer.enable_cache(CACHES[cache])
        with pytest.raises(ValueError, match=rf"already has a cache \({cache}\)"):
            call(family, pipe)
        pipe.transformer.disable_cache()
        assert torch.equal(call(family, pipe), forecast)
        assert attached.report().anchors == list(ANCHORS)
    assert torch.equal(call(family, pipe), plain)


@pytest.mark.parametrize("first", ["cache", "predictor"])
def test_a_cache_applied_by_hand_is_refused(first):
    family = FAMILIES["wan"]
    pipe = family.build()
    if first == "cache":
        apply_first_block_cache(pipe.transformer, CACHES["FirstBlockCacheConfig"])
        with pytest.raises(ValueError, match=r"already has a cache \(FBC\w+\)"):
            attach(pipe, Reuse(), ANCHORS)
        return
    with forecasting(pipe, Reuse(), ANCHORS):
        apply_first_block_cache(pipe.transformer, CACHES["FirstBlockCacheConfig"])
        with pytest.raises(ValueError, match=r"already has a cache \(FBC\w+\)"):
            call(family, pipe)


def test_a_cache_on_the_second_expert_is_refused():
    pipe = FAMILIES["wan22"].build()
    pipe.transformer_2.enable_cache(CACHES["FirstBlockCacheConfig"])
    with pytest.raises(ValueError, match=r"already has a cache \(FirstBlockCacheConfig\)"):
        attach(pipe, Reuse(), ANCHORS)
    assert "forward" not in vars(pipe.transformer) and "forward" not in vars(pipe.transformer_2)


def test_cache_dit_is_refused_by_its_mark():
    family = FAMILIES["flux"]
    pipe = family.build()
    pipe.transformer._is_cached = True
    with pytest.raises(ValueError, match=r"already has a cache \(cache-dit\)"):
        attach(pipe, Reuse(), ANCHORS)
    pipe.transformer._is_cached = False
    with forecasting(pipe, Reuse(), ANCHORS):
        call(family, pipe)
        pipe.transformer._is_cached = True
        with pytest.raises(ValueError, match=r"already has a cache \(cache-dit\)"):
            call(family, pipe)


@pytest.mark.parametrize("name", ["flux", "wan22", "dit", "zimage"])
@pytest.mark.parametrize("tap", ["output", "hidden", "residual"])
def test_detaching_leaves_nothing(name, tap):
    family = EVERY[name]
    pipe = family.build()
    call(family, pipe)
    before = facts(pipe)
    attached = attach(pipe, Reuse(), ANCHORS, tap)
    assert facts(pipe) != before
    with contextlib.suppress(ValueError):  # zimage has no residual tap
        call(family, pipe)
    attached.detach()
    assert facts(pipe) == before
    attached.detach()
    assert facts(pipe) == before


def test_controlnet_residuals_between_the_blocks_reach_the_forecast_steps():
    family = EVERY["flux_controlnet"]
    pipe = family.build()
    run = functools.partial(call, family, pipe)
    for tap in ("output", "hidden", "residual"):
        check_replay(pipe, run, run(), tap)
    weak = run(controlnet_conditioning_scale=0.1)
    assert not torch.equal(weak, run())
