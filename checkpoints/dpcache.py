"""Schedules of SGLang Diffusion's DPCache: our anchors, for a request that the engine captured.

The format is `sglang-dpcache-schedule-v2` of its runtime/cache/dpcache.py, which extrapolates the
last feature linearly from the two latest anchors. What a schedule is for is read from a
calibration capture, which the engine writes for a request with `dpcache_calibration`.
Shapes: S sampling steps.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer import __version__
from foreseer.checkpoints.format import load_predictor
from foreseer.checkpoints.spec import PredictorSpec, check_grid
from foreseer.errors import PredictorMismatch

CAPTURE = "sglang-dpcache-calibration-capture-v1"
SCHEDULE = "sglang-dpcache-schedule-v2"
PREDICTOR = {
    "name": "final-feature-linear-extrapolation",
    "order": 1,
    "arithmetic": "feature-dtype-elementwise-v1",
}
OBJECTIVE = "pact-mean-abs-final-feature-predicted-steps-only-v1"


def export_dpcache(predictor: str, capture: str, out: str) -> None:
    """Write the anchors of a predictor as a schedule.

    Args:
        predictor: its folder, `zoo:<name>` or hub name; of the recorded model, at its steps.
        capture: calibration capture of a request (.pt), scored without `max_gap`.
        out: JSON file to write; the engine serves a folder of them.

    Raises:
        PredictorMismatch: the request has other steps, sigmas, guidance branches or scheduler.
        ValueError: the capture is none, or the anchors are none that DPCache can run.
    """
    spec: PredictorSpec = load_predictor(predictor).spec
    found = read_capture(Path(capture))
    request = found["signature"]
    check_grid(spec, [float(sigma) for sigma in request["sigmas"][:-1]])
    spec.check_guidance(1 + bool(request["do_classifier_free_guidance"]), None)
    if request["scheduler"] != spec.scheduler:
        raise PredictorMismatch(
            f"the predictor was fitted under {spec.scheduler}, found {request['scheduler']}; "
            "use that scheduler or record and fit under this one."
        )
    schedule = schedule_for(spec.anchors, found)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(schedule, indent=1) + "\n")
    print(f"{out}: {len(spec.anchors)} of {len(spec.sigmas)} steps in full")


def read_capture(path: Path) -> dict[str, Any]:
    """What a calibration capture holds; it is read without running code.

    Raises:
        ValueError: it is none, or was scored with `max_gap`, so that errors are missing.
    """
    found = torch.load(path, map_location="cpu", weights_only=True)
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != CAPTURE:
        raise ValueError(f"{path} has the schema {schema!r}, expected a capture of {CAPTURE!r}.")
    if found["max_gap"] is not None:
        raise ValueError(
            f"{path} was scored with max_gap={found['max_gap']}, which leaves errors out; capture "
            "the request again without it."
        )
    return dict(found)


def schedule_for(anchors: Sequence[int], capture: dict[str, Any]) -> dict[str, Any]:
    """The schedule of these anchors for a captured request.

    Args:
        anchors: steps that run in full.
        capture: see `read_capture`.

    Raises:
        ValueError: steps 0 and 1 are not among the anchors.
    """
    lead = next((i for i, step in enumerate(anchors) if step != i), len(anchors))
    if lead < 2:
        raise ValueError(
            f"the anchors are {list(anchors)}; DPCache extrapolates from two, so steps 0 and 1 "
            "must be among them. Fit or search with anchors that begin so."
        )
    manifest = json.dumps([[capture["prompt"], capture["seed"]]])
    return {
        "schema": SCHEDULE,
        "schedule_method": "foreseer",
        "predictor": dict(PREDICTOR),
        "objective": OBJECTIVE,
        "source_commit": f"foreseer {__version__}",
        "request": dict(capture["signature"]),
        "mandatory_full_steps": list(range(lead)),
        "force_last_full": False,
        "max_gap": None,
        "num_full_steps": len(anchors),
        "full_steps": list(anchors),
        "calibrated_cost": calibrated_cost(anchors, capture["errors"]),
        "calibration": {
            "manifest_sha256": hashlib.sha256(manifest.encode()).hexdigest(),
            "num_samples": 1,
            "scored_max_gap": None,
        },
    }


def calibrated_cost(anchors: Sequence[int], errors: Float[Tensor, "S S S"]) -> float:
    """Sum of the captured errors of the steps that are extrapolated, from the anchors before each.

    Args:
        anchors: steps that run in full, 0 and 1 among them.
        errors: of step t from the anchors i and j, at [i, j, t].

    Raises:
        ValueError: one of them is not finite.
    """
    total = 0.0
    for step in range(errors.shape[0]):
        if step not in anchors:
            i, j = [anchor for anchor in anchors if anchor < step][-2:]
            total += float(errors[i, j, step])
    if not math.isfinite(total):
        raise ValueError("the capture holds errors that are not finite; capture the request again.")
    return total
