"""`foreseer record`: which items this process records, and whether they fit on the disk."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..integration.host import transformer_of
from ..integration.pipeline_call import call_settings, samples, takes_labels
from ..integration.pipelines import load_pipeline
from .estimate import Estimate, estimate
from .header import HEADER_FILE
from .partitions import asked_partitions
from .prompts import Item, class_items
from .recorder import record
from .recording import Recording

LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""Environment variables that tell a process its rank and the number of processes."""


def record_command(
    pipeline: str,
    out: str,
    guidance_scale: float | None,
    num_inference_steps: int,
    num_trajectories: int,
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
    prompts: str | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    device: str | None = None,
) -> Path:
    """Record this process's share of the items; see `foreseer.commands.record` for the arguments.

    Returns:
        The folder.

    Raises:
        ValueError: the pipeline draws from something else, or an argument is out of range.
        OSError: the disk has less room than the recording needs.
    """
    rank, world = place(rank, world, os.environ)
    pipe = load_pipeline(pipeline, getattr(torch, dtype), device)
    items = asked_items(pipe, prompts, num_trajectories, first_item)
    given = call_settings(pipe, num_inference_steps, guidance_scale, settings)
    partitions = asked_partitions(pipe, items[0], taps, bands, groups, **given)
    size = estimate(pipe, items[0], taps, features, num_tokens, states, partitions, **given)
    check_room(out, items[rank::world], size)
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
    print(summary(Recording(out), size))
    return Path(out)


def place(rank: int | None, world: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's rank and the number of processes: as given, as launched, or alone.

    Args:
        rank: as given; None reads the environment.
        world: as given; None reads the environment.
        environment: `RANK` and `WORLD_SIZE` (torchrun, accelerate) or `SLURM_PROCID` and
            `SLURM_NTASKS`.

    Raises:
        ValueError: only one of the two is known, or the rank is not in `[0, world)`.
    """
    if (rank is None) != (world is None):
        raise ValueError(f"rank is {rank} and world is {world}; give both or neither.")
    if rank is None or world is None:
        found = [names for names in LAUNCHERS if all(name in environment for name in names)]
        rank, world = (int(environment[name]) for name in found[0]) if found else (0, 1)
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank} and world {world}, expected 0 <= rank < world.")
    return rank, world


def asked_items(
    pipe: Any, prompts: str | None, num_trajectories: int, first_item: int
) -> list[Item]:
    """The items to record over all writers; item i has seed i.

    Args:
        pipe: the pipeline.
        prompts: see `foreseer.commands.record`; None goes round the pipeline's classes.
        num_trajectories: how many.
        first_item: index of the first.

    Raises:
        ValueError: none are asked for, or the pipeline draws from something else.
    """
    if num_trajectories < 1:
        raise ValueError(f"num_trajectories is {num_trajectories}, expected at least 1.")
    if prompts is None:
        return class_items(num_trajectories, number_of_classes(pipe), first_item)
    entries = samples(pipe, prompts)
    numbers = range(first_item, first_item + num_trajectories)
    return [Item(i, i, entries[i % len(entries)]) for i in numbers]


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


def check_room(out: str | Path, mine: Sequence[Item], size: Estimate) -> None:
    """Say how much will be written, and refuse to start what cannot end.

    Args:
        out: folder of the recording.
        mine: this process's items, finished ones included.
        size: bytes per trajectory.

    Raises:
        OSError: the disk has less room than the missing items need.
    """
    done = set(Recording(out).items) if (Path(out) / HEADER_FILE).exists() else set()
    missing = sum(item.index not in done for item in mine)
    needed = missing * size.trajectory_bytes
    folder = Path(out).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    print(
        f"{len(mine) - missing} of {len(mine)} trajectories are there; the other {missing} need "
        f"about {megabytes(needed)} of {megabytes(free)} free"
    )
    if needed > free:
        raise OSError(
            f"the disk of {folder} has {megabytes(free)} free, the recording needs about "
            f"{megabytes(needed)}; record fewer trajectories or taps, features: none, or elsewhere."
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
