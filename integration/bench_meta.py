"""Where and how a benchmark was run: versions, machine in words, commit."""

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import __version__
from .report_rows import BenchMeta

PACKAGES = ("torch", "diffusers", "lightning", "torchmetrics", "numpy")


def collect_meta(command: str, seeds: Sequence[int]) -> BenchMeta:
    """What is needed to run a benchmark again, without naming the machine.

    Args:
        command: the command line.
        seeds: seed of every sample.
    """
    versions = {"foreseer": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return BenchMeta(
        versions=versions,
        seeds=list(seeds),
        hardware=hardware(),
        command=command,
        date=datetime.date.today().isoformat(),
        commit=commit(),
    )


def hardware() -> str:
    """Processor model, cores and threads used, and the GPU where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = f"{processor()}, {cores} cores, {torch.get_num_threads()} torch thread(s)"
    if torch.cuda.is_available():
        words += f", {torch.cuda.get_device_name()}"
    return words


def processor() -> str:
    """The processor's model as the system names it, else its architecture."""
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def commit() -> str:
    """The commit of the source tree, marked when files differ from it; else the release."""
    folder = Path(__file__).resolve().parent
    try:
        found = _git(folder, "rev-parse", "HEAD")
        changed = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return f"release {__version__}"
    return found + (" with local changes" if changed else "")


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()
