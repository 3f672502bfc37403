"""Whether a recording may be added to a fit: what must be equal, and what may differ."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from foreseer.checkpoints.call_settings import as_settings, first_difference, with_weights_of
from foreseer.checkpoints.spec import SIGMA_TOLERANCE, PredictorSpec
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
    found, expected = _circumstances(header, spec.tap), _expected(spec)
    if partition is not None:
        name = gram.removeprefix("gram/")
        found["partition"] = header.recipe.get("partitions", {}).get(name)
        expected["partition"] = partition
    differing = [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in expected
        if found[name] != expected[name]
    ]
    guidance = as_settings(header.guidance)
    setting = first_difference(with_weights_of(spec.guidance, guidance), guidance)
    if setting is not None:
        expected_setting = spec.guidance.get(setting)
        differing.append(f"{setting} is {guidance.get(setting)}, expected {expected_setting}")
    pairs = zip(header.sigmas, spec.sigmas, strict=False)
    gap, step = max((abs(a - b), i) for i, (a, b) in enumerate(pairs))
    if gap > SIGMA_TOLERANCE:
        differing.append(
            f"step {step} has sigma {header.sigmas[step]:.6f}, expected {spec.sigmas[step]:.6f}"
        )
    if differing:
        raise ValueError(
            f"{recording.folder} cannot be added to the fit: {'; '.join(differing)}. Record with "
            "the predictor's settings, or fit a predictor of its own on the recording."
        )


def _circumstances(header: Header, tap: str) -> dict[str, Any]:
    return {
        "tap": tap if tap in header.taps else " ".join(header.taps),
        "number of steps": len(header.sigmas),
        "number of branches": header.num_branches,
        "guidance_scale": round(header.scheduler["guidance_scale"], 6),
        "steps of the branches": list(header.branch_steps),
        "first steps of the transformers": list(header.expert_steps),
        "scheduler": header.scheduler["class"],
        "dtype": header.dtype,
        "transformer class": header.host.get("class"),
        "transformer configuration": header.host.get("config_sha256"),
    }


def _expected(spec: PredictorSpec) -> dict[str, Any]:
    return {
        "tap": spec.tap,
        "number of steps": len(spec.sigmas),
        "number of branches": spec.num_branches,
        "guidance_scale": round(spec.guidance_scale, 6),
        "steps of the branches": list(spec.branch_steps),
        "first steps of the transformers": list(spec.expert_steps),
        "scheduler": spec.scheduler,
        "dtype": spec.dtype,
        "transformer class": spec.host.get("class"),
        "transformer configuration": spec.host.get("config_sha256"),
    }


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
