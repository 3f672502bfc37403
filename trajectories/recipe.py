"""What a recording says of itself: what was asked for, of which host, under which guidance."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from foreseer.checkpoints.call_settings import as_settings, first_difference
from foreseer.integration.host.denoisers import transformers_of
from foreseer.integration.host.fingerprint import host_fingerprint, values_digest
from foreseer.trajectories.collector import Recorder
from foreseer.trajectories.files.header import Header, RecordingError
from foreseer.trajectories.files.storage import exists
from foreseer.trajectories.prompts import CONTENT, Item, digest
from foreseer.trajectories.recording import Recording


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
    first = next(iter(transformers_of(pipe).values()))
    lists = [m for _, m in first.named_children() if isinstance(m, nn.ModuleList)]
    blocks = [f"blocks.{i}" for i in range(sum(len(blocks) for blocks in lists))]
    known = ["output", "hidden", "residual", *blocks]
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


def describe(
    pipe: Any, recorder: Recorder, recipe: dict[str, Any], settings: dict[str, Any]
) -> Header:
    """The header of a recording, read off the pipeline and the batch just run."""
    if recorder.final is None:
        raise ValueError("no step was recorded: the pipeline never called scheduler.step.")
    own = getattr(pipe, "guidance_scale", None)
    given = own if recorder.guidance_scale is None else recorder.guidance_scale
    guidance_scale = settings.get("guidance_scale", 1.0) if given is None else given
    config = {k: v for k, v in dict(pipe.scheduler.config).items() if not k.startswith("_")}
    return Header(
        recipe=recipe,
        host=host_fingerprint(*transformers_of(pipe).values()),
        scheduler={
            "class": type(pipe.scheduler).__name__,
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
        values_digest=values_digest(*transformers_of(pipe).values()),
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
