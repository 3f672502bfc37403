"""A sheet of samples: a row for every run, with words beside, above and below the pictures.

Shapes: B samples, C channels (1 or 3), H height, W width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from foreseer.evaluation.metrics import psnr
from foreseer.evaluation.results import decibels

SMALLEST, LARGEST = 112, 384  # pixels: sides that samples are enlarged and reduced to
GAP, MARGIN = 8, 16  # pixels: between samples, around the sheet
WORDS, SMALL = 17, 14  # pixels: size of letters beside the rows, above and below the samples
SHRUNK = 192  # pixels: side above which samples beside others' are averaged down
DIFFERENCE_GAIN = 4
BLACK, GREY, WHITE = "#1a1a1a", "#666666", "#ffffff"


@dataclass(frozen=True)
class Row:
    """Samples of one run.

    Attributes:
        label: words left of them; lines after the first are smaller.
        images: the samples, in [0, 1].
        captions: words under each sample; none where empty.
    """

    label: str
    images: Float[Tensor, "B C H W"]
    captions: Sequence[str] = ()


def sheet(rows: Sequence[Row], headings: Sequence[str] = ()) -> Image.Image:
    """Draw rows of samples under each other.

    Args:
        rows: one per run, all with the same number of samples of the same size.
        headings: words above each column, lines separated; none where empty.

    Raises:
        ValueError: there are no rows, or their samples differ in number or size.
    """
    sizes = {(len(row.images), *row.images.shape[-2:]) for row in rows}
    if len(sizes) != 1:
        raise ValueError(f"the rows hold samples of {sorted(sizes)}; expected one number and size.")
    count, height, width = sizes.pop()
    width, height = cell_size(width, height)
    labels = max(text_size(row.label, WORDS)[0] for row in rows) + 2 * GAP
    above = max((text_size(each, SMALL)[1] for each in headings), default=0)
    below = [max((text_size(each, SMALL)[1] for each in row.captions), default=0) for row in rows]
    pitch = width + GAP
    page = (
        2 * MARGIN + labels + count * pitch - GAP,
        2 * MARGIN + (above + GAP if above else 0) + sum(height + GAP + each for each in below),
    )
    drawn = Image.new("RGB", page, WHITE)
    pen = ImageDraw.Draw(drawn)
    left, top = MARGIN + labels, MARGIN
    centres = [left + column * pitch + width / 2 for column in range(count)]
    for centre, heading in zip(centres, headings, strict=False):
        pen.multiline_text((centre, top + above), heading, BLACK, font(SMALL), "md", align="center")
    top += above + GAP if above else 0
    for row, room in zip(rows, below, strict=True):
        write_label(pen, row.label, MARGIN + labels - 2 * GAP, top + height / 2)
        for column, image in enumerate(row.images):
            filled = picture(image).resize((width, height), filter_of(image, width))
            drawn.paste(filled, (left + column * pitch, top))
        for centre, caption in zip(centres, row.captions, strict=False):
            pen.multiline_text((centre, top + height + 2), caption, GREY, font(SMALL), "ma")
        top += height + GAP + room
    return drawn


def against(images: Mapping[str, Float[Tensor, "B C H W"]]) -> Image.Image:
    """The same samples of several runs, the differences to the first under each of the others.

    Behind a label stands the mean PSNR of the samples shown.

    Args:
        images: label to samples in [0, 1]; the first entry is the full run.

    Raises:
        ValueError: there is no entry, or the shapes differ.
    """
    if not images:
        raise ValueError("A contact sheet needs at least the samples of the full run.")
    (label, full), *others = [(label, each.double().cpu()) for label, each in images.items()]
    scale = min(1.0, SHRUNK / max(full.shape[-2:]))
    rows = [Row(label, _shrunk(full, scale))]
    for label, samples in others:
        mean = float(psnr(samples, full).mean())
        rows.append(Row(f"{label}\n{decibels(mean)} dB", _shrunk(samples, scale)))
        gap = (samples - full).abs() * DIFFERENCE_GAIN
        rows.append(Row(f"\n|difference| × {DIFFERENCE_GAIN}", _shrunk(gap, scale)))
    return sheet(rows)


def _shrunk(images: Float[Tensor, "B C H W"], scale: float) -> Float[Tensor, "B C h w"]:
    if scale == 1:
        return images
    return torch.nn.functional.interpolate(images.clamp(0, 1), scale_factor=scale, mode="area")


def write_label(pen: ImageDraw.ImageDraw, label: str, right: int, middle: float) -> None:
    """Write lines that end at `right`, around the height `middle`: the first large, others grey."""
    lines = label.split("\n")
    heights = [1.3 * (SMALL if number else WORDS) for number in range(len(lines))]
    top = middle - sum(heights) / 2
    for number, (line, height) in enumerate(zip(lines, heights, strict=True)):
        size, colour = (SMALL, GREY) if number else (WORDS, BLACK)
        pen.text((right, top + height / 2), line, colour, font(size), "rm")
        top += height


def picture(image: Float[Tensor, "C H W"]) -> Image.Image:
    """A sample in [0, 1] as an RGB picture of its own size."""
    levels = (255 * image.detach().float().cpu().clamp(0, 1)).round().to(torch.uint8)
    return Image.fromarray(levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def cell_size(width: int, height: int) -> tuple[int, int]:
    """The size samples are drawn at: whole multiples where they are small, reduced where large."""
    side = max(width, height)
    if side < SMALLEST:
        times = -(-SMALLEST // side)
        return times * width, times * height
    scale = min(1.0, LARGEST / side)
    return round(scale * width), round(scale * height)


def filter_of(image: Tensor, width: int) -> Image.Resampling:
    """Enlarged pixels stay visible; reduced ones are averaged."""
    enlarged = width > image.shape[-1]
    return Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def text_size(text: str, size: int) -> tuple[int, int]:
    """Width and height of some lines, in pixels, rounded up."""
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font(size))
    return int(box[2]) + 1, int(box[3]) + 4
