"""Gram matrices of a trajectory's features, and what follows from them.

They are all that a linear forecaster can know.
Shapes: S sampling steps, K anchors, P parts. A Gram G has G[s, t] = <F_s, F_t>, float64; leading
axes (trajectories, branches) are kept by every function.

The closed forms need nothing but the sum and the count, so memory does not grow with the number of
trajectories. Adding in a fixed order makes the sum the same bit for bit whenever it is made again.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import IterableDataset

from foreseer.predictors.ladder import with_end
from foreseer.predictors.partition import Partition
from foreseer.predictors.solve import ridge
from foreseer.trajectories.recording import Recording, RecordingError

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
        sigmas: flow time of every step; the run ends at 0, where they rise at 1.
    """
    c = rows.double() - torch.eye(rows.shape[-1], dtype=torch.float64)
    euler_steps = torch.tensor(with_end(sigmas), dtype=torch.float64).diff()
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


CHUNK = 64
"""Trajectories whose Grams are held at once where they are looked at one by one."""


def load_grams(recording: Recording, names: Sequence[str], item: int) -> dict[str, Tensor]:
    """Grams of one trajectory in float64.

    Raises:
        RecordingError: one holds NaN or Inf, which a sum would keep for ever.
    """
    grams = {name: gram.double() for name, gram in recording.load(item, names).items()}
    for name, gram in grams.items():
        if not torch.isfinite(gram).all():
            raise RecordingError(
                f"{name} of item {item} in {recording.folder} holds NaN or Inf, expected finite "
                "numbers; the run or the recorder broke there. Record without this item."
            )
    return grams


def sum_grams(
    recording: Recording, names: Sequence[str], items: Sequence[int]
) -> dict[str, Tensor]:
    """Sums over trajectories by name, added in the order of `items`.

    Args:
        recording: where the Grams are.
        names: tensors to sum, as in ["gram/output"].
        items: the trajectories, at least one.

    Raises:
        RecordingError: no items, a Gram that is not finite, or one of another shape; names the
            item.
    """
    if not items:
        raise RecordingError(f"{recording.folder}: no trajectories to sum, expected some; record.")
    total = load_grams(recording, names, items[0])
    for item in items[1:]:
        for name, gram in load_grams(recording, names, item).items():
            if gram.shape != total[name].shape:
                raise RecordingError(
                    f"{name} of item {item} in {recording.folder} has shape {tuple(gram.shape)}, "
                    f"expected that of item {items[0]}, {tuple(total[name].shape)}; fit on items "
                    "of one kind."
                )
            total[name] += gram
    return total


def shared_sum(recording: Recording, name: str, items: Sequence[int]) -> Tensor:
    """The sum over trajectories, made by all processes of the group where one is initialised.

    Rank r of w reads `items[r::w]`; the sums are all-reduced. The result is the same on every rank,
    and that of one process up to the rounding of another order of addition.

    Args:
        recording: where the Grams are.
        name: tensor to sum.
        items: the trajectories of all ranks; every rank must give the same.

    Raises:
        RecordingError: see `sum_grams`, on every rank when it happens on one; or the ranks see
            different items.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return sum_grams(recording, [name], items)[name]
    rank, world = dist.get_rank(), dist.get_world_size()
    mine, total, problem = list(items[rank::world]), None, ""
    try:
        total = sum_grams(recording, [name], mine or list(items[:1]))[name]
    except Exception as error:  # the others wait for this rank: they must hear of it
        problem = f"{type(error).__name__}: {error}"
    told: list[Any] = [None] * world
    listed = xxhash.xxh3_128_hexdigest(repr(list(items)).encode())
    dist.all_gather_object(told, (listed, problem))
    for place, (_, found) in enumerate(told):
        if found:
            raise RecordingError(f"rank {place} of {world}: {found}")
    if len({digest for digest, _ in told}) > 1:
        raise RecordingError(
            f"the {world} ranks see different items of {recording.folder}, expected the same; wait "
            "until it is finished, and give all ranks the same settings."
        )
    assert total is not None  # else there was a problem
    return _all_reduce(total if mine else torch.zeros_like(total))


def _all_reduce(total: Tensor) -> Tensor:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # NCCL sums on GPUs only
    placed = total.to(device)
    dist.all_reduce(placed)
    return placed.cpu()


class GramBatches(IterableDataset[dict[str, Any]]):
    """Grams of trajectories in item order, `{"items": [...], "gram": (n, ...)}`, n at most `CHUNK`.

    An `IterableDataset`, so that no sampler deals it out: every process of a group sees all.
    One chunk is kept; of more, each is read again on every pass.

    Args:
        recording: where they are.
        name: tensor to read.
        items: the trajectories.
    """

    def __init__(self, recording: Recording, name: str, items: Sequence[int]) -> None:
        self.recording = recording
        self.name = name
        self.items = list(items)
        self._kept: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The batches."""
        if self._kept is not None:
            yield self._kept
            return
        for first in range(0, len(self.items), CHUNK):
            chunk = self.items[first : first + CHUNK]
            grams = [load_grams(self.recording, [self.name], item)[self.name] for item in chunk]
            batch = {"items": chunk, "gram": torch.stack(grams)}
            if len(chunk) == len(self.items):
                self._kept = batch
            yield batch
