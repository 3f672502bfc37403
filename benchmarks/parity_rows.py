"""The line of the parity table."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One comparison with an original.

    Args:
        method: ours.
        original: theirs, with package and version.
        host: what both ran on.
        max_abs_diff: largest absolute difference of what both produced; for schedules 0 where the
            lists of steps are equal, else 1.
        same_definition: whether both compute the same function, so that only rounding differs.
        note: why they differ, or what is the same.
    """

    method: str
    original: str
    host: str
    max_abs_diff: float
    same_definition: bool
    note: str


def largest(first: Tensor, second: Tensor) -> float:
    """The largest absolute difference."""
    return float((first.double() - second.double()).abs().max())
