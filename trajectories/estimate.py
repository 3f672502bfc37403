"""How large a recording will be, found by running the first step of one trajectory, and the disk.

Shapes: S sampling steps.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foreseer.integration.memory import readable
from foreseer.integration.observers import StepRecord
from foreseer.integration.session import Session
from foreseer.predictors.partition import Partition
from foreseer.trajectories.collector import Recorder
from foreseer.trajectories.files.remote import cache_folder
from foreseer.trajectories.files.storage import exists, is_url
from foreseer.trajectories.kept_inputs import kept_inputs
from foreseer.trajectories.prompts import Item, generate_batch
from foreseer.trajectories.recipe import expand_taps
from foreseer.trajectories.recording import Recording

GRAM_BYTES = 8  # float64
STATE_BYTES = 4  # states are kept in float32


@dataclass(frozen=True)
class Estimate:
    """Bytes of one trajectory.

    Args:
        trajectory_bytes: tensors that will be stored, without the few KB of a file's head.
        full_bytes: the features of all taps, branches, steps and tokens, in the model's dtype.
        gram_bytes: the Grams of one tap, or of one part of it.
    """

    trajectory_bytes: int
    full_bytes: int
    gram_bytes: int


class Enough(Exception):
    """Ends a pipeline call after its first step."""


class FirstStep(Recorder):
    """A recorder that has seen enough once the first step is over."""

    def on_step(self, record: StepRecord) -> None:
        """Keep the step, then end the run."""
        super().on_step(record)
        raise Enough


def estimate(
    pipe: Any,
    item: Item,
    taps: Sequence[str],
    features: str,
    num_tokens: int,
    states: bool,
    partitions: Mapping[str, Partition] | None = None,
    **settings: Any,
) -> Estimate:
    """Bytes of one trajectory of a recording; the arguments are those of `recorder.record`.

    Raises:
        ValueError: a tap is unknown, or the pipeline never stepped its scheduler.
    """
    size = count(first_step(pipe, item, taps, **settings), features, num_tokens, states)
    parts = sum(partition.num_parts for partition in (partitions or {}).values())
    kept = sum(each.numel() * each.element_size() for each in kept_inputs(item).values())
    return replace(size, trajectory_bytes=size.trajectory_bytes + parts * size.gram_bytes + kept)


def first_step(pipe: Any, item: Item, taps: Sequence[str], **settings: Any) -> Recorder:
    """What the first step of one trajectory leaves in a recorder.

    Args:
        pipe: a diffusers pipeline.
        item: what to generate.
        taps: see `recorder.record`.
        settings: keyword arguments of the call.

    Raises:
        ValueError: a tap is unknown, or the pipeline never stepped its scheduler.
    """
    recorder = FirstStep(expand_taps(pipe, taps))
    session = Session(pipe, observers=[recorder])
    try:
        generate_batch(pipe, [item], output_type="latent", **settings)
    except Enough:
        return recorder
    finally:
        session.detach()
    raise ValueError("the pipeline never called scheduler.step, so there is nothing to record.")


def count(recorder: Recorder, features: str, num_tokens: int, states: bool) -> Estimate:
    """Bytes of one trajectory, given its first step; arguments as of `estimate`."""
    num_steps = len(recorder.sigmas)
    assert recorder.final is not None  # the first step is over
    total = STATE_BYTES * recorder.final.numel() * (1 + (num_steps + 1) * states)
    full = each = 0
    for steps in recorder.features.values():
        branches = len(steps[0])
        feature = next(iter(steps[0].values()))[0]
        tap = branches * num_steps * feature.numel() * feature.element_size()
        each = GRAM_BYTES * branches * num_steps**2
        total += each
        full += tap
        if features == "full":
            total += tap
        elif features == "tokens" and feature.ndim == 2:  # (N, D)
            total += tap * num_tokens // feature.shape[0] + 8 * num_tokens
    return Estimate(total, full, each)


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
    each, room = size.trajectory_bytes, f"of {readable(free)} free"
    where = f"and are sent to {out} one at a time" if remote else room
    who = f"rank {rank} of {world}: " if world > 1 else ""
    print(
        f"{who}{len(mine) - missing} of {len(mine)} trajectories are there; the other {missing} "
        f"need about {readable(missing * each)} {where}"
    )
    needed = min(missing, 1) * each if remote else missing * each
    if needed > free:
        raise OSError(
            f"the disk of {folder} has {readable(free)} free, the recording needs about "
            f"{readable(needed)}; record fewer trajectories or taps, features: none, or elsewhere."
        )
    if not remote and of_all * each > free:
        print(
            f"all {world} writers together need about {readable(of_all * each)}, more than "
            f"{folder} has: if they share this disk it will fill up, which stops them but loses "
            "nothing; start them again with more room"
        )


def summary(recording: Recording, size: Estimate) -> str:
    """One line: trajectories, bytes per trajectory, ratio to full features."""
    entries = recording.entries.values()
    each = sum(entry.bytes for entry in entries) / len(entries)
    return (
        f"{recording.folder}: {len(entries)} trajectories, {readable(each)} each; the full "
        f"features of these taps are {readable(size.full_bytes)}, "
        f"{size.full_bytes / each:.1f} times that"
    )
