"""The word that a comparison on the same samples gets, wherever one is made."""

from typing import Literal

Standing = Literal["ahead", "level", "behind"]

ESTIMATED_GAIN_DB = 1.0  # smaller gaps order two methods hardly better than chance: docs/inspect.md
ESTIMATED_LOSS_DB = 4.5
"""Smaller losses of least-squares rows were as often none in closed loop: docs/inspect.md."""


def standing(low_db: float, high_db: float, estimated: bool = False) -> Standing:
    """How a method stands to its rival, by the 95 % interval of their paired difference.

    Args:
        low_db: lower end of the interval of method minus rival, in dB; higher is better.
        high_db: upper end.
        estimated: whether it comes from recorded features: it is then widened by what such an
            estimate is known to miss.
    """
    least, most = (ESTIMATED_GAIN_DB, ESTIMATED_LOSS_DB) if estimated else (0.0, 0.0)
    if low_db > least:
        return "ahead"
    return "behind" if high_db < -most else "level"


def interval(low_db: float, high_db: float) -> str:
    """A paired interval in words: `paired +2.4 to +3.4`."""
    return f"paired {low_db:+.1f} to {high_db:+.1f}"
