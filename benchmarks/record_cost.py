"""What recording Grams costs: CPU time of a recorded run relative to a plain one, and bytes.

    python benchmarks/record_cost.py

Interleaved in one process; one torch thread; writes benchmarks/results/record_cost.json.
"""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from jsonargparse import auto_cli

from foreseer.integration.pipelines.load import load_pipeline
from foreseer.trajectories.prompts import class_items, generate_batch
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording


def record_cost(
    pipeline: str = "zoo:fashion_dit",
    batch_size: int = 8,
    num_rounds: int = 5,
    out: str = "benchmarks/results/record_cost.json",
) -> None:
    """Time plain and recorded runs of the same batch in turn.

    Args:
        pipeline: folder of the pipeline, or `zoo:<name>`.
        batch_size: trajectories per run.
        num_rounds: runs of each kind; the medians are compared.
        out: JSON file of the result.
    """
    torch.set_num_threads(1)
    pipe = load_pipeline(pipeline)
    items = class_items(batch_size, 10)
    settings = {"guidance_scale": 3.0, "num_inference_steps": 50}
    seconds: dict[str, list[float]] = {"plain": [], "recorded": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "recording"
        for _ in range(num_rounds):
            started = time.process_time()
            generate_batch(pipe, items, output_type="latent", **settings)
            seconds["plain"].append(time.process_time() - started)
            shutil.rmtree(folder, ignore_errors=True)
            started = time.process_time()
            record(pipe, items, folder, batch_size=batch_size, states=False, **settings)
            seconds["recorded"].append(time.process_time() - started)
        recording = Recording(folder)
        stored = [path.stat().st_size for path in folder.glob("shards/*/*.safetensors")]
        tokens, width = 64, 192  # elements of the hidden tap; the output tap has 1024
        steps, branches = len(recording.header.sigmas), recording.header.num_branches
    full = 4 * steps * branches * (tokens * width + 1024)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    result = {
        "cpu_seconds_plain": medians["plain"],
        "cpu_seconds_recorded": medians["recorded"],
        "overhead": medians["recorded"] / medians["plain"] - 1,
        "bytes_per_trajectory_grams": statistics.mean(stored),
        "bytes_per_trajectory_full_features_of_the_same_taps": full,
        "ratio": full / statistics.mean(stored),
        "batch_size": batch_size,
        "num_rounds": num_rounds,
    }
    Path(out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    auto_cli(record_cost)
