"""Add recordings to a readout through the normal equations beside it.

The old trajectories are needed no more. The new ones walk the anchors as in a fit: at every segment
their sums are added to the old ones, and rows and readout are solved for again. What a segment
reads (V) and the formula it starts at stay.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import Tensor

from foreseer.checkpoints.format import save_predictor
from foreseer.checkpoints.spec import PredictorSpec
from foreseer.evaluation.measure import check_pipeline
from foreseer.predictors.readout import Readout
from foreseer.training.readout.readout_fit import TAP, Detaching, ReadoutFit
from foreseer.training.readout.readout_runs import run_fit
from foreseer.training.readout.segment import Segment, SegmentFit, add_up, extend_segment
from foreseer.training.readout.shipped_sums import read_segments, segments_of, write_segments
from foreseer.training.shipped import (
    ShippedSums,
    check_extends,
    check_one_host,
    extended_spec,
    read_sums,
    write_sums,
)
from foreseer.trajectories.datamodule import ItemsDataModule
from foreseer.trajectories.recording import Recording


class ReadoutRefit(ReadoutFit):
    """Solve every segment of a readout again, with the trajectories of one more recording.

    Args:
        recording: folder of the recording, with states.
        old: the readout.
        fitted: its segments, by anchor.
        batch_size: trajectories per pipeline call.
    """

    old: Readout

    def __init__(
        self, recording: str, old: Readout, fitted: dict[int, Segment], batch_size: int = 16
    ) -> None:
        sizes: dict[str, Any] = {"rank": old.rank, "neighbours": old.neighbours, "past": old.past}
        sizes |= {"batch_size": batch_size, "keep_sums": True, "first_times": 0}
        super().__init__(recording, "", old.anchors, **sizes)
        self.first_time = old.first_time
        self.fitted = fitted
        self.gains: list[float] = []
        object.__setattr__(self, "old", old)  # whose state is not part of this one's

    def configure_callbacks(self) -> list[Callback]:
        """Leave the pipeline as it was; nothing is held out to judge on."""
        return [Detaching()]

    def _solve(self, anchor: int, end: int) -> SegmentFit:
        parts, guided = partial(self._parts, anchor, end), float(self.parts.guidance(anchor).sum())
        found = extend_segment(parts, self.fitted[anchor], self._grid(), add_up, guided)
        self.gains.append(found.gain_db)
        return found

    def _started(self, found: SegmentFit, anchor: int, end: int) -> Tensor:
        """The readout's rows less their movement from the formula."""
        known, old = self.parts.known(anchor), self.old
        rows = old.weight[:, anchor + 1 : end].clone()
        delta = self.fitted[anchor].delta.view(len(known), -1).T[:, None]
        rows[:, :, known] -= delta.to(rows)
        self.rows.weight[:, anchor + 1 : end] = rows
        return rows


@dataclass(frozen=True)
class RefitReadout:
    """A readout solved again.

    Args:
        predictor: the readout.
        spec: its, of all trajectories.
        sums: of the Grams of all trajectories.
        kept: what is kept of its segments.
        gains: by how many dB each segment's error on left-out prompts of the recording added last
            is below that of the readout before.
        added: trajectories of the recordings.
    """

    predictor: Readout
    spec: PredictorSpec
    sums: ShippedSums
    kept: dict[str, Tensor]
    gains: list[float]
    added: int

    def save(self, out: str | Path) -> Path:
        """Write the readout with its sums.

        Args:
            out: folder of the predictor.

        Returns:
            The folder.
        """
        folder = save_predictor(self.predictor, self.spec, out)
        write_sums(folder, [self.sums], self.spec.recording_digest)
        write_segments(folder, self.kept, self.spec.recording_digest)
        return folder


def refit_readout(
    old: Any, folder: Path, recordings: Sequence[str | Path], pipe: Any, batch_size: int = 16
) -> RefitReadout:
    """Solve a readout again on its own trajectories and those of recordings.

    Args:
        old: the readout, with `spec`.
        folder: where it lies, with its sums.
        recordings: folders, of one host; all with states.
        pipe: the pipeline, on the device and in the dtype to run it in.
        batch_size: trajectories per pipeline call.

    Raises:
        CheckpointError: the readout has no sums, or they are not its own.
        ValueError: a recording is of other circumstances, or some of its trajectories are in the
            sums already.
        PredictorMismatch: the pipeline is not the recorded one.
    """
    if not recordings:
        raise ValueError("no recordings were given; name the folders to add.")
    sums, fitted = read_sums(folder, old.spec), read_segments(folder, old, old.spec)
    opened = [Recording(place) for place in recordings]
    for recording in opened:
        check_extends(old.spec, recording, f"gram/{TAP}", None)
        check_one_host(opened[0], recording)
        sums = sums.plus(recording)
    predictor = old
    for recording in opened:
        module = ReadoutRefit(str(recording.folder), predictor, fitted, batch_size)
        check_pipeline(recording, pipe)
        run_fit(module, pipe, ItemsDataModule(str(recording.folder), 0.0))
        predictor = module.deployed()
        fitted = segments_of(module.sums, predictor)
    gains, added = module.gains, sum(map(len, opened))
    spec = extended_spec(
        old.spec,
        [recording.header for recording in opened],
        sums,
        {"segment_gain_db": sum(gains) / len(gains)},
    )
    spec = dataclasses.replace(spec, num_trajectories=old.spec.num_trajectories + added)
    return RefitReadout(predictor, spec, sums, module.sums, gains, added)
