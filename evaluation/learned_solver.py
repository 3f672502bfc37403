"""Linear multistep solvers as one class, closed-form or learned: tabulated, run, saved, loaded.

    x_{i+1} = x_i + alpha_i x_0 + sum_{j <= i} C_ij v(x_j, s_j),   x_0 the initial noise

Every linear solver of a flow model has this form, since states and data predictions are themselves
sums of the noise and earlier outputs (Shaul et al., arXiv 2403.01329, proposition 3.1): Euler,
Adams-Bashforth, DPM-Solver++ and UniPC, and what is learned instead of them (BNS, S4S, GS, LD3,
NeuralSolver, DyWeight). s_j is the time that the network is told.

Shapes: n network evaluations.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from jaxtyping import Float
from torch import Tensor

from foreseer.checkpoints.spec import check_model
from foreseer.checkpoints.strict import MalformedFile, parse_json, read_plain
from foreseer.evaluation.solvers import LARGEST_SIGMA, FlowMatchEuler, solver_scheduler
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.integration.host.hosts import transformers_of

SCHEMA = 1
LARGEST_TIME = 1.5  # a network may be told a little more than its largest time, 1
MOST_STEPS = 1000
MOST_BYTES = 2**24
LIBRARY = ("unipc",)  # tabulated from the library; the others have a formula of the times
FORMULAS = {"euler": 1, "ab2": 2, "dpmpp_2m": 2, "dpmpp_3m": 3}
"""Closed forms by name, with their order."""


@dataclass(frozen=True)
class LinearSolver:
    """The numbers of one linear solver.

    Args:
        times: s, told to the network, in (0, 1.5], float64.
        alpha: weights of the initial noise, float64.
        rows: C, lower triangle, float64.
    """

    times: Float[Tensor, " n"]
    alpha: Float[Tensor, " n"]
    rows: Float[Tensor, "n n"]

    def __len__(self) -> int:
        """Network evaluations."""
        return len(self.times)

    def flat(self) -> Float[Tensor, " P"]:
        """All numbers in one vector: times, alpha, the rows' lower triangle row by row."""
        return torch.cat([self.times, self.alpha, self.rows[*lower(len(self))]])

    @staticmethod
    def of(flat: Float[Tensor, " P"], num_steps: int) -> "LinearSolver":
        """The solver of such a vector."""
        rows = flat.new_zeros(num_steps, num_steps)
        rows[*lower(num_steps)] = flat[2 * num_steps :]
        return LinearSolver(flat[:num_steps], flat[num_steps : 2 * num_steps], rows)

    def check(self) -> None:
        """Raise unless the network can be asked at these times and nothing looks ahead.

        Raises:
            ValueError: it cannot.
        """
        n, flat = len(self.times), self.flat() if self.rows.dim() == 2 else self.rows
        if self.alpha.shape != (n,) or self.rows.shape != (n, n) or not n:
            shapes = [tuple(t.shape) for t in (self.times, self.alpha, self.rows)]
            raise ValueError(f"times, alpha and rows are {shapes}, expected (n), (n) and (n, n).")
        if not bool(flat.isfinite().all()):
            raise ValueError("the solver holds NaN or Inf, expected finite numbers.")
        if not bool(((self.times > 0) & (self.times <= LARGEST_TIME)).all()):
            times = [round(time, 4) for time in self.times.tolist()]
            raise ValueError(f"the times are {times}, expected them in (0, {LARGEST_TIME}].")
        if bool(self.rows.triu(1).any()):
            raise ValueError("the rows use outputs of later steps, expected a lower triangle.")


def lower(num_steps: int) -> tuple[Tensor, Tensor]:
    """Indices of a lower triangle, row by row."""
    found = torch.tril_indices(num_steps, num_steps)
    return found[0], found[1]


def closed_form(name: str, sigmas: Float[Tensor, " n"]) -> LinearSolver:
    """A published solver at given sigmas, which ends at 0.

    Args:
        name: one of `FORMULAS`, differentiable in the sigmas, or of `LIBRARY`.
        sigmas: falling, in (0, 1], float64.

    Raises:
        ValueError: there is no such solver.
    """
    if name in LIBRARY:
        states = _library_states(name, sigmas)
    elif name in ("euler", "ab2"):
        return LinearSolver(sigmas, torch.zeros_like(sigmas), _adams_bashforth(name, sigmas))
    elif name in FORMULAS:
        states = _dpm_solver_states(sigmas, FORMULAS[name])
    else:
        raise ValueError(f"solver is {name!r}, expected one of {', '.join((*FORMULAS, *LIBRARY))}.")
    moves = states.diff(dim=0)
    return LinearSolver(sigmas, moves[:, 0], moves[:, 1:])


def _adams_bashforth(name: str, sigmas: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
    """C of Euler, or of variable-step Adams-Bashforth 2 after a first step of Euler.

    H (1 + r/2, -r/2) on the newest two, H = sigma' - sigma, r = H / (sigma - sigma_before)
    (Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, section III.5).
    """
    steps = torch.cat([sigmas, sigmas.new_zeros(1)]).diff()
    if name == "euler":
        return torch.diag(steps)
    late = torch.cat([sigmas.new_zeros(1), steps[1:] * steps[1:] / steps[:-1] / 2])
    return torch.diag(steps + late) + torch.diag(-late[1:], -1)


def _dpm_solver_states(sigmas: Float[Tensor, " n"], order: int) -> Float[Tensor, "m k"]:
    """The states of DPM-Solver++(2M) or (3M) as weights of the noise and the outputs.

    Data predictions m = x - sigma v are extrapolated in log-SNR (Lu et al., arXiv 2211.01095,
    appendix A); the first steps and the last two have lower order, as in diffusers.
    """
    n = len(sigmas)
    s = torch.cat([sigmas.clamp(max=LARGEST_SIGMA), sigmas.new_zeros(1)])
    snr = torch.log((1 - s[:-1]) / s[:-1])
    basis = torch.eye(n + 1, dtype=s.dtype)
    data: list[Tensor] = []
    states = [basis[0]]
    for i in range(n):
        data.append(states[-1] - s[i] * basis[i + 1])
        if i == n - 1:  # log-SNR is infinite at sigma 0
            states.append(data[-1])
            continue
        h, kept = snr[i + 1] - snr[i], 1 - s[i + 1]
        p1 = torch.expm1(-h)
        x = s[i + 1] / s[i] * states[-1] - kept * p1 * data[-1]
        usable = min(order, i + 1, 2 if i == n - 2 and n < 15 else order)
        if usable >= 2:
            r0 = (snr[i] - snr[i - 1]) / h
            first = (data[-1] - data[-2]) / r0
        if usable == 2:
            x = x - kept * p1 / 2 * first
        if usable == 3:
            r1 = (snr[i - 1] - snr[i - 2]) / h
            bend = (first - (data[-2] - data[-3]) / r1) / (r0 + r1)
            p2 = p1 / h + 1
            x = x + kept * p2 * (first + r0 * bend) - kept * (p2 / h - 0.5) * bend
        states.append(x)
    return torch.stack(states)


def _library_states(name: str, sigmas: Float[Tensor, " n"]) -> Float[Tensor, "m k"]:
    """The same of a scheduler of the library: the noise and the outputs are unit vectors."""
    n = len(sigmas)
    scheduler = solver_scheduler(name, sigmas.tolist())
    scheduler.set_timesteps(n)
    basis = torch.eye(n + 1, dtype=torch.float64)[:, None]
    states = [basis[0]]
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(basis[i + 1], timestep, states[-1], return_dict=False)[0]
        states.append(x.double())
    return torch.cat(states)


class FlowMatchLinear(FlowMatchEuler):
    """Samples with a `LinearSolver`, from the beginning or from a later step on.

    Attributes:
        solver: its numbers; gradients flow into them.
        first: step the run begins with; the pipeline is given the state there as its latents.
        noise: x_0; None takes the first sample.
        outputs: the network's outputs at the steps before `first`, then of all steps.
        states: samples before every step of this run.
    """

    solver: LinearSolver
    first: int = 0
    noise: Tensor | None = None
    outputs: list[Tensor]
    states: list[Tensor]

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Start a run; see `GivenSigmas.set_timesteps`."""
        super().set_timesteps(*args, **kwargs)
        home = self.timesteps.device
        self.timesteps = 1000 * self.solver.times[self.first :].float().to(home)
        self.outputs, self.states = self.outputs[: self.first], []
        if not self.first:
            self.noise = None

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """One step of the class's equation, accumulated in float32."""
        i, x = self.first + len(self.states), sample.float()
        self.noise = x if self.noise is None else self.noise
        self.states.append(sample)
        self.outputs.append(model_output.float())
        self._step_index = i - self.first + 1
        if self.solver.alpha.requires_grad or bool(self.solver.alpha[i]):
            x = x + self.solver.alpha[i] * self.noise
        for weight, v in zip(self.solver.rows[i], self.outputs, strict=False):
            x = x + weight * v
        x = x.to(model_output.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)


def linear_scheduler(
    solver: LinearSolver,
    first: int = 0,
    noise: Tensor | None = None,
    outputs: Sequence[Tensor] = (),
) -> FlowMatchLinear:
    """A scheduler that samples with a solver; the pipeline takes as many steps as it has.

    Args:
        solver: the solver.
        first: step to begin with.
        noise: initial noise of the run so far.
        outputs: what the network returned at the steps before `first`.
    """
    solver.check()
    scheduler: FlowMatchLinear = FlowMatchLinear()
    scheduler.solver, scheduler.first, scheduler.noise = solver, first, noise
    scheduler.outputs, scheduler.states = list(outputs), []
    scheduler.given = tuple(solver.times[first:].tolist())
    return scheduler


@dataclass(frozen=True)
class LearnedSolver:
    """A fitted solver with what it was fitted for.

    Args:
        solver: its numbers.
        method: name of the family, such as `bns`.
        host: fingerprint of the model.
        guidance_scale: of the runs it was fitted on.
        metrics: what was measured and what the fit cost.
    """

    solver: LinearSolver
    method: str
    host: dict[str, Any]
    guidance_scale: float
    metrics: dict[str, float] = field(default_factory=dict)

    def scheduler(self, pipe: Any) -> FlowMatchLinear:
        """The solver for a pipeline.

        Raises:
            PredictorMismatch: the pipeline has another model than the fit's.
        """
        found = host_fingerprint(*transformers_of(pipe).values())
        check_model(self.host, found, f"the solver {self.method} was fitted")
        return linear_scheduler(self.solver)

    def digest(self) -> list[float]:
        """Its numbers, which tell it from others."""
        return self.solver.flat().tolist()

    def save(self, path: Path) -> None:
        """Write a JSON file, under a temporary name first."""
        self.solver.check()
        told = asdict(self) | {
            "schema_version": SCHEMA,
            "solver": {name: t.tolist() for name, t in vars(self.solver).items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n")
        unfinished.replace(path)

    @staticmethod
    def load(path: Path) -> "LearnedSolver":
        """What `save` wrote.

        Raises:
            MalformedFile: the file is missing or holds anything else.
        """
        try:
            told = parse_json(read_plain(path, MOST_BYTES))
            return _read(told)
        except MalformedFile:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise MalformedFile(f"{path} holds no learned solver: {error}") from error


def _read(told: Any) -> LearnedSolver:
    """A learned solver of what its file says."""
    keys = {"schema_version", "solver", "method", "host", "guidance_scale", "metrics"}
    if not isinstance(told, dict) or set(told) != keys:
        raise ValueError(f"found {sorted(told) if isinstance(told, dict) else told}, {keys=}.")
    if told["schema_version"] != SCHEMA:
        raise ValueError(f"its schema is {told['schema_version']}, expected {SCHEMA}.")
    numbers = told["solver"]
    if not isinstance(numbers, dict) or set(numbers) != {"times", "alpha", "rows"}:
        raise ValueError(f"its solver is {str(numbers)[:80]}, expected times, alpha and rows.")
    for name, values in numbers.items():
        rows = values if name == "rows" else [values]
        flat = [x for row in rows for x in row] if isinstance(rows, list) else []
        if not flat or len(rows) > MOST_STEPS or not all(type(x) in (int, float) for x in flat):
            raise ValueError(f"its {name} are {str(values)[:80]}, expected numbers.")
    solver = LinearSolver(
        **{name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()}
    )
    solver.check()
    plain = isinstance(told["host"], dict) and isinstance(told["metrics"], dict)
    if not plain or not isinstance(told["method"], str):
        raise ValueError("its method, host or metrics are of another kind.")
    guidance = float(told["guidance_scale"])
    return LearnedSolver(solver, told["method"], told["host"], guidance, told["metrics"])
