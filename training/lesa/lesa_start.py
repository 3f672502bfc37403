"""The untrained LESA predictor of a fit, and the plain values that describe it in a checkpoint."""

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
