"""The normal equations beside a readout, from which its segments can be solved again with more.

They are optional: 577 directions and neighbours make 4 MB an anchor, many times the readout itself.
Shapes: Q outputs known at an anchor (one per branch and anchor), V = Q + 1, D numbers read for a
token and a constant, P elements of a token.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from foreseer.checkpoints.config import CheckpointError
from foreseer.checkpoints.format import SEGMENTS_FILE
from foreseer.checkpoints.spec import PredictorSpec
from foreseer.checkpoints.strict import MalformedFile, read_header
from foreseer.predictors.readout import Readout
from foreseer.predictors.solve import known_anchors
from foreseer.training.readout.segment import Segment, Total
from foreseer.training.shipped import DIGEST
from foreseer.trajectories.files.shards import CorruptShard, read_shard, shard_metadata, write_shard

AGAIN = "fit it with `keep_sums: true` and export it again."


def segment_tensors(segments: Mapping[int, Segment]) -> dict[str, Tensor]:
    """What of the segments does not lie in the readout, by anchor and name, on the CPU.

    Args:
        segments: by anchor.
    """
    found = {}
    for anchor, segment in segments.items():
        own = {"start": segment.start, "delta": segment.delta}
        for name, tensor in (own | dict(vars(segment.sums))).items():
            found[f"{anchor}/{name}"] = tensor.to("cpu", torch.float64)
    return found


def segments_of(tensors: Mapping[str, Tensor], predictor: Readout) -> dict[int, Segment]:
    """The segments of a readout, from `segment_tensors`.

    Args:
        tensors: by anchor and name.
        predictor: with what the segments read.
    """
    found = {}
    for name in tensors:
        anchor, _, kind = name.partition("/")
        if kind != "start":
            continue
        number = predictor.anchors.index(int(anchor))
        columns = slice((1 + predictor.reach(number)) * predictor.width)
        sums = Total(*(tensors[f"{anchor}/{part}"] for part in ("normal", "cross", "inner")))
        found[int(anchor)] = Segment(
            tensors[name],
            tensors[f"{anchor}/delta"],
            predictor.inner[number, :, columns],
            predictor.outer[number].double(),
            predictor.constant[number].double(),
            sums,
        )
    return found


def write_segments(folder: Path, tensors: Mapping[str, Tensor], digest: str) -> None:
    """Write the normal equations beside a readout.

    Args:
        folder: of the readout.
        tensors: from `segment_tensors`.
        digest: `recording_digest` of its spec.
    """
    write_shard(folder / SEGMENTS_FILE, dict(tensors), {DIGEST: digest})


def read_segments(folder: Path, predictor: Readout, spec: PredictorSpec) -> dict[int, Segment]:
    """The segments of a readout, from the file beside it; nothing in it is trusted.

    Args:
        folder: of the readout.
        predictor: the readout.
        spec: its.

    Raises:
        CheckpointError: there is no such file, or it is not that of the readout.
    """
    path = folder / SEGMENTS_FILE
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no {SEGMENTS_FILE}, expected the normal equations of its segments; "
            + AGAIN
        )
    try:
        found, expected = read_header(path), _shapes(predictor)
        if found != expected:
            raise MalformedFile(f"it holds {str(found)[:400]}, expected {str(expected)[:400]}")
        if (told := shard_metadata(path).get(DIGEST)) != spec.recording_digest:
            raise MalformedFile(
                f"the normal equations are of the recording {str(told)[:80]}, the readout of "
                f"{spec.recording_digest}"
            )
        tensors = read_shard(path)
    except (MalformedFile, CorruptShard) as error:
        raise CheckpointError(f"{path}: {error}; {AGAIN}") from error
    for name, tensor in tensors.items():
        square = name.endswith(("/normal", "/inner"))
        if not tensor.isfinite().all() or (square and (tensor.diagonal() < 0).any()):
            raise CheckpointError(f"{path}: {name} is no sum (NaN, Inf or below 0); {AGAIN}")
    return segments_of(tensors, predictor)


def _shapes(predictor: Readout) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor of the file of a readout."""
    anchors = predictor.anchors
    tokens = 9 if predictor.neighbours else 1
    width, patch = tokens * predictor.rank + 1, predictor.patch
    shapes: dict[str, tuple[int, ...]] = {}
    for anchor, end in zip(anchors, [*anchors[1:], predictor.num_steps], strict=True):
        if end == anchor + 1:
            continue  # nothing is forecast
        known = len(known_anchors(anchors, predictor.expert_steps, anchor)) * predictor.num_branches
        shapes |= {
            f"{anchor}/start": (known,),
            f"{anchor}/delta": (known,),
            f"{anchor}/normal": (width, width),
            f"{anchor}/cross": (width, known + 1, patch),
            f"{anchor}/inner": (known + 1, known + 1),
        }
    return {name: ("F64", list(shape)) for name, shape in shapes.items()}
