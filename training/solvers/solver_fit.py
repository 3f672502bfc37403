"""Fit a learned solver on the finished sample: Gauss-Newton, or Adam, through the sampler.

Both minimise the mean over trajectories of log ||x_n - x(1)||^2, which is what PSNR averages
(Shaul et al., arXiv 2403.01329, eq. 16), and keep the iterate that does best on trajectories that
are not fitted on: the start is among them, so no fit ends below it.

Gauss-Newton needs the derivative of x_n by every number of the solver. A number of step i changes
nothing before it, so its finite difference puts back the samples and outputs up to there and costs
the network evaluations after it: of all numbers together (n^3 + 6 n^2 - n) / 6 a trajectory, 148 at
8 steps, from which every family's own derivatives follow by the chain rule.
Shapes: n evaluations, B samples, M elements of a latent, P numbers of a solver, T free ones.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from foreseer.evaluation.learned_solver import (
    FlowMatchLinear,
    LinearSolver,
    linear_scheduler,
    lower,
)
from foreseer.evaluation.measure import References, log_error
from foreseer.evaluation.solvers import sampling_with
from foreseer.training.gauss_newton import DIFFERENCE, RIDGES, UNIT, Quadratics
from foreseer.training.solvers.families import Parametrisation, coordinate
from foreseer.training.tracking import whitening
from foreseer.trajectories.prompts import Item, generate_batch, generate_with_gradients

TIME_UNIT = 0.02  # a time that is moved by so much counts as `UNIT` of a state
TIME_DIFFERENCE = 0.003  # finite-difference step of a time
KEPT = ("constant", "linear", "curvature", "metric", "touched")


def usable(solver: LinearSolver) -> bool:
    """Whether a network can be asked at the solver's times."""
    try:
        solver.check()
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Linearised:
    """The final errors around one solver.

    Args:
        quadratics: of the trajectories, in the numbers that were touched.
        metric: squared size of a move of all numbers: 1 moves a state by `UNIT` of its RMS.
        touched: which numbers the quadratics have.
    """

    quadratics: Quadratics
    metric: Float[Tensor, "P P"]
    touched: list[int]

    def along(self, jacobian: Float[Tensor, "P T"]) -> tuple[Quadratics, Tensor]:
        """Quadratics in whitened directions of theta, and those directions as columns."""
        moves = whitening(jacobian.mT @ self.metric @ jacobian)
        return self.quadratics.along(jacobian[self.touched] @ moves), moves


class SolverRuns:
    """Recorded trajectories, sampled again with linear solvers.

    Args:
        pipe: the pipeline.
        references: the trajectories.
        folder: where linearisations are kept, so that a fit that was cut short goes on and families
            with one start share it; None keeps none.

    Attributes:
        evaluations: network evaluations so far, a guided one counted once, over all trajectories.
    """

    def __init__(self, pipe: Any, references: References, folder: Path | None = None) -> None:
        self.pipe, self.references, self.folder = pipe, references, folder
        self.evaluations = 0

    def errors(self, solver: LinearSolver) -> Float[Tensor, " B"]:
        """Error in dB of every final latent; infinite where the solver is none."""
        if not usable(solver):
            return torch.full((len(self.references.items),), torch.inf)
        batches = self.references.batches
        latents = [self.run(linear_scheduler(solver), items).cpu() for items in batches]
        return log_error(torch.cat(latents), self.references.finals).nan_to_num(nan=torch.inf)

    def run(self, scheduler: FlowMatchLinear, items: Sequence[Item], **given: Any) -> Tensor:
        """Final latents of one batch."""
        return self._call(generate_batch, scheduler, items, given)

    def run_with_gradients(self, scheduler: FlowMatchLinear, items: Sequence[Item]) -> Tensor:
        """The same, differentiable in the solver; it counts as three evaluations a step."""
        self.evaluations += 2 * len(items) * len(scheduler.given)
        return self._call(generate_with_gradients, scheduler, items, {})

    def _call(
        self,
        generate: Callable[..., Any],
        scheduler: FlowMatchLinear,
        items: Sequence[Item],
        given: dict[str, Any],
    ) -> Tensor:
        num_steps = len(scheduler.given)
        self.evaluations += len(items) * num_steps
        settings = {**self.references.settings, "num_inference_steps": num_steps}
        with sampling_with(self.pipe, scheduler):
            latents: Tensor = generate(self.pipe, items, output_type="latent", **settings, **given)[
                0
            ]
        return latents

    @torch.no_grad()
    def linearise(self, solver: LinearSolver, touched: Sequence[int]) -> Linearised:
        """Derivatives by some of a solver's numbers, from the file where there is one.

        What is found there counts as evaluations all the same: whoever fits alone needs them.
        """
        self.evaluations += len(self.references.items) * cost(touched, len(solver))
        path = None if self.folder is None else self.folder / f"{self._digest(solver)}.safetensors"
        if path is not None and path.exists():
            kept = load_file(path)
            known = kept["touched"].tolist()
            if set(touched) <= set(known):
                places = [known.index(number) for number in touched]
                found = Quadratics(kept["constant"], kept["linear"], kept["curvature"])
                moves = torch.eye(len(known), dtype=torch.float64)[:, places]
                return Linearised(found.along(moves), kept["metric"], list(touched))
        parts, metrics, start = [], [], 0
        for items in self.references.batches:
            finals = self.references.finals[start : start + len(items)]
            start += len(items)
            part, metric = self._linearise(solver, touched, items, finals)
            parts.append(part)
            metrics.append(metric * len(items) / len(self.references.items))
        made = Linearised(Quadratics.join(parts), torch.stack(metrics).sum(0), list(touched))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            numbers = torch.tensor(made.touched)
            told = vars(made.quadratics) | {"metric": made.metric, "touched": numbers}
            save_file({name: told[name].contiguous() for name in KEPT}, path)
        return made

    def _digest(self, solver: LinearSolver) -> str:
        numbers = [round(number, 9) + 0.0 for number in solver.flat().tolist()]
        told = json.dumps([numbers, list(map(int, self.references.items))])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def _linearise(
        self,
        solver: LinearSolver,
        touched: Sequence[int],
        items: Sequence[Item],
        finals: Float[Tensor, " B *shape"],
    ) -> tuple[Quadratics, Float[Tensor, "P P"]]:
        base, before = linear_scheduler(solver), self.evaluations
        end = self.run(base, items)
        assert base.noise is not None  # a run sets it
        regressors, states = [base.noise, *base.outputs], [*base.states, end]
        columns = []
        for number in touched:
            step, column = coordinate(number, len(solver))
            if column is None:
                first, size, state = step, TIME_DIFFERENCE, states[step]
            else:
                vector = regressors[column + 1]
                share = states[step].float().square().mean() / vector.square().mean()
                first, size = step + 1, DIFFERENCE * UNIT * float(share.sqrt())
                state = states[first] + (size * vector).to(end.dtype)
            flat = solver.flat()
            flat[number] += size
            moved = LinearSolver.of(flat, len(solver))
            if first < len(solver):
                tail = linear_scheduler(moved, first, base.noise, base.outputs[:first])
                state = self.run(tail, items, latents=state)
            columns.append((state - end).flatten(1).cpu().double() / size)
        self.evaluations = before  # counted as a whole
        error = end.flatten(1).cpu().double() - finals.flatten(1).double()
        return Quadratics.of(error, torch.stack(columns, -1)), _metric(solver, regressors, states)


def cost(touched: Sequence[int], num_steps: int) -> int:
    """Network evaluations a trajectory of one run and its derivatives by some numbers."""
    total = num_steps
    for number in touched:
        step, column = coordinate(number, num_steps)
        total += num_steps - step - (column is not None)
    return total


def _metric(
    solver: LinearSolver, regressors: Sequence[Tensor], states: Sequence[Tensor]
) -> Float[Tensor, "P P"]:
    """Squared size of moves, by what they do to the state after their own step."""
    n = len(solver)
    values = torch.stack([each.flatten().double().cpu() for each in regressors])
    gram = values @ values.mT / values.shape[1]
    metric = torch.zeros(len(solver.flat()), len(solver.flat()), dtype=torch.float64)
    metric.diagonal()[:n] = TIME_UNIT**-2
    rows = lower(n)[0]
    for step, state in enumerate(states[:n]):
        places = [n + step, *(2 * n + torch.nonzero(rows == step)[:, 0]).tolist()]
        size = UNIT**2 * float(state.double().square().mean())
        grid = torch.meshgrid(torch.tensor(places), torch.tensor(places), indexing="ij")
        metric[grid] = gram[: step + 2, : step + 2] / size
    return metric


@dataclass
class SolverFit:
    """What a fit found.

    Args:
        theta: the free numbers.
        error_db: mean error on the trajectories it is chosen on.
        curve: (network evaluations of the fit so far, that error) whenever it was measured.
    """

    theta: Tensor
    error_db: float
    curve: list[tuple[int, float]] = field(default_factory=list)

    def consider(self, theta: Tensor, error_db: float) -> bool:
        """Keep a theta if it is better."""
        if error_db >= self.error_db:
            return False
        self.theta, self.error_db = theta.detach().clone(), error_db
        return True


def begin(made: Parametrisation, chosen: SolverRuns) -> SolverFit:
    """The start as what was found so far."""
    theta = made.zeros()
    error = float(chosen.errors(made.solver(theta)).mean())
    return SolverFit(theta, error, [(0, error)])


def fit_gauss_newton(
    made: Parametrisation,
    fitted: SolverRuns,
    chosen: SolverRuns,
    num_epochs: int = 3,
    tell: Callable[[str], Any] = print,
) -> SolverFit:
    """Gauss-Newton epochs until one gains nothing on the trajectories it is chosen on.

    Args:
        made: what is free, and the start.
        fitted: trajectories to fit on.
        chosen: trajectories to choose on.
        num_epochs: epochs at most.
        tell: told of each epoch.
    """
    found = begin(made, chosen)
    cost = fitted.evaluations + chosen.evaluations
    for epoch in range(num_epochs):
        at, before = found.theta.clone(), found.error_db
        jacobian = made.jacobian(at)
        touched = torch.nonzero(jacobian.abs().sum(1))[:, 0].tolist()
        linearised = fitted.linearise(made.solver(at), touched)
        quadratics, moves = linearised.along(jacobian)
        for strength in RIDGES:
            theta = at + moves @ quadratics.solve(strength)
            error = float(chosen.errors(made.solver(theta)).mean())
            found.consider(theta, error)
            tell(f"epoch {epoch}, ridge {strength:g}: {error:.3f} dB, best {found.error_db:.3f}")
        spent = fitted.evaluations + chosen.evaluations - cost
        found.curve.append((spent, found.error_db))
        if found.error_db > before - 0.01:
            break
    return found


def fit_adam(
    made: Parametrisation,
    fitted: SolverRuns,
    chosen: SolverRuns,
    learning_rate: float,
    num_iterations: int,
    every: int,
    seed: int = 0,
    tell: Callable[[str], Any] = print,
) -> SolverFit:
    """Adam on the same objective, a batch of the recorded trajectories an iteration.

    Args:
        made: what is free, and the start.
        fitted: trajectories to fit on.
        chosen: trajectories to choose on.
        learning_rate: of Adam.
        num_iterations: iterations.
        every: iterations between two measurements of the choosing trajectories.
        seed: of the order of batches.
        tell: told of each measurement.
    """
    found = begin(made, chosen)
    cost = fitted.evaluations + chosen.evaluations
    theta = found.theta.clone().requires_grad_()
    adam = torch.optim.Adam([theta], lr=learning_rate)
    batches = fitted.references.batches
    ends = fitted.references.finals.split([len(batch) for batch in batches])
    generator = torch.Generator().manual_seed(seed)
    for iteration in range(num_iterations):
        if not iteration % len(batches):
            order = torch.randperm(len(batches), generator=generator).tolist()
        pick = order[iteration % len(batches)]
        solver = made.solver(theta)
        if not usable(solver):
            tell(f"iteration {iteration + 1}: {solver.times.tolist()} are no times, the fit ends")
            break
        scheduler = linear_scheduler(solver)
        latents = fitted.run_with_gradients(scheduler, batches[pick])
        squared = (latents - ends[pick].to(latents)).flatten(1).square().mean(1)
        (theta.grad,) = torch.autograd.grad(squared.log().mean(), theta)
        adam.step()
        if not (iteration + 1) % every:
            error = float(chosen.errors(made.solver(theta.detach())).mean())
            found.consider(theta, error)
            spent = fitted.evaluations + chosen.evaluations - cost
            found.curve.append((spent, error))
            tell(f"iteration {iteration + 1}: {error:.3f} dB, best {found.error_db:.3f}")
    return found
