"""The tensors an item was drawn from, such as prompt embeddings, kept in its shard.

With them a run can be repeated though nobody has the file of embeddings any more.
"""

import re
from typing import Any

from torch import Tensor

from foreseer.trajectories.prompts import CONTENT, Item, digest
from foreseer.trajectories.recording import Recording

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
