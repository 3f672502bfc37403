"""The five recipes of CONTRIBUTING.md, each followed to the letter in a copy of the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import MORE, call
from source_files import PACKAGE

from foreseer.integration.forecasting import forecasting
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.predictors.rules import Reuse

ROOT = Path(__file__).parents[1]
if not (ROOT / "CONTRIBUTING.md").exists():
    pytest.skip("the wheel holds no pages", allow_module_level=True)
RECIPES = dict(
    re.findall(
        r"^## Add a (\w+)\n(.*?)(?=^## )", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S
    )
)
RULE = '''

class Toy(LinearPredictor):
    """Repeat the newest anchor, a tenth smaller: c = (0.9)."""

    window = 1

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """One weight of 0.9."""
        return torch.full((1,), 0.9, dtype=torch.float64)

'''
LIST = '''
def toy(
    num_anchors: int, num_steps: int = 50, expert_steps: Sequence[int] = (0,)
) -> tuple[int, ...]:
    """The first steps and no others.

    Raises:
        ValueError: there are fewer steps.
    """
    return check_anchors(tuple(range(num_anchors)), num_steps)

'''
FIT = '''"""Reuse, a tenth smaller, as a fit."""

from collections.abc import Sequence

from foreseer.training.gram_fit import ClosedGramFit, Sum
from foreseer.training.l2p import rows_predictor
from foreseer.training.recorded import open_recording


class Toy(ClosedGramFit):
    """Rows that repeat the newest anchor, a tenth smaller."""

    fit_name = "toy"

    def __init__(self, recording: str, anchors: Sequence[int], tap: str = "output") -> None:
        opened = open_recording(recording, tap)
        super().__init__([opened], anchors, tap, rows_predictor(opened.header, anchors))

    def solve(self, sums: Sequence[Sum]) -> None:
        """Set the rows, whatever was recorded."""
        self.predictor.set_rows(0.9 * self.predictor.weight)
'''
FIGURE = '''

def toy(rows: Sequence[BenchRow]) -> LineChart:
    """Seconds of an image against network evaluations."""
    points = sorted({(row.num_anchors, row.seconds_per_image) for row in rows})
    return LineChart("Seconds of a toy", [Curve("seconds", points, "learned")], PARETO)
'''


def put(path: Path, before: str, text: str) -> None:
    """Insert a text before the first place of another."""
    content = path.read_text()
    assert before in content, f"{path}: {before}"
    path.write_text(content.replace(before, f"{text}{before}", 1))


def follow_predictor(package: Path) -> None:
    rules = package / "predictors/rules.py"
    put(rules, "\n\nRULES: ", RULE)
    put(rules, '    "reuse": Reuse(),\n', '    "toy": Toy(),\n')
    put(package / "predictors/__init__.py", "    Taylor,\n)", "    Toy,\n")


def follow_schedule(package: Path) -> None:
    schedule = package / "integration/schedule.py"
    put(schedule, "\nCOMMON: ", LIST)
    put(schedule, '    "uniform": uniform,\n', '    "toy": toy,\n')
    line = "from foreseer.integration.schedule import toy as toy\n"
    put(package / "schedules.py", "from foreseer.integration.schedule import uniform", line)


def follow_host(package: Path) -> None:
    row = '    "ToyTransformer2DModel": Trunk(("layers",), "final_norm", (), -1, 1),\n'
    put(package / "integration/host/trunk.py", '    "LatteTransformer3DModel"', row)


def follow_fit(package: Path) -> None:
    (package / "training/toy.py").write_text(FIT)
    shipped = (package / "configs/fit/l2p_lstsq.yaml").read_text()
    own = shipped.replace("l2p.L2PLeastSquares", "toy.Toy").replace("l2p_lstsq", "toy")
    (package / "configs/fit/toy.yaml").write_text(own)
    put(package / "training/fits.py", '    "lstsq": ', '    "toy": "toy",\n')


def follow_figure(package: Path) -> None:
    figures = package / "evaluation/page/figures.py"
    figures.write_text(figures.read_text() + FIGURE)
    put(package / "evaluation/page/html.py", "\n    nothing = ", ' | {"toy": figures.toy(rows)}')


FOLLOWED = {
    "predictor": follow_predictor,
    "schedule": follow_schedule,
    "host": follow_host,
    "fit": follow_fit,
    "figure": follow_figure,
}


def changed(one: Path, other: Path) -> set[str]:
    """Files of the second folder that the first has not, or has otherwise."""
    files = [path.relative_to(other).as_posix() for path in other.rglob("*") if path.is_file()]
    return {
        f
        for f in files
        if not (one / f).exists() or (one / f).read_bytes() != (other / f).read_bytes()
    }


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, without what is bundled, in which all five recipes were followed."""
    copy = tmp_path_factory.mktemp("contributing") / "foreseer"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "zoo"))
    for follow in FOLLOWED.values():
        follow(copy)
    return copy


@pytest.fixture(scope="module")
def seen(package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What recipes_followed.py saw of that copy."""
    script = Path(__file__).with_name("recipes_followed.py")
    paths = [str(package.parent), str(script.parent), *(p for p in sys.path if p)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("followed"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["package"] == str(package)
    return found


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_recipe_is_short_and_names_the_files_that_are_touched(name, tmp_path):
    text = RECIPES[name]
    assert len([line for line in text.splitlines() if line]) <= 10
    named = set(re.findall(r"`([\w/]+\.(?:py|yaml))`", text))
    assert 1 <= len(named) <= 3
    copy = tmp_path / "foreseer"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "zoo"))
    FOLLOWED[name](copy)
    touched = changed(PACKAGE, copy)
    places = {path.removeprefix("src/foreseer/").replace("NAME", "toy") for path in named}
    assert touched <= places
    for path in named:
        assert "NAME" in path or (ROOT / path).is_file()


def test_there_are_five_recipes():
    assert RECIPES.keys() == FOLLOWED.keys()


def test_a_rule_is_public_measured_and_run(seen):
    assert seen["predictor"] is True
    assert "toy" in seen["bench"]["methods"] and "toy" in seen["bench"]["page"]


def test_a_list_is_public_and_measured(seen):
    assert seen["schedule"] == seen["common"] == [0, 1, 2]
    assert seen["bench"]["lists"]["toy"] == [0, 1, 2]


def test_a_rule_that_decides_while_a_run_goes_on_is_taken_as_it_is(seen):
    assert seen["decided"] == [0, 2, 4]


def test_a_row_makes_a_host_exact_that_is_refused_without_it(seen):
    for passed in seen["host"].values():
        assert len(passed) >= 2 and all(passed)
    family = MORE["ernie_image"]
    pipe = family.build()
    pipe.transformer.__class__ = type("ToyTransformer2DModel", (type(pipe.transformer),), {})
    with pytest.raises(UnsupportedHost, match="expected samples first"):
        with forecasting(pipe, Reuse(), [0, 3], "hidden"):
            call(family, pipe)


def test_a_fit_is_reached_by_name_by_configuration_and_by_export(seen):
    found = seen["fit"]
    assert found["anchors"] == found["expected"] and found["same"]
    assert found["exported"] == [0, 2, 4]
    assert found["weights"] == pytest.approx(0.9 * 2 * 5)  # two branches, all steps but the first


def test_a_figure_is_on_the_page_and_a_file(seen):
    assert "Seconds of a toy" in seen["bench"]["page"]
    assert "toy.png" in seen["bench"]["files"]
