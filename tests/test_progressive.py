"""Growing pictures: an exact lift, one noise field, and histories that cross a change of grid."""

import math
from pathlib import Path

import pytest
import torch
from module_hosts import ActionHead
from tiny_text import PROMPTS, tiny_text_pipeline
from torch import nn

import foreseer as fs
from foreseer.integration.handover import Handover
from foreseer.integration.observers import CallRecord, StepRecord
from foreseer.integration.pipelines.pixel_pipeline import pack, unpack
from foreseer.integration.pipelines.progressive import (
    GridChange,
    ProgressivePipeline,
    fine_time,
    haar,
    inverse_haar,
    noise_field,
)
from foreseer.predictors.base import History, Step
from foreseer.predictors.resampled import Resampled, child_corners
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.training.resampling import fit_resampled

GRIDS = Path(__file__).parents[1] / "examples/bundled_models/emoji_flux_grids"
NAMES = list(PROMPTS[1:])
CALL = {"num_inference_steps": 8, "output_type": "latent"}
SWITCH = 0.5  # of steps at 1, .86, .71, .57, ...: the coarse stage has 4 of 8


@pytest.fixture(scope="module")
def grown():
    return ProgressivePipeline(tiny_text_pipeline(), [SWITCH])


@pytest.fixture(scope="module")
def full(grown):
    return grown(NAMES, **CALL).images


@pytest.fixture(scope="module")
def recordings(grown, tmp_path_factory):
    folder = tmp_path_factory.mktemp("progressive")
    return record_stages(grown, NAMES * 4, folder)


def record_stages(grown, prompts, folder):
    """Both stages in full, the fine one from what the coarse one came to."""
    coarse, fine = grown.stages
    latents, (details,) = grown.noise(range(len(prompts)))
    options = {"taps": ["output", "hidden"], "features": "full", "num_inference_steps": 8}
    items = [{"prompt": p, "latents": latents[i, None]} for i, p in enumerate(prompts)]
    first = fs.record(coarse, items, str(folder / "coarse"), **options)
    sigma = float(coarse.scheduler.sigmas[-1])
    ends = torch.stack([first.load(i, ["final"])["final"] for i in range(len(prompts))])
    starts = grown.changes[0].latents(ends, details, sigma)
    items = [{"prompt": p, "latents": starts[i, None]} for i, p in enumerate(prompts)]
    return first, fs.record(fine, items, str(folder / "fine"), **options)


def attached(grown, predictor, anchors, before=(0, 1, 2, 3), tap="hidden"):
    """Both stages under a predictor, the fine one after the coarse one."""
    coarse, fine = grown.stages
    first = fs.attach(coarse, Reuse(), anchors=before)
    second = fs.attach(fine, predictor, anchors=anchors, tap=tap, after=grown.after(first))
    return first, second


def detached(*runs):
    for run in runs:
        run.detach()


def test_haar_is_orthonormal_and_its_own_inverse():
    images = torch.randn(2, 3, 16, 8)
    bands = haar(images)
    assert bands.shape == (2, 4, 3, 8, 4)
    torch.testing.assert_close(inverse_haar(bands), images, rtol=0, atol=1e-6)
    torch.testing.assert_close(bands.square().sum(), images.square().sum())
    torch.testing.assert_close(bands[:, 0] / 2, nn.functional.avg_pool2d(images, 2))


def test_the_lifted_state_is_one_of_flow_time_s():
    """Mean and variance over 20,000 draws, to three standard errors; the picture is flat."""
    draws, sigma, value = 20_000, 0.4, 0.3
    s = fine_time(sigma)
    assert s == pytest.approx(2 * sigma / (1 + sigma))
    noise = torch.randn(draws, 4, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    coarse = (1 - sigma) * value + sigma * noise[:, 0]
    lifted = unpack(GridChange(1, 1).latents(pack(coarse, 1), noise[:, 1:], sigma), 1).flatten(1)
    error = 3 * s / math.sqrt(draws)
    assert float((lifted.mean(0) - (1 - s) * value).abs().max()) < error
    assert float((lifted.var(0) - s**2).abs().max()) < 3 * s**2 * math.sqrt(2 / draws)
    products = torch.corrcoef(lifted.T) - torch.eye(lifted.shape[1])
    assert float(products.abs().max()) < 4.5 / math.sqrt(draws)  # the largest of 66


def test_the_same_field_in_both_stages_is_the_field_of_the_full_picture():
    field, sigma, picture = noise_field([5], 3, 8, 8), 0.5, torch.rand(1, 3, 8, 8)
    bands, s = haar(field), fine_time(0.5)
    coarse = (1 - sigma) * nn.functional.avg_pool2d(picture, 2) + sigma * bands[:, 0]
    change = GridChange(2, 2)
    lifted = unpack(change.latents(pack(coarse, 2), bands[:, 1:], sigma), 2)
    expected = (1 - s) * picture + s * field
    torch.testing.assert_close(haar(lifted)[:, 0], haar(expected)[:, 0])
    torch.testing.assert_close(haar(lifted)[:, 1:], s * bands[:, 1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(change.restricted(pack(lifted, 2), sigma), pack(coarse, 2))


def test_the_field_depends_on_place_channel_and_seed_alone():
    large, small = noise_field([3, 8], 4, 16, 12), noise_field([8], 2, 8, 6)
    assert torch.equal(large[1:, :2, :8, :6], small)
    assert torch.equal(noise_field([8, 3], 4, 16, 12), large.flip(0))
    assert len({*large.flatten().tolist()}) == large.numel()
    assert abs(float(large.mean())) < 0.1 and abs(float(large.std()) - 1) < 0.1


def test_one_stage_is_plain_sampling():
    pipe = tiny_text_pipeline()
    one = ProgressivePipeline(pipe, [])
    latents, details = one.noise([4, 2, 0])
    expected = pipe(NAMES, latents=latents, **CALL).images
    assert details == [] and torch.equal(one(NAMES, seeds=[4, 2, 0], **CALL).images, expected)


def test_the_stages_share_one_clock_and_one_set_of_weights(grown, full):
    coarse, fine = grown.stages
    ends, begins = float(coarse.scheduler.sigmas[-1]), float(fine.scheduler.sigmas[0])
    assert fine_time(ends) == pytest.approx(begins)
    assert len(coarse.scheduler.timesteps) + len(fine.scheduler.timesteps) == 8
    pairs = zip(coarse.transformer.parameters(), fine.transformer.parameters(), strict=True)
    assert all(a is b for a, b in pairs) and coarse.transformer is not fine.transformer


def test_all_steps_anchors_is_the_stage_pipeline_itself(grown, full):
    runs = attached(grown, Taylor(1), range(4))
    try:
        assert torch.equal(grown(NAMES, **CALL).images, full)
        assert [run.report().anchors for run in runs] == [[0, 1, 2, 3]] * 2
    finally:
        detached(*runs)
    assert torch.equal(grown(NAMES, **CALL).images, full)


def test_three_grids_draw_as_well():
    pictures = ProgressivePipeline(tiny_text_pipeline(), [0.8, 0.5])(NAMES, **CALL).images
    assert pictures.shape == (3, 16, 48) and bool(pictures.isfinite().all())


def test_resample_brings_entries_to_the_grid_and_the_clock_of_the_next_run():
    history, change = History(), GridChange(2, 1)
    for index in (1, 2):
        history.push(Step(index, 1 - index / 4, 4), torch.randn(3, 4, 5))
    lifted = history.resample(change.lift, change.time, 4)
    assert lifted.steps == [-3, -2] and lifted.sigmas == [fine_time(0.75), fine_time(0.5)]
    grid = history.features[1].unflatten(1, (2, 2)).permute(0, 3, 1, 2)
    nearest = nn.functional.interpolate(grid, scale_factor=2, mode="nearest")
    assert torch.equal(lifted.features[1], nearest.flatten(2).mT)
    assert history.resample(change.lift, change.time, 4, window=1).steps == [-2]
    lifted.push(Step(0, 0.4, 4), nearest.flatten(2).mT)  # the new run goes on


def test_copy_parent_is_reuse_of_the_lifted_history_and_the_start_of_the_learned_rows(grown, full):
    coarse, fine = grown.stages
    steps = len(coarse.scheduler.timesteps), len(fine.scheduler.timesteps)
    learned = Resampled(steps[1], (2,), (3,), coarse.scheduler.sigmas[:-1].tolist(), (4, 4), 2)
    learned.learned = False  # without a spec, as a formula
    found = []
    for predictor in (Reuse(), learned):
        runs = attached(grown, predictor, [2])
        try:
            found.append(grown(NAMES, **CALL).images)
            assert runs[1].report().anchors == [2]
        finally:
            detached(*runs)
    assert torch.equal(*found) and not torch.equal(found[0], full)


def test_operators_read_the_neighbours_by_corner():
    places = child_corners(4, 4)
    parents = torch.arange(4).unflatten(0, (2, 2)).repeat_interleave(2, 0).repeat_interleave(2, 1)
    read = parents.flatten()[places].unflatten(1, (4, 4))
    assert torch.equal(read[0], parents)
    assert read[:, 0, 1].tolist() == [0, 1, 0, 0, 2]  # upper left parent, child at its right
    assert read[:, 2, 2].tolist() == [3, 2, 3, 1, 3]  # lower right parent, child at upper left
    with pytest.raises(ValueError, match="3 x 4 tokens, expected even"):
        child_corners(3, 4)


@pytest.mark.parametrize("innovation", [False, True])
def test_learned_resampling_beats_copies_and_its_file_forecasts_alike(
    grown, recordings, tmp_path, innovation
):
    coarse, fine = recordings
    fitted = fit_resampled(coarse, fine, (1, 2), (2, 3), innovation=innovation)
    errors = {}
    copies = Resampled(4, (1, 2), (2, 3), coarse.header.sigmas, (4, 4), 2)
    for name, predictor in {"fitted": fitted, "copies": copies}.items():
        errors[name] = [0.0] * 4
        for item in range(4):
            below = coarse.load(item, ["feature/hidden"])["feature/hidden"]
            above = fine.load(item, ["feature/hidden"])["feature/hidden"]
            history = History()
            for place, anchor in zip(predictor.continues, predictor.before, strict=True):
                history.push(Step(place, 1.0, 4), grown.changes[0].lift(below[:, anchor]))
            for t in range(4):
                step = Step(t, 0.5, 4, (0, 1))
                errors[name][t] += float((predictor(history, step) - above[:, t]).norm())
                if t in (1, 2):
                    history.push(step, above[:, t])
    assert all(a <= b + 1e-3 for a, b in zip(errors["fitted"], errors["copies"], strict=True))
    assert errors["fitted"][0] < 0.9 * errors["copies"][0]

    loaded = fs.load(str(fs.save(fitted, str(tmp_path / "fitted"))))
    assert loaded.spec == fitted.spec and loaded.before == (2, 3) and loaded.grid == (4, 4)
    found = []
    for predictor in (fitted, loaded):
        runs = attached(grown, predictor, None, tap=None)
        try:
            found.append(grown(NAMES, **CALL).images)
            assert runs[1].report().anchors == [1, 2]
        finally:
            detached(*runs)
    assert torch.equal(*found)


def test_rows_for_another_start_are_refused(grown, recordings):
    fitted = fit_resampled(*recordings, (1, 2), (1, 3))
    coarse, fine = grown.stages
    with pytest.raises(fs.PredictorMismatch, match="go on from a stage before"):
        fs.attach(fine, fitted)
    runs = attached(grown, fitted, None, before=(0, 2, 3), tap=None)
    try:
        with pytest.raises(ValueError, match=r"own anchors, \[1, 3\]"):
            grown(NAMES, **CALL)
        with pytest.raises(ValueError, match="4 steps from flow time"):
            grown(NAMES, num_inference_steps=12, output_type="latent")
    finally:
        detached(*runs)
    plain = fs.fit(recordings[1], anchors=[0, 2], method="lstsq", tap="hidden")
    first = fs.attach(coarse, Reuse(), anchors=[0])
    with pytest.raises(fs.PredictorMismatch, match="begin with nothing"):
        fs.attach(fine, plain, after=grown.after(first))
    first.detach()


def test_stages_run_in_turn_on_the_same_samples(grown):
    coarse, fine = grown.stages
    latents, (details,) = grown.noise(range(3))
    runs = attached(grown, Reuse(), [1, 2])
    call = {"num_inference_steps": 8, "output_type": "latent"}
    try:
        with pytest.raises(ValueError, match="no run of the stage before"):
            fine(NAMES, latents=torch.randn(3, 16, 48), **call)
        ends = coarse(NAMES, latents=latents, **call).images
        starts = grown.changes[0].latents(ends, details, float(coarse.scheduler.sigmas[-1]))
        with pytest.raises(ValueError, match="does not start from what the stage before"):
            fine(NAMES, latents=starts.flip(0), **call)
        coarse(NAMES, latents=latents, **call)
        with pytest.raises(ValueError, match="same rows and tokens"):
            fine(NAMES[:1], latents=starts[:1], **call)
        coarse(NAMES, latents=latents, **call)
        with pytest.raises(ValueError, match="under the same guidance"):
            fine(NAMES, latents=starts, guidance_scale=1.0, **call)
        coarse(NAMES, latents=latents, **call)
        whole = fine(NAMES, latents=starts, **call).images
        assert torch.equal(grown(NAMES, **call).images, whole)  # nothing is left of the errors
    finally:
        detached(*runs)


def test_a_lift_to_other_tokens_is_refused(grown):
    coarse, fine = grown.stages
    first = fs.attach(coarse, Reuse(), anchors=[0, 1, 2, 3])
    wider = Handover(first, grown.changes[0])
    wider.change = Wider(2, 4)
    second = fs.attach(fine, Reuse(), anchors=[1], tap="hidden", after=wider)
    try:
        with pytest.raises(ValueError, match=r"brought to \(6, 64, 32\), this call has \(6, 16"):
            grown(NAMES, **CALL)
    finally:
        detached(second, first)
    assert not any(isinstance(each, Handover) for each in first.report().others)
    with pytest.raises(ValueError, match="expected .rows, 9, channels."):
        GridChange(3, 4).lift(torch.zeros(1, 8, 5))


class Wider(GridChange):
    """Lifts twice."""

    def lift(self, feature):
        return GridChange(4, 4).lift(super().lift(feature))


def test_phases_without_an_anchor_and_other_deciders_are_refused(grown):
    coarse, fine = grown.stages
    first = fs.attach(coarse, Reuse(), anchors=[0])
    try:
        second = fs.attach(fine, Reuse(), anchors=[], tap="hidden", after=grown.after(first))
        with pytest.raises(ValueError, match="expected one step at least"):
            grown(NAMES, **CALL)
        second.detach()
        with pytest.raises(ValueError, match="TeaCache decides by what the run itself"):
            fs.attach(fine, Reuse(), schedule=fs.schedules.TeaCache(0.1), after=grown.after(first))
    finally:
        first.detach()
    with pytest.raises(ValueError, match="expected the run of a stage that is attached"):
        grown.after(first)


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ([0.5, 0.7], "falling flow times"),
        ([1.0], "falling flow times"),
        ([torch.tensor([0.7, 0.5])], "at one step"),
        ([0.9, 0.7, 0.5], "not 8 times a coarser one"),
    ],
)
def test_switches_that_make_no_stages_are_refused(switches, words):
    with pytest.raises(ValueError, match=words):
        ProgressivePipeline(tiny_text_pipeline(), switches)


@pytest.mark.parametrize("switch", [0.0005, 0.99])
def test_a_switch_after_the_last_step_or_before_the_first_is_refused(switch):
    grown = ProgressivePipeline(tiny_text_pipeline(), [switch])
    if switch < 0.5:
        with pytest.raises(ValueError, match="has no step"):
            grown(NAMES, **CALL)
    else:
        assert len(grown(NAMES, **CALL).images) == 3  # one coarse step, at pure noise
        assert len(grown.stages[0].scheduler.timesteps) == 1


def test_other_pipelines_and_seeds_are_refused(grown):
    with pytest.raises(ValueError, match="found ActionHead"):
        ProgressivePipeline(ActionHead(), [SWITCH])
    with pytest.raises(ValueError, match="2 seeds for 3 prompts"):
        grown(NAMES, seeds=[1, 2])
    pipe = tiny_text_pipeline()
    with fs.forecasting(pipe, Reuse(), anchors=[0]):
        with pytest.raises(ValueError, match="attach to its stages"):
            ProgressivePipeline(pipe, [SWITCH])


def test_guidance_in_one_stage_alone_is_refused_where_its_first_step_is_computed(grown):
    coarse, fine = grown.stages
    latents, (details,) = grown.noise(range(3))
    runs = attached(grown, Reuse(), [0, 2])
    try:
        ends = coarse(NAMES, latents=latents, **CALL).images
        starts = grown.changes[0].latents(ends, details, float(coarse.scheduler.sigmas[-1]))
        with pytest.raises(ValueError, match="keep their guidance"):
            fine(NAMES, latents=starts, guidance_scale=1.0, **CALL)
    finally:
        detached(*runs)


def test_samples_with_anchors_of_their_own_cannot_be_gone_on_from(grown):
    with fs.forecasting(grown.stages[0], Reuse(), anchors=[0]) as first:
        handover = grown.after(first)
    handover.tap = "hidden"
    call = CallRecord(Step(0, 1.0, 2, (0, 1)), {"hidden": torch.zeros(4, 4, 5)}, starts=True)
    state = torch.zeros(3, 4, 48)  # two of three samples were computed
    with pytest.raises(ValueError, match="all samples have the same anchors"):
        handover.on_step(StepRecord(0, [1.0, 0.5], {}, state, state, state, [call]))


@pytest.mark.skipif(not GRIDS.exists(), reason="examples are not beside an installed wheel's tests")
def test_the_model_of_two_grids_draws_one_picture_on_both():
    """On 16 tokens it draws the average of what it draws on 64; the bundled model does not."""
    words = ["red apple", "sunflower", "full moon symbol", "soccer ball"]
    errors = {}
    for name in (str(GRIDS), "zoo:emoji_flux"):
        pipe = fs.load_pipeline(name)
        coarse = ProgressivePipeline(pipe, [0.0005]).stages[0]  # all steps but one
        coarse.scheduler = pipe.scheduler
        field = noise_field(range(4), 3, 32, 32)
        call = {"num_inference_steps": 6, "output_type": "latent"}
        large = unpack(pipe(words, latents=pack(field, 4), **call).images, 4)
        small = unpack(coarse(words, latents=pack(haar(field)[:, 0], 4), **call).images, 4)
        gap = small - nn.functional.avg_pool2d(large, 2)
        errors[name] = float(gap.square().mean())
    assert errors[str(GRIDS)] < 0.5 * errors["zoo:emoji_flux"]
