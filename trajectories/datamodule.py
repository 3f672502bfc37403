"""Lightning data module over a recording, split by trajectory."""

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from foreseer.trajectories.dataset import TrajectoryDataset
from foreseer.trajectories.epoch_sampler import ResumableLoader, everything
from foreseer.trajectories.gram import GramBatches, shared_sum
from foreseer.trajectories.recording import Recording, split


class RecordingDataModule(LightningDataModule):
    """Trajectories of a recording to fit on, to choose on, and to judge on.

    Half of those held out are for validation, by which a training chooses its best epoch or step;
    the other half is what its verdict is measured on.

    Args:
        folder: recording folder.
        names: tensors of each example, as in ["gram/output"].
        batch_size: trajectories per batch over all processes, >= 1.
        validation_fraction: share of trajectories held out, in [0, 1); 0 means none.
        seed: seed of the split and of the order of training trajectories.
        num_workers: loader processes; 0 loads in the main process.

    Raises:
        ValueError: `validation_fraction` is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        names: Sequence[str],
        batch_size: int,
        validation_fraction: float,
        seed: int,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}.")
        self.folder = folder
        self.names = list(names)
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.num_workers = num_workers

    def setup(self, stage: str | None = None) -> None:
        """Split the items; the same recording, fraction and seed always give the same split.

        Raises:
            ValueError: a part would be empty.
        """
        items = Recording(self.folder).items
        half = self.validation_fraction / 2
        self.train_items, self.val_items, self.test_items = split(
            items, (1 - 2 * half, half, half), self.seed
        )
        if not self.train_items or (self.validation_fraction > 0 and not self.val_items):
            raise ValueError(
                f"{self.folder}: {len(items)} items split into {len(self.train_items)} for "
                f"training and {len(self.val_items)} for validation (fraction "
                f"{self.validation_fraction}, seed {self.seed}); "
                "record more items, or change the fraction or the seed."
            )

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches; an interrupted epoch resumes with the batches it had left."""
        dataset = TrajectoryDataset(self.folder, self.names, self.train_items)
        return ResumableLoader(dataset, self.batch_size, self.seed, self.num_workers)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Batches in item order, all of them on every process; no loader when none are held out."""
        if not self.val_items:
            return []
        dataset = TrajectoryDataset(self.folder, self.names, self.val_items)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=everything(dataset),
            num_workers=self.num_workers,
            generator=torch.Generator(),  # leaves the global random state to the model
        )


class ItemsDataModule(LightningDataModule):
    """The items of a recording, split, for fits that run the pipeline themselves.

    Args:
        folder: recording folder.
        validation_fraction: share of trajectories held out, in [0, 1).
        seed: seed of the split.
        batch_size: trajectories per pipeline call when the held-out ones are run.
        num_trajectories: the first so many are split; None takes all.
    """

    def __init__(
        self,
        folder: str | Path,
        validation_fraction: float = 0.2,
        seed: int = 0,
        batch_size: int = 16,
        num_trajectories: int | None = None,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.batch_size = batch_size
        self.num_trajectories = num_trajectories

    def setup(self, stage: str | None = None) -> None:
        """Split the items.

        Raises:
            ValueError: fewer than two trajectories are left to fit on.
        """
        items = Recording(self.folder).items[: self.num_trajectories]
        fractions = (1 - self.validation_fraction, self.validation_fraction)
        self.train_items, self.val_items = split(items, fractions, self.seed)
        if len(self.train_items) < 2:
            raise ValueError(
                f"{self.folder} leaves {len(self.train_items)} of {len(items)} trajectories to fit "
                "on, expected at least 2; record more."
            )

    def train_dataloader(self) -> DataLoader:
        """One batch: `items`, the numbers of all that are fitted on."""
        return DataLoader([{"items": self.train_items}], batch_size=None)  # type: ignore[arg-type]


class GramDataModule(LightningDataModule):
    """The Grams of one tap, as the open-loop fits need them: their sum, and those held out.

    The sum is a batch of one: whatever is quadratic in the features is the same of the sum as of
    all trajectories. Memory does not grow with their number. Of several processes each reads its
    share and all get the whole sum.

    Args:
        folder: recording folder.
        tap: recorded tap.
        validation_fraction: share of trajectories held out, in [0, 1).
        seed: seed of the split.
    """

    def __init__(
        self,
        folder: str | Path,
        tap: str = "output",
        validation_fraction: float = 0.25,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.tap = tap
        self.validation_fraction = validation_fraction
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        """Split the items and, to fit, sum the Grams of the training split.

        Raises:
            ValueError: fewer than two trajectories are left to fit on.
            RecordingError: a Gram is not finite.
        """
        recording = Recording(self.folder)
        fractions = (1 - self.validation_fraction, self.validation_fraction)
        self.train_items, self.val_items = split(recording.items, fractions, self.seed)
        if len(self.train_items) < 2:
            raise ValueError(
                f"{self.folder} leaves {len(self.train_items)} of {len(recording)} trajectories to "
                "fit on, expected at least 2; record more."
            )
        name = f"gram/{self.tap}"
        self.train_grams = GramBatches(recording, name, self.train_items)
        self.val_grams = GramBatches(recording, name, self.val_items)
        if stage in (None, "fit"):
            total = shared_sum(recording, name, self.train_items)
            self.train = [{"gram": total[None], "count": len(self.train_items)}]

    def train_dataloader(self) -> DataLoader:
        """One batch: `gram`, the sum (1, branches, S, S), and `count`, of how many."""
        return DataLoader(self.train, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Batches of the held-out trajectories, `gram` (n, branches, S, S), if there are any."""
        return DataLoader(self.val_grams, batch_size=None) if self.val_items else []
