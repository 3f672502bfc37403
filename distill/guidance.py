"""The teacher of a distillation, its guided velocity, and the points where a student is trained.

Shapes: B batch, S steps of a recorded run.
Convention: x_t = (1 - t) x_0 + t eps, v = eps - x_0, t runs 1 to 0;
v_g = v_0 + g (v_c - v_0) (Ho & Salimans, arXiv 2207.12598, eq. 6).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.integration.host.call import prediction
from foreseer.integration.host.trunk import time_facts


@dataclass(frozen=True)
class Conditions:
    """What a transformer is asked for besides state and time.

    Args:
        own: keyword arguments with a row per sample.
        null: those of the unconditional branch; empty for a teacher without one.
        shared: keyword arguments without a batch axis, such as token positions.
    """

    own: Mapping[str, Tensor]
    null: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)


def guidance_range(
    min_guidance: float | None, max_guidance: float | None
) -> tuple[float, float] | None:
    """The guidance scales a student is for, None for a teacher without an unconditional branch.

    Raises:
        ValueError: one end is given without the other, or they are the wrong way round.
    """
    if min_guidance is None and max_guidance is None:
        return None
    if min_guidance is None or max_guidance is None or min_guidance > max_guidance:
        raise ValueError(
            f"found min_guidance {min_guidance} and max_guidance {max_guidance}; expected two "
            "numbers, the smaller first, or None for both."
        )
    return float(min_guidance), float(max_guidance)


def velocity(
    transformer: nn.Module,
    x_t: Float[Tensor, " B *shape"],
    t: Float[Tensor, " B"],
    arguments: Mapping[str, Tensor],
) -> Float[Tensor, " B *shape"]:
    """The network's output at flow time t.

    Args:
        transformer: a class with a row in `TIME_FACTS`.
        x_t: states.
        t: flow times, in [0, 1].
        arguments: further keyword arguments.
    """
    timestep = time_facts(transformer).time_scale * t
    output = transformer(hidden_states=x_t, timestep=timestep, return_dict=False, **arguments)
    return prediction(output)


def guided(
    transformer: nn.Module,
    x_t: Float[Tensor, " B *shape"],
    t: Float[Tensor, " B"],
    conditions: Conditions,
    guidance_scale: Float[Tensor, " B"] | None,
) -> Float[Tensor, " B *shape"]:
    """v_0 + g (v_c - v_0), both branches in one call; v_c alone without a null branch.

    Args:
        transformer: a class with a row in `TIME_FACTS`.
        x_t: states.
        t: flow times.
        conditions: both branches'.
        guidance_scale: g of every sample; None where there is no null.

    Raises:
        ValueError: there is a scale without a null branch, or the other way round.
    """
    if bool(conditions.null) != (guidance_scale is not None):
        raise ValueError(
            "found guidance without an unconditional branch or the other way round; give the "
            "conditions of both branches and a scale, or neither."
        )
    if guidance_scale is None:
        return velocity(transformer, x_t, t, {**conditions.own, **conditions.shared})
    both = {name: torch.cat([own, conditions.null[name]]) for name, own in conditions.own.items()}
    arguments = {**both, **conditions.shared}
    v = velocity(transformer, torch.cat([x_t, x_t]), torch.cat([t, t]), arguments)
    v_c, v_0 = v.chunk(2)
    return v_0 + guidance_scale.reshape(-1, *[1] * (v.ndim - 1)).to(v.dtype) * (v_c - v_0)


@torch.no_grad()
def guided_velocity(
    teacher: nn.Module,
    x_t: Float[Tensor, " B *shape"],
    t: Float[Tensor, " B"],
    conditions: Conditions,
    guidance_scale: Float[Tensor, " B"] | None,
) -> Float[Tensor, " B *shape"]:
    """The guided velocity of a frozen teacher in `eval()`, see `guided`."""
    return guided(teacher, x_t, t, conditions, guidance_scale)


def class_conditions(labels: Tensor, num_classes: int) -> Conditions:
    """Labels, and the null class with the number after the last."""
    null = torch.full_like(labels, num_classes)
    return Conditions({"class_labels": labels}, {"class_labels": null})


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
