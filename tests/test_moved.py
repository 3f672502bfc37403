"""Names of modules of version 0.2 are the modules of today, with a warning that says which."""

import importlib
import sys

import pytest

from foreseer.moved import MOVED


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_earlier_name_is_the_module_of_today(old, new, monkeypatch):
    monkeypatch.delitem(sys.modules, f"foreseer.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=rf"foreseer\.{old} is foreseer\.{new} since"):
        found = importlib.import_module(f"foreseer.{old}")
    assert found is importlib.import_module(f"foreseer.{new}")


def test_other_names_are_missing_as_before():
    with pytest.raises(ModuleNotFoundError, match="foreseer.training.nothing"):
        importlib.import_module("foreseer.training.nothing")
