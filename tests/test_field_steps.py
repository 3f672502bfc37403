"""A run whose steps the clock cannot see is refused, and the report counts what really ran."""

import contextlib
import copy

import pytest
import torch
from families import call
from field_pipelines import FORCING
from tiny_hosts import STEPS, bare_pipeline, pipeline, run

from foreseer.integration.forecasting import attach, forecasting
from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.trajectories.prompts import Item
from foreseer.trajectories.recorder import record

pytestmark = pytest.mark.fault
ANCHORS = (0, 1, 4)
ELSEWHERE = "made no step between: the steps are made elsewhere"


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_field_steps_of_copies_of_the_scheduler_are_refused(tap):
    pipe = FORCING.build()
    plain = call(FORCING, pipe, (0,))
    with forecasting(pipe, Taylor(1), ANCHORS, tap) as attached:
        with pytest.raises(ValueError, match=ELSEWHERE):
            call(FORCING, pipe, (0,))
        assert not attached.session._pending and attached.report().forecasts == []
        assert "broken off: 1 of 8 steps were begun" in str(attached.report())
    assert torch.equal(call(FORCING, pipe, (0,)), plain)


def test_field_steps_of_copies_are_not_recorded(tmp_path):
    item = Item(0, 0, FORCING.inputs(0))
    with pytest.raises(ValueError, match=ELSEWHERE):
        record(FORCING.build(), [item], tmp_path / "r", batch_size=1, **FORCING.settings)
    assert not (tmp_path / "r").exists()


class StepsACopy(PixelDiTPipeline):
    """Copies the scheduler before the first thing it does with it."""

    @torch.no_grad()
    def __call__(self, class_labels, num_inference_steps=8, generator=None, output_type=""):
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps)
        latents, labels = self._initial(class_labels, generator, None), torch.tensor(class_labels)
        for time in scheduler.timesteps:
            v = self.transformer(latents, time.expand(len(latents)), labels).sample
            latents = scheduler.step(v, time, latents).prev_sample
        return latents


def test_field_steps_of_a_copy_made_at_the_very_start_are_refused():
    first = pipeline("dit")
    pipe = StepsACopy(first.transformer, first.scheduler)
    plain = pipe([0, 2], generator=torch.Generator().manual_seed(0))
    with forecasting(pipe, Taylor(1), ANCHORS) as attached:
        with pytest.raises(ValueError, match=ELSEWHERE):
            pipe([0, 2])
        assert attached.report().num_steps == 0
    assert torch.equal(pipe([0, 2], generator=torch.Generator().manual_seed(0)), plain)


@pytest.mark.parametrize("ticks", [0, 1, 3])
@pytest.mark.parametrize("positional", [False, True])
def test_field_steps_by_hand_without_the_scheduler_are_refused(ticks, positional):
    pipe = bare_pipeline(pipeline("dit"))
    x, labels = torch.randn(2, 1, 4, 4), torch.tensor([0, 2])
    attached = attach(pipe, Taylor(1), ANCHORS)
    pipe.scheduler.set_timesteps(STEPS)

    def euler():
        x_t = x
        for index, time in enumerate(pipe.scheduler.timesteps):
            times = time.expand(2)
            if positional:
                v = pipe.transformer(x_t, times, labels).sample
            else:
                v = pipe.transformer(x_t, timestep=times, class_labels=labels).sample
            if index < ticks:
                x_t = pipe.scheduler.step(v, time, x_t).prev_sample
            else:
                x_t = x_t - v / STEPS

    with torch.no_grad(), pytest.raises(ValueError, match=ELSEWHERE):
        euler()
    attached.detach()


def test_field_steps_several_calls_of_one_time_are_counted():
    pipe = pipeline("flux_two_calls")
    with forecasting(pipe, Taylor(1), ANCHORS) as attached:
        run(
            "flux_two_calls",
            pipe,
            **{"negative_prompt_embeds": torch.ones(2, 3, 12)}
            | {"negative_pooled_prompt_embeds": torch.ones(2, 12)},
        )
    text = str(attached.report())
    assert text.startswith("5 of 8 steps forecast: 2.7 x fewer evaluations")
    assert "calls of the network: 6 computed, 10 forecast" in text and "broken off" not in text


def test_field_steps_a_call_by_hand_after_a_run_broken_off_is_the_hosts_own():
    pipe = pipeline("flux")
    seen: list[dict] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    run("flux", pipe)
    handle.remove()
    by_hand = {**seen[-1], "return_dict": True}

    def stop(pipe, index, timestep, given):
        if index == 2:
            raise KeyboardInterrupt
        return given

    with torch.no_grad():
        plain = pipe.transformer(**by_hand).sample
        with forecasting(pipe, Reuse(), (0,)):
            with contextlib.suppress(KeyboardInterrupt):  # whose traceback nobody holds
                run("flux", pipe, callback_on_step_end=stop)
            assert torch.equal(pipe.transformer(**by_hand).sample, plain)
