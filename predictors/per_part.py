"""Fixed rules per part of a feature: FreqCa per frequency band, HyCa per group of channels.

Shapes: P parts, K history length.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Step
from foreseer.predictors.partition import ChannelGroups, Partition
from foreseer.predictors.rules import RULES, AdamsBashforth2, HiCache, Reuse
from foreseer.predictors.spectrum import Bands


class PartedRules(LinearPredictor):
    """Base of F_hat = sum_p P_p sum_k c_k(rule_p) F_k.

    Args:
        partition: the parts.
        rules: the rule of each.
    """

    def __init__(self, partition: Partition, rules: Sequence[LinearPredictor]) -> None:
        super().__init__()
        self.partition = partition
        self.rules = list(rules)
        self.window = max(rule.window or 1 for rule in self.rules)

    def coefficients(self, history: History, step: Step) -> Float[Tensor, "P K 1"]:
        """The weights of every part's rule over its own window, with zeros for older features."""
        weights = torch.zeros(len(self.rules), len(history), 1, dtype=torch.float64)
        for row, rule in zip(weights, self.rules, strict=True):
            window = slice(-(rule.window or 1), None)
            newest = History(rule.window, history.steps[window], history.sigmas[window])
            own = rule.coefficients(newest, step)
            row[-len(own) :, 0] = own
        return weights


class FreqCa(PartedRules):
    """F_hat = F_0 + P_high[(c_0 - 1) F_0 + c_1 F_1 + c_2 F_2], c of second-order HiCache.

    arXiv 2510.08669; the released code's order 0 below 0.1 of the highest radius, order 2 at
    contraction 0.71 above. The release transforms every anchor, and takes the grid for a square;
    here one transform of the increment per forecast gives the same, on any grid.

    Args:
        grid: (height, width) in tokens, or (frames, height, width).
        transform: `dct` (the release for FLUX) or `fft` (in two dimensions; the release for
            Qwen-Image runs it over the flattened tokens).
        low_radius: radius below which a frequency is reused, in (0, 1).
        contraction: HiCache's sigma for the high band.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        grid: Sequence[int],
        transform: str = "dct",
        low_radius: float = 0.1,
        contraction: float = 0.71,
    ) -> None:
        super().__init__(Bands([low_radius], grid, transform), [Reuse(), HiCache(2, contraction)])


POOL: dict[str, LinearPredictor] = {
    "reuse": RULES["reuse"],
    "taylor_1": RULES["taylor_1"],
    "rk2": RULES["rk2"],
    "ab2": AdamsBashforth2(),
    "bdf2": RULES["bdf2"],
    "adams_moulton": RULES["adams_moulton"],
}
"""The solvers to choose from: HyCa's, and reuse, which is not in its pool."""


class HyCa(PartedRules):
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
    tag = "hyca"

    def __init__(self, labels: Sequence[int], solvers: Sequence[str]) -> None:
        groups = ChannelGroups(labels)
        unknown = sorted(set(solvers) - set(POOL))
        if unknown or len(solvers) != groups.num_parts:
            raise ValueError(
                f"solvers are {list(solvers)} for {groups.num_parts} groups, expected one of "
                f"{sorted(POOL)} per group."
            )
        super().__init__(groups, [POOL[name] for name in solvers])
        self.labels = groups.labels
        self.solvers = tuple(solvers)

    def size(self) -> str:
        """The solver of every group."""
        solvers = enumerate(self.solvers)
        return "; ".join(f"{self.labels.count(i)} channels: {name}" for i, name in solvers)
