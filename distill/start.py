"""Begin a stage where an earlier one ended."""

from pathlib import Path

import torch
from torch import nn


def load_student_state(module: nn.Module, checkpoint: str | Path) -> None:
    """Load the (averaged) weights of another stage's checkpoint into a module.

    Lightning's `WeightAveraging` keeps the averaged weights under `state_dict`.

    Args:
        module: a `DistillModule`.
        checkpoint: Lightning checkpoint of one.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another module's, or one of another size.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; train the stage before this one first.")
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} is not of this student: {error}") from error
