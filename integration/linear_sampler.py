"""A deterministic sampler as the linear map it is, found by probing the scheduler.

With v_j the model outputs a scheduler is given, every state is
x_s = start[s] * eps + sum_{j<s} response[s, j] * v_j with scalar weights: true of Euler, DDIM,
DPM-Solver++ and UniPC, which work on each element alike. One run on unit vectors finds all weights.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.errors import UnsupportedHost
from foreseer.integration.host.call import form_of, prediction
from foreseer.integration.host.clock import Clock, step_output
from foreseer.integration.host.hook import replace_method, restore_method
from foreseer.integration.host.loop import steps_of
from foreseer.integration.host.module_host import ModuleHost


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


class _Given:
    """Answers the calls of a host's module with a constant of our own for every step.

    Args:
        host: the host.
    """

    def __init__(self, host: ModuleHost) -> None:
        self.host = host
        self.values: list[float] = []  # by step; beyond the last one 0
        self.wrap: Callable[[float], Any] | None = None
        self.calls: dict[int, int] = {}  # by step

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        steps = steps_of(self.host)
        index = 0 if steps is None else steps.index
        self.calls[index] = self.calls.get(index, 0) + 1
        if self.wrap is None:
            output = forward(*args, **kwargs)
            self.wrap = functools.partial(_constant, form_of(output), prediction(output))
        return self.wrap(self.values[index] if index < len(self.values) else 0.0)


def _constant(form: Callable[[Tensor], Any], like: Tensor, value: float) -> Any:
    return form(torch.full_like(like, value))


def probe_loop(host: ModuleHost, run: Callable[[], Any], tolerance: float = 1e-3) -> SamplerMap:
    """The map of a loop written by hand, whose module is called once a step.

    The loop is run with constants in the place of the module's outputs, once for every step.

    Args:
        host: the host, with nothing attached.
        run: one run of it, the same noise every time.
        tolerance: see `probe`.

    Raises:
        NonAffineScheduler: the loop draws noise, is not affine in the module's outputs, or calls it
            more than once a step.
    """
    given = _Given(host)
    plain = _states(host, given, run, [])
    if max(given.calls.values()) > 1 or host.branches > 1:
        raise NonAffineScheduler(
            "the loop calls its module for several guidance branches, and nothing shows how it "
            "combines them; closed-loop fits on a loop take one branch. Use an open-loop fit, "
            "method='lstsq'."
        )
    first, num_steps = plain[0], len(plain) - 1
    start = torch.stack([(x * first).sum() / first.square().sum() for x in plain])
    response = torch.zeros(num_steps + 1, num_steps, dtype=torch.float64)
    for step in range(num_steps):
        moved = _states(host, given, run, [0.0] * step + [1.0])
        for index, (x, without) in enumerate(zip(moved, plain, strict=True)):
            response[index, step] = (x - without).mean()
    drawn = torch.randn(num_steps, generator=torch.Generator().manual_seed(0)).double()
    found = _states(host, given, run, drawn.tolist())
    gap = size = 0.0
    for index, x in enumerate(found):
        expected = start[index] * first + response[index] @ drawn
        gap, size = gap + float((x - expected).square().sum()), size + float(x.square().sum())
    if not gap <= tolerance**2 * size:
        raise NonAffineScheduler(
            f"the loop is not affine in its module's outputs (relative deviation "
            f"{(gap / size) ** 0.5:.1e}): it draws noise, clips, or treats elements differently. "
            "Switch that off, or use an open-loop fit, method='lstsq'."
        )
    return SamplerMap(start, response)


def _states(
    host: ModuleHost, given: _Given, run: Callable[[], Any], values: list[float]
) -> list[Tensor]:
    """The state before every step and at the end, float64, with given outputs."""
    states: list[Tensor] = []
    ends: list[Tensor] = []

    def keep(index: int, v: Tensor, before: Tensor, after: Tensor) -> None:
        states.append(before.detach().cpu().double())
        ends.append(after.detach().cpu().double())

    given.values, given.calls = values, {}
    clock = Clock(host.scheduler, lambda sigmas: None, keep)
    replaced = replace_method(host.module, "forward", given)
    try:
        run()
    finally:
        restore_method(host.module, "forward", replaced)
        clock.detach()
    return [*states, ends[-1]]
