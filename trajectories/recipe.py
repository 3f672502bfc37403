"""The recipe of a recording: its taps and parts, what a first step says it will take, its header.

Shapes: S sampling steps, N tokens, H height, W width.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from foreseer.checkpoints.spec import as_settings, first_difference
from foreseer.integration.call_groups import CallGroups, Groups
from foreseer.integration.host.hosts import host_of, transformer_of, transformers_of
from foreseer.integration.host.trunk import block_lists_of
from foreseer.integration.memory import readable
from foreseer.integration.observers import StepRecord
from foreseer.integration.session import Session
from foreseer.predictors.partition import ChannelGroups, Partition
from foreseer.predictors.spectrum import equal_bands
from foreseer.trajectories.collector import Recorder
from foreseer.trajectories.files.header import Header, RecordingError
from foreseer.trajectories.files.storage import cache_folder, exists, is_url
from foreseer.trajectories.prompts import CONTENT, Item, digest, generate_batch, kept_inputs
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


FROM_PYTHON = (
    "record from Python instead: record(..., partitions={'hidden/bands': Bands(edges, grid)})."
)


def asked_partitions(
    pipe: Any,
    item: Item,
    taps: Sequence[str],
    bands: int | None,
    groups: str | None,
    **settings: Any,
) -> dict[str, Partition]:
    """Partitions by `<tap>/<name>`, checked on the first step of one trajectory.

    Args:
        pipe: a diffusers pipeline.
        item: what to generate.
        taps: recorded taps.
        bands: number of equal frequency bands of every tap; None makes none.
        groups: JSON file, tap to the group of every channel; None makes none.
        settings: keyword arguments of the call.

    Raises:
        ValueError: the token grid is not known, or a partition does not suit its tap.
    """
    if bands is None and groups is None:
        return {}
    recorder = first_step(pipe, item, taps, **settings)
    first = {tap: next(iter(steps[0].values())) for tap, steps in recorder.features.items()}
    assert recorder.final is not None  # the first step is over
    found: dict[str, Partition] = {}
    if bands is not None:
        if bands < 2:
            raise ValueError(f"bands is {bands}, expected at least 2; leave it out for none.")
        config: Any = transformer_of(pipe).config
        latent = recorder.final.shape[1:]
        for tap, feature in first.items():
            grid = token_grid(config, latent, feature.shape)
            found[f"{tap}/bands"] = equal_bands(bands, grid)
    if groups is not None:
        for tap, labels in read_groups(Path(groups), sorted(first)).items():
            found[f"{tap}/groups"] = ChannelGroups(labels)
    for name, partition in found.items():
        partition.check(first[name.partition("/")[0]])
    return found


def token_grid(
    config: Mapping[str, Any], latent_shape: Sequence[int], feature_shape: Sequence[int]
) -> tuple[int, ...]:
    """The grid of a tap: the map's own size, or the latent's divided by the patch size.

    Args:
        config: the transformer's configuration, asked for `patch_size` (and `patch_size_t`).
        latent_shape: (C, H, W) or (C, frames, H, W), without the batch axis.
        feature_shape: shape of one feature, with the batch axis: (B, N, D), or (B, C, H, W).

    Returns:
        (height, width) or (frames, height, width).

    Raises:
        ValueError: the tokens are not the patches of the latent, one by one.
    """
    if len(feature_shape) > 3:
        return tuple(feature_shape[2:])
    patch = config.get("patch_size")
    sizes = tuple(latent_shape[1:])
    if isinstance(patch, int):
        patch = (config.get("patch_size_t") or 1, patch, patch)
    if len(sizes) in (2, 3) and isinstance(patch, list | tuple) and len(patch) >= len(sizes):
        grid = tuple(s // p for s, p in zip(sizes, patch[-len(sizes) :], strict=True))
        if math.prod(grid) == feature_shape[1]:
            return grid
    raise ValueError(
        f"the token grid of this host is not known: a tap has {feature_shape[1]} tokens, the "
        f"latent the shape {tuple(latent_shape)} and the patch size is {patch}. With the grid you "
        f"know, {FROM_PYTHON}"
    )


def read_groups(path: Path, taps: Sequence[str]) -> dict[str, list[int]]:
    """The groups in a JSON file.

    Raises:
        ValueError: it is not an object of lists of numbers, or names another tap.
    """
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}).") from error
    labels = values.values() if isinstance(values, dict) else [None]
    whole = all(isinstance(v, list) and all(type(n) is int for n in v) for v in labels)
    if not whole or not values or not set(values) <= set(taps):
        raise ValueError(
            f"{path}: expected an object of one list of group numbers per tap, of the recorded "
            f'taps {list(taps)}, as in {{"hidden": [0, 1, 0]}}.'
        )
    return values


def finished_items(out: str | Path, recipe: dict[str, Any], items: Sequence[Item] = ()) -> set[int]:
    """Items already in the folder, which must be a recording with this recipe if it is one at all.

    Raises:
        RecordingError: it holds another recording, or one of `items` with another seed or input.
    """
    if not exists(out):
        return set()
    found = Recording(out)
    if found.header.recipe != recipe:
        told = found.header.recipe
        names = sorted(n for n in recipe | told if recipe.get(n) != told.get(n))
        raise RecordingError(
            f"{out} holds a recording with another recipe: "
            + ", ".join(f"{n} is {told.get(n)}, asked for {recipe.get(n)}" for n in names)
            + ". Use the same settings to resume it, or another folder."
        )
    for item in items:
        if item.index not in found.entries:
            continue
        meta, asked = found.meta(item.index), item_meta(item)
        if CONTENT not in meta:  # recorded before it was noted
            asked.pop(CONTENT, None)
        if meta != asked:
            raise RecordingError(
                f"{out} holds item {item.index} as {meta}, asked for {asked}; give it another "
                "number or record into another folder."
            )
    return set(found.items)


def expand_taps(pipe: Any, taps: Sequence[str]) -> list[str]:
    """The taps of a pipeline with `blocks.*` written out, after checking their names.

    Raises:
        ValueError: a name is unknown.
    """
    lists = block_lists_of(next(iter(transformers_of(pipe).values()))).values()
    count = sum(len(blocks) for blocks in lists)
    blocks = [f"blocks.{i}" for i in range(count)]
    deep = [f"deep.{i}" for i in range(1, (count + 1) // 2)]
    known = ["output", "hidden", "residual", *blocks, *deep]
    expanded = [name for tap in taps for name in (blocks if tap == "blocks.*" else [tap])]
    unknown = [tap for tap in expanded if tap not in known]
    if unknown or not expanded:
        raise ValueError(f"unknown taps {unknown}; this host has {', '.join(known)} and blocks.*")
    return expanded


def describe_partitions(recorder: Recorder) -> dict[str, Any]:
    """What a recipe tells of the partitions, which must be named after taps that are recorded.

    Raises:
        ValueError: a name is not `<tap>/<name>`.
    """
    for name in recorder.partitions:
        tap, _, own = name.partition("/")
        if tap not in recorder.taps or not own or "/" in own:
            raise ValueError(
                f"found a partition called {name!r}, expected <tap>/<name> with a tap of "
                f"{sorted(recorder.taps)}, as in 'hidden/bands'."
            )
    return {name: partition.describe() for name, partition in sorted(recorder.partitions.items())}


def recorded_groups(
    partitions: Mapping[str, Partition], groups: Groups | None
) -> CallGroups | None:
    """The token groups of recorded runs.

    Args:
        partitions: by `<tap>/<name>`.
        groups: see `recorder.record`.

    Raises:
        ValueError: groups without a partition of token groups or the other way round, or two such
            partitions with other names.
    """
    own = {name: each for name, each in partitions.items() if each.of_calls}
    if bool(own) != (groups is not None):
        raise ValueError(
            f"found the partitions {sorted(partitions)} and groups "
            f"{'not ' if groups is None else ''}given; token groups are recorded with both: "
            "partitions={'output/regions': TokenGroups(names)} and token_groups=, their numbers."
        )
    if groups is None:
        return None
    if len({each.of_calls for each in own.values()}) > 1:
        raise ValueError(f"{sorted(own)} have other names for their token groups; give them one.")
    names = next(iter(own.values())).of_calls
    return CallGroups(groups, names, {name.partition("/")[0] for name in own})


def describe(
    pipe: Any, recorder: Recorder, recipe: dict[str, Any], settings: dict[str, Any]
) -> Header:
    """The header of a recording, read off the pipeline and the batch just run."""
    if recorder.final is None:
        raise ValueError("no step was recorded: the pipeline never called scheduler.step.")
    host, own = host_of(pipe), getattr(pipe, "guidance_scale", None)
    given = own if recorder.guidance_scale is None else recorder.guidance_scale
    guidance_scale = settings.get("guidance_scale", 1.0) if given is None else given
    config = {k: v for k, v in dict(host.scheduler.config).items() if not k.startswith("_")}
    return Header(
        recipe=recipe,
        host=host.fingerprint(),
        scheduler={
            "class": type(host.scheduler).__name__,
            "config": json.dumps(config, sort_keys=True, default=str),
            "guidance_scale": float(guidance_scale),
        },
        sigmas=recorder.sigmas,
        taps=sorted(recorder.features),
        num_branches=recorder.num_branches,
        dtype=recorder.dtype,
        features=recipe["features"],
        states=recipe["states"],
        latent_shape=list(recorder.final.shape[1:]),
        guidance=recorder.guidance,
        branch_steps=recorder.branch_steps,
        expert_steps=recorder.expert_steps,
        first_branch=recorder.first_branch,
        values_digest=host.values_digest(),
        pipeline=str(getattr(pipe, "name_or_path", None) or ""),
    )


def check_alike(recorder: Recorder, header: Header) -> None:
    """Raise unless the run just recorded has the branches and transformers of the recording.

    Raises:
        RecordingError: guidance or a transformer stopped at another step, or a setting changed.
    """
    name = first_difference(as_settings(header.guidance), recorder.guidance)
    if name is not None:
        raise RecordingError(
            f"this run has {name} {recorder.guidance.get(name)}, the recording has "
            f"{header.guidance.get(name)}; record runs of one kind."
        )
    found = (recorder.branch_steps, recorder.expert_steps)
    if found != (header.branch_steps, header.expert_steps):
        raise RecordingError(
            f"this run's branches last {found[0] or 'to the end'} and its transformers start at "
            f"{found[1]}, the recording has {header.branch_steps or 'to the end'} and "
            f"{header.expert_steps}; record runs of one kind."
        )


def item_meta(item: Item) -> dict[str, str | int | float]:
    """What a manifest says of an item: its seed, its plain inputs, and a digest of the others."""
    plain = {n: value for n, value in item.inputs.items() if isinstance(value, str | int | float)}
    others = {name: value for name, value in item.inputs.items() if name not in plain}
    noted = {CONTENT: digest([], others)} if others else {}
    return {"seed": item.seed, **plain, **noted}


def plain_or_name(value: Any) -> str | int | float | bool | None:
    """A setting as JSON: itself if it is plain, else its type in angle brackets."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    kind = Image.Image if isinstance(value, Image.Image) else type(value)  # of any file format
    return f"<{kind.__name__}>"
