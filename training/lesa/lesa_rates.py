"""Learning rates of a LESA phase, which starts anew whatever came before."""

import math

HALVING = 500  # optimiser steps between halvings, of the release
FLOOR = 0.01  # final rate of the cosine, relative to the first


def rate_factor(decay: str, progress: float, updates: int) -> float:
    """Learning rate relative to the phase's first: 1 at its start, whatever came before.

    Args:
        decay: `cosine` or `halving`.
        progress: share of the phase that is done, in [0, 1].
        updates: updates of the phase so far.
    """
    if decay == "halving":
        return 0.5 ** (updates // HALVING)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
