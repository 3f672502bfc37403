"""Grams summed over trajectories: one at a time, in item order, and by all processes of a group.

The closed forms need nothing but the sum and the count, so memory does not grow with the number of
trajectories. Adding in a fixed order makes the sum the same bit for bit whenever it is made again.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.utils.data import IterableDataset

from foreseer.trajectories.recording import Recording, RecordingError

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
