"""The line of the parity table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One comparison with an original.

    Args:
        method: ours.
        original: theirs, with package and version.
        host: what both ran on.
        max_abs_diff: largest absolute difference of what both produced.
        same_definition: whether both compute the same function, so that only rounding differs.
        note: why they differ, or what is the same.
    """

    method: str
    original: str
    host: str
    max_abs_diff: float
    same_definition: bool
    note: str
