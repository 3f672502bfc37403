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


def test_published_searches_are_options_that_say_what_they_spend(tmp_path, capsys):
    pipe = tiny_pipeline()
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    place = fs.record(pipe, None, str(tmp_path / "r"), num_trajectories=3, **settings)
    options = {"num_anchors": [4], "methods": ["taylor_1|hidden"], "num_moves": 2}

    def search(algorithm: str, **more) -> tuple[list[int], float, list[int]]:
        out = str(tmp_path / f"{algorithm}{len(more)}.json")
        found = fs.search(place, pipe, out, algorithm=algorithm, **options, **more)
        told = re.search(
            r"at (\S+) dB; (\d+) lists tried on (\d+) samples, (\d+) net", capsys.readouterr().out
        )
        error, *counts = told.groups()
        return found["taylor_1|hidden|4"], float(error), [int(count) for count in counts]

    ours, error, (lists, samples, evaluations) = search("beam", num_samples=2)
    assert samples == 2 and evaluations == lists * 2 * 4
    planned, planned_error, counts = search("dpcache", num_samples=2)
    assert counts in ([1, 2, 8], [2, 2, 16]) and planned_error >= error
    annealed, annealed_error, (lists, samples, evaluations) = search("budcache", num_samples=2)
    assert lists == 10 and evaluations == 80  # all there are: 0 and three of five
    assert annealed_error <= min(error, planned_error)
    assert search("budcache")[2] == [10, 1, 40]  # of one sample, as published
    with pytest.raises(fs.RecordingError, match="or of another algorithm"):
        fs.search(place, pipe, str(tmp_path / "beam1.json"), algorithm="dpcache", **options)
    with pytest.raises(ValueError, match="algorithm is 'best', expected one of beam, dpcache, bud"):
        fs.search(place, pipe, str(tmp_path / "t.json"), algorithm="best", **options)
    with pytest.raises(ValueError, match="'ab2' is none"):
        other = {**options, "methods": ["ab2|none"]}
        fs.search(place, pipe, str(tmp_path / "t.json"), algorithm="dpcache", **other)


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
