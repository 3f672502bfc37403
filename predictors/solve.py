"""The one solve behind every closed form: ridge regression in the unknowns' own units.

    x = D (D N D + strength 1)^-1 D r,   D = diag(N)^-1/2

minimises ||A x - y||^2 + strength sum_k N_kk x_k^2 with N = A^T A, r = A^T y. Features of different
steps, products of sigmas and channels have norms that are decades apart, so a strength relative to
each unknown's own squared norm is the only one that means the same for all of them, on every host,
tap and grid. `units` gives other squared norms where those are not the diagonal's: of features
whose matrix is what another solve has left of it, or one for all coordinates along whitened
directions, of which a small entry says that it matters little and must not be scaled away.
Shapes: K unknowns, T right sides, R strengths.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

CUTOFF = 1e-12  # of the largest eigenvalue: directions below hold the rounding of float64 alone


def ridge(
    normal: Float[Tensor, "*lead K K"],
    right: Float[Tensor, "*lead K T"],
    strength: float,
    units: Float[Tensor, "*lead K"] | None = None,
) -> Float[Tensor, "*lead K T"]:
    """The minimiser of every right side; at strength 0 the one of least norm in scaled unknowns.

    Args:
        normal: N, symmetric.
        right: r.
        strength: relative to the units, >= 0.
        units: squared norm of each unknown's feature; None takes the diagonal of N.

    Raises:
        ValueError: the strength is negative or NaN.
    """
    if not strength >= 0:
        raise ValueError(f"found the ridge {strength}, expected a strength >= 0.")
    if strength == 0:
        return ridges(normal, right, [0.0], units)[0]
    scale = _scale(normal, units)
    unit = normal * scale * scale.mT
    unit.diagonal(dim1=-2, dim2=-1).add_(strength + CUTOFF)
    return scale * torch.linalg.solve(unit, scale * right)


def ridges(
    normal: Float[Tensor, "*lead K K"],
    right: Float[Tensor, "*lead K T"],
    strengths: Sequence[float],
    units: Float[Tensor, "*lead K"] | None = None,
) -> Float[Tensor, "R *lead K T"]:
    """`ridge` at several strengths, from one eigendecomposition.

    Args:
        normal: N, symmetric.
        right: r.
        strengths: relative to the units, >= 0.
        units: see `ridge`.
    """
    scale = _scale(normal, units)
    values, vectors = torch.linalg.eigh(normal * scale * scale.mT)
    projected = vectors.mT @ (scale * right)
    limit = CUTOFF * values[..., -1:]
    found = []
    for strength in strengths:
        at = values + strength + CUTOFF if strength else values.where(values > limit, torch.inf)
        found.append(scale * (vectors @ (projected / at[..., None])))
    return torch.stack(found)


def _scale(
    normal: Float[Tensor, "*lead K K"], units: Float[Tensor, "*lead K"] | None
) -> Float[Tensor, "*lead K 1"]:
    squares = normal.diagonal(dim1=-2, dim2=-1) if units is None else units
    return squares.clamp_min(torch.finfo(normal.dtype).tiny).rsqrt()[..., None]


def closed_form(
    gram: Float[Tensor, "*lead S S"],
    history: Sequence[int],
    steps: Sequence[int],
    strengths: Sequence[float],
) -> Float[Tensor, "R *lead K T"]:
    """Weights c of the features at `history` that forecast each of `steps` best, from Grams.

    c - e_newest solves (G_hh + strength diag G_hh) delta = g_t - G_hh e_newest: a shrinkage toward
    reuse of the newest feature, with which every forecaster starts.

    Args:
        gram: summed or mean Grams, float64.
        history: steps whose features are known, oldest first.
        steps: steps to forecast.
        strengths: of the ridge, one or several.
    """
    known = list(history)
    inner = gram[..., known, :][..., known]
    right = gram[..., known, :][..., list(steps)] - inner[..., -1:]
    if len(strengths) == 1:
        weights = ridge(inner, right, strengths[0])[None]
    else:
        weights = ridges(inner, right, strengths)
    weights[..., -1, :] += 1.0
    return weights


def expert_start(expert_steps: Sequence[int], index: int) -> int:
    """First step of the transformer that runs at a step."""
    return max(step for step in expert_steps if step <= index)


def known_anchors(anchors: Sequence[int], expert_steps: Sequence[int], index: int) -> list[int]:
    """The anchors up to a step, of the transformer that runs there."""
    first = expert_start(expert_steps, index)
    return [anchor for anchor in anchors if first <= anchor <= index]


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
    for anchor, end in zip(anchors, [*anchors[1:], num_steps], strict=True):
        history = known_anchors(anchors, expert_steps, anchor)
        if steps := list(range(anchor + 1, end)):
            found.append((history if window is None else history[-window:], steps))
    return found


def least_squares_rows(
    total: Float[Tensor, "*lead S S"],
    anchors: Sequence[int],
    strength: float = 1e-4,
    expert_steps: Sequence[int] = (0,),
) -> Float[Tensor, "*lead S S"]:
    """Rows on anchors that minimise the squared error summed in Grams; of an anchor its unit row.

    Every branch and part is solved for on its own: parts are orthogonal, so the squared error of a
    forecast is the sum of theirs.

    Args:
        total: Grams, summed over trajectories.
        anchors: steps at which the network runs, the first of every transformer among them.
        strength: of the ridge toward reuse, relative to each feature's squared norm, >= 0.
        expert_steps: first step of each transformer, starting with 0.
    """
    total = total.detach().cpu().double()
    rows = torch.zeros_like(total)
    for history, steps in segments(anchors, total.shape[-1], expert_steps):
        found = closed_form(total, history, steps, [strength])[0]
        for place, step in enumerate(history):
            rows[..., steps, step] = found[..., place, :]
    for anchor in anchors:
        rows[..., anchor, anchor] = 1.0
    return rows
