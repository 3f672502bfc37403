"""The weights of a module, read through whatever holds them: a disk, a shard, a quantised tensor.

Between calls a parameter may be a stand-in: on the meta device, without its storage, or memory that
was never filled. Its values are fetched from where the next call will take them, or it is refused.
"""

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import safetensors
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def held_weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and values of all weights of a module, sorted; parts of one weight share its name.

    Args:
        module: may be offloaded by diffusers or accelerate, quantised, or sharded with DTensor.

    Raises:
        ValueError: the values of a weight are not within reach.
    """
    on_disk = dict(_on_disk(module))
    opened: dict[str, Any] = {}
    found: list[tuple[str, Tensor]] = []
    weights = [*module.named_parameters(), *_quantised(module)]
    for name, weight in sorted(weights, key=itemgetter(0)):
        place = on_disk.get(id(weight))
        values = weight if place is None else _read(name, *place, opened)
        if values.is_meta:
            values = _kept_by_accelerate(module, name)
        found += [(name, part) for part in _parts(name, values)]
    return found


def _quantised(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights kept as buffers of whole numbers, or packed away by torch's own quantisation."""
    saved = module.state_dict(keep_vars=True)
    parameters = {name for name, _ in module.named_parameters()}
    for name, value in saved.items():
        if isinstance(value, tuple):  # the packed weight and bias of a quantised layer
            yield from ((name, part.dequantize()) for part in value if isinstance(part, Tensor))
        elif isinstance(value, Tensor) and name not in parameters:
            if value.ndim > 1 and not (value.is_floating_point() or value.is_complex()):
                yield name, value


def _on_disk(module: nn.Module) -> Iterator[tuple[int, tuple[str, str]]]:
    """File and key of every tensor that diffusers' group offloading has put on a disk."""
    for child in module.modules():
        hooks = getattr(getattr(child, "_diffusers_hook", None), "hooks", {})
        for hook in hooks.values():
            group: Any = getattr(hook, "group", None)
            if getattr(group, "_is_offloaded_to_disk", False):
                for tensor, key in group.tensor_to_key.items():
                    yield id(tensor), (group.safetensors_file_path, key)


def _read(name: str, path: str, key: str, opened: dict[str, Any]) -> Tensor:
    """A tensor of a file, of which only the pages looked at are read."""
    try:
        if path not in opened:
            opened[path] = safetensors.safe_open(path, "pt")
        values: Tensor = opened[path].get_tensor(key)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"parameter {name} is offloaded to {path}, which cannot be read ({error}), so it "
            "cannot be told which weights these are; load the model again."
        ) from error
    return values


def _kept_by_accelerate(module: nn.Module, name: str) -> Tensor:
    """A parameter on the meta device, where accelerate's hooks keep it between calls."""
    owner, _, own = name.rpartition(".")
    hook = getattr(module.get_submodule(owner), "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        kept = getattr(each, "weights_map", None)
        if kept is not None:
            values: Tensor = kept[own]
            return values
    raise ValueError(
        f"parameter {name} has no values (device meta), so it cannot be told which weights these "
        "are; load the model before attaching."
    )


def _parts(name: str, values: Tensor) -> list[Tensor]:
    """The plain tensors that a weight is made of.

    Raises:
        ValueError: it is a stand-in for values that are elsewhere.
    """
    if hasattr(values, "full_tensor"):  # a DTensor
        return _parts(name, values.full_tensor())
    if is_traceable_wrapper_subclass(values):
        inner = [getattr(values, attribute) for attribute in values.__tensor_flatten__()[0]]
        return [part for each in inner for part in _parts(name, each)]
    needed = values.numel() * values.element_size()
    if hasattr(values, "ds_numel") or values.untyped_storage().nbytes() < needed:
        raise ValueError(
            f"parameter {name} is sharded and its values are not here, so it cannot be told which "
            "weights these are; expected a whole model, one offloaded by diffusers or accelerate, "
            "or one sharded with DTensor (fully_shard)."
        )
    return [values]
