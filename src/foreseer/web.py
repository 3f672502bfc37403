"""`foreseer demo --web`: a page that draws a prompt in full and forecast, and tells the seconds.

`page(pipe, load_predictors("runs/flux"), height=1024).launch()` is that of one's own.
"""

import inspect
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr
import torch
from PIL import Image

from foreseer.checkpoints.format import load_predictor, load_predictors
from foreseer.evaluation.generate import draw, picture, steps_of
from foreseer.evaluation.metrics import psnr
from foreseer.evaluation.page.side_by_side import Drawn, clock_of
from foreseer.extras import MissingExtra
from foreseer.integration.forecasting import forecasting
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.pipelines.pipeline_call import call_settings, default_prompt, samples
from foreseer.predictors.base import Predictor
from foreseer.words import is_told

PIPELINE = "zoo:emoji_flux_2"
BUDGETS = (6, 8, 11)  # of the readouts bundled with it
FIRST_EVALUATIONS = 8  # those shown first, where there is a predictor for them
NUM_EXAMPLES = 8
SIDE = 384  # pixels: smaller pictures are enlarged
KEPT = 3600  # seconds that visitors' pictures stay on the disk
NEW_PROMPT = "a first picture"  # stored with no model
TO_COME = "#d4d4d8"  # in place of the full run
INTRODUCTION = """# One prompt, in full and forecast
The network runs at every step, then at a few of them, where foreseer forecasts the others.
Same prompt, same noise; drag the line between the pictures."""


class Comparison:
    """A pipeline and its predictors, which draw for one visitor at a time; see `page`."""

    def __init__(self, pipe: Any, predictors: Mapping[int, Predictor], **settings: Any) -> None:
        self.pipe, self.settings = pipe, settings
        self.predictors = dict(sorted(predictors.items()))
        self.budgets = ", ".join(map(str, self.predictors))
        self.lock = threading.Lock()  # the run of a visitor who has left goes on

    def warm_up(self) -> str:
        """Draw with every predictor, since a first run costs more, and none may be refused later.

        Returns:
            Why only the prompts stored with the model can be drawn; empty where any can.
        """
        missing, prompt = "", NEW_PROMPT
        samples(self.pipe, [prompt])  # refuses pipelines that take none
        for predictor in self.predictors.values():
            try:
                self.run(prompt, predictor)
            except MissingExtra as error:
                missing, prompt = str(error), default_prompt(self.pipe)
                self.run(prompt, predictor)
        return missing

    def run(self, prompt: str, predictor: Predictor, full: bool = False, seed: int = 0) -> Drawn:
        """Draw a prompt with the steps and guidance of the fit, forecasting or in full."""
        spec, steps, settings = predictor.spec, steps_of(predictor), dict(self.settings)
        guidance = spec and spec.guidance.get("guidance_scale", spec.guidance_scale)
        if "guidance_scale" in inspect.signature(self.pipe.__call__).parameters and guidance:
            settings.setdefault("guidance_scale", guidance)
        settings = call_settings(self.pipe, steps, None, settings)
        clock = clock_of(self.pipe)

        def timed() -> tuple[Any, float]:
            started = clock()
            return draw(self.pipe, [{"prompt": prompt}], seed, **settings), clock() - started

        with self.lock:
            if full:
                return Drawn(*timed(), steps, steps)
            with forecasting(self.pipe, predictor) as run:
                images, seconds = timed()
            return Drawn(images, seconds, len(run.report().anchors), steps)

    def draw(self, prompt: str, evaluations: int, seed: int) -> Iterator[tuple[Any, Any]]:
        """Pictures and words for the page, once forecast and again once run in full.

        The forecast comes first, so that what a call costs once is counted for it.

        Args:
            prompt: words; never taken for the name of a file.
            evaluations: of the predictor.
            seed: of the noise, the same for both.

        Raises:
            gr.Error: there is no such predictor, or the run is refused.
        """
        if not prompt.strip():
            gr.Warning("found no prompt; type what is to be drawn, or take an example.")
            yield gr.skip(), gr.skip()
            return
        if evaluations not in self.predictors:
            raise refused(
                f"found no predictor for {evaluations} evaluations, expected one of "
                f"{self.budgets}; move the slider to one of them."
            )
        predictor = self.predictors[evaluations]
        try:
            forecast = self.run(prompt, predictor, seed=seed)
            right = enlarged(forecast)
            yield (Image.new("RGB", right.size, TO_COME), right), told(forecast)
            full = self.run(prompt, predictor, full=True, seed=seed)
        except Exception as error:
            if not is_told(error):
                raise
            raise refused(str(error)) from error
        kind = " of the processor" if self.pipe.device.type == "cpu" else ""
        yield (enlarged(full), right), compared(full, forecast, kind)


def refused(words: str) -> gr.Error:
    """A refusal, as the page shows it."""
    return gr.Error(words, title="Refused", print_exception=False)


def told(forecast: Drawn) -> str:
    """What is said while the full run goes on."""
    done = f"{forecast.evaluations} of {forecast.steps} steps computed, {forecast.seconds:.2f} s"
    return f"Forecast: {done}. The full run is on its way."


def compared(full: Drawn, forecast: Drawn, kind: str) -> str:
    """How many times faster, how far the pictures are apart, and the seconds of both."""
    value = float(psnr(forecast.images, full.images).mean())
    apart = "not a pixel differs" if value == math.inf else f"{value:.1f} dB from the full run"
    seconds = f"{forecast.seconds:.2f} s instead of {full.seconds:.2f} s{kind}"
    steps = f"{forecast.evaluations} of {forecast.steps} steps computed"
    return f"### {full.seconds / forecast.seconds:.1f} times faster, {apart}\n{seconds}; {steps}."


def enlarged(drawn: Drawn) -> Image.Image:
    """The first picture of a run, each pixel of a small one several times as wide."""
    small = picture(drawn.images[0])
    factor = max(1, SIDE // max(small.size))
    return small.resize((factor * small.width, factor * small.height), Image.Resampling.NEAREST)


def page(pipe: Any, predictors: Mapping[int, Predictor], **settings: Any) -> gr.Blocks:
    """The page, to be launched, once every predictor has drawn.

    Args:
        pipe: a pipeline that draws prompts.
        predictors: fitted on it, by their network evaluations; see `load_predictors`.
        settings: further arguments of the pipeline's call, such as `height`.

    Raises:
        PredictorMismatch: a predictor was fitted on another model, size or setting.
        ValueError: the pipeline takes no prompts, or not these settings.
    """
    return page_of(Comparison(pipe, predictors, **settings))


def page_of(comparison: Comparison) -> gr.Blocks:
    """The same, of a comparison."""
    missing = comparison.warm_up()
    encoder = getattr(comparison.pipe, "text_encoder", None)
    stored = [each for each in getattr(encoder, "known", ()) if each]
    budgets = list(comparison.predictors)
    first = FIRST_EVALUATIONS if FIRST_EVALUATIONS in budgets else budgets[0]
    with gr.Blocks(title="foreseer", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as made:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label="Prompt", info=missing or None)
                evaluations = gr.Slider(
                    minimum=budgets[0] - (len(budgets) == 1),  # a slider must have a range
                    maximum=budgets[-1],
                    value=first,
                    step=1,
                    label="Network evaluations",
                    info=f"There are predictors for {comparison.budgets}.",
                    interactive=len(budgets) > 1,
                )
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31)
                button = gr.Button("Draw", variant="primary")
                if stored:
                    gr.Examples([[each] for each in stored[:NUM_EXAMPLES]], prompt)
            with gr.Column():
                pictures = gr.ImageSlider(label="Full run | forecast", format="png")
                words = gr.Markdown()
        inputs, outputs = [prompt, evaluations, seed], [pictures, words]
        shown = {"show_progress_on": pictures, "concurrency_limit": 1}
        gr.on([button.click, prompt.submit], comparison.draw, inputs, outputs, **shown)
        evaluations.release(
            lambda value: min(budgets, key=lambda each: abs(each - value)),
            *(evaluations, evaluations),
            show_progress="hidden",
        )
    return made


def serve(pipeline: str | None, predictor: str | None, port: int | None) -> None:
    """Serve the page on this machine until Ctrl-C; the arguments are those of `foreseer demo`.

    Raises:
        OSError: the port is taken.
        ValueError: a pipeline without predictors, or see `page`.
    """
    if predictor is None and pipeline not in (None, PIPELINE):
        raise ValueError(f"no predictors for {pipeline}; name those you fitted: --predictor FOLDER")
    predictors = load_predictors(predictor) if predictor else bundled()
    dtype = getattr(torch, next(iter(predictors.values())).spec.dtype)
    comparison = Comparison(load_pipeline(pipeline or PIPELINE, dtype, device=None), predictors)
    try:
        print(f"drawing once with each of {len(predictors)} predictors", flush=True)
        address = launched(page_of(comparison), port)
        print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nthe page is closed", flush=True)
        comparison.lock.acquire()  # Python must not end in the middle of a run, nor one begin


def bundled() -> dict[int, Predictor]:
    """The bundled predictors of the bundled pipeline."""
    return {n: load_predictor(f"{PIPELINE}_readout_{n}") for n in BUDGETS}


def launched(made: gr.Blocks, port: int | None) -> str:
    """Serve a page on this machine, and return its address."""
    try:
        return made.launch(
            server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True
        )[1]
    except OSError as error:
        raise OSError(f"port {port} is taken; give another --port, or none.") from error
