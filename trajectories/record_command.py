"""`foreseer record`: which items this process records, and whether they fit on the disk."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from foreseer.integration.host.denoisers import transformer_of
from foreseer.integration.pipelines.load import opened
from foreseer.integration.pipelines.pipeline_call import call_settings, samples, takes_labels
from foreseer.trajectories.estimate import Estimate, estimate
from foreseer.trajectories.files.remote import cache_folder
from foreseer.trajectories.files.storage import exists, is_url
from foreseer.trajectories.partitions import asked_partitions
from foreseer.trajectories.prompts import Item, class_items
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

CLASS_ITEMS = 64  # trajectories of a pipeline that draws classes, unless told otherwise
LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""Environment variables that tell a process its rank and the number of processes."""

LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
"""Environment variables that tell a process its place on its machine."""


def record_command(
    pipeline: Any,
    out: str,
    guidance_scale: float | None,
    num_inference_steps: int,
    num_trajectories: int | None,
    first_item: int,
    batch_size: int,
    taps: Sequence[str],
    features: str,
    num_tokens: int,
    states: bool,
    rank: int | None = None,
    world: int | None = None,
    bands: int | None = None,
    groups: str | None = None,
    prompts: str | Sequence[str] | Sequence[Item] | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    device: str | None = None,
) -> Recording | None:
    """Record this process's share of the items; see `foreseer.commands.record` for the arguments.

    Raises:
        ValueError: the pipeline draws from something else, or an argument is out of range.
        OSError: the disk has less room than the recording needs.
    """
    rank, world = place(rank, world, os.environ)
    pipe = opened(pipeline, dtype, device or own_device(os.environ))
    items = asked_items(pipe, prompts, num_trajectories, first_item)
    if not items[rank::world]:
        print(f"rank {rank} of {world} has nothing to record: there are {len(items)} trajectories")
        return None
    given = call_settings(pipe, num_inference_steps, guidance_scale, settings)
    partitions = asked_partitions(pipe, items[0], taps, bands, groups, **given)
    size = estimate(pipe, items[0], taps, features, num_tokens, states, partitions, **given)
    check_room(out, items, rank, world, size)
    record(
        pipe,
        items,
        out,
        taps=taps,
        features=features,
        num_tokens=num_tokens,
        states=states,
        batch_size=batch_size,
        rank=rank,
        world=world,
        partitions=partitions,
        **given,
    )
    recording = Recording(out)
    print(summary(recording, size))
    return recording


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


def asked_items(
    pipe: Any,
    prompts: str | Sequence[str] | Sequence[Item] | None,
    num_trajectories: int | None,
    first_item: int,
) -> list[Item]:
    """The items to record over all writers; item i has seed i.

    Args:
        pipe: the pipeline.
        prompts: see `foreseer.commands.record`; None goes round the pipeline's classes. Items are
            taken as they are.
        num_trajectories: how many; None takes one per prompt, 64 of classes.
        first_item: index of the first.

    Raises:
        ValueError: none are asked for, or the pipeline draws from something else.
    """
    if num_trajectories is not None and num_trajectories < 1:
        raise ValueError(f"num_trajectories is {num_trajectories}, expected at least 1.")
    if prompts is None:
        count = CLASS_ITEMS if num_trajectories is None else num_trajectories
        return class_items(count, number_of_classes(pipe), first_item)
    given = [] if isinstance(prompts, str) else list(prompts)
    items = [each for each in given if isinstance(each, Item)]
    if items and len(items) == len(given):
        return items[:num_trajectories]
    entries = samples(pipe, cast(Any, prompts))
    if not entries:
        raise ValueError("prompts is an empty list; expected at least one prompt.")
    count = len(entries) if num_trajectories is None else num_trajectories
    return [Item(i, i, entries[i % len(entries)]) for i in range(first_item, first_item + count)]


def number_of_classes(pipe: Any) -> int:
    """The number of classes a pipeline draws.

    Raises:
        ValueError: its calls take no class labels.
    """
    config: Any = transformer_of(pipe).config
    classes = config.get("num_embeds_ada_norm") if takes_labels(pipe) else None
    if not classes:
        raise ValueError(
            f"{type(pipe).__name__} takes no class labels; give --prompts, a .txt file with a "
            "prompt per line or a .safetensors file of prompt embeddings."
        )
    return int(classes)


def check_room(
    out: str | Path, items: Sequence[Item], rank: int, world: int, size: Estimate
) -> None:
    """Say how much will be written, and refuse to start what cannot end.

    Args:
        out: folder or URL of the recording.
        items: those of all writers, finished ones included.
        rank: this writer.
        world: number of writers.
        size: bytes per trajectory.

    Raises:
        OSError: the disk has less room than this writer's missing items need; of a URL, than one
            needs on its way.
    """
    done = set(Recording(out).items) if exists(out) else set()
    mine = items[rank::world]
    missing = sum(item.index not in done for item in mine)
    of_all = sum(item.index not in done for item in items)
    remote = is_url(out)
    folder = cache_folder() if remote else Path(out).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    each, room = size.trajectory_bytes, f"of {megabytes(free)} free"
    where = f"and are sent to {out} one at a time" if remote else room
    who = f"rank {rank} of {world}: " if world > 1 else ""
    print(
        f"{who}{len(mine) - missing} of {len(mine)} trajectories are there; the other {missing} "
        f"need about {megabytes(missing * each)} {where}"
    )
    needed = min(missing, 1) * each if remote else missing * each
    if needed > free:
        raise OSError(
            f"the disk of {folder} has {megabytes(free)} free, the recording needs about "
            f"{megabytes(needed)}; record fewer trajectories or taps, features: none, or elsewhere."
        )
    if not remote and of_all * each > free:
        print(
            f"all {world} writers together need about {megabytes(of_all * each)}, more than "
            f"{folder} has: if they share this disk it will fill up, which stops them but loses "
            "nothing; start them again with more room"
        )


def summary(recording: Recording, size: Estimate) -> str:
    """One line: trajectories, bytes per trajectory, ratio to full features."""
    entries = recording.entries.values()
    each = sum(entry.bytes for entry in entries) / len(entries)
    return (
        f"{recording.folder}: {len(entries)} trajectories, {megabytes(each)} each; the full "
        f"features of these taps are {megabytes(size.full_bytes)}, "
        f"{size.full_bytes / each:.1f} times that"
    )


def megabytes(count: int | float) -> str:
    """A number of bytes in MB, 1 MB = 10^6 bytes."""
    return f"{count / 1e6:,.2f} MB"
