"""What changes shape in mid-run is computed there, not forecast from what it was."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from families import FAMILIES, call
from tiny_hosts import bare_pipeline, pipeline, seeded, spec_for
from torch.nn import functional

from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.integration.forecasting import forecasting
from foreseer.integration.session import Session
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.schedules import FirstBlock, SpeCa, TeaCache
from foreseer.trajectories.collector import Recorder

pytestmark = [pytest.mark.fault, pytest.mark.filterwarnings("ignore:SpeCa")]
ANCHORS = (0, 1, 6)
CHANGED = 3  # the first step of the new shape
TAPS = ("output", "hidden", "residual")


def changing(change: Any, pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> Any:
    if index == CHANGED - 1:
        kwargs["latents"] = change(kwargs["latents"])
    return kwargs


def dropped(latents: torch.Tensor) -> torch.Tensor:
    """The first and the last frame, as temporal reasoning keeps them."""
    return latents[:, :, [0, -1]]


def spread(latents: torch.Tensor) -> torch.Tensor:
    """A still as three frames, to which the still's velocity broadcasts."""
    return latents + 0.5 * torch.randn(2, 4, 3, 4, 4, generator=seeded(1))


def grown(latents: torch.Tensor) -> torch.Tensor:
    """Twice the resolution."""
    return functional.interpolate(latents, scale_factor=2)


CHANGES = {
    "frames dropped": ("wan", dropped, {"num_frames": 13}),
    "one frame to three": ("wan", spread, {"num_frames": 1}),
    "resolution doubled": ("sd3", grown, {}),
}


def changed(name: str, pipe: Any) -> torch.Tensor:
    slot, change, settings = CHANGES[name]
    callback = functools.partial(changing, change)
    return call(FAMILIES[slot], pipe, callback_on_step_end=callback, **settings)


def build(name: str) -> Any:
    """The pipeline of a change, under a sampler that itself keeps nothing of earlier steps."""
    pipe = FAMILIES[CHANGES[name][0]].build()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipe


@pytest.mark.parametrize("predictor", [Reuse(), Taylor(1)])
@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("name", CHANGES)
def test_field_shapes_latents_of_another_shape_are_computed(name, tap, predictor):
    pipe = build(name)
    with forecasting(pipe, predictor, ANCHORS, tap) as run:
        found = changed(name, pipe)
    assert run.report().anchors == [0, 1, CHANGED, 6]
    with forecasting(pipe, predictor, (0, 1, CHANGED, 6), tap):
        assert torch.equal(changed(name, pipe), found)


@pytest.mark.parametrize(
    "schedule", [TeaCache(1e9), FirstBlock(1e9), SpeCa(1e9), SpeCa(0.0), SpeCa(1e9, max_run=2)]
)
@pytest.mark.parametrize("name", CHANGES)
def test_field_shapes_schedules_start_over_at_another_shape(name, schedule):
    pipe = build(name)
    with forecasting(pipe, Reuse(), schedule=schedule) as run:
        assert changed(name, pipe).isfinite().all()
    assert CHANGED in run.report().anchors
    assert run.report().forecasts or schedule.threshold == 0


@pytest.mark.parametrize("schedule", [TeaCache(1e9), FirstBlock(1e9)])
def test_field_shapes_guidance_that_stops_early_in_one_call(schedule):
    family = FAMILIES["zimage"]
    pipe = family.build()
    with forecasting(pipe, Reuse(), schedule=schedule) as run:
        found = call(family, pipe, guidance_scale=3.0, cfg_truncation=0.35)
    assert found.isfinite().all()
    assert run.report().forecasts


@pytest.mark.parametrize("schedule", [SpeCa(1e9), SpeCa(0.0), SpeCa(0.05), FirstBlock(1e9)])
def test_field_shapes_a_branch_that_joins_in_mid_run(schedule):
    pipe = FAMILIES["sd3"].build()
    skipped = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.3}
    with forecasting(pipe, Reuse(), schedule=schedule) as run:
        found = call(FAMILIES["sd3"], pipe, skip_layer_guidance_stop=0.7, **skipped)
    assert found.isfinite().all()
    assert run.report().num_steps == 8


def test_field_shapes_a_batch_that_grows_under_speca():
    pipe = bare_pipeline(pipeline("dit"))
    rows = [1, 1, 1, 3, 3, 2, 2, 2]
    with forecasting(pipe, Reuse(), schedule=SpeCa(1e9, max_run=2)) as run, torch.no_grad():
        pipe.scheduler.set_timesteps(len(rows))
        x_t, label = torch.randn(1, 1, 4, 4, generator=seeded()), torch.tensor([0, 1, 2])
        for count, timestep in zip(rows, pipe.scheduler.timesteps, strict=True):
            x_t = x_t.expand(count, -1, -1, -1) if len(x_t) < count else x_t[:count]
            v = pipe.transformer(x_t, timestep.expand(count), label[:count]).sample
            x_t = pipe.scheduler.step(v, timestep, x_t, return_dict=False)[0]
    assert {0, 3, 5} <= set(run.report().anchors)


def test_field_shapes_a_learned_predictor_refuses_another_resolution_in_mid_run():
    family = FAMILIES["sd3"]
    pipe = family.build()
    predictor = L2P(8, ANCHORS, 2)
    predictor.spec = dataclasses.replace(
        spec_for(pipe, anchors=ANCHORS, guidance_scale=family.settings["guidance_scale"]),
        latent_shapes=((4, 4, 4),),
    )
    with forecasting(pipe, predictor):
        call(family, pipe)
        with pytest.raises(PredictorMismatch, match="fitted on latents of 4x4x4, this run has 4x8"):
            changed("resolution doubled", pipe)


@pytest.mark.parametrize("name", CHANGES)
def test_field_shapes_are_not_recorded_when_they_change(name):
    pipe = build(name)
    session = Session(pipe, observers=[Recorder(["output"])])
    with pytest.raises(ValueError, match=r"the output of branch 0 changed shape .* at step 3"):
        changed(name, pipe)
    session.detach()
