"""Every mistake of a new user's first afternoon: one paragraph that says what to do, no traceback.

Each case has words of its own, and runs in this process.
"""

import re
from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_pipeline

import foreseer as fs
from foreseer import cli
from foreseer.cli import main
from foreseer.words import is_told

STEPS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline, another one, a recording, a predictor and an empty folder."""
    folder = tmp_path_factory.mktemp("world")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "pipe")
    other = tiny_pipeline(3)
    other.save_pretrained(folder / "other")
    settings = {"guidance_scale": 3.0, "num_inference_steps": STEPS}
    recording = fs.record(
        str(folder / "pipe"), None, str(folder / "recording"), num_trajectories=16, **settings
    )
    fs.fit(recording, 3, method="lstsq", tap="output", out=str(folder / "predictor"))
    (folder / "empty").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.tex").write_text("mine")
    (folder / "wrong.yaml").write_text("pipeline: pipe\nnum_inference_step: 4\n")
    shipped = (Path(cli.__file__).parent / "configs" / "fit" / "readout.yaml").read_text()
    (folder / "fit.yaml").write_text(shipped.replace("    anchors:", "    anchros:"))
    return folder


@pytest.fixture
def told(world, monkeypatch, capsys):
    """Run a command; its exit code and what it said, which must be a paragraph."""
    monkeypatch.chdir(world)

    def call(line: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        code = stop.value.code
        text = capsys.readouterr().err
        if isinstance(code, str):  # Python prints it on stderr and exits with code 1
            code, text = 1, text + code
        assert "Traceback" not in text
        return code, text

    return call


GENERATE = "generate --pipeline pipe --class_labels [0]"
FIT = "fit --recording recording"
MISTAKES = {
    "the pipeline's path is misspelled": (
        "generate --pipeline pip",
        "no folder pip; bundled are zoo:.*did you mean 'pipe'",
    ),
    "the pipeline's path is misspelled, and may be a name of the hub": (
        "generate --pipeline zoo/pipe",
        "no folder zoo/pipe here, and the hub's zoo/pipe could not be had",
    ),
    "a bundled pipeline is misspelled": (
        "generate --pipeline zoo:fashion_dti",
        "did you mean 'zoo:fashion_dit'",
    ),
    "the predictor's path is misspelled": (
        f"{GENERATE} --predictor predictr",
        "no folder predictr; .*did you mean 'predictor'",
    ),
    "the predictor's path has a word too many": (
        f"{GENERATE} --predictor runs/predictor",
        "no folder runs/predictor here, and revision main .*could not be had from the hub",
    ),
    "the predictor is another model's": (
        "generate --pipeline other --class_labels [0] --predictor predictor",
        "fitted on another host: number of parameters is .*Record and fit for this model",
    ),
    "the number of steps is wrong": (
        f"{GENERATE} --predictor predictor --num_inference_steps 5",
        "fitted on 8 steps, this run has 5; set num_inference_steps=8",
    ),
    "the guidance is wrong": (
        f"{GENERATE} --predictor predictor --guidance_scale 7",
        "fitted at guidance_scale 3, this run has 7; record and fit at 7",
    ),
    "a pipeline of classes is given prompts": (
        "generate --pipeline pipe --prompts octopus",
        "takes no prompts; it takes class_labels",
    ),
    "the prompts are in no file": (
        "record --pipeline pipe --out new --prompts promts.txt",
        "there is no file promts.txt; expected one with a prompt per line",
    ),
    "an option is misspelled": (
        f"{GENERATE} --predictr predictor",
        "unrecognized arguments: --predictr predictor; did you mean 'predictor'",
    ),
    "an option of a fit is misspelled": (
        f"{FIT} --evalutions 3",
        "unrecognized arguments: --evalutions 3; did you mean 'evaluations'",
    ),
    "a key of a file is misspelled": (
        "generate --config wrong.yaml",
        "Option 'num_inference_step' is not accepted; did you mean 'num_inference_steps'",
    ),
    "a key of a fit's file is misspelled": (
        "fit --config fit.yaml",
        "^foreseer fit: error: Option 'anchros' is not accepted; did you mean 'anchors'",
    ),
    "the pipeline is an empty folder": (
        "generate --pipeline empty",
        "empty has no model_index.json; expected a diffusers pipeline",
    ),
    "the recording is an empty folder": ("inspect empty", "empty has no recording.json"),
    "the predictor is an empty folder": (
        f"{GENERATE} --predictor empty",
        "empty.* has no config.json",
    ),
    "what is fitted on is an empty folder": (
        "fit --recording empty --evaluations 3",
        "empty has no recording.json",
    ),
    "what a file's fit is on is an empty folder": (
        "fit --config l2p_lstsq --model.init_args.recording empty --data.init_args.folder empty",
        "empty has no recording.json",
    ),
    "a recording goes on with other settings": (
        "record --pipeline pipe --out recording --num_inference_steps 8 --batch_size 4",
        "another recipe: batch_size is 8, asked for 4.*another folder",
    ),
    "a predictor goes into a folder that holds a recording": (
        f"{FIT} --evaluations 3 --method lstsq --out recording",
        "recording holds .*recording.json.*expected an empty folder, or .* of a predictor",
    ),
    "a predictor goes into a folder that holds something else": (
        f"{FIT} --evaluations 3 --method lstsq --out notes",
        "notes holds thesis.tex",
    ),
    "there is no GPU": (
        "generate --pipeline pipe --device cuda",
        "device is 'cuda', and torch .* finds no GPU here; leave device out",
    ),
    "there is no such device": (
        "generate --pipeline pipe --device gpu",
        "device is 'gpu', expected",
    ),
    "a tap does not exist": (
        "record --pipeline pipe --out new --taps [attn]",
        r"unknown taps \['attn'\]; this host has output, hidden",
    ),
    "a tap has no brackets": (
        "record --pipeline pipe --out new --taps attn",
        r"unknown taps \['attn'\]; this host has output, hidden",
    ),
    "a bench has more evaluations than steps": (
        "bench --pipeline pipe --out new --budgets 30 --num_inference_steps 8",
        r"the budgets are \[30\], expected",
    ),
    "an inspection has more evaluations than steps": (
        "inspect recording --budgets 30",
        r"the budgets \[30\] do not suit recording, whose runs have 8 steps; expected .* 1 to 7",
    ),
    "a fit has more evaluations than steps": (
        f"{FIT} --evaluations 30",
        "evaluations is 30, expected 1 to 7",
    ),
    "a file's fit has an anchor behind the last step": (
        "fit --config l2p_lstsq --model.init_args.recording recording --data.init_args.folder "
        "recording --trainer.logger false",
        "anchors end at 43.*below num_steps=8",
    ),
    "a dtype is misspelled": (f"{GENERATE} --dtype bf16", "'bfloat16'.*Got value: bf16"),
    "a dtype of a search is misspelled": (
        "search --recording recording --pipeline pipe --dtype bf16",
        "dtype is 'bf16', expected 'float32', 'bfloat16' or 'float16'",
    ),
    "a command is misspelled": (
        "recrod --out new",
        "unknown command 'recrod'; did you mean 'record'",
    ),
    "a method is misspelled": (f"{FIT} --evaluations 3 --method lstq", "did you mean 'lstsq'"),
    "a predictor that is not there is published": (
        "push --folder predictr --repo_id a/b",
        "no folder predictr",
    ),
}
EXITS = {"error:": 2, "unknown command": 2}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_paragraph(mistake, told, monkeypatch):
    if mistake == "there is no GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line, expected = MISTAKES[mistake]
    code, text = told(line)
    assert re.search(expected, text, re.DOTALL | re.MULTILINE)
    assert code == next((each for word, each in EXITS.items() if word in text), 1)
    if "unknown command" not in text:  # which lists the commands
        said = [each for each in text.splitlines() if each.strip() and "it/s]" not in each]
        assert len(said) <= 3


def test_debug_shows_where_an_error_comes_from(world, monkeypatch):
    monkeypatch.chdir(world)
    with pytest.raises(fs.RecordingError, match="empty has no recording.json"):
        main(["inspect", "empty", "--debug"])


def test_an_error_that_is_not_ours_is_not_hidden(monkeypatch):
    def broken(**given):
        return int("x")

    monkeypatch.setitem(cli.FUNCTIONS, "merge", broken)
    monkeypatch.setattr(cli, "run_function", lambda function, words: function())
    with pytest.raises(ValueError, match="invalid literal"):
        main(["merge"])


def test_what_is_told_is_ours_by_kind_or_by_place():
    assert is_told(fs.CheckpointError("x")) and not is_told(ValueError("x"))
    try:
        fs.schedules.uniform(9, 8)
    except ValueError as error:
        assert is_told(error)


# ----------------------------------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("record --pipeline pipe --out new", "the same command goes on from there"),
        ("generate --pipeline pipe", "the same command starts anew"),
        (f"{FIT} --evaluations 3 --method lstsq", "the same command starts anew"),
        (
            "fit --config l2p_lstsq --model.init_args.recording recording --data.init_args.folder "
            "recording --model.init_args.anchors [0,3] --trainer.logger false",
            "the same command goes on from there",
        ),
    ],
)
def test_an_interruption_is_one_line_that_says_how_to_go_on(command, said, told, monkeypatch):
    def interrupt(*told, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("foreseer.trajectories.recorder.generate_batch", interrupt)
    monkeypatch.setattr("foreseer.evaluation.generate.draw_whole", interrupt)
    monkeypatch.setattr("foreseer.training.l2p.L2PLeastSquares.training_step", interrupt)
    code, text = told(command)
    assert code == 130
    (line,) = [each for each in text.splitlines() if "interrupted" in each]
    assert line.startswith("foreseer ") and said in line
