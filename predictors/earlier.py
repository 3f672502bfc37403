"""Classes of version 0.2 that `L2P` has taken in: they make one, with a warning that says how."""

import warnings
from collections.abc import Sequence

from foreseer.predictors.linear import L2P
from foreseer.predictors.partition import ChannelGroups
from foreseer.predictors.spectrum import Bands


def L2PExperts(  # noqa: N802
    num_steps: int,
    anchors: Sequence[int],
    num_branches: int = 1,
    expert_steps: Sequence[int] = (0,),
) -> L2P:
    """`L2P` of several transformers."""
    _warn("L2PExperts(...)", "L2P(..., expert_steps=...)")
    return L2P(num_steps, anchors, num_branches, expert_steps)


def L2PBands(  # noqa: N802
    num_steps: int,
    anchors: Sequence[int],
    num_branches: int,
    edges: Sequence[float],
    grid: Sequence[int],
    transform: str = "dct",
) -> L2P:
    """`L2P` with a row per frequency band."""
    _warn("L2PBands(...)", "L2P(..., partition=Bands(edges, grid, transform))")
    return L2P(num_steps, anchors, num_branches, partition=Bands(edges, grid, transform))


def L2PGroups(  # noqa: N802
    num_steps: int, anchors: Sequence[int], num_branches: int, labels: Sequence[int]
) -> L2P:
    """`L2P` with a row per channel group."""
    _warn("L2PGroups(...)", "L2P(..., partition=ChannelGroups(labels))")
    return L2P(num_steps, anchors, num_branches, partition=ChannelGroups(labels))


def _warn(old: str, new: str) -> None:
    text = f"{old} is {new} now: change it in your YAML or code."
    warnings.warn(text, DeprecationWarning, stacklevel=3)
