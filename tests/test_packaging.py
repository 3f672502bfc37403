"""Wheel, sdist and editable installs hold every file, and shapes are checked in the test run."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import jaxtyping
import pytest
import torch
from nightly import nightly
from source_files import PACKAGE, module_name, package_files, source_files

import foreseer
from foreseer.checkpoints.zoo import APART

ROOT = Path(__file__).parents[1]
ZOO = ["config.json", "model.safetensors", "README.md", "samples.png"]
LIST_FILES = """
import os, site, sys
site.addsitedir(sys.argv[1])
import foreseer, foreseer.cli
package = os.path.dirname(foreseer.__file__)
for folder, names, files in os.walk(package, followlinks=True):
    names[:] = [name for name in names if name != "__pycache__"]
    for name in files:
        print(os.path.relpath(os.path.join(folder, name), package))
"""


def test_every_module_imports_from_another_folder(tmp_path):
    modules = ", ".join(module_name(path) for path in source_files())
    code = f"import {modules}; import foreseer; print(foreseer.__file__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == str(PACKAGE / "__init__.py"), done.stderr


def test_the_installed_version_is_the_packages_own():
    assert importlib.metadata.version("foreseer") == foreseer.__version__


def test_a_wrong_shape_is_reported_in_the_linked_folders():
    from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline

    with pytest.raises(jaxtyping.TypeCheckError, match="latents"):
        PixelDiTPipeline.__call__(None, [0], latents=torch.zeros(3))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the source tree with one more predictor in its zoo."""
    if not (ROOT / "src").exists():
        pytest.skip("needs the source tree")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    tree = tmp_path_factory.mktemp("source") / "foreseer"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
    zoo = tree / "checkpoints" / "zoo" / "probe"
    zoo.mkdir(parents=True)
    for name in ZOO:
        (zoo / name).write_bytes(b"{}")
    return tree


def is_apart(name: str) -> bool:
    """Whether a file of the package is in the wheel of packages/foreseer-zoo instead."""
    return name.startswith(tuple(f"checkpoints/zoo/{entry}/" for entry in APART))


def build(tree: Path, kind: str, out: Path) -> Path:
    """Call one PEP 517 hook in `tree`, in its own process; the file it made in `out`."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.iterdir())


def unpack_sdist(path: Path, folder: Path) -> Path:
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def unpacked(tree, tmp_path_factory) -> Path:
    """What the sdist holds."""
    tmp = tmp_path_factory.mktemp("sdist")
    return unpack_sdist(build(tree, "sdist", tmp / "built"), tmp / "unpacked")


# `make test` itself installs the tree, and the wheel of the sdist.
@pytest.fixture(
    scope="module",
    params=nightly(["wheel", "wheel of the sdist", "editable"], ["wheel of the sdist"]),
)
def installed(request, tree, tmp_path_factory) -> Path:
    """A folder that holds one kind of install, and nothing else."""
    tmp = tmp_path_factory.mktemp("install")
    source = request.getfixturevalue("unpacked") if "sdist" in request.param else tree
    kind = "editable" if request.param == "editable" else "wheel"
    wheel = build(source, kind, tmp / "built")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp / "site")
    return tmp / "site"


@pytest.mark.slow
def test_an_install_holds_every_file_of_the_package(installed, tmp_path):
    command = [sys.executable, "-I", "-S", "-c", LIST_FILES, str(installed)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    zoo = [f"checkpoints/zoo/probe/{name}" for name in ZOO]
    expected = package_files()
    if not any(installed.glob("__editable__*")):
        expected = [name for name in expected if not is_apart(name)]
    assert sorted(done.stdout.split()) == sorted([*expected, *zoo]), done.stderr


@pytest.mark.slow
def test_what_is_too_large_for_the_wheel_is_in_a_wheel_of_its_own(tree, tmp_path):
    wheel = build(tree / "packages" / "foreseer-zoo", "wheel", tmp_path / "built")
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.startswith("foreseer_zoo/zoo/")]
    here = [name.removeprefix("checkpoints/") for name in package_files() if is_apart(name)]
    assert sorted(found) == sorted(f"foreseer_zoo/{name}" for name in here)


@pytest.mark.slow
def test_an_install_carries_the_licence_and_the_command(installed):
    info = next(installed.glob("foreseer-*.dist-info"))
    metadata = (info / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert f"Version: {foreseer.__version__}\n" in metadata
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "foreseer = foreseer.cli:main" in (info / "entry_points.txt").read_text()


@pytest.mark.slow
def test_the_sdist_carries_tests_and_documents(unpacked):
    files = ("LICENSE", "LOG.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "Makefile")
    for name in (*files, "pyproject.toml", "tests/earlier/version_2/recording/recording.json"):
        assert (unpacked / name).is_file()
    assert os.listdir(unpacked / "tests")
    assert (unpacked / "docs" / "decisions.md").is_file()
