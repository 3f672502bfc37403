"""Linear solvers as one class: published numbers, the library's samples, files, honest times."""

import json

import pytest
import torch
from tiny_pipelines import tiny_pipeline

from foreseer.checkpoints.strict import MalformedFile
from foreseer.errors import PredictorMismatch
from foreseer.evaluation.learned_solver import (
    FORMULAS,
    LIBRARY,
    LearnedSolver,
    LinearSolver,
    closed_form,
    linear_scheduler,
)
from foreseer.evaluation.plan import Entry
from foreseer.evaluation.runs import run_entry
from foreseer.evaluation.solvers import SOLVERS, FlowDPMSolver, sampling_with, solver_scheduler
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.trajectories.prompts import class_items, generate_batch

SETTINGS = {"guidance_scale": 3.0, "output_type": "latent"}
SIGMAS = torch.tensor([1.0, 0.93, 0.7, 0.45, 0.2], dtype=torch.float64)
GOLDEN = {  # at sigma 1, .75, .5, .25, 0, published in double precision
    "ab2": [[-0.25], [0.125, -0.375], [0, 0.125, -0.375], [0, 0, 0.125, -0.375]],
    "dpmpp_2m": [
        [-0.249999],
        [0.010799, -0.260799],
        [0.002700, 0.122300, -0.375000],
        [0, 0, 0, -0.25],
    ],
}


def samples(pipe, scheduler, items=None, **settings):
    """Final latents with a scheduler."""
    items = class_items(2, 3) if items is None else items
    told = {**SETTINGS, "num_inference_steps": len(scheduler.given)} | settings
    with sampling_with(pipe, scheduler):
        return generate_batch(pipe, items, **told).images


def learned(pipe, solver):
    host = host_fingerprint(pipe.transformer)
    return LearnedSolver(solver, "bns", host, 3.0, {"fit_evaluations": 40.0})


@pytest.mark.parametrize("name", GOLDEN)
def test_closed_forms_have_the_published_rows(name):
    solver = closed_form(name, torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64))
    for row, golden in zip(solver.rows.tolist(), GOLDEN[name], strict=True):
        assert row[: len(golden)] == pytest.approx(golden, abs=1e-6)
        assert not any(row[len(golden) :])
    assert solver.alpha.tolist() == pytest.approx([0] * 4, abs=1e-12)
    assert solver.rows.sum(1).tolist() == pytest.approx([-0.25] * 4, abs=2e-6)


@pytest.mark.parametrize("name", [*FORMULAS, *LIBRARY])
def test_the_class_draws_the_librarys_samples(name):
    pipe = tiny_pipeline()
    if name in SOLVERS:
        library = solver_scheduler(name, SIGMAS.tolist())
    else:  # the third order is not in tables
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        library = FlowDPMSolver(**flow, solver_order=3)
        library.given = tuple(SIGMAS.tolist())
    expected = samples(pipe, library)
    found = samples(pipe, linear_scheduler(closed_form(name, SIGMAS)))
    assert float((found - expected).abs().max()) < 2e-5
    euler = samples(pipe, linear_scheduler(closed_form("euler", SIGMAS)))
    assert name == "euler" or float((euler - expected).abs().max()) > 1e-3


def test_the_formulas_can_be_differentiated_in_their_times():
    for name in FORMULAS:
        jacobian = torch.autograd.functional.jacobian(
            lambda sigmas, name=name: closed_form(name, sigmas).flat(), SIGMAS.clone()
        )
        moved = SIGMAS.clone()
        moved[2] += 1e-6
        difference = (closed_form(name, moved).flat() - closed_form(name, SIGMAS).flat()) / 1e-6
        assert jacobian[:, 2].tolist() == pytest.approx(difference.tolist(), abs=1e-4)


def test_the_network_is_told_the_solvers_times_and_a_run_may_begin_later():
    pipe, seen = tiny_pipeline(), []
    solver = closed_form("ab2", SIGMAS)
    times = SIGMAS + torch.tensor([0.0, 0.1, -0.05, 0.3, 0.01], dtype=torch.float64)  # not falling
    solver = LinearSolver(times, torch.full((5,), 0.02, dtype=torch.float64), solver.rows)
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    whole = linear_scheduler(solver)
    final = samples(pipe, whole)
    hook.remove()
    assert seen == pytest.approx((1000 * times).tolist(), rel=1e-6)
    for first in (1, 3):
        tail = linear_scheduler(solver, first, whole.noise, whole.outputs[:first])
        again = samples(pipe, tail, latents=whole.states[first])
        assert torch.equal(again, final)
        assert len(tail.states) == 5 - first


def test_a_file_gives_back_every_number_and_refuses_what_is_none(tmp_path):
    pipe, path = tiny_pipeline(), tmp_path / "bns.json"
    made = learned(pipe, closed_form("unipc", SIGMAS))
    made.save(path)
    found = LearnedSolver.load(path)
    assert torch.equal(found.solver.flat(), made.solver.flat())
    assert (found.method, found.host, found.metrics) == (made.method, made.host, made.metrics)
    whole = json.loads(path.read_text())
    wrong = [
        {"schema_version": 2},
        {"method": 3},
        {"solver": {"times": [1.0], "alpha": [0.0]}},
        {"solver": whole["solver"] | {"times": [1.0, -0.5, 0.3, 0.2, 0.1]}},
        {"solver": whole["solver"] | {"times": [1.0, 0.5]}},
        {"solver": whole["solver"] | {"rows": [[1.0] * 5] * 5}},
        {"solver": whole["solver"] | {"rows": [[1.0], [1.0, 2.0]]}},
        {"solver": whole["solver"] | {"alpha": ["a"] * 5}},
        {"extra": 1},
    ]
    for change in wrong:
        path.write_text(json.dumps(whole | change))
        with pytest.raises(MalformedFile, match="holds no learned solver"):
            LearnedSolver.load(path)
    for text in ("{", "[]", '{"solver": NaN}'):
        path.write_text(text)
        with pytest.raises(MalformedFile):
            LearnedSolver.load(path)
    with pytest.raises(MalformedFile):
        LearnedSolver.load(tmp_path / "none.json")


def test_a_benchmark_entry_runs_a_learned_solver_on_its_own_model_only():
    pipe = tiny_pipeline()
    made = learned(pipe, closed_form("dpmpp_3m", SIGMAS))
    anchors = (0, 1, 2, 3, 4)
    entry = Entry("bns", "learned solver", "none", "free times", anchors, solver=made)
    run = run_entry(pipe, entry, (), [class_items(2, 3)], lambda done: None, guidance_scale=3.0)
    expected = samples(pipe, linear_scheduler(made.solver))
    assert torch.allclose(run.latents, expected, atol=1e-6)
    other = learned(pipe, closed_form("dpmpp_2m", SIGMAS))
    again = Entry("bns", "learned solver", "none", "free times", anchors, solver=other)
    assert entry.key("") != again.key("")
    with pytest.raises(PredictorMismatch, match="another host"):
        made.scheduler(tiny_pipeline(num_layers=1))
