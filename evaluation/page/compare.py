"""The slider of the bench report: the full run's samples under those of a method one chooses.

Shapes: B samples, C channels (1 or 3), H height, W width.
"""

import io
from collections.abc import Mapping
from html import escape

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from foreseer.evaluation.metrics import psnr
from foreseer.evaluation.page.template import data_uri, island
from foreseer.evaluation.results import decibels

LARGEST = 384  # pixels of the longer side; larger samples are averaged down
LOSSLESS = 128  # up to this longer side samples are PNG, above it WebP
WEBP_QUALITY = 90
PIXELATED = 128  # up to this longer side the enlarged pixels stay visible


def comparison(caption: str, images: Mapping[str, Float[Tensor, "B C H W"]]) -> str:
    """A divider to drag between the full run and a method, by mouse, touch or arrow keys.

    Args:
        caption: what it shows.
        images: label to samples in [0, 1]; the first is the full run.

    Raises:
        ValueError: there is no method beside the full run, or the shapes differ.
    """
    if len(images) < 2:
        raise ValueError(f"a comparison needs the full run and a method, got {list(images)}.")
    (full_label, full), *methods = images.items()
    wrong = [label for label, samples in methods if samples.shape != full.shape]
    if wrong:
        raise ValueError(
            f"the samples of {wrong} are not {tuple(full.shape)} like those of {full_label!r}."
        )
    reference = full.detach().double().cpu()
    told = []
    for label, samples in methods:
        values = psnr(samples.detach().double().cpu(), reference)
        told.append(
            {
                "label": one_line(label),
                "psnr": [_decibels(float(value)) for value in values],
                "mean": _decibels(float(values.mean())),
                "images": [encoded(sample) for sample in samples],
            }
        )
    firsts = [encoded(sample) for sample in full]
    content = {"full": {"label": one_line(full_label), "images": firsts}, "methods": told}
    options = "".join(
        f'<option value="{index}">{escape(str(method["label"]))} ({method["mean"]})</option>'
        for index, method in enumerate(told)
    )
    height, width = full.shape[-2:]
    pixel = " pixel" if max(height, width) <= PIXELATED else ""
    return _markup(caption, one_line(full_label), firsts, options, pixel, f"{width}/{height}") + (
        f"\n{island(content)}</figure>"
    )


def _markup(
    caption: str, full: str, thumbs: list[str], options: str, pixel: str, ratio: str
) -> str:
    """The figure without its end; the script fills the images in."""
    buttons = "".join(
        f'<button type="button" data-sample="{index}" aria-pressed="{str(not index).lower()}">'
        f'<img alt="sample {index + 1}" src="{thumb}"></button>'
        for index, thumb in enumerate(thumbs)
    )
    first = thumbs[0]
    return (
        f'<figure class="samples"><figcaption>{escape(caption)}</figcaption>\n'
        f'<div class="compare"><div><div class="stage{pixel}" style="aspect-ratio:{ratio}">'
        f'<img alt="{escape(full)}, sample 1" src="{first}"><img class="over" '
        f'alt="" src="{first}"><div class="grip"></div><input type="range" min="0" max="100" '
        f'value="50" step="1" aria-label="How much of the {escape(full)} is seen"></div>'
        f'<div class="ends"><span>◂ {escape(full)}</span><span></span></div></div>\n'
        f'<div><div class="controls"><label>Method <select>{options}</select></label>'
        '<label><input type="checkbox"> difference, four times brighter</label></div>'
        f'<div class="thumbs{pixel}" role="group" aria-label="Sample">{buttons}</div>'
        '<output><span class="score"></span><span class="soft note"></span></output>'
        "</div></div>"
    )


def encoded(sample: Float[Tensor, "C H W"]) -> str:
    """A sample as an address that holds it, small enough for a page."""
    pixels = sample.detach().float().cpu().clamp(0, 1)
    longer = max(pixels.shape[-2:])
    if longer > LARGEST:
        scale = LARGEST / longer
        pixels = torch.nn.functional.interpolate(pixels[None], scale_factor=scale, mode="area")[0]
    grey = len(pixels) == 1
    array = (255 * pixels.permute(1, 2, 0)).round().to(torch.uint8).numpy()
    return address(Image.fromarray(array[..., 0] if grey else array), longer)


def address(image: Image.Image, longer: int) -> str:
    """A picture as an address that holds it.

    Args:
        image: the picture.
        longer: pixels of the longer side of the samples in it.
    """
    buffer = io.BytesIO()
    if longer <= LOSSLESS:
        image.save(buffer, "PNG", optimize=True)
        return data_uri(buffer.getvalue())
    image.save(buffer, "WEBP", quality=WEBP_QUALITY)
    return data_uri(buffer.getvalue(), "webp")


def one_line(label: str) -> str:
    """A label of a contact sheet without its line break."""
    return ", ".join(label.split("\n"))


def _decibels(value: float) -> str:
    """A PSNR with its unit."""
    shown = decibels(value)
    return shown if shown == "exact" else f"{shown} dB"
