"""The few-step solvers step at exactly the given sigmas and converge at their advertised order."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_pipelines import tiny_pipeline

from foreseer.evaluation.measure import closed_loop_errors
from foreseer.evaluation.rows import adams_bashforth_rows, solver_rows
from foreseer.evaluation.solvers import SOLVERS, sampling_with, solver_scheduler
from foreseer.integration.host.clock import flow_sigmas
from foreseer.trajectories.prompts import class_items, generate_batch

SETTINGS = {"guidance_scale": 3.0, "output_type": "latent"}
DATA_STD = 0.5


def full_grid(pipe, num_steps):
    pipe.scheduler.set_timesteps(num_steps)
    return flow_sigmas(pipe.scheduler)


def gaussian_velocity(x, sigma):
    """v of data from N(0, DATA_STD^2): linear in x."""
    variance = sigma**2 + (1 - sigma) ** 2 * DATA_STD**2
    return x * (sigma - (1 - sigma) * DATA_STD**2) / variance


def exact(sigma):
    """x(sigma) / x(1) of that flow."""
    return math.sqrt(sigma**2 + (1 - sigma) ** 2 * DATA_STD**2)


def states(name, sigmas):
    """x at every one of the sigmas and at 0, from the exact x at the first."""
    scheduler = solver_scheduler(name, sigmas)
    scheduler.set_timesteps(len(sigmas))
    x = torch.full((1, 1, 1, 1), exact(sigmas[0]))
    found = [x.item()]
    for timestep in scheduler.timesteps:
        v = gaussian_velocity(x, float(timestep) / 1000)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
        found.append(x.item())
    return found


def error_at_the_end(name, num_steps):
    """Relative error at sigma 0 after even steps from 1."""
    x = states(name, [1 - i / num_steps for i in range(num_steps)])[-1]
    return abs(x - DATA_STD) / DATA_STD


def error_on_even_log_snr(name, num_steps):
    """Relative error at sigma 0.05 after even steps of log((1 - sigma) / sigma) from sigma 0.95.

    DPM-Solver++ and UniPC are of order 2 in this variable, which is infinite at sigma 0 and 1.
    """
    span = math.log(0.95 / 0.05)
    snr = [span * (2 * i / num_steps - 1) for i in range(num_steps + 1)]
    sigmas = [1 / (1 + math.exp(value)) for value in snr]
    return abs(states(name, sigmas)[-2] / exact(sigmas[-1]) - 1)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ab2", 2), ("dpmpp_2m", 2)])
def test_the_error_shrinks_at_the_order_of_the_solver(name, order):
    coarse, fine = error_on_even_log_snr(name, 20), error_on_even_log_snr(name, 80)
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("name", ["ab2", "dpmpp_2m", "unipc"])
def test_second_order_beats_euler(name):
    assert error_at_the_end(name, 20) < 0.2 * error_at_the_end("euler", 20)


def test_euler_at_every_step_is_the_full_run_bit_for_bit():
    pipe = tiny_pipeline()
    items = class_items(2, 3)
    full = generate_batch(pipe, items, num_inference_steps=50, **SETTINGS).images
    with sampling_with(pipe, solver_scheduler("euler", full_grid(pipe, 50))):
        again = generate_batch(pipe, items, num_inference_steps=50, **SETTINGS).images
    assert torch.equal(full, again)


def test_ab2_is_the_forecast_with_adams_bashforth_rows():
    pipe, anchors, items = tiny_pipeline(), [0, 3, 8, 14], class_items(3, 3)
    sigmas = full_grid(pipe, 20)
    with sampling_with(pipe, solver_scheduler("ab2", [sigmas[a] for a in anchors])):
        solved = generate_batch(pipe, items, num_inference_steps=4, **SETTINGS).images
    rows = adams_bashforth_rows(anchors, sigmas).repeat(2, 1, 1)
    errors = closed_loop_errors(
        pipe, rows, anchors, "output", [items], solved, guidance_scale=3.0, num_inference_steps=20
    )
    assert float(errors.max()) < -100  # float32 sums in another order: -120 dB is the floor
    euler = closed_loop_errors(
        pipe,
        adams_bashforth_rows(range(20), sigmas).repeat(2, 1, 1),
        range(20),
        "output",
        [items],
        solved,
        guidance_scale=3.0,
        num_inference_steps=20,
    )
    assert float(euler.max()) > -60  # the comparison can tell samplers apart


GOLDEN = {  # sigma 1, .75, .5, .25, 0, by hand in double precision
    "euler": [[-0.25], [0, -0.25], [0, 0, -0.25], [0, 0, 0, -0.25]],
    "ab2": [[-0.25], [0.125, -0.375], [0, 0.125, -0.375], [0, 0, 0.125, -0.375]],
    "dpmpp_2m": [[-0.25], [0.0108, -0.2608], [0.0027, 0.1223, -0.375], [0, 0, 0, -0.25]],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_rows_of_a_solver_add_up_to_its_steps(name):
    sigmas, anchors = [1 - i / 12 for i in range(12)], [0, 3, 6, 9]
    rows = solver_rows(name, anchors, sigmas)
    assert torch.equal(rows[anchors], torch.eye(12, dtype=torch.float64)[anchors])
    for k, expected in enumerate(GOLDEN[name]):
        step = -rows[3 * k : 3 * k + 3].sum(0)[anchors] / 12
        wanted = torch.tensor([*expected, 0, 0, 0][:4], dtype=torch.float64)
        torch.testing.assert_close(step, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_a_solver_is_the_forecast_with_its_rows(name):
    pipe, anchors, items = tiny_pipeline(), [0, 3, 8, 14], class_items(3, 3)
    sigmas = full_grid(pipe, 20)
    with sampling_with(pipe, solver_scheduler(name, [sigmas[a] for a in anchors])):
        solved = generate_batch(pipe, items, num_inference_steps=4, **SETTINGS).images
    rows = solver_rows(name, anchors, sigmas).repeat(2, 1, 1)
    errors = closed_loop_errors(
        pipe, rows, anchors, "output", [items], solved, guidance_scale=3.0, num_inference_steps=20
    )
    assert float(errors.max()) < -90  # the solver's first sigma is 1 - 1e-6, and float32


@pytest.mark.parametrize("name", SOLVERS)
def test_the_network_sees_the_anchors_sigmas_and_nothing_is_nan_at_sigma_1(name):
    pipe, seen = tiny_pipeline(), []
    sigmas = full_grid(pipe, 50)
    given = [sigmas[a] for a in (0, 1, 2, 9, 30)]
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    with sampling_with(pipe, solver_scheduler(name, given)):
        images = generate_batch(pipe, class_items(1, 3), num_inference_steps=5, **SETTINGS).images
    assert given[0] == 1 and seen == (1000 * torch.tensor(given)).tolist()
    assert images.isfinite().all()


def test_a_second_run_does_not_remember_the_first():
    scheduler = solver_scheduler("ab2", [1.0, 0.5])
    drawn = []
    for _ in range(2):
        scheduler.set_timesteps(2)
        x = torch.ones(1, 1, 2, 2)
        for i, timestep in enumerate(scheduler.timesteps):
            x = scheduler.step((i + 1) * x, timestep, x, return_dict=True).prev_sample
        drawn.append(x)
    assert torch.equal(drawn[0], drawn[1])


def test_the_pipeline_gets_its_scheduler_back_after_an_error():
    pipe = tiny_pipeline()
    own = pipe.scheduler
    with pytest.raises(ValueError, match="asks for 3 steps; pass num_inference_steps=2"):
        with sampling_with(pipe, solver_scheduler("euler", [1.0, 0.5])):
            generate_batch(pipe, class_items(1, 3), num_inference_steps=3, **SETTINGS)
    assert pipe.scheduler is own


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="expected one of euler, ab2, dpmpp_2m, unipc"):
        solver_scheduler("heun", [1.0])
    for sigmas in ([], [0.5, 0.5], [1.0, 0.0], [1.5, 0.5]):
        with pytest.raises(ValueError, match="expected falling values"):
            solver_scheduler("euler", sigmas)
    pipe = tiny_pipeline()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler, expected a flow-matching scheduler"):
        with sampling_with(pipe, solver_scheduler("euler", [1.0])):
            pass
