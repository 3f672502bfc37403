"""Search the anchors for a number of evaluations: open loop on Grams, then closed loop on samples.

Shapes: n trajectories, S sampling steps.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.integration.schedule import check_anchors, common_lists, warped
from foreseer.predictors.base import History, LinearPredictor, Step
from foreseer.predictors.ladder import with_end
from foreseer.predictors.solve import known_anchors

GAMMAS = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6)


class Found(NamedTuple):
    """A list of anchors and its closed-loop mean squared error in dB; lower is better."""

    anchors: tuple[int, ...]
    error_db: float


class _Path(NamedTuple):
    """A prefix of a list: its cost, its anchors, and the weights of the error it has piled up."""

    cost: float
    anchors: tuple[int, ...]
    error: Float[Tensor, " S"]


def beam_search(
    grams: Float[Tensor, "n branches S S"],
    sigmas: Sequence[float],
    num_anchors: int,
    rule: LinearPredictor,
    width: int = 24,
    max_gap: int | None = None,
    expert_steps: Sequence[int] = (0,),
) -> list[tuple[int, ...]]:
    """Anchor lists of least accumulated error under a rule, best first; no network, no features.

    The accumulated error sums ||sum_{s<=t} h_s (F_hat_s - F_s)||^2 over the steps t, on the mean
    Gram: how far the sample is off during the run, were the network not to react to it. It orders
    methods and lists as the samples do much better than sums of per-step errors (docs/inspect.md).

    Args:
        grams: Gram matrices of the tap the rule forecasts.
        sigmas: flow time of every step.
        num_anchors: anchors to place; step 0 is always one.
        rule: the forecaster.
        width: lists kept per number of anchors.
        max_gap: longest stretch between two anchors, in steps; None allows four mean gaps. Any
            where there are hardly more anchors than transformers.
        expert_steps: first step of each transformer, starting with 0; all are anchors, and the
            rule begins anew with each.

    Raises:
        ValueError: there are not that many steps, or fewer anchors than transformers.
    """
    num_steps, least = len(sigmas), len(expert_steps)
    if not least <= num_anchors <= num_steps:
        raise ValueError(
            f"num_anchors is {num_anchors}, expected {least} (transformers) to {num_steps} (steps)."
        )
    max_gap = max_gap or max(2, 4 * num_steps // num_anchors)
    if least > 1 and num_anchors <= 2 * least:
        max_gap = num_steps  # the starts may lie that far apart
    segments = _Segments(grams.double().mean((0, 1)), sigmas, rule, max_gap, expert_steps)
    beam = [_Path(0.0, (0,), torch.zeros(num_steps, dtype=torch.float64))]
    for placed in range(1, num_anchors):
        to_come = num_anchors - placed - 1
        parents = {path.anchors: path for path in beam}
        cost_of: dict[tuple[int, ...], float] = {}
        grown: list[tuple[float, tuple[int, ...]]] = []
        for path in beam:
            newest, costs = path.anchors[-1], segments.costs(path)
            for step in segments.next_anchors(newest, max_gap, to_come):
                cost, before = costs[step - newest], costs[step - newest - 1]
                anchors = (*path.anchors, step)
                cost_of[anchors] = cost
                # The error at `step` stays to the end of the run if no other is made.
                grown.append((cost + (num_steps - step) * (cost - before), anchors))
        kept = [anchors for _, anchors in _diverse(grown, width)]
        beam = [_Path(cost_of[a], a, segments.error(parents[a[:-1]], a[-1])) for a in kept]
    segments.reach = num_steps
    finished = [(segments.costs(path)[-1], path.anchors) for path in beam]
    return [anchors for _, anchors in sorted(finished)[:width]]


class _Segments:
    """Error from an anchor to the steps within reach, kept for every window of anchors met."""

    def __init__(
        self,
        gram: Float[Tensor, "S S"],
        sigmas: Sequence[float],
        rule: LinearPredictor,
        reach: int,
        expert_steps: Sequence[int] = (0,),
    ) -> None:
        self.gram = gram
        self.sigmas = list(sigmas)
        self.euler_steps = torch.tensor(with_end(sigmas), dtype=torch.float64).diff()
        self.rule = rule
        self.reach = reach  # steps
        self.expert_steps = expert_steps
        self.found: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def end(self, step: int) -> int:
        """First step of the next transformer, or the end of the run."""
        return min((start for start in self.expert_steps if start > step), default=len(self.sigmas))

    def next_anchors(self, step: int, max_gap: int, to_come: int) -> list[int]:
        """Where the anchor after one may lie, with so many to come after it.

        It passes no start of a transformer, and leaves an anchor for each start and a step for
        each anchor.
        """
        last = min(step + max_gap, len(self.sigmas) - 1 - to_come, self.end(step))
        starts = self.expert_steps
        return [s for s in range(step + 1, last + 1) if sum(a > s for a in starts) <= to_come]

    def costs(self, path: _Path) -> list[float]:
        """Cost of the path extended by 0, 1, ... steps, up to the reach or the end of the run."""
        _, pulls, squares = self._segment(path.anchors)
        held = torch.arange(len(squares), dtype=torch.float64)
        own = path.error @ self.gram @ path.error
        return (path.cost + held * own + 2 * (pulls @ path.error) + squares).tolist()

    def error(self, path: _Path, end: int) -> Float[Tensor, " S"]:
        """Weights of the error piled up when the step before `end` is done."""
        errors, _, _ = self._segment(path.anchors)
        return path.error + errors[end - path.anchors[-1]]

    def _segment(self, anchors: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """After m steps from the newest anchor: its error u_m, sum G u and sum u^T G u so far."""
        window = tuple(known_anchors(anchors, self.expert_steps, anchors[-1]))
        window = window[-self.rule.window :] if self.rule.window else window
        end = min(window[-1] + self.reach, self.end(window[-1]))
        if (*window, end) not in self.found:
            errors = self._errors(window, end)
            pulls = errors @ self.gram
            squares = (pulls * errors).sum(-1)
            self.found[*window, end] = (errors, pulls.cumsum(0), squares.cumsum(0))
        return self.found[*window, end]

    def _errors(self, window: tuple[int, ...], end: int) -> Float[Tensor, "T S"]:
        """Weights of sum_t h_t (F_hat_t - F_t) after no step, the anchor's own, and each later."""
        newest, num_steps = window[-1], len(self.sigmas)
        history = History(None, list(window), [self.sigmas[a] for a in window])
        c = torch.zeros(end - newest + 1, num_steps, dtype=torch.float64)
        if end > newest + 1:
            later = range(newest + 1, end)
            steps = [Step(t, self.sigmas[t], num_steps, sigmas=self.sigmas) for t in later]
            weights = torch.stack([self.rule.coefficients(history, s).flatten() for s in steps])
            c[2:, list(window)] = weights.double() * self.euler_steps[newest + 1 : end, None]
            c[2:, newest + 1 : end] -= self.euler_steps[newest + 1 : end].diag()
        return c.cumsum(0)


def _diverse(
    grown: list[tuple[float, tuple[int, ...]]], width: int
) -> list[tuple[float, tuple[int, ...]]]:
    """The best few per last anchor: short prefixes drift less and must not crowd out others."""
    by_last: dict[int, list[tuple[float, tuple[int, ...]]]] = {}
    for entry in sorted(grown):
        kept = by_last.setdefault(entry[1][-1], [])
        if len(kept) < max(1, width // 8):
            kept.append(entry)
    return [entry for kept in by_last.values() for entry in kept]


def start_lists(
    num_anchors: int, num_steps: int = 50, expert_steps: Sequence[int] = (0,)
) -> list[tuple[int, ...]]:
    """Lists that every search tries: warped by each gamma, and the common ones."""
    lists = []
    for gamma in GAMMAS:
        try:
            lists.append(warped(num_anchors, num_steps, gamma, expert_steps))
        except ValueError:  # two anchors fell on one step: this gamma is too strong for the budget
            continue
    lists += common_lists(num_anchors, num_steps, expert_steps).values()
    return list(dict.fromkeys(lists))


def closed_loop_search(
    evaluate: Callable[[tuple[int, ...]], float],
    starts: Sequence[tuple[int, ...]],
    num_steps: int,
    num_moves: int = 8,
) -> list[Found]:
    """Rank lists by closed-loop error, then move single anchors of the best one while that helps.

    Deterministic: moves are tried in a fixed order, the first of equal errors wins.

    Args:
        evaluate: closed-loop error in dB of a list of anchors.
        starts: lists to rank.
        num_steps: steps of the run.
        num_moves: evaluations spent on moving anchors by one or two steps.

    Returns:
        Everything evaluated, best first.
    """
    errors = {anchors: evaluate(check_anchors(anchors, num_steps)) for anchors in starts}
    spent = 0
    while spent < num_moves:
        best = min(errors, key=lambda anchors: errors[anchors])
        moved = next((m for m in _moves(best, num_steps) if m not in errors), None)
        if moved is None:
            break
        errors[moved] = evaluate(moved)
        spent += 1
    found = [Found(anchors, error) for anchors, error in errors.items()]
    return sorted(found, key=lambda one: one.error_db)


def _moves(anchors: tuple[int, ...], num_steps: int) -> list[tuple[int, ...]]:
    """Neighbours of a list: every anchor but the first one step later or earlier, or all scaled."""
    found = []
    for shift in (1, -1):
        found.append((0, *(a + shift for a in anchors[1:])))
    for shift in (1, -1, 2, -2):
        for i in range(len(anchors) - 1, 0, -1):
            found.append((*anchors[:i], anchors[i] + shift, *anchors[i + 1 :]))
    ordered = [m for m in found if all(a < b for a, b in zip(m, m[1:], strict=False))]
    return [m for m in ordered if m[-1] < num_steps]
