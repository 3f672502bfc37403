"""What is exchanged in a pipeline after attaching is refused, and no report is of another call."""

import functools

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from families import FAMILIES, MORE, call
from field_pipelines import IDEOGRAM
from tiny_hosts import items, pipeline, run, settings, spec_for, tiny_dit, tiny_flux

from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.integration.forecasting import forecasting
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import Taylor
from foreseer.trajectories.recorder import record

pytestmark = pytest.mark.fault
ANCHORS = (0, 1, 4)
EXCHANGED = "{} was exchanged since attaching; detach and attach again"


def other_scheduler(pipe):
    return FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)


@pytest.mark.parametrize("host", ["dit", "flux_two_calls"])
def test_field_exchange_of_the_scheduler_is_refused(host):
    pipe = pipeline(host)
    plain = run(host, pipe)
    with forecasting(pipe, Taylor(1), ANCHORS) as attached:
        forecast, own = run(host, pipe), pipe.scheduler
        pipe.scheduler = other_scheduler(pipe)
        with pytest.raises(ValueError, match=EXCHANGED.format("scheduler")):
            run(host, pipe)
        assert attached.report().num_steps == 0 and not attached.report().anchors
        pipe.scheduler = own
        assert torch.equal(run(host, pipe), forecast) and attached.report().num_steps == 8
        pipe.scheduler = other_scheduler(pipe)
    assert torch.equal(run(host, pipe), plain)


def test_field_exchange_of_the_scheduler_is_refused_while_recording(tmp_path):
    pipe = pipeline("flux")

    def exchange(*_):
        pipe.scheduler = other_scheduler(pipe)
        pipe.scheduler.set_timesteps(8, mu=0.5)

    pipe.transformer.proj_out.register_forward_hook(exchange)
    with pytest.raises(ValueError, match=EXCHANGED.format("scheduler")):
        record(pipe, items("flux"), tmp_path / "r", **settings("flux"))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("what", ["scheduler", "transformer"])
@pytest.mark.parametrize("after", [0, 3, 4])
def test_field_exchange_in_mid_run_is_refused(what, after):
    pipe = pipeline("flux")
    plain, own = run("flux", pipe), getattr(pipe, what)

    def exchange(pipe, index, timestep, given):
        if index == after:
            setattr(pipe, what, other_scheduler(pipe) if what == "scheduler" else tiny_flux())
        return given

    with forecasting(pipe, Taylor(1), ANCHORS):
        with pytest.raises(ValueError, match=EXCHANGED.format(what)):
            run("flux", pipe, callback_on_step_end=exchange)
    setattr(pipe, what, own)
    assert torch.equal(run("flux", pipe), plain)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (FAMILIES["wan22"], "transformer_2"),
        (IDEOGRAM, "unconditional_transformer"),
        (MORE["flux_controlnet"], "controlnet"),
    ],
)
def test_field_exchange_of_a_second_network_is_refused(family, name):
    pipe, other = family.build(), family.build()
    with forecasting(pipe, Taylor(1), ANCHORS):
        call(family, pipe)
        setattr(pipe, name, getattr(other, name))
        with pytest.raises(ValueError, match=EXCHANGED.format(name)):
            call(family, pipe)
    call(family, pipe)


def test_field_exchange_of_everything_is_told_by_the_report():
    pipe = pipeline("dit")
    with forecasting(pipe, Taylor(1), ANCHORS) as attached:
        run("dit", pipe)
        pipe.transformer, pipe.scheduler = tiny_dit(), other_scheduler(pipe)
        run("dit", pipe)  # nothing of it can be seen
        with pytest.raises(ValueError, match=EXCHANGED.format("transformer")):
            attached.report()
    assert attached.report().num_steps == 8  # of the latest run that was seen


def test_field_exchange_of_the_forward_is_refused():
    pipe = pipeline("dit")
    with forecasting(pipe, Taylor(1), ANCHORS):
        pipe.transformer.forward = functools.partial(
            type(pipe.transformer).forward, pipe.transformer
        )
        with pytest.raises(ValueError, match="step 0 is over without a call of transformer"):
            run("dit", pipe)
    del pipe.transformer.forward


def test_field_exchange_of_the_weights_leaves_no_report_of_the_run_before():
    pipe = pipeline("dit_guided")
    predictor = L2P(8, ANCHORS, 2)
    predictor.spec = spec_for(pipe)
    with forecasting(pipe, predictor) as attached:
        run("dit_guided", pipe)
        assert attached.report().num_steps == 8
        pipe.transformer.proj_out_2.weight.data.mul_(2)
        with pytest.raises(PredictorMismatch, match="weights"):
            run("dit_guided", pipe)
        assert not attached.report().anchors and not attached.report().forecasts
