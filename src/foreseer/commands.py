"""`fs.record` and what else there is to do with a recording, and the demonstration.

The signatures are the command lines and the YAML keys, the docstrings the help text. What a
function needs it imports when it is called, so that help answers at once.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from foreseer.extras import require


def record(
    pipeline: Any,
    prompts: str | Sequence[Any] | None,
    out: str,
    *,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
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
            Python also the pipeline itself, or a `host` with its `sample`.
        prompts: prompts, a .txt file with one per line, or a .safetensors file of embeddings by
            argument of the pipeline, a row each; item i draws prompt i, going round. In Python also
            a list of `Item`, or of the inputs of a sample each, as mappings. None for pipelines
            that draw classes.
        out: folder of the recording, made when missing, or a URL such as s3://bucket/run.
        guidance_scale: guidance strength; None leaves the pipeline's default, 3 for classes.
        num_inference_steps: sampler steps S per trajectory; None takes 50, and of a host what its
            loop makes.
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
        dtype: dtype a pipeline given by name is loaded in; in Python also torch's own.
        device: where to; None takes this process's own GPU where there is one.
        settings: further arguments of the pipeline's call, as in {"height": 512, "width": 512}.

    Returns:
        The `Recording`; None where this writer had nothing to do.
    """
    from foreseer.integration.pipelines.load import opened
    from foreseer.integration.pipelines.pipeline_call import call_settings
    from foreseer.trajectories.prompts import asked_items
    from foreseer.trajectories.recipe import asked_partitions, check_room, estimate, summary
    from foreseer.trajectories.recorder import own_device, place
    from foreseer.trajectories.recorder import record as record_items
    from foreseer.trajectories.recording import Recording

    rank, world = place(rank, world, os.environ)
    pipe = opened(pipeline, dtype, device or own_device(os.environ))
    items = asked_items(pipe, prompts, num_trajectories, first_item)
    if not items[rank::world]:
        print(f"rank {rank} of {world} has nothing to record: there are {len(items)} trajectories")
        return None
    given = call_settings(pipe, num_inference_steps, guidance_scale, settings)
    partitions = asked_partitions(pipe, items[0], taps, bands, groups, **given)
    stored = (taps, features, num_tokens, states)
    size = estimate(pipe, items[0], *stored, partitions, **given)
    check_room(out, items, rank, world, size)
    record_items(pipe, items, out, *stored, batch_size, rank, world, partitions, **given)
    recording = Recording(out)
    print(summary(recording, size))
    return recording


def inspect(
    recording: str, out: str | None = None, budgets: Sequence[int] | None = None
) -> Sequence[Any]:
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

    Returns:
        Paths of the plots, the Markdown and the page; none of an empty recording.
    """
    require("train", "foreseer inspect of a recording")
    from foreseer.evaluation.inspection import inspect_recording
    from foreseer.trajectories.files.storage import is_url
    from foreseer.trajectories.recording import Recording

    if out is None and is_url(recording):
        raise ValueError(f"{recording} is a URL; name a folder of this machine for the plots: out.")
    opened = Recording(recording)
    return inspect_recording(
        opened, Path(opened.folder, "plots") if out is None else Path(out), budgets
    )


def verify(recording: str, repair: bool = False) -> bool:
    """Check a recording for damage; that foreseer is exact on a pipeline of yours: --pipeline.

    Reads every shard of a recording and compares it with its hash.
    For pipelines see `foreseer verify --pipeline --help`.

    Args:
        recording: folder or URL of the recording.
        repair: first take out lines and shards that are damaged, which moves them to `damaged/` in
            the folder, give whole shards of killed recorders their line, and remove half-written
            files; `foreseer record` then redoes what was taken out.

    Returns:
        Whether nothing is damaged; the command ends with code 1 where something is.
    """
    from foreseer.integration.memory import readable
    from foreseer.trajectories.files.repair import DAMAGED, leftovers
    from foreseer.trajectories.files.repair import repair as repaired
    from foreseer.trajectories.files.storage import is_url
    from foreseer.trajectories.recording import Recording

    if repair:
        changes = repaired(recording)
        print("\n".join([*changes, f"changes made: {len(changes)}"]))
        if (aside := Path(recording, DAMAGED)).exists():
            print(f"what was taken out lies in {aside}")
    opened = Recording(recording)
    entries, problems = opened.entries.values(), opened.verify()
    total = readable(sum(entry.bytes for entry in entries))
    found = f"{len(problems)} of {len(opened)} trajectories damaged, {total} read"
    print("\n".join([*map(str, problems), found]))
    left = [] if is_url(recording) else leftovers(recording, entries)
    if left:
        print(
            f"{len(left)} files belong to no finished trajectory: --repair adopts or removes them"
        )
    return not problems


def merge(out: str, recordings: Sequence[str]) -> None:
    """Join recordings that were made apart, on disks or machines of their own.

    They must be of the same pipeline and settings, with items of their own or the same ones alike.
    The same command resumes, and adds what its recordings have gained since.

    Args:
        out: folder or URL, new or one of them.
        recordings: list of folders or URLs.
    """
    from foreseer.trajectories.files.repair import merge as add_all
    from foreseer.trajectories.recording import Recording

    added, total = add_all(out, recordings), len(Recording(out))
    print(f"{out}: {added} trajectories added from {len(recordings)} recordings, {total} in all")


def demo(
    out: str = "runs/demo",
    pipeline: str | None = None,
    all: bool = False,
    web: bool = False,
    predictor: str | None = None,
    port: int | None = None,
) -> None:
    """Pictures by the bundled predictors, then record, fit, draw and compare your own, on a CPU.

    Args:
        out: folder of the demonstration's files and report; finished stages in it are not redone.
        pipeline: folder of a class-to-image pipeline, or a bundled one, to fit your own on; for the
            page one that draws prompts. None takes a bundled one.
        all: also the long stages: layer by layer, and the fit in closed loop.
        web: instead of all that a page in the browser, on which prompts are drawn in full and
            forecast.
        predictor: of the page's pipeline: a folder, hub name or `zoo:<name>`; None takes those
            bundled with it.
        port: of the page; None takes a free one.
    """
    if not web and (predictor is not None or port is not None):
        raise ValueError("--predictor and --port are those of the page; add --web.")
    if web and (all or out != "runs/demo"):
        raise ValueError("--all and --out are those of the stages; leave them out, or --web.")
    if web:
        require("web", "foreseer demo --web")
    print("loading PyTorch and diffusers (about 10 s)", flush=True)
    if web:
        from foreseer.web import serve

        return serve(pipeline, predictor, port)
    from foreseer.demo import MORE, STAGES, run_stages

    run_stages(Path(out), pipeline or "zoo:fashion_dit", STAGES | MORE if all else STAGES)
