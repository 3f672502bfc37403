"""Few-step samplers at given sigmas: the honest rivals of a forecaster with as many evaluations.

Each takes one step per anchor, at the anchors' own sigmas on the full grid, and ends at sigma 0.
The network is called with timestep 1000 sigma as a float, so it sees exactly the anchors' sigmas.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from foreseer.integration.host.clock import is_flow, step_output

Numbers = Sequence[float] | np.ndarray | Tensor
LARGEST_SIGMA = 1 - 1e-6  # diffusers' own bound in UniPC, whose log-SNR is infinite at sigma = 1


class GivenSigmas:
    """Mixin for a scheduler whose `set_timesteps` always takes the sigmas it was given.

    Attributes:
        given: sigmas of the steps, falling, without the terminal 0.
        largest_sigma: larger sigmas are lowered to this in the solver's coefficients, while the
            network still sees the given one; 1 changes nothing.
    """

    given: tuple[float, ...] = ()
    largest_sigma: float = 1.0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Numbers | None = None,
        mu: float | int | None = None,
        timesteps: Numbers | None = None,
    ) -> None:
        """Start a run on the given sigmas; the caller's own and its shift `mu` are not used.

        Raises:
            ValueError: the caller asks for another number of steps, or tells the network other
                times than 1000 sigma.
        """
        if timesteps is not None:
            raise ValueError(
                "the pipeline sets timesteps apart from its sigmas (CogView 4 does), and a solver "
                "at given sigmas would tell the network other times than its own run: leave the "
                "few-step solvers out with `methods`."
            )
        asked = len(sigmas) if sigmas is not None else num_inference_steps
        if asked != len(self.given):
            raise ValueError(
                f"the solver was built for {len(self.given)} sigmas, the pipeline asks for {asked} "
                f"steps; pass num_inference_steps={len(self.given)}."
            )
        super().set_timesteps(num_inference_steps=asked, device=device)  # type: ignore[misc]
        grid = torch.tensor(self.given, dtype=torch.float32)
        self.timesteps = (1000 * grid).to(device)
        home = self.sigmas.device  # type: ignore[has-type]
        self.sigmas = torch.cat([grid.clamp(max=self.largest_sigma), torch.zeros(1)]).to(home)


class FlowMatchEuler(GivenSigmas, FlowMatchEulerDiscreteScheduler):
    """Euler: x += (sigma' - sigma) v."""


class FlowMatchAB2(GivenSigmas, FlowMatchEulerDiscreteScheduler):
    """Variable-step Adams-Bashforth 2 in sigma, after a first step of Euler.

    x += H ((1 + r/2) v - r/2 v_before), H = sigma' - sigma, r = H / (sigma - sigma_before)
    (Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, section III.5).
    """

    v_before: Tensor | None = None

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """One step: Euler along the extrapolated velocity."""
        if self.step_index is None:  # a run begins
            self._init_step_index(timestep)
            self.v_before = None
        v, before, i = model_output.float(), self.v_before, self.step_index
        self.v_before = v
        if before is not None:
            ratio = (self.sigmas[i + 1] - self.sigmas[i]) / (self.sigmas[i] - self.sigmas[i - 1])
            v = v + 0.5 * ratio * (v - before)
        result = super().step(v, timestep, sample, return_dict=return_dict, **kwargs)
        x = step_output(result).to(model_output.dtype)
        return type(result)(x) if return_dict else (x,)


class FlowDPMSolver(GivenSigmas, DPMSolverMultistepScheduler):
    """DPM-Solver++(2M) (arXiv 2211.01095), as diffusers has it."""

    largest_sigma = LARGEST_SIGMA


class FlowUniPC(GivenSigmas, UniPCMultistepScheduler):
    """UniPC of order 2 (arXiv 2302.04867), as diffusers has it."""

    largest_sigma = LARGEST_SIGMA


SOLVERS: dict[str, type] = {
    "euler": FlowMatchEuler,
    "ab2": FlowMatchAB2,
    "dpmpp_2m": FlowDPMSolver,
    "unipc": FlowUniPC,
}
"""The samplers by the name used in tables."""


def solver_scheduler(name: str, sigmas: Sequence[float]) -> Any:
    """A scheduler that takes one step at each of `sigmas` and ends at 0.

    Args:
        name: `euler`, `ab2`, `dpmpp_2m` or `unipc`.
        sigmas: flow times of the steps, falling, in (0, 1].

    Raises:
        ValueError: the name is unknown, or the sigmas do not fall within (0, 1].
    """
    if name not in SOLVERS:
        raise ValueError(f"solver is {name!r}, expected one of {', '.join(SOLVERS)}.")
    given = tuple(float(sigma) for sigma in sigmas)
    falling = all(a > b for a, b in zip(given, given[1:], strict=False))
    if not given or not falling or not (given[0] <= 1 and given[-1] > 0):
        raise ValueError(
            f"the sigmas are {list(given)}, expected falling values in (0, 1]: these solvers go "
            "from noise to a sample. Of an inversion, bench the formulas and fits, or step its "
            "loop on fewer times."
        )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2}
    scheduler = SOLVERS[name](**({} if name in ("euler", "ab2") else flow))
    scheduler.given = given
    return scheduler


@contextlib.contextmanager
def sampling_with(pipe: Any, scheduler: Any) -> Iterator[Any]:
    """Let a pipeline use another scheduler for a while, come what may.

    Raises:
        ValueError: the pipeline's own scheduler is not one of flow matching, so its network does
            not predict v.
    """
    own = pipe.scheduler
    if not is_flow(own):
        raise ValueError(
            f"the pipeline samples with {type(own).__name__}, expected a flow-matching scheduler: "
            "the few-step solvers take the network's output for v = eps - x_0."
        )
    pipe.scheduler = scheduler
    try:
        yield pipe
    finally:
        pipe.scheduler = own
