"""Whether a recording may be added to a fit: what must be equal, and what may differ."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from foreseer.checkpoints.call_settings import as_settings, first_difference, with_weights_of
from foreseer.checkpoints.spec import SIGMA_TOLERANCE, PredictorSpec
from foreseer.training.recorded import spec_of
from foreseer.training.shipped import ShippedSums
from foreseer.trajectories.files.header import Header
from foreseer.trajectories.recording import Recording


def check_extends(
    spec: PredictorSpec, recording: Recording, gram: str, partition: dict[str, Any] | None
) -> None:
    """Raise unless a recording is of the circumstances of a fit; its weights may be others.

    Args:
        spec: of the fit.
        recording: to add.
        gram: name of the Grams fitted on.
        partition: description of the parts where the fit is on parts.

    Raises:
        ValueError: names all that differs, as found and as expected.
    """
    header = recording.header
    tap = spec.tap if spec.tap in header.taps else " ".join(header.taps)
    found = spec_of(header, tap, spec.anchors, len(recording))
    guidance = with_weights_of(spec.guidance, found.guidance)
    pairs = differences(found, dataclasses.replace(spec, guidance=guidance), WEIGHTS)
    if partition is not None:
        own = header.recipe.get("partitions", {}).get(gram.removeprefix("gram/"))
        if own != partition:
            pairs["partition"] = own, partition
    differing = [f"{name} is {here}, expected {there}" for name, (here, there) in pairs.items()]
    both = zip(header.sigmas, spec.sigmas, strict=False)
    gap, step = max((abs(a - b), i) for i, (a, b) in enumerate(both))
    if gap > SIGMA_TOLERANCE:
        differing.append(
            f"step {step} has sigma {header.sigmas[step]:.6f}, expected {spec.sigmas[step]:.6f}"
        )
    if differing:
        raise ValueError(
            f"{recording.folder} cannot be added to the fit: {'; '.join(differing)}. Record with "
            "the predictor's settings, or fit a predictor of its own on the recording."
        )


STEPS, EXPERTS, WEIGHTS = "number of steps", "first steps of the transformers", "weights"
FACTS: Mapping[str, Callable[[PredictorSpec], Any]] = {
    "tap": lambda spec: spec.tap,
    STEPS: lambda spec: len(spec.sigmas),
    "number of branches": lambda spec: spec.num_branches,
    "guidance_scale": lambda spec: round(spec.guidance_scale, 6),
    "steps of the branches": lambda spec: list(spec.branch_steps),
    EXPERTS: lambda spec: list(spec.expert_steps),
    "first branch": lambda spec: spec.first_branch,
    "scheduler": lambda spec: spec.scheduler,
    "dtype": lambda spec: spec.dtype,
    "transformer class": lambda spec: spec.host.get("class"),
    "transformer configuration": lambda spec: spec.host.get("config_sha256"),
    WEIGHTS: lambda spec: spec.host.get("weights_sha256"),
}
"""What a run is told by, beside its sigmas and settings; "" where an older file does not tell."""


def differences(
    found: PredictorSpec, expected: PredictorSpec, *left_out: str
) -> dict[str, tuple[Any, Any]]:
    """What two runs differ in, by name: as found and as expected.

    Args:
        found: of one run.
        expected: of the other.
        left_out: facts that may differ.
    """
    pairs = {n: (fact(found), fact(expected)) for n, fact in FACTS.items() if n not in left_out}
    if name := first_difference(expected.guidance, found.guidance):
        pairs[name] = found.guidance.get(name), expected.guidance.get(name)
    told = {name: pair for name, pair in pairs.items() if "" not in pair}
    return {name: (here, there) for name, (here, there) in told.items() if here != there}


def check_one_host(first: Recording, other: Recording) -> None:
    """Raise unless two recordings are of one host with equal weights.

    Raises:
        ValueError: they are not; the rows would be of neither.
    """
    if first.header.host != other.header.host:
        raise ValueError(
            f"{other.folder} is of the host {other.header.host}, {first.folder} of "
            f"{first.header.host}, expected one for all recordings added at once: the predictor is "
            "bound to it. Add one host's after the other's; the last one's is the predictor's."
        )


def extended_spec(
    old: PredictorSpec, headers: Sequence[Header], sums: ShippedSums, metrics: dict[str, float]
) -> PredictorSpec:
    """What a predictor is of, once recordings were added.

    Args:
        old: before.
        headers: of the recordings added.
        sums: of all trajectories.
        metrics: measured of the new predictor.
    """
    shapes = dict.fromkeys([*old.latent_shapes, *(tuple(h.latent_shape) for h in headers)])
    return dataclasses.replace(
        old,
        host=headers[0].host,
        guidance=with_weights_of(old.guidance, as_settings(headers[0].guidance)),
        recording_digest=sums.digest,
        num_trajectories=sums.count,
        metrics=metrics,
        latent_shapes=tuple(shapes) if old.latent_shapes else (),
    )
