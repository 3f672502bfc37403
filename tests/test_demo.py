"""The demonstration runs from recording to verdict, and goes on where it was interrupted."""

import json

import pytest
from tiny_pipelines import tiny_pipeline

from foreseer import demo
from foreseer.cli import main
from foreseer.training import inspect_command
from foreseer.training.rows import RULES

TWO = ("reuse", "taylor_1")  # formulas that are searched for, in place of all
FILES = (
    "bench/report.html",
    "bench/results.json",
    "fit/adam/fit_report.png",
    "fit/closed_loop/fit_report.png",
    "fit/lstsq/fit_report.png",
    "plots/layer_motion.png",
    "predictors/closed_loop/config.json",
    "samples.png",
)


@pytest.fixture
def stages(monkeypatch) -> list[str]:
    """The stages that ran, for a demonstration of three that do nothing."""
    ran: list[str] = []

    def note(name: str):
        return lambda folder, pipeline: (folder.mkdir(exist_ok=True), ran.append(name))

    fakes = {name: ("nothing", note(name)) for name in ("one", "two", "three")}
    monkeypatch.setattr(demo, "STAGES", fakes)
    monkeypatch.setattr(demo, "load_rows", lambda path: [])
    return ran


def test_finished_stages_are_not_run_again(stages, tmp_path, monkeypatch, capsys):
    def interrupt(folder, pipeline):
        raise KeyboardInterrupt

    whole = dict(demo.STAGES)
    monkeypatch.setitem(demo.STAGES, "two", ("is interrupted", interrupt))
    with pytest.raises(KeyboardInterrupt):
        demo.demo_command(str(tmp_path / "demo"), "somewhere")
    assert stages == ["one"]
    monkeypatch.setitem(demo.STAGES, "two", whole["two"])
    demo.demo_command(str(tmp_path / "demo"), "somewhere")
    assert stages == ["one", "two", "three"]
    assert "=== 1 of 3  one: nothing\n    done before" in capsys.readouterr().out


def test_a_folder_of_another_pipeline_is_refused(stages, tmp_path):
    demo.demo_command(str(tmp_path / "demo"), "somewhere")
    with pytest.raises(ValueError, match="demonstration on somewhere, asked for elsewhere"):
        demo.demo_command(str(tmp_path / "demo"), "elsewhere")
    assert stages == ["one", "two", "three"]


@pytest.mark.slow
def test_every_stage_runs_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(demo.EPOCHS, "adam", 3)
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:2])
    monkeypatch.setattr(inspect_command, "RULES", {name: RULES[name] for name in TWO})
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    out = tmp_path / "demo"
    main(["demo", "--out", str(out), "--pipeline", str(tmp_path / "pipeline")])
    printed = capsys.readouterr().out
    assert list(json.loads((out / "demo.json").read_text())["seconds"]) == list(demo.STAGES)
    missing = [name for name in FILES if not (out / name).exists()]
    assert not missing
    assert "At equal evaluations the best learned predictor is ahead" in printed
    assert f"report: {out / 'bench/report.html'}" in printed
