"""What users of caches complain about, tried on tiny real pipelines: see docs/faults.md."""

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from families import MORE, call
from tiny_hosts import (
    STEPS,
    bare_pipeline,
    items,
    pipeline,
    prompt,
    run,
    seeded,
    settings,
    spec_for,
)

from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.integration.forecasting import attach, forecasting
from foreseer.integration.host.clock import flow_sigmas
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.trajectories.recorder import record

pytestmark = pytest.mark.fault
ANCHORS = (0, 1, 4)


def forecast(host, pipe, predictor=None, **changes):
    with forecasting(pipe, predictor or Taylor(1), ANCHORS, changes.pop("tap", "output")):
        return run(host, pipe, **changes)


# ---- the stop button


def test_field_interrupt_leaves_nothing_for_the_next_picture():
    pipe = pipeline("flux")
    expected = forecast("flux", pipe)

    def stop(pipe, index, timestep, given):
        pipe._interrupt = index == 2
        return given

    with forecasting(pipe, Taylor(1), ANCHORS) as attached:
        run("flux", pipe, callback_on_step_end=stop)
        assert "broken off: 3 of 8 steps were begun" in str(attached.report())
        assert torch.equal(run("flux", pipe), expected)
        assert "broken off" not in str(attached.report())


# ---- in-place arithmetic


@pytest.mark.parametrize("predictor", [Reuse(), Taylor(1)])
@pytest.mark.parametrize("tap", ["output", "hidden", "residual"])
def test_field_inplace_arithmetic_on_the_prediction_does_not_reach_the_history(predictor, tap):
    found = []
    for in_place in (False, True):
        pipe = bare_pipeline(pipeline("dit"))
        x, labels = torch.ones(2, 1, 4, 4), torch.tensor([0, 2])
        with torch.no_grad(), forecasting(pipe, predictor, ANCHORS, tap):
            pipe.scheduler.set_timesteps(STEPS)
            for time in pipe.scheduler.timesteps:
                v = pipe.transformer(x, timestep=time.expand(2), class_labels=labels).sample
                v = v.mul_(0.5) if in_place else v * 0.5
                x = pipe.scheduler.step(v, time, x).prev_sample
        found.append(x)
    assert torch.equal(*found)


def test_field_inplace_changes_of_the_latents_by_a_callback_do_not_reach_the_history():
    def changed(in_place):
        def blend(pipe, index, timestep, given):
            latents = given["latents"]
            given["latents"] = latents.mul_(0.9) if in_place else latents * 0.9
            return given

        return blend

    pipe = pipeline("flux")
    one, other = (forecast("flux", pipe, callback_on_step_end=changed(b)) for b in (False, True))
    assert torch.equal(one, other)


# ---- gradients on


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_field_gradients_of_a_forecast_are_those_of_its_anchor(tap):
    pipe = bare_pipeline(pipeline("dit"))
    x, labels = torch.ones(2, 1, 4, 4), torch.tensor([0, 2])
    weight = pipe.transformer.transformer_blocks[0].attn1.to_q.weight
    found = []
    with forecasting(pipe, Reuse(), (0,), tap):
        pipe.scheduler.set_timesteps(STEPS)
        for time in pipe.scheduler.timesteps[:2]:
            v = pipe.transformer(x, timestep=torch.full((2,), 500.0), class_labels=labels).sample
            found.append(torch.autograd.grad(v.square().sum(), weight, retain_graph=True)[0])
            pipe.scheduler.step(v.detach(), time, x)
    assert found[0].any()
    torch.testing.assert_close(*found)


# ---- inference mode


@pytest.mark.parametrize("tap", ["output", "hidden", "residual"])
def test_field_inference_mode_draws_the_same_pictures(tap):
    pipe = pipeline("flux")
    expected = forecast("flux", pipe, tap=tap)
    with forecasting(pipe, Taylor(1), ANCHORS, tap):
        with torch.inference_mode():
            assert torch.equal(run("flux", pipe), expected)
        assert torch.equal(run("flux", pipe), expected)


def test_field_inference_mode_is_refused_while_recording(tmp_path):
    with torch.inference_mode(), pytest.raises(ValueError, match="record under torch.no_grad"):
        record(pipeline("flux"), items("flux", 1), tmp_path / "r", **settings("flux"))


# ---- another pipeline of the same parts


def test_field_parts_given_to_another_pipeline_are_plain_there():
    first = MORE["flux_img2img"].build()
    pipe = FluxPipeline(**{k: v for k, v in first.components.items()})
    pipe.set_progress_bar_config(disable=True)
    plain = run("flux", pipe)
    with forecasting(first, Taylor(1), ANCHORS) as attached:
        call(MORE["flux_img2img"], first)
        other = FluxPipeline.from_pipe(first)
        other.set_progress_bar_config(disable=True)
        assert torch.equal(run("flux", other), plain)
        assert attached.report().num_steps == 6  # of the pipeline attached to
    assert isinstance(first, FluxImg2ImgPipeline)


# ---- TeaCache and MagCache as their authors install them


@pytest.mark.parametrize("on_class", [True, False])
@pytest.mark.parametrize(
    ("attributes", "name"),
    [
        ({"enable_teacache": True, "cnt": 0, "num_steps": 8, "rel_l1_thresh": 0.4}, "TeaCache"),
        ({"magcache_thresh": 0.24, "cnt": 0, "K": 5, "mag_ratios": [1.0]}, "MagCache"),
    ],
)
def test_field_patched_forwards_of_other_caches_are_refused(attributes, name, on_class):
    pipe = pipeline("flux")
    own, patched = type(pipe.transformer), type("Patched", (FluxTransformer2DModel,), {})

    def patch():
        pipe.transformer.__class__ = patched
        for attribute, value in attributes.items():
            setattr(patched if on_class else pipe.transformer, attribute, value)

    with forecasting(pipe, Taylor(1), ANCHORS):
        patch()
        with pytest.raises(ValueError, match=f"already has a cache .{name}"):
            run("flux", pipe)
    with pytest.raises(ValueError, match="its own forward and attributes back"):
        attach(pipe, Taylor(1), ANCHORS)
    pipe.transformer.__class__ = own
    for attribute in () if on_class else attributes:
        delattr(pipe.transformer, attribute)
    with forecasting(pipe, Taylor(1), ANCHORS):
        run("flux", pipe)


def test_field_patched_by_a_teacache_that_is_off_is_no_cache():
    pipe = pipeline("flux")
    pipe.transformer.enable_teacache = False
    with forecasting(pipe, Taylor(1), ANCHORS):
        run("flux", pipe)


class Remembers(DiTTransformer2DModel):
    """A forward with a cache of its own: every second call returns what the one before did."""

    def forward(self, *args, **kwargs):
        kept, self.kept = getattr(self, "kept", None), None
        if kept is None:
            kept = self.kept = super().forward(*args, **kwargs)
        return kept


def test_field_patched_forward_that_nobody_knows_is_found_out_inside_of_the_network_only():
    pipe = pipeline("dit")
    pipe.transformer.__class__ = Remembers
    with pytest.raises(UnsupportedHost), forecasting(pipe, Taylor(1), ANCHORS, "hidden"):
        run("dit", pipe)
    pipe.transformer.kept = None
    with forecasting(pipe, Taylor(1), ANCHORS) as attached:
        run("dit", pipe)  # open: what it returns is taken for the network's
    assert attached.report().anchors == [*ANCHORS]


# ---- cast after attaching


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_field_recast_after_attaching_is_a_fresh_attachment(tap):
    pipe = pipeline("flux")
    words = {k: torch.cat([v, v]).bfloat16() for k, v in prompt(0).items()}
    with forecasting(pipe, Taylor(1), ANCHORS, tap):
        before = run("flux", pipe)
        pipe.to(torch.bfloat16)
        cast = run("flux", pipe, **words)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(forecast("flux", pipe, tap=tap, **words), cast)
    assert before.dtype == torch.float32


def test_field_recast_is_refused_by_a_predictor():
    pipe = pipeline("flux")
    words = {k: torch.cat([v, v]).bfloat16() for k, v in prompt(0).items()}
    with forecasting(pipe, turned(pipe, 8, 16)):
        pipe.to(torch.bfloat16)
        with pytest.raises(PredictorMismatch, match="float32 features, this run makes bfloat16"):
            run("flux", pipe, height=32, width=64, **words)


# ---- several runs in one call


class TwoChunks(PixelDiTPipeline):
    """Draws a second chunk after the first, as long videos are drawn."""

    @torch.no_grad()
    def __call__(self, class_labels, generator=None):
        chunks = []
        for chunk in range(2):
            latents, labels = self._initial(class_labels, generator, None), torch.tensor([0, 2])
            if chunk:
                latents = latents + chunks[0]
            self.scheduler.set_timesteps(8)
            for time in self.scheduler.timesteps:
                v = self.transformer(latents, time.expand(2), class_labels=labels).sample
                latents = self.scheduler.step(v, time, latents).prev_sample
            chunks.append(latents)
        return chunks


def test_field_chunks_of_a_long_video_are_runs_of_their_own():
    first = pipeline("dit")
    pipe = TwoChunks(first.transformer, first.scheduler)
    calls = []
    pipe.transformer.proj_out_2.register_forward_hook(lambda *_: calls.append(0))
    with forecasting(pipe, Taylor(1), ANCHORS) as attached:
        chunks = pipe([0, 2], seeded())
        assert len(calls) == 6
        assert attached.report().num_steps == 8
    one = PixelDiTPipeline(first.transformer, first.scheduler)
    one.set_progress_bar_config(disable=True)
    with forecasting(one, Taylor(1), ANCHORS):
        alone = one([0, 2], 1.0, 8, seeded(), output_type="latent").images
    assert torch.equal(chunks[0], alone)


# ---- fewer steps than the anchors were made for


def test_field_fewer_steps_than_the_anchors_need_are_refused():
    pipe = pipeline("flux")
    with forecasting(pipe, Taylor(1), ANCHORS) as attached:
        run("flux", pipe)
        with pytest.raises(ValueError, match="the last anchor is step 4, but the run has 4 steps"):
            run("flux", pipe, num_inference_steps=4)
        assert not attached.report().anchors
        run("flux", pipe)


# ---- another shape with as many tokens


def turned(pipe, *latent_shape):
    """A predictor that was fitted on pictures twice as wide as high."""
    run("flux", pipe, height=32, width=64)
    predictor, sigmas = L2P(8, ANCHORS, 1), tuple(flow_sigmas(pipe.scheduler))
    more = {"sigmas": sigmas, "latent_shapes": (latent_shape,), "guidance_scale": 3.5}
    predictor.spec = spec_for(pipe, num_branches=1, **more)
    return predictor


def test_field_turned_pictures_of_as_many_tokens_are_not_told_apart_where_latents_are_packed():
    pipe = pipeline("flux")
    with forecasting(pipe, turned(pipe, 8, 16)) as attached:
        run("flux", pipe, height=64, width=32)  # open: FLUX packs both into 8 tokens
        assert attached.report().anchors == [*ANCHORS]
        with pytest.raises(PredictorMismatch, match="another resolution or length"):
            run("flux", pipe, height=64, width=64)


def test_field_turned_pictures_are_forecast_by_formulas_like_any_others():
    pipe = pipeline("flux")
    with forecasting(pipe, Taylor(1), ANCHORS):
        run("flux", pipe, height=32, width=64)
        one = run("flux", pipe, height=64, width=32)
    assert torch.equal(one, forecast("flux", pipe, height=64, width=32))


# ---- tiles


def tiled(pipe, moving, predictor):
    """The two halves of a row of latents drawn apart; moving, they change places at each step."""
    labels, scheduler = torch.tensor([0]), pipe.scheduler
    x = torch.randn(1, 1, 4, 8, generator=seeded())
    with torch.no_grad(), forecasting(pipe, predictor, ANCHORS):
        scheduler.set_timesteps(STEPS)
        for index, time in enumerate(scheduler.timesteps):
            v = torch.empty_like(x)
            for place in (4, 0) if moving and index % 2 else (0, 4):
                tile = x[..., place : place + 4]
                made = pipe.transformer(tile, timestep=time.expand(1), class_labels=labels).sample
                v[..., place : place + 4] = made
            x = scheduler.step(v, time, x).prev_sample
    return x


def test_field_tiles_that_stay_are_forecast_each_from_its_own_past():
    pipe = bare_pipeline(pipeline("dit"))
    both = tiled(pipe, False, Taylor(1))
    labels, alone = torch.tensor([0]), torch.randn(1, 1, 4, 8, generator=seeded())[..., 4:]
    with torch.no_grad(), forecasting(pipe, Taylor(1), ANCHORS):
        pipe.scheduler.set_timesteps(STEPS)
        for time in pipe.scheduler.timesteps:
            v = pipe.transformer(alone, timestep=time.expand(1), class_labels=labels).sample
            alone = pipe.scheduler.step(v, time, alone).prev_sample
    torch.testing.assert_close(both[..., 4:], alone)


def test_field_tiles_are_refused_by_a_predictor_that_was_fitted_without():
    pipe = pipeline("dit")
    predictor = L2P(8, ANCHORS, 2)
    predictor.spec = spec_for(pipe, num_branches=1, guidance_scale=1.0)
    with pytest.raises(PredictorMismatch, match=r"fitted with 1 guidance branch\(es\)"):
        tiled(bare_pipeline(pipe), False, predictor)


def test_field_tiles_that_change_places_are_taken_for_each_other():
    pipe = bare_pipeline(pipeline("dit"))
    still, moved = (tiled(pipe, moving, Reuse()) for moving in (False, True))
    assert not torch.allclose(still, moved)  # open: a call is known by its place in the step


# ---- fused projections


def test_field_fused_projections_are_other_weights_to_a_predictor():
    pipe = pipeline("flux")
    predictor = turned(pipe, 8, 16)
    pipe.transformer.fuse_qkv_projections()
    assert host_fingerprint(pipe.transformer) != predictor.spec.host
    with pytest.raises(PredictorMismatch, match="another host"):
        attach(pipe, predictor)
    for tap in ("output", "hidden"):
        with forecasting(pipe, Taylor(1), ANCHORS, tap) as attached:
            run("flux", pipe)
        assert attached.report().anchors == [*ANCHORS]
