"""The published searches for anchors that ours is measured against: DPCache's and BudCache's.

Shapes: n trajectories, S sampling steps.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.evaluation.search import Found
from foreseer.integration.schedule import check_anchors
from foreseer.predictors.base import History, LinearPredictor, Step

Anchors = tuple[int, ...]


def shortest_path(
    grams: Float[Tensor, "n branches S S"],
    sigmas: Sequence[float],
    num_anchors: int,
    rule: LinearPredictor,
    forced: int = 3,
) -> Anchors:
    """DPCache's list: the least sum of the forecasts' own errors, exactly (arXiv 2602.22654).

    sum_t ||F_hat_t - F_t||^2 over the forecast steps, of the mean Gram, the square where the paper
    has the L1 norm; a rule over two anchors makes the cost of a gap depend on the anchor it starts
    at and the one before, so the programme runs over such pairs.

    Args:
        grams: Gram matrices of the tap the rule forecasts.
        sigmas: flow time of every step.
        num_anchors: anchors to place.
        rule: the forecaster, of a window of at most 2 anchors.
        forced: first steps that are anchors, as published; 1 leaves all but step 0 free.

    Raises:
        ValueError: the rule looks further back, or there are fewer anchors than forced ones.
    """
    num_steps = len(sigmas)
    if rule.window is None or rule.window > 2:
        raise ValueError(
            f"{rule} weighs {rule.window or 'all'} anchors; expected a rule over at most 2, which "
            "is what the dynamic programme is exact for: reuse, taylor_1, bdf2, ..."
        )
    if not 1 <= forced <= num_anchors <= num_steps:
        raise ValueError(
            f"found {forced} forced first steps and num_anchors {num_anchors}; expected 1 <= "
            f"forced <= num_anchors <= {num_steps}, the steps of the run."
        )
    costs = _GapCosts(grams.double().mean((0, 1)), sigmas, rule)
    first = tuple(range(forced))
    paths = {first[-2:]: (0.0, first)}
    for placed in range(forced, num_anchors):
        grown: dict[Anchors, tuple[float, Anchors]] = {}
        for pair, (cost, anchors) in paths.items():
            gaps = costs.of(pair)
            for step in range(pair[-1] + 1, num_steps - (num_anchors - placed - 1)):
                total, key = cost + gaps[step - pair[-1] - 1], (pair[-1], step)
                if key not in grown or total < grown[key][0]:
                    grown[key] = (total, (*anchors, step))
        paths = grown
    return min((cost + costs.of(pair)[-1], anchors) for pair, (cost, anchors) in paths.items())[1]


class _GapCosts:
    """Summed squared errors of the forecasts after two anchors, up to every later step."""

    def __init__(
        self, gram: Float[Tensor, "S S"], sigmas: Sequence[float], rule: LinearPredictor
    ) -> None:
        self.gram, self.sigmas, self.rule = gram, list(sigmas), rule
        self.found: dict[Anchors, list[float]] = {}

    def of(self, pair: Anchors) -> list[float]:
        """Entry k is the cost with the next anchor k + 1 steps after the newer of the two."""
        if pair not in self.found:
            self.found[pair] = self._summed(pair)
        return self.found[pair]

    def _summed(self, pair: Anchors) -> list[float]:
        num_steps, known = len(self.sigmas), list(pair[-(self.rule.window or 2) :])
        history = History(None, known, [self.sigmas[a] for a in known])
        later = range(pair[-1] + 1, num_steps)
        errors = torch.zeros(len(later), num_steps, dtype=torch.float64)
        for row, t in zip(errors, later, strict=True):
            step = Step(t, self.sigmas[t], num_steps, sigmas=self.sigmas)
            row[known] = self.rule.coefficients(history, step).double()
            row[t] -= 1
        return [0.0, *((errors @ self.gram) * errors).sum(1).cumsum(0).tolist()]


ANNEALED = 200  # lists tried while the temperature falls
HOTTEST, COLDEST = 0.05, 1e-5  # of mean squared errors of final latents
CLIMBS = 20  # times the best neighbour is gone to, at most
REACH = 3  # steps, of a neighbour
JUMPS = 2  # random neighbours of every anchor


def annealed(
    evaluate: Callable[[Anchors], float], num_anchors: int, num_steps: int, seed: int = 0
) -> list[Found]:
    """BudCache's search in closed loop: simulated annealing, then hill climbing.

    arXiv 2606.13496, as its released code has it: from a random list with the first quarter of the
    anchors in a row, 200 moves of one anchor or two at temperatures that fall from 0.05 to 1e-5,
    then to the best of all moves by up to 3 steps and of 2 random ones per anchor, while that
    helps. It is published with one prompt.

    Args:
        evaluate: closed-loop error in dB of a list of anchors; annealed is the squared error.
        num_anchors: anchors to place.
        num_steps: steps of the run.
        seed: of the random choices.

    Returns:
        Everything evaluated, best first.

    Raises:
        ValueError: there are not that many steps.
    """
    if not 1 <= num_anchors <= num_steps:
        raise ValueError(f"num_anchors is {num_anchors}, expected 1 to {num_steps}, the steps.")
    errors: dict[Anchors, float] = {}

    def loss(anchors: Anchors) -> float:
        if anchors not in errors:
            errors[anchors] = evaluate(check_anchors(anchors, num_steps))
        return 10 ** (errors[anchors] / 10)

    chance, prefix = random.Random(seed), max(1, num_anchors // 4)
    drawn = chance.sample(range(prefix, num_steps), num_anchors - prefix)
    current = (*range(prefix), *sorted(drawn))
    loss(current)
    for i in range(ANNEALED):
        temperature = HOTTEST * (COLDEST / HOTTEST) ** (i / ANNEALED)
        moved = _moved(current, num_steps, chance)
        worse = loss(moved) - loss(current)
        if worse < 0 or chance.random() < math.exp(-worse / temperature):
            current = moved
    for _ in range(CLIMBS):
        best = min([current, *_neighbours(current, num_steps, chance)], key=loss)
        if best == current:
            break
        current = best
    return sorted((Found(*one) for one in errors.items()), key=lambda one: one.error_db)


def _moved(anchors: Anchors, num_steps: int, chance: random.Random) -> Anchors:
    """One anchor moved, seven times of ten by at most `REACH` steps; or two, one time of ten."""
    prefix = max(1, len(anchors) // 4)
    movable = [a for a in anchors if a >= prefix]
    free = sorted(set(range(prefix, num_steps)) - set(anchors))
    if not movable or not free:
        return anchors
    if chance.random() < 0.9 or len(movable) < 2 or len(free) < 2:
        leaving = [chance.choice(movable)]
        near = [step for step in free if abs(step - leaving[0]) <= REACH]
        local = chance.random() < 0.7
        arriving = [chance.choice(near if local and near else free)]
    else:
        leaving, arriving = chance.sample(movable, 2), chance.sample(free, 2)
    return tuple(sorted({*anchors} - {*leaving} | {*arriving}))


def _neighbours(anchors: Anchors, num_steps: int, chance: random.Random) -> Iterator[Anchors]:
    """Every anchor moved by at most `REACH` steps, then to random ones; some more than once."""
    prefix = max(1, len(anchors) // 4)
    movable = [i for i, a in enumerate(anchors) if a >= prefix]
    near = [
        (i, step)
        for i in movable
        for step in range(max(prefix, anchors[i] - REACH), min(num_steps, anchors[i] + REACH + 1))
    ]
    far = [(i, chance.randrange(prefix, num_steps)) for i in movable for _ in range(JUMPS)]
    for i, step in [*near, *far]:
        if step not in anchors:
            yield tuple(sorted((*anchors[:i], *anchors[i + 1 :], step)))
