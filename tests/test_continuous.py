"""L2PContinuous starts as Newton, recovers what made the data, and knows its range."""

from pathlib import Path

import lightning
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import rows_of
from tiny_hosts import items, pipeline, run, seeded, spec_for
from tiny_hosts import settings as call_settings

from foreseer.checkpoints.format import load_predictor, save_predictor
from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.integration.forecasting import forecasting
from foreseer.predictors.base import History, Step
from foreseer.predictors.continuous import L2PContinuous, basis, exponents, sigma_at
from foreseer.predictors.rules import Newton
from foreseer.training.continuous_fit import (
    L2PContinuousModule,
    SeveralGrams,
    add_equations,
    anchor_lists,
    check_alike,
    fit_continuous,
)
from foreseer.training.export import export_command, export_predictor
from foreseer.trajectories.files.shards import read_shard
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording


def grid(num_steps: int, shift: float = 1.0) -> list[float]:
    """Diffusers' flow grid."""
    flat = [1 + (0.001 - 1) * i / (num_steps - 1) for i in range(num_steps)]
    return [shift * s / (1 + (shift - 1) * s) for s in flat]


GRIDS = [grid(12), grid(20)]
ANCHORS = (0, 1, 4, 9, 13)
ORDERS = (1, 2, 3)


def random_predictor(order: int = 2, size: float = 0.3, **arguments) -> L2PContinuous:
    predictor = L2PContinuous(GRIDS, 2, order, **arguments)
    noise = torch.randn(predictor.theta.shape, generator=seeded(), dtype=torch.float64)
    predictor.theta.copy_(size * noise)
    return predictor


def history_on(sigmas: list[float], steps: tuple[int, ...], window: int | None) -> History:
    history = History(window)
    for index in steps:
        history.push(Step(index, sigmas[index], len(sigmas)), torch.randn(2, 3))
    return history


# ------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_anchors", [1, 2, 3, 5])
def test_it_starts_exactly_as_newton_in_sigma(order, num_anchors):
    predictor, rule = L2PContinuous(GRIDS, 2, order), Newton(1, clock="sigma")
    steps = ANCHORS[:num_anchors]
    history = history_on(GRIDS[1], steps, predictor.window)
    newest = history_on(GRIDS[1], steps, rule.window)
    for branches in ((0,), (1,), (0, 1)):
        step = Step(17, GRIDS[1][17], 20, branches)
        weights = predictor.coefficients(history, step)
        assert weights.shape == (len(history), len(branches))
        expected = rule.coefficients(newest, step)
        for column in weights.unbind(1):
            torch.testing.assert_close(column[-len(expected) :], expected, atol=0, rtol=1e-13)
            assert (column[: -len(expected)] == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(0, 3), st.integers(1, 5), st.integers(14, 19))
def test_the_weights_sum_to_one_whatever_was_learned(order, degree, num_anchors, index):
    predictor = random_predictor(order, degree=degree)
    history = history_on(GRIDS[1], ANCHORS[:num_anchors], predictor.window)
    weights = predictor.coefficients(history, Step(index, GRIDS[1][index], 20, (0, 1)))
    torch.testing.assert_close(weights.sum(0), torch.ones(2, dtype=torch.float64))


def test_with_one_anchor_it_is_reuse():
    weights = random_predictor().coefficients(history_on(GRIDS[0], (0,), 3), Step(1, 0.9, 12))
    assert torch.equal(weights, torch.ones(1, 1, dtype=torch.float64))


@pytest.mark.parametrize("order", ORDERS)
def test_a_correction_of_one_moves_to_the_next_polynomial(order):
    predictor = L2PContinuous(GRIDS, 1, order)
    for high in range(2, order + 1):
        theta = torch.zeros(1, order, len(exponents(1)), dtype=torch.float64)
        theta[:, 1:high, exponents(1).index((0, 0, 0))] = 1.0
        predictor.set_correction(order, theta.flatten(1))
        history = history_on(GRIDS[1], ANCHORS, predictor.window)
        step = Step(16, GRIDS[1][16], 20)
        newest = history_on(GRIDS[1], ANCHORS, high + 1)
        expected = Newton(high, clock="sigma").coefficients(newest, step)
        found = predictor.coefficients(history, step).flatten()[-high - 1 :]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_equal_sigmas_get_equal_weights_on_every_grid():
    predictor = random_predictor()
    longer = grid(39)  # holds every sigma of the grid of 20 at twice the index
    for index in (14, 19):
        history = history_on(GRIDS[1], ANCHORS, predictor.window)
        doubled = history_on(longer, tuple(2 * a for a in ANCHORS), predictor.window)
        here = predictor.coefficients(history, Step(index, GRIDS[1][index], 20, (0, 1)))
        there = predictor.coefficients(doubled, Step(2 * index, longer[2 * index], 39, (0, 1)))
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)


def test_the_basis_has_every_monomial_once_and_a_constant():
    assert [len(exponents(degree)) for degree in range(4)] == [1, 4, 10, 20]
    assert len(set(exponents(3))) == 20
    psi = dict(zip(exponents(2), basis(0.9, 0.7, 0.6, 2).tolist(), strict=True))
    a, b, c = 2 * 0.6 - 1, 2 / 3 - 1, 4 * 0.1 - 1
    assert psi[0, 0, 0] == 1
    assert psi[1, 1, 0] == pytest.approx(a * b)
    assert psi[0, 0, 2] == pytest.approx(c * c)


# -------------------------------------------------------------------------------- the fit


def obeying(truth: L2PContinuous, sigmas: list[float], anchors: list[int]) -> torch.Tensor:
    """Mean Gram of random features whose forecast steps are the truth's forecasts."""
    rows = rows_of(truth, anchors, sigmas)
    x = torch.randn(2, len(sigmas), 50, generator=seeded(len(sigmas)), dtype=torch.float64)
    x = rows @ x
    return x @ x.mT


@pytest.mark.parametrize("order", [1, 2])
def test_data_made_by_known_corrections_gives_them_back(order):
    truth = random_predictor(order)
    found = L2PContinuous(GRIDS, 2, order)
    equations: dict = {}
    for sigmas in GRIDS:
        for anchors in anchor_lists(len(sigmas), 40, seed=3):
            gram = obeying(truth, sigmas, anchors)
            add_equations(equations, found, gram, sigmas, anchors)
    assert sorted(equations) == list(range(1, order + 1))
    for count, (normal, right) in equations.items():
        theta = torch.linalg.solve(normal, right)
        torch.testing.assert_close(theta, truth.correction(count), rtol=1e-5, atol=1e-6)


def test_a_strong_ridge_leaves_the_start_and_a_weak_one_lowers_the_error():
    grams = [obeying(random_predictor(1), sigmas, [0, 2, 5, 8]) for sigmas in GRIDS]
    start, stiff, free = (L2PContinuous(GRIDS, 2, 1) for _ in range(3))
    fit_continuous(stiff, grams, 10, 1e9, 0)
    fit_continuous(free, grams, 10, 1e-6, 0)
    assert stiff.theta.abs().max() < 1e-6

    def error(predictor: L2PContinuous) -> float:
        total = 0.0
        for gram, sigmas in zip(grams, GRIDS, strict=True):
            ends = torch.tensor([*sigmas[1:], 0.0], dtype=torch.float64)
            lengths = torch.tensor(sigmas, dtype=torch.float64) - ends
            for anchors in anchor_lists(len(sigmas), 10, 0):
                c = torch.eye(len(sigmas), dtype=torch.float64)
                c = c - rows_of(predictor, anchors, sigmas)
                errors = torch.einsum("bts,bsu,btu->bt", c, gram, c)
                total += float((errors * len(sigmas) * lengths**2).sum())
        return total

    assert error(free) < error(start)
    free.theta.mul_(1.01)
    nearby = error(free)
    free.theta.div_(1.01)
    assert error(free) < nearby


def test_drawn_lists_are_schedules_and_the_same_seed_draws_them_again():
    for num_steps in (6, 20, 50):
        lists = anchor_lists(num_steps, 30, seed=1)
        assert lists == anchor_lists(num_steps, 30, seed=1)
        assert lists != anchor_lists(num_steps, 30, seed=2)
        for anchors in lists:
            assert anchors[0] == 0 and anchors[-1] < num_steps
            assert anchors == sorted(set(anchors))


# ------------------------------------------------------------------------------- its range


def test_it_serves_step_counts_between_those_allowed():
    predictor = L2PContinuous(GRIDS, min_steps=10, max_steps=30)
    for num_steps in (10, 15, 30):
        predictor.check_grid(grid(num_steps))
    for num_steps in (9, 31):
        with pytest.raises(ValueError, match=f"{num_steps} steps, the predictor serves 10 to 30"):
            predictor.check_grid(grid(num_steps))


def test_it_serves_shifts_between_those_fitted():
    with pytest.raises(ValueError, match="another shift or schedule"):
        L2PContinuous(GRIDS).check_grid(grid(15, shift=2.0))
    both = L2PContinuous([*GRIDS, grid(15, shift=3.0)])
    both.check_grid(grid(15, shift=2.0))
    with pytest.raises(ValueError, match="another shift or schedule"):
        both.check_grid(grid(15, shift=5.0))
    L2PContinuous(GRIDS, sigma_margin=0.5).check_grid(grid(15, shift=3.0))


def test_sigma_between_two_steps_is_read_linearly():
    assert sigma_at([1.0, 0.5, 0.0], 0.25) == 0.75
    assert sigma_at([1.0, 0.5, 0.0], 1.0) == 0.0


def test_wrong_arguments_are_refused():
    for arguments, match in (
        (((), 1), "found 0 grids"),
        ((GRIDS, 0), "0 branches"),
        ((GRIDS, 1, 4), "order is 4"),
        ((GRIDS, 1, 1, 4), "degree 4"),
        ((GRIDS, 1, 1, 1, 9, 8), "min_steps=9"),
    ):
        with pytest.raises(ValueError, match=match):
            L2PContinuous(*arguments)
    with pytest.raises(ValueError, match="found branch 2"):
        random_predictor().coefficients(history_on(GRIDS[0], (0,), 3), Step(1, 0.9, 12, (2,)))


# --------------------------------------------------------------------- saved, attached, exported


def test_a_saved_predictor_loads_bit_for_bit(tmp_path):
    predictor = random_predictor(3, degree=2, min_steps=4, max_steps=60, sigma_margin=0.02)
    spec = spec_for(pipeline("dit_guided"), sigmas=tuple(GRIDS[0]), anchors=(0, 2, 5))
    save_predictor(predictor, spec, tmp_path)
    loaded = load_predictor(tmp_path)
    assert torch.equal(loaded.theta, predictor.theta)
    assert loaded.grids == predictor.grids
    assert (loaded.min_steps, loaded.max_steps, loaded.sigma_margin) == (4, 60, 0.02)
    assert "outside of its range" in (tmp_path / "README.md").read_text()
    history = history_on(GRIDS[0], (0, 2, 5, 7), predictor.window)
    step = Step(9, GRIDS[0][9], 12, (0, 1))
    assert torch.equal(loaded(history, step), predictor(history, step))


@pytest.mark.parametrize("num_steps", [8, 13])
@pytest.mark.parametrize("anchors", [None, (0, 1), (0, 3, 4, 6)])
def test_one_predictor_forecasts_with_any_anchors_on_any_grid_of_its_range(num_steps, anchors):
    pipe = pipeline("dit_guided")
    predictor = random_predictor(min_steps=6, max_steps=13)
    predictor.spec = spec_for(pipe, anchors=(0, 2, 5))
    with forecasting(pipe, predictor, anchors) as attached:
        found = run("dit_guided", pipe, num_inference_steps=num_steps)
    assert tuple(attached.report().anchors) == (anchors or (0, 2, 5))
    predictor.theta.zero_()
    with forecasting(pipe, predictor, anchors):
        start = run("dit_guided", pipe, num_inference_steps=num_steps)
    with forecasting(pipe, Newton(1, clock="sigma"), anchors or (0, 2, 5)):
        assert torch.equal(start, run("dit_guided", pipe, num_inference_steps=num_steps))
    assert not torch.equal(start, found)


def test_a_grid_outside_its_range_is_refused_when_the_run_starts():
    pipe = pipeline("dit_guided", FlowMatchEulerDiscreteScheduler(shift=3.0))
    predictor = random_predictor(min_steps=6, max_steps=13)
    predictor.spec = spec_for(pipe, anchors=(0, 2, 5))
    with forecasting(pipe, predictor), pytest.raises(PredictorMismatch, match="another shift"):
        run("dit_guided", pipe)
    pipe = pipeline("dit_guided")
    with forecasting(pipe, predictor), pytest.raises(PredictorMismatch, match="serves 6 to 13"):
        run("dit_guided", pipe, num_inference_steps=14)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("continuous")
    found = []
    for num_steps in (8, 11):
        pipe = pipeline("dit_guided")
        call = call_settings("dit_guided", num_steps)
        out: Path = record(pipe, items("dit_guided", 4), folder / str(num_steps), **call)
        found.append(str(out))
    return found


def test_a_fit_on_two_recordings_exports_what_it_fitted(recordings, tmp_path):
    module = L2PContinuousModule(recordings, (0, 2, 5), num_lists=6, max_steps=20)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet["enable_checkpointing"] = False
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet)
    trainer.fit(module, datamodule=SeveralGrams(recordings, "output", 0.0))
    assert module.predictor.theta.abs().max() > 0
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    export_command(str(tmp_path / "last.ckpt"), str(tmp_path / "command"))
    export_predictor(module, tmp_path / "direct", {})
    loaded = load_predictor(tmp_path / "command")
    assert torch.equal(loaded.theta, load_predictor(tmp_path / "direct").theta)
    assert loaded.spec == module.spec()
    assert (loaded.min_steps, loaded.max_steps, loaded.spec.num_trajectories) == (8, 20, 8)
    grams = read_shard(tmp_path / "direct" / "grams.safetensors")
    second = Recording(recordings[1]).stack("gram/output").double().sum(0)
    torch.testing.assert_close(grams["gram/output/1"], second, rtol=1e-14, atol=0)
    pipe = pipeline("dit_guided")
    with forecasting(pipe, loaded, (0, 1, 4, 8)):
        run("dit_guided", pipe, num_inference_steps=16)


def test_recordings_of_different_guidance_are_refused(recordings):
    first = spec_for(pipeline("dit_guided"))
    check_alike(first, spec_for(pipeline("dit_guided"), sigmas=(1.0, 0.5)))
    with pytest.raises(ValueError, match="differ in guidance_scale: 3.0 and 4.0"):
        check_alike(first, spec_for(pipeline("dit_guided"), guidance_scale=4.0))
