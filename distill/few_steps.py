"""Draw with a student in few equal steps, and compare with where the teacher's runs end.

Shapes: B batch.
"""

import torch
from jaxtyping import Float
from torch import Tensor

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
