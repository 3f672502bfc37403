"""The reference benchmark of the bundled DiT: record, search, fit and bench, one stage at a time.

    python benchmarks/fashion_dit.py record
    python benchmarks/fashion_dit.py search
    python benchmarks/fashion_dit.py fit
    python benchmarks/fashion_dit.py bench

Every stage resumes. Stages of different budgets may run at the same time, each in its own process.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
from jsonargparse import auto_cli

import foreseer as fs
from foreseer.evaluation.solvers import SOLVERS
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.schedule import PUBLISHED_L2P, uniform, warped
from foreseer.predictors.rules import RULES
from foreseer.training.closed_loop import L2PClosedLoop
from foreseer.training.export import export_predictor
from foreseer.training.gram_fit import GramFit
from foreseer.training.l2p import L2PAdam, L2PLeastSquares
from foreseer.trajectories.datamodule import GramDataModule, RecordingDataModule
from foreseer.trajectories.prompts import class_items
from foreseer.trajectories.recorder import record as record_trajectories

PIPELINE = "zoo:fashion_dit"
HELD_OUT = 0.33  # of the recording, for validation; the benchmark's samples are never recorded
EPOCHS = {"adam": 201, "lstsq": 1, "closed_loop": 2}
FITS = ("lstsq|output", "adam|output", "closed_loop|hidden")
LIST_OF = "taylor_1|hidden"  # the searched list that all fits take, so that they share anchors
METHODS = [
    *(f"{solver}|none" for solver in SOLVERS),
    *(f"{rule}|{tap}" for rule in RULES if rule != "newton_1" for tap in ("output", "hidden")),
    "l2p_closed_loop|output",
]  # newton_1 has the rows of taylor_1, so its best list is the same


def folder_of(guidance_scale: float) -> Path:
    """Where everything at one guidance scale lies."""
    return Path("runs/fashion_dit") / f"guidance_{guidance_scale:g}"


def record(guidance_scale: float = 3.0, num_trajectories: int = 96, num_threads: int = 2) -> None:
    """Record the calibration trajectories: Grams of two taps, and states.

    Args:
        guidance_scale: classifier-free guidance scale; 1 is without.
        num_trajectories: calibration trajectories, validation included.
        num_threads: torch threads.
    """
    torch.set_num_threads(num_threads)
    record_trajectories(
        load_pipeline(PIPELINE),
        class_items(num_trajectories, 10),
        folder_of(guidance_scale) / "recording",
        batch_size=16,
        guidance_scale=guidance_scale,
        num_inference_steps=50,
    )


def search(
    guidance_scale: float = 3.0,
    budgets: Sequence[int] = (11, 8, 6),
    methods: Sequence[str] = METHODS,
    num_samples: int = 12,
    num_moves: int = 4,
    num_threads: int = 2,
) -> None:
    """Search the anchors of every method at every budget on calibration trajectories.

    Args:
        guidance_scale: classifier-free guidance scale.
        budgets: network evaluations.
        methods: `method|tap` of each.
        num_samples: calibration trajectories.
        num_moves: single moves tried from the best list.
        num_threads: torch threads.
    """
    torch.set_num_threads(num_threads)
    root = folder_of(guidance_scale)
    for budget in budgets:
        path = root / f"searched_{budget}.json"
        recording = str(root / "recording")
        fs.search(recording, PIPELINE, str(path), [budget], methods, num_samples, num_moves)
        found = json.loads(path.read_text())
        for tap in ("output", "hidden"):
            if f"taylor_1|{tap}|{budget}" in found:
                found[f"newton_1|{tap}|{budget}"] = found[f"taylor_1|{tap}|{budget}"]
        path.write_text(json.dumps(found, indent=1) + "\n")


def fit(
    guidance_scale: float = 3.0,
    budgets: Sequence[int] = (11, 8, 6),
    fits: Sequence[str] = FITS,
    num_threads: int = 2,
) -> None:
    """Fit L2P: the open-loop fits on every list, the closed-loop fits on their searched list.

    Args:
        guidance_scale: classifier-free guidance scale.
        budgets: network evaluations.
        fits: `fit|tap` of each.
        num_threads: torch threads.
    """
    torch.set_num_threads(num_threads)
    root = folder_of(guidance_scale)
    for budget in budgets:
        found = json.loads((root / f"searched_{budget}.json").read_text())
        common = {
            "uniform": uniform(budget),
            "published": PUBLISHED_L2P[budget],
            "warped": warped(budget),
        }
        for key in fits:
            kind, tap = key.split("|")
            own = {"searched": tuple(found[f"{LIST_OF}|{budget}"])}
            for label, anchors in (own if kind == "closed_loop" else common | own).items():
                out = root / "predictors" / f"l2p_{kind}" / f"{tap}_{label}_{budget}"
                if not out.exists():
                    fit_one(kind, tap, str(root / "recording"), anchors, out)


def fit_one(kind: str, tap: str, recording: str, anchors: Sequence[int], out: Path) -> None:
    """Fit one predictor and export it with its fit time."""
    module: GramFit
    data: lightning.LightningDataModule
    if kind == "closed_loop":
        module = L2PClosedLoop(recording, PIPELINE, anchors, tap)
        data = RecordingDataModule(recording, ["final"], 16, HELD_OUT, 0)
    else:
        module = {"adam": L2PAdam, "lstsq": L2PLeastSquares}[kind](recording, anchors, tap)
        data = GramDataModule(recording, tap, HELD_OUT, 0)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS[kind],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    started = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - started
    metrics = {"fit_seconds": seconds}
    if isinstance(module, L2PClosedLoop):
        metrics["validation_gain_db"] = float(module.start_error - module.best_error)
    export_predictor(module, out, metrics)
    print(f"{out}: {seconds:.1f} s {metrics}", flush=True)


def bench(
    guidance_scale: float = 3.0,
    budgets: Sequence[int] = (11, 8, 6),
    methods: Sequence[str] | None = None,
    num_samples: int = 64,
    num_threads: int = 2,
    out: str = "",
) -> None:
    """Generate the held-out samples with every method and write the report.

    Args:
        guidance_scale: classifier-free guidance scale.
        budgets: network evaluations.
        methods: leave out all others; None benches everything.
        num_samples: held-out (label, seed) pairs.
        num_threads: torch threads.
        out: folder of the report; empty takes the guidance scale's own.
    """
    root = folder_of(guidance_scale)
    searched: dict[str, list[int]] = {}
    for budget in budgets:
        searched |= json.loads((root / f"searched_{budget}.json").read_text())
    path = root / f"searched_{'_'.join(map(str, budgets))}_all.json"
    path.write_text(json.dumps(searched, indent=1) + "\n")
    folders = sorted((root / "predictors").glob("l2p_*/*_*"))
    predictors = [
        f"{folder.parent.name}={folder}"
        for folder in folders
        if int(folder.name.rsplit("_", 1)[1]) in budgets
    ]
    fs.bench(
        PIPELINE,
        out=out or str(root / "bench"),
        budgets=budgets,
        num_samples=num_samples,
        guidance_scale=guidance_scale,
        num_inference_steps=50,
        searched=str(path),
        predictors=predictors,
        methods=methods,
        batch_size=16,
        num_threads=num_threads,
    )


if __name__ == "__main__":
    auto_cli([record, search, fit, bench])
