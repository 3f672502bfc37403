"""What a recording says to the fits on it: its taps, parts and circumstances."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.checkpoints.spec import VALUES, PredictorSpec, as_settings
from foreseer.checkpoints.strict import REPO_ID
from foreseer.integration.call_groups import CallGroups
from foreseer.predictors.partition import Partition
from foreseer.predictors.spectrum import partition_from
from foreseer.trajectories.files.header import Header
from foreseer.trajectories.gram import part_grams
from foreseer.trajectories.recording import Recording


def open_recording(folder: str, tap: str, experts: bool = False) -> Recording:
    """A recording that has a tap, see `check_tap`."""
    return check_tap(Recording(folder), tap, experts)


def check_tap(recording: Recording, tap: str, experts: bool = False) -> Recording:
    """The recording, which has a tap.

    Args:
        recording: any.
        tap: recorded tap.
        experts: whether it may be of a pipeline with several transformers.

    Raises:
        ValueError: it lacks the tap, or has several transformers.
    """
    header, folder = recording.header, recording.folder
    if len(header.expert_steps) > 1 and not experts:
        raise ValueError(
            f"{folder} was recorded of {len(header.expert_steps)} transformers that take over at "
            f"the steps {header.expert_steps}; the fit that takes them apart is L2PLeastSquares."
        )
    if tap not in header.taps:
        raise ValueError(f"{folder} has the taps {header.taps}, not {tap!r}; record it.")
    return recording


def spec_of(
    header: Header,
    tap: str,
    anchors: Sequence[int],
    num_trajectories: int,
    others: Sequence[Header] = (),
) -> PredictorSpec:
    """The circumstances of a fit on a recording with this header.

    Args:
        header: of the recording.
        tap: forecast tap.
        anchors: steps at which the network runs.
        num_trajectories: trajectories fitted on.
        others: headers of the other recordings, whose latents may have other shapes.
    """
    shapes = dict.fromkeys(tuple(each.latent_shape) for each in (header, *others))
    return PredictorSpec(
        tap=tap,
        anchors=tuple(anchors),
        sigmas=tuple(header.sigmas),
        host=header.host | base_model(header.pipeline) | told_values(header),
        scheduler=header.scheduler["class"],
        num_branches=header.num_branches,
        guidance_scale=header.scheduler["guidance_scale"],
        dtype=header.dtype,
        recording_digest="+".join(each.recipe_hash for each in (header, *others)),
        num_trajectories=num_trajectories,
        guidance=as_settings(header.guidance),
        latent_shapes=tuple(shapes),
        branch_steps=tuple(header.branch_steps),
        expert_steps=tuple(header.expert_steps),
        first_branch=header.first_branch,
    )


def told_values(header: Header) -> dict[str, str]:
    """The weights' digest in any layout, where the recording tells it."""
    return {VALUES: header.values_digest} if header.values_digest else {}


def base_model(pipeline: str) -> dict[str, str]:
    """What a card says a predictor is for: the hub's name of its pipeline, where it has one."""
    named = REPO_ID.fullmatch(pipeline) and not Path(pipeline).exists()
    return {"base_model": pipeline} if named else {}


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


def groups_of(
    partition: Partition | None, groups: Callable[[Mapping[str, Any]], Tensor] | None
) -> CallGroups | None:
    """The token groups of the runs that a fit makes on the `output` tap.

    Args:
        partition: that has rows of their own; None of whole features.
        groups: makes the group numbers of a pipeline call's arguments.

    Raises:
        ValueError: only one of them is there, or the partition is not of token groups.
    """
    if partition is None and groups is None:
        return None
    names = () if partition is None else partition.of_calls
    if not names or groups is None:
        kind = "no partition" if partition is None else partition.kind
        raise ValueError(
            f"found {kind} and groups {'not ' if groups is None else ''}given; a readout has rows "
            "of token groups, with both: partition='regions', as they were recorded, and groups=, "
            "the function that makes their numbers."
        )
    return CallGroups(groups, names, {"output"})


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
