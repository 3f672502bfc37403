"""HyCa: one solver per group of channels.

Shapes: P groups, K history length.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Step
from foreseer.predictors.multistep import BDF2, AdamsBashforth2, AdamsMoulton, RungeKutta2
from foreseer.predictors.partition import ChannelGroups, PartedPredictor
from foreseer.predictors.polynomial import Reuse, Taylor

POOL: dict[str, LinearPredictor] = {
    "reuse": Reuse(),
    "taylor_1": Taylor(1),
    "rk2": RungeKutta2(),
    "ab2": AdamsBashforth2(),
    "bdf2": BDF2(),
    "adams_moulton": AdamsMoulton(),
}
"""The solvers to choose from: HyCa's, and reuse, which is not in its pool."""


class HyCa(PartedPredictor):
    """F_hat = sum_g P_g sum_k c_k(solver_g) F_k, P_g the channels of group g.

    arXiv 2510.04188, of which there is no released code. The groups and their solvers are chosen
    once, on recorded trajectories of one model: see `foreseer.training.clusters.fit_hyca`.

    Args:
        labels: the group of every channel, see `ChannelGroups`.
        solvers: the name in `POOL` of every group's solver.

    Raises:
        ValueError: a solver is unknown, or there is not one per group.
    """

    learned = True

    def __init__(self, labels: Sequence[int], solvers: Sequence[str]) -> None:
        groups = ChannelGroups(labels)
        super().__init__(groups)
        self.labels = groups.labels
        self.solvers = tuple(solvers)
        unknown = sorted(set(self.solvers) - set(POOL))
        if unknown or len(self.solvers) != groups.num_parts:
            raise ValueError(
                f"solvers are {list(self.solvers)} for {groups.num_parts} groups, expected one of "
                f"{sorted(POOL)} per group."
            )
        self.rules = [POOL[name] for name in self.solvers]
        self.window = max(rule.window or 1 for rule in self.rules)

    def part_coefficients(self, history: History, step: Step) -> Float[Tensor, "P K 1"]:
        """The weights of every group's solver."""
        return torch.stack([_padded(rule, history, step) for rule in self.rules])[:, :, None]


def _padded(rule: LinearPredictor, history: History, step: Step) -> Float[Tensor, " K"]:
    """A rule's weights over its own window, with zeros for older features."""
    window = slice(-(rule.window or 1), None)
    steps, sigmas = history.steps[window], history.sigmas[window]
    newest = rule.coefficients(History(rule.window, steps, sigmas), step).double()
    weights = torch.zeros(len(history), dtype=torch.float64)
    weights[-len(newest) :] = newest
    return weights
