"""Closed-form rows of L2P from Grams, the published recipe's objective, and the analytic starts.

Shapes: n trajectories, S sampling steps, K anchors.
Source: L2P, arXiv 2604.26365; loss_t = w^T G_hh w - 2 w^T g_t + G_tt is its MSE, written on Grams.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import LinearPredictor
from foreseer.predictors.damped import Damped
from foreseer.predictors.foca import Foca2Point, FocaRecursive
from foreseer.predictors.hermite import HiCache, ScaledTaylor
from foreseer.predictors.linear import tabulate
from foreseer.predictors.multistep import BDF2, AdamsMoulton, RungeKutta2
from foreseer.predictors.polynomial import Newton, Reuse, Taylor

RULES: dict[str, LinearPredictor] = {
    "reuse": Reuse(),
    "taylor_1": Taylor(1),
    "taylor_2": Taylor(2),
    "taylor_3": Taylor(3),
    "newton_1": Newton(1),
    "newton_2": Newton(2),
    "newton_3": Newton(3),
    "hicache_2": HiCache(2),
    "hicache_2_s71": HiCache(2, 0.71),
    "scaled_taylor_2": ScaledTaylor(2),
    "rk2": RungeKutta2(),
    "bdf2": BDF2(),
    "adams_moulton": AdamsMoulton(),
    "foca_2pt": Foca2Point(),
    "foca_recursive": FocaRecursive(),
    "damped_half": Damped(0.5),
}
"""The formulas every learned predictor is measured against, by the name used in tables."""


def least_squares_rows(
    grams: Float[Tensor, "n branches S S"], anchors: Sequence[int], ridge: float = 1e-4
) -> Float[Tensor, "branches S S"]:
    """Rows on anchors that minimise the summed squared error, shrunk toward reuse.

    Solves (G_hh + ridge diag(G_hh)) delta = g_t - G_hh e_newest for every step t in float64.

    Args:
        grams: one Gram per trajectory and branch.
        anchors: steps at which the network runs, starting with 0.
        ridge: strength relative to each feature's squared norm, >= 0.

    Raises:
        ValueError: there is no trajectory, or the ridge is negative.
    """
    if not len(grams) or ridge < 0:
        raise ValueError(
            f"found {len(grams)} trajectories and ridge {ridge}, expected >= 1 and >= 0."
        )
    total = grams.double().sum(0)
    rows = torch.zeros_like(total)
    for t in range(total.shape[-1]):
        history = [a for a in anchors if a < t]
        if t in anchors:
            rows[:, t, t] = 1.0
            continue
        inner = total[:, history][:, :, history]
        error = total[:, history, t] - inner[:, :, -1]
        scale = inner.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).rsqrt()
        normal = inner * scale[:, :, None] * scale[:, None, :]
        normal = normal + (ridge + 1e-12) * torch.eye(len(history), dtype=torch.float64)
        rows[:, t, history] = torch.linalg.solve(normal, error * scale) * scale
        rows[:, t, history[-1]] += 1.0
    return rows


def expert_rows(
    grams: Float[Tensor, "n branches S S"],
    anchors: Sequence[int],
    expert_steps: Sequence[int],
    ridge: float = 1e-4,
) -> Float[Tensor, "branches S S"]:
    """The least-squares rows of every transformer on its own steps and anchors.

    Args:
        grams: one Gram per trajectory and branch.
        anchors: steps at which the network runs, the first of every transformer among them.
        expert_steps: first step of each transformer, starting with 0.
        ridge: see `least_squares_rows`.
    """
    num_steps = grams.shape[-1]
    rows = torch.zeros_like(grams[0], dtype=torch.float64)
    for first, end in zip(expert_steps, [*expert_steps[1:], num_steps], strict=True):
        own = [anchor - first for anchor in anchors if first <= anchor < end]
        block = least_squares_rows(grams[..., first:end, first:end], own, ridge)
        rows[:, first:end, first:end] = block
    return rows


def segments(
    anchors: Sequence[int],
    num_steps: int,
    expert_steps: Sequence[int] = (0,),
    window: int | None = None,
) -> list[tuple[list[int], list[int]]]:
    """The steps between two anchors, with the anchors all of them are forecast from.

    Args:
        anchors: steps at which the network runs, the first of every transformer among them.
        num_steps: S.
        expert_steps: first step of each transformer, starting with 0.
        window: newest anchors to use; None uses all.

    Returns:
        (history, steps) of every segment that has steps.
    """
    found = []
    for place, (anchor, end) in enumerate(zip(anchors, [*anchors[1:], num_steps], strict=True)):
        first = max(step for step in expert_steps if step <= anchor)
        history = [a for a in anchors[: place + 1] if a >= first]
        if steps := list(range(anchor + 1, end)):
            found.append((history if window is None else history[-window:], steps))
    return found


def formula_rows(
    rule: LinearPredictor,
    anchors: Sequence[int],
    sigmas: Sequence[float],
    expert_steps: Sequence[int] = (0,),
) -> Float[Tensor, "S S"]:
    """The rows of a formula, which begins anew with every transformer.

    Args:
        rule: the formula.
        anchors: steps at which the network runs.
        sigmas: flow time of every step.
        expert_steps: first step of each transformer, starting with 0.
    """
    rows = torch.zeros(len(sigmas), len(sigmas), dtype=torch.float64)
    for first, end in zip(expert_steps, [*expert_steps[1:], len(sigmas)], strict=True):
        own = [anchor - first for anchor in anchors if first <= anchor < end]
        rows[first:end, first:end] = tabulate(rule, own, sigmas[first:end])
    return rows


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
    grid = [*sigmas, 0.0]
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


def analytic_rows(
    anchors: Sequence[int], sigmas: Sequence[float]
) -> dict[str, Float[Tensor, "S S"]]:
    """The rows of every formula on these anchors, AB2 included; of equal ones the first."""
    rows = {name: tabulate(rule, anchors, sigmas) for name, rule in RULES.items()}
    rows |= {"ab2": adams_bashforth_rows(anchors, sigmas)}
    unique: dict[str, Float[Tensor, "S S"]] = {}
    for name, table in rows.items():
        if not any(
            torch.equal(table.round(decimals=12), u.round(decimals=12)) for u in unique.values()
        ):
            unique[name] = table
    return unique
