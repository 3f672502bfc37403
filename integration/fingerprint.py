"""Which weights a pipeline runs on.

A LoRA counts: its layers by their parameters, its strength by the scale of every adapter.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

CONDITIONER = "_foreseer_conditioner"
"""Attribute, outside of a transformer's own state, under which its conditioner is found."""

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
        host: Any = transformer
        config = {k: v for k, v in dict(host.config).items() if not k.startswith("_")}
        texts.append(json.dumps(config, sort_keys=True, default=str))
        _add_weights(digest, transformer)
    return {
        "class": type(transformers[0]).__name__,
        "parameters": sum(p.numel() for t in transformers for p in t.parameters()),
        "config_sha256": hashlib.sha256("".join(texts).encode()).hexdigest(),
        "weights_sha256": digest.hexdigest(),
    }


def _add_weights(digest: Any, transformer: nn.Module) -> None:
    parameters = sorted(_parameters(transformer))
    conditioner = getattr(transformer, CONDITIONER, None)
    if conditioner is not None:
        parameters += [(f"conditioner.{n}", p) for n, p in sorted(conditioner.named_parameters())]
    for name, parameter in parameters:
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.bfloat16().float().numpy().tobytes())
    adapters = adapter_state(transformer)
    if adapters:
        digest.update(json.dumps(adapters).encode())


def _parameters(transformer: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters; those that accelerate keeps elsewhere between calls are fetched there."""
    found: list[tuple[str, Tensor]] = []
    for name, parameter in transformer.named_parameters():
        if parameter.is_meta:
            owner, _, own = name.rpartition(".")
            kept = next(_weights_maps(transformer.get_submodule(owner)), None)
            if kept is None:
                raise ValueError(
                    f"parameter {name} has no values (device meta), so it cannot be told which "
                    "weights these are; load the model before attaching."
                )
            found.append((name, kept[own]))
        else:
            found.append((name, parameter))
    return found


def _weights_maps(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        kept = getattr(each, "weights_map", None)
        if kept is not None:
            yield kept


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
        for name, layer in _adapter_layers(transformer)
    ]


def _adapter_layers(transformer: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in transformer.named_modules():
        if hasattr(module, "scaling") and hasattr(module, "merged_adapters"):
            yield name, module
