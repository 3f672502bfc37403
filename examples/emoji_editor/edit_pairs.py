"""Edits of emoji with an instruction, the picture before and after, and the pixels that changed.

Skin tones are the designers' own pictures; recoloured, pasted and erased parts are made here.

Shapes: B batch, H = W = 32 pixels.
Data: `emoji-datasource-google` 16.0.0 (Noto; images Apache-2.0), 1,911 pictures, 1,875 of them
again in other skin tones.
"""

import json
import re
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

ARCHIVE = "emoji-datasource-google-16.0.0.tgz"
INDEX = "package/emoji.json"
PICTURES = "package/img/google/64/"
SIDE = 32
TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
HUES = {"red": 0.0, "orange": 30.0, "yellow": 48.0, "green": 120.0, "blue": 210.0, "purple": 280.0}
HUE_WIDTH = 20.0  # degrees on either side of a hue's name
PLACES = {
    "top left": (0, 0),
    "top right": (0, 1),
    "bottom left": (1, 0),
    "bottom right": (1, 1),
}
PASTED_SIDE = 14
MOST_TRIES = 1000  # pictures that an edit is tried on
CHANGED = 4 / 255  # of the range of a channel; less is rounding
PASTED = (
    "cat face", "dog face", "rocket", "hamburger", "soccer ball", "red apple", "octopus", "cactus",
    "umbrella", "sunflower", "panda face", "automobile", "guitar", "house building",
    "christmas tree", "slice of pizza",
)  # fmt: skip
PEOPLE = re.compile(r"\b(?:man|woman|person|men|women|people|boy|girl|male|female)\b|[^a-z]")
KINDS = ("skin tone", "recolour", "paste", "erase")
SPLITS = ("train", "choose", "judge")


@dataclass(frozen=True)
class Base:
    """One emoji, and its skin tones.

    Args:
        name: in lower case.
        split: `train`, `choose` or `judge`.
        image: pixels in [0, 1] on white.
        tones: pictures by instruction; none for most emoji.
    """

    name: str
    split: str
    image: Float[Tensor, "3 H W"]
    tones: dict[str, Float[Tensor, "3 H W"]]


@dataclass(frozen=True)
class Edit:
    """A picture, what is asked of it, and what comes of it.

    Args:
        kind: one of `KINDS`.
        instruction: in words.
        source: pixels in [0, 1].
        target: the same after the edit.
    """

    kind: str
    instruction: str
    source: Float[Tensor, "3 H W"]
    target: Float[Tensor, "3 H W"]

    @property
    def changed(self) -> Bool[Tensor, "H W"]:
        """The pixels that differ."""
        return (self.source - self.target).abs().amax(0) > CHANGED


class EmojiEdits:
    """Draw edits of the pictures of one split.

    Args:
        archive: the package, as `npm pack emoji-datasource-google@16.0.0` downloads it.
        split: whose pictures are edited; what is pasted comes from a list of sixteen.
    """

    def __init__(self, archive: Path, split: str = "train") -> None:
        bases, self.pasted = read_bases(archive)
        self.bases = [base for base in bases if base.split == split]
        self.toned = [base for base in self.bases if base.tones]

    def draw(self, kind: str, generator: np.random.Generator, mirror: bool = False) -> Edit:
        """One edit of a random picture.

        Args:
            kind: one of `KINDS`.
            generator: of the picture, the edit, and whether it is mirrored.
            mirror: exchange left and right of every second picture before it is edited.

        Raises:
            ValueError: no picture of the split can be edited so.
        """
        flip = mirror and generator.random() < 0.5
        if kind == "skin tone":
            base = self.toned[generator.integers(len(self.toned))]
            return skin_tone(base, generator, flip)
        for _ in range(MOST_TRIES):
            base = self.bases[generator.integers(len(self.bases))]
            source = base.image.flip(-1) if flip else base.image
            edit = self._made(kind, source, generator)
            if edit is not None and edit.changed.sum() >= 12:
                return edit
        raise ValueError(
            f"none of {MOST_TRIES} pictures of the split could be changed by {kind!r}; expected "
            "pictures with several hues."
        )

    def _made(
        self, kind: str, source: Float[Tensor, "3 H W"], generator: np.random.Generator
    ) -> Edit | None:
        if kind == "recolour":
            return recolour(source, generator)
        if kind == "erase":
            return erase(source, generator)
        name = PASTED[generator.integers(len(PASTED))]
        return paste(source, name, self.pasted[name], generator)


def skin_tone(base: Base, generator: np.random.Generator, flip: bool) -> Edit:
    """From one of a base's tones, or its yellow, to another tone."""
    names = list(base.tones)
    wanted = names[generator.integers(len(names))]
    source = base.image
    if generator.random() < 0.3:
        other = names[generator.integers(len(names))]
        source = base.tones[other] if other != wanted else source
    target = base.tones[wanted]
    if flip:
        source, target = source.flip(-1), target.flip(-1)
    return Edit("skin tone", wanted, source, target)


def recolour(source: Float[Tensor, "3 H W"], generator: np.random.Generator) -> Edit | None:
    """Turn one hue that the picture has into another; None where it has none of these."""
    hsv = _hsv(source)
    shares = {name: near_hue(hsv, hue) for name, hue in HUES.items()}
    found = [name for name, near in shares.items() if near.mean() > 0.04]
    if not found:
        return None
    old = found[generator.integers(len(found))]
    new = [name for name in HUES if name != old][generator.integers(len(HUES) - 1)]
    turned = hsv.copy()
    turned[..., 0] = np.where(shares[old], hsv[..., 0] + HUES[new] - HUES[old], hsv[..., 0]) % 360
    return Edit(
        "recolour", f"make the {old} parts {new}", source, _rgb(turned, source, shares[old])
    )


def near_hue(hsv: np.ndarray, hue: float) -> np.ndarray:
    """Pixels of that hue, pale and dark ones left out."""
    apart = np.abs((hsv[..., 0] - hue + 180) % 360 - 180)
    width = min(HUE_WIDTH, min(_gap(hue, other) for other in HUES.values() if other != hue) / 2)
    return (apart <= width) & (hsv[..., 1] > 0.25) & (hsv[..., 2] > 0.2)


def _gap(first: float, second: float) -> float:
    return abs((first - second + 180) % 360 - 180)


def paste(
    source: Float[Tensor, "3 H W"],
    name: str,
    pasted: Float[Tensor, "4 side side"],
    generator: np.random.Generator,
) -> Edit:
    """A small emoji in a corner."""
    place = list(PLACES)[generator.integers(len(PLACES))]
    down, right = (side * (SIDE - PASTED_SIDE) for side in PLACES[place])
    target = source.clone()
    window = target[:, down : down + PASTED_SIDE, right : right + PASTED_SIDE]
    window.lerp_(pasted[:3], pasted[3:])
    return Edit("paste", f"add {name} in the {place} corner", source, target)


def erase(source: Float[Tensor, "3 H W"], generator: np.random.Generator) -> Edit:
    """A quarter of the picture turned white."""
    place = list(PLACES)[generator.integers(len(PLACES))]
    down, right = (side * (SIDE // 2) for side in PLACES[place])
    target = source.clone()
    target[:, down : down + SIDE // 2, right : right + SIDE // 2] = 1.0
    return Edit("erase", f"erase the {place} corner", source, target)


def instructions(edits: Sequence[EmojiEdits]) -> list[str]:
    """All instructions that can come up."""
    tones = {each for drawn in edits for base in drawn.bases for each in base.tones}
    colours = [f"make the {a} parts {b}" for a in HUES for b in HUES if a != b]
    added = [f"add {name} in the {place} corner" for name in PASTED for place in PLACES]
    return [*sorted(tones), *colours, *added, *(f"erase the {place} corner" for place in PLACES)]


def judged_edits(drawn: EmojiEdits, per_kind: int, seed: int = 0) -> list[Edit]:
    """As many edits of every kind, the same ones whenever asked for."""
    generator = np.random.default_rng(seed)
    return [drawn.draw(kind, generator) for kind in KINDS for _ in range(per_kind)]


def read_bases(archive: Path) -> tuple[list[Base], dict[str, Float[Tensor, "4 side side"]]]:
    """All emoji with their skin tones, and the small ones that are pasted, with their alpha.

    A base picture, in all its tones, is in one split, together with those whose names differ only
    by man, woman or person: by a checksum of the name, of 12 pictures one is for choosing and one
    for judging.

    Raises:
        FileNotFoundError: the archive is missing.
    """
    if not archive.is_file():
        raise FileNotFoundError(
            f"there is no {archive}; fetch it with `npm pack emoji-datasource-google@16.0.0` and "
            "name it with --archive."
        )
    with tarfile.open(archive) as package:
        files = {
            member.name: package.extractfile(member).read()  # type: ignore[union-attr]
            for member in package
            if member.isfile() and (member.name == INDEX or member.name.startswith(PICTURES))
        }
    entries = sorted(json.loads(files[INDEX]), key=lambda entry: entry["unified"])
    bases = [_base(entry, files) for entry in entries]
    by_name = {entry["name"].lower(): PICTURES + entry["image"] for entry in entries}
    pasted = {name: _pixels(files[by_name[name]], PASTED_SIDE) for name in PASTED}
    return bases, pasted


def _base(entry: dict, files: dict[str, bytes]) -> Base:
    name = entry["name"].lower()
    tones = {
        tone_words(code): on_white(files[PICTURES + variant["image"]])
        for code, variant in entry.get("skin_variations", {}).items()
        if PICTURES + variant["image"] in files
    }
    place = zlib.crc32(PEOPLE.sub("", name).encode()) % 12
    split = "judge" if place == 0 else "choose" if place == 1 else "train"
    return Base(name, split, on_white(files[PICTURES + entry["image"]]), tones)


def tone_words(code: str) -> str:
    """The instruction of a tone's code, or of a pair of them."""
    words = [TONES[part] for part in code.split("-")]
    if len(words) == 2 and words[0] != words[1]:
        return f"make the left one {words[0]} and the right one {words[1]} skin tone"
    return f"make it {words[0]} skin tone"


def on_white(content: bytes) -> Float[Tensor, "3 H W"]:
    """A picture on white, in [0, 1], averaged down to 32 pixels a side."""
    pixels = _pixels(content, SIDE)
    return pixels[:3]


def _pixels(content: bytes, side: int) -> Float[Tensor, "4 side side"]:
    """Colour on white and alpha, averaged down."""
    picture = Image.open(BytesIO(content)).convert("RGBA")
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    alpha = picture.getchannel("A").resize((side, side), Image.Resampling.BOX)
    small = canvas.convert("RGB").resize((side, side), Image.Resampling.BOX)
    stacked = np.concatenate([np.array(small), np.array(alpha)[..., None]], -1)
    return torch.from_numpy(stacked).permute(2, 0, 1).float() / 255


def _hsv(image: Float[Tensor, "3 H W"]) -> np.ndarray:
    """Hue in degrees, saturation and value in [0, 1]."""
    rgb = image.permute(1, 2, 0).numpy()
    value, spread = rgb.max(-1), rgb.max(-1) - rgb.min(-1)
    safe = np.where(spread == 0, 1, spread)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    sextant = np.where(
        value == red,
        ((green - blue) / safe) % 6,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    saturation = spread / np.where(value == 0, 1, value)
    return np.stack([60 * sextant * (spread > 0), saturation, value], -1)


def _rgb(
    hsv: np.ndarray, source: Float[Tensor, "3 H W"], where: np.ndarray
) -> Float[Tensor, "3 H W"]:
    """The picture with other hues at some pixels."""
    hue, saturation, value = hsv[..., 0:1] / 60, hsv[..., 1:2], hsv[..., 2:3]
    turn = (np.array([5, 3, 1]) + hue) % 6
    rgb = value - value * saturation * np.clip(np.minimum(turn, 4 - turn), 0, 1)
    made = torch.from_numpy(rgb).permute(2, 0, 1).float()
    return torch.where(torch.from_numpy(where), made, source)
