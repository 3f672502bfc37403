"""A deterministic sampler as the linear map it is, found by probing the scheduler.

With v_j the model outputs a scheduler is given, every state is
x_s = start[s] * eps + sum_{j<s} response[s, j] * v_j with scalar weights: true of Euler, DDIM,
DPM-Solver++ and UniPC, which work on each element alike. One run on unit vectors finds all weights.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.errors import UnsupportedHost
from foreseer.integration.host.clock import step_output


class NonAffineScheduler(UnsupportedHost):
    """The scheduler's step is stochastic or not affine in the model output."""


@dataclass(frozen=True)
class SamplerMap:
    """States as combinations of the initial noise and the model outputs.

    Args:
        start: weight of the initial noise in every state, `(S + 1,)`.
        response: weight of the model output at step j in state s, `(S + 1, S)`.
    """

    start: Float[Tensor, " states"]
    response: Float[Tensor, "states S"]


def pristine(scheduler: Any) -> Any:
    """A copy of a scheduler without the clock's wrappers; take it right after `set_timesteps`."""
    copied = copy.copy(scheduler)
    for name in ("set_timesteps", "step"):
        copied.__dict__.pop(name, None)
    return copy.deepcopy(copied)


def probe(scheduler: Any, tolerance: float = 1e-3) -> SamplerMap:
    """The map of a scheduler whose `set_timesteps` has been called and whose `step` has not.

    Args:
        scheduler: a `pristine` copy; it is not changed.
        tolerance: largest relative deviation from linearity put down to float32 rounding.

    Raises:
        NonAffineScheduler: two runs differ, or a random run is not the combination it should be.
    """
    num_steps = len(scheduler.timesteps)
    begin = getattr(scheduler, "begin_index", None) or 0
    num_steps -= begin
    unit = torch.eye(num_steps + 1)
    generator = torch.Generator().manual_seed(0)
    mixture = torch.randn(2, num_steps + 1, generator=generator)
    inputs = torch.cat([unit, mixture])  # (lanes, 1 + S): initial noise, then one output per step
    states = _run(scheduler, inputs, begin)
    if not torch.equal(states, _run(scheduler, inputs, begin)):
        raise NonAffineScheduler(
            f"{type(scheduler).__name__} draws noise in its steps; closed-loop fits need a "
            "deterministic sampler (for DDIM eta=0, for flow matching stochastic_sampling=False)."
        )
    maps = states[: num_steps + 1].double()  # (1 + S, states)
    expected = mixture.double() @ maps
    deviation = float((states[num_steps + 1 :] - expected).norm() / expected.norm())
    if not deviation <= tolerance:
        raise NonAffineScheduler(
            f"{type(scheduler).__name__}'s step is not affine in the model output (relative "
            f"deviation {deviation:.1e}): clipping or thresholding is on? Switch it off, or use an "
            "open-loop fit."
        )
    return SamplerMap(maps[0], maps[1:].T.contiguous())


def _run(scheduler: Any, inputs: Tensor, begin: int) -> Tensor:
    """States of one run per row of `inputs`, `(lanes, S + 1)`."""
    runner = copy.deepcopy(scheduler)
    x = inputs[:, 0].reshape(-1, 1, 1, 1)
    states = [x]
    for index, timestep in enumerate(runner.timesteps[begin:]):
        output = inputs[:, index + 1].reshape(-1, 1, 1, 1)
        x = step_output(runner.step(output, timestep, x, return_dict=False))
        states.append(x)
    return torch.stack([state.flatten() for state in states], dim=1)
