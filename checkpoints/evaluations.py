"""Which anchors a run is given: those a predictor was fitted for, or others that it serves too."""

from collections.abc import Sequence

from foreseer.checkpoints.spec import PredictorSpec
from foreseer.errors import CheckpointError, PredictorMismatch
from foreseer.predictors.base import Predictor


def choose_anchors(
    spec: PredictorSpec, predictor: Predictor, anchors: Sequence[int] | None
) -> tuple[int, ...]:
    """The anchors to run with: those given, where the predictor serves them, else the fit's.

    Args:
        spec: what the predictor was fitted on.
        predictor: the predictor.
        anchors: as given by the caller; None asks for the fit's own.

    Raises:
        PredictorMismatch: the predictor was fitted for other anchors.
    """
    if anchors is None:
        return spec.anchors
    if tuple(anchors) != spec.anchors and not predictor.any_anchors:
        raise PredictorMismatch(
            f"the predictor was fitted for the anchors {list(spec.anchors)}, found "
            f"{list(anchors)}; fit one for these anchors or leave `anchors` out."
        )
    return tuple(anchors)


def check_evaluations(predictor: Predictor, evaluations: int | None) -> None:
    """Raise unless a predictor is for a number of evaluations, where one is named.

    Raises:
        CheckpointError: it is for another.
    """
    anchors = None if predictor.spec is None else predictor.spec.anchors
    if evaluations is not None and (anchors is None or len(anchors) != evaluations):
        own = "no number" if anchors is None else str(len(anchors))
        raise CheckpointError(
            f"the predictor is for {own} of evaluations, asked for {evaluations}; leave "
            "evaluations out, or name a predictor for several."
        )
