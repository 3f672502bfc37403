"""The teacher of a distillation: a frozen transformer and the guided velocity of its two branches.

Shapes: B batch.
Convention: v = eps - x_0; v_g = v_0 + g (v_c - v_0) (Ho & Salimans, arXiv 2207.12598, eq. 6).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.integration.host.call import prediction
from foreseer.integration.host.facts import time_facts


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
