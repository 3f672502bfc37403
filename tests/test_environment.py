"""`foreseer --version` reports what a bug report needs, at once, and nothing private."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import foreseer
from foreseer import environment

LOADED = """
import sys
from foreseer.cli import main
main(sys.argv[1:])
heavy = {"torch", "lightning", "diffusers", "transformers", "datasets", "numpy", "jsonargparse"}
print("loaded", sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


def facts() -> dict[str, str]:
    lines = environment.version_report().splitlines()[2:]
    return {line[: environment.WIDTH].strip(): line[environment.WIDTH :] for line in lines}


@pytest.mark.parametrize("word", ["--version", "--help"])
def test_help_and_version_import_nothing_large(word, tmp_path):
    command = [sys.executable, "-c", LOADED, word]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "loaded []\n")


def test_the_report_starts_with_the_version_and_names_what_is_installed():
    assert environment.version_report().splitlines()[0] == f"foreseer {foreseer.__version__}"
    found = facts()
    assert found["python"].startswith(platform.python_version())
    for name, group in {
        "diffusers": "packages",
        "transformers": "packages",
        "safetensors": "packages",
        "lightning": "[train]",
    }.items():
        assert f"{name} {importlib.metadata.version(name)}" in found[group].split(", ")
    assert f"torch {torch.__version__}" in found["packages"]  # +cpu and +cu126 are told apart
    assert f"pytest {importlib.metadata.version('pytest')}" in found["[dev]"]


def test_a_package_that_is_not_there_is_said_to_be_missing(monkeypatch):
    lines = ["torch>=2", "no-such-package[x]>=1 ; python_version > '3'", "other==1; extra == 'art'"]
    monkeypatch.setattr(environment, "requires", lambda name: lines)
    assert environment.packages() == {
        "packages": f"torch {torch.__version__}, no-such-package missing",
        "[art]": "other missing",
    }


def test_the_report_names_no_path_user_or_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("USER", "ada-lovelace")
    monkeypatch.setenv("HOME", str(tmp_path))
    text = environment.version_report()
    private = ["ada-lovelace", str(tmp_path), os.getcwd(), str(Path(foreseer.__file__).parent)]
    private += [platform.node()] if len(platform.node()) > 3 else []
    assert [word for word in private if word in text] == []
    assert re.search(r"(^|\s)[/~]\w", text) is None


def test_gpus_are_what_nvidia_smi_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.gpus() == "no nvidia-smi"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559 MiB, 560.1'\n")
    tool.chmod(0o755)
    assert environment.gpus() == "NVIDIA H100, 81559 MiB, 560.1"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert environment.gpus() == "nvidia-smi failed"


def git(folder: Path, *words: str) -> str:
    alone = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    name = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    command = ["git", *name, *words]
    done = subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_commit_is_that_of_a_source_tree_and_not_of_a_repository_around_it(tmp_path):
    package = tmp_path / "src" / "foreseer"
    package.mkdir(parents=True)
    for name in ("__init__.py", "environment.py", "moved.py"):
        source = Path(foreseer.__file__).parent / name
        (package / name).write_bytes(source.read_bytes())
    code = "from foreseer.environment import commit; print(commit())"

    def told() -> str:
        command = [sys.executable, "-c", code]
        alone = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
        return subprocess.run(command, env=alone, capture_output=True, text=True).stdout.strip()

    (tmp_path / "notes.txt").write_text("somebody's own")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "notes.txt")
    git(tmp_path, "commit", "-qm", "own")
    assert told() == f"release {foreseer.__version__}"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "source")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert told() == head
    (package / "environment.py").write_text((package / "environment.py").read_text() + "\n")
    assert told() == f"{head} with local changes"
