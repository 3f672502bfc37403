"""Shallow steps: the outer blocks run on the current step, the deep trunk is forecast, exactly."""

import functools

import pytest
import tiny_hosts
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
)
from families import FAMILIES, call
from tiny_hosts import seeded
from unet_hosts import STEPS, class_pipe, diffusion_pipe, draw, paint

from foreseer import schedules
from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.evaluation.kinds_search import three_kind_lists
from foreseer.evaluation.timing import step_flops
from foreseer.evaluation.verify import (
    Replay,
    check_abort,
    check_detached,
    check_tap,
    final_latents,
    footprint,
)
from foreseer.integration.forecasting import forecasting
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.integration.session import Session
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.predictors.tokens import ClusterPolicy
from foreseer.schedules import Shallow, three_kinds
from foreseer.training.least_squares import fit_rows
from foreseer.trajectories.gram import sum_grams
from foreseer.trajectories.prompts import Item, asked_items
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

ANCHORS = (0, 3, 6)
DRAWN = {"class": (class_pipe, draw), "diffusion": (diffusion_pipe, paint)}


@pytest.fixture
def pipe():
    return class_pipe()


def deep_cache(pipe, interval, depth=1):
    """DeepCache's scheme (arXiv 2312.00858) on `UNet2DModel`: a sampler of its own, 30 lines.

    Every `interval` steps the whole network runs and what its upper part hands to the last `depth`
    up blocks is kept; in between the first `depth` down blocks run, then those up blocks on it.
    """
    net, scheduler = pipe.unet, pipe.scheduler
    classes = torch.tensor([0, 2, 3, 3])  # two samples, and the null class
    x = torch.randn(2, 1, 8, 8, generator=seeded())
    scheduler.set_timesteps(STEPS)
    kept = None
    for step, time in enumerate(scheduler.timesteps):
        both = torch.cat([x, x])
        emb = net.time_embedding(net.time_proj(time.expand(4)))
        emb = emb + net.class_embedding(classes)
        h = net.conv_in(both)
        skips = (h,)
        full = step % interval == 0
        for block in net.down_blocks if full else net.down_blocks[:depth]:
            h, more = block(hidden_states=h, temb=emb)
            skips += more
        if full:
            h = net.mid_block(h, emb)
            for block in net.up_blocks[:-depth]:
                count = len(block.resnets)
                h = block(h, skips[-count:], emb)
                skips = skips[:-count]
            kept = h
        skips = skips[: sum(len(block.resnets) for block in net.up_blocks[-depth:])]
        h = kept
        for block in net.up_blocks[-depth:]:
            count = len(block.resnets)
            h = block(h, skips[-count:], emb)
            skips = skips[:-count]
        v = net.conv_out(net.conv_act(net.conv_norm_out(h)))
        v_cond, v_null = v.chunk(2)
        x = scheduler.step(v_null + 3.0 * (v_cond - v_null), time, x, return_dict=False)[0]
    return x


def test_classes_of_a_unet_pipeline_are_recorded_in_turn(pipe):
    told = [item.inputs["class_labels"] for item in asked_items(pipe, None, 4, 0)]
    assert told == [i % pipe.num_classes for i in range(4)]


@pytest.mark.parametrize(("interval", "depth"), [(2, 1), (3, 1), (3, 2)])
@torch.no_grad()
def test_reuse_on_the_deep_tap_is_deepcache(pipe, interval, depth):
    wanted = deep_cache(pipe, interval, depth)
    with forecasting(pipe, Reuse(), range(0, STEPS, interval), f"deep.{depth}") as run:
        found = draw(pipe)
    assert run.report().shallow == [s for s in range(STEPS) if s % interval]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found, draw(pipe))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("host", DRAWN)
def test_a_deep_tensor_put_back_gives_the_same_picture_bit_for_bit(host, depth):
    build, run_of = DRAWN[host]
    pipe = build()
    run, tap = functools.partial(run_of, pipe), f"deep.{depth}"
    expected = final_latents(pipe, run)
    before = footprint(pipe)
    checks = [*check_tap(pipe, run, tap, expected), check_abort(pipe, run, tap, expected)]
    checks.append(check_detached(pipe, before))
    assert not [check for check in checks if check.passed is False] and len(checks) == 5


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_all_steps_anchors_is_the_plain_run_on_chains(name):
    family = FAMILIES[name]
    pipe = family.build()
    plain = call(family, pipe)
    with forecasting(pipe, Reuse(), range(8), "deep.1") as run:
        assert torch.equal(call(family, pipe), plain)
    assert run.report().anchors == list(range(8)) and not run.report().shallow


@torch.no_grad()
def test_a_chain_takes_the_recorded_residual_back_up_to_rounding():
    pipe = FAMILIES["flux"].build()
    run = functools.partial(call, FAMILIES["flux"], pipe)
    expected = final_latents(pipe, run)
    replay = Replay("deep.1")
    session = Session(pipe, replay)
    final_latents(pipe, run)
    replay.replay()
    replayed = final_latents(pipe, run)
    assert session.report.shallow == list(range(1, 8, 2))
    session.detach()
    # a + (b - a) rounds twice; eight steps of float32 carry that along
    torch.testing.assert_close(replayed, expected, rtol=1e-3, atol=1e-4)


def test_a_list_of_two_kinds_is_one_of_three_without_forecasts(pipe):
    shallow = [step for step in range(STEPS) if step not in ANCHORS]
    with forecasting(pipe, Taylor(1), ANCHORS, "deep.1"):
        two = draw(pipe)
    kinds = Shallow(shallow, Taylor(1), "deep.1")
    with forecasting(pipe, Reuse(), range(STEPS), shallow=kinds) as run:
        assert torch.equal(draw(pipe), two)
    assert run.report().shallow == shallow and not run.report().forecasts


def test_lists_of_three_kinds_are_named_by_a_recording_and_run(pipe, tmp_path):
    given = {"guidance_scale": 3.0, "num_inference_steps": STEPS}
    record(pipe, asked_items(pipe, None, 4, 0), tmp_path, taps=["deep.1", "output"], **given)
    recording, names = Recording(tmp_path), ["gram/deep.1", "gram/output"]
    sums = sum_grams(recording, names, recording.items)
    deep, output = (sums[name].sum(0) for name in names)
    named = three_kind_lists(deep, output, recording.header.sigmas, 0.2, 3, 3)
    assert named
    for each in named:
        kinds = Shallow(each.shallow, Reuse(), "deep.1")
        with forecasting(pipe, Reuse(), each.anchors, "output", shallow=kinds) as run:
            draw(pipe)
        assert tuple(run.report().shallow) == each.shallow


@pytest.mark.parametrize("tap", ["output", "hidden"])
@torch.no_grad()
def test_forecasts_look_back_on_shallow_steps_too(pipe, tap):
    """Reuse of the last evaluated step, whichever kind it was: compared step by step by hand."""
    anchors, seen = (0, 2, 3, 5), []
    net = pipe.unet
    with forecasting(pipe, Reuse(), anchors, tap, shallow=Shallow([3, 5], Reuse())) as run:
        handle = net.conv_out.register_forward_hook(lambda m, a, output: seen.append(output))
        draw(pipe)
        handle.remove()
    report = run.report()
    assert (report.anchors, report.shallow, report.forecasts) == ([0, 2], [3, 5], [1, 4, 6, 7])
    if tap == "output":
        return
    made = seen[-STEPS:]  # the head runs at every step
    assert torch.equal(made[4], made[3]) and torch.equal(made[7], made[5])
    assert not torch.equal(made[3], made[2])


def test_the_report_counts_costs_by_kind_in_full_steps(pipe):
    with forecasting(pipe, Reuse(), (0, 2, 3, 5), shallow=Shallow([3, 5], Reuse())) as run:
        draw(pipe)
    report = run.report()
    assert 2 < report.cost == 2 + 2 * report.shallow_share
    told = str(report)
    assert "2 of 8 steps shallow, 4 forecast" in told and "shallow steps: 3 5" in told
    assert f"cost {report.cost:.1f} full steps" in told
    assert report.fewer == STEPS / report.cost


def test_convolutions_count(pipe):
    sample, classes = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    inputs = ((), {"sample": sample, "timestep": torch.ones(2), "class_labels": classes})
    cost = {tap: step_flops(pipe.unet, inputs, tap) for tap in ("output", "deep.1", "deep.2")}
    full = cost["output"].full
    assert 0 < cost["deep.1"].base < cost["deep.2"].base < full
    blocks = [pipe.unet.down_blocks[0], pipe.unet.up_blocks[-1], pipe.unet.conv_out]
    weights = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 4)
    assert cost["deep.1"].base > 2 * 2 * 16 * weights  # the least grid is 4 x 4, two samples


@pytest.mark.parametrize("size", [(136, 72), (88, 56)])
@pytest.mark.parametrize("depth", [1, 2])
def test_odd_grids_are_exact(size, depth):
    pipe = diffusion_pipe()
    run = functools.partial(paint, pipe, *size)  # latents of 17 x 9 and 11 x 7
    expected = final_latents(pipe, run)
    checks = list(check_tap(pipe, run, f"deep.{depth}", expected))
    assert len(checks) == 3 and not [check for check in checks if check.passed is False]


def test_guidance_halves_in_two_calls_are_exact():
    pipe = tiny_hosts.pipeline("flux_two_calls")
    plain = tiny_hosts.run("flux_two_calls", pipe)
    with forecasting(pipe, Reuse(), range(8), "deep.1"):
        assert torch.equal(tiny_hosts.run("flux_two_calls", pipe), plain)
    kinds = Shallow([1, 5], Taylor(1))
    with forecasting(pipe, Taylor(1), (0, 1, 3, 5), "hidden", shallow=kinds) as run:
        found = tiny_hosts.run("flux_two_calls", pipe)
    assert run.report().shallow == [1, 5] and not torch.equal(found, plain)
    assert len(run.report().shallow_seconds) == 4  # two calls a step
    assert torch.equal(tiny_hosts.run("flux_two_calls", pipe), plain)


@pytest.mark.parametrize(
    ("change", "build"),
    [
        (lambda unet: unet.to(memory_format=torch.channels_last), class_pipe),
        (lambda unet: [block.compile(backend="eager") for block in unet.up_blocks], class_pipe),
        (lambda unet: unet.enable_freeu(0.9, 0.2, 1.2, 1.4), diffusion_pipe),
        (
            lambda unet: unet.up_blocks[-1].register_forward_hook(lambda m, a, o: 1.5 * o),
            class_pipe,
        ),
        (lambda unet: unet.up_blocks[0].register_forward_hook(lambda m, a, o: 1.5 * o), class_pipe),
    ],
    ids=["channels_last", "compiled", "freeu", "hook_on_a_block", "hook_on_a_skipped_block"],
)
def test_what_is_put_on_a_u_net_stays(change, build):
    pipe = build()
    run = functools.partial(draw if build is class_pipe else paint, pipe)
    change(pipe.unet)
    expected = final_latents(pipe, run)
    checks = list(check_tap(pipe, run, "deep.1", expected))
    assert len(checks) == 3 and not [check for check in checks if check.passed is False]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A recording of the deep tap, and rows fitted on it, by the commands."""
    folder = tmp_path_factory.mktemp("deep")
    pipe = diffusion_pipe()
    embeds = torch.randn(3, 1, 3, 6, generator=seeded(1))
    given = [
        {"prompt_embeds": each, "negative_prompt_embeds": torch.zeros(1, 3, 6)} for each in embeds
    ]
    record(
        pipe,
        [Item(i, i, inputs) for i, inputs in enumerate(given)],
        folder / "recording",
        taps=("deep.1", "output"),
        num_inference_steps=STEPS,
        height=64,
        width=64,
    )
    return fit_rows(Recording(folder / "recording"), ANCHORS, "deep.1")


def test_another_grid_and_freeu_are_not_what_rows_were_fitted_on(fitted):
    pipe = diffusion_pipe()
    with forecasting(pipe, fitted) as run:
        paint(pipe)
        assert run.report().shallow == [1, 2, 4, 5, 7]
        with pytest.raises(PredictorMismatch, match="another resolution"):
            paint(pipe, 96, 64)
        pipe.unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
        with pytest.raises(PredictorMismatch, match=r"freeu\[b1\] none, this run has 1.2"):
            paint(pipe)
        pipe.unet.disable_freeu()
        paint(pipe)


def test_fitted_rows_serve_the_full_steps_that_they_were_fitted_for(fitted):
    pipe = diffusion_pipe()
    anchors = (0, 2, 3, 5, 6)
    with forecasting(pipe, Taylor(1), anchors, shallow=Shallow([2, 5], fitted)) as run:
        paint(pipe)
    assert (run.report().anchors, run.report().shallow) == ([0, 3, 6], [2, 5])
    with pytest.raises(PredictorMismatch, match=r"fitted for the anchors \[0, 3, 6\]"):
        with forecasting(pipe, Taylor(1), anchors, shallow=Shallow([5], fitted)):
            pass


@pytest.mark.parametrize("kind", ["controlnet", "adapter"])
def test_additions_to_single_blocks_are_refused_where_blocks_are_skipped(kind):
    pipe = diffusion_pipe()
    parts = (pipe.vae, None, None, pipe.unet)
    more = {"requires_safety_checker": False}
    if kind == "controlnet":
        net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4,) * 4)
        for parameter in net.parameters():
            parameter.data += 0.05
        made = StableDiffusionControlNetPipeline(*parts, net, pipe.scheduler, None, None, **more)
    else:
        adapter = T2IAdapter(
            in_channels=3, channels=[4, 8, 8], num_res_blocks=1, downscale_factor=8
        )
        made = StableDiffusionAdapterPipeline(*parts, adapter, pipe.scheduler, None, None, **more)
    made.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 64, 64, generator=seeded(3))
    plain = paint(made, image=picture)
    with forecasting(made, Reuse(), ANCHORS, "output"):
        paint(made, image=picture)
    for tap in ("deep.1", "hidden"):
        with pytest.raises(UnsupportedHost, match="a ControlNet or an adapter"):
            with forecasting(made, Reuse(), ANCHORS, tap):
                paint(made, image=picture)
    assert torch.equal(paint(made, image=picture), plain)


def test_shallow_steps_do_not_go_with_chosen_tokens(pipe):
    with pytest.raises(ValueError, match="do not go with tokens="):
        kinds = Shallow([3], Reuse())
        with forecasting(pipe, Reuse(), (0, 3), tokens=ClusterPolicy(4), shallow=kinds):
            pass


def test_schedules_that_look_inside_are_refused_on_a_u_net(pipe):
    for schedule, tap in ((schedules.TeaCache(0.1), "hidden"), (schedules.SpeCa(0.1), "hidden")):
        with pytest.raises(UnsupportedHost, match="is a U-Net"):
            with forecasting(pipe, Reuse(), tap=tap, schedule=schedule):
                draw(pipe)
    with pytest.raises(ValueError, match="does not go with"):
        with forecasting(pipe, Reuse(), tap="deep.1", schedule=schedules.TeaCache(0.1)):
            pass


@pytest.mark.parametrize(
    ("anchors", "shallow", "tap", "told"),
    [
        ((0, 3), Shallow([], Reuse()), "output", "shallow steps are none"),
        ((0, 3), Shallow([4], Reuse()), "output", r"found \[4\]"),
        ((0, 3), Shallow([3, 3], Reuse()), "output", "each once"),
        ((0, 3), Shallow([0], Reuse()), "output", "first step runs in full"),
        ((0, 3), Shallow([3], Reuse(), "hidden"), "output", "expected 'deep.1'"),
        ((0, 3), Shallow([3], Reuse()), "deep.1", "forecasts of the taps 'output' or 'hidden'"),
        ((0, 3), [3], "output", "expected foreseer.schedules.Shallow"),
        ((0, 9), Shallow([9], Reuse()), "output", "the last anchor is step 9"),
        ((0, 3), None, "deep.9", "at most deep.2"),
        ((0, 3), None, "deep.0", "tap is 'deep.0', expected one of"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused_with_the_reason(pipe, anchors, shallow, tap, told):
    with pytest.raises(ValueError, match=told):
        with forecasting(pipe, Reuse(), anchors, tap, shallow=shallow):
            draw(pipe)
    draw(pipe)


def test_depths_become_a_list_of_three_kinds():
    assert three_kinds([12, 0, 1, 0, 12, 1], 6) == ((0, 2, 4, 5), (2, 5))
    with pytest.raises(ValueError, match="found depths of 3 steps, expected one for each of the 6"):
        three_kinds([12, 0, 1], 6)
    with pytest.raises(ValueError, match="begin with 1"):
        three_kinds([1, 0, 12], 3)
    with pytest.raises(ValueError, match="begin with 12 and hold \\[-1\\]"):
        three_kinds([12, -1, 1], 3)
