"""Record trajectories: the forecasting hooks with every step an anchor, into a recording.

Shapes: B batch, S sampling steps, N tokens, D channels.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..integration.controller import Controller
from ..integration.fingerprint import host_fingerprint
from ..integration.host import transformers_of
from ..integration.session import Session
from ..predictors.base import Step
from ..predictors.partition import Partition
from .gram import gram, part_grams
from .header import HEADER_FILE, Header, RecordingError
from .prompts import Item, digest, generate_batch
from .recording import Recording
from .writer import RecordingWriter


class Recorder(Controller):
    """Keep the taps and states of the run in progress.

    Args:
        taps: taps to keep; `blocks.*` stands for the residual stream after every block.
        partitions: partitions by `<tap>/<name>`, whose Grams are stored beside the tap's.
    """

    def __init__(
        self, taps: Sequence[str], partitions: Mapping[str, Partition] | None = None
    ) -> None:
        self.taps = frozenset(taps)
        self.partitions = dict(partitions or {})
        self.open([])

    def open(self, sigmas: list[float]) -> None:
        """Forget the last run."""
        self.sigmas = sigmas
        self.features: dict[str, list[dict[int, Tensor]]] = {}
        self.states: list[Tensor] = []
        self.final: Tensor | None = None

    def observe(self, key: str, call: int, step: Step, taps: dict[str, Tensor]) -> None:
        """Keep one call's features, one entry per branch."""
        for tap, feature in taps.items():
            steps = self.features.setdefault(tap, [])
            while len(steps) <= step.index:
                steps.append({})
            parts = feature.chunk(len(step.branches))
            steps[step.index].update(zip(step.branches, parts, strict=True))

    def close(self, step_index: int, v: Tensor, before: Tensor, after: Tensor) -> None:
        """Keep the state a step started from, and the last one it ended at."""
        self.states.append(before.detach().float())
        self.final = after.detach().float()

    def trajectory(self, sample: int, tap: str) -> Tensor:
        """The features of one sample at one tap, `(branches, S, *shape)`.

        Raises:
            ValueError: a branch is missing at some steps, as when guidance stops half-way.
        """
        steps = self.features[tap]
        branches = sorted(steps[0])
        for index, step in enumerate(steps):
            if sorted(step) != branches:
                raise ValueError(
                    f"step {index} has the branches {sorted(step)}, step 0 had {branches}: a "
                    "recording needs the same guidance at every step."
                )
        return torch.stack([torch.stack([step[b][sample] for step in steps]) for b in branches])

    def tensors(
        self, sample: int, features: str, num_tokens: int, states: bool
    ) -> dict[str, Tensor]:
        """What is stored of one sample: Grams, and features and states as asked for."""
        if self.final is None:
            raise ValueError("no step was recorded: the pipeline never called scheduler.step.")
        stored = {"final": self.final[sample]}
        if states:
            stored["states"] = torch.stack([*(s[sample] for s in self.states), self.final[sample]])
        for tap in sorted(self.features):
            trajectory = self.trajectory(sample, tap)
            stored[f"gram/{tap}"] = gram(trajectory.flatten(2))
            for name, partition in self.partitions.items():
                if name.partition("/")[0] == tap:
                    stored[f"gram/{name}"] = part_grams(trajectory, partition)
            if features == "full":
                stored[f"feature/{tap}"] = trajectory
            elif features == "tokens" and trajectory.ndim == 4:  # (branches, S, N, D)
                tokens = (
                    torch.linspace(0, trajectory.shape[2] - 1, num_tokens).round().long().unique()
                )
                stored[f"feature/{tap}"] = trajectory[:, :, tokens]
                stored[f"tokens/{tap}"] = tokens
        return stored


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
) -> Path:
    """Run a pipeline over items and write a recording; run it again to resume after a break.

    The images are bit for bit the pipeline's own. Batches are cut from this rank's items in order
    and always run whole, so a resumed recording equals an uninterrupted one, shard by shard.

    Args:
        pipe: a diffusers pipeline.
        items: what to generate.
        out: folder of the recording, new or begun with the same arguments.
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
        The folder.

    Raises:
        RecordingError: the folder holds another recording.
        ValueError: an argument is wrong, or a feature is not finite.
    """
    mine = list(items)[rank::world]
    if not mine:
        raise ValueError(f"rank {rank} of {world} has nothing to do with {len(items)} items.")
    recipe = {
        "taps": sorted(taps),
        "features": features,
        "num_tokens": num_tokens if features == "tokens" else 0,
        "states": states,
        "batch_size": batch_size,
        "pipeline": type(pipe).__name__,
        "settings": {name: _plain_or_name(value) for name, value in sorted(settings.items())},
        "settings_digest": digest([], settings),
    }
    host = next(iter(transformers_of(pipe).values()))
    recorder = Recorder(expand_taps(host, taps), partitions)
    if recorder.partitions:
        recipe["partitions"] = describe_partitions(recorder)
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    _record_batches(pipe, batches, recorder, Path(out), recipe, rank, settings)
    return Path(out)


def _record_batches(
    pipe: Any,
    batches: list[list[Item]],
    recorder: Recorder,
    out: Path,
    recipe: dict[str, Any],
    rank: int,
    settings: dict[str, Any],
) -> None:
    """Run the batches that are not finished and write what is missing of them."""
    done = finished_items(out, recipe, [item for batch in batches for item in batch])
    pending = [batch for batch in batches if any(item.index not in done for item in batch)]
    stored_as = (recipe["features"], recipe["num_tokens"], recipe["states"])
    with contextlib.ExitStack() as stack:
        stack.callback(Session(pipe, recorder).detach)
        writer: RecordingWriter | None = None
        for batch in tqdm(pending, desc=f"record {out.name}", unit="batch"):
            generate_batch(pipe, batch, output_type="latent", **settings)
            if writer is None:
                header = describe(pipe, recorder, recipe, settings)
                writer = stack.enter_context(RecordingWriter(out, header, rank))
            for sample, item in enumerate(batch):
                if item.index not in done:
                    stored = recorder.tensors(sample, *stored_as)
                    writer.write(item.index, stored, _meta(item))


def finished_items(out: str | Path, recipe: dict[str, Any], items: Sequence[Item] = ()) -> set[int]:
    """Items already in the folder, which must be a recording with this recipe if it is one at all.

    Raises:
        RecordingError: it holds another recording, or one of `items` with another seed or input.
    """
    if not (Path(out) / HEADER_FILE).exists():
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
        meta, asked = found.meta(item.index), _meta(item)
        if meta != asked:
            raise RecordingError(
                f"{out} holds item {item.index} as {meta}, asked for {asked}; give it another "
                "number or record into another folder."
            )
    return set(found.items)


def expand_taps(transformer: nn.Module, taps: Sequence[str]) -> list[str]:
    """The taps with `blocks.*` written out, after checking their names.

    Raises:
        ValueError: a name is unknown.
    """
    lists = [m for _, m in transformer.named_children() if isinstance(m, nn.ModuleList)]
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
    guidance_scale = getattr(pipe, "guidance_scale", settings.get("guidance_scale", 1.0))
    first = next(iter(recorder.features.values()))[0]
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
        num_branches=len(first),
        dtype=str(next(iter(first.values())).dtype).removeprefix("torch."),
        features=recipe["features"],
        states=recipe["states"],
        latent_shape=list(recorder.final.shape[1:]),
    )


def _meta(item: Item) -> dict[str, str | int | float]:
    inputs = {n: value for n, value in item.inputs.items() if isinstance(value, str | int | float)}
    return {"seed": item.seed, **inputs}


def _plain_or_name(value: Any) -> str | int | float | bool | None:
    """A setting as JSON: itself if it is plain, else its type in angle brackets."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return f"<{type(value).__name__}>"
