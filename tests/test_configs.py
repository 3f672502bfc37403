"""Every shipped YAML parses against the real signatures of the command it is for."""

from pathlib import Path

import pytest
import yaml
from source_files import PACKAGE, package_files

from foreseer.cli import main

CONFIGS = [
    path for path in package_files() if path.startswith("configs/") and path.endswith(".yaml")
]


RECIPES = sorted((Path(__file__).parents[1] / "examples/bundled_models").glob("*.yaml"))


def command_words(path: str) -> list[str]:
    """The command a config is for: its folder names it.

    In a recipe the file names it, and `call.yaml` comes first: it is of all commands that draw.
    """
    folder, name = path.split("/")[1], Path(path).stem
    if folder != "recipes":
        return [folder]
    if name == "fit":
        return ["fit"]
    call = PACKAGE / Path(path).with_name("call.yaml")
    return ["generate"] if name == "call" else ["record", "--config", str(call)]


def parse(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    """The configuration that the command would run with."""
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print_config"])
    printed = capsys.readouterr()
    assert not stop.value.code, printed.err[-2000:]
    return yaml.safe_load(printed.out)


@pytest.mark.parametrize("path", CONFIGS)
def test_a_shipped_config_parses(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = yaml.safe_load((PACKAGE / path).read_text())
    parsed = parse([*command_words(path), "--config", str(PACKAGE / path)], capsys)
    assert given.keys() <= parsed.keys()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_bundled_models_recipe_parses(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = yaml.safe_load(path.read_text())
    assert given.keys() <= parse(["fit", "--config", str(path)], capsys).keys()


def test_a_misspelled_argument_of_a_class_is_refused_by_name(capsys, tmp_path):
    good = next(p for p in RECIPES if p.stem == "fashion_dit").read_text()
    bad = tmp_path / "bad.yaml"
    bad.write_text(good.replace("num_layers", "num_lyers"))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(bad), "--print_config"])
    assert stop.value.code == 2
    assert "num_lyers" in capsys.readouterr().err
