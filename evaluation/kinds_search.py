"""Lists of full, shallow and forecast steps under a cost, by dynamic programming on Grams.

Shapes: S sampling steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

SHALLOW_WEIGHTS = (0.03, 0.1, 0.3, 1.0, 3.0)
"""What an error of the deep trunk may count for in the output, which Grams do not tell."""

PRICES = 48  # of a full step, in the error that it must save


class Kinds(NamedTuple):
    """A list of three kinds: `anchors=anchors, shallow=Shallow(shallow, ...)`.

    Attributes:
        anchors: full and shallow steps.
        shallow: the shallow ones among them.
    """

    anchors: tuple[int, ...]
    shallow: tuple[int, ...]

    def cost(self, share: float) -> float:
        """In full steps, with a shallow one at this share of one."""
        return len(self.anchors) - len(self.shallow) * (1 - share)


def three_kind_lists(
    deep: Float[Tensor, "S S"],
    output: Float[Tensor, "S S"],
    sigmas: Sequence[float],
    share: float,
    budget: float,
    count: int = 10,
) -> list[Kinds]:
    """Lists that use a budget up, for a closed loop to decide among.

    With D(a, t) = ||F_t - F_a||^2 / ||F_t||^2 of the deep tap and O likewise of the output, a
    shallow step at t after the full step a is wrong by c D(a, t), and a forecast at t after the
    evaluated step e by what e was wrong plus O(e, t). The sum over steps, each weighted by its
    share of flow time, plus a price for full and shallow steps is minimised exactly, over the last
    full and the last evaluated step; c and the price are tried in turn.

    Args:
        deep: summed Gram of the deep tap.
        output: summed Gram of the output.
        sigmas: flow time of every step.
        share: cost of a shallow step in full ones, in (0, 1).
        budget: most cost of a list in full steps, at least 1.
        count: lists at most, the one nearest to the budget first.

    Returns:
        Different lists, each with a shallow step.

    Raises:
        ValueError: a number is out of range, or no list with a shallow step fits the budget.
    """
    if not 0 < share < 1 or budget < 1 + share or count < 1:
        raise ValueError(
            f"found share {share}, budget {budget} and count {count}; expected a share in (0, 1), "
            "a budget of a full and a shallow step at least, and at least one list."
        )
    if deep.shape != output.shape or len(deep) != len(sigmas):
        raise ValueError(
            f"found Grams of {len(deep)} and {len(output)} steps and {len(sigmas)} flow times; "
            "expected one recording's."
        )
    wrong_deep, wrong_output = changes(deep), changes(output)
    ends = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
    weights = (ends[:-1] - ends[1:]).abs() / (ends[0] - ends[-1]).abs().clamp_min(1e-12)
    largest = float((weights[None] * wrong_output).sum(-1).max()) + 1e-12
    prices = largest * torch.logspace(-6, 0, PRICES, dtype=torch.float64)
    found: dict[Kinds, float] = {}
    for c in SHALLOW_WEIGHTS:
        for price in prices.tolist():
            kinds = _cheapest(c * wrong_deep, wrong_output, weights, price, price * share)
            if kinds.shallow and kinds.cost(share) <= budget + 1e-9:
                found[kinds] = budget - kinds.cost(share)
    if not found:
        raise ValueError(
            f"no list with a shallow step of {share:.2f} pays at a cost of {budget:g} of "
            f"{len(sigmas)} steps; take anchors alone."
        )
    return sorted(found, key=lambda kinds: (found[kinds], kinds))[:count]


def changes(gram: Float[Tensor, "S S"]) -> Float[Tensor, "S S"]:
    """||F_t - F_a||^2 / ||F_t||^2 at [a, t].

    Raises:
        ValueError: a feature is zero at a step.
    """
    gram = gram.double()
    norms = gram.diagonal()
    if not bool((norms > 0).all()):
        raise ValueError("a feature is zero at a step, so its changes have no scale; record anew.")
    return ((norms[:, None] + norms[None] - 2 * gram) / norms[None]).clamp_min(0)


def _cheapest(
    wrong_deep: Float[Tensor, "S S"],
    wrong_output: Float[Tensor, "S S"],
    weights: Float[Tensor, " S"],
    full_price: float,
    shallow_price: float,
) -> Kinds:
    """The list of least error and price: a shortest path over (last full, last evaluated) steps."""
    size = len(weights)
    standing = wrong_deep.clone()  # what an evaluated step was wrong, by (full, evaluated)
    standing.fill_diagonal_(0.0)
    best = torch.full((size, size), torch.inf, dtype=torch.float64)
    best[0, 0] = full_price
    chosen: list[tuple[tuple[int, int], Tensor]] = []  # at every step: before a full, a shallow one
    for t in range(1, size):
        flat = int(best.argmin())
        before_full = divmod(flat, size)
        before_shallow = best.argmin(1)
        full = float(best.flatten()[flat]) + full_price
        shallow = best.amin(1) + shallow_price + weights[t] * wrong_deep[:, t]
        best = best + weights[t] * (standing + wrong_output[None, :, t])
        best[:, t], best[t, :] = shallow, torch.inf
        best[t, t] = full
        chosen.append((before_full, before_shallow))
    last_full, evaluated = divmod(int(best.argmin()), size)
    anchors, shallow_steps = [], []
    while evaluated:
        anchors.append(evaluated)
        before_full, before_shallow = chosen[evaluated - 1]
        if last_full == evaluated:
            last_full, evaluated = before_full
        else:
            shallow_steps.append(evaluated)
            evaluated = int(before_shallow[last_full])
    return Kinds((0, *reversed(anchors)), tuple(reversed(shallow_steps)))
