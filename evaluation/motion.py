"""What a recording holds and how its features move from step to step.

Shapes: S sampling steps, L layers.
"""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.integration.memory import readable
from foreseer.trajectories.gram import cosine_to_previous, projection_fidelity, relative_change
from foreseer.trajectories.recording import Recording

EXPLAINED = 0.95  # the fidelity above which L2P (arXiv 2604.26365) calls a step explained


@dataclass(frozen=True)
class Motion:
    """How the features of one tap move, averaged over trajectories and branches.

    Args:
        change: ||F_t - F_(t-1)|| / ||F_(t-1)||; NaN at step 0, here and below.
        cosine: cosine between F_t and F_(t-1).
        fidelity: 1 - ||F_t - P F_t|| / ||F_t||, with P the projection on all earlier steps.
    """

    change: Float[Tensor, " S"]
    cosine: Float[Tensor, " S"]
    fidelity: Float[Tensor, " S"]


def told(recording: Recording) -> dict[str, str]:
    """The header, fact by fact."""
    header = recording.header
    total = sum(entry.bytes for entry in recording.entries.values())
    starts = header.expert_steps
    several = {"transformers": f"{len(starts)}, from the steps {' '.join(map(str, starts))} on"}
    return {
        "trajectories": f"{len(recording)}, {readable(total)}",
        "host": f"{header.host['class']}, {header.host['parameters']:,} parameters, {header.dtype}",
        "scheduler": f"{header.scheduler['class']}, {header.num_steps} steps, sigma "
        f"{header.sigmas[0]:.4g} to {header.sigmas[-1]:.4g}",
        **(several if len(starts) > 1 else {}),
        "guidance": f"scale {header.scheduler['guidance_scale']:g}, "
        f"{header.num_branches} branch(es)",
        "taps": " ".join(sorted(header.taps, key=tap_order)),
        "features": f"{header.features}; states {'kept' if header.states else 'not kept'}, latents "
        f"{'x'.join(map(str, header.latent_shape))}",
        "recipe": header.recipe_hash,
    }


def facts(recording: Recording) -> str:
    """The header, a line per fact."""
    return "\n".join(f"{name:<13}{line}" for name, line in told(recording).items())


def motion(grams: Float[Tensor, "n branches S S"]) -> Motion:
    """The motion of one tap from the Grams of its trajectories."""
    num_steps = grams.shape[-1]
    nothing = torch.full((1,), torch.nan, dtype=torch.float64)
    change, cosine = (
        torch.cat([nothing, measure(grams).flatten(0, 1).mean(0)])
        for measure in (relative_change, cosine_to_previous)
    )
    fidelity = projection_fidelity(grams).view(-1, num_steps).mean(0)
    fidelity[0] = torch.nan
    return Motion(change, cosine, fidelity)


def table(motions: dict[str, Motion]) -> str:
    """One line per tap: how far it moves per step and how much of it earlier steps explain."""
    lines = [f"{'tap':<13}{'change':>9}{'cosine':>9}{'fidelity':>10}{'lowest':>9}  steps over 0.95"]
    for tap, found in motions.items():
        fidelity = found.fidelity[1:]
        explained = int((fidelity > EXPLAINED).sum())
        lines.append(
            f"{tap:<13}{found.change[1:].median():>9.4f}{found.cosine[1:].median():>9.4f}"
            f"{fidelity.median():>10.4f}{fidelity.min():>9.4f}  {explained} of {len(fidelity)}"
        )
    return "\n".join([*lines, "(medians over steps of means over trajectories and branches)"])


def tap_order(tap: str) -> tuple[int, str]:
    """Sorts `blocks.2` before `blocks.10`, and both before the other taps."""
    number = re.fullmatch(r"blocks\.(\d+)", tap)
    return (int(number[1]), "") if number else (10**6, tap)
