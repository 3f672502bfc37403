"""The published recipe's objective on Grams, and the rows of the formulas.

Shapes: S sampling steps.
Source: L2P, arXiv 2604.26365; loss_t = w^T G_hh w - 2 w^T g_t + G_tt is its MSE, written on Grams.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.evaluation.solvers import solver_scheduler
from foreseer.integration.linear_sampler import probe
from foreseer.predictors.ladder import rises, with_end
from foreseer.predictors.rules import RULES

SECOND_ORDER = ("dpmpp_2m", "unipc")
"""Solvers whose rows are starts beside the formulas; Adams-Bashforth-2 is among these."""


def reuse_weight(num_branches: int, num_steps: int) -> Float[Tensor, "branches S S"]:
    """The published initialisation: W[t, t-1] = 1."""
    return torch.diag(torch.ones(num_steps - 1), -1).repeat(num_branches, 1, 1)


def published_loss(
    weight: Float[Tensor, "branches S S"], mean_gram: Float[Tensor, "branches S S"]
) -> Float[Tensor, ""]:
    """Mean squared one-step error of strictly causal rows over steps and branches, on mean Grams.

    Args:
        weight: rows over all earlier steps; entries on and above the diagonal are not used.
        mean_gram: Gram of the average trajectory element (summed Gram over trajectories and
            elements, divided by their number), so that the loss is the MSE over elements of the
            paper.
    """
    c = weight.tril(-1) - torch.eye(weight.shape[-1], dtype=weight.dtype)
    errors = torch.einsum("bts,bsu,btu->bt", c, mean_gram.to(weight.dtype), c)
    return errors[:, 1:].mean()


def adams_bashforth_rows(anchors: Sequence[int], sigmas: Sequence[float]) -> Float[Tensor, "S S"]:
    """Rows whose Euler sum over each segment is the variable-step Adams-Bashforth-2 update.

    AB2 from anchor a to the next, H = sigma_next - sigma_a, r = H / (sigma_a - sigma_b):
    x += H ((1 + r/2) v_a - r/2 v_b) (Hairer, Norsett & Wanner, section III.5). The anchor's own
    Euler step uses v_a, so the rows of the segment's other steps carry the rest.
    """
    num_steps = len(sigmas)
    grid = with_end(sigmas)
    rows = torch.zeros(num_steps, num_steps, dtype=torch.float64)
    for k, (a, end) in enumerate(zip(anchors, [*anchors[1:], num_steps], strict=True)):
        rows[a, a] = 1.0
        rest = grid[end] - grid[a + 1]
        if end == a + 1 or rest == 0:
            continue
        span, slope = grid[end] - grid[a], 0.0
        if k:
            slope = span * span / (2 * (grid[a] - grid[anchors[k - 1]]) * rest)
            rows[a + 1 : end, anchors[k - 1]] = -slope
        rows[a + 1 : end, a] = 1.0 + slope
    return rows


def solver_rows(name: str, anchors: Sequence[int], sigmas: Sequence[float]) -> Float[Tensor, "S S"]:
    """Rows whose Euler sum over each segment is a few-step solver's step from anchor to anchor.

    Every solver of `SOLVERS` is linear in the network's outputs, so a probe finds its weights. The
    anchor's own Euler step uses its output, so the rows of the segment's other steps carry the
    rest; from an anchor to one right behind it there are none, and the step stays Euler's.

    Args:
        name: of the solver.
        anchors: steps at which the network runs.
        sigmas: flow time of every step.
    """
    scheduler = solver_scheduler(name, [sigmas[anchor] for anchor in anchors])
    scheduler.set_timesteps(len(anchors))
    steps = probe(scheduler).response.diff(dim=0)  # (A, A): x changes by sum_j steps[k, j] v_j
    num_steps, grid, known = len(sigmas), with_end(sigmas), list(anchors)
    rows = torch.zeros(num_steps, num_steps, dtype=torch.float64)
    for k, (a, end) in enumerate(zip(anchors, [*anchors[1:], num_steps], strict=True)):
        rows[a, a] = 1.0
        rest = grid[end] - grid[a + 1]
        if end == a + 1 or rest == 0:
            continue
        steps[k, k] -= grid[a + 1] - grid[a]
        rows[a + 1 : end, known[: k + 1]] = steps[k, : k + 1] / rest
    return rows


def formula_tables(
    anchors: Sequence[int], sigmas: Sequence[float], expert_steps: Sequence[int] = (0,)
) -> dict[str, Float[Tensor, "S S"]]:
    """The rows of every formula, and of Adams-Bashforth-2 where one transformer runs.

    Args:
        anchors: steps at which the network runs.
        sigmas: flow time of every step.
        expert_steps: first step of each transformer, starting with 0.
    """
    tables = {n: rule.rows(anchors, sigmas, expert_steps)[0, 0] for n, rule in RULES.items()}
    if len(expert_steps) == 1:
        tables["ab2"] = adams_bashforth_rows(anchors, sigmas)
    return tables


def analytic_rows(
    anchors: Sequence[int], sigmas: Sequence[float]
) -> dict[str, Float[Tensor, "S S"]]:
    """`formula_tables` of one transformer and the rows of the solvers; of equal ones the first.

    The solvers go from noise to a sample, so an inversion has none of theirs.
    """
    unique: dict[str, Float[Tensor, "S S"]] = {}
    tables = formula_tables(anchors, sigmas)
    solvers = () if rises(sigmas) else SECOND_ORDER
    tables |= {name: solver_rows(name, anchors, sigmas) for name in solvers}
    for name, table in tables.items():
        if not any(
            torch.equal(table.round(decimals=12), u.round(decimals=12)) for u in unique.values()
        ):
            unique[name] = table
    return unique
