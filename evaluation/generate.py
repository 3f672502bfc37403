"""Draw samples, with or without a predictor, and a sheet to compare them.

Shapes: B samples, C channels, H height, W width.
"""

import textwrap
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.utils import export_to_video
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from foreseer.evaluation.metrics import psnr
from foreseer.evaluation.page.sheet import DIFFERENCE_GAIN, Row, sheet
from foreseer.evaluation.results import decibels
from foreseer.integration.forecasting import forecasting
from foreseer.integration.pipelines.pipeline_call import (
    DEFAULT_STEPS,
    drawn,
    generators,
    joined,
    middle,
)
from foreseer.predictors.base import Predictor

FRAMES_PER_SECOND = 16  # of the MP4s; no pipeline tells its own
QUIET_SECONDS = 2  # before a bar shows
TITLE_WIDTH, TITLE_LINES = 16, 4  # what fits above a sample


def steps_of(predictor: Predictor | None) -> int:
    """The steps a predictor was fitted on; 50 where there is none, or it serves any."""
    known = predictor is not None and predictor.spec is not None and not predictor.any_grid
    return len(predictor.spec.sigmas) if predictor is not None and known else DEFAULT_STEPS


class Timed(NamedTuple):
    """What a call drew and how long it took, in seconds of wall-clock time, decoding included."""

    samples: Float[Tensor, "B *frames C H W"]
    seconds: float


def draw_runs(
    pipe: Any,
    asked: Sequence[Mapping[str, Any]],
    seed: int,
    predictor: Predictor | None,
    compare: bool,
    settings: Mapping[str, Any],
) -> dict[str, Timed]:
    """Samples of the forecast run, of the full one where there is no predictor, or of both.

    The forecast comes first: a predictor that does not suit is refused before the full run is made,
    and what a first call costs beyond the others is not counted for the forecast.

    Args:
        pipe: a pipeline.
        asked: per-sample arguments of the pipeline.
        seed: seed of the first sample.
        predictor: None runs the network at every step.
        compare: draw both.
        settings: further keyword arguments of the pipeline.

    Raises:
        PredictorMismatch: the predictor was fitted on another host, grid or guidance.
    """
    found: dict[str, Timed] = {}
    if predictor is not None:
        with forecasting(pipe, predictor) as run:
            found["forecast"] = timed(pipe, asked, seed, "forecast", settings)
        print(run.report())
    if compare or predictor is None:
        found["full run"] = timed(pipe, asked, seed, "full run", settings)
    return found


def write_runs(found: Mapping[str, Timed], asked: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write samples one by one and side by side, two runs with their difference, and say so.

    Args:
        found: what `draw_runs` drew.
        asked: per-sample arguments of the pipeline.
        path: PNG of all; the samples go into the folder of that name.
    """
    panels = {name: middle(found[name].samples) for name in sorted(found, reverse=True)}
    captions = compared(panels) if len(found) > 1 else []
    print(seconds_told(found))
    for name, each in found.items():
        for written in save_samples(each.samples, path.with_suffix(""), name.split()[0]):
            print(f"wrote {written}")
    print(f"wrote {save_panels(panels, path, captions, titles(asked))}")


def timed(
    pipe: Any, asked: Sequence[Mapping[str, Any]], seed: int, label: str, settings: Mapping
) -> Timed:
    """Draw under a bar of the steps, which shows after two seconds where the pipeline has one."""
    configured = dict(getattr(pipe, "_progress_bar_config", {}))
    bar = {"desc": label, "delay": QUIET_SECONDS, "leave": False}
    pipe.set_progress_bar_config(**configured | {"disable": False} | bar)
    started = time.perf_counter()
    try:
        found = draw_whole(pipe, asked, seed, **settings)
    finally:
        pipe.set_progress_bar_config(**configured)
    return Timed(found, time.perf_counter() - started)


def seconds_told(found: Mapping[str, Timed]) -> str:
    """The seconds of each call, and how many times faster the forecast one was."""
    told = ", ".join(f"{name} {each.seconds:.1f} s" for name, each in found.items())
    if len(found) < 2:
        return told
    times = found["full run"].seconds / found["forecast"].seconds
    return f"{told}: {times:.1f} x faster, text encoders and decoding included"


def compared(panels: dict[str, Tensor]) -> list[str]:
    """Add the difference of two rows of images; print and return their PSNR."""
    difference = (panels["forecast"] - panels["full run"]).abs()
    error = psnr(panels["forecast"], panels["full run"])
    panels[f"{DIFFERENCE_GAIN} x difference"] = (DIFFERENCE_GAIN * difference).clamp(0, 1)
    captions = [f"{decibels(float(value))} dB" for value in error]
    print(f"PSNR against the full run: {' '.join(captions)}")
    print(f"mean PSNR: {decibels(float(error.mean()))} dB")
    return captions


def save_samples(found: Float[Tensor, "B *frames C H W"], folder: Path, label: str) -> list[Path]:
    """Write every sample at its own size: an image as PNG, a video as MP4.

    Where diffusers cannot write videos here, the frames become PNG files in a folder each.

    Args:
        found: images or videos in [0, 1].
        folder: where to; made when missing.
        label: first word of the names.

    Returns:
        What was written, one path per sample.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, sample in enumerate(found):
        path = folder / f"{label}_{number}.png"
        if sample.ndim == 3:
            picture(sample).save(path)
        else:
            path = save_video([picture(frame) for frame in sample], path.with_suffix(".mp4"))
        paths.append(path)
    return paths


def picture(pixels: Float[Tensor, "C H W"]) -> Image.Image:
    """An image in [0, 1] of one or three channels as a picture of the same size."""
    values = (255 * pixels).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)


def save_video(frames: Sequence[Image.Image], path: Path) -> Path:
    """An MP4 of frames, or a folder of them where it cannot be written.

    Returns:
        The file, or the folder.
    """
    if find_spec("imageio") is not None:
        export_to_video(list(frames), str(path), fps=FRAMES_PER_SECOND)
        return path
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    for number, frame in enumerate(frames):
        frame.save(folder / f"{number:04}.png")
    print(f'frames of {path.name} as PNG; for MP4: pip install "imageio[ffmpeg]"')
    return folder


def titles(asked: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each sample was asked for, in a few short lines; empty where that is no words."""
    words = [str(sample.get("prompt", "")) for sample in asked]
    return ["\n".join(textwrap.wrap(each, TITLE_WIDTH)[:TITLE_LINES]) for each in words]


def draw(
    pipe: Any, asked: Sequence[Mapping[str, Any]], seed: int, **settings: Any
) -> Float[Tensor, "B C H W"]:
    """One image in [0, 1] per sample, of a video its middle frame; sample i has noise `seed + i`.

    Args:
        pipe: a pipeline.
        asked: per-sample arguments of the pipeline.
        seed: seed of the first sample.
        settings: further keyword arguments of the pipeline.
    """
    return middle(draw_whole(pipe, asked, seed, **settings))


def draw_whole(
    pipe: Any, asked: Sequence[Mapping[str, Any]], seed: int, **settings: Any
) -> Float[Tensor, "B *frames C H W"]:
    """The same with all frames of a video."""
    given = joined(asked) | {"generator": generators(range(seed, seed + len(asked)))}
    return drawn(pipe(**given, output_type="pt", **settings))


def save_panels(
    panels: Mapping[str, Float[Tensor, "B C H W"]],
    path: Path,
    captions: Sequence[str] = (),
    headings: Sequence[str] = (),
) -> Path:
    """Write rows of images, one column per sample.

    Args:
        panels: label to images in [0, 1], one row each, all with the same number of samples.
        path: PNG to write; its folder is made when missing.
        captions: words under each column; empty for none.
        headings: words above each column; empty for none.
    """
    last = len(panels) - 1
    rows = [
        Row(label, images, captions if line == last else ())
        for line, (label, images) in enumerate(panels.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows, headings).save(path)
    return path
