"""Record trajectories: the forecasting hooks with every step an anchor, into a recording."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from foreseer.integration.session import Session
from foreseer.predictors.partition import Partition
from foreseer.trajectories.collector import Recorder
from foreseer.trajectories.files.uploads import open_writer
from foreseer.trajectories.files.writer import RecordingWriter
from foreseer.trajectories.kept_inputs import kept_inputs
from foreseer.trajectories.prompts import Item, digest, generate_batch
from foreseer.trajectories.recipe import (
    check_alike,
    describe,
    describe_partitions,
    expand_taps,
    finished_items,
    item_meta,
    plain_or_name,
)


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
    recipe = {
        "taps": sorted(taps),
        "features": features,
        "num_tokens": num_tokens if features == "tokens" else 0,
        "states": states,
        "batch_size": batch_size,
        "pipeline": type(pipe).__name__,
        "settings": {name: plain_or_name(value) for name, value in sorted(settings.items())},
        "settings_digest": digest([], settings),
    }
    recorder = Recorder(expand_taps(pipe, taps), partitions)
    if recorder.partitions:
        recipe["partitions"] = describe_partitions(recorder)
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    _record_batches(pipe, batches, recorder, out, recipe, rank, settings)
    return out


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
    out: str | Path,
    recipe: dict[str, Any],
    rank: int,
    settings: dict[str, Any],
) -> None:
    """Run the batches that are not finished and write what is missing of them."""
    done = finished_items(out, recipe, [item for batch in batches for item in batch])
    pending = [batch for batch in batches if any(item.index not in done for item in batch)]
    stored_as = (recipe["features"], recipe["num_tokens"], recipe["states"])
    with contextlib.ExitStack() as stack:
        stack.callback(Session(pipe, observers=[recorder]).detach)
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
