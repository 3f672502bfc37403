"""The closed form deployed is pykan's layer, and using pykan leaves no trace in the process."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lesa_cases import SIGMAS, history_on, lesa, lesa_values, randomize, seeded, step_at
from tiny_hosts import pipeline, spec_for

from foreseer.checkpoints.config import CheckpointError
from foreseer.checkpoints.format import load_predictor, save_predictor
from foreseer.predictors import kan
from foreseer.predictors.gates import SplineNet, six_cubic_splines
from foreseer.predictors.kan import PykanNet, difference, splines_of, with_pykan, without_pykan

TOLERANCE = 1e-5


def run_python(code: str, cwd) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------ adapter = export = reload


@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    grid_size=st.integers(1, 12),
    grid_range=st.floats(0.1, 10.0),
    size=st.floats(0.01, 1.0),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=40)
def test_the_closed_form_is_pykans_on_any_weights_grid_and_dtype(
    widths, grid_size, grid_range, size, dtype, seed
):
    if dtype == torch.float32:  # steep curves on curves multiply the rounding of both forms
        widths = widths[:2]
    net = PykanNet(widths, grid_size, grid_range).to(dtype)
    randomize(net, size, seed)
    splines = splines_of(net)
    assert difference(net, splines) <= TOLERANCE
    x = (2 * grid_range * torch.randn(50, widths[0], generator=seeded(seed))).to(dtype)
    assert splines(x).dtype == dtype
    again = SplineNet(widths, grid_size, grid_range).to(dtype)
    again.load_state_dict(splines.state_dict())
    assert torch.equal(again(x), splines(x))


@given(
    grid_size=st.integers(1, 8),
    grid_range=st.floats(0.5, 4.0),
    hidden=st.lists(st.integers(1, 6), max_size=2),
    kind=st.sampled_from([lesa, lesa_values]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=15)
def test_a_predictor_trained_with_pykan_forecasts_the_same_exported_and_reloaded(
    tmp_path_factory, grid_size, grid_range, hidden, kind, seed
):
    start = kind(None, hidden=hidden, grid_size=grid_size, grid_range=grid_range)
    trained = with_pykan(start, seed)
    randomize(trained, 0.2, seed)
    exported = without_pykan(trained)
    folder = tmp_path_factory.mktemp("lesa")
    spec = spec_for(pipeline("dit_guided"), sigmas=SIGMAS, anchors=(0, 2, 5))
    save_predictor(exported, spec, folder)
    reloaded = load_predictor(folder)
    history, step = history_on((0, 2, 5), exported.window), step_at(8)
    with torch.no_grad():
        expected, found = trained(history, step), exported(history, step)
        assert torch.equal(reloaded(history, step), found)
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= limit


def test_the_splines_are_pykans_basis():
    from kan.spline import B_batch, extend_grid

    grid = extend_grid(torch.linspace(-2, 2, 8, dtype=torch.float64)[None], 3)
    x = torch.linspace(-5, 5, 401, dtype=torch.float64)
    expected = B_batch(x[:, None], grid, k=3)[:, 0]  # (n, P)
    found = six_cubic_splines(x[None], 7, 2.0)[0].mT / 6
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    inside = found[x.abs() < 2].sum(-1)
    torch.testing.assert_close(inside, torch.ones_like(inside), rtol=0, atol=1e-12)


def test_rows_in_chunks_are_the_rows_at_once(monkeypatch):
    net = PykanNet((3, 4, 1), 5, 1.0)
    x = torch.randn(100, 3)
    whole = net(x), splines_of(net)(x)
    monkeypatch.setattr(kan, "CHUNK_NUMBERS", 12 * 8 * 7)
    monkeypatch.setattr("foreseer.predictors.gates.CHUNK_ROWS", 13)
    for found, expected in zip((net(x), splines_of(net)(x)), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_gradients_of_the_closed_form_are_right():
    net = SplineNet((2, 3, 1), 4, 1.0).double()
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().requires_grad_() for p in net.parameters()]
    names = [name for name, _ in net.named_parameters()]

    def outputs(x, *values):
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(outputs, (x, *parameters))


def test_curves_kept_on_the_way_to_pykan_come_back():
    predictor = lesa()
    there = with_pykan(predictor)
    assert isinstance(there.gates[0][0], PykanNet)
    torch.testing.assert_close(there.alpha(), predictor.alpha(), rtol=0, atol=1e-6)
    back = without_pykan(there)
    for name, expected in predictor.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], expected, rtol=0, atol=0)


def test_experts_started_by_pykan_differ_from_each_other_and_by_seed():
    one, same, other = (with_pykan(lesa(None), seed).alpha() for seed in (3, 3, 50))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=1e-3)
    assert not torch.allclose(one[0], one[1], atol=1e-3)


def test_an_export_that_loses_the_function_is_refused():
    trained = with_pykan(lesa(), 0)
    trained.gates[1][2].layers[0].grid[0, 4] += 0.1
    with pytest.raises(ValueError, match="never call update_grid"):
        without_pykan(trained)
    with pytest.raises(ValueError, match="net 0 differs from pykan's"):
        without_pykan(with_pykan(lesa(), 0), tolerance=-1.0)


def test_a_checkpoint_holds_the_closed_form_only(tmp_path):
    spec = spec_for(pipeline("dit_guided"), sigmas=SIGMAS, anchors=(0, 2, 5))
    with pytest.raises(CheckpointError, match="scale_sp is not part of the class"):
        save_predictor(with_pykan(lesa()), spec, tmp_path)


# ---------------------------------------------------------------------------------- no trace


def test_building_and_training_draw_no_random_number_and_write_no_file(tmp_path):
    code = """
import random, sys
import numpy as np
import torch
from foreseer.predictors.kan import with_pykan, without_pykan
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.lesa_values import LesaValues

def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

before = states()
for kind in (LesaPredictor, LesaValues):
    for gate in ("kan", "mlp", "table"):
        predictor = kind((1.0, 0.5), hidden=(4,), gate=gate)
        assert before == states(), (kind, gate)
        trained = with_pykan(predictor, 3)
        trained.alpha().sum().backward()
        without_pykan(trained)
assert "kan" in sys.modules
assert before == states()
"""
    assert run_python(code, tmp_path) == ""
    assert not list(tmp_path.iterdir())


def test_deploying_never_imports_pykan(tmp_path):
    spec = spec_for(pipeline("dit_guided"), sigmas=SIGMAS, anchors=(0, 2, 5))
    code = """
import sys
from foreseer.checkpoints.format import load_predictor
import foreseer.integration.forecasting
print([type(load_predictor(name)).__name__ for name in ("filter", "values")])  # replays forecasts
print("kan" in sys.modules)
"""
    save_predictor(without_pykan(with_pykan(lesa())), spec, tmp_path / "filter")
    save_predictor(without_pykan(with_pykan(lesa_values())), spec, tmp_path / "values")
    assert run_python(code, tmp_path) == "['LesaPredictor', 'LesaValues']\nFalse"
