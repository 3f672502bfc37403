"""Noise stages from a recording: the contiguous stages that one filter each explains best.

The published boundaries (0.9 and 0.5 in flow time) are set by hand; these are exact minimisers.
Shapes: n trajectories, S sampling steps, K taps.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.training.lesa.windows import Quadratic, from_grams, solve


def stage_costs(quadratic: Quadratic) -> Float[Tensor, "ends starts"]:
    """Least squared error of one filter per branch over steps `start .. end - 1`, for all pairs.

    cost[end, start] = sum_b min_v sum_t error_t(v); infinite where no step counts.
    """
    num_steps = quadratic.constant.shape[1]
    counted = quadratic.constant.sum(0) != 0
    costs = torch.full((num_steps + 1, num_steps), torch.inf, dtype=torch.float64)
    for start in range(num_steps):
        parts = (quadratic.normal, quadratic.right, quadratic.constant)
        normal, right, constant = (part[:, start:].cumsum(1) for part in parts)
        explained = (solve(normal, right) * right).sum(-1)
        error = (constant - explained).clamp_min(0).sum(0)
        some = counted[start:].cumsum(0) > 0
        costs[start + 1 :, start] = error.where(some, torch.inf)
    return costs


def best_stages(costs: Sequence[Float[Tensor, "ends starts"]]) -> list[int]:
    """First steps of the contiguous stages with the least summed cost, by dynamic programming.

    least[k][end] = min_start least[k - 1][start] + cost_k[end, start]: exact over all partitions.

    Args:
        costs: `stage_costs` of each stage, in sampling order; stages may differ in window.

    Returns:
        One first step per stage; the first is 0.

    Raises:
        ValueError: there are fewer steps to forecast than stages.
    """
    num_steps = costs[0].shape[1]
    least = torch.full((num_steps + 1,), torch.inf, dtype=torch.float64)
    least[0] = 0.0
    chosen = []
    for cost in costs:
        least, start = (least[:num_steps] + cost).min(dim=1)
        chosen.append(start)
    if not torch.isfinite(least[num_steps]):
        raise ValueError(
            f"{len(costs)} stages with a forecast step in each do not fit these steps and anchors; "
            "ask for fewer stages."
        )
    starts, end = [], num_steps
    for start in reversed(chosen):
        end = int(start[end])
        starts.append(end)
    return starts[::-1]


def find_stages(
    grams: Float[Tensor, "n branches S S"],
    sigmas: Sequence[float],
    windows: Sequence[int],
    anchors: Sequence[int] = (0,),
) -> list[float]:
    """Boundaries of the best stages in flow time, falling; one fewer than stages.

    The error of a step is taken relative to that of reuse: else the last steps, where features move
    most, would be the only ones to matter.

    Args:
        grams: one Gram per trajectory and branch.
        sigmas: flow time of every step.
        windows: taps of each stage, in sampling order.
        anchors: steps at which the network runs, which do not count.

    Returns:
        Boundaries halfway between the steps they divide: a stage holds the sigmas above its own.
    """
    tables = {
        window: stage_costs(from_grams(grams, window, anchors).relative())
        for window in set(windows)
    }
    starts = best_stages([tables[window] for window in windows])
    return [(sigmas[start - 1] + sigmas[start]) / 2 for start in starts[1:]]


def stage_starts(sigmas: Sequence[float], boundaries: Sequence[float]) -> list[int]:
    """First step of every stage, where stage k holds boundary_{k-1} >= sigma > boundary_k.

    Raises:
        ValueError: a stage is empty.
    """
    stages = [sum(sigma <= boundary for boundary in boundaries) for sigma in sigmas]
    if set(stages) != set(range(len(boundaries) + 1)):
        raise ValueError(
            f"the boundaries {list(boundaries)} leave a stage of this grid without steps; expected "
            f"falling numbers between {sigmas[-1]:.4g} and {sigmas[0]:.4g}."
        )
    return [stages.index(stage) for stage in range(len(boundaries) + 1)]
