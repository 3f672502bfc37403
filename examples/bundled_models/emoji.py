"""Named emoji as captioned images in [-1, 1], read from the npm package that ships them.

Shapes: B batch, L text tokens, E text channels, H height, W width.
Data: `emoji-datasource-google` 16.0.0 (Noto; images Apache-2.0), 1,911 pictures with names.
"""

import json
import re
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import lightning
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foreseer.integration.pipelines.sentence_encoder import encode, plain
from foreseer.trajectories.epoch_sampler import ResumableLoader

ARCHIVE = "emoji-datasource-google-16.0.0.tgz"
INDEX = "package/emoji.json"
PICTURES = "package/img/google/64/"
HOLD_OUT_EVERY = 20
ONE_SIDED = frozenset({"Flags", "Symbols"})  # categories whose pictures a mirror makes wrong
SIDES = re.compile(r"left|right|wards?\b|clock|\d")


@dataclass(frozen=True)
class Picture:
    """One emoji.

    Args:
        captions: its name and its short name, in lower case; the same twice where it has one.
        category: such as `Animals & Nature`.
        image: pixels in [-1, 1] on white.
    """

    captions: tuple[str, str]
    category: str
    image: Float[Tensor, "3 H W"]


class CaptionedEmoji(lightning.LightningDataModule):
    """Noto emoji with their names; one in twenty is kept from training, with both its names.

    Args:
        archive: the package, as `npm pack emoji-datasource-google@16.0.0` downloads it.
        sample_size: image side in pixels, at most the 64 that the pictures have.
        batch_size: captions per batch.
        seed: seed of the training order.
        mirror: train on every picture a second time in an epoch, left and right exchanged where
            its names and category allow it.
    """

    def __init__(
        self,
        archive: str = ARCHIVE,
        sample_size: int = 32,
        batch_size: int = 32,
        seed: int = 0,
        mirror: bool = False,
    ) -> None:
        super().__init__()
        self.archive = Path(archive)
        self.sample_size = sample_size
        self.batch_size = batch_size
        self.seed = seed
        self.mirror = mirror

    def setup(self, stage: str) -> None:
        """Read the pictures and encode their names into memory (120 MB)."""
        train, held_out = split(read_pictures(self.archive, self.sample_size))
        self.train, self.test = CaptionedImages(train, self.mirror), CaptionedImages(held_out)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches `(images (B, 3, H, W), prompt_embeds (B, L, E), pooled (B, E))`."""
        return ResumableLoader(self.train, self.batch_size, self.seed, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Batches of the pictures kept from training, in order."""
        return DataLoader(self.test, self.batch_size, generator=torch.Generator())


class CaptionedImages(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Every picture once with each of its captions, encoded.

    Args:
        pictures: at least one.
        mirror: all of them again after that, in a mirror where `has_two_sides` allows it.
    """

    def __init__(self, pictures: list[Picture], mirror: bool = False) -> None:
        self.owners = [i for i, picture in enumerate(pictures) for _ in picture.captions]
        self.images = torch.stack([picture.image for picture in pictures])
        self.two_sided = [has_two_sides(picture) for picture in pictures]
        self.rounds = 2 if mirror else 1
        captions = [caption for picture in pictures for caption in picture.captions]
        self.prompt_embeds, self.pooled = encode(captions)

    def __len__(self) -> int:
        """Number of captions, twice that with mirrored pictures."""
        return self.rounds * len(self.owners)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """The image of one caption, the caption's hidden states, and their mean."""
        again, caption = divmod(index, len(self.owners))
        owner = self.owners[caption]
        image = self.images[owner]
        if again and self.two_sided[owner]:
            image = image.flip(-1)
        return image, self.prompt_embeds[caption], self.pooled[caption]


def has_two_sides(picture: Picture) -> bool:
    """Whether its mirror image suits its names: it is no flag, sign, clock or side of anything."""
    return picture.category not in ONE_SIDED and not SIDES.search(" ".join(picture.captions))


def split(pictures: list[Picture]) -> tuple[list[Picture], list[Picture]]:
    """The pictures to train on, and every twentieth, which is not trained on."""
    held_out = pictures[::HOLD_OUT_EVERY]
    return [p for i, p in enumerate(pictures) if i % HOLD_OUT_EVERY], held_out


def read_pictures(archive: Path, sample_size: int) -> list[Picture]:
    """All named pictures of the package, sorted by name, without skin tones.

    Args:
        archive: the package's `.tgz`.
        sample_size: image side in pixels.

    Raises:
        FileNotFoundError: the archive is missing.
        ValueError: it is another package, or damaged.
    """
    if not archive.is_file():
        raise FileNotFoundError(
            f"there is no {archive}; fetch it with `npm pack emoji-datasource-google@16.0.0` and "
            "name it with --data.archive."
        )
    try:
        with tarfile.open(archive) as package:
            files = {member.name: member for member in package if member.isfile()}
            entries = json.load(_open(package, files, INDEX))
            pictures = [_picture(entry, package, files, sample_size) for entry in entries]
    except (tarfile.TarError, EOFError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{archive} cannot be read ({type(error).__name__}: {error}); expected the package "
            "emoji-datasource-google 16.0.0: fetch it again."
        ) from error
    return sorted(pictures, key=lambda picture: picture.captions)


def _picture(
    entry: dict, package: tarfile.TarFile, files: dict[str, tarfile.TarInfo], sample_size: int
) -> Picture:
    content = _open(package, files, PICTURES + entry["image"])
    captions = plain(entry["name"]), plain(entry["short_name"].replace("_", " ").replace("-", " "))
    return Picture(captions, entry["category"], read_image(content, sample_size))


def _open(package: tarfile.TarFile, files: dict[str, tarfile.TarInfo], name: str) -> BytesIO:
    content = package.extractfile(files[name])
    assert content is not None  # `files` holds files only
    return BytesIO(content.read())


def read_image(content: BytesIO, sample_size: int) -> Float[Tensor, "3 H W"]:
    """A picture on white, in [-1, 1], averaged down to `sample_size` pixels a side."""
    picture = Image.open(content).convert("RGBA")
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    small = canvas.convert("RGB").resize((sample_size, sample_size), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1
