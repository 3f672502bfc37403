"""Fits of version 0.2 that others took in, for YAML files that name them."""

import warnings
from collections.abc import Sequence

from foreseer.training.l2p import L2PGramModule as L2PGramModule
from foreseer.training.l2p import L2PLeastSquares


class L2PPartsLeastSquares(L2PLeastSquares):
    """`L2PLeastSquares` with a partition.

    Args:
        recording: folder of the recording.
        anchors: steps at which the network runs, starting with 0.
        tap: recorded tap to forecast.
        partition: name of a partition recorded at this tap: `bands` or `groups`.
        ridge: shrinkage toward reuse, relative to the squared norm of each feature's part.

    Raises:
        ValueError: the recording lacks the partition, or the anchors do not fit its steps.
    """

    def __init__(
        self,
        recording: str,
        anchors: Sequence[int],
        tap: str = "hidden",
        partition: str = "bands",
        ridge: float = 1e-4,
    ) -> None:
        text = (
            "foreseer.training.parts.L2PPartsLeastSquares is foreseer.training.l2p.L2PLeastSquares "
            "with a partition now: change the name in your YAML."
        )
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        super().__init__(recording, anchors, tap, ridge, partition)
