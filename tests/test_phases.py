"""A phase is a run of its own: inversions, whose flow time rises, beside runs that come down."""

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from module_hosts import CHANNELS, TOKENS, ActionHead, euler, observation, seeded
from row_cases import tabulate

import foreseer as fs
from foreseer.evaluation.rows import adams_bashforth_rows
from foreseer.evaluation.solvers import solver_scheduler
from foreseer.integration.host.call import retold
from foreseer.integration.host.loop import read_times
from foreseer.predictors.ladder import with_end
from foreseer.predictors.rules import RULES
from foreseer.training.lesa.lesa_samples import open_features
from foreseer.training.readout.walk import later_times
from foreseer.trajectories.gram import accumulated_error

UP = [i / 10 for i in range(10)]
ANCHORS = [0, 1, 4, 7]


def inverting(net, **settings):
    """A host of a loop from samples to noise."""
    host = fs.host(net, **settings)

    def sample(inputs, generator):
        x = randn_tensor((len(inputs["observation"]), TOKENS, CHANNELS), generator=generator)
        with host.steps(UP, inversion=True) as steps:
            for t in steps:
                x = x + 0.1 * net(x, t, inputs["observation"])
        return x

    host.sample = sample
    return host


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("phases") / "recording")
    inputs = [observation(seed) for seed in range(24)]
    return fs.record(inverting(ActionHead()), inputs, folder, features="full")


def test_times_of_an_inversion_are_flow_time_that_rises():
    host = fs.host(ActionHead())
    assert host.steps(UP, inversion=True).sigmas == UP
    assert host.steps(UP).sigmas == [1 - t for t in UP]
    assert host.steps(4, inversion=True).sigmas == [0, 0.25, 0.5, 0.75]
    assert host.steps([1.0, 0.5], inversion=True).sigmas == [0.0, 0.5]


def test_two_phases_in_one_list_are_told_apart_in_words():
    with pytest.raises(ValueError, match="first 4 of these 6 go one way .* runs of their own"):
        read_times([0.0, 0.3, 0.6, 0.9, 0.5, 0.1])
    with pytest.raises(ValueError, match="falling in") as told:
        read_times([0.0, 0.3, 0.2, 0.4, 0.1])
    assert "go one way" not in str(told.value)


@pytest.mark.parametrize("name", RULES)
def test_every_formula_weighs_an_inversion_as_the_run_that_mirrors_it(name):
    grid = [(1 - s / 20) ** 1.5 for s in range(20)]
    down = tabulate(RULES[name], [0, 1, 4, 9, 13], grid)
    up = tabulate(RULES[name], [0, 1, 4, 9, 13], [1 - sigma for sigma in grid])
    torch.testing.assert_close(up, down, rtol=1e-9, atol=1e-9)


def test_an_inversion_ends_at_flow_time_1():
    assert with_end([0.0, 0.5]) == [0.0, 0.5, 1.0] and with_end([1.0, 0.5]) == [1.0, 0.5, 0.0]
    assert later_times([0.0, 0.4, 0.8], 3) == pytest.approx([0.1, 0.2, 0.3])
    ab2 = adams_bashforth_rows([0, 1, 4], [1 - t for t in UP])
    torch.testing.assert_close(adams_bashforth_rows([0, 1, 4], UP), ab2)
    gram, reuse = torch.eye(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    reuse[:, 0] = 1
    up, down = [0.0, 0.2, 0.3, 0.7], [1.0, 0.8, 0.7, 0.3]
    found = [accumulated_error(gram, reuse, sigmas) for sigmas in (up, down)]
    torch.testing.assert_close(found[0], found[1])


def test_what_is_recorded_says_that_flow_time_rises(recording):
    assert recording.header.sigmas == UP
    states = recording.load(3)["states"]
    net, x = ActionHead(), randn_tensor((1, TOKENS, CHANNELS), generator=seeded(3))
    assert torch.equal(states[0], x[0])
    with torch.no_grad():
        x = x + 0.1 * net(x, 0.0, observation(3)["observation"])
    torch.testing.assert_close(states[1], x[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["lstsq", "closed_loop", "readout", "continuous"])
def test_fits_on_inversions_beat_reuse_and_keep_to_their_phase(recording, tmp_path, method):
    net = ActionHead()
    host = inverting(net)
    given = {} if method in ("lstsq", "continuous") else {"pipeline": host}
    tap = {} if method == "readout" else {"tap": "output"}
    fitted = fs.fit(recording, anchors=ANCHORS, method=method, **tap, **given)
    fitted = fs.load(str(fs.save(fitted, str(tmp_path / "fitted"))))
    assert list(fitted.spec.sigmas) == UP

    inputs, errors = observation(30, 4), {}
    full = host(generator=seeded(30), **inputs)[0]
    for name, predictor in {"fitted": fitted, "reuse": fs.predictors.Reuse()}.items():
        with fs.forecasting(host, predictor, ANCHORS) as run:
            found = host(generator=seeded(30), **inputs)[0]
        assert run.report().anchors == ANCHORS
        errors[name] = float((found - full).norm())
    assert errors["fitted"] < 0.8 * errors["reuse"]

    with fs.forecasting(host, fitted) as run, pytest.raises(fs.PredictorMismatch) as told:
        with run.steps([1 - t for t in UP]) as steps:
            euler(net, inputs, seeded(30), steps)
    words = "two phases" if method != "continuous" else "has sigma 1.0000, expected 0.0000"
    assert words in str(told.value)


def test_anchors_are_searched_for_an_inversion(recording):
    fitted = fs.fit(recording, evaluations=4, method="lstsq", tap="output")
    assert len(fitted.spec.anchors) == 4 and fitted.spec.anchors[0] == 0


def test_fits_for_runs_from_noise_refuse_inversions_in_words(recording):
    with pytest.raises(ValueError, match="in its 10 steps flow time rises from 0 to 0.9"):
        open_features(str(recording.folder), "output")
    with pytest.raises(ValueError, match="Of an inversion"):
        solver_scheduler("euler", UP)


def test_no_other_time_is_told_where_every_form_of_it_is_0():
    with pytest.raises(fs.UnsupportedHost, match="first_times=0"):
        retold(torch.zeros(2), 0.0, 0.1)
    assert float(retold(torch.tensor([0.25]), 0.25, 0.5)) == 0.5


def test_an_inversion_that_breaks_off_leaves_nothing_behind():
    net = ActionHead()
    host = inverting(net)
    inputs = observation(5, 2)
    with fs.forecasting(host, fs.predictors.Taylor(1), ANCHORS):
        expected = host(generator=seeded(1), **inputs)[0]
    with fs.forecasting(host, fs.predictors.Taylor(1), ANCHORS) as run:
        with pytest.raises(RuntimeError, match="midway"), run.steps(UP, inversion=True) as steps:
            for index, t in enumerate(steps):
                net(torch.ones(2, TOKENS, CHANNELS), t, inputs["observation"])
                if index == 5:
                    raise RuntimeError("midway")
        assert "broken off: 6 of 10 steps were begun" in str(run.report())
        left = run.steps(UP, inversion=True)
        left.__enter__()
        with pytest.raises(ValueError, match="open already"), host.steps(UP):
            pass
        left.__exit__(None, None, None)
        assert torch.equal(host(generator=seeded(1), **inputs)[0], expected)
