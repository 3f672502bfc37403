"""Peak memory of one job over N trajectories, in a process of its own; prints a JSON row.

    python benchmarks/scale_memory.py JOB N FOLDER

Started by `benchmarks/scale.py`. Each job first does its work on `WARM_UP` trajectories, so that
imports, thread pools and code paths are paid for; then the peak is reset (`/proc/self/clear_refs`)
and the job is done on N. Linux only.
"""

import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from lesa_training_cases import STEPS as LESA_STEPS
from lesa_training_cases import data_for, module_for, trainer_for
from tiny_hosts import items, pipeline, settings
from tiny_pipelines import tiny_pipeline

from foreseer.training.l2p import L2PLeastSquares
from foreseer.trajectories.datamodule import GramDataModule
from foreseer.trajectories.dataset import TrajectoryDataset
from foreseer.trajectories.files.header import Header
from foreseer.trajectories.files.repair import merge
from foreseer.trajectories.prompts import class_items
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording, RecordingWriter

WARM_UP = 6
STEPS, BRANCHES, TOKENS, CHANNELS = 50, 2, 64, 64  # 0.82 MB of bfloat16 per trajectory


def header() -> Header:
    """Of a synthetic recording."""
    return Header(
        recipe={"synthetic": True},
        host={"class": "Synthetic"},
        scheduler={"class": "FlowMatchEulerDiscreteScheduler", "guidance_scale": 3.0},
        sigmas=[1 - step / STEPS for step in range(STEPS)],
        taps=["hidden"],
        num_branches=BRANCHES,
        dtype="bfloat16",
        features="full",
        states=False,
        latent_shape=[4, 16, 16],
    )


def trajectory(item: int) -> dict[str, torch.Tensor]:
    """Features that turn slowly, and their Grams; a function of the item."""
    random = torch.Generator().manual_seed(item)
    t = torch.linspace(0, 1, STEPS)[:, None, None]
    base = torch.randn(BRANCHES, 3, TOKENS, CHANNELS, generator=random)
    feature = base[:, :1] + t * base[:, 1:2] + (3 * t).sin() * base[:, 2:]
    wide = feature.flatten(2).double()
    return {
        "gram/hidden": wide @ wide.mT,
        "feature/hidden": feature.bfloat16(),
        "final": torch.randn(4, 16, 16, generator=random),
    }


def write(folder: Path, num: int) -> None:
    """Write synthetic trajectories."""
    with RecordingWriter(folder, header()) as writer:
        for item in range(num):
            writer.write(item, trajectory(item), {"seed": item})


def synthetic(folder: Path, num: int) -> Path:
    """A finished synthetic recording."""
    if not folder.exists():
        write(folder, num)
    return folder


def record_pipeline(folder: Path, num: int) -> None:
    """Record a tiny real pipeline with all features."""
    settings = {"guidance_scale": 3.0, "num_inference_steps": 8}
    taps = {"taps": ["hidden", "output"], "features": "full", "batch_size": 4}
    record(tiny_pipeline(), class_items(num, 3), folder, **taps, **settings)


def read(folder: Path, num: int) -> None:
    """Read every feature through the dataset."""
    for example in TrajectoryDataset(folder, ["feature/hidden"]):
        assert example["feature/hidden"].shape[1] == STEPS


def fit_l2p(folder: Path, num: int) -> None:
    """Fit L2P in closed form, with validation."""
    module = L2PLeastSquares(str(folder), [0, 5, 12, 20, 28, 36, 43], "hidden")
    trainer_for(1).fit(module, datamodule=GramDataModule(str(folder), "hidden"))


def fit_lesa(folder: Path, num: int) -> None:
    """Train LESA's first phase for one epoch, with validation."""
    module = module_for(folder, open_loop_epochs=1)
    trainer_for(1).fit(module, datamodule=data_for(folder))


def verify(folder: Path, num: int) -> None:
    """Check every shard."""
    assert Recording(folder).verify() == []


def join(folder: Path, num: int) -> None:
    """Merge it into a new folder."""
    merge(folder.with_name(f"{folder.name}-merged-{os.getpid()}"), [folder])


def of_lesa(folder: Path, num: int) -> Path:
    """A recording of the tiny host that LESA trains on."""
    if not folder.exists():
        call = settings("dit_guided", LESA_STEPS)
        options = {"taps": ["hidden"], "features": "full", "batch_size": 4}
        record(pipeline("dit_guided"), items("dit_guided", num), folder, **options, **call)
    return folder


MAKERS: dict[str, Callable[[Path, int], Path | None]] = {
    "read features": synthetic,
    "fit L2P (lstsq)": synthetic,
    "fit LESA (one epoch)": of_lesa,
    "verify": synthetic,
    "merge": synthetic,
}
JOBS: dict[str, Callable[[Path, int], None]] = {
    "write shards": write,
    "record a pipeline": record_pipeline,
    "read features": read,
    "fit L2P (lstsq)": fit_l2p,
    "fit LESA (one epoch)": fit_lesa,
    "verify": verify,
    "merge": join,
}


def status(name: str) -> int:
    """A number of `/proc/self/status` in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def folders(job: str, root: Path, num: int) -> Iterator[Path]:
    """Where the job works; what is only read is shared between jobs."""
    kind = MAKERS[job].__name__ if job in MAKERS else f"{job.replace(' ', '-')}-{os.getpid()}"
    for count in (WARM_UP, num):
        folder = root / f"{kind}-{count}"
        if job in MAKERS:
            MAKERS[job](folder, count)
        yield folder


def main(job: str, num: int, root: Path) -> None:
    """Do a job on N trajectories and print what memory it took."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warm, folder = folders(job, root, num)
    JOBS[job](warm, WARM_UP)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, started = status("VmRSS"), time.perf_counter()
    JOBS[job](folder, num)
    peak = status("VmHWM")
    row = {
        "job": job,
        "trajectories": num,
        "seconds": time.perf_counter() - started,
        "before_bytes": before,
        "peak_bytes": peak,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
