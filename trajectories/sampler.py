"""A shuffled loader whose interrupted epoch goes on with exactly the batches it had left.

The permutation comes from `set_epoch`, which Lightning calls on every start, and only the position
is state: storing the epoch as well breaks resuming from a checkpoint written at an epoch's end.
"""

from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch.utils.data import DataLoader, Dataset, Sampler


class EpochSampler(Sampler[int]):
    """Permutation of range(size) drawn from (seed, epoch), entered at `position`.

    Args:
        size: number of examples.
        seed: seed of all permutations.

    Attributes:
        position: examples of this epoch already delivered; the whole state.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0
        self.position = 0

    def __len__(self) -> int:
        """Number of examples of a whole epoch."""
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Examples of the epoch from `position` on."""
        # The generator uses only the low 32 bits of its seed: hash both numbers into it.
        mixed = xxhash.xxh3_64_intdigest(f"epoch {self.seed} {self.epoch}".encode())
        generator = torch.Generator().manual_seed(mixed)
        yield from torch.randperm(self.size, generator=generator).tolist()[self.position :]

    def state_dict(self) -> dict[str, int]:
        """The position; 0 at the end of an epoch, where the next one begins."""
        return {"position": self.position % self.size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at the stored position."""
        self.position = state["position"]


class ResumableLoader(DataLoader[Any]):
    """DataLoader over an `EpochSampler` that Lightning saves and restores mid-epoch.

    The position counts batches handed out, not those that workers have fetched ahead.

    Args:
        dataset: map-style dataset, not empty.
        batch_size: examples per batch, >= 1; the last batch of an epoch may be smaller.
        seed: seed of the permutations.
        num_workers: worker processes; 0 loads in this process.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, seed: int, num_workers: int = 0
    ) -> None:
        self.position_sampler = EpochSampler(len(dataset), seed)  # type: ignore[arg-type]
        self._resuming = False
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=self.position_sampler,
            num_workers=num_workers,
            generator=torch.Generator(),  # leaves the global random state to the model
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of an epoch; after `load_state_dict`, the rest of the interrupted one."""
        if not self._resuming:
            self.position_sampler.position = 0
        self._resuming = False
        size = self.position_sampler.size
        for batch in super().__iter__():
            position = self.position_sampler.position + (self.batch_size or 1)
            self.position_sampler.position = min(position, size)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """State of the sampler."""
        return self.position_sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next epoch go on at the stored position."""
        self.position_sampler.load_state_dict(state)
        self._resuming = True
