"""The same samples by the full run and by predictors, with the seconds of each.

Seconds are those of the processor where the network runs on it: others who use the machine do not
count. Elsewhere they are seconds of the clock, until the device has finished.

Shapes: B samples, C channels, H height, W width.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from foreseer.checkpoints.format import load_predictor
from foreseer.evaluation.generate import draw, titles
from foreseer.evaluation.metrics import psnr
from foreseer.evaluation.page.sheet import Row, sheet
from foreseer.evaluation.results import decibels
from foreseer.integration.forecasting import forecasting
from foreseer.integration.pipelines.pipeline_call import call_settings


@dataclass(frozen=True)
class Drawn:
    """One run over all samples.

    Attributes:
        images: what it drew, in [0, 1].
        seconds: of the call, decoding included.
        evaluations: steps at which the network ran.
        steps: sampler steps.
    """

    images: Float[Tensor, "B C H W"]
    seconds: float
    evaluations: int
    steps: int


def side_by_side(
    pipe: Any,
    asked: Sequence[Mapping[str, Any]],
    predictors: Sequence[str],
    repeats: int = 1,
    **call: Any,
) -> list[Drawn]:
    """Draw the same samples in full and with every predictor; the full run comes first.

    One sample is drawn before anything is timed: the first call after attaching also proves that
    the hooks are exact, which takes some evaluations once.

    Args:
        pipe: a pipeline.
        asked: per-sample arguments of the pipeline.
        predictors: folders or names.
        repeats: how often each is run, of which the least seconds are told.
        call: `seed`, and `num_inference_steps` and `guidance_scale` as in `call_settings`.
    """
    seed = call.pop("seed", 0)
    settings = call_settings(pipe, **call)
    steps = int(settings["num_inference_steps"])

    def timed(words: str) -> tuple[Tensor, float]:
        pipe.set_progress_bar_config(disable=True)
        draw(pipe, asked[:1], seed, **settings)
        pipe.set_progress_bar_config(desc=words, delay=2, leave=False)
        seconds = []
        for _ in range(repeats):
            started = clock()
            images = draw(pipe, asked, seed, **settings)  # which brings them to the CPU
            seconds.append(clock() - started)
        return images, min(seconds)

    clock = clock_of(pipe)
    found = [Drawn(*timed(f"all {steps} steps"), steps, steps)]
    for name in predictors:
        predictor = load_predictor(name)
        with forecasting(pipe, predictor) as run:
            drawn = timed(f"{len(predictor.spec.anchors)} of {steps} steps")
        found.append(Drawn(*drawn, len(run.report().anchors), steps))
    pipe.set_progress_bar_config(disable=True)
    return found


def clock_of(pipe: Any) -> Callable[[], float]:
    """What tells a pipeline's seconds: of the processor where it runs on it, else the clock."""
    return time.process_time if pipe.device.type == "cpu" else time.perf_counter


def told(runs: Sequence[Drawn]) -> str:
    """A line per run: evaluations, seconds, how many times faster, how near to the full run."""
    return "\n".join("    " + ", ".join(facts_of(run, runs[0])) for run in runs)


def facts_of(run: Drawn, full: Drawn) -> list[str]:
    """What is said about a run."""
    facts = [f"{run.evaluations} of {run.steps} steps computed", f"{run.seconds:.1f} s"]
    if run is full:
        return facts
    mean = float(psnr(run.images, full.images).mean())
    return [*facts, f"{full.seconds / run.seconds:.1f} times faster", f"{decibels(mean)} dB"]


def picture(runs: Sequence[Drawn], asked: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The samples of every run, a row each, with what is said about it beside them."""
    rows = []
    for run in runs:
        steps, seconds, *others = facts_of(run, runs[0])
        first = others[0] if others else "full run"
        rows.append(Row("\n".join([first, seconds, steps, *others[1:]]), run.images))
    return sheet(rows, titles(asked))
