"""Where a stage of a distillation begins, and what its student draws in few steps.

Shapes: B batch.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.distill.meanflow import AverageVelocity


@torch.no_grad()
def few_steps(
    u: AverageVelocity, eps: Float[Tensor, " B *shape"], num_steps: int
) -> Float[Tensor, " B *shape"]:
    """x_r = x_t - (t - r) u(x_t, r, t) over equal intervals from t = 1 to 0."""
    times = torch.linspace(1, 0, num_steps + 1, device=eps.device).to(eps.dtype)
    x = eps
    for t, r in zip(times[:-1], times[1:], strict=True):
        x = x - (t - r) * u(x, r.expand(len(x)), t.expand(len(x)))
    return x


def psnr_db(
    sample: Float[Tensor, " B *shape"], reference: Float[Tensor, " B *shape"]
) -> Float[Tensor, " B"]:
    """10 log10(4 / mean squared difference) of latents in [-1, 1]."""
    return -10 * (sample - reference).double().square().flatten(1).mean(1).div(4).log10()


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
