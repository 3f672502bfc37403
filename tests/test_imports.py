"""Folders import only what lies to their left, and deploying a predictor never loads Lightning."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from source_files import PACKAGE, module_name, source_files

ROOMS = "predictors checkpoints integration trajectories evaluation training distill"
ORDER = tuple(ROOMS.split())
# Modules of no room that rooms import; commands are none of them.
SHARED = ("__version__", "environment", "errors", "extras", "moved")
LIGHTNING = {"lightning", "pytorch_lightning"}
HUGGING_FACE = {"diffusers", "transformers"}
# Rivals, and files of videos.
DIFFUSERS = {
    "evaluation/solvers.py",
    "evaluation/learned_solver.py",
    "evaluation/generate.py",
}
# Import names that differ from the package's name.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit_learn", "kan": "pykan"}


def imported(source: str, path: str) -> set[str]:
    """Absolute names of the modules that one file imports, anywhere in it."""
    package = module_name(path).split(".")
    if not path.endswith("__init__.py"):
        package.pop()
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{stem}.{alias.name}" for alias in node.names}
    return names


def violations(source: str, path: str) -> list[str]:
    """What one file imports although its folder must not."""
    folder = path.split("/")[0]
    if folder not in ORDER:
        return []
    wrong = []
    for name in imported(source, path):
        root, second = (name.split(".") + [""])[:2]
        if root == "foreseer" and second in ORDER[ORDER.index(folder) + 1 :]:
            wrong.append(name)
        if root == "foreseer" and second not in (*ORDER, *SHARED):
            wrong.append(name)
        if folder == "predictors" and root not in {"foreseer", "torch", "jaxtyping", "kan"}:
            wrong += [name] if root not in sys.stdlib_module_names else []
        if root == "kan" and path != "predictors/kan.py" and folder != "training":
            wrong.append(name)
        if root in HUGGING_FACE and folder != "integration" and path not in DIFFUSERS:
            wrong.append(name)
        if root in LIGHTNING and not may_import_lightning(path):
            wrong.append(name)
    return sorted(wrong)


def may_import_lightning(path: str) -> bool:
    return path.split("/")[0] in ("training", "distill") or path == "trajectories/datamodule.py"


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("path", source_files())
def test_a_file_imports_only_what_its_folder_may(path):
    wrong = violations((PACKAGE / path).read_text(), path)
    assert not wrong, f"{path} imports {', '.join(wrong)}; the order is {' <- '.join(ORDER)}."


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("predictors/base.py", "from ..integration.clock import Clock"),
        ("predictors/base.py", "def f():\n    import numpy"),
        ("checkpoints/format.py", "from .. import training"),
        ("integration/host/hook.py", "import lightning.pytorch as pl"),
        ("trajectories/gram.py", "from diffusers import DiTTransformer2DModel"),
        ("trajectories/dataset.py", "import foreseer.training.l2p"),
        ("training/fits.py", "from foreseer.fit_commands import fit"),
    ],
)
def test_a_forbidden_import_is_found(path, line):
    assert len(violations(line, path)) == 1


def test_no_two_modules_have_one_name():
    names = [Path(path).stem for path in source_files() if not path.endswith("__init__.py")]
    assert not {name for name in names if names.count(name) > 1}
    assert not [name for name in names if name.endswith("_command")]  # rooms hold no commands


@pytest.mark.parametrize("path", [path for path in source_files() if path.endswith("__init__.py")])
def test_a_folder_says_in_a_few_lines_what_lives_there(path):
    said = ast.get_docstring(ast.parse((PACKAGE / path).read_text())) or ""
    lines = [line for line in said.splitlines() if line]
    assert 2 <= len(lines) <= 5 or path == "__init__.py"  # the package's own is its manual
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", said):
        assert any((place / name).exists() for place in (PACKAGE / path).parents), name


def test_every_third_party_import_is_a_declared_dependency():
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"]]
    for extra in ("train", "text", "judge", "web"):
        declared += extras[extra]
    names = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in declared}
    for path in source_files():
        roots = {name.split(".")[0] for name in imported((PACKAGE / path).read_text(), path)}
        packages = {DISTRIBUTIONS.get(r, r) for r in roots - {"foreseer"} - sys.stdlib_module_names}
        assert packages <= names, f"{path}: {packages - names} missing from pyproject.toml"


def test_deploying_loads_no_lightning(tmp_path):
    modules = [
        module_name(path)
        for path in source_files()
        if path.split("/")[0] in ORDER and not may_import_lightning(path)
    ]
    report = f"; import sys; print(sorted({LIGHTNING} & set(sys.modules)))"
    done = run_python(f"import {', '.join(modules)}{report}", tmp_path)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stdout + done.stderr


def test_predictors_load_neither_lightning_nor_diffusers(tmp_path):
    modules = [module_name(path) for path in source_files() if path.startswith("predictors/")]
    report = f"; import sys; print(sorted({LIGHTNING | HUGGING_FACE} & set(sys.modules)))"
    done = run_python(f"import {', '.join(modules)}{report}", tmp_path)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stdout + done.stderr


@pytest.mark.parametrize("folder", ORDER)
def test_importing_a_folder_by_its_bare_name_fails_at_once(folder):
    done = run_python(f"import {folder}", PACKAGE)
    assert done.returncode != 0
    assert "attempted relative import beyond top-level package" in done.stderr
