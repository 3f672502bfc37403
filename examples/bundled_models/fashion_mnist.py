"""Fashion-MNIST as 32x32 images in [-1, 1], read from its IDX files.

Shapes: B batch.
"""

import gzip
from pathlib import Path

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from foreseer.trajectories.epoch_sampler import ResumableLoader

DEFAULT_FOLDER = "/usr/share/datasets/fashion-mnist"
CLASS_NAMES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


class FashionMNIST(lightning.LightningDataModule):
    """Fashion-MNIST padded to 32x32.

    Args:
        folder: folder of the four `*-ubyte.gz` files, which Debian's `dataset-fashion-mnist`
            package installs.
        batch_size: samples per batch.
        seed: seed of the training order.
    """

    def __init__(self, folder: str = DEFAULT_FOLDER, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Read the images and labels into memory (60 MB)."""
        self.train = TensorDataset(*load_split(self.folder, "train"))
        self.test = TensorDataset(*load_split(self.folder, "t10k"))

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches `(images (B, 1, 32, 32) in [-1, 1], labels (B,))`, all of one size."""
        return ResumableLoader(self.train, self.batch_size, self.seed, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Test batches in file order."""
        return DataLoader(self.test, self.batch_size, generator=torch.Generator())


def load_split(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Images `(B, 1, 32, 32)` float32 in [-1, 1] and labels `(B,)` int64 of one split.

    Args:
        folder: folder of the IDX files.
        name: `train` or `t10k`.

    Raises:
        FileNotFoundError: a file is missing.
    """
    pixels = read_idx(folder / f"{name}-images-idx3-ubyte.gz", (28, 28))
    labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz", ())
    images = torch.nn.functional.pad(pixels.float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    return images[:, None], labels.long()


def read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The unsigned bytes of one gzipped IDX file, `(count, *shape)`."""
    if not path.exists():
        raise FileNotFoundError(
            f"no {path.name} in {path.parent}; install Debian's dataset-fashion-mnist "
            "(apt-get install dataset-fashion-mnist) or name the folder that holds the IDX files."
        )
    content = gzip.decompress(path.read_bytes())
    header = 4 * (2 + len(shape))  # magic, count, and one length per axis, big-endian int32
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).view(-1, *shape)
