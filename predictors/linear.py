"""L2P: a learned row of weights per step over earlier features, per guidance branch.

Shapes: S sampling steps, K history length.
Source: L2P, arXiv 2604.26365: F_hat_t = sum_{j<t} W[t, j] F_j.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Step


class L2P(LinearPredictor):
    """F_hat_t = sum_a W[branch, t, a] F_a over the anchors a < t.

    arXiv 2604.26365, folded onto anchors. Starts as plain reuse of the newest anchor. A branch the
    rows do not have is an error, never a guess.

    A schedule may compute further steps. After such a step b, until the next of the rows' anchors,
    the forecast is moved by what it was wrong at b: F_hat_t + F_b - F_hat_b, exact at b. This is
    ours, a linear rule as well.

    Args:
        num_steps: sampling steps S.
        anchors: steps at which the network runs, starting with 0.
        num_branches: guidance branches.

    Raises:
        ValueError: the anchors are not a schedule of a run of `num_steps`.
    """

    learned = True

    def __init__(self, num_steps: int, anchors: Sequence[int], num_branches: int = 1) -> None:
        super().__init__()
        anchors = list(anchors)
        if not anchors or anchors != sorted(set(anchors)) or anchors[0] != 0:
            raise ValueError(f"anchors are {anchors}, expected rising steps starting with 0.")
        if anchors[-1] >= num_steps or num_branches < 1:
            raise ValueError(
                f"anchors end at {anchors[-1]} and num_branches is {num_branches}, expected "
                f"anchors below num_steps={num_steps} and at least one branch."
            )
        self.num_steps = num_steps
        self.anchors = tuple(anchors)
        self.num_branches = num_branches
        reuse = torch.zeros(num_steps, num_steps, dtype=torch.float64)
        for t in range(1, num_steps):
            reuse[t, max(a for a in anchors if a < t)] = 1.0
        self.weight: Float[Tensor, "branches S S"]
        self.register_buffer("weight", reuse.repeat(num_branches, 1, 1))

    def coefficients(self, history: History, step: Step) -> Float[Tensor, "K branches"]:
        """The learned row of each branch at this step.

        Raises:
            ValueError: a branch or step the rows do not have, or another history than theirs.
        """
        return rows_at(self.weight, self.anchors, history, step).mT


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


def tabulate(
    rule: LinearPredictor, anchors: Sequence[int], sigmas: Sequence[float]
) -> Float[Tensor, "S S"]:
    """The weights of any linear rule on given anchors, as rows over all steps.

    The row of an anchor is its unit row.

    Args:
        rule: the rule.
        anchors: steps at which the network runs.
        sigmas: flow time of every step.
    """
    num_steps = len(sigmas)
    table = torch.zeros(num_steps, num_steps, dtype=torch.float64)
    history = History(rule.window)
    for t in range(num_steps):
        step = Step(t, sigmas[t], num_steps)
        if t in anchors:
            history.push(step, torch.empty(0))
            table[t, t] = 1.0
        else:
            table[t, history.steps] = rule.coefficients(history, step).detach().double().flatten()
    return table


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
