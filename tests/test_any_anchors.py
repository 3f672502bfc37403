"""L2PGram has the least-squares rows of any anchors, and is saved and exported whole."""

import copy
from pathlib import Path

import lightning
import pytest
import torch
from row_cases import rows_fitted, rows_of
from tiny_hosts import items, pipeline, run, seeded, spec_for
from tiny_hosts import settings as call_settings

from foreseer.checkpoints.format import load_predictor, save_predictor
from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.integration.forecasting import forecasting
from foreseer.predictors.any_anchors import L2PGram, interpolation, regrid
from foreseer.predictors.base import History, Step
from foreseer.predictors.linear import L2P
from foreseer.training.export import export_command, export_predictor
from foreseer.training.l2p import L2PGramModule
from foreseer.trajectories.datamodule import GramDataModule
from foreseer.trajectories.gram import gram
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

STEPS = 8
SIGMAS = [1 - i / STEPS for i in range(STEPS)]
LISTS = [(0,), (0, 1), (0, 1, 3, 6), (0, 2, 4, 5), tuple(range(STEPS))]


def features(num: int = 3, branches: int = 2) -> torch.Tensor:
    """Smooth features with some noise, `(n, branches, S, M)`."""
    shape = (num, branches, 1, 30)
    a, b, c = torch.randn(3, *shape, dtype=torch.float64, generator=seeded())
    t = torch.linspace(0, 1, STEPS, dtype=torch.float64)[:, None]
    noise = torch.randn(num, branches, STEPS, 30, dtype=torch.float64, generator=seeded(1))
    return a + b * t + c * torch.sin(2 * t) + 0.02 * noise


def fitted(ridge: float = 1e-4, window: int | None = None) -> L2PGram:
    predictor = L2PGram(STEPS, 2, ridge, window)
    predictor.set_gram(gram(features()).mean(0))
    return predictor


def history_at(steps: tuple[int, ...], window: int | None = None) -> History:
    history = History(window)
    for index in steps:
        history.push(Step(index, SIGMAS[index], STEPS), torch.randn(2, 3))
    return history


@pytest.mark.parametrize("anchors", LISTS)
@pytest.mark.parametrize("ridge", [0.0, 1e-4, 1e-1])
def test_its_rows_are_those_of_the_least_squares_fit_on_the_same_anchors(anchors, ridge):
    expected = rows_fitted(gram(features()), anchors, ridge)
    found = rows_of(fitted(ridge), anchors, SIGMAS)
    limit = 1e-10 if ridge else 1e-6  # without a ridge the system's condition is about 1e5
    torch.testing.assert_close(found, expected, atol=limit, rtol=0)


def test_a_window_uses_the_newest_anchors_only():
    rows = rows_of(fitted(window=2), (0, 1, 3, 6), SIGMAS)
    assert (rows[:, 7, [0, 1]] == 0).all()
    assert (rows[:, 7, [3, 6]] != 0).all()
    short = L2PGram(STEPS, 2)
    short.set_gram(fitted().gram)
    weights = short.coefficients(history_at((3, 6)), Step(7, SIGMAS[7], STEPS, (0, 1)))
    torch.testing.assert_close(rows[:, 7, [3, 6]].mT, weights)


def test_it_starts_as_reuse():
    weights = L2PGram(STEPS, 2).coefficients(history_at((0, 2, 5)), Step(6, SIGMAS[6], STEPS))
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.0, 0, 1], dtype=torch.float64))


def test_weights_are_solved_once_and_again_after_a_new_gram():
    predictor, history = fitted(), history_at((0, 1))
    step = Step(4, SIGMAS[4], STEPS)
    first = predictor.coefficients(history, step)
    assert list(predictor.solved) == [((0, 1), 4)]
    state = copy.deepcopy(predictor.state_dict())
    state["gram"] = state["gram"] + torch.eye(STEPS)
    predictor.load_state_dict(state)
    loaded = predictor.coefficients(history, step)
    assert not torch.allclose(loaded, first)
    predictor.set_gram(fitted().gram)
    assert torch.equal(predictor.coefficients(history, step), first)


def test_the_weights_kept_are_bounded(monkeypatch):
    monkeypatch.setattr("foreseer.predictors.any_anchors.MAX_SOLVED", 3)
    predictor = fitted()
    for index in range(1, STEPS):
        predictor.coefficients(history_at((0,)), Step(index, SIGMAS[index], STEPS))
    assert 1 <= len(predictor.solved) <= 3


def test_another_number_of_steps_or_branch_is_refused():
    with pytest.raises(ValueError, match="a run of 9 steps, but the Gram is of 2 branch"):
        fitted().coefficients(history_at((0,)), Step(1, 0.9, 9))
    with pytest.raises(ValueError, match="found branch 2"):
        fitted().coefficients(history_at((0,)), Step(1, 0.9, STEPS, (2,)))


def test_wrong_arguments_are_refused():
    for arguments in ((0,), (4, 0), (4, 1, -1.0), (4, 1, 0.0, 0)):
        with pytest.raises(ValueError, match="expected at least 1, 1, 0 and 1"):
            L2PGram(*arguments)


# -------------------------------------------------------------------------- on another grid


def test_regridding_onto_the_same_grid_changes_nothing():
    other = regrid(fitted(), SIGMAS, SIGMAS)
    torch.testing.assert_close(other.gram, fitted().gram, rtol=1e-12, atol=0)


def test_regridding_is_exact_for_features_that_are_cubic_in_sigma():
    new = [1 - i / 5 for i in range(5)][:-1] + [SIGMAS[-1]]
    powers = torch.randn(4, 30, dtype=torch.float64, generator=seeded())

    def cubic(sigmas: list[float]) -> torch.Tensor:
        s = torch.tensor(sigmas, dtype=torch.float64)
        return torch.stack([s**i for i in range(4)], 1) @ powers

    old = L2PGram(STEPS)
    old.set_gram(gram(cubic(SIGMAS)[None, None]).mean(0))
    expected = gram(cubic(new)[None, None]).mean(0)
    torch.testing.assert_close(regrid(old, SIGMAS, new).gram, expected, rtol=1e-10, atol=0)


def test_a_grid_that_leaves_the_recorded_range_is_refused():
    with pytest.raises(ValueError, match="record on a grid that covers them"):
        interpolation(SIGMAS, [1.0, 0.0])
    with pytest.raises(ValueError, match="cannot read 3 steps"):
        interpolation(SIGMAS[:3], [1.0, 0.9])


# ------------------------------------------------------------------- saved, attached, exported


def learned_on(pipe) -> L2PGram:
    predictor = fitted()
    predictor.spec = spec_for(pipe, anchors=(0, 2, 5))
    return predictor


def test_a_saved_predictor_loads_bit_for_bit(tmp_path):
    predictor = fitted(1e-3, window=3)
    pipe = pipeline("dit_guided")
    save_predictor(predictor, spec_for(pipe, anchors=(0, 2, 5)), tmp_path)
    loaded = load_predictor(tmp_path)
    assert torch.equal(loaded.gram, predictor.gram)
    assert loaded.gram.dtype == torch.float64
    assert (loaded.ridge, loaded.window) == (1e-3, 3)
    assert "any list of anchors" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("anchors", [None, (0, 1), (0, 3, 4, 6)])
def test_one_predictor_forecasts_with_any_anchors(anchors):
    pipe = pipeline("dit_guided")
    predictor = learned_on(pipe)
    with forecasting(pipe, predictor, anchors) as attached:
        found = run("dit_guided", pipe)
    assert tuple(attached.report().anchors) == (anchors or (0, 2, 5))
    same = L2P(STEPS, anchors or (0, 2, 5), 2)
    same.weight.copy_(rows_of(predictor, same.anchors, predictor.spec.sigmas))
    same.spec = spec_for(pipe, anchors=same.anchors)
    with forecasting(pipe, same):
        assert torch.equal(found, run("dit_guided", pipe))


def test_another_grid_is_refused_on_attach():
    pipe = pipeline("dit_guided")
    with forecasting(pipe, learned_on(pipe)), pytest.raises(PredictorMismatch, match="8 steps"):
        run("dit_guided", pipe, num_inference_steps=9)


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("gram") / "recording"
    pipe = pipeline("dit_guided")
    return record(pipe, items("dit_guided", 5), out, **call_settings("dit_guided"))


def test_a_fit_averages_the_grams_and_exports_what_it_fitted(recording, tmp_path):
    module = L2PGramModule(str(recording), (0, 2, 5), "hidden")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet["enable_checkpointing"] = False
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet)
    trainer.fit(module, datamodule=GramDataModule(str(recording), "hidden", 0.0))
    mean = Recording(recording).stack("gram/hidden").double().mean(0)
    torch.testing.assert_close(module.predictor.gram, mean, rtol=1e-14, atol=0)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    export_command(str(tmp_path / "last.ckpt"), str(tmp_path / "command"))
    export_predictor(module, tmp_path / "direct", {})
    loaded = load_predictor(tmp_path / "command")
    assert torch.equal(loaded.gram, load_predictor(tmp_path / "direct").gram)
    assert loaded.spec == module.spec()
    assert loaded.spec.num_trajectories == 5
    assert loaded.spec.tap == "hidden"


def test_a_tap_that_was_not_recorded_is_refused(recording):
    with pytest.raises(ValueError, match="not 'residual'; record it"):
        L2PGramModule(str(recording), (0, 2), "residual")
