"""The word that a comparison on the same samples gets, wherever one is made."""

from typing import Literal

Standing = Literal["ahead", "level", "behind"]


def standing(low_db: float, high_db: float) -> Standing:
    """How a method stands to its rival, by the 95 % interval of their paired difference.

    Args:
        low_db: lower end of the interval of method minus rival, in dB; higher is better.
        high_db: upper end.
    """
    if low_db > 0:
        return "ahead"
    return "behind" if high_db < 0 else "level"


def interval(low_db: float, high_db: float) -> str:
    """A paired interval in words: `paired +2.4 to +3.4`."""
    return f"paired {low_db:+.1f} to {high_db:+.1f}"
