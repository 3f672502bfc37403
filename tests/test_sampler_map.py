"""The map of a sampler rebuilds its runs; what is no fixed linear map is refused."""

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny_hosts import seeded

from foreseer.integration.host.clock import Clock, flow_sigmas
from foreseer.integration.linear_sampler import NonAffineScheduler, pristine, probe

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
LINEAR = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(),
    "euler_shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "dpm_eps": lambda: DPMSolverMultistepScheduler(),
    "dpm_flow": lambda: DPMSolverMultistepScheduler(**FLOW),
    "unipc_eps": lambda: UniPCMultistepScheduler(),
    "unipc_flow": lambda: UniPCMultistepScheduler(**FLOW),
}
STEPS = 9


def ready(scheduler: Any, num_steps: int = STEPS) -> Any:
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("name", LINEAR)
def test_states_rebuilt_from_the_map_are_those_of_a_run(name):
    scheduler = ready(LINEAR[name]())
    found = probe(scheduler)
    assert found.start.shape == (STEPS + 1,)
    assert found.response.shape == (STEPS + 1, STEPS)
    assert not found.response.triu().any()  # a state depends on earlier outputs only
    noise = torch.randn(3, 2, 4, 4, generator=seeded(7))
    outputs = torch.randn(STEPS, 3, 2, 4, 4, generator=seeded(8))
    x = noise
    for s, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(outputs[s], timestep, x, return_dict=False)[0]
        sums = torch.einsum("j,j...->...", found.response[s + 1], outputs.double())
        rebuilt = found.start[s + 1] * noise.double() + sums
        error = float((x - rebuilt).norm() / x.norm())
        assert error < 1e-4, f"state {s + 1}"  # float32 runs on both sides


def test_the_map_of_euler_is_known_in_closed_form():
    scheduler = ready(FlowMatchEulerDiscreteScheduler())
    found = probe(scheduler)
    assert torch.equal(found.start, torch.ones(STEPS + 1, dtype=torch.float64))
    steps = scheduler.sigmas.diff().double()
    expected = torch.ones(STEPS + 1, STEPS, dtype=torch.float64).tril(-1) * steps
    torch.testing.assert_close(found.response, expected, atol=1e-6, rtol=0)


def test_probing_changes_nothing():
    scheduler = ready(UniPCMultistepScheduler(**FLOW))
    before = copy.deepcopy(vars(scheduler))
    probe(scheduler)
    after = vars(scheduler)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, after[name]), name


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(clip_sample=False),
        EulerAncestralDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    ],
)
def test_a_stochastic_sampler_is_refused(scheduler):
    with pytest.raises(NonAffineScheduler, match="draws noise in its steps"):
        probe(ready(scheduler))


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(clip_sample=True),
        DPMSolverMultistepScheduler(thresholding=True),
    ],
)
def test_a_clipping_sampler_is_refused(scheduler):
    with pytest.raises(NonAffineScheduler, match="not affine.*clipping or thresholding is on"):
        probe(ready(scheduler))


def test_a_watched_scheduler_is_probed_without_ticking():
    scheduler = FlowMatchEulerDiscreteScheduler()
    ticks = []
    clock = Clock(scheduler, lambda sigmas: None, lambda *step: ticks.append(step))
    scheduler.set_timesteps(STEPS)
    found = probe(pristine(scheduler))
    assert not ticks and clock.steps_done == 0
    clock.detach()
    assert torch.equal(found.response, probe(ready(scheduler)).response)


# ------------------------------------------------------------------------------- the convention


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_real_step_moves_along_the_line_of_the_convention(shift):
    scheduler = ready(FlowMatchEulerDiscreteScheduler(shift=shift))
    sigmas = [*flow_sigmas(scheduler), 0.0]
    assert sigmas[0] == 1.0 and sigmas == sorted(sigmas, reverse=True)
    x_0, eps = torch.randn(2, 2, 1, 4, 4, generator=seeded())
    v = eps - x_0
    for s, timestep in enumerate(scheduler.timesteps):
        x_t = (1 - sigmas[s]) * x_0 + sigmas[s] * eps
        after = scheduler.step(v, timestep, x_t, return_dict=False)[0]
        torch.testing.assert_close(after, x_t + (sigmas[s + 1] - sigmas[s]) * v)
        expected = (1 - sigmas[s + 1]) * x_0 + sigmas[s + 1] * eps
        torch.testing.assert_close(after, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["dpm_flow", "unipc_flow"])
def test_flow_solvers_keep_the_convention_on_the_exact_velocity(name):
    scheduler = ready(LINEAR[name]())
    sigmas = [*flow_sigmas(scheduler), 0.0]
    x_0, eps = torch.randn(2, 2, 1, 4, 4, generator=seeded())
    x_t = (1 - sigmas[0]) * x_0 + sigmas[0] * eps
    for s, timestep in enumerate(scheduler.timesteps):
        x_t = scheduler.step(eps - x_0, timestep, x_t, return_dict=False)[0]
        expected = (1 - sigmas[s + 1]) * x_0 + sigmas[s + 1] * eps
        torch.testing.assert_close(x_t, expected, atol=1e-3, rtol=1e-3)  # float32 logarithms


@pytest.mark.parametrize("scheduler", [DDIMScheduler(clip_sample=False), DDPMScheduler()])
def test_a_variance_preserving_sampler_gets_the_flow_time_of_its_noise_level(scheduler):
    sigmas = flow_sigmas(ready(scheduler))
    alphas = scheduler.alphas_cumprod[scheduler.timesteps].double()
    for sigma, alpha in zip(sigmas, alphas.tolist(), strict=True):
        signal, noise = alpha**0.5, (1 - alpha) ** 0.5
        assert sigma / (1 - sigma) == pytest.approx(noise / signal)  # both are eps over x_0
    assert sigmas == sorted(sigmas, reverse=True)


def test_a_scheduler_without_flow_time_is_refused():
    scheduler = ready(FlowMatchEulerDiscreteScheduler())
    scheduler.__class__ = type("Other", (FlowMatchEulerDiscreteScheduler,), {})
    with pytest.raises(ValueError, match="Other has neither flow sigmas nor alphas_cumprod"):
        flow_sigmas(scheduler)
