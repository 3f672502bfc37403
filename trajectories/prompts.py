"""What is generated: numbered items with a seed and pipeline inputs, and how a batch is called.

With them a run can be repeated though nobody has the file of embeddings any more.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foreseer.integration.host.hosts import transformer_of
from foreseer.integration.host.module_host import has_loop
from foreseer.integration.pipelines.load import device_of
from foreseer.integration.pipelines.pipeline_call import (
    embeddings_on,
    generators,
    joined,
    samples,
    takes_labels,
)
from foreseer.trajectories.recording import Recording

CLASS_ITEMS = 64  # trajectories of a pipeline that draws classes, unless told otherwise
CONTENT = "inputs_sha256"
"""Key of a manifest's line that tells the pictures and tensors of an item from others."""


@dataclass(frozen=True)
class Item:
    """One trajectory to be: its number, its seed and the pipeline's per-sample inputs.

    Args:
        index: number of the item in its list; ranks and splits go by it.
        seed: seed of the item's own generator.
        inputs: per-sample keyword arguments of the pipeline: a label, a prompt, a picture, tensors
            with a leading axis of one, or lists of one entry where the pipeline takes a list of
            tensors. A call of one item is given them as they are.
    """

    index: int
    seed: int
    inputs: dict[str, Any] = field(default_factory=dict)


def class_items(
    num_items: int, num_classes: int, first_item: int = 0, seed_offset: int = 0
) -> list[Item]:
    """Items that go round the classes; item i has seed `seed_offset + i`, whoever records it."""
    return [
        Item(i, seed_offset + i, {"class_labels": i % num_classes})
        for i in range(first_item, first_item + num_items)
    ]


def asked_items(
    pipe: Any,
    prompts: str | Sequence[str] | Sequence[Item] | Sequence[Mapping[str, Any]] | None,
    num_trajectories: int | None,
    first_item: int,
) -> list[Item]:
    """The items to record over all writers; item i has seed i.

    Args:
        pipe: the pipeline.
        prompts: as `foreseer.record` takes them; None goes round the pipeline's classes. Items are
            taken as they are; mappings are the inputs of a sample each.
        num_trajectories: how many; None takes one per prompt, 64 of classes.
        first_item: index of the first.

    Raises:
        ValueError: none are asked for, or the pipeline draws from something else.
    """
    if num_trajectories is not None and num_trajectories < 1:
        raise ValueError(f"num_trajectories is {num_trajectories}, expected at least 1.")
    if prompts is None and not has_loop(pipe):
        count = CLASS_ITEMS if num_trajectories is None else num_trajectories
        return class_items(count, number_of_classes(pipe), first_item)
    given = [] if prompts is None or isinstance(prompts, str) else list(prompts)
    items = [each for each in given if isinstance(each, Item)]
    if items and len(items) == len(given):
        return items[:num_trajectories]
    named = [dict(each) for each in given if isinstance(each, Mapping)]
    if len(named) < len(given) or not given:
        if has_loop(pipe):
            raise ValueError(
                f"{pipe.name} is run on inputs of its own; give a list with a mapping per sample, "
                "as in [{'observation': tensor of one row}, ...], or of Items."
            )
        named = samples(pipe, cast(Any, prompts))
    entries = named
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
    own = getattr(pipe, "num_classes", None)  # of ours; diffusers' DiTPipeline has none
    classes = (own or config.get("num_embeds_ada_norm")) if takes_labels(pipe) else None
    if not classes:
        raise ValueError(
            f"{type(pipe).__name__} takes no class labels; give --prompts, a .txt file with a "
            "prompt per line or a .safetensors file of prompt embeddings."
        )
    return int(classes)


def generate_batch(pipe: Any, items: Sequence[Item], **settings: Any) -> Any:
    """Call a pipeline on a batch of items, each with its own generator.

    Args:
        pipe: a diffusers pipeline.
        items: items with the same input names.
        settings: keyword arguments common to all, such as `guidance_scale`.

    Returns:
        The pipeline's output.
    """
    return pipe(**_arguments(pipe, items), **settings)


def generate_with_gradients(pipe: Any, items: Sequence[Item], **settings: Any) -> Any:
    """The same without the `torch.no_grad` around a diffusers pipeline's call.

    A class whose call is its parent's with other arguments has it there, so for as long as this
    takes it is off the calls of all classes that the pipeline's inherits from.
    """
    kinds: list[Any] = [kind for kind in type(pipe).__mro__ if "__call__" in vars(kind)]
    calls = [(kind, vars(kind)["__call__"]) for kind in kinds]
    wrapped = [(kind, call) for kind, call in calls if hasattr(call, "__wrapped__")]
    for kind, call in wrapped:
        kind.__call__ = inspect.unwrap(call)
    try:
        return generate_batch(pipe, items, **settings)
    finally:
        for kind, call in wrapped:
            kind.__call__ = call


def _arguments(pipe: Any, items: Sequence[Item]) -> dict[str, Any]:
    """The items' inputs, joined and where the pipeline runs, and a generator for each."""
    generator = generators([item.seed for item in items])
    given = joined([item.inputs for item in items])
    return embeddings_on(device_of(pipe), given) | {"generator": generator}


def digest(items: Sequence[Item], settings: dict[str, Any]) -> str:
    """SHA-256 of what is asked for: items and settings, tensors and pictures by their content.

    Raises:
        ValueError: a value is of a kind whose content is not known, such as a function.
    """
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.index, item.seed]).encode())
        for name in sorted(item.inputs):
            digest.update(name.encode() + content(name, item.inputs[name]))
    for name in sorted(settings):
        digest.update(name.encode() + content(name, settings[name]))
    return digest.hexdigest()


def content(name: str, value: Any) -> bytes:
    """What tells one value of an argument from another, whatever it is called or wherever it lies.

    Args:
        name: the argument.
        value: plain, a tensor, an array, a picture, or lists and mappings of those.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    if isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value):
        return b"".join(content(name, each) for each in value)  # a list of embeddings
    if isinstance(value, Image.Image):
        palette = value.getpalette("RGBA") if value.mode == "P" else None
        return json.dumps([value.mode, value.size, palette]).encode() + value.tobytes()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return json.dumps([str(value.dtype), value.shape]).encode() + value.tobytes()
    try:
        return json.dumps(value, sort_keys=True).encode()
    except TypeError as error:
        if isinstance(value, Mapping):
            value = [each for key in sorted(value) for each in (key, value[key])]
        if isinstance(value, list | tuple):
            parts = [content(name, each) for each in value]
            return b"".join(b"%d:" % len(part) + part for part in parts)
        raise ValueError(
            f"the argument {name} is or holds a {type(value).__name__}, whose content is not "
            "known, so a later run could not tell whether it is the same; expected numbers, "
            "words, tensors, arrays, PIL pictures, or lists and mappings of those."
        ) from error


PREFIX = "input/"  # of their names in a shard: `input/<argument>`, in lists `input/<argument>/0`
NAME = re.compile(r"\w+")
MAX_BYTES = 2**26  # of one item; FLUX takes 4 MB a prompt


def kept_inputs(item: Item) -> dict[str, Tensor]:
    """What is stored of an item's inputs: all its tensors, or none of them.

    None where they cannot stand for the inputs: there is a picture too, a value that is not
    finite, or more than `MAX_BYTES`. Words and numbers are in the manifest.
    """
    found: dict[str, Tensor] = {}
    for name, value in item.inputs.items():
        if isinstance(value, str | int | float):
            continue
        if isinstance(value, Tensor):
            found[PREFIX + name] = value
        elif isinstance(value, list) and value and all(isinstance(v, Tensor) for v in value):
            found |= {f"{PREFIX}{name}/{place}": v for place, v in enumerate(value)}
        else:
            return {}
    size = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
    finite = all(bool(tensor.isfinite().all()) for tensor in found.values())
    return found if finite and size <= MAX_BYTES and all(map(_storable, found)) else {}


def _storable(name: str) -> bool:
    return all(NAME.fullmatch(part) for part in name.split("/"))


def recorded_inputs(recording: Recording, item: int) -> dict[str, Any] | None:
    """The inputs an item was recorded from, or None where the recording has but their digest.

    Args:
        recording: the recording.
        item: number of the item.
    """
    meta = dict(recording.meta(item))
    meta.pop("seed")
    told = meta.pop(CONTENT, None)
    if told is None:
        return meta
    names = [name for name in recording.names(item) if name.startswith(PREFIX)]
    found: dict[str, Any] = {}
    for name, tensor in recording.load(item, names).items() if names else ():
        argument, listed, place = name.removeprefix(PREFIX).partition("/")
        if listed:
            found.setdefault(argument, {})[int(place)] = tensor
        else:
            found[argument] = tensor
    for argument, value in found.items():
        if isinstance(value, dict):
            found[argument] = [value[place] for place in sorted(value)]
    return meta | found if found and digest([], found) == told else None


def can_repeat(recording: Recording) -> bool:
    """Whether every recorded run can be repeated from what the recording holds."""
    return all(
        CONTENT not in recording.meta(item)
        or any(name.startswith(PREFIX) for name in recording.names(item))
        for item in recording.items
    )
