"""L2P with a row of weights per part of the feature: per frequency band or per channel group.

Shapes: S sampling steps, P parts, K history length.
Source: the rows are L2P's (arXiv 2604.26365); a row per part is ours.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, Step
from foreseer.predictors.linear import L2P, rows_at
from foreseer.predictors.partition import ChannelGroups, PartedPredictor, Partition
from foreseer.predictors.spectrum import Bands


class PartedL2P(PartedPredictor):
    """F_hat_t = sum_p P_p sum_a W[branch, p, t, a] F_a over the anchors a < t.

    Starts as plain reuse of the newest anchor; with equal rows in all parts it is L2P.

    Args:
        num_steps: sampling steps S.
        anchors: steps at which the network runs, starting with 0.
        num_branches: guidance branches.
        partition: the parts.

    Raises:
        ValueError: the anchors are not a schedule of a run of `num_steps`.
    """

    learned = True

    def __init__(
        self, num_steps: int, anchors: Sequence[int], num_branches: int, partition: Partition
    ) -> None:
        super().__init__(partition)
        plain = L2P(num_steps, anchors, num_branches)
        self.num_steps = plain.num_steps
        self.anchors = plain.anchors
        self.num_branches = plain.num_branches
        self.window = plain.window
        self.weight: Float[Tensor, "branches P S S"]
        self.register_buffer("weight", plain.weight[:, None].repeat(1, partition.num_parts, 1, 1))

    def part_coefficients(self, history: History, step: Step) -> Float[Tensor, "P K branches"]:
        """The learned rows of each branch at this step.

        Raises:
            ValueError: a branch or step the rows do not have, or another history than theirs.
        """
        return rows_at(self.weight, self.anchors, history, step).permute(1, 2, 0)


class L2PBands(PartedL2P):
    """L2P with a row per frequency band.

    Args:
        num_steps: sampling steps S.
        anchors: steps at which the network runs, starting with 0.
        num_branches: guidance branches.
        edges: radii between the bands, see `Bands`.
        grid: (height, width) in tokens, or (frames, height, width).
        transform: `dct` or `fft`.

    Raises:
        ValueError: see `L2P` and `Bands`.
    """

    def __init__(
        self,
        num_steps: int,
        anchors: Sequence[int],
        num_branches: int,
        edges: Sequence[float],
        grid: Sequence[int],
        transform: str = "dct",
    ) -> None:
        bands = Bands(edges, grid, transform)
        super().__init__(num_steps, anchors, num_branches, bands)
        self.edges, self.grid, self.transform = bands.edges, bands.grid, bands.transform


class L2PGroups(PartedL2P):
    """L2P with a row per channel group.

    Args:
        num_steps: sampling steps S.
        anchors: steps at which the network runs, starting with 0.
        num_branches: guidance branches.
        labels: the group of every channel, see `ChannelGroups`.

    Raises:
        ValueError: see `L2P` and `ChannelGroups`.
    """

    def __init__(
        self, num_steps: int, anchors: Sequence[int], num_branches: int, labels: Sequence[int]
    ) -> None:
        groups = ChannelGroups(labels)
        super().__init__(num_steps, anchors, num_branches, groups)
        self.labels = groups.labels


def parted_l2p(
    num_steps: int, anchors: Sequence[int], num_branches: int, partition: Partition
) -> L2PBands | L2PGroups:
    """The L2P of a partition, at its start."""
    arguments = {name: value for name, value in partition.describe().items() if name != "class"}
    kind: type[L2PBands] | type[L2PGroups]
    kind = L2PBands if isinstance(partition, Bands) else L2PGroups
    return kind(num_steps, anchors, num_branches, **arguments)


def partition_from(description: dict[str, Any]) -> Partition:
    """The partition that `describe` told of.

    Raises:
        ValueError: it names no partition, or lacks an argument.
    """
    known: dict[str, type[Bands] | type[ChannelGroups]]
    known = {"Bands": Bands, "ChannelGroups": ChannelGroups}
    arguments = {name: value for name, value in description.items() if name != "class"}
    name = description.get("class")
    if name not in known:
        raise ValueError(f"found the partition {name!r}, expected one of {sorted(known)}.")
    try:
        return known[name](**arguments)
    except TypeError as error:
        raise ValueError(f"{name} does not take {sorted(arguments)}: {error}") from error
