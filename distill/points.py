"""Where a student is trained: points on the teacher's recorded runs, or on data-noise pairs.

Shapes: B batch, S steps of a recorded run.
Convention: x_t = (1 - t) x_0 + t eps, v = eps - x_0, t runs 1 to 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.distill.guidance import Conditions


@dataclass(frozen=True)
class Points:
    """Points to train at.

    Args:
        x_t: states.
        r: where the step ends, in [0, t].
        t: flow time of the states, in [0, 1].
        v: the teacher's guided velocity there.
        conditions: what the transformer is asked for besides state and time.
        guidance_scale: guidance behind `v`; None for a student without a scale.
        chord: (x_t - x_r) / (t - r) of the run through x_t; None off recorded runs.
        teacher: v(x, t) under the same conditions; None where only runs are at hand.
    """

    x_t: Float[Tensor, " B *shape"]
    r: Float[Tensor, " B"]
    t: Float[Tensor, " B"]
    v: Float[Tensor, " B *shape"]
    conditions: Conditions
    guidance_scale: Float[Tensor, " B"] | None = None
    chord: Float[Tensor, " B *shape"] | None = None
    teacher: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Runs:
    """Recorded runs of an Euler sampler: broken lines that start at `eps` with slopes `v`.

    Args:
        eps: initial noise.
        v: guided velocity of every step.
        sigmas: flow time of every step and the final 0.
    """

    eps: Float[Tensor, " B *shape"]
    v: Float[Tensor, " B S *shape"]
    sigmas: Float[Tensor, " S+1"]

    def at(self, t: Float[Tensor, " B"]) -> Float[Tensor, " B *shape"]:
        """x_t = eps - sum_k |[t, 1] intersected with [sigma_k+1, sigma_k]| v_k."""
        high, low = self.sigmas[:-1], self.sigmas[1:]
        spent = (high - torch.maximum(t[:, None], low)).clamp(min=0)  # (B, S)
        moved = torch.einsum("bs,bsi->bi", spent.to(self.eps.dtype), self._flat())
        return self.eps - moved.reshape(self.eps.shape)

    def velocity(self, t: Float[Tensor, " B"]) -> Float[Tensor, " B *shape"]:
        """The slope at t, that of the step which starts there where t is a step's time."""
        step = (self.sigmas[None, :-1] >= t[:, None] - 1e-7).sum(1).clamp(min=1) - 1
        return self.v[torch.arange(len(t), device=t.device), step].to(self.eps.dtype)

    def chord(self, r: Float[Tensor, " B"], t: Float[Tensor, " B"]) -> Float[Tensor, " B *shape"]:
        """(x_t - x_r) / (t - r), and the slope at t where both are (nearly) the same."""
        axes = [1] * (self.eps.ndim - 1)
        width = (t - r).reshape(-1, *axes)
        chord = (self.at(t) - self.at(r)) / width.clamp(min=1e-4)
        return torch.where(width > 1e-4, chord, self.velocity(t))

    def _flat(self) -> Float[Tensor, "B S size"]:
        return self.v.flatten(2).to(self.eps.dtype)
