"""Whether forecasting parts of a feature by rules of their own pays, on the bundled model.

    python benchmarks/parts.py

Closed-loop PSNR against the full run on held-out samples, tap `hidden`: FreqCa, HyCa and L2P in
closed form with one row, a row per frequency band, per channel group, and per random group of
channels (the control). `freqca_high` is FreqCa's rule for high frequencies on all of them. One
torch thread; writes benchmarks/results/parts.json after every row.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from foreseer.evaluation.benchmark import FIRST_ITEM
from foreseer.evaluation.metrics import psnr, summarise
from foreseer.evaluation.plan import Entry
from foreseer.evaluation.runs import run_forecast
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.predictors.base import Predictor
from foreseer.predictors.linear import L2P, fitted_rows
from foreseer.predictors.partition import ChannelGroups, Partition
from foreseer.predictors.per_part import FreqCa
from foreseer.predictors.rules import HiCache, Reuse, Taylor
from foreseer.predictors.spectrum import Bands, equal_bands
from foreseer.training.clusters import cluster_channels, fit_hyca, random_groups
from foreseer.training.recorded import spec_of, stack_part_grams
from foreseer.trajectories.gram import relative_errors
from foreseer.trajectories.prompts import class_items
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

TAP, GRID = "hidden", (8, 8)
SCHEDULES = (
    (0, 3, 8, 14, 20, 27, 34, 43),
    (0, 5, 12, 20, 30, 40),
    (0, 1, 3, 7, 11, 15, 20, 26, 33, 40, 46),
)
WHOLE = Bands([], GRID)  # one part: the plain predictors
Row = tuple[str, Predictor, Partition, torch.Tensor, int]


def parts(
    work: str = "runs/parts",
    num_trajectories: int = 64,
    num_samples: int = 24,
    batch_size: int = 16,
    out: str = "benchmarks/results/parts.json",
) -> None:
    """Fit and measure every method.

    Args:
        work: folder of the recordings with features, about 5 MB per trajectory; made once.
        num_trajectories: trajectories fitted on.
        num_samples: held-out samples.
        batch_size: samples drawn at once.
        out: JSON file of the rows.
    """
    torch.set_num_threads(1)
    pipe = load_pipeline("zoo:fashion_dit")
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": 50}
    options = {"taps": [TAP], "features": "full", "states": False, "batch_size": batch_size}
    held_out = class_items(num_samples, 10, FIRST_ITEM)
    folders = {"fit": class_items(num_trajectories, 10), "held_out": held_out}
    fit, test = (
        Recording(record(pipe, items, Path(work) / name, **options, **settings))
        for name, items in folders.items()
    )
    batches = [held_out[i : i + batch_size] for i in range(0, len(held_out), batch_size)]
    full = pipe.image_processor.postprocess(test.stack("final"), output_type="pt")
    grams: dict[tuple[str, str], torch.Tensor] = {}
    rows = []
    for anchors in SCHEDULES:
        for name, predictor, partition, table, size in methods(fit, anchors, grams):
            entry = Entry(name, "learned", TAP, "given", anchors, predictor)
            samples = run_forecast(pipe, entry, batches, lambda evaluations: None, **settings)
            errors = relative_errors(part_grams_of(test, partition, grams), table)
            forecast = [t for t in range(fit.header.num_steps) if t not in anchors]
            rows.append(
                {
                    "method": name,
                    "parts": partition.num_parts,
                    "tap": TAP,
                    "anchors": " ".join(map(str, anchors)),
                    "num_anchors": len(anchors),
                    "psnr_db": summarise(psnr(samples.images, full)).mean,
                    "num_parameters": size,
                    "open_loop_error": float(errors[..., forecast].mean()),
                    "forecast_step_ratio": samples.step_ratio,
                    "solvers": list(getattr(predictor, "solvers", [])),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            Path(out).write_text(json.dumps(rows, indent=1) + "\n")


def methods(
    fit: Recording, anchors: tuple[int, ...], grams: dict[tuple[str, str], torch.Tensor]
) -> Iterator[Row]:
    """Every method on one schedule: name, predictor, parts, rows per branch, parameters."""
    header = fit.header
    plain = {"reuse": Reuse(), "taylor_2": Taylor(2), "freqca_high": HiCache(2, 0.71)}
    for name, rule in plain.items():
        yield name, rule, WHOLE, rule.rows(anchors, header.sigmas), 0
    for transform in ("dct", "fft"):
        freqca = FreqCa(GRID, transform)
        table = freqca.rows(anchors, header.sigmas)
        yield f"freqca_{transform}", freqca, freqca.partition, table, 0
    hyca = fit_hyca(fit, anchors, TAP)
    table = hyca.rows(anchors, header.sigmas)
    yield "hyca", hyca, hyca.partition, table, hyca.partition.num_parts
    for name, partition in partitions(fit).items():
        table = fitted_rows(part_grams_of(fit, partition, grams).sum(0), anchors)
        parts = None if partition is WHOLE else partition
        learned = L2P(header.num_steps, anchors, header.num_branches, partition=parts)
        learned.set_rows(table)
        learned.spec = spec_of(header, TAP, anchors, len(fit))
        history = sum(sum(a < t for a in anchors) for t in range(50) if t not in anchors)
        size = header.num_branches * partition.num_parts * history
        yield name, learned, partition, table, size


def partitions(fit: Recording) -> dict[str, Partition]:
    """The partitions that L2P is fitted on, by the name of the method."""
    width = fit.load(fit.items[0], [f"feature/{TAP}"])[f"feature/{TAP}"].shape[-1]
    found: dict[str, Partition] = {"l2p": WHOLE}
    found |= {f"l2p_bands_{n}": equal_bands(n, GRID) for n in (2, 3, 6)}
    found |= {f"l2p_groups_{n}": ChannelGroups(cluster_channels(fit, TAP, n)) for n in (2, 4, 8)}
    return found | {f"l2p_random_{n}": ChannelGroups(random_groups(width, n)) for n in (2, 4, 8)}


def part_grams_of(
    recording: Recording, partition: Partition, kept: dict[tuple[str, str], torch.Tensor]
) -> torch.Tensor:
    """Grams of the parts, computed once per recording and partition."""
    key = (str(recording.folder), json.dumps(partition.describe()))
    if key not in kept:
        kept[key] = stack_part_grams(recording, TAP, partition)
    return kept[key]


if __name__ == "__main__":
    auto_cli(parts)
