"""The network may be told another time at step 0, in every host's own form; a fit finds it."""

import functools
import json

import pytest
import torch
from families import FAMILIES, MORE
from readout_cases import fit, module_of, recorded
from tiny_hosts import STEPS, items, pipeline, run, settings, spec_for

from foreseer.checkpoints.format import load_predictor, save_predictor
from foreseer.errors import UnsupportedHost
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.host import call
from foreseer.integration.host.call import retold
from foreseer.integration.session import Session
from foreseer.predictors.linear import L2P
from foreseer.predictors.readout import Readout
from foreseer.training.readout.readout_fit import ReadoutFit
from foreseer.training.readout.walk import check_times, later_times

ANCHORS = (0, 2, 5)
EVERY = FAMILIES | MORE


@pytest.mark.parametrize(
    ("time", "sigma", "expected"),
    [
        (torch.tensor([1000.0, 1000.0]), 1.0, [900.0, 900.0]),
        (torch.tensor([0.75]), 0.75, [0.9]),
        (torch.tensor([0.0]), 1.0, [0.1]),  # Lumina 2 and Z-Image count the other way
        (torch.tensor([999]), 0.999999, [900]),  # UniPC's are whole
        (torch.tensor([0]), 1.0, [100]),  # whole ones are never between 0 and 1
        (torch.tensor([0.0, 1000.0]), 1.0, [0.0, 900.0]),  # a frame that is given
        (torch.tensor([1.0], dtype=torch.bfloat16), 1.0, [0.8984375]),
    ],
)
def test_a_time_is_told_in_the_form_of_the_host(time, sigma, expected):
    found = retold(time, sigma, 0.9)
    assert found.dtype == time.dtype and found.shape == time.shape
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), atol=1e-4, rtol=0)


def test_a_time_in_no_known_form_is_refused():
    with pytest.raises(UnsupportedHost, match="is told 7 at flow time 1, expected one of sigma"):
        retold(torch.tensor([7.0]), 1.0, 0.9)


def told_to(monkeypatch, transformer):
    """Keep the times that a network is told."""
    times: list[float] = []
    own = type(transformer).forward

    def forward(self, *args, **kwargs):
        found = next((kwargs[name] for name in ("timestep", "t") if name in kwargs), None)
        times.append(float((args[1] if found is None else found).flatten()[0]))
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(transformer), "forward", functools.wraps(own)(forward))
    return times


def test_a_time_that_is_a_number_is_told_as_one():
    class Net(torch.nn.Module):
        def forward(self, x, t):
            return t

    net = Net()
    for own, told in ((1.0, 0.9), (1000, 900), (0.0, 0.1)):
        found = call.Call(net, net.forward, (torch.ones(1), own), {}).at_time(1.0, 0.9).run()
        assert type(found) is type(own) and found == pytest.approx(told)


@pytest.mark.parametrize("name", ["cogview4", "mochi", "wan", "sd3_img2img"])
def test_times_are_told_where_timesteps_are_a_form_of_sigma(name):
    family, pipe = EVERY[name], EVERY[name].build()
    sigmas: list[float] = []
    session = Session(pipe)
    session._begin, begin = lambda: (begin(), sigmas.extend(session._sigmas)), session._begin
    pipe(**family.inputs(0), **family.settings, output_type="latent")
    session.detach()
    refused = {
        "cogview4": "timesteps are no form of sigma here",
        "mochi": "at flow time 0, .* the same number",  # counts from 0, and so do its timesteps
    }
    if name in refused:
        with pytest.raises(UnsupportedHost, match=refused[name]):
            check_times(pipe.scheduler, sigmas)
    else:
        check_times(pipe.scheduler, sigmas)


@pytest.mark.parametrize("name", ["flux_cfg", "sd3", "zimage"])
def test_step_0_alone_is_told_the_first_time(name, monkeypatch):
    family, pipe = EVERY[name], EVERY[name].build()
    times, runs = told_to(monkeypatch, pipe.transformer), {}
    for first_time in (None, 0.9):
        times.clear()
        rows = L2P(family.settings["num_inference_steps"], ANCHORS, 2, first_time=first_time)
        session = Session(pipe, Forecaster(rows, "output", ANCHORS))
        pipe(**family.inputs(0), **family.settings, output_type="latent")
        session.detach()
        assert session.report.anchors == list(ANCHORS)
        runs[first_time] = list(times)
    own, moved = runs.values()
    step = len(own) // len(ANCHORS)
    expected = {1000.0: 900.0, 1.0: 0.9, 0.0: 0.1}[own[0]]
    assert moved[0] == pytest.approx(expected, rel=1e-5) and moved[step:] == own[step:]
    assert moved[:step] == [moved[0]] * step


@pytest.mark.parametrize("host", ["dit_guided", "flux_embedded"])
def test_a_step_told_its_own_time_is_as_before_bit_for_bit(host):
    pipe, latents = pipeline(host), {}
    for first_time in (None, 1.0, 0.9):
        branches = 1 if host == "flux_embedded" else 2
        rows = L2P(STEPS, ANCHORS, branches, first_time=first_time)
        session = Session(pipe, Forecaster(rows, "output", ANCHORS))
        latents[first_time] = run(host, pipe)
        session.detach()
    assert torch.equal(latents[1.0], latents[None])
    assert not torch.equal(latents[0.9], latents[None])


@pytest.mark.parametrize("cls", [L2P, Readout])
def test_a_first_time_is_kept_in_the_file(cls, tmp_path):
    pipe = pipeline("dit_guided")
    predictor = cls(STEPS, ANCHORS, 2, first_time=0.875)
    folder = save_predictor(predictor, spec_for(pipe, anchors=ANCHORS), tmp_path / "p")
    assert json.loads((folder / "config.json").read_text())["arguments"]["first_time"] == 0.875
    assert load_predictor(folder).first_time == 0.875
    for wrong in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="expected a flow time in"):
            cls(STEPS, ANCHORS, first_time=wrong)


def test_the_times_tried_lie_between_the_step_and_the_next():
    assert later_times([1.0, 0.8, 0.5, 0.25], 3) == pytest.approx([0.95, 0.9, 0.85])
    assert later_times([1.0], 1) == [0.5]  # to the end of the run
    assert later_times([1.0, 0.5], 0) == []


def test_a_fit_tells_step_0_what_leaves_the_least_error(tmp_path, monkeypatch):
    pipe = pipeline("dit_guided")
    recording = recorded(pipe, items("dit_guided", 6), tmp_path / "r", settings("dit_guided"))
    module = module_of(recording, pipe, first_times=3)
    measured, error_told = {}, ReadoutFit._error_told

    def measure(self, told, few, end):
        measured[told] = error_told(self, told, few, end)
        return measured[told]

    monkeypatch.setattr(ReadoutFit, "_error_told", measure)
    predictor = fit(module).deployed()
    times = later_times(module.recording.header.sigmas, 3)
    tried = list(measured)
    assert tried[:4] == [None, *times] and len(set(measured.values())) == len(tried)
    first = min(tried[:4], key=measured.__getitem__)
    gap = (times[0] - times[1]) / 2
    beside = [] if first is None else [first - gap, first + gap]
    assert tried[4:] == pytest.approx(beside)
    assert predictor.first_time == min(tried, key=measured.__getitem__)
    measured.clear()
    assert fit(module_of(recording, pipe, first_times=0)).deployed().first_time is None
    assert not measured


def test_a_host_that_is_told_time_in_another_form_keeps_its_own(tmp_path, monkeypatch, capsys):
    pipe = pipeline("dit_guided")
    recording = recorded(pipe, items("dit_guided", 6), tmp_path / "r", settings("dit_guided"))
    monkeypatch.setattr(call, "TIME_FORMS", ((7.0, 1.0),))
    module = fit(module_of(recording, pipe))
    assert module.deployed().first_time is None and bool(module.finished)
    assert "step 0 keeps its own time: the network is told 1000 at" in capsys.readouterr().out
