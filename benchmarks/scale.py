"""Throughput of shards, Grams and recorders, and peak memory, on this machine.

    python benchmarks/scale.py [--only write read gram recorders memory] [--scratch FOLDER]

Rows are steps of one tap: 256 tokens x 1152 channels of bfloat16 (DiT-XL/2 at 256 px), 50 of them
per trajectory. Reads and writes of this library stand beside plain ones of the same bytes, in turn,
in one run; medians of `ROUNDS`. Cold means that the page cache was dropped for the files
(`posix_fadvise`). One torch thread per process. Writes `results/scale.json`; `scale_page.py` puts
its tables on docs/scale.md.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scale_estimates import estimates

from foreseer.trajectories.dataset import TrajectoryDataset
from foreseer.trajectories.files.header import Header
from foreseer.trajectories.files.writer import open_writer
from foreseer.trajectories.gram import gram
from foreseer.trajectories.recording import Recording

RESULTS = Path(__file__).parent / "results" / "scale.json"
STEPS, TOKENS, CHANNELS = 50, 256, 1152
ROW_BYTES = 2 * TOKENS * CHANNELS
TRAJECTORIES = 16  # 472 MB
ROUNDS = 5
SECTIONS = ("write", "read", "gram", "recorders", "memory")
MEMORY_SIZES = (8, 64, 512)


def header() -> Header:
    """Of a synthetic recording at the size of DiT-XL/2."""
    return Header(
        recipe={"synthetic": True},
        host={"class": "Synthetic"},
        scheduler={"class": "FlowMatchEulerDiscreteScheduler", "guidance_scale": 1.0},
        sigmas=[1 - step / STEPS for step in range(STEPS)],
        taps=["hidden"],
        num_branches=1,
        dtype="bfloat16",
        features="full",
        states=False,
        latent_shape=[4, 32, 32],
    )


def feature(item: int) -> torch.Tensor:
    """One trajectory's features, `(1, S, N, D)`."""
    random = torch.Generator().manual_seed(item)
    return torch.randn(1, STEPS, TOKENS, CHANNELS, generator=random).bfloat16()


FEATURES = [feature(item) for item in range(4)]  # made once: drawing them costs more than writing


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rates(seconds: float, trajectories: int) -> dict[str, float]:
    """Rows and megabytes per second."""
    rows = trajectories * STEPS
    return {"rows_per_s": rows / seconds, "mb_per_s": rows * ROW_BYTES / seconds / 1e6}


def in_turn(jobs: dict[str, Callable[[], Any]], trajectories: int) -> dict[str, dict[str, float]]:
    """Medians over rounds in which every job runs once."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(ROUNDS):
        for name, job in jobs.items():
            seconds[name].append(timed(job))
    return {
        name: rates(statistics.median(each), trajectories)
        | {"slowest_mb_per_s": rates(max(each), trajectories)["mb_per_s"]}
        for name, each in seconds.items()
    }


def write_items(place: str | Path, rank: int, world: int) -> None:
    """Write this rank's share of the trajectories."""
    with open_writer(place, header(), rank) as writer:
        for item in range(rank, TRAJECTORIES, world):
            writer.write(item, {"feature/hidden": FEATURES[item % 4]}, {"seed": item})


def write_plainly(folder: Path, rank: int, world: int) -> None:
    """The same bytes in plain files, each fsynced."""
    folder.mkdir(exist_ok=True)
    for item in range(rank, TRAJECTORIES, world):
        data = FEATURES[item % 4].view(torch.uint8).numpy().data
        with open(folder / f"{item}.bin", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def processes(target: Callable[..., None], world: int, place: str | Path) -> Callable[[], None]:
    """A job that runs `target` in `world` forked processes; only their work is timed."""

    def job() -> None:
        if isinstance(place, Path):
            shutil.rmtree(place, ignore_errors=True)
        else:
            shutil.rmtree(place.removeprefix("file://"), ignore_errors=True)
        context = multiprocessing.get_context("fork")
        started = [
            context.Process(target=target, args=(place, rank, world)) for rank in range(world)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
            assert process.exitcode == 0

    return job


def writing(scratch: Path) -> dict[str, Any]:
    """Shards against plain files, one process against two."""
    jobs: dict[str, Callable[[], Any]] = {}
    for world in (1, 2):
        jobs[f"plain files, {world} process"] = processes(write_plainly, world, scratch / "plain")
        jobs[f"shards, {world} process"] = processes(write_items, world, scratch / "run")
    jobs["shards to a file:// URL, 1 process"] = processes(write_items, 1, f"file://{scratch}/far")
    return in_turn(jobs, TRAJECTORIES)


def forget(folder: Path) -> None:
    """Drop the page cache of every file."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_plainly(folder: Path) -> int:
    """Every shard, read into new memory as bytes."""
    return sum(len(path.read_bytes()) for path in sorted(folder.glob("shards/*/*")))


BUFFER = bytearray(STEPS * ROW_BYTES + (1 << 20))


def read_into_buffer(folder: Path) -> int:
    """Every shard, read into the same memory."""
    found = 0
    for path in sorted(folder.glob("shards/*/*")):
        with open(path, "rb", buffering=0) as file:
            found += file.readinto(BUFFER) or 0
    return found


def load_all(place: str | Path) -> int:
    """Every feature, checked against its hash."""
    recording = Recording(place)
    return sum(len(recording.load(i, ["feature/hidden"])) for i in recording.items)


def load_rows(folder: Path) -> int:
    """Every row on its own, without a check of its values."""
    recording = Recording(folder)
    found = 0
    for item in recording.items:
        for step in range(STEPS):
            found += recording.load_slice(item, "feature/hidden", (0, step)).numel()
    return found


def load_workers(folder: Path) -> int:
    """Every feature through two loader processes."""
    dataset = TrajectoryDataset(folder, ["feature/hidden"])
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    return sum(len(example) for example in loader)


def reading(scratch: Path) -> dict[str, Any]:
    """Shards against a plain read of the same files."""
    folder = scratch / "reading"
    write_items(folder, 0, 1)
    url = f"file://{folder}"

    def cold(read: Callable[[Any], int], place: Any = folder) -> Callable[[], int]:
        def job() -> int:
            forget(folder)
            return read(place)

        return job

    def first() -> int:
        shutil.rmtree(scratch / "cache" / "shards", ignore_errors=True)
        return load_all(url)

    load_all(folder)
    jobs = {
        "plain read, warm": lambda: read_plainly(folder),
        "plain read into one buffer, warm": lambda: read_into_buffer(folder),
        "trajectories with hash check, warm": lambda: load_all(folder),
        "single rows, warm": lambda: load_rows(folder),
        "trajectories, 2 loader processes, warm": lambda: load_workers(folder),
        "URL, first time (copy into the cache)": first,
        "URL, from the cache, warm": lambda: load_all(url),
        "plain read, cold": cold(read_plainly),
        "trajectories with hash check, cold": cold(load_all),
        "single rows, cold": cold(load_rows),
    }
    return in_turn(jobs, TRAJECTORIES)


def grams(scratch: Path) -> dict[str, Any]:
    """Grams of one trajectory in float64, against the float64 product of the same size alone."""
    flat = FEATURES[0][0].flatten(1)
    wide = flat.double()

    def at_once() -> torch.Tensor:
        widened = flat.double()
        return widened @ widened.mT

    jobs = {"gram": lambda: gram(flat), "gram, widened at once": at_once}
    found = in_turn(jobs | {"product alone": lambda: wide @ wide.mT}, 1)
    operations = 2 * STEPS**2 * TOKENS * CHANNELS
    for row in found.values():
        row["gflops"] = operations / (STEPS / row["rows_per_s"]) / 1e9
    return found


def recorders(scratch: Path) -> dict[str, Any]:
    """`foreseer record` on the bundled model as one process and as two, start included and not."""
    found = {}
    for world in (1, 2):
        out = scratch / f"recorders-{world}"
        options = "--pipeline zoo:fashion_dit --guidance_scale 3 --num_trajectories 48"
        words = [sys.executable, "-m", "foreseer", "record", *options.split(), "--out", str(out)]
        started = time.perf_counter()
        running = [
            subprocess.Popen(
                [*words, "--rank", str(rank), "--world", str(world)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
            )
            for rank in range(world)
        ]
        assert [process.wait() for process in running] == [0] * world
        ended = time.time()
        whole = time.perf_counter() - started
        # From the header, which the first finished batch of 8 writes, to the end.
        steady = ended - (out / "recording.json").stat().st_mtime
        recording = Recording(out)
        rows = len(recording) * STEPS * 2 * 2  # two taps, two branches
        after_first = (len(recording) - 8 * world) / steady
        found[f"{world} process"] = {
            "trajectories_per_s": after_first,
            "rows_per_s": after_first * rows / len(recording),
            "seconds_with_start": whole,
            "bytes_each": sum(e.bytes for e in recording.entries.values()) / len(recording),
        }
    return found


def memory(scratch: Path) -> list[dict[str, Any]]:
    """Peak memory of every job of `scale_memory.py` at three sizes."""
    sys.path.insert(0, str(Path(__file__).parent))
    from scale_memory import JOBS

    rows = []
    for job in JOBS:
        for num in MEMORY_SIZES:
            script = Path(__file__).with_name("scale_memory.py")
            words = [sys.executable, str(script), job, str(num), str(scratch)]
            result = subprocess.run(words, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"{job}, {num} trajectories: {result.stderr}")
            rows.append(json.loads(result.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    return rows


MEASURES: dict[str, Callable[[Path], Any]] = {
    "write": writing,
    "read": reading,
    "gram": grams,
    "recorders": recorders,
    "memory": memory,
}


def main() -> None:
    """Measure what is asked for and write it beside what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--scratch", help="folder on the disk to measure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found["machine"] = {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "torch": torch.__version__,
        "row_bytes": ROW_BYTES,
        "trajectories": TRAJECTORIES,
        "rounds": ROUNDS,
    }
    for section in arguments.only:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            os.environ["FORESEER_CACHE"] = f"{scratch}/cache"
            found[section] = MEASURES[section](Path(scratch))
        print(section, json.dumps(found[section], indent=1), flush=True)
        found["estimates"] = estimates(found)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
