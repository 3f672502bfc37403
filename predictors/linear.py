"""L2P: learned rows of weights over earlier features, per guidance branch and part of the feature.

Shapes: S sampling steps, P parts, K history length.
Source: L2P, arXiv 2604.26365: F_hat_t = sum_{j<t} W[t, j] F_j; rows per part are ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Step
from foreseer.predictors.partition import Partition
from foreseer.predictors.solve import expert_start, least_squares_rows
from foreseer.predictors.spectrum import partition_from


class L2P(LinearPredictor):
    """F_hat_t = sum_p P_p sum_a W[branch, p, t, a] F_a over the anchors a < t.

    arXiv 2604.26365, folded onto anchors. Starts as plain reuse of the newest anchor. A branch the
    rows do not have is an error, never a guess. Without a partition there is one row for the whole
    feature, and `weight` has no axis p. Of several transformers (Wan 2.2 runs one at high noise and
    another at low noise, whose features have nothing in common) each has rows over its own anchors.

    A schedule may compute further steps. After such a step b, until the next of the rows' anchors,
    the forecast is moved by what it was wrong at b: F_hat_t + F_b - F_hat_b, exact at b. This is
    ours, a linear rule as well.

    At step 0 the sample is noise whatever the time, so the network may be told a later one: F_0 is
    then its velocity of the steps to come (the decoupled times of LD3, arXiv 2405.15506).

    Args:
        num_steps: sampling steps S.
        anchors: steps at which the network runs, the first of every transformer among them.
        num_branches: guidance branches.
        expert_steps: first step of each transformer, starting with 0.
        partition: parts with rows of their own (`Bands`, `ChannelGroups`), or what `describe` told
            of them; None of the whole feature.
        first_time: flow time that the network is told at step 0; None for the step's own.

    Raises:
        ValueError: the anchors are not a schedule of such a run, the time is not in (0, 1], or see
            `partition_from`.
    """

    learned = True
    from_grams = True

    def __init__(
        self,
        num_steps: int,
        anchors: Sequence[int],
        num_branches: int = 1,
        expert_steps: Sequence[int] = (0,),
        partition: Partition | Mapping[str, Any] | None = None,
        first_time: float | None = None,
    ) -> None:
        super().__init__()
        anchors = list(anchors)
        if not anchors or anchors != sorted(set(anchors)) or anchors[0] != 0:
            raise ValueError(f"anchors are {anchors}, expected rising steps starting with 0.")
        if anchors[-1] >= num_steps or num_branches < 1:
            raise ValueError(
                f"anchors end at {anchors[-1]} and num_branches is {num_branches}, expected "
                f"anchors below num_steps={num_steps} and at least one branch."
            )
        missing = sorted({0, *expert_steps} - set(anchors))
        if missing or list(expert_steps) != sorted(set(expert_steps)):
            raise ValueError(
                f"expert_steps are {list(expert_steps)} and the anchors {anchors}; expected "
                "rising steps starting with 0, all of them anchors: what one transformer computed "
                f"says nothing about the next (missing: {missing})."
            )
        if first_time is not None and not 0 < first_time <= 1:
            raise ValueError(f"first_time is {first_time}, expected a flow time in (0, 1] or None.")
        self.first_time = first_time
        self.num_steps = num_steps
        self.anchors = tuple(anchors)
        self.num_branches = num_branches
        self.expert_steps = tuple(expert_steps)
        self.partition = partition_from(partition) if isinstance(partition, Mapping) else partition
        reuse = torch.zeros(num_steps, num_steps, dtype=torch.float64)
        for t in range(1, num_steps):
            reuse[t, max(a for a in anchors if a < t)] = 1.0
        lead = (
            (num_branches,) if self.partition is None else (num_branches, self.partition.num_parts)
        )
        self.weight: Float[Tensor, "branches *parts S S"]
        self.register_buffer("weight", reuse.repeat(*lead, 1, 1))

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments; the partition as it describes itself."""
        own = super().arguments()
        if self.partition is not None and "partition" in own:
            own["partition"] = self.partition.describe()
        return own

    def size(self) -> str:
        """How many weights, and over what parts."""
        if self.partition is None:
            return super().size()
        return f"{super().size()} over {self.partition.num_parts} {self.partition.kind}"

    def coefficients(
        self, history: History, step: Step
    ) -> Float[Tensor, "K branches"] | Float[Tensor, "P K branches"]:
        """The learned row of each branch, and part, at this step.

        Raises:
            ValueError: a branch or step the rows do not have, or another history than theirs.
        """
        first = expert_start(self.expert_steps, step.index)
        own = [anchor for anchor in self.anchors if anchor >= first]
        return rows_at(self.weight, own, history, step).movedim(0, -1)

    def refitted(
        self, total: Float[Tensor, "branches P S S"], count: int, strength: float
    ) -> "L2P":
        """The least-squares rows of a sum, see the base class.

        Raises:
            ValueError: a part is zero at an anchor in every trajectory.
        """
        new = type(self)(**self.arguments())
        new.set_rows(fitted_rows(total, self.anchors, strength, self.expert_steps))
        return new

    def set_rows(self, rows: Float[Tensor, "branches *parts S S"]) -> None:
        """Make these rows the predictor's, with or without the axis of a single part."""
        self.weight.copy_(rows.detach().reshape(self.weight.shape))


def fitted_rows(
    total: Float[Tensor, "branches P S S"],
    anchors: Sequence[int],
    strength: float = 1e-4,
    expert_steps: Sequence[int] = (0,),
) -> Float[Tensor, "branches P S S"]:
    """`least_squares_rows` of every part; one that is zero throughout is reused.

    Such is a group of tokens that never enter the sample, as a source picture's.

    Args:
        total: Grams of the parts, summed over trajectories.
        anchors: steps at which the network runs.
        strength: of the ridge, see `least_squares_rows`.
        expert_steps: first step of each transformer, starting with 0.

    Raises:
        ValueError: a part is zero at an anchor in every trajectory, and not elsewhere.
    """
    norms = total.diagonal(dim1=-2, dim2=-1).sum(0)  # (P, S)
    absent = (norms <= 0).all(-1)
    if empty := ((norms[:, list(anchors)] <= 0).any(-1) & ~absent).nonzero().flatten().tolist():
        raise ValueError(
            f"the parts {empty} are zero at an anchor in every trajectory; merge them with others."
        )
    ones = torch.ones_like(total[:, :1])  # every step alike: whose rows are reuse
    some = torch.where(absent[:, None, None], ones, total)
    return least_squares_rows(some, anchors, strength, expert_steps)


def rows_at(
    weight: Float[Tensor, "all *parts S S"],
    anchors: Sequence[int],
    history: History,
    step: Step,
) -> Float[Tensor, "branches *parts K"]:
    """The weights of the features in `history` that learned rows give at a step.

    Args:
        weight: rows of all branches, and of each part where there are several.
        anchors: steps the rows are for.
        history: holds all of `anchors` before the step, and maybe further steps.
        step: the step to forecast.

    Raises:
        ValueError: a branch or step the rows do not have, or an anchor is missing.
    """
    num_branches, num_steps = weight.shape[0], weight.shape[-1]
    if max(step.branches) >= num_branches or step.index >= num_steps:
        raise ValueError(
            f"found branch {max(step.branches)} at step {step.index}, but the rows are for "
            f"{num_branches} branch(es) and {num_steps} steps."
        )
    expected = [anchor for anchor in anchors if anchor < step.index]
    if not expected or not set(expected) <= set(history.steps):
        raise ValueError(
            f"the history holds the steps {history.steps}, but the row of step {step.index} is for "
            f"{expected}; a run must start at step 0 and evaluate every anchor."
        )
    rows = weight[list(step.branches)]  # (branches, *parts, S, S)
    weights = rows[..., step.index, :]
    newest = history.steps[-1]
    if newest > expected[-1]:
        weights = weights - rows[..., newest, :]
        weights[..., newest] += 1.0
    return weights[..., history.steps]


def fold(weight: Float[Tensor, "*lead S S"], anchors: Sequence[int]) -> Float[Tensor, "*lead S S"]:
    """Rewrite rows over all earlier steps as rows over anchors only, exactly.

    A forecast that is fed back is itself a combination of anchors:
    B[a] = e_a at an anchor, B[t] = sum_{j<t} W[t, j] B[j] elsewhere.

    Args:
        weight: rows over all earlier steps, strictly lower triangular; anchor rows are ignored.
        anchors: steps at which the network runs, starting with 0.

    Returns:
        Rows with weights at anchors only; the row of an anchor is its unit row.
    """
    folded = torch.zeros_like(weight)
    for t in range(weight.shape[-1]):
        if t in anchors:
            folded[..., t, t] = 1.0
        else:
            earlier = folded[..., :t, :].clone()
            folded[..., t, :] = (weight[..., t, :t, None] * earlier).sum(-2)
    return folded
