"""Fits of learned solvers: their starts, their derivatives, and that none ends below its start."""

from functools import cache

import pytest
import torch
from tiny_pipelines import tiny_pipeline

from foreseer.evaluation.learned_solver import LinearSolver, closed_form, linear_scheduler
from foreseer.evaluation.measure import References, log_error
from foreseer.evaluation.published_solvers import NEURAL_SOLVER, neural_solver
from foreseer.evaluation.solvers import sampling_with
from foreseer.training.solvers import solver_fit
from foreseer.training.solvers.families import FAMILIES, Parametrisation, coordinate
from foreseer.training.solvers.solver_fit import (
    SolverRuns,
    begin,
    fit_adam,
    fit_gauss_newton,
)
from foreseer.trajectories.prompts import class_items, generate_batch

SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.2], dtype=torch.float64)
SETTINGS = {"guidance_scale": 3.0, "num_inference_steps": 20}


class Sampled(References):
    """Full runs that nobody recorded."""

    settings = SETTINGS

    def __init__(self, batches, finals):
        items = [item.index for batch in batches for item in batch]
        vars(self).update(items=items, batches=batches, finals=finals)


@cache
def full_runs(first):
    """A tiny pipeline's full runs of four items, in batches of two."""
    pipe, items = tiny_pipeline(), class_items(4, 3, first)
    batches = [items[:2], items[2:]]
    made = [generate_batch(pipe, each, output_type="latent", **SETTINGS)[0] for each in batches]
    return pipe, Sampled(batches, torch.cat(made))


def runs(first=0, folder=None):
    """What samples them again."""
    return SolverRuns(*full_runs(first), folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_starts_at_its_closed_form(name):
    start = FAMILIES[name].theory if name == "gs" else "dpmpp_2m"
    for family in (FAMILIES[name], FAMILIES[name].without_times()):
        made = Parametrisation(family, start, SIGMAS)
        solver, expected = made.solver(made.zeros()), closed_form(start, SIGMAS)
        assert torch.allclose(solver.flat(), expected.flat(), atol=1e-12)
        moved = made.jacobian(made.zeros()).abs().sum(0)
        if "times" in family.free:  # all logits alike change nothing
            assert made.jacobian(made.zeros())[:, :4].sum(1).abs().max() < 1e-12
        assert bool((moved > 0).any())


def test_masks_free_what_each_family_frees_and_nothing_else():
    free = {}
    for name, family in FAMILIES.items():
        made = Parametrisation(family, "dpmpp_3m", SIGMAS)
        moved = made.jacobian(made.zeros()).abs().sum(1) > 1e-9
        free[name] = {coordinate(p, 4) for p in torch.nonzero(moved)[:, 0].tolist()}
    everything = {coordinate(p, 4) for p in range(18)}
    noise = {(step, -1) for step in range(4)}
    assert free["gs"] == everything and free["bns"] == everything - {(0, None)}
    assert free["neuralsolver"] == everything - noise - {(0, None)}
    assert free["dyweight"] == everything - noise - {(2, 0), (3, 0), (3, 1)} | {(2, 0)}
    assert not free["ld3"] & noise and (3, None) in free["ld3"] and (3, 0) not in free["ld3"]
    fixed = Parametrisation(FAMILIES["ld3"].without_times(), "ab2", SIGMAS)
    assert not fixed.jacobian(fixed.zeros())[4:].any()  # xi alone


def test_rows_of_neuralsolver_keep_their_sums_and_dyweights_time_follows_them():
    theta = torch.Generator().manual_seed(0)
    made = Parametrisation(FAMILIES["neuralsolver"], "ab2", SIGMAS)
    solver = made.solver(0.3 * torch.randn(made.zeros().shape, generator=theta).double())
    ends = torch.cat([solver.times, torch.zeros(1, dtype=torch.float64)])
    assert torch.allclose(solver.rows.sum(1), ends.diff())
    made = Parametrisation(FAMILIES["dyweight"], "ab2", SIGMAS)
    numbers = 0.3 * torch.randn(made.zeros().shape, generator=theta).double()
    numbers[:4] = 0  # told what is reached
    solver = made.solver(numbers)
    assert torch.allclose(
        solver.times, 1 + torch.cat([torch.zeros(1), solver.rows.sum(1)[:-1].cumsum(0)])
    )


def test_the_linearised_sampler_foretells_the_errors_of_moved_solvers(tmp_path, monkeypatch):
    monkeypatch.setattr(solver_fit, "TIME_DIFFERENCE", 2e-5)  # random weights bend in time
    fitted = runs(folder=tmp_path)
    solver = closed_form("ab2", SIGMAS)
    everything = list(range(18))
    linearised = fitted.linearise(solver, everything)
    assert fitted.evaluations == 4 * (4 + (4**3 + 6 * 4**2 - 4) // 6)
    assert fitted.evaluations == 4 * solver_fit.cost(everything, 4)
    move = 1e-3 * torch.randn(18, generator=torch.Generator().manual_seed(1)).double()
    move[:4] *= 1e-2
    foretold = 10 * linearised.quadratics.at(move).log10()
    started = fitted.errors(solver).double()
    found = fitted.errors(LinearSolver.of(solver.flat() + move, 4)).double()
    assert float((found - started).abs().max()) > 0.02
    assert torch.allclose(found, foretold, atol=0.1 * float((found - started).abs().max()))
    before = fitted.evaluations
    again = fitted.linearise(solver, [3, 7, 12])
    assert fitted.evaluations == before + 4 * (4 + 1 + 0 + 1) and again.touched == [3, 7, 12]
    kept = linearised.quadratics.linear[:, [3, 7, 12]]
    assert torch.allclose(again.quadratics.linear, kept)


@pytest.mark.parametrize("name", ["bns", "ld3", "dyweight"])
def test_gauss_newton_never_ends_below_its_start(name):
    fitted, chosen = runs(), runs(first=8)
    made = Parametrisation(FAMILIES[name], "ab2", SIGMAS)
    found = fit_gauss_newton(made, fitted, chosen, num_epochs=1, tell=lambda line: None)
    started = float(chosen.errors(closed_form("ab2", SIGMAS)).mean())
    assert found.curve[0] == (0, pytest.approx(started))
    gain = started - found.error_db
    assert gain > (0.5 if name == "bns" else 0)
    assert found.curve[-1][0] > 0 and found.curve[-1][1] == found.error_db
    solver = made.solver(found.theta)  # deployed in a pipeline: the same samples
    finals = []
    with sampling_with(chosen.pipe, linear_scheduler(solver)):
        for items in chosen.references.batches:
            told = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "latent"}
            finals.append(generate_batch(chosen.pipe, items, **told)[0])
    error = log_error(torch.cat(finals), chosen.references.finals).mean()
    assert float(error) == pytest.approx(found.error_db, abs=1e-6)


def test_adam_keeps_the_best_iterate_and_counts_what_it_costs():
    fitted, chosen = runs(), runs(first=8)
    made = Parametrisation(FAMILIES["bns"], "ab2", SIGMAS)
    found = fit_adam(made, fitted, chosen, 1e-2, 8, every=4, tell=lambda line: None)
    started = float(begin(made, chosen).error_db)
    assert found.error_db < started - 0.1
    assert found.error_db == min(error for _, error in found.curve)
    assert found.curve[-1][0] == 8 * 2 * 4 * 3 + 2 * 4 * 4
    wild = fit_adam(made, fitted, chosen, 100.0, 2, every=1, tell=lambda line: None)
    assert wild.error_db == pytest.approx(started) and not wild.theta.any()


@pytest.mark.parametrize("num_steps", NEURAL_SOLVER)
def test_published_tables_reach_the_end(num_steps):
    solver = neural_solver(num_steps)
    solver.check()
    assert float(solver.rows.sum()) == pytest.approx(-1) and solver.times[0] == 1
    with pytest.raises(ValueError, match="no table of 11"):
        neural_solver(11)


def test_a_start_tells_the_network_another_time_at_step_0():
    sigmas = torch.tensor([1.0, 0.7, 0.3], dtype=torch.float64)
    plain = Parametrisation(FAMILIES["gs"], "dpmpp_3m", sigmas)
    told = Parametrisation(FAMILIES["gs"], "dpmpp_3m", sigmas, first_time=0.98)
    start = told.solver(told.zeros())
    told_times = torch.tensor([0.98, 0.7, 0.3], dtype=torch.float64)
    assert torch.equal(told.start.times, told_times)
    assert torch.allclose(start.times, told_times, rtol=1e-12)
    assert torch.equal(start.rows, plain.solver(plain.zeros()).rows)
