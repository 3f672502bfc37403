"""Gram matrices of a trajectory's features, and what follows from them.

They are all that a linear forecaster can know.
Shapes: S sampling steps, K anchors, P parts. A Gram G has G[s, t] = <F_s, F_t>, float64; leading
axes (trajectories, branches) are kept by every function.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.partition import Partition
from foreseer.predictors.solve import ridge

GRAM_COLUMNS = 2048  # widened to float64 at once: 0.8 MB for 50 steps, which fits a cache


def gram(features: Float[Tensor, "*lead S M"]) -> Float[Tensor, "*lead S S"]:
    """<F_s, F_t> in float64 (float32 sums double the residual of a fit on smooth trajectories).

    Widened a few columns at a time: all at once they take four times the memory of bfloat16
    features, 136 GiB for one branch of HunyuanVideo at 720p, and longer (docs/scale.md).
    """
    num_steps, size = features.shape[-2:]
    total = features.new_zeros((*features.shape[:-1], num_steps), dtype=torch.float64)
    for start in range(0, size, GRAM_COLUMNS):
        wide = features[..., start : start + GRAM_COLUMNS].double()
        total += wide @ wide.mT
    return total


def part_grams(
    trajectory: Float[Tensor, "branches S *shape"], partition: Partition
) -> Float[Tensor, "branches P S S"]:
    """The Gram of every part of one trajectory's features; over the parts they sum to `gram`."""
    return torch.stack([partition.grams(features) for features in trajectory])


def relative_change(grams: Float[Tensor, "*lead S S"]) -> Float[Tensor, "*lead S-1"]:
    """||F_s - F_{s-1}|| / ||F_{s-1}|| of every step but the first."""
    norms = grams.diagonal(dim1=-2, dim2=-1)
    cross = grams.diagonal(offset=1, dim1=-2, dim2=-1)
    squared = norms[..., 1:] - 2 * cross + norms[..., :-1]
    return (squared.clamp_min(0) / norms[..., :-1]).sqrt()


def cosine_to_previous(grams: Float[Tensor, "*lead S S"]) -> Float[Tensor, "*lead S-1"]:
    """cos(F_s, F_{s-1}) of every step but the first."""
    norms = grams.diagonal(dim1=-2, dim2=-1)
    cross = grams.diagonal(offset=1, dim1=-2, dim2=-1)
    return cross / (norms[..., 1:] * norms[..., :-1]).sqrt()


def cosines(grams: Float[Tensor, "*lead S S"]) -> Float[Tensor, "*lead S S"]:
    """cos(F_s, F_t) of every two steps; 0 with a feature that is 0."""
    scale = grams.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(grams.dtype).tiny).rsqrt()
    return grams * scale[..., :, None] * scale[..., None, :]


def magnitude_ratios(grams: Float[Tensor, "n branches S S"]) -> list[float]:
    """Mean ||F_t|| / ||F_{t-1}|| of every step, as MagCache calibrates it; 1 at step 0.

    Args:
        grams: Gram matrices of the `residual` tap.
    """
    norms = grams.diagonal(dim1=-2, dim2=-1).sqrt()
    ratios = (norms[..., 1:] / norms[..., :-1]).flatten(0, 1).mean(0)
    return [1.0, *ratios.tolist()]


def projection_fidelity(
    grams: Float[Tensor, "*lead S S"], anchors: Sequence[int] | None = None
) -> Float[Tensor, "*lead S"]:
    """1 - ||F_t - Proj F_t|| / ||F_t||, Proj onto the earlier features.

    arXiv 2604.26365, section 3. The coefficients are each trajectory's own: an oracle, the ceiling
    of every linear forecaster.

    Args:
        grams: Gram matrices.
        anchors: project onto these steps only; None projects onto all earlier steps.

    Returns:
        Fidelity per step; 0 at step 0, which has nothing to be projected on, and 1 at an anchor.
    """
    num_steps = grams.shape[-1]
    fidelity = torch.zeros(grams.shape[:-1], dtype=torch.float64)
    for t in range(1, num_steps):
        history = [s for s in (range(t) if anchors is None else anchors) if s < t]
        if anchors is not None and t in anchors:
            fidelity[..., t] = 1.0
            continue
        residual = grams[..., t, t] - explained(grams, history, t)
        fidelity[..., t] = 1 - (residual.clamp_min(0) / grams[..., t, t]).sqrt()
    return fidelity


def explained(
    grams: Float[Tensor, "*lead S S"], history: list[int], t: int
) -> Float[Tensor, " *lead"]:
    """g^T G_hh^+ g: the squared norm of F_t's projection on the features of `history`."""
    g = grams[..., history, t]
    weights = ridge(grams[..., history, :][..., history], g[..., None], 0.0)[..., 0]
    return (g * weights).sum(-1)


def squared_errors(
    grams: Float[Tensor, "*lead P S S"], rows: Float[Tensor, "*lead2 #P S S"]
) -> Float[Tensor, "*lead P S"]:
    """||P_p (F_t - sum_s rows[p, t, s] F_s)||^2 of every part and step: c^T G c, c = e_t - row t.

    Args:
        grams: Gram matrices of the parts.
        rows: weights of every step (of an anchor its unit row), broadcast against leading axes.
    """
    return _squares(grams, rows.double() - torch.eye(rows.shape[-1], dtype=torch.float64))


def relative_errors(
    grams: Float[Tensor, "*lead P S S"], rows: Float[Tensor, "*lead2 #P S S"]
) -> Float[Tensor, "*lead S"]:
    """||F_t - F_hat_t|| / ||F_t|| of every step, F_hat forecast by rows; 0 at an anchor.

    Args:
        grams: Gram matrices of the parts, P = 1 of the whole feature.
        rows: weights of every step, see `Predictor.rows`.
    """
    norms = grams.diagonal(dim1=-2, dim2=-1).sum(-2)
    return (squared_errors(grams, rows).sum(-2) / norms).sqrt()


def accumulated_error(
    grams: Float[Tensor, "*lead S S"], rows: Float[Tensor, "*lead2 S S"], sigmas: Sequence[float]
) -> Float[Tensor, "*lead S"]:
    """||sum_{t<=s} h_t (F_hat_t - F_t)|| after every step s, with h_t = sigma_{t+1} - sigma_t.

    How far an Euler run is off after step s, w^T G w with w = sum_t h_t (c_t - e_t). Exact for
    recorded `output` features of a run without guidance whose network does not react to the error.
    The last entry is the error of the final sample.

    Args:
        grams: Gram matrices.
        rows: weights of every step (of an anchor its unit row), broadcast against leading axes.
        sigmas: flow time of every step; the run ends at 0.
    """
    c = rows.double() - torch.eye(rows.shape[-1], dtype=torch.float64)
    euler_steps = torch.tensor([*sigmas, 0.0], dtype=torch.float64).diff()
    return _squares(grams, (euler_steps[:, None] * c).cumsum(-2)).sqrt()


def spread(grams: Float[Tensor, "*lead S S"]) -> Float[Tensor, " *lead"]:
    """RMS distance over the steps of a trajectory's feature from its own mean over the steps.

    The scale of what has to be forecast: the part of a feature that never changes costs nothing.
    """
    squared = grams.diagonal(dim1=-2, dim2=-1).mean(-1) - grams.mean((-2, -1))
    return squared.clamp_min(0).sqrt()


def _squares(
    grams: Float[Tensor, "*lead S S"], weights: Float[Tensor, "*lead2 T S"]
) -> Float[Tensor, "*lead T"]:
    """||sum_s w_s F_s||^2 for every row w."""
    return ((weights @ grams) * weights).sum(-1).clamp_min(0)
