"""Small recordings that several test files write."""

from pathlib import Path

import torch
from torch import Tensor

from foreseer.trajectories.recording import Header, RecordingWriter

STEPS = 5


def small_header(**changes: object) -> Header:
    """A header with one tap and two branches."""
    values: dict = {
        "recipe": {"guidance_scale": 3.0, "num_inference_steps": STEPS, "conditions": "abc"},
        "host": {"class": "TinyTransformer", "hidden": 4},
        "scheduler": {
            "class": "FlowMatchEulerDiscreteScheduler",
            "shift": 1.0,
            "guidance_scale": 3.0,
        },
        "sigmas": [1.0 - step / STEPS for step in range(STEPS)],
        "taps": ["output", "blocks.1"],
        "num_branches": 2,
        "dtype": "bfloat16",
        "features": "full",
        "states": True,
        "latent_shape": [3, 2, 2],
    }
    return Header(**{**values, **changes})


def trajectory(item: int, tokens: int = 6) -> dict[str, Tensor]:
    """Tensors of every dtype and kind a recorder writes; a function of the item alone."""
    random = torch.Generator().manual_seed(item)
    feature = torch.randn(2, STEPS, tokens, 4, generator=random)
    gram = torch.einsum("bind,bjnd->bij", feature.double(), feature.double())
    return {
        "gram/output": gram,
        "feature/output": feature.bfloat16(),
        "tokens": torch.arange(tokens),
        "states": torch.randn(STEPS + 1, 3, 2, 2, generator=random),
        "final": torch.randn(3, 2, 2, generator=random),
    }


def record(folder: Path, items: range | list[int], rank: int = 0) -> None:
    """Write what is missing of `items`."""
    with RecordingWriter(folder, small_header(), rank=rank) as writer:
        for item in sorted(set(items) - writer.done()):
            writer.write(item, trajectory(item), {"seed": 1000 + item, "prompt": f"cat {item}"})
