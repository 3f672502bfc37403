"""A training that ends in a predictor file: what export, verdicts and `foreseer.fit` ask it for."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from foreseer.checkpoints.spec import PredictorSpec
from foreseer.predictors.base import Predictor
from foreseer.training.plumbing.resuming import Resumable
from foreseer.training.recorded import spec_of
from foreseer.trajectories.recording import Recording


class PredictorFit(Resumable):
    """A fit on recordings, whose checkpoint says by itself what predictor it holds.

    Attributes:
        fit_name: what it is called on the console and in its checkpoint.
        recordings: fitted on; the predictor takes anchors and grid of the first where none are
            given.
        tap: forecast.
        anchors: steps at which the network runs.
        predictor: being fitted; None while its sizes are not known.
        num_trajectories: fitted on, a buffer.
        sums: what else is kept of the trajectories beside the predictor.
    """

    fit_name = ""
    recordings: list[Recording]
    tap: str
    anchors: Sequence[int]
    predictor: Any
    num_trajectories: Tensor
    sums: Mapping[str, Tensor] = {}

    @property
    def recording(self) -> Recording:
        """The first recording."""
        return self.recordings[0]

    def deployed(self) -> Predictor:
        """The predictor as it forecasts, without what only training needs."""
        found: Predictor = self.predictor
        return found

    def spec(self) -> PredictorSpec:
        """What the predictor was fitted on."""
        first, *others = (recording.header for recording in self.recordings)
        return spec_of(first, self.tap, self.anchors, int(self.num_trajectories), others)

    def told(self, kind: type[Predictor], arguments: dict[str, Any] | None) -> dict[str, Any]:
        """The hyper-parameters of its checkpoints.

        Args:
            kind: class of the predictor.
            arguments: of its constructor; None where they are not known yet.
        """
        plain = arguments and {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in arguments.items()
        }
        return {
            "fit": self.fit_name,
            "recordings": [str(recording.folder) for recording in self.recordings],
            "digests": [recording.header.recipe_hash for recording in self.recordings],
            "anchors": list(self.anchors),
            "tap": self.tap,
            "class": kind.__name__,
            "arguments": plain,
        }
