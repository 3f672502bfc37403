"""Which weights a pipeline runs on.

A LoRA counts: its layers by their parameters, its strength by the scale of every adapter.
"""

import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any

import safetensors
import torch
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


CONDITIONER = "_foreseer_conditioner"
"""Attribute, outside of a transformer's own state, under which its conditioner is found."""

PART = 2**22  # values summed at once: 2**22 squares of 16 bits are exact in float64, in any order
_KEPT: "weakref.WeakKeyDictionary[nn.Module, tuple[str, str]]" = weakref.WeakKeyDictionary()
SAMPLED = 64  # values of each parameter that enter the digest


def host_fingerprint(*transformers: nn.Module) -> dict[str, Any]:
    """What a predictor was fitted on: class, sizes that matter, and digests of config and weights.

    The weight digest is taken over each parameter's shape and a sample of up to 64 of its values,
    so it is quick on any size of model and changes with a LoRA, fused in or not. A student's
    conditioner counts as part of its transformer.

    Args:
        transformers: the host, or its experts in the order in which they run.
    """
    texts = []
    digest = hashlib.sha256()
    for transformer in transformers:
        config = {k: v for k, v in config_of(transformer).items() if not k.startswith("_")}
        texts.append(json.dumps(config, sort_keys=True, default=str))
        _add_weights(digest, transformer)
    return {
        "class": type(transformers[0]).__name__,
        "parameters": sum(p.numel() for t in transformers for p in t.parameters()),
        "config_sha256": hashlib.sha256("".join(texts).encode()).hexdigest(),
        "weights_sha256": digest.hexdigest(),
    }


def config_of(module: nn.Module) -> dict[str, Any]:
    """The configuration of a module; empty where it has none, as modules of one's own."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return dict(config) if isinstance(config, Mapping) else {}


def kept_values_digest(module: nn.Module) -> str:
    """`values_digest` of a network that is asked for it often: read anew once its weights change.

    A change is told by the quick digest of `host_fingerprint`, of a sample of every weight.

    Args:
        module: the network.
    """
    sampled = hashlib.sha256()
    _add_weights(sampled, module)
    sample, digest = _KEPT.get(module, ("", ""))
    if sample != sampled.hexdigest():
        digest = values_digest(module)
        _KEPT[module] = (sampled.hexdigest(), digest)
    return digest


def values_digest(*modules: nn.Module) -> str:
    """Digest of the values of all weights, alike in every layout of the same weights.

    Taken over the sums of all values' bits and of their squares, rounded to bfloat16: names, order,
    and what is fused, split, renamed or transposed make no difference, any other value does.

    Args:
        modules: the networks; every value of their weights is read once.
    """
    count = total = squares = 0
    for module in modules:
        for _, value in held_weights(module):
            for part in value.detach().reshape(-1).split(PART):
                bits = part.to(torch.bfloat16).view(torch.int16).double()
                count += bits.numel()
                total += int(bits.sum())
                squares += int(bits.dot(bits))
    return hashlib.sha256(f"{count} {total} {squares}".encode()).hexdigest()


def _add_weights(digest: Any, transformer: nn.Module) -> None:
    parameters = held_weights(transformer)
    conditioner = getattr(transformer, CONDITIONER, None)
    if conditioner is not None:
        parameters += [(f"conditioner.{name}", p) for name, p in held_weights(conditioner)]
    for name, parameter in parameters:
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.bfloat16().float().numpy().tobytes())
    adapters = adapter_state(transformer)
    if adapters:
        digest.update(json.dumps(adapters).encode())


def adapter_state(transformer: nn.Module) -> list[list[Any]]:
    """Name, strengths and state of every adapter layer (PEFT), empty without any."""
    return [
        [
            name,
            sorted((adapter, float(scale)) for adapter, scale in layer.scaling.items()),
            sorted(layer.active_adapters),
            bool(layer.disable_adapters),
            sorted(layer.merged_adapters),
        ]
        for name, layer in adapter_layers(transformer)
    ]


def adapter_layers(transformer: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapter layers (PEFT) of a transformer with their names."""
    for name, module in transformer.named_modules():
        if hasattr(module, "scaling") and hasattr(module, "merged_adapters"):
            yield name, module
