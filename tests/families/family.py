"""What a tiny pipeline family is, how to call it, and what its builders share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 8


@dataclass(frozen=True)
class Family:
    host: str
    build: Callable[[], Any]  # a fresh, silent pipeline with random weights
    inputs: Callable[[int], dict[str, Any]]  # what one sample is made from, of a seed
    settings: dict[str, Any]  # what every call is given
    branches: int = 1  # guidance branches per step


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(seed: int, *shape: int) -> Tensor:
    """One sample of normal noise, with a leading axis of one."""
    return torch.randn(1, *shape, generator=seeded(seed))


def awake(module: nn.Module, gain: float = 1.0) -> nn.Module:
    """Fills every parameter that starts as zeros, so that no gate is closed."""
    generator = seeded(1)
    for parameter in module.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.1, generator=generator)
        if parameter.ndim > 1:
            parameter.data.mul_(gain)
    return module


def tiny(cls: type, seed: int = 0, gain: float = 1.0, **config: Any) -> Any:
    """A model with random weights, ready for inference; more gain, more say of its inputs."""
    torch.manual_seed(seed)
    return awake(cls(**config), gain).eval()


def silent(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def size(pixels: int = 32, **more: Any) -> dict[str, Any]:
    """The settings of a square picture."""
    return {"num_inference_steps": STEPS, "height": pixels, "width": pixels, **more}


def prompt(seed: int, length: int, width: int, mask: bool = False, negative: bool = True) -> Any:
    """Prompt embeddings, with their masks and a negative prompt where asked for."""
    found = {"prompt_embeds": noise(seed, length, width)}
    if mask:
        found["prompt_attention_mask"] = torch.ones(1, length, dtype=torch.long)
    if negative:
        other = prompt(1000 + seed, length, width, mask, negative=False)
        found |= {f"negative_{name}": value for name, value in other.items()}
    return found


def joined(values: Sequence[Any]) -> Any:
    """The inputs of several samples as those of one call."""
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    if isinstance(values[0], list):
        return [value for part in values for value in part]
    return list(values)


def final(output: Any) -> Tensor:
    """The latents of a pipeline's output, whatever they are called there."""
    found = output.images if hasattr(output, "images") else output.frames
    if isinstance(found, Tensor):
        return found
    return torch.stack([torch.as_tensor(value) for value in found])


def call(family: Family, pipe: Any, seeds: Sequence[int] = (0, 1), **changes: Any) -> Tensor:
    """The final latents of one sample per seed."""
    samples = [family.inputs(seed) for seed in seeds]
    arguments = {name: joined([sample[name] for sample in samples]) for name in samples[0]}
    arguments |= {"generator": [seeded(seed) for seed in seeds], "output_type": "latent"}
    return final(pipe(**{**arguments, **family.settings, **changes}))
