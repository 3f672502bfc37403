"""What is generated: numbered items with a seed and pipeline inputs, and how a batch is called."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..integration.pipeline_call import joined


@dataclass(frozen=True)
class Item:
    """One trajectory to be: its number, its seed and the pipeline's per-sample inputs.

    Args:
        index: number of the item in its list; ranks and splits go by it.
        seed: seed of the item's own generator.
        inputs: per-sample keyword arguments of the pipeline: a label, a prompt, tensors with a
            leading axis of one, or lists of one entry where the pipeline takes a list of tensors.
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


def generate_batch(pipe: Any, items: Sequence[Item], **settings: Any) -> Any:
    """Call a pipeline on a batch of items, each with its own generator.

    Args:
        pipe: a diffusers pipeline.
        items: items with the same input names.
        settings: keyword arguments common to all, such as `guidance_scale`.

    Returns:
        The pipeline's output.
    """
    return pipe(**_arguments(items), **settings)


def generate_with_gradients(pipe: Any, items: Sequence[Item], **settings: Any) -> Any:
    """The same without the `torch.no_grad` around a diffusers pipeline's call."""
    return inspect.unwrap(type(pipe).__call__)(pipe, **_arguments(items), **settings)


def _arguments(items: Sequence[Item]) -> dict[str, Any]:
    """The items' inputs, joined, and a generator for each."""
    return joined([item.inputs for item in items]) | {
        "generator": [torch.Generator().manual_seed(item.seed) for item in items]
    }


def digest(items: Sequence[Item], settings: dict[str, Any]) -> str:
    """SHA-256 of what is asked for: items and settings, tensors by their bytes."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.index, item.seed]).encode())
        for name in sorted(item.inputs):
            digest.update(name.encode() + _bytes(item.inputs[name]))
    for name in sorted(settings):
        digest.update(name.encode() + _bytes(settings[name]))
    return digest.hexdigest()


def _bytes(value: Any) -> bytes:
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    if isinstance(value, (list, tuple)) and any(isinstance(each, Tensor) for each in value):
        return b"".join(_bytes(each) for each in value)  # a sample of a list of embeddings
    return json.dumps(value, sort_keys=True).encode()
