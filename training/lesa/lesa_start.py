"""What a LESA fit starts with, and its learning rates."""

import math
from collections.abc import Callable, Sequence

from foreseer.predictors.lesa import LesaPredictor
from foreseer.training.lesa.stages import find_stages
from foreseer.trajectories.recording import Recording

LesaFactory = Callable[[Sequence[float], int], LesaPredictor]
"""Makes the untrained predictor from the sigmas of a run and the number of branches."""


def untrained(
    recording: Recording,
    predictor: LesaFactory,
    tap: str,
    anchors: Sequence[int],
    find_boundaries: bool,
) -> LesaPredictor:
    """The predictor for a recording's runs, with its boundaries where the recording says, if asked.

    Args:
        recording: with Grams of the tap.
        predictor: makes it.
        tap: tap to forecast.
        anchors: steps at which the network runs.
        find_boundaries: replace the boundaries, keeping the number of stages.
    """
    header = recording.header
    plain = predictor(header.sigmas, header.num_branches)
    if not find_boundaries:
        return plain
    found = find_stages(recording.stack(f"gram/{tap}"), header.sigmas, plain.taps, anchors)
    return predictor(header.sigmas, header.num_branches, boundaries=found)  # type: ignore[call-arg]


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
