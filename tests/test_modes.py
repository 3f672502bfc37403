"""Guidance in all its forms, schedulers, strengths, sizes: exact, right per branch, or refused."""

import functools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from families import FAMILIES, MORE, call
from families.images import flux_transformer
from test_hosts import fitted, recorded
from tiny_hosts import STEPS, pipeline, run

from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.evaluation.verify import Replay, check_tap, final_latents
from foreseer.integration.forecasting import forecasting
from foreseer.integration.session import Session
from foreseer.predictors.rules import Newton, Reuse, Taylor
from foreseer.training.continuous_fit import L2PContinuousModule
from foreseer.trajectories.collector import Recorder
from foreseer.trajectories.files.header import RecordingError
from foreseer.trajectories.prompts import Item
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

EVERY = FAMILIES | MORE
ANCHORS = [0, 2, 5]


def check_exact(pipe, calling):
    """Recording and replaying either tap changes no bit."""
    expected = final_latents(pipe, calling)
    for tap in ("output", "hidden"):
        failed = [c for c in check_tap(pipe, calling, tap, expected) if c.passed is False]
        assert not failed


def branches_seen(pipe, calling):
    """The guidance branches of every step."""
    recorder = Recorder(["output"])
    session = Session(pipe, observers=[recorder])
    calling()
    session.detach()
    return [sorted(step) for step in recorder.features["output"]]


# ------------------------------------------------------------------------------------ guidance

TRUNCATED = {"lumina2": {"cfg_trunc_ratio": 0.5}, "zimage": {"cfg_truncation": 0.5}}


@pytest.mark.parametrize("name", TRUNCATED)
def test_guidance_that_stops_in_mid_run_is_exact_and_loses_a_branch(name):
    changes = TRUNCATED[name]
    family, pipe = EVERY[name], EVERY[name].build()
    calling = functools.partial(call, family, pipe, **changes)
    check_exact(pipe, calling)
    seen = branches_seen(pipe, calling)
    assert seen[0] == [0, 1] and seen[-1] == [0]
    assert seen == sorted(seen, key=len, reverse=True)


@pytest.mark.parametrize("name", TRUNCATED)
@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_a_predictor_serves_the_truncation_it_was_recorded_with_and_no_other(name, tap, tmp_path):
    changes = TRUNCATED[name]
    pipe, recording = recorded(name, tmp_path / "r", **changes)
    lasting = recording.header.branch_steps
    assert lasting[0] == 8 and 0 < lasting[1] < 8
    predictor = fitted(recording, tap, ANCHORS, tmp_path / "p")
    assert predictor.spec.branch_steps == tuple(lasting)
    with forecasting(pipe, predictor):
        assert call(EVERY[name], pipe, **changes).isfinite().all()
        with pytest.raises(PredictorMismatch, match="guidance|cfg_trunc"):
            call(EVERY[name], pipe)


def test_a_branch_that_stopped_repeats_its_last_feature(tmp_path):
    _, recording = recorded("lumina2", tmp_path / "r", cfg_trunc_ratio=0.5)
    last = recording.header.branch_steps[1] - 1
    gram = recording.stack("gram/output")[:, 1]
    assert torch.equal(
        gram[:, last:, last:], gram[:, last:, last:][:, :1, :1].expand_as(gram[:, last:, last:])
    )


def test_a_run_whose_guidance_stops_elsewhere_does_not_join_a_recording(tmp_path):
    family, pipe = FAMILIES["lumina2"], FAMILIES["lumina2"].build()
    ratios = iter([0.5, 0.75])

    class Drifting(type(pipe)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs, cfg_trunc_ratio=next(ratios))

    pipe.__class__ = Drifting
    each = [Item(i, i, family.inputs(i)) for i in range(2)]
    with pytest.raises(RecordingError, match="record runs of one kind"):
        record(pipe, each, tmp_path / "r", batch_size=1, **family.settings)
    assert Recording(tmp_path / "r").items == [0]


def sd3_with_a_skipped_layer():
    family, pipe = FAMILIES["sd3"], FAMILIES["sd3"].build()
    changes = {
        "skip_guidance_layers": [0],
        "skip_layer_guidance_scale": 2.0,
        "skip_layer_guidance_start": 0.2,
        "skip_layer_guidance_stop": 0.7,
    }
    return pipe, functools.partial(call, family, pipe, **changes)


def test_a_skipped_layer_is_a_branch_of_its_own_for_a_while():
    pipe, calling = sd3_with_a_skipped_layer()
    check_exact(pipe, calling)
    seen = branches_seen(pipe, calling)
    assert seen[0] == seen[-1] == [0, 1] and [0, 1, 2] in seen


def test_a_branch_that_starts_between_anchors_is_computed_first():
    pipe, calling = sd3_with_a_skipped_layer()
    with forecasting(pipe, Reuse(), [0, 4], "hidden") as attached:
        assert calling().isfinite().all()
    assert 2 in attached.report().anchors  # the step at which the third branch starts


def test_a_branch_that_starts_in_mid_run_is_no_recording(tmp_path):
    pipe, calling = sd3_with_a_skipped_layer()
    family = FAMILIES["sd3"]
    given = {**family.settings, **calling.keywords}
    with pytest.raises(ValueError, match="a branch that starts in mid-run"):
        record(pipe, [Item(0, 0, family.inputs(0))], tmp_path / "r", **given)


def test_embedded_guidance_is_one_branch():
    pipe = FAMILIES["flux"].build()
    pipe.transformer = flux_transformer(guidance_embeds=True)
    calling = functools.partial(call, FAMILIES["flux"], pipe, guidance_scale=4.0)
    check_exact(pipe, calling)
    assert branches_seen(pipe, calling)[0] == [0]


def test_a_scale_the_pipeline_keeps_to_itself_is_checked(tmp_path):
    pipe, recording = recorded("flux_cfg", tmp_path / "r")
    assert recording.header.guidance["true_cfg_scale"] == 2.0
    predictor = fitted(recording, "output", ANCHORS, tmp_path / "p")
    with forecasting(pipe, predictor):
        call(FAMILIES["flux_cfg"], pipe)
        with pytest.raises(PredictorMismatch, match="fitted at true_cfg_scale 2, this run has 5"):
            call(FAMILIES["flux_cfg"], pipe, true_cfg_scale=5.0)


def test_the_scale_of_a_guider_is_checked(tmp_path):
    pipe, recording = recorded("hunyuan_video15", tmp_path / "r")
    predictor = fitted(recording, "output", ANCHORS, tmp_path / "p")
    with forecasting(pipe, predictor):
        call(FAMILIES["hunyuan_video15"], pipe)
        pipe.guider = pipe.guider.new(guidance_scale=2.0)
        with pytest.raises(PredictorMismatch, match="guider.guidance_scale"):
            call(FAMILIES["hunyuan_video15"], pipe)


# -------------------------------------------------------------------- samples, strength, sizes


@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_several_pictures_of_a_prompt_are_several_samples(name):
    family, pipe = EVERY[name], EVERY[name].build()

    def several():
        generators = [torch.Generator().manual_seed(s) for s in range(4)]
        return call(family, pipe, num_images_per_prompt=2, generator=generators)

    assert len(several()) == 4
    check_exact(pipe, several)
    assert branches_seen(pipe, several)[0] == [0, 1]


@pytest.mark.parametrize(("strength", "steps"), [(0.3, 3), (0.6, 5), (1.0, 8)])
@pytest.mark.parametrize("name", ["flux_img2img", "sd3_img2img"])
def test_image_to_image_counts_the_steps_it_runs(name, strength, steps):
    family, pipe = MORE[name], MORE[name].build()
    calling = functools.partial(call, family, pipe, strength=strength)
    check_exact(pipe, calling)
    with forecasting(pipe, Taylor(1), [0], "hidden") as attached:
        calling()
    report = attached.report()
    assert report.num_steps == len(report.anchors) + len(report.forecasts) == steps
    assert report.anchors == [0]


def test_a_predictor_of_one_strength_refuses_another(tmp_path):
    pipe, recording = recorded("flux_img2img", tmp_path / "r", strength=0.75)
    assert recording.header.num_steps == 6
    predictor = fitted(recording, "output", [0, 2, 4], tmp_path / "p")
    with forecasting(pipe, predictor):
        call(MORE["flux_img2img"], pipe, strength=0.75)
        with pytest.raises(PredictorMismatch, match="fitted on 6 steps, this run has 4"):
            call(MORE["flux_img2img"], pipe, strength=0.5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("flux", {"height": 64}),
        ("sd3", {"width": 64, "height": 64}),
        ("wan", {"num_frames": 9}),
    ],
)
def test_another_resolution_or_length_is_refused(name, changes, tmp_path):
    pipe, recording = recorded(name, tmp_path / "r")
    predictor = fitted(recording, "output", ANCHORS, tmp_path / "p")
    assert predictor.spec.latent_shapes == (tuple(recording.header.latent_shape),)
    call(EVERY[name], pipe, **changes)  # the host itself takes it
    with forecasting(pipe, predictor):
        call(EVERY[name], pipe)
        with pytest.raises(
            PredictorMismatch, match="fitted on latents of .* this run has|sigma grid"
        ):
            call(EVERY[name], pipe, **changes)


@pytest.mark.parametrize("name", ["lumina2", "zimage", "cogvideox"])
def test_tokens_of_the_text_are_no_part_of_a_gram(name, tmp_path):
    pipe, recording = recorded(name, tmp_path / "r")
    recorder = Recorder(["hidden"])
    session = Session(pipe, observers=[recorder])
    call(EVERY[name], pipe, (0, 1))
    session.detach()
    whole = recorder.trajectory(0, "hidden")[0].double().flatten(1)
    image = recorder.image_trajectory(0, "hidden")[0].double().flatten(1)
    if name == "cogvideox":  # its head is given the picture alone
        assert not recorder.masks and torch.equal(whole, image)
        return
    mask = recorder.masks[0][0]
    assert 0 < int(mask.sum()) < len(mask)
    found = recording.stack("gram/hidden", [0])[0, 0]
    torch.testing.assert_close(found, image @ image.T)  # batches of another size round differently
    assert not torch.allclose(found, whole @ whole.T)


def test_other_tokens_than_the_picture_s_never_reach_the_output():
    family, pipe = FAMILIES["lumina2"], FAMILIES["lumina2"].build()

    class Spoiling(Replay):
        def forecast(self, step, slot=None):
            feature = super().forecast(step)
            mask = torch.cat([masks[branch] for branch in step.branches])[:, :, None]
            return torch.where(mask, feature, torch.full_like(feature, torch.nan))

    plain = call(family, pipe)
    recorder = Recorder(["hidden"])
    session = Session(pipe, observers=[recorder])
    call(family, pipe)
    session.detach()
    masks = recorder.masks
    replay = Spoiling("hidden")
    session = Session(pipe, replay)
    call(family, pipe)
    replay.replay()
    assert torch.equal(call(family, pipe), plain)
    session.detach()


def test_a_predictor_fitted_on_two_sizes_serves_both(tmp_path):
    small, big = {"height": 32, "width": 32}, {"height": 32, "width": 64}
    pipe, first = recorded("sd3", tmp_path / "small", **small)
    _, second = recorded("sd3", tmp_path / "big", **big)
    folders = [str(first.folder), str(second.folder)]
    module = L2PContinuousModule(folders, ANCHORS, tap="output")
    predictor = module.predictor
    predictor.spec = module.spec()
    assert len(predictor.spec.latent_shapes) == 2
    with forecasting(pipe, predictor):
        for size in (small, big):
            assert call(EVERY["sd3"], pipe, **size).isfinite().all()
        with pytest.raises(PredictorMismatch, match="4x4x4 or 4x4x8, this run has 4x8x8"):
            call(EVERY["sd3"], pipe, height=64, width=64)


# ----------------------------------------------------------------------------------- schedulers

SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "dpm": lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++"),
    "unipc": lambda: UniPCMultistepScheduler(),
    "unipc_flow": lambda: UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    ),
    "heun": lambda: HeunDiscreteScheduler(),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_is_a_clock(name):
    pipe = pipeline("dit_guided", SCHEDULERS[name]())
    check_exact(pipe, functools.partial(run, "dit_guided", pipe))
    sigmas = Recorder(["output"])
    session = Session(pipe, observers=[sigmas])
    run("dit_guided", pipe)
    session.detach()
    assert sigmas.sigmas == sorted(sigmas.sigmas, reverse=True)


def test_a_sampler_that_evaluates_twice_has_twice_the_steps():
    pipe = pipeline("dit_guided", FlowMatchHeunDiscreteScheduler())
    check_exact(pipe, functools.partial(run, "dit_guided", pipe))
    with forecasting(pipe, Taylor(1), [0, 1, 6], "hidden") as attached:
        run("dit_guided", pipe)
    assert attached.report().num_steps == 2 * STEPS - 1
    assert len(attached.report().anchors) == 3


def test_two_anchors_at_one_sigma_are_refused_on_the_clock_of_sigmas():
    pipe = pipeline("dit_guided", FlowMatchHeunDiscreteScheduler())
    with pytest.raises(ValueError, match="two anchors at one sigma"):
        with forecasting(pipe, Newton(1, "sigma"), [0, 1, 2, 9], "hidden"):
            run("dit_guided", pipe)
    with forecasting(pipe, Newton(1, "step"), [0, 1, 2, 9], "hidden"):
        assert run("dit_guided", pipe).isfinite().all()
