"""`fs.bench`, `fs.verify` and what else there is to do with a pipeline.

As in commands.py, the signatures are the command lines and the docstrings the help text.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from foreseer.extras import require


def inspect(
    pipeline: Any,
    prompts: str | dict[str, Any] | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
    **settings: Any,
) -> bool:
    """Run one step of a pipeline and tell whether it is supported, and why not.

    Shows its trunk and head, the taps it has, its guidance branches, what a recording and a
    history of it take, and which fits serve it.

    Args:
        pipeline: folder, hub name or `zoo:<name>` of a diffusers pipeline.
        prompts: a prompt; or a .txt file with one per line, or a .safetensors file of embeddings
            by argument of the pipeline, of which the first row is taken; of a host the inputs of a
            sample, as a mapping.
        guidance_scale: guidance strength; None leaves the pipeline's default.
        num_inference_steps: sampler steps S; None takes 50, and of a host what its loop makes.
        dtype: dtype a pipeline given by name is loaded in; in Python also torch's own.
        device: where to; None takes a GPU where there is one.
        settings: further arguments of the pipeline's call, as in {"height": 512, "width": 512}.

    Returns:
        Whether it is supported; the command ends with code 1 where not.
    """
    from foreseer.integration.pipelines.load import opened
    from foreseer.integration.pipelines.pipeline_call import call_settings, first_samples
    from foreseer.trajectories.inspect_pipeline import inspected
    from foreseer.trajectories.prompts import Item

    pipe = opened(pipeline, dtype, device)
    given = call_settings(pipe, num_inference_steps, guidance_scale, settings)
    lines, supported = inspected(pipe, Item(0, 0, first_samples(pipe, prompts)), given)
    print("\n".join(lines))
    return supported


def generate(
    pipeline: Any,
    predictor: Any = None,
    evaluations: int | None = None,
    class_labels: Sequence[int] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    prompts: str | Sequence[str] | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    out: str = "samples.png",
    compare: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
    **settings: Any,
) -> None:
    """Draw samples, with or without a predictor, and say how long each took.

    Args:
        pipeline: folder or hub name of the diffusers pipeline.
        predictor: folder of a predictor checkpoint; None runs the network at every step.
        evaluations: network evaluations, where that is a predictor for several numbers of them.
        class_labels: list of class labels, one sample each, where the pipeline draws classes.
        prompts: a prompt or a list of prompts, one sample each, where it draws those; or a .txt
            file with one per line, or a .safetensors file of prompt embeddings.
        seed: seed of the initial noise.
        guidance_scale: classifier-free guidance strength; None leaves the pipeline's default, 3 for
            one that draws classes.
        num_inference_steps: sampler steps S; None takes the predictor's own, 50 without one.
        out: PNG file with all of them side by side, small, of videos the middle frames; they
            themselves, at full size, go into the folder of that name: `samples/forecast_0.png`, and
            MP4 for videos.
        compare: also draw the full run, show both and their difference, and print the error and
            how many times faster the forecast was.
        dtype: dtype a pipeline given by name is loaded in; in Python also torch's own.
        device: where to; None takes a GPU where there is one.
        settings: further arguments of the pipeline's call, as in {"height": 512, "width": 512}.
    """
    from foreseer.checkpoints.format import load_predictor
    from foreseer.evaluation.generate import draw_runs, steps_of, write_runs
    from foreseer.integration.pipelines.load import opened
    from foreseer.integration.pipelines.pipeline_call import call_settings, samples

    if compare and predictor is None:
        raise ValueError(
            "compare needs a predictor to compare with the full run: --predictor FOLDER"
        )
    loaded = predictor
    if isinstance(predictor, str | Path):
        loaded = load_predictor(predictor, evaluations=evaluations)
    pipe = opened(pipeline, dtype, device)
    asked = samples(pipe, prompts, class_labels)
    steps = num_inference_steps or steps_of(loaded)
    given = call_settings(pipe, steps, guidance_scale, settings)
    write_runs(draw_runs(pipe, asked, seed, loaded, compare, given), asked, Path(out))


def bench(
    pipeline: Any,
    out: str,
    prompts: str | Sequence[Any] | None = None,
    budgets: Sequence[int] | None = None,
    num_samples: int = 64,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    searched: str | Mapping[str, Sequence[int]] | None = None,
    predictors: Sequence[Any] = (),
    methods: Sequence[str] | None = None,
    reference_steps: int | None = None,
    perceptual: bool = False,
    batch_size: int = 16,
    num_threads: int = 1,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
    **settings: Any,
) -> Any:
    """Compare the full run, few-step solvers and every predictor on the same seeds and anchors.

    Every comparison is paired on the same samples; the last lines say what to use at each number of
    evaluations. The same command goes on after the last finished row when it was interrupted, and
    what is added to it later is paired with what has run.

    Args:
        pipeline: folder or hub name of the diffusers pipeline, or `zoo:NAME` for a bundled one.
        out: folder of the report: the page `report.html`, tables, plots, contact sheet.
        prompts: held-out prompts, a .txt file with one per line, or a .safetensors file of prompt
            embeddings; they come in turn, with new seeds: twice as many samples as prompts are two
            seeds each. Not needed where the pipeline draws classes; of a host the inputs of a
            sample each, as mappings.
        budgets: list of network evaluations per sample to compare at; None takes those of the
            predictors, and 11, 8 and 6 without any.
        num_samples: held-out samples per row, at least 1; of videos the middle frame is measured.
        guidance_scale: classifier-free guidance strength; None leaves the pipeline's default, 3 for
            one that draws classes.
        num_inference_steps: sampler steps S of the full run; None takes 50, and of a host what its
            loop makes.
        searched: searched anchors, `METHOD|TAP|NUM_ANCHORS` to a list of steps, or the JSON file
            that `foreseer search` writes, whose effort the report then tells.
        predictors: list of predictor checkpoints, FOLDER or NAME=FOLDER, of one number of
            evaluations or of several; in Python also predictors, or what `fit` returned for several
            budgets.
        methods: list of solvers and formulas to run; None runs all.
        reference_steps: also measure the distance to a full run of so many steps, as in 200, from
            which the full run itself is away; that run takes as many evaluations per sample.
        perceptual: also measure ST-LPIPS, which needs the extra `perceptual`.
        batch_size: samples drawn at once.
        num_threads: threads torch uses meanwhile.
        dtype: dtype a pipeline given by name is loaded in; in Python also torch's own.
        device: where to; None takes a GPU where there is one.
        settings: further arguments of the pipeline's call, as in {"height": 512, "width": 512}.

    Returns:
        Path of the page.
    """
    options = dict(locals())
    require("train", "foreseer bench")
    if perceptual:
        require("perceptual", "ST-LPIPS")
    from foreseer.evaluation import benchmark
    from foreseer.evaluation.advice import advice
    from foreseer.evaluation.plan import budgets_of, load_learned
    from foreseer.evaluation.results import load_rows
    from foreseer.evaluation.timing import threads
    from foreseer.integration.pipelines.load import opened
    from foreseer.integration.pipelines.pipeline_call import call_settings
    from foreseer.trajectories.prompts import asked_items

    pipe = opened(pipeline, dtype, device)
    given = json.loads(Path(searched).read_text()) if isinstance(searched, str) else searched
    learned, lists = load_learned(predictors), dict[str, Any](given or {})
    efforts = lists.pop("effort", {})
    with threads(num_threads):
        page = benchmark.compare_methods(
            pipe,
            asked_items(pipe, prompts, num_samples, benchmark.FIRST_ITEM),
            out,
            budgets or budgets_of(learned),
            learned,
            lists,
            methods,
            batch_size,
            benchmark.command_line(options),
            asked=benchmark.Asked(reference_steps, perceptual, efforts),
            **call_settings(pipe, num_inference_steps, guidance_scale, settings),
        )
    rows = load_rows(page.parent / "results.json")
    print("\n".join(advice(rows)))
    print(f"The report lies in {page}.")
    return page


def verify(
    pipeline: Any,
    predictor: Any = None,
    prompts: str | dict[str, Any] | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
    **settings: Any,
) -> Any:
    """Prove on a pipeline of yours that foreseer is exact, and measure what it costs there.

    Runs it some forty times at few steps: what is recorded must leave the run as it is, recorded
    features put back must give the same latents bit for bit, a run broken off must not reach the
    next one, and nothing may be left behind; then memory and cost.

    Args:
        pipeline: folder, hub name or `zoo:<name>` of a diffusers pipeline.
        predictor: also run this predictor: a folder, hub name or `zoo:<name>`; in Python also the
            predictor itself.
        prompts: a prompt; or a .txt file with one per line, or a .safetensors file of embeddings
            by argument of the pipeline, of which the first row is taken; of a host the inputs of a
            sample, as a mapping.
        guidance_scale: guidance strength; None leaves the pipeline's default.
        num_inference_steps: sampler steps S; None takes the predictor's, or 8.
        dtype: dtype a pipeline given by name is loaded in; in Python also torch's own.
        device: where to; None takes a GPU where there is one.
        settings: further arguments of the pipeline's call, as in {"height": 512, "width": 512}.

    Returns:
        `Verified`: its `checks`, printed as a table with a verdict; true where none failed. The
        command ends with code 1 where one did.
    """
    from foreseer.checkpoints.format import load_predictor
    from foreseer.evaluation.verify import num_steps_of, one_call, verified
    from foreseer.integration.host.module_host import has_loop
    from foreseer.integration.pipelines.load import opened
    from foreseer.integration.pipelines.pipeline_call import call_settings, first_samples

    pipe = opened(pipeline, dtype, device)
    loaded = load_predictor(predictor) if isinstance(predictor, str | Path) else predictor
    steps = num_inference_steps or (None if has_loop(pipe) else num_steps_of(loaded))
    given = call_settings(pipe, steps, guidance_scale, settings)
    found = verified(pipe, one_call(pipe, first_samples(pipe, prompts), given), loaded)
    print(found)
    return found
