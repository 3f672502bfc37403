"""Record trajectories: the forecasting hooks with every step an anchor, into a recording."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from foreseer.integration.call_groups import CallGroups, Groups
from foreseer.integration.session import Session
from foreseer.predictors.partition import Partition
from foreseer.trajectories.collector import Recorder
from foreseer.trajectories.files.writer import RecordingWriter, open_writer
from foreseer.trajectories.prompts import Item, digest, generate_batch, kept_inputs
from foreseer.trajectories.recipe import (
    check_alike,
    describe,
    describe_partitions,
    expand_taps,
    finished_items,
    item_meta,
    plain_or_name,
    recorded_groups,
)

LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""Environment variables that tell a process its rank and the number of processes."""

STORED_AS = ("features", "num_tokens", "states")

LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
"""Environment variables that tell a process its place on its machine."""


def place(rank: int | None, world: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's rank and the number of processes: as given, as launched, or alone.

    A SLURM array multiplies what runs in each of its tasks: task a of n, with w processes of which
    this is number r, is rank a w + r of n w.

    Args:
        rank: as given; None reads the environment.
        world: as given; None reads the environment.
        environment: `RANK` and `WORLD_SIZE` (torchrun, accelerate) or `SLURM_PROCID` and
            `SLURM_NTASKS`, and `SLURM_ARRAY_TASK_ID` with its `MIN`, `MAX` and `COUNT`.

    Raises:
        ValueError: only one of the two is known, the rank is not in `[0, world)`, or an array's
            numbers have gaps.
    """
    if (rank is None) != (world is None):
        raise ValueError(f"rank is {rank} and world is {world}; give both or neither.")
    if rank is None or world is None:
        found = [names for names in LAUNCHERS if all(name in environment for name in names)]
        rank, world = (int(environment[name]) for name in found[0]) if found else (0, 1)
        task, num_tasks = array_task(environment)
        rank, world = task * world + rank, num_tasks * world
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank} and world {world}, expected 0 <= rank < world.")
    return rank, world


def array_task(environment: Mapping[str, str]) -> tuple[int, int]:
    """Place of this SLURM array task among those of its array, and their number; (0, 1) outside.

    Raises:
        ValueError: the array's numbers have gaps that are not all alike, as in `--array=1,3,7`.
    """
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "COUNT")]
    if any(name not in environment for name in names):
        return 0, 1
    task, first, last, count = (int(environment[name]) for name in names)
    stride = (last - first) // max(count - 1, 1) or 1
    if first + stride * (count - 1) != last or (task - first) % stride:
        raise ValueError(
            f"this array has {count} tasks from {first} to {last}, expected evenly spaced numbers, "
            "as in --array=0-7; or give --rank and --world."
        )
    return (task - first) // stride, count


def own_device(environment: Mapping[str, str]) -> str:
    """The GPU of this process among those of its machine, the CPU where there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    local = next((environment[name] for name in LOCAL_RANKS if name in environment), "0")
    return f"cuda:{int(local) % torch.cuda.device_count()}"


def record(
    pipe: Any,
    items: Sequence[Item],
    out: str | Path,
    taps: Sequence[str] = ("output", "hidden"),
    features: str = "none",
    num_tokens: int = 16,
    states: bool = True,
    batch_size: int = 8,
    rank: int = 0,
    world: int = 1,
    partitions: Mapping[str, Partition] | None = None,
    token_groups: Groups | None = None,
    **settings: Any,
) -> str | Path:
    """Run a pipeline over items and write a recording; run it again to resume after a break.

    The images are bit for bit the pipeline's own. Batches are cut from this rank's items in order
    and always run whole, so a resumed recording equals an uninterrupted one, shard by shard.

    Args:
        pipe: a diffusers pipeline.
        items: what to generate.
        out: folder or URL of the recording, new or begun with the same arguments.
        taps: `output`, `hidden`, `residual`, `blocks.<i>`, or `blocks.*` for all blocks.
        features: `none` stores Grams only, `full` adds all features, `tokens` a subset of tokens.
        num_tokens: tokens kept per feature when `features` is `tokens`.
        states: also store the sampler's states, which `closed_loop` fits need.
        batch_size: items per pipeline call.
        rank: number of this process among `world`; it records every `world`-th item.
        world: processes that record at the same time.
        partitions: partitions by `<tap>/<name>`; their Grams, `(branches, parts, S, S)`, are stored
            as `gram/<tap>/<name>`.
        token_groups: of a partition into `TokenGroups`: numbers of a call's samples and tokens, or
            a function of the call's arguments.
        settings: keyword arguments of every call, such as `guidance_scale`, `num_inference_steps`.

    Returns:
        The folder or URL.

    Raises:
        RecordingError: the folder holds another recording.
        ValueError: an argument is wrong, or a feature is not finite.
    """
    mine = _share(items, rank, world)
    if not mine:
        return out  # the others have them all; raising would end theirs under torchrun
    stored_as = (features, num_tokens if features == "tokens" else 0, states)
    recipe = dict(zip(STORED_AS, stored_as, strict=True)) | _told(settings)
    recipe |= {"taps": sorted(taps), "batch_size": batch_size, "pipeline": type(pipe).__name__}
    recorder = Recorder(expand_taps(pipe, taps), partitions)
    if recorder.partitions:
        recipe["partitions"] = describe_partitions(recorder)
    own = recorded_groups(recorder.partitions, token_groups)
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    _record_batches(pipe, batches, recorder, own, out, recipe, rank, settings)
    return out


def _told(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says of the settings: their values or types, and a digest of all."""
    plain = {name: plain_or_name(value) for name, value in sorted(settings.items())}
    return {"settings": plain, "settings_digest": digest([], dict(settings))}


def _share(items: Sequence[Item], rank: int, world: int) -> list[Item]:
    """The items of one process, none where there are fewer than processes.

    Raises:
        ValueError: there is no item at all, or no such rank.
    """
    if not items or not 0 <= rank < world:
        raise ValueError(
            f"found {len(items)} items for rank {rank} of {world}; expected at least one item, and "
            "a rank in [0, world)."
        )
    return list(items)[rank::world]


def _record_batches(
    pipe: Any,
    batches: list[list[Item]],
    recorder: Recorder,
    groups: CallGroups | None,
    out: str | Path,
    recipe: dict[str, Any],
    rank: int,
    settings: dict[str, Any],
) -> None:
    """Run the batches that are not finished and write what is missing of them."""
    done = finished_items(out, recipe, [item for batch in batches for item in batch])
    pending = [batch for batch in batches if any(item.index not in done for item in batch)]
    stored_as = [recipe[name] for name in STORED_AS]
    with contextlib.ExitStack() as stack:
        stack.callback(Session(pipe, observers=[recorder], groups=groups).detach)
        writer: RecordingWriter | None = None
        name = str(out).rstrip("/").rsplit("/", 1)[-1]
        writer_name = f"{name}, rank {rank}" if rank else name
        for batch in tqdm(pending, desc=f"into {writer_name}", unit="batch"):
            generate_batch(pipe, batch, output_type="latent", **settings)
            if writer is None:
                header = describe(pipe, recorder, recipe, settings)
                writer = stack.enter_context(open_writer(out, header, rank))
            check_alike(recorder, header)
            for sample, item in enumerate(batch):
                if item.index not in done:
                    stored = recorder.tensors(sample, *stored_as) | kept_inputs(item)
                    writer.write(item.index, stored, item_meta(item))
