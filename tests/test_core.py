"""What deploys and records needs no extra, and what needs one says so in one sentence."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from foreseer import extras
from foreseer.cli import main

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
OLDEST = PYPROJECT.parent / ".ci" / "oldest.txt"
BLOCKED = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(extras.OF_EXTRAS["train"])}))

from foreseer.checkpoints.format import load_predictor
from foreseer.cli import main
from foreseer.integration.forecasting import forecasting
from foreseer.integration.pipelines import load_pipeline

pipe = load_pipeline("zoo:fashion_dit")
with forecasting(pipe, load_predictor("zoo:fashion_dit_readout_8")) as run:
    pipe([0])
assert len(run.report().anchors) == 8

words = ["--pipeline", "zoo:fashion_dit", "--num_inference_steps", "4"]
main(["record", *words, "--num_trajectories", "2", "--batch_size", "2", "--out", "recording"])
main(["verify", "recording"])
words = ["--pipeline", "zoo:fashion_dit", "--predictor", "zoo:fashion_dit_readout_4"]
main(["generate", *words, "--class_labels", "[3]", "--compare", "true", "--out", "picture.png"])
for needy in ("fit", "bench --pipeline zoo:fashion_dit --out runs", "inspect recording"):
    try:
        main(needy.split())
    except (ImportError, SystemExit) as error:
        print("refused:", error)
"""


def test_drawing_recording_and_checking_run_without_the_extras(tmp_path):
    command = [sys.executable, "-c", BLOCKED]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "picture.png").stat().st_size > 1000
    said = done.stdout + done.stderr
    assert len(re.findall(r"needs the extra `train`, of which datasets, ", said)) == 3
    assert len(re.findall(r'pip install "foreseer\[train\]"', said)) == 3


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kan", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(extras.MissingExtra, match="^fits needs the extra .*pykan, matplotlib are"):
        extras.require("train", "fits")
    monkeypatch.setitem(sys.modules, "kan", sys)
    with pytest.raises(extras.MissingExtra, match="of which matplotlib is not installed"):
        extras.require("train", "fits")


def test_a_training_command_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises((extras.MissingExtra, SystemExit), match="foreseer fit needs the extra"):
        main(["fit", "--help"])


@pytest.mark.skipif(not PYPROJECT.exists(), reason="needs pyproject.toml")
def test_the_extras_are_those_of_the_package():
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    for extra, packages in extras.OF_EXTRAS.items():
        names = {re.split(r"[^\w-]", line)[0] for line in declared[extra]}
        assert names - {"fsspec"} == set(packages.values())


@pytest.mark.skipif(not OLDEST.exists(), reason="needs the checkout")
def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    pins = OLDEST.read_text().splitlines()[1:]
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    bounds = {re.sub(r"\[.*?\]", "", each).replace(">=", "==") for each in declared}
    assert set(pins) == bounds
