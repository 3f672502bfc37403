"""The demonstration shows pictures first, then runs to a verdict, and goes on where it stopped."""

import json
import re

import pytest
from PIL import Image
from tiny_pipelines import tiny_pipeline

from foreseer import commands, demo
from foreseer.cli import main
from foreseer.demo import Stage
from foreseer.evaluation import offline
from foreseer.predictors.rules import RULES

TWO = ("reuse", "taylor_1")  # formulas that are searched for, in place of all
FILES = (
    "bench/report.html",
    "bench/results.json",
    "clothes.png",
    "closed_loop.png",
    "own.png",
    "plots/layers_change.png",
    "predictors/6/config.json",
    "predictors/closed_loop/config.json",
)


@pytest.fixture
def stages(monkeypatch) -> list[str]:
    """The stages that ran, for a demonstration of three that do nothing, four with --all."""
    ran: list[str] = []

    def note(name: str) -> Stage:
        return Stage(
            name, 1, lambda folder, pipeline: (folder.mkdir(exist_ok=True), ran.append(name))
        )

    monkeypatch.setattr(demo, "STAGES", {name: note(name) for name in ("one", "two", "three")})
    monkeypatch.setattr(demo, "MORE", {"four": note("four")})
    monkeypatch.setattr(demo, "load_rows", lambda path: [])
    return ran


def test_finished_stages_are_not_run_again(stages, tmp_path, monkeypatch, capsys):
    def interrupt(folder, pipeline):
        raise KeyboardInterrupt

    whole = demo.STAGES["two"]
    monkeypatch.setitem(demo.STAGES, "two", Stage("two", 1, interrupt))
    with pytest.raises(KeyboardInterrupt):
        commands.demo(str(tmp_path / "demo"), "somewhere")
    assert stages == ["one"]
    monkeypatch.setitem(demo.STAGES, "two", whole)
    commands.demo(str(tmp_path / "demo"), "somewhere")
    assert stages == ["one", "two", "three"]
    said = capsys.readouterr().out
    assert "=== 1 of 3: one\n    done before" in said
    assert "=== 3 of 3: three\n    takes about 1 s on an idle processor" in said
    commands.demo(str(tmp_path / "demo"), "somewhere", all=True)
    assert stages == ["one", "two", "three", "four"]


def test_a_folder_of_another_pipeline_is_refused(stages, tmp_path):
    commands.demo(str(tmp_path / "demo"), "somewhere")
    with pytest.raises(ValueError, match="demonstration on somewhere, asked for elsewhere"):
        commands.demo(str(tmp_path / "demo"), "elsewhere")
    assert stages == ["one", "two", "three"]


def test_pictures_come_first_and_the_rest_is_announced_to_be_short():
    assert next(iter(demo.STAGES)) == "pictures"
    assert demo.STAGES["pictures"].seconds < 60
    assert sum(stage.seconds for stage in demo.STAGES.values()) < 60 + 4 * 60
    pictures = demo.BUNDLED.values()
    assert {model for model, *_ in pictures} == {"zoo:emoji_flux_2", "zoo:fashion_dit"}


@pytest.mark.slow
def test_every_stage_runs_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    bundled = {"clothes": ("zoo:fashion_dit", "classes into pictures", (6, 4))}
    monkeypatch.setattr(demo, "BUNDLED", bundled)
    monkeypatch.setattr(demo, "LABELS", (0, 1))
    monkeypatch.setattr(demo, "BUDGETS", (8, 6))
    monkeypatch.setattr(demo, "NUM_RECORDED", 16)
    monkeypatch.setattr(demo, "NUM_COMPARED", 4)
    monkeypatch.setattr(demo, "CLOSED_LOOP_ANCHORS", (0, 25))
    monkeypatch.setattr(offline, "RULES", {name: RULES[name] for name in TWO})
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    out = tmp_path / "demo"
    main(["demo", "--out", str(out), "--pipeline", str(tmp_path / "pipeline"), "--all"])
    printed, noise = capsys.readouterr()
    done = list(json.loads((out / "demo.json").read_text())["seconds"])
    assert done == [*demo.STAGES, *demo.MORE]
    missing = [name for name in FILES if not (out / name).exists()]
    assert not missing
    assert "evaluations use " in printed and "\noverall " in printed
    shown = r"    (\d+) of 50 steps computed, [\d.]+ s, [\d.]+ times faster, [\d.]+ dB"
    assert re.findall(shown, printed) == ["6", "4", "8", "6", "8", "2"]
    three_rows = Image.open(out / "clothes.png")
    assert three_rows.height > 3 * 128 and three_rows.width > 2 * 128
    for advertised in ("litlogger", "GPU available", "TPU", "configure_optimizers"):
        assert advertised not in noise, advertised
