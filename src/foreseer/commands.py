"""The functions behind `foreseer record`, `search`, `export` and the others.

Their signatures are the command lines and the YAML keys, and their docstrings the help text. Each
imports its implementation when it is called, so that help answers at once.
"""

from collections.abc import Sequence
from typing import Any, Literal


def record(
    pipeline: Any,
    prompts: str | Sequence[str] | None,
    out: str,
    *,
    guidance_scale: float | None = None,
    num_inference_steps: int = 50,
    num_trajectories: int | None = None,
    first_item: int = 0,
    batch_size: int = 8,
    taps: Sequence[str] = ("output", "hidden"),
    features: Literal["none", "tokens", "full"] = "none",
    num_tokens: int = 16,
    states: bool = True,
    rank: int | None = None,
    world: int | None = None,
    bands: int | None = None,
    groups: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
    **settings: Any,
) -> Any:
    """Run a pipeline at every step and record its trajectories.

    Item i belongs to the writer with i mod world = rank, and its seed follows from i, so any number
    of writers may fill one folder, and the same command resumes. Started by torchrun, accelerate,
    srun or as a SLURM array, each process takes its own share and its own GPU.

    Args:
        pipeline: folder or hub name of a diffusers pipeline, or `zoo:<name>` for a bundled one; in
            Python also the pipeline itself.
        prompts: prompts, a .txt file with one per line, or a .safetensors file of embeddings by
            argument of the pipeline, a row each; item i draws prompt i, going round. In Python also
            a list of `Item`. None for pipelines that draw classes.
        out: folder of the recording, made when missing, or a URL such as s3://bucket/run.
        guidance_scale: guidance strength; None leaves the pipeline's default, 3 for classes.
        num_inference_steps: sampler steps S per trajectory.
        num_trajectories: items to record over all writers; None: one per prompt, 64 of classes.
        first_item: index of the first item; recordings of other items do not overlap.
        batch_size: samples drawn at once.
        taps: tensors to record, as a list: `output`, `hidden`, `residual`, `blocks.i`, `blocks.*`.
        features: keep beside the Grams no features, those of some tokens, or all of them.
        num_tokens: tokens kept per sample when `features` is `tokens`.
        states: keep the sampler's state x_t at every step, which closed-loop fits need.
        rank: this writer's index in `[0, world)`; None reads what the launcher set.
        world: number of writers; None reads what the launcher set.
        bands: also store the Grams of so many equal frequency bands of a tap: `gram/<tap>/bands`.
        groups: JSON file with a list per tap, the group of every channel, as in {"hidden": [0, 1]};
            their Grams are stored as `gram/<tap>/groups`.
        dtype: dtype a pipeline given by name is loaded in.
        device: where to; None takes this process's own GPU where there is one.
        settings: further arguments of the pipeline's call, as in {"height": 512, "width": 512}.

    Returns:
        The `Recording`; None where this writer had nothing to do.
    """
    given = dict(locals())
    from foreseer.trajectories.record_command import record_command

    return record_command(**given)


def generate(
    pipeline: Any,
    predictor: str | None = None,
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
        dtype: dtype a pipeline given by name is loaded in.
        device: where to; None takes a GPU where there is one.
        settings: further arguments of the pipeline's call, as in {"height": 512, "width": 512}.
    """
    given = dict(locals())
    from foreseer.evaluation.generate import generate_command

    generate_command(**given)


def bench(
    pipeline: Any,
    out: str,
    prompts: str | None = None,
    budgets: Sequence[int] = (11, 8, 6),
    num_samples: int = 64,
    guidance_scale: float | None = None,
    num_inference_steps: int = 50,
    searched: str | None = None,
    predictors: Sequence[str] = (),
    methods: Sequence[str] | None = None,
    batch_size: int = 16,
    num_threads: int = 1,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
    **settings: Any,
) -> None:
    """Compare the full run, few-step solvers and every predictor on the same seeds and anchors.

    The same command goes on after the last finished row when it was interrupted.

    Args:
        pipeline: folder or hub name of the diffusers pipeline, or `zoo:NAME` for a bundled one.
        out: folder of the report: the page `report.html`, tables, plots, contact sheet.
        prompts: held-out prompts: a .txt file with one per line, or a .safetensors file of prompt
            embeddings; they come in turn, with new seeds. Not needed where the pipeline draws
            classes.
        budgets: list of network evaluations per sample to compare at.
        num_samples: held-out samples per row, at least 1; of videos the middle frame is measured.
        guidance_scale: classifier-free guidance strength; None leaves the pipeline's default, 3 for
            one that draws classes.
        num_inference_steps: sampler steps S of the full run.
        searched: JSON file of searched anchors, `METHOD|TAP|NUM_ANCHORS` to a list of steps.
        predictors: list of predictor checkpoints, FOLDER or NAME=FOLDER.
        methods: list of solvers and formulas to run; None runs all.
        batch_size: samples drawn at once.
        num_threads: threads torch uses.
        dtype: dtype a pipeline given by name is loaded in.
        device: where to; None takes a GPU where there is one.
        settings: further arguments of the pipeline's call, as in {"height": 512, "width": 512}.
    """
    given = dict(locals())
    from foreseer.evaluation.benchmark import bench_command

    bench_command(**given)


def inspect(recording: str, out: str | None = None, budgets: Sequence[int] | None = None) -> None:
    """Show a recording's motion and the rule that suits it; what a pipeline is made of: --pipeline.

    For pipelines see `foreseer inspect --pipeline --help`.

    Needs neither the network nor features. Formulas and a least-squares fit are compared by the
    error they pile up on recorded features, on anchors searched for each and on uniform ones; the
    last line is a verdict. It is an estimate: only `foreseer bench` sees the network react.

    Args:
        recording: folder of the recording.
        out: folder for the page `inspect.html`, `inspect.md`, the plots and `offline.json`; None
            takes `plots` in the recording's folder.
        budgets: list of network evaluations per trajectory to compare the rules at, below the
            steps; None takes those of 11, 8 and 6 that are. From Grams alone, so an estimate:
            `foreseer bench` measures.
    """
    from foreseer.evaluation.inspect_command import inspect_command

    inspect_command(recording=recording, out=out, budgets=budgets)


def verify(recording: str, repair: bool = False) -> None:
    """Check a recording for damage; that foreseer is exact on a pipeline of yours: --pipeline.

    Reads every shard of a recording and compares it with its hash; exits with code 1 on damage.
    For pipelines see `foreseer verify --pipeline --help`.

    Args:
        recording: folder or URL of the recording.
        repair: first take out lines and shards that are damaged, which moves them to `damaged/` in
            the folder, give whole shards of killed recorders their line, and remove half-written
            files; `foreseer record` then redoes what was taken out.
    """
    from foreseer.trajectories.verify_recording import verify_command

    verify_command(recording=recording, repaired=repair)


def merge(out: str, recordings: Sequence[str]) -> None:
    """Join recordings that were made apart, on disks or machines of their own.

    They must be of the same pipeline and settings, with items of their own or the same ones alike.
    The same command resumes, and adds what its recordings have gained since.

    Args:
        out: folder or URL, new or one of them.
        recordings: list of folders or URLs.
    """
    from foreseer.trajectories.files.merge import merge_command

    merge_command(out=out, recordings=recordings)


def demo(out: str = "runs/demo", pipeline: str = "zoo:fashion_dit", all: bool = False) -> None:
    """Pictures by the bundled predictors, then record, fit, draw and compare your own, on a CPU.

    Args:
        out: folder of the demonstration's files and report; finished stages in it are not redone.
        pipeline: folder of a class-to-image pipeline, or a bundled one, to fit your own on.
        all: also the long stages: layer by layer, and the fit in closed loop.
    """
    print("loading PyTorch and diffusers (about 10 s)", flush=True)
    from foreseer.demo import demo_command

    demo_command(out, pipeline, everything=all)
