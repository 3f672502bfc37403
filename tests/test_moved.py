"""Earlier names of modules are the modules of today, with a warning that says which."""

import importlib
import sys

import pytest
from tiny_text import tiny_text_pipeline

from foreseer.checkpoints.zoo import ZOO
from foreseer.cli import main
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.pipelines.sentence_encoder import SentenceEncoder
from foreseer.moved import MOVED


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_earlier_name_is_the_module_of_today(old, new, monkeypatch):
    monkeypatch.delitem(sys.modules, f"foreseer.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=rf"foreseer\.{old} is foreseer\.{new} now"):
        found = importlib.import_module(f"foreseer.{old}")
    assert found is importlib.import_module(f"foreseer.{new}")


def test_a_pipeline_saved_before_loads_the_component_it_names(tmp_path, monkeypatch):
    tiny_text_pipeline().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    old = "foreseer.integration.sentence_encoder"
    index.write_text(index.read_text().replace(f"foreseer.{MOVED[old[9:]]}", old))
    assert old in index.read_text()
    monkeypatch.delitem(sys.modules, old, raising=False)
    assert type(load_pipeline(str(tmp_path)).text_encoder) is SentenceEncoder


def test_bundled_pipelines_name_the_modules_of_today():
    indices = list(ZOO.glob("*/model_index.json"))
    assert indices
    for index in indices:
        assert not [old for old in MOVED if f'"foreseer.{old}"' in index.read_text()], index


def test_other_names_are_missing_as_before():
    with pytest.raises(ModuleNotFoundError, match="foreseer.training.nothing"):
        importlib.import_module("foreseer.training.nothing")


def test_a_recipe_of_a_bundled_model_says_where_it_is_now():
    with pytest.raises(ModuleNotFoundError, match="examples/bundled_models/train.py fit"):
        importlib.import_module("foreseer.training.teacher")
    with pytest.raises(SystemExit) as stop:
        main(["teacher", "fit"])
    assert stop.value.code == 2
