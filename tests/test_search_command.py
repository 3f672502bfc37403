"""`foreseer search` runs the pipeline as it was recorded."""

import json
import re

import pytest
import torch
from tiny_pipelines import tiny_pipeline

import foreseer as fs
from foreseer.cli import main

STEPS = 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_every_step_an_anchor_the_recorded_samples_come_back(dtype, tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    pipeline, recording = ["--pipeline", str(tmp_path / "pipe")], str(tmp_path / "r")
    steps = ["--num_trajectories", "3", "--num_inference_steps", str(STEPS)]
    main(["record", *pipeline, "--out", recording, *steps, "--dtype", dtype])
    budgets = ["--num_anchors", f"[{STEPS},3]", "--methods", "[reuse|output]", "--num_moves", "0"]
    words = ["search", *pipeline, "--recording", recording, *budgets]
    main([*words, "--out", str(tmp_path / "s.json")])
    errors = [float(each) for each in re.findall(r"at (\S+) dB", capsys.readouterr().out)]
    assert errors[0] == -120 and errors[1] > -100  # the floor of the measure is 1e-12
    found = json.loads((tmp_path / "s.json").read_text())
    assert found[f"reuse|output|{STEPS}"] == list(range(STEPS))
    assert len(found["reuse|output|3"]) == 3


def test_a_readout_is_searched_with_the_readout_in_the_loop(tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    pipeline, recording = ["--pipeline", str(tmp_path / "pipe")], str(tmp_path / "r")
    steps = ["--num_trajectories", "16", "--num_inference_steps", str(STEPS)]
    main(["record", *pipeline, "--out", recording, *steps])
    words = ["search", *pipeline, "--recording", recording, "--num_anchors", "[3]"]
    words += ["--methods", "[readout|output]", "--num_samples", "16", "--num_moves", "1"]
    main([*words, "--out", str(tmp_path / "s.json")])
    found = json.loads((tmp_path / "s.json").read_text())["readout|output|3"]
    printed = capsys.readouterr().out
    assert f"readout|output|3: {' '.join(map(str, found))} at -" in printed
    assert "verdict" not in printed  # a fit among many says nothing


def test_another_pipeline_and_another_search_are_refused(tmp_path):
    pipe, out = tiny_pipeline(), str(tmp_path / "s.json")
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    places = [
        fs.record(pipe, None, str(tmp_path / n), num_trajectories=2, **settings) for n in "ab"
    ]
    options = {"num_anchors": [3], "methods": ["reuse|output"], "num_moves": 0}
    found = fs.search(places[0], pipe, out, **options)
    assert fs.search(places[0], pipe, out, **options) == found
    with pytest.raises(fs.RecordingError, match="lists of another recording"):
        fs.search(places[0], pipe, out, **options, num_samples=1)
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(1.0)
    with pytest.raises(fs.PredictorMismatch, match="was recorded on another host: weights"):
        fs.search(places[0], pipe, str(tmp_path / "t.json"), **options)
