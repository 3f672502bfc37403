"""Least squares on a recording as a plain function: a sum of Grams, a solve, a predictor."""

from collections.abc import Sequence

from foreseer.predictors.linear import L2P, fitted_rows
from foreseer.training.recorded import check_tap, recorded_partition, spec_of
from foreseer.trajectories.gram import sum_grams
from foreseer.trajectories.recording import Recording


def fit_rows(
    recording: Recording,
    anchors: Sequence[int],
    tap: str = "output",
    ridge: float = 1e-4,
    partition: str | None = None,
    items: Sequence[int] | None = None,
) -> L2P:
    """The rows of least summed squared error on anchors, shrunk toward reuse, with their spec.

    Args:
        recording: with Grams of the tap.
        anchors: steps at which the network runs, the first of every transformer among them.
        tap: recorded tap to forecast.
        ridge: strength relative to each feature's squared norm, >= 0.
        partition: name of a partition recorded at this tap; None fits the whole feature.
        items: trajectories to fit on; None takes all.

    Raises:
        ValueError: the recording lacks the tap or the partition, or the anchors do not fit it.
    """
    header = check_tap(recording, tap, experts=True).header
    parts = None if partition is None else recorded_partition(header, tap, partition)
    sizes = len(header.sigmas), anchors, header.num_branches, header.expert_steps
    predictor = L2P(*sizes, parts)
    chosen = recording.items if items is None else list(items)
    name = f"gram/{tap}" if partition is None else f"gram/{tap}/{partition}"
    total = sum_grams(recording, [name], chosen)[name]
    total = total.unsqueeze(-3) if partition is None else total
    predictor.set_rows(fitted_rows(total, anchors, ridge, header.expert_steps))
    predictor.spec = spec_of(header, tap, anchors, len(chosen))
    return predictor
