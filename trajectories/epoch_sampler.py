"""A shuffled loader whose interrupted epoch goes on with exactly the batches it had left.

The permutation comes from `set_epoch`, which Lightning calls on every start, and only the position
is state: storing the epoch as well breaks resuming from a checkpoint written at an epoch's end.
Of several processes each takes its share of every batch, so that together they train on the batches
of one; the position counts all of them, and a checkpoint fits any number of processes.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class EpochSampler(DistributedSampler[int]):
    """Permutation of range(size) drawn from (seed, epoch), entered at `position`.

    A `DistributedSampler`, since Lightning replaces every other kind when it trains on several
    processes.

    Args:
        size: number of examples.
        seed: seed of all permutations.
        batch_size: examples per batch over all processes.
        rank: this process.
        world: number of processes; divides `batch_size`.
        drop_last: leave a smaller last batch out of the epoch.

    Attributes:
        position: examples of this epoch already delivered to all processes; the whole state.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        batch_size: int = 1,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> None:
        super().__init__(range(size), num_replicas=world, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.size = size
        self.batch_size = batch_size
        self.world = world
        self.position = 0
        # Examples of a smaller last batch that cannot be dealt evenly are left out of the epoch:
        # gradients are averaged over processes, which counts right only if all have as many.
        rest = size % batch_size
        self.used = size - (rest if drop_last else rest % world)

    def __len__(self) -> int:
        """Number of examples of a whole epoch on this process."""
        return self.used // self.world

    def __iter__(self) -> Iterator[int]:
        """This process's examples of the epoch from `position` on."""
        # The generator uses only the low 32 bits of its seed: hash both numbers into it.
        mixed = xxhash.xxh3_64_intdigest(f"epoch {self.seed} {self.epoch}".encode())
        generator = torch.Generator().manual_seed(mixed)
        order = torch.randperm(self.size, generator=generator).tolist()[: self.used]
        for start in range(self.position, self.used, self.batch_size):
            batch = order[start : start + self.batch_size]
            share = len(batch) // self.world
            yield from batch[self.rank * share : (self.rank + 1) * share]

    def advance(self) -> None:
        """Count one batch as delivered to all processes."""
        self.position = min(self.position + self.batch_size, self.used)

    def state_dict(self) -> dict[str, int]:
        """The position; 0 at the end of an epoch, where the next one begins."""
        return {"position": self.position if self.position < self.used else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at the stored position."""
        self.position = state["position"]


class ResumableLoader(DataLoader[Any]):
    """DataLoader over an `EpochSampler` that Lightning saves and restores mid-epoch.

    The position counts batches handed out, not those that workers have fetched ahead. Where a
    process group is initialised, this is the loader of its rank.

    Args:
        dataset: map-style dataset, not empty.
        batch_size: examples per batch over all processes, >= 1; the last batch of an epoch may be
            smaller.
        seed: seed of the permutations.
        num_workers: worker processes; 0 loads in this process.
        drop_last: leave a smaller last batch out of the epoch.

    Raises:
        ValueError: the processes cannot share a batch evenly, or an epoch has not one for each, or
            no whole batch where only whole ones are wanted.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        rank, world = (dist.get_rank(), dist.get_world_size()) if _grouped() else (0, 1)
        size = len(dataset)  # type: ignore[arg-type]
        if batch_size % world or size < world:
            raise ValueError(
                f"batch_size is {batch_size} over all {world} processes, and there are {size} "
                f"examples; expected a multiple of {world}, and at least {world} examples."
            )
        if drop_last and size < batch_size:
            raise ValueError(
                f"batch_size is {batch_size}, expected at most the {size} examples there are: only "
                "whole batches are trained on."
            )
        self.position_sampler = EpochSampler(size, seed, batch_size, rank, world, drop_last)
        self._resuming = False
        super().__init__(
            dataset,
            batch_size=batch_size // world,
            sampler=self.position_sampler,
            num_workers=num_workers,
            generator=torch.Generator(),  # leaves the global random state to the model
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of an epoch; after `load_state_dict`, the rest of the interrupted one."""
        if not self._resuming:
            self.position_sampler.position = 0
        self._resuming = False
        for batch in super().__iter__():
            self.position_sampler.advance()
            yield batch

    def state_dict(self) -> dict[str, int]:
        """State of the sampler."""
        return self.position_sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next epoch go on at the stored position."""
        self.position_sampler.load_state_dict(state)
        self._resuming = True


def everything(dataset: Dataset[Any]) -> DistributedSampler[Any]:
    """A sampler of all examples in order on every process, which Lightning leaves alone.

    What is measured on held-out data is then the same number on all of them.
    """
    return DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=False)


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
