"""Where and how a benchmark was run: versions, machine in words, commit."""

import datetime
import platform
from collections.abc import Sequence

import torch

from foreseer import __version__
from foreseer.environment import commit, installed, processor, usable_cores
from foreseer.evaluation.results import BenchMeta

PACKAGES = ("torch", "diffusers", "lightning", "torchmetrics", "numpy")


def collect_meta(command: str, seeds: Sequence[int]) -> BenchMeta:
    """What is needed to run a benchmark again, without naming the machine.

    Args:
        command: the command line.
        seeds: seed of every sample.
    """
    versions = {"foreseer": __version__, "python": platform.python_version()}
    versions |= {name: installed(name) for name in PACKAGES}
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
    words = f"{processor()}, {usable_cores()} cores, {torch.get_num_threads()} torch thread(s)"
    if torch.cuda.is_available():
        words += f", {torch.cuda.get_device_name()}"
    return words
