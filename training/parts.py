"""L2P with a row per part, in closed form from the Grams of the parts.

The parts are orthogonal, so that the squared error of a forecast is the sum of theirs and every
part is fitted on its own Grams by `least_squares_rows`.
Shapes: n trajectories, P parts, S sampling steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.checkpoints.spec import PredictorSpec
from foreseer.predictors.linear import L2P, fitted_rows
from foreseer.predictors.partition import Partition
from foreseer.predictors.spectrum import partition_from
from foreseer.training.closed_form import ClosedForm, HeldOut
from foreseer.training.fit_figures import HELD_OUT, log_figures
from foreseer.training.l2p import open_recording, spec_of
from foreseer.trajectories.files.header import Header
from foreseer.trajectories.gram import part_grams, relative_errors
from foreseer.trajectories.recording import Recording


def recorded_partition(header: Header, tap: str, name: str) -> Partition:
    """A partition whose Grams were recorded.

    Raises:
        ValueError: there is none of this name at this tap.
    """
    told = header.recipe.get("partitions", {})
    if f"{tap}/{name}" not in told:
        raise ValueError(
            f"the recording has the partitions {sorted(told)}, not '{tap}/{name}'; record with "
            "--bands or --groups."
        )
    return partition_from(told[f"{tap}/{name}"])


def stack_part_grams(
    recording: Recording, tap: str, partition: Partition, items: Sequence[int] | None = None
) -> Float[Tensor, "n branches P S S"]:
    """Grams of the parts, as recorded where they were, else from the stored features.

    Args:
        recording: the recording.
        tap: recorded tap.
        partition: the parts.
        items: which trajectories; None takes all.

    Raises:
        ValueError: the recording has neither these Grams nor all features.
    """
    told = recording.header.recipe.get("partitions", {})
    for name, description in told.items():
        if name.partition("/")[0] == tap and description == partition.describe():
            return recording.stack(f"gram/{name}", items)
    if recording.header.features != "full":
        raise ValueError(
            f"{recording.folder} has the partitions {sorted(told)} and features: "
            f"{recording.header.features}; record with this partition or with features: full."
        )
    name = f"feature/{tap}"
    chosen = recording.items if items is None else items
    grams = [part_grams(recording.load(item, [name])[name], partition) for item in chosen]
    return torch.stack(grams)


class L2PPartsLeastSquares(ClosedForm):
    """The rows of least summed squared error per part, in closed form (set `max_epochs: 1`).

    Its data are a `GramDataModule` with the tap `<tap>/<partition>`.

    Args:
        recording: folder of the recording.
        anchors: steps at which the network runs, starting with 0.
        tap: recorded tap to forecast.
        partition: name of a partition recorded at this tap: `bands` or `groups`.
        ridge: shrinkage toward reuse, relative to the squared norm of each feature's part.

    Raises:
        ValueError: the recording lacks the partition, or the anchors do not fit its steps.
    """

    fit_name = "parts_lstsq"

    def __init__(
        self,
        recording: str,
        anchors: Sequence[int],
        tap: str = "hidden",
        partition: str = "bands",
        ridge: float = 1e-4,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.recording = open_recording(recording, tap)
        header = self.recording.header
        parts = recorded_partition(header, tap, partition)
        self.save_hyperparameters(
            {
                "recording": recording,
                "anchors": list(anchors),
                "tap": tap,
                "partition": partition,
                "fit": self.fit_name,
            }
        )
        self.tap = tap
        self.ridge = ridge
        self.predictor = L2P(len(header.sigmas), anchors, header.num_branches, partition=parts)
        self.num_trajectories: Tensor
        self.register_buffer("num_trajectories", torch.tensor(0))

    def spec(self) -> PredictorSpec:
        """What the predictor was fitted on."""
        num_trajectories = int(self.num_trajectories)
        return spec_of(self.recording.header, self.tap, self.predictor.anchors, num_trajectories)

    def on_fit_start(self) -> None:
        """Count the trajectories fitted on."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.num_trajectories.fill_(len(data.train_items))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Solve for the rows of every part; the error is that of all trajectories together."""
        rows = fitted_rows(batch["gram"].sum(0), self.predictor.anchors, self.ridge)
        self.predictor.set_rows(rows)
        error = relative_errors(batch["gram"], rows).mean()
        self.log("train/open_loop_error", error, batch_size=1)

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch's errors."""
        self.held_out = HeldOut()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Held-out error."""
        self.held_out.add(relative_errors(batch["gram"], self.predictor.weight))

    def on_validation_epoch_end(self) -> None:
        """Log it, and draw it; parts have rows of their own, which are not drawn."""
        errors = self.held_out.by_step
        self.log("val/open_loop_error", errors.mean())
        log_figures(self, self.predictor.anchors, {HELD_OUT: errors})
