"""A forecasting run computes what it says, and leaves the pipeline as it found it."""

import copy
import inspect
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler
from tiny_hosts import (
    CALLS_PER_STEP,
    HOSTS,
    STEPS,
    ConstantVelocity,
    adding_pipeline,
    bare_pipeline,
    pipeline,
    run,
    seeded,
    spec_for,
    tiny_dit,
)

from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.integration.forecasting import attach, forecasting
from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import HiCache, Newton, Reuse, Taylor

ANCHORS = (0, 1, 4)
TAPS = ("output", "hidden", "residual")
every_host = pytest.mark.parametrize("host", HOSTS)
every_tap = pytest.mark.parametrize("tap", TAPS)


def learned(pipe: Any, num_branches: int = 2, **changes: Any) -> L2P:
    """Rows that differ between branches, fitted (as it says) on this pipeline."""
    predictor = L2P(STEPS, ANCHORS, num_branches)
    on_anchors = torch.zeros(STEPS)
    on_anchors[list(ANCHORS)] = 0.05
    noise = torch.randn(predictor.weight.shape, generator=seeded(3))
    predictor.weight += (noise * on_anchors).tril(-1)
    predictor.spec = spec_for(pipe, num_branches=num_branches, **changes)
    return predictor


# ------------------------------------------------------------------------------- the same numbers


@every_host
@every_tap
def test_computing_every_step_changes_no_bit(host, tap):
    pipe = pipeline(host)
    plain = run(host, pipe)
    with forecasting(pipe, Taylor(2), range(STEPS), tap) as attached:
        assert torch.equal(run(host, pipe), plain)
    assert attached.report().anchors == list(range(STEPS))
    assert attached.report().forecasts == []


def replaying(pipe: Any, calls: int, tap: str) -> list[Any]:
    """Reuse written by hand: every module runs at every step, its result is thrown away."""
    count, kept, entered = [0], {}, {}

    def anchor() -> tuple[bool, int]:
        return count[0] // calls in ANCHORS, count[0] % calls

    def enter(module, args, kwargs):
        entered["trunk"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def head(module, args):
        is_anchor, call = anchor()
        if tap == "hidden":
            kept[call] = args[0] if is_anchor else kept[call]
            return (kept[call], *args[1:])
        if is_anchor:
            kept[call] = args[0] - entered["trunk"]
            return None
        return (entered["trunk"] + kept[call], *args[1:])

    def end(module, args, output):
        is_anchor, call = anchor()
        count[0] += 1
        if tap == "output":
            kept[call] = output if is_anchor else kept[call]
            return kept[call]
        return output

    transformer = pipe.transformer
    handles = [transformer.register_forward_hook(end)]
    if tap != "output":
        block = transformer.transformer_blocks[0]
        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(transformer.norm_out.register_forward_pre_hook(head))
    return handles


@every_host
@every_tap
def test_reuse_is_what_a_loop_by_hand_gives(host, tap):
    pipe = pipeline(host)
    plain = run(host, pipe)
    handles = replaying(pipe, CALLS_PER_STEP[host], tap)
    expected = run(host, pipe)
    for handle in handles:
        handle.remove()
    with forecasting(pipe, Reuse(), ANCHORS, tap):
        assert torch.equal(run(host, pipe), expected)
    assert not torch.allclose(expected, plain, atol=1e-4)


@every_host
@every_tap
def test_the_blocks_run_at_anchors_only(host, tap):
    pipe = pipeline(host)
    ran = []
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    with forecasting(pipe, Reuse(), ANCHORS, tap):
        run(host, pipe)
        proof = 0 if tap == "output" else 2  # of the replay, once
        assert len(ran) == len(ANCHORS) * CALLS_PER_STEP[host] + proof
        run(host, pipe)
        assert len(ran) == 2 * len(ANCHORS) * CALLS_PER_STEP[host] + proof


@pytest.mark.parametrize("predictor", [Reuse(), Taylor(3), Newton(2, "sigma"), HiCache(2)])
def test_a_constant_output_is_forecast_exactly(predictor):
    pipe = PixelDiTPipeline(tiny_dit(ConstantVelocity), FlowMatchEulerDiscreteScheduler())
    plain = run("dit_guided", pipe)
    with forecasting(pipe, predictor, ANCHORS):
        forecast = run("dit_guided", pipe)
    torch.testing.assert_close(forecast, plain, atol=1e-5, rtol=0)  # float32 weights sum to 1


@pytest.mark.parametrize("predictor", [Reuse(), Taylor(2)])
def test_a_constant_residual_is_forecast_exactly_though_the_state_moves(predictor):
    pipe = adding_pipeline()
    plain = run("dit_guided", pipe)
    with forecasting(pipe, predictor, ANCHORS, "residual"):
        forecast = run("dit_guided", pipe)
    torch.testing.assert_close(forecast, plain, atol=1e-5, rtol=0)  # (x + 1) - x in float32


def test_a_head_called_by_keyword_gets_the_forecast_in_the_right_argument():
    pipe = adding_pipeline()
    with forecasting(pipe, Reuse(), (0,), "hidden"):
        forecast = run("dit", pipe)
    x_0 = torch.randn(2, 1, 4, 4, generator=seeded())
    scheduler, x_t = FlowMatchEulerDiscreteScheduler(), x_0
    scheduler.set_timesteps(STEPS)
    for timestep in scheduler.timesteps:
        x_t = scheduler.step((x_0 + 1) * timestep / 1000, timestep, x_t, return_dict=False)[0]
    torch.testing.assert_close(forecast, x_t, atol=1e-5, rtol=0)


def test_each_branch_of_a_batched_call_is_forecast_by_its_own_rows():
    pipe = pipeline("dit_guided")
    predictor = learned(pipe)
    with forecasting(pipe, predictor):
        forecast = run("dit_guided", pipe)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    x_t = torch.randn(2, 1, 4, 4, generator=seeded())
    classes = torch.tensor([0, 2, 3, 3])
    outputs: dict[int, torch.Tensor] = {}
    for t, timestep in enumerate(scheduler.timesteps):
        if t in ANCHORS:
            with torch.no_grad():
                v = pipe.transformer(torch.cat([x_t, x_t]), timestep.expand(4), classes).sample
            outputs[t] = v
        else:
            rows = predictor.weight[:, t].float()
            halves = [sum(rows[b, a] * outputs[a].chunk(2)[b] for a in outputs) for b in (0, 1)]
            v = torch.cat(halves)
        v_cond, v_uncond = v.chunk(2)
        guided = v_uncond + 3.0 * (v_cond - v_uncond)
        x_t = scheduler.step(guided, timestep, x_t, return_dict=False)[0]
    torch.testing.assert_close(forecast, x_t, atol=1e-5, rtol=1e-5)  # order of float32 sums


def test_guidance_stays_on_in_forecast_steps():
    pipe = pipeline("dit_guided")
    with forecasting(pipe, Taylor(1), ANCHORS):
        weak, strong = (run("dit_guided", pipe, guidance_scale=g) for g in (1.5, 5.0))
    assert not torch.allclose(weak, strong, atol=1e-3)


def test_a_host_that_returns_an_output_object_still_does():
    pipe = bare_pipeline(pipeline("dit"))
    outputs = []
    with forecasting(pipe, Reuse(), ANCHORS), torch.no_grad():
        pipe.scheduler.set_timesteps(STEPS)
        x_t = torch.randn(1, 1, 4, 4)
        for timestep in pipe.scheduler.timesteps:
            out = pipe.transformer(x_t, timestep[None], torch.tensor([1]), return_dict=True)
            outputs.append(out)
            x_t = pipe.scheduler.step(out.sample, timestep, x_t).prev_sample
    assert len({type(out) for out in outputs}) == 1
    assert torch.equal(outputs[2].sample, outputs[1].sample)


def test_inference_mode_gives_the_same():
    pipe = pipeline("dit_guided")
    for tap in TAPS:
        with forecasting(pipe, Taylor(2), ANCHORS, tap):
            expected = run("dit_guided", pipe)
            with torch.inference_mode():
                assert torch.equal(run("dit_guided", pipe), expected)
            assert torch.equal(run("dit_guided", pipe), expected)


# ---------------------------------------------------------------------- nothing is left behind


def facts(pipe: Any) -> tuple:
    """What a caller can see of a hooked pipeline."""
    return (
        "forward" in vars(pipe.transformer),
        "_diffusers_hook" in vars(pipe.transformer),
        "step" in vars(pipe.scheduler),
        "set_timesteps" in vars(pipe.scheduler),
        sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in pipe.transformer.modules()),
        [type(m).__name__ for m in pipe.transformer.modules()],
    )


@every_tap
def test_after_detaching_the_pipeline_is_its_old_self(tap):
    pipe = pipeline("dit_guided")
    before, plain = facts(pipe), run("dit_guided", pipe)
    attached = attach(pipe, Reuse(), ANCHORS, tap)
    assert facts(pipe) != before
    run("dit_guided", pipe)
    attached.detach()
    assert facts(pipe) == before
    assert pipe.transformer.forward.__func__ is type(pipe.transformer).forward
    assert torch.equal(run("dit_guided", pipe), plain)


class Interrupted(Exception):
    pass


def interrupt_scheduler(pipe: Any) -> None:
    step, calls = type(pipe.scheduler).step, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted
        return step(self, *args, **kwargs)

    pipe.scheduler.__class__ = type(
        type(pipe.scheduler).__name__, (type(pipe.scheduler),), {"step": failing}
    )


def interrupt_head(pipe: Any) -> None:
    calls = []

    def failing(module, args):
        calls.append(1)
        if len(calls) == 7:
            raise Interrupted

    pipe.transformer.norm_out.register_forward_pre_hook(failing)


def interrupt_callback(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
    if step == 3:
        raise Interrupted
    return kwargs


@pytest.mark.parametrize("interrupt", [interrupt_scheduler, interrupt_head])
@every_tap
def test_after_an_exception_in_a_run_the_next_one_is_like_new(interrupt, tap):
    pipe = pipeline("dit_guided")
    with forecasting(pipe, Taylor(2), ANCHORS, tap):
        expected = run("dit_guided", pipe)
    blocks = pipe.transformer.transformer_blocks
    interrupt(pipe)
    attached = attach(pipe, Taylor(2), ANCHORS, tap)
    with pytest.raises(Interrupted):
        for _ in range(4):  # the head runs rarely on the output tap
            run("dit_guided", pipe)
    assert pipe.transformer.transformer_blocks is blocks
    assert torch.equal(run("dit_guided", pipe), expected)
    attached.detach()
    assert "forward" not in vars(pipe.transformer) and "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("host", ["flux", "flux_two_calls"])
def test_an_exception_in_a_callback_detaches_too(host):
    pipe = pipeline(host)
    plain = run(host, pipe)
    with pytest.raises(Interrupted), forecasting(pipe, Taylor(1), ANCHORS, "hidden"):
        run(host, pipe, callback_on_step_end=interrupt_callback)
    assert "forward" not in vars(pipe.transformer)
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(run(host, pipe), plain)


@every_host
@every_tap
def test_two_runs_in_a_row_are_equal(host, tap):
    pipe = pipeline(host)
    with forecasting(pipe, Taylor(2), ANCHORS, tap):
        assert torch.equal(run(host, pipe), run(host, pipe))


def test_another_step_count_or_size_in_the_next_run_is_like_a_fresh_pipeline():
    def fresh(**changes):
        pipe = pipeline("flux_two_calls")
        with forecasting(pipe, Taylor(2), ANCHORS, "hidden"):
            return run("flux_two_calls", pipe, **changes)

    pipe = pipeline("flux_two_calls")
    with forecasting(pipe, Taylor(2), ANCHORS, "hidden") as attached:
        for changes in (
            {},
            {"num_inference_steps": 6},
            {"height": 48},
            {"true_cfg_scale": 1.0},
            {},
        ):
            assert torch.equal(run("flux_two_calls", pipe, **changes), fresh(**changes))
            expected = changes.get("num_inference_steps", STEPS)
            assert attached.report().num_steps == expected


def test_two_pipelines_in_one_process_do_not_meet():
    pipes = [pipeline("dit_guided"), pipeline("flux_two_calls")]
    hosts = ["dit_guided", "flux_two_calls"]
    alone = []
    for host, pipe in zip(hosts, pipes, strict=True):
        with forecasting(pipe, Taylor(1), ANCHORS, "hidden"):
            alone.append(run(host, pipe))
    with (
        forecasting(pipes[0], Taylor(1), ANCHORS, "hidden"),
        forecasting(pipes[1], Taylor(1), ANCHORS, "hidden"),
    ):
        for host, pipe, expected in zip(hosts * 2, pipes * 2, alone * 2, strict=True):
            assert torch.equal(run(host, pipe), expected)


def test_a_deep_copy_of_the_scheduler_does_not_tick():
    pipe = pipeline("dit_guided")
    with forecasting(pipe, Taylor(1), ANCHORS) as attached:
        expected = run("dit_guided", pipe)
        steps = attached.session.clock.steps_done
        copied = copy.deepcopy(copy.deepcopy(pipe.scheduler))
        copied.set_timesteps(3)
        copied.step(torch.zeros(1, 1, 4, 4), copied.timesteps[0], torch.zeros(1, 1, 4, 4))
        assert attached.session.clock.steps_done == steps
        assert len(pipe.scheduler.timesteps) == STEPS
        assert len(copied.timesteps) == 3
        assert torch.equal(run("dit_guided", pipe), expected)


def test_pipelines_still_read_the_schedulers_signatures():
    pipe = pipeline("dit_guided")
    before = [inspect.signature(getattr(pipe.scheduler, n)) for n in ("set_timesteps", "step")]
    with forecasting(pipe, Reuse(), ANCHORS):
        after = [inspect.signature(getattr(pipe.scheduler, n)) for n in ("set_timesteps", "step")]
    assert before == after


def test_calls_outside_a_run_are_the_hosts_own():
    pipe = pipeline("dit")
    x_t, timestep, label = torch.randn(1, 1, 4, 4), torch.tensor([500]), torch.tensor([1])
    with torch.no_grad():
        expected = pipe.transformer(x_t, timestep, label).sample
        with forecasting(pipe, Reuse(), (0,)) as attached:
            assert torch.equal(pipe.transformer(x_t, timestep, label).sample, expected)
            run("dit", pipe)
            assert torch.equal(pipe.transformer(x_t, timestep, label).sample, expected)
    assert attached.report().anchors == [0]


def test_a_scheduler_stepped_without_set_timesteps_is_left_alone():
    pipe = bare_pipeline(pipeline("dit"))
    pipe.scheduler.set_timesteps(STEPS)
    x_t = torch.randn(1, 1, 4, 4)
    with forecasting(pipe, Reuse(), ANCHORS) as attached, torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            v = pipe.transformer(x_t, timestep[None], torch.tensor([1])).sample
            x_t = pipe.scheduler.step(v, timestep, x_t).prev_sample
    assert attached.report().num_steps == 0
    assert x_t.isfinite().all()


# --------------------------------------------------------------------------------------- refusals


def test_attaching_twice_is_refused_and_the_first_stays():
    pipe = pipeline("dit_guided")
    with forecasting(pipe, Reuse(), ANCHORS) as attached:
        with pytest.raises(ValueError, match="already attached.*detach it first"):
            attach(pipe, Taylor(1), ANCHORS)
        run("dit_guided", pipe)
        assert attached.report().anchors == list(ANCHORS)


def test_a_host_with_a_diffusers_cache_is_refused():
    pipe = pipeline("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"already has a cache \(FirstBlockCacheConfig\)"):
        attach(pipe, Reuse(), ANCHORS)
    pipe.transformer.disable_cache()
    with forecasting(pipe, Reuse(), ANCHORS):
        run("flux", pipe)


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        ((1, 4), "starts with step 0"),
        ((), "starts with step 0"),
        ((0, 4, 2), "rising order"),
        ((0, 4, 4), "no doubles"),
        ((0, STEPS), f"the last anchor is step {STEPS}"),
    ],
)
def test_anchors_that_are_no_schedule_are_refused(anchors, message):
    pipe = pipeline("dit_guided")
    plain = run("dit_guided", pipe)
    with pytest.raises(ValueError, match=message), forecasting(pipe, Reuse(), anchors):
        run("dit_guided", pipe)
    assert torch.equal(run("dit_guided", pipe), plain)


def test_a_learned_predictor_without_its_spec_is_refused():
    with pytest.raises(ValueError, match="without its spec"):
        attach(pipeline("dit_guided"), L2P(STEPS, ANCHORS, 2), ANCHORS)


def test_missing_anchors_and_unknown_taps_are_refused():
    with pytest.raises(ValueError, match="no anchors of its own"):
        attach(pipeline("dit"), Reuse())
    with pytest.raises(ValueError, match="tap is 'latent', expected"):
        attach(pipeline("dit"), Reuse(), ANCHORS, "latent")


def other_weights(pipe):
    next(pipe.transformer.parameters()).data.add_(0.1)


def other_class(pipe):
    pipe.transformer = tiny_dit(ConstantVelocity)


def other_scheduler(pipe):
    pipe.scheduler = DDIMScheduler(clip_sample=False)


def other_shift(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)


def other_dtype(pipe):
    pipe.to(torch.bfloat16)


def unchanged(pipe):
    pass


@pytest.mark.parametrize(
    ("change", "call", "message"),
    [
        (other_weights, {}, "weights .* is [0-9a-f]{64}, expected"),
        (other_class, {}, "class is ConstantVelocity, expected DiTTransformer2DModel"),
        (other_scheduler, {}, "fitted under FlowMatchEuler.*, found DDIMScheduler"),
        (other_shift, {}, r"step 1 has sigma 0\.\d+, expected 0\.\d+|step \d has sigma"),
        (other_dtype, {}, "fitted on float32 features, this run makes bfloat16"),
        (unchanged, {"num_inference_steps": 6}, "fitted on 8 steps, this run has 6"),
        (unchanged, {"guidance_scale": 1.0}, "fitted with 2 guidance branch.*this run has 1"),
        (unchanged, {"guidance_scale": 4.0}, "fitted at guidance_scale 3, this run has 4"),
    ],
)
def test_a_learned_predictor_is_kept_off_anything_it_was_not_fitted_on(change, call, message):
    pipe = pipeline("dit_guided")
    predictor = learned(pipe)
    change(pipe)
    if change is other_dtype:
        predictor.spec = spec_for(pipe)  # the digest of the weights tells the dtypes apart first
    plain = run("dit_guided", pipe, **call)
    with pytest.raises(PredictorMismatch, match=message), forecasting(pipe, predictor):
        run("dit_guided", pipe, **call)
    assert torch.equal(run("dit_guided", pipe, **call), plain)


def test_a_learned_predictor_keeps_its_own_tap_and_anchors():
    pipe = pipeline("dit_guided")
    predictor = learned(pipe)
    with pytest.raises(PredictorMismatch, match="fitted on the tap 'output', not 'hidden'"):
        attach(pipe, predictor, tap="hidden")
    with pytest.raises(PredictorMismatch, match=r"anchors \[0, 1, 4\], found \[0, 2\]"):
        attach(pipe, predictor, anchors=(0, 2))


def test_after_a_refused_run_the_host_is_not_forecast():
    pipe = pipeline("dit_guided")
    attached = attach(pipe, learned(pipe))
    with pytest.raises(PredictorMismatch):
        run("dit_guided", pipe, num_inference_steps=6)
    x_t, timestep, label = torch.randn(1, 1, 4, 4), torch.tensor([500]), torch.tensor([1])
    called = pipe.transformer(x_t, timestep, label).sample
    assert attached.report().anchors == []
    attached.detach()
    assert torch.equal(pipe.transformer(x_t, timestep, label).sample, called)


@every_tap
def test_features_that_are_not_finite_are_refused(tap):
    pipe = pipeline("dit_guided")
    pipe.transformer.transformer_blocks[1].ff.net[2].bias.data[0] = float("nan")
    with (
        pytest.raises(ValueError, match=f"the network's {tap} at step 0 holds NaN or Inf"),
        forecasting(pipe, Reuse(), ANCHORS, tap),
    ):
        run("dit_guided", pipe)


# ------------------------------------------------------------------ runs that start half-way


def half_way(pipe: Any, begin: int) -> torch.Tensor:
    """What image-to-image pipelines do: announce all steps, run the later ones."""
    pipe.scheduler.set_timesteps(STEPS)
    if hasattr(pipe.scheduler, "set_begin_index"):
        pipe.scheduler.set_begin_index(begin)
    x_t = torch.randn(1, 1, 4, 4, generator=seeded())
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps[begin:]:
            v = pipe.transformer(x_t, timestep[None], torch.tensor([1])).sample
            x_t = pipe.scheduler.step(v, timestep, x_t, return_dict=False)[0]
    return x_t


def test_a_run_that_starts_half_way_counts_its_steps_from_there():
    pipe = bare_pipeline(pipeline("dit"))
    plain = half_way(pipe, 3)
    with forecasting(pipe, Reuse(), range(STEPS - 3)) as attached:
        assert torch.equal(half_way(pipe, 3), plain)
    assert attached.report().num_steps == STEPS - 3
    with forecasting(pipe, Reuse(), (0, 3)) as attached:
        half_way(pipe, 3)
    assert attached.report().anchors == [0, 3]
    assert attached.report().forecasts == [1, 2, 4]


def test_a_learned_predictor_is_not_used_half_way():
    pipe = bare_pipeline(pipeline("dit"))
    predictor = learned(pipe, num_branches=1)
    with pytest.raises(PredictorMismatch, match="fitted on 8 steps, this run has 4"):
        with forecasting(pipe, predictor):
            half_way(pipe, 4)


def test_a_scheduler_that_does_not_tell_where_it_starts_is_refused():
    pipe = bare_pipeline(pipeline("dit", DDIMScheduler(clip_sample=False)))
    with forecasting(pipe, Reuse(), ANCHORS) as attached:
        half_way(pipe, 0)
        assert attached.report().anchors == list(ANCHORS)
        with pytest.raises(ValueError, match="step 0 of the run has timestep 875, found 500"):
            half_way(pipe, 3)


# ---------------------------------------------------------------------------------------- report


@every_host
@every_tap
def test_the_report_tells_what_ran_and_what_is_cached(host, tap):
    pipe = pipeline(host)
    anchors = [0, 1, 3, 5]
    with forecasting(pipe, Taylor(1), anchors, tap) as attached:
        run(host, pipe)
    report = attached.report()
    assert report.num_steps == STEPS
    assert report.anchors == anchors
    assert report.forecasts == [2, 4, 6, 7]
    calls = CALLS_PER_STEP[host]
    assert {kind: len(s) for kind, s in report.seconds.items()} == {
        "anchor": 4 * calls,
        "forecast": 4 * calls,
    }
    elements = {
        "output": {"dit": 32, "flux": 2 * 4 * 16},  # samples x (1 x 4 x 4), samples x tokens x 16
        "hidden": {"dit": 2 * 4 * 16, "flux": 2 * 4 * 16},
    }["output" if tap == "output" else "hidden"][host.split("_")[0]]
    branches = 2 if host in ("dit_guided", "flux_two_calls") else 1
    assert report.state_bytes == 2 * branches * elements * 4  # window 2, float32
    assert "4 of 8 steps forecast: 2.0 x fewer evaluations" in str(report)


@pytest.mark.parametrize("then", ["first", "later"])
def test_a_loop_by_hand_that_broke_off_leaves_plain_calls_alone(then):
    pipe = bare_pipeline(pipeline("dit"))
    label = torch.tensor([0])

    def network(x_t, t):
        return pipe.transformer(x_t, timestep=t.expand(1), class_labels=label).sample

    x_t = torch.randn(1, 1, 4, 4, generator=seeded())
    with torch.no_grad(), forecasting(pipe, Reuse(), [0], "output") as run:
        pipe.scheduler.set_timesteps(6)
        timesteps = pipe.scheduler.timesteps
        v = network(x_t, timesteps[0])
        later = pipe.scheduler.step(v, timesteps[0], x_t, return_dict=False)[0]
        forecast = network(later, timesteps[1])
        assert torch.equal(forecast, v) and run.report().forecasts == [1]
        pipe.scheduler.step(forecast, timesteps[1], later, return_dict=False)  # and no further
        t = timesteps[0 if then == "first" else 4]
        found = network(later, t)
        again = network(later, timesteps[2])  # the run is over
    with torch.no_grad():
        assert torch.equal(found, network(later, t))
        assert torch.equal(again, network(later, timesteps[2]))
