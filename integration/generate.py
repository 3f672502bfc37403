"""`foreseer generate`: draw samples into one image, with or without a predictor.

Shapes: B samples, C channels, H height, W width.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from .forecasting import forecasting
from .metrics import psnr
from .pipeline_call import call_settings, generators, joined, pictures, samples
from .pipelines import opened
from .report_plots import DIFFERENCE_GAIN
from .report_table import decibels
from .sheet import Row, sheet

TITLE_WIDTH, TITLE_LINES = 16, 4  # what fits above a sample


def generate_command(
    pipeline: Any,
    predictor: str | None,
    class_labels: Sequence[int],
    seed: int,
    guidance_scale: float | None,
    num_inference_steps: int,
    out: str,
    compare: bool,
    prompts: str | Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    device: str | None = None,
) -> None:
    """`foreseer generate`; the arguments are those of `foreseer.commands.generate`.

    Raises:
        PredictorMismatch: the predictor was fitted on another host, grid or guidance.
        ValueError: there is nothing to compare, or a label is out of range.
    """
    if compare and predictor is None:
        raise ValueError(
            "compare needs a predictor to compare with the full run: --predictor FOLDER"
        )
    pipe = opened(pipeline, dtype, device)
    asked = samples(pipe, prompts, class_labels)
    given = call_settings(pipe, num_inference_steps, guidance_scale, settings)
    panels: dict[str, Tensor] = {}
    captions: list[str] = []
    if compare or predictor is None:
        panels["full run"] = draw(pipe, asked, seed, **given)
    if predictor is not None:
        from ..checkpoints.format import load_predictor

        with forecasting(pipe, load_predictor(predictor)) as run:
            panels["forecast"] = draw(pipe, asked, seed, **given)
        print(run.report())
    if compare:
        difference = (panels["forecast"] - panels["full run"]).abs()
        error = psnr(panels["forecast"], panels["full run"])
        panels[f"{DIFFERENCE_GAIN} x difference"] = (DIFFERENCE_GAIN * difference).clamp(0, 1)
        captions = [f"{decibels(float(value))} dB" for value in error]
        print(f"PSNR against the full run: {' '.join(captions)}")
        print(f"mean PSNR: {decibels(float(error.mean()))} dB")
    print(f"wrote {save_panels(panels, Path(out), captions, titles(asked))}")


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
    given = joined(asked) | {"generator": generators(range(seed, seed + len(asked)))}
    return pictures(pipe(**given, output_type="pt", **settings))


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
