"""What of LESA earns its cost: gates, stages, phases, on the bundled DiT and one anchor list.

    python benchmarks/lesa_ablation.py record
    python benchmarks/lesa_ablation.py fit
    python benchmarks/lesa_ablation.py bench

Every stage resumes: a fit goes on at its last epoch, the benchmark after its last row. All methods
take the list searched for taylor_1 on the hidden tap, and forecast that tap; the benchmark's
(label, seed) pairs are in no recording. Settings are those of configs/fit/lesa.yaml and
lesa_published.yaml, changed as `VARIANTS` says. Writes benchmarks/results/lesa.json.
"""

import functools
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from fashion_dit import PIPELINE, fit_one
from fashion_dit import record as record_grams
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import ModelCheckpoint

from foreseer.checkpoints.format import save_predictor
from foreseer.evaluation.benchmark import FIRST_ITEM, compare_methods
from foreseer.evaluation.plan import load_learned
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.lesa_values import LesaValues
from foreseer.training.export import export_predictor
from foreseer.training.lesa.lesa_fit import LesaModule
from foreseer.training.lesa.linear_equivalent import refit
from foreseer.training.recorded import spec_of
from foreseer.trajectories.datamodule import RecordingDataModule
from foreseer.trajectories.prompts import class_items
from foreseer.trajectories.recorder import record as record_trajectories
from foreseer.trajectories.recording import Recording, split

ROOT = Path("runs/lesa")
RESULT = Path("benchmarks/results/lesa.json")
SEARCHED = Path("benchmarks/results/fashion_dit_searched.json")
LIST_OF = "taylor_1|hidden"
CONFIGS = Path("configs/fit")
SETTINGS: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": 50}

ANCHORS_ALONE = {"gate_rate": 2e-3, "closed_loop_rate": 0.5}
Changes = tuple[str, dict[str, Any], dict[str, Any]]
VARIANTS: dict[str, Changes] = {
    "lesa": ("lesa", {}, {}),
    "lesa_phase1": ("lesa", {}, {"phases": 1}),
    "lesa_mlp": ("lesa", {"gate": "mlp"}, {}),
    "lesa_no_stages": ("lesa", {"boundaries": [], "taps": [8]}, {}),
    "lesa_published": ("lesa_published", {}, {}),
    "lesa_anchors_kan": ("lesa", {"feedback": False}, ANCHORS_ALONE),
    "lesa_anchors_table": ("lesa", {"feedback": False, "gate": "table"}, ANCHORS_ALONE),
    "lesa_feature_target": ("lesa", {}, {"closed_loop_target": "feature"}),
    "lesa_values": ("lesa", {"taps": [4, 4, 4], "class": LesaValues}, {"epochs": (1, 0)}),
}
"""Config, changes of the predictor, changes of the training, by the method's name in the table."""
AT_EIGHT = ("lesa_anchors_kan", "lesa_anchors_table", "lesa_feature_target", "lesa_values")
"""Variants that are trained at 8 evaluations only."""
LINEAR = ("lesa_linear_equivalent", "lesa_linear_equivalent_phase1")
L2P = ("l2p_closed_loop", "l2p_lstsq", "l2p_adam")


def record(num_trajectories: int = 128, num_threads: int = 1, out: str = str(ROOT)) -> None:
    """Record what is trained on: all features of the hidden tap; Grams and states for L2P.

    Args:
        num_trajectories: trajectories with features, validation included.
        num_threads: torch threads.
        out: folder of everything.
    """
    torch.set_num_threads(num_threads)
    options: dict[str, Any] = {"taps": ["hidden"], "features": "full", "states": False}
    options |= {"batch_size": 16}
    items = class_items(num_trajectories, 10)
    record_trajectories(
        load_pipeline(PIPELINE), items, Path(out) / "features", **options, **SETTINGS
    )


def fit(
    budgets: Sequence[int] = (8, 11, 6),
    methods: Sequence[str] = (*VARIANTS, *LINEAR, *L2P),
    num_threads: int = 1,
    out: str = str(ROOT),
    epochs: Sequence[int] | None = None,
    limit_batches: int | None = None,
) -> None:
    """Fit every method at every budget, those that are not there yet.

    Args:
        budgets: network evaluations.
        methods: what to fit.
        num_threads: torch threads.
        out: folder of everything.
        epochs: of the two phases, in place of the configs' own (for a trial).
        limit_batches: batches per epoch (for a trial); None takes all.
    """
    torch.set_num_threads(num_threads)
    for budget in budgets:
        anchors = anchors_of(budget)
        for method in methods:
            folder = Path(out) / "predictors" / method / str(budget)
            if (folder / "config.json").exists():
                continue
            if budget != 8 and method in AT_EIGHT:
                continue
            if method in VARIANTS:
                fit_lesa(method, anchors, Path(out), folder, epochs, limit_batches)
            elif method in LINEAR:
                fit_linear(anchors, Path(out), budget)
            else:
                fit_l2p(method, anchors, folder)


def anchors_of(budget: int) -> list[int]:
    """The list of a budget."""
    return json.loads(SEARCHED.read_text())[f"{LIST_OF}|{budget}"]


def fit_lesa(
    method: str,
    anchors: Sequence[int],
    root: Path,
    folder: Path,
    epochs: Sequence[int] | None,
    limit_batches: int | None,
) -> None:
    """Train one variant and export the best epoch; goes on at its last epoch."""
    name, predictor_changes, changes = VARIANTS[method]
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    told: dict[str, Any] = config["model"]["init_args"]
    arguments = told.pop("predictor")["init_args"] | predictor_changes
    kind = arguments.pop("class", LesaPredictor)
    told |= {"recording": str(root / "features"), "anchors": list(anchors)}
    changes = dict(changes)
    phases = changes.pop("epochs", (told["open_loop_epochs"], told["closed_loop_epochs"]))
    phases = epochs or phases
    if changes.pop("phases", 2) == 1:
        phases = (sum(phases), 0)
    told |= {"open_loop_epochs": phases[0], "closed_loop_epochs": phases[1], **changes}
    lightning.seed_everything(config["seed_everything"], verbose=False)
    module = LesaModule(predictor=functools.partial(kind, **arguments), **told)
    data = config["data"]["init_args"] | {"folder": str(root / "features")}
    work = folder.parent / f"{folder.name}_work"
    keep = [
        ModelCheckpoint(work, "best", "val/error_db", enable_version_counter=False),
        ModelCheckpoint(work, "last", enable_version_counter=False),
    ]
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=sum(phases),
        limit_train_batches=limit_batches,
        limit_val_batches=limit_batches,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=keep,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    last = work / "last.ckpt"
    trainer.fit(
        module,
        datamodule=RecordingDataModule(**data),
        ckpt_path=str(last) if last.exists() else None,
    )
    seconds = float(module.fit_seconds)
    best = torch.load(work / "best.ckpt", weights_only=True)
    module.load_state_dict(best["state_dict"])
    metrics = {"fit_seconds": seconds, "val_error_db": float(module.val_error)}
    metrics |= {"val_error_db_start": float(module.start_error), "best_epoch": best["epoch"]}
    export_predictor(module, folder, metrics)
    print(f"{folder}: {metrics}", flush=True)


def fit_linear(anchors: Sequence[int], root: Path, budget: int) -> None:
    """Fit the linear equivalent: the best run of both phases, and the first phase alone."""
    recording = Recording(root / "features")
    train, val = split(recording.items, (0.8, 0.2), 0)  # as the configs' data modules
    started = time.perf_counter()
    found = refit(load_silent(), recording, anchors, train, val)
    metrics = {"fit_seconds": time.perf_counter() - started}
    best = min(found, key=lambda pair: pair[1])
    for method, (predictor, error) in zip(LINEAR, (best, found[0]), strict=True):
        spec = spec_of(recording.header, "hidden", anchors, len(train))
        spec.metrics.update(metrics | {"val_error_db": error})
        folder = root / "predictors" / method / str(budget)
        save_predictor(predictor, spec, folder)
        print(f"{folder}: {spec.metrics} of {[pair[1] for pair in found]}", flush=True)


def fit_l2p(method: str, anchors: Sequence[int], folder: Path) -> None:
    """Fit L2P on the same list; the closed-loop fits of 8 and 6 evaluations are bundled."""
    bundled = Path("checkpoints/zoo") / f"fashion_dit_l2p_{len(anchors)}"
    if method == "l2p_closed_loop" and bundled.exists():
        shutil.copytree(bundled, folder)
        return
    recording = Path("runs/fashion_dit/guidance_3/recording")
    if not recording.exists():
        record_grams()
    fit_one(method.removeprefix("l2p_"), "hidden", str(recording), anchors, folder)


def load_silent() -> Any:
    """The bundled pipeline without its progress bar."""
    pipe = load_pipeline(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bench(
    budgets: Sequence[int] = (11, 8, 6),
    methods: Sequence[str] | None = None,
    num_samples: int = 64,
    num_threads: int = 1,
    out: str = str(ROOT),
    write: bool = True,
) -> None:
    """Generate the held-out samples with everything that was fitted and with the references.

    Args:
        budgets: network evaluations.
        methods: solvers and formulas to run beside; None runs all.
        num_samples: held-out (label, seed) pairs.
        num_threads: torch threads.
        out: folder of everything.
        write: copy the results to benchmarks/results.
    """
    torch.set_num_threads(num_threads)
    folders = [
        folder.parent
        for budget in budgets
        for folder in sorted((Path(out) / "predictors").glob(f"*/{budget}/config.json"))
    ]
    page = compare_methods(
        load_silent(),
        class_items(num_samples, 10, first_item=FIRST_ITEM),
        Path(out) / "bench",
        budgets,
        load_learned([f"{folder.parent.name}={folder}" for folder in folders]),
        {f"{LIST_OF}|{budget}": anchors_of(budget) for budget in budgets},
        methods,
        16,
        "python benchmarks/lesa_ablation.py bench",
        common=(),
        **SETTINGS,
    )
    if write:
        for ending in (".json", ".meta.json", ".md"):
            shutil.copy(page.parent / f"results{ending}", RESULT.with_suffix(ending))
        print(f"wrote {RESULT}; the report lies in {page}")


if __name__ == "__main__":
    auto_cli([record, fit, bench])
