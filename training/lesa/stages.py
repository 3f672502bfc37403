"""Windows of features before a step, and the noise stages that one filter each explains best.

v weighs the K features before a step, oldest first, and is added to reuse of the newest:
||F_t - F_{t-1} - sum_j v_j F_{t-K+j}||^2 = constant_t - 2 v . right_t + v^T normal_t v.
LESA (arXiv 2602.20497) forecasts with such a filter, v = alpha(t) w. Where fewer than K features
exist the oldest stands in for those before it.
Shapes: n trajectories, S sampling steps, K taps, B batch.

The published boundaries (0.9 and 0.5 in flow time) are set by hand; these are exact minimisers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.solve import ridge


@dataclass(frozen=True)
class Quadratic:
    """The quadratics of all steps, summed over trajectories; zero at steps that do not count.

    Args:
        normal: second-order terms.
        right: first-order terms.
        constant: summed squared error of reuse.
    """

    normal: Float[Tensor, "branches S K K"]
    right: Float[Tensor, "branches S K"]
    constant: Float[Tensor, "branches S"]

    @property
    def window(self) -> int:
        """K."""
        return self.right.shape[-1]

    def error(self, filters: Float[Tensor, "branches S K"]) -> Float[Tensor, "branches S"]:
        """Summed squared error of every step when it is forecast with its own filter."""
        bent = torch.einsum("bsk,bskl,bsl->bs", filters, self.normal, filters)
        return self.constant - 2 * (filters * self.right).sum(-1) + bent

    def relative(self) -> "Quadratic":
        """The same with every step divided by its error of reuse, so that all steps count alike."""
        some = self.constant > 0
        scale = torch.where(some, self.constant.where(some, 1.0).reciprocal(), 0.0)
        return Quadratic(
            self.normal * scale[..., None, None],
            self.right * scale[..., None],
            self.constant * scale,
        )

    def damped(self, ridge: float) -> "Quadratic":
        """The same plus ridge * sum_j diag(normal_t)_j v_j^2, which draws the filters to reuse."""
        diagonal = torch.diag_embed(self.normal.diagonal(dim1=-2, dim2=-1))
        return Quadratic(self.normal + ridge * diagonal, self.right, self.constant)

    def __add__(self, other: "Quadratic") -> "Quadratic":
        return Quadratic(
            self.normal + other.normal, self.right + other.right, self.constant + other.constant
        )


def window_steps(step: int, window: int) -> list[int]:
    """The steps a window looks at, oldest first: `step - window` to `step - 1`, padded with 0."""
    return [max(0, step - window + place) for place in range(window)]


def from_grams(
    grams: Float[Tensor, "n branches S S"], window: int, anchors: Sequence[int] = (0,)
) -> Quadratic:
    """The quadratics of recorded trajectories, whose windows hold true features.

    Args:
        grams: one Gram per trajectory and branch.
        window: K, >= 1.
        anchors: steps at which the network runs: nothing is forecast there.

    Raises:
        ValueError: the window is empty, or step 0 is not an anchor.
    """
    if window < 1 or 0 not in anchors:
        raise ValueError(
            f"window is {window} and the anchors {list(anchors)}, expected a window >= 1 and an "
            "anchor at step 0."
        )
    total = grams.double().sum(0)
    branches, num_steps = total.shape[:2]
    normal = torch.zeros(branches, num_steps, window, window, dtype=torch.float64)
    right = torch.zeros(branches, num_steps, window, dtype=torch.float64)
    constant = torch.zeros(branches, num_steps, dtype=torch.float64)
    for t in range(num_steps):
        if t in anchors:
            continue
        seen = window_steps(t, window)
        normal[:, t] = total[:, seen][:, :, seen]
        right[:, t] = total[:, seen, t] - total[:, seen, t - 1]
        newest = total[:, t - 1, t - 1]
        constant[:, t] = total[:, t, t] - 2 * total[:, t, t - 1] + newest
    return Quadratic(normal, right, constant)


def add_sample(
    quadratic: Quadratic,
    branch: int,
    step: int,
    features: Sequence[Float[Tensor, " B *shape"]],
    target: Float[Tensor, " B *shape"],
) -> None:
    """Add one step as a run saw it, in place.

    Args:
        quadratic: what to add to.
        branch: guidance branch.
        step: step that was forecast.
        features: the K features before it, forecast ones among them, oldest first.
        target: the feature of the full run.

    Raises:
        ValueError: another number of features than K.
    """
    if len(features) != quadratic.window:
        raise ValueError(f"found {len(features)} features, expected {quadratic.window}.")
    seen = torch.stack([feature.double().flatten() for feature in features])
    change = target.double().flatten() - seen[-1]
    quadratic.normal[branch, step] += seen @ seen.T
    quadratic.right[branch, step] += seen @ change
    quadratic.constant[branch, step] += change @ change


def solve(
    normal: Float[Tensor, "*lead K K"], right: Float[Tensor, "*lead K"]
) -> Float[Tensor, "*lead K"]:
    """A minimiser of each quadratic, zero along directions that hold nothing (padded windows)."""
    return ridge(normal, right[..., None], 0.0)[..., 0]


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
