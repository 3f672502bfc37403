"""A schedule for SGLang's DPCache holds what its format asks for, and is refused for other runs.

The format is that of sglang-dpcache-schedule-v2, read in the source; the engine was not run.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import foreseer as fs
from foreseer.checkpoints.dpcache import calibrated_cost
from foreseer.checkpoints.spec import PredictorSpec
from foreseer.fit_commands import export
from foreseer.predictors import L2P

STEPS = 6
SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.1]
REQUEST: dict[str, Any] = {
    "pipeline": "QwenImagePipeline",
    "checkpoint": "790c92633540aa0cb11d9abf19eb46d861714758",
    "num_inference_steps": STEPS,
    "height": 64,
    "width": 64,
    "guidance_scale": 4.0,
    "do_classifier_free_guidance": True,
    "quality": "lossless",
    "attention_backend": "torch_sdpa",
    "dtype": "bfloat16",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "scheduler_config_sha256": "0" * 64,
    "timesteps": [1000 * sigma for sigma in SIGMAS],
    "sigmas": [*SIGMAS, 0.0],
}


def saved(folder: Path, anchors: tuple[int, ...] = (0, 1, 3)) -> str:
    predictor = L2P(STEPS, anchors, 2)
    predictor.spec = PredictorSpec(
        tap="hidden",
        anchors=anchors,
        sigmas=tuple(SIGMAS),
        host={"class": "T", "parameters": 1, "config_sha256": "", "weights_sha256": ""},
        scheduler="FlowMatchEulerDiscreteScheduler",
        num_branches=2,
        guidance_scale=1.0,
        dtype="bfloat16",
    )
    return str(fs.save(predictor, str(folder)))


def captured(path: Path, max_gap: int | None = None, **request: Any) -> str:
    errors = torch.arange(STEPS**3, dtype=torch.float64).reshape(STEPS, STEPS, STEPS)
    content = {
        "schema": "sglang-dpcache-calibration-capture-v1",
        "signature": {**REQUEST, **request},
        "max_gap": max_gap,
        "prompt": "a lighthouse",
        "seed": 1,
        "errors": errors,
    }
    torch.save(content, path)
    return str(path)


def test_a_schedule_goes_through_json_with_all_that_the_format_asks_for(tmp_path):
    out = tmp_path / "served" / "3.json"
    predictor, capture = saved(tmp_path / "p"), captured(tmp_path / "c.pt")
    export(predictor, str(out), "sglang-dpcache", capture)
    found = json.loads(out.read_text())
    assert found["schema"] == "sglang-dpcache-schedule-v2"
    assert found["request"] == REQUEST
    assert found["full_steps"] == [0, 1, 3] and found["num_full_steps"] == 3
    assert found["mandatory_full_steps"] == [0, 1]
    assert found["predictor"]["name"] == "final-feature-linear-extrapolation"
    assert found["source_commit"] and len(found["calibration"]["manifest_sha256"]) == 64
    errors = torch.load(capture, weights_only=True)["errors"]
    by_hand = errors[0, 1, 2] + errors[1, 3, 4] + errors[1, 3, 5]
    assert found["calibrated_cost"] == float(by_hand) == calibrated_cost([0, 1, 3], errors)
    asked = {"objective", "force_last_full", "max_gap", "schedule_method", "calibration"}
    assert asked <= set(found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sigmas": [1.0, 0.5, 0.0]}, "fitted on 6 steps, this run has 2"),
        ({"sigmas": [1.0, 0.9, *SIGMAS[2:], 0.0]}, "sigma grid differs from the fit's: step 1"),
        ({"scheduler": "UniPCMultistepScheduler"}, "found UniPCMultistepScheduler"),
        ({"do_classifier_free_guidance": False}, "2 guidance branch.* this run has 1"),
    ],
)
def test_a_schedule_for_another_run_is_refused(tmp_path, changes, words):
    capture = captured(tmp_path / "c.pt", **changes)
    with pytest.raises(fs.PredictorMismatch, match=words):
        export(saved(tmp_path / "p"), str(tmp_path / "o.json"), "sglang-dpcache", capture)
    assert not (tmp_path / "o.json").exists()


def test_anchors_and_captures_that_do_not_serve_are_refused(tmp_path):
    out, capture = str(tmp_path / "o.json"), captured(tmp_path / "c.pt")
    with pytest.raises(ValueError, match="steps 0 and 1 must be among them"):
        export(saved(tmp_path / "p", (0, 2, 4)), out, "sglang-dpcache", capture)
    good = saved(tmp_path / "q")
    with pytest.raises(ValueError, match="scored with max_gap=2"):
        export(good, out, "sglang-dpcache", captured(tmp_path / "g.pt", max_gap=2))
    with pytest.raises(ValueError, match="give its --capture"):
        export(good, out, "sglang-dpcache")
    torch.save({"schema": "other"}, tmp_path / "n.pt")
    with pytest.raises(ValueError, match="has the schema 'other'"):
        export(good, out, "sglang-dpcache", str(tmp_path / "n.pt"))
