"""The reference table: every method, tap and list of anchors at 11, 8 and 6 evaluations.

    python benchmarks/reference_table.py
    python benchmarks/reference_table.py --budgets [8] --write false   # a part

Records, fits and measures on the bundled model at guidance 3 and 50 steps, held-out (label, seed)
pairs, every method of a list on the same anchors; writes benchmarks/results/reference_table.json.
The lists are `uniform`, `published` (L2P's release) and `searched` (for taylor_1 on the hidden
tap). Whatever is finished is kept: the same command goes on, and parts that ran before are joined.
A full run takes hours on two cores, most of them the closed-loop fits.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from continuous import GRIDS
from continuous import ROOT as GRIDS_ROOT
from continuous import record as record_grids
from fashion_dit import PIPELINE, fit_one, folder_of
from fashion_dit import record as record_trajectories
from jsonargparse import auto_cli
from parts import GRID

from foreseer.checkpoints.format import save_predictor
from foreseer.evaluation.benchmark import FIRST_ITEM, compare_methods
from foreseer.evaluation.plan import load_learned
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.schedule import PUBLISHED_L2P, uniform
from foreseer.predictors.base import Predictor
from foreseer.predictors.continuous import L2PContinuous
from foreseer.predictors.linear import L2P, fitted_rows
from foreseer.predictors.partition import ChannelGroups
from foreseer.predictors.per_part import FreqCa
from foreseer.predictors.rules import RULES
from foreseer.predictors.spectrum import equal_bands
from foreseer.training.clusters import cluster_channels, fit_hyca
from foreseer.training.continuous_fit import fit_continuous
from foreseer.training.recorded import spec_of, stack_part_grams
from foreseer.trajectories.prompts import class_items
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

ROOT = Path("runs/reference")
RESULT = Path("benchmarks/results/reference_table.json")
SEARCHED = Path("benchmarks/results/fashion_dit_searched.json")
SETTINGS: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": 50}
CLOSED_LOOP = {
    11: ("searched",),
    8: ("uniform", "published", "searched"),
    6: ("uniform", "published", "searched"),
}
"""Lists the closed-loop fit is made for: it is the only fit that takes more than seconds."""
FORMULAS: dict[str, Predictor | Mapping[str, Predictor]] = {
    **RULES,
    "freqca_dct": {"output": FreqCa((32, 32), "dct"), "hidden": FreqCa(GRID, "dct")},
    "freqca_fft": {"output": FreqCa((32, 32), "fft"), "hidden": FreqCa(GRID, "fft")},
}


def reference_table(
    budgets: Sequence[int] = (11, 8, 6),
    num_samples: int = 64,
    num_threads: int = 1,
    write: bool = True,
) -> None:
    """Make the table.

    Args:
        budgets: network evaluations.
        num_samples: held-out (label, seed) pairs.
        num_threads: torch threads.
        write: copy the results to benchmarks/results.
    """
    torch.set_num_threads(num_threads)
    record_all()
    torch.set_num_threads(num_threads)
    for budget in budgets:
        for label, anchors in lists(budget).items():
            fit_all(label, anchors)
    folders = sorted(
        folder
        for folder in (ROOT / "predictors").glob("*/*_*_*")
        if int(folder.name.rsplit("_", 1)[1]) in budgets
    )
    pipe = load_pipeline(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    page = compare_methods(
        pipe,
        class_items(num_samples, 10, first_item=FIRST_ITEM),
        ROOT / "bench",
        budgets,
        load_learned([f"{folder.parent.name}={folder}" for folder in folders]),
        batch_size=16,
        command="python benchmarks/reference_table.py",
        rules=FORMULAS,
        common=("uniform", "published"),
        **SETTINGS,
    )
    if write:
        for ending in (".json", ".meta.json", ".md"):
            shutil.copy(page.parent / f"results{ending}", RESULT.with_suffix(ending))
        print(f"wrote {RESULT}; the report lies in {page}")


def lists(budget: int) -> dict[str, tuple[int, ...]]:
    """The three lists of a budget."""
    searched = json.loads(SEARCHED.read_text())[f"taylor_1|hidden|{budget}"]
    return {
        "uniform": uniform(budget),
        "published": PUBLISHED_L2P[budget],
        "searched": tuple(searched),
    }


def record_all() -> None:
    """Calibration trajectories: Grams and states, features of the hidden tap, other grids."""
    if not (folder_of(3.0) / "recording").exists():
        record_trajectories()
    if not Path("runs/parts/fit").exists():
        options: dict[str, Any] = {"taps": ["hidden"], "features": "full", "states": False}
        items = class_items(64, 10)
        record(
            load_pipeline(PIPELINE), items, "runs/parts/fit", batch_size=16, **options, **SETTINGS
        )
    if not all((GRIDS_ROOT / f"steps_{grid}").exists() for grid in ("20", "28")):
        record_grids()


def fit_all(label: str, anchors: tuple[int, ...]) -> None:
    """Fit every learned predictor for one list, those that are not there yet."""
    recording = str(folder_of(3.0) / "recording")
    kinds = ["adam|output", "lstsq|output", "lstsq|hidden"]
    if label in CLOSED_LOOP[len(anchors)]:
        kinds.append("closed_loop|hidden")
    for kind, tap in (key.split("|") for key in kinds):
        out = folder(f"l2p_{kind}", tap, label, anchors)
        if not out.exists():
            fit_one(kind, tap, recording, anchors, out)
    fit_parts(label, anchors)
    for tap in ("output", "hidden"):
        fit_grids(tap, label, anchors)


def folder(method: str, tap: str, label: str, anchors: Sequence[int]) -> Path:
    """Where a predictor lies."""
    return ROOT / "predictors" / method / f"{tap}_{label}_{len(anchors)}"


def fit_parts(label: str, anchors: tuple[int, ...]) -> None:
    """HyCa, and L2P in closed form with rows per frequency band and per channel group."""
    fit = Recording("runs/parts/fit")
    header = fit.header
    spec = spec_of(header, "hidden", anchors, len(fit))
    out = folder("hyca", "hidden", label, anchors)
    if not out.exists():
        save_predictor(fit_hyca(fit, anchors, "hidden"), spec, out)
    partitions = {
        "l2p_bands_3": lambda: equal_bands(3, GRID),
        "l2p_groups_4": lambda: ChannelGroups(cluster_channels(fit, "hidden", 4)),
    }
    for name, make in partitions.items():
        out = folder(name, "hidden", label, anchors)
        if out.exists():
            continue
        partition = make()
        predictor = L2P(header.num_steps, anchors, header.num_branches, partition=partition)
        grams = stack_part_grams(fit, "hidden", partition)
        predictor.set_rows(fitted_rows(grams.sum(0), anchors))
        save_predictor(predictor, spec, out)


def fit_grids(tap: str, label: str, anchors: tuple[int, ...]) -> None:
    """The continuous-time fit on runs of 20 and 28 steps, for the 50 steps it has not seen."""
    out = folder("l2p_continuous", tap, label, anchors)
    if out.exists():
        return
    recordings = [Recording(GRIDS_ROOT / f"steps_{grid}") for grid in ("28", "20")]
    sigmas = [recording.header.sigmas for recording in recordings]
    predictor = L2PContinuous(sigmas, 2, max_steps=GRIDS["50"][0], sigma_margin=0.03)
    means = [recording.stack(f"gram/{tap}").double().mean(0) for recording in recordings]
    fit_continuous(predictor, means, num_lists=100, ridge=1e-3, seed=0)
    count = sum(len(recording) for recording in recordings)
    digest = "+".join(recording.header.recipe_hash for recording in recordings)
    header = Recording(folder_of(3.0) / "recording").header  # of the runs it is for
    save_predictor(predictor, spec_of(header, tap, anchors, count, digest), out)


if __name__ == "__main__":
    auto_cli(reference_table)
