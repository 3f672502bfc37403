"""Neural predictors with the updates that they ask for, alone and over fitted rows.

    python benchmarks/neural_forecasts.py record
    python benchmarks/neural_forecasts.py fit
    python benchmarks/neural_forecasts.py bench
    python benchmarks/neural_forecasts.py page

Every stage takes `--hosts '[fashion_dit]'` and resumes. DisCa alone starts at the better of its
formulas; over rows it starts at a least-squares L2P on the same features and anchors, so that what
it earns is what rows leave. LESA is not run over rows: on a fixed grid it is an L2P row itself
(docs/lesa.md). Fitted on a recording with features; the epoch is chosen on an eighth of it, by the
error of the finished sample; judged on the samples of benchmarks/readout.py, whose shipped readout
stands beside them. Writes benchmarks/results/neural_forecasts.json: rows as `foreseer bench` has
them, with `seconds` of the fit and the validation error after every epoch.
"""

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from readout import CALL, HOSTS, judged, run_kept
from readout_page import put

import foreseer as fs
from foreseer.checkpoints.format import load_predictor
from foreseer.evaluation.metrics import paired, psnr, summarise
from foreseer.evaluation.pairing import prompts_of
from foreseer.evaluation.plan import Entry
from foreseer.evaluation.timing import forecast_step_ratio
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.predictors.lesa import LesaPredictor
from foreseer.training.disca.disca_fit import DiscaModule
from foreseer.training.export import export_predictor
from foreseer.training.lesa.lesa_fit import LesaModule
from foreseer.trajectories.datamodule import RecordingDataModule
from foreseer.trajectories.prompts import asked_items, generate_batch
from foreseer.trajectories.recorder import record as record_trajectories

ROOT = Path("runs/neural_forecasts")
RESULT = Path("benchmarks/results/neural_forecasts.json")
PAGE = Path("docs/disca.md")
READOUT = "zoo:{}_readout_8"
VALIDATION = 0.125
NAMES = ("feature/hidden", "feature/output", "final")
HEADS = {"fashion_dit": 3}  # of 32 channels, as the 4 of the other hosts
CLOSED_RATES = {  # of the phase in closed loop, per host: (DisCa, LESA)
    "fashion_dit": (2e-4, 0.2),
    "emoji_flux_2": (2e-5, 0.02),  # those of fashion_dit drive both away there
}
DISCA: dict[str, Any] = {"width_mult": 0.5, "residual": True, "max_gap": 0.25}
DISCA |= {"learning_rate": 5e-4}
METHODS = ("disca_over_rows", "disca", "lesa")


def record(hosts: Sequence[str] = tuple(HOSTS), num_trajectories: int = 192) -> None:
    """Record runs with all features of `hidden` and `output`.

    Args:
        hosts: bundled models.
        num_trajectories: trajectories, validation included.
    """
    torch.set_num_threads(1)
    for host in hosts:
        pipe = load_pipeline(f"zoo:{host}")
        items = asked_items(pipe, HOSTS[host].calibration, num_trajectories, 0)
        options: dict[str, Any] = {"taps": ["output", "hidden"], "batch_size": 16}
        record_trajectories(
            pipe, items, ROOT / host / "recording", features="full", **options, **CALL
        )


def fit(
    hosts: Sequence[str] = tuple(HOSTS),
    methods: Sequence[str] = METHODS,
    mse_epochs: int = 12,
    closed_epochs: int = 8,
    lesa_epochs: int = 24,
) -> None:
    """Fit what is not there yet, on the anchors of the shipped readout at 8.

    Args:
        hosts: bundled models.
        methods: what to fit.
        mse_epochs: DisCa's epochs on recorded features.
        closed_epochs: DisCa's epochs on the finished sample.
        lesa_epochs: LESA's epochs on the finished sample.
    """
    torch.set_num_threads(1)
    for host in hosts:
        root, anchors = ROOT / host, anchors_of(host)
        root.mkdir(parents=True, exist_ok=True)
        rows = root / "rows"
        if not (rows / "config.json").exists():
            fs.fit(
                fs.Recording(root / "recording"),
                method="lstsq",
                tap="hidden",
                anchors=list(anchors),
                out=str(rows),
            )
        for method in methods:
            if (root / method / "config.json").exists():
                continue
            lightning.seed_everything(0, verbose=False)
            if method == "lesa":
                train(host, method, lesa(root, host, anchors, lesa_epochs), 1 + lesa_epochs, 4)
                continue
            given = DISCA | ({"rows": str(rows)} if method == "disca_over_rows" else {"order": 1})
            given |= {"mse_epochs": mse_epochs, "closed_epochs": closed_epochs}
            given |= {"num_heads": HEADS.get(host, 4), "closed_rate": CLOSED_RATES[host][0]}
            module = DiscaModule(str(root / "recording"), f"zoo:{host}", anchors, **given)
            train(host, method, module, mse_epochs + closed_epochs, 2)


def anchors_of(host: str) -> tuple[int, ...]:
    """The list of all fits here."""
    found: tuple[int, ...] = load_predictor(READOUT.format(host)).spec.anchors
    return found


def lesa(root: Path, host: str, anchors: Sequence[int], epochs: int) -> LesaModule:
    """LESA with the settings of its own table, for longer."""
    config = yaml.safe_load(Path("configs/fit/lesa.yaml").read_text())
    told: dict[str, Any] = config["model"]["init_args"]
    arguments = told.pop("predictor")["init_args"]
    told |= {"recording": str(root / "recording"), "pipeline": f"zoo:{host}"}
    told |= {"anchors": list(anchors), "closed_loop_epochs": epochs}
    told |= {"closed_loop_rate": CLOSED_RATES[host][1]}
    return LesaModule(predictor=functools.partial(LesaPredictor, **arguments), **told)


class Curve(Callback):
    """Keeps the validation error after every epoch, over all starts of a training.

    Args:
        path: file of the numbers, by epoch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """Add the epoch that is over."""
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        known["start"] = float(module.start_error)
        known[str(trainer.current_epoch + 1)] = float(trainer.callback_metrics["val/error_db"])
        known["seconds"] = float(module.fit_seconds)
        self.path.write_text(json.dumps(known) + "\n")
        print(f"{self.path}: {known}", flush=True)


def train(host: str, method: str, module: Any, epochs: int, batch_size: int) -> None:
    """Train and export the best epoch; goes on at the last one.

    Args:
        host: bundled model.
        method: name of the folder.
        module: what is trained.
        epochs: of all phases.
        batch_size: trajectories of an update.
    """
    root = ROOT / host
    work = root / "work" / method
    work.mkdir(parents=True, exist_ok=True)
    last = work / "last.ckpt"
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[
            Curve(work / "curve.json"),
            ModelCheckpoint(work, "best", "val/error_db", enable_version_counter=False),
            ModelCheckpoint(work, "last", enable_version_counter=False),
        ],
    )
    names = [name for name in NAMES if method != "lesa" or name != "feature/output"]
    data = RecordingDataModule(str(root / "recording"), names, batch_size, VALIDATION, 0)
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    seconds = float(module.fit_seconds)
    module.load_state_dict(torch.load(work / "best.ckpt", weights_only=True)["state_dict"])
    told = {"fit_seconds": seconds, "val_error_db": float(module.val_error)}
    export_predictor(
        module, root / method, told | {"val_error_db_start": float(module.start_error)}
    )


def bench(hosts: Sequence[str] = tuple(HOSTS), num_samples: int = 64) -> None:
    """Judge what was fitted, beside the shipped readout and the rows.

    Args:
        hosts: bundled models.
        num_samples: judged samples.
    """
    torch.set_num_threads(1)
    told = json.loads(RESULT.read_text()) if RESULT.exists() else []
    told = [row for row in told if row["host"] not in hosts]
    for host in hosts:
        pipe, batches, full = judged(host, num_samples)
        prompts = prompts_of([item for batch in batches for item in batch])
        folders = {"readout": READOUT.format(host), "rows": str(ROOT / host / "rows")}
        folders |= {name: str(ROOT / host / name) for name in METHODS}
        errors, rows = {}, []
        for method, folder in folders.items():
            if not folder.startswith("zoo:") and not (Path(folder) / "config.json").exists():
                print(f"{host}: {method} was not fitted")
                continue
            predictor = load_predictor(folder)
            spec = predictor.spec
            entry = Entry(method, "learned", spec.tap, "given", spec.anchors, predictor)
            started = time.perf_counter()
            made = run_kept(pipe, host, entry, batches, full["sigmas"])
            errors[method] = psnr(made["images"], full["images"])
            found = summarise(errors[method])
            row = {"host": host, "method": method, "tap": spec.tap}
            row |= {"anchors": " ".join(map(str, spec.anchors)), "num_anchors": len(spec.anchors)}
            row |= {"psnr_db": found.mean, "psnr_median": found.median, "psnr_q10": found.q10}
            row |= {"size": predictor.size(), "fit_seconds": spec.metrics.get("fit_seconds")}
            run = functools.partial(generate_batch, pipe, batches[0], output_type="latent", **CALL)
            cost = forecast_step_ratio(pipe, predictor, spec.tap, spec.anchors, run)
            row["forecast_step"] = cost.ratio
            curve = ROOT / host / "work" / method / "curve.json"
            row["curve"] = json.loads(curve.read_text()) if curve.exists() else None
            rows.append(row)
            print(f"{host} {method}: {found.mean:.2f} dB, {time.perf_counter() - started:.0f} s")
        for row in rows:
            if row["method"] != "readout":
                gap = paired(errors[row["method"]], errors["readout"], prompts)
                row |= {"rival": "readout", "paired_db": gap.mean, "wins": gap.wins}
                row |= {"paired_low_db": gap.low, "paired_high_db": gap.high}
        told += rows
        RESULT.write_text(json.dumps(told, indent=1) + "\n")


def page() -> None:
    """Write the table of docs/disca.md."""
    lines = [
        "8 evaluations of 50, PSNR in dB against the full run (mean / median / 10 % quantile over "
        "64 judged samples), and minus the readout on the same samples with its 95 % interval. "
        "Validation: error of held-out finished latents in dB, at the start and after the best "
        "epoch of all.",
        "",
        "| model | method | PSNR | minus the readout | forecast step | fit, minutes | validation |",
        "|" + " --- |" * 7,
    ]
    for row in json.loads(RESULT.read_text()):
        told = f"{row['psnr_db']:.2f} / {row['psnr_median']:.2f} / {row['psnr_q10']:.2f}"
        cells = [f"{row['host']} | `{row['method']}` | {told}", "", "", "", ""]
        if row["method"] != "readout":
            ends = f"{row['paired_low_db']:+.2f} to {row['paired_high_db']:+.2f}"
            cells[1] = f"{row['paired_db']:+.2f} ({ends})"
        cells[2] = f"{100 * row['forecast_step']:.1f} %"
        if row["fit_seconds"] is not None:
            cells[3] = f"{row['fit_seconds'] / 60:.1f}"
        if row["curve"] is not None:
            errors = {epoch: float(error) for epoch, error in row["curve"].items()}
            start = errors.pop("start")
            del errors["seconds"]
            best = min(errors, key=lambda epoch: errors[epoch])
            cells[4] = f"{start:.1f}, {errors[best]:.1f} (epoch {best} of {len(errors)})"
        lines.append(f"| {' | '.join(cells)} |")
    put(PAGE, "neural", "\n".join(lines))


if __name__ == "__main__":
    auto_cli([record, fit, bench, page])
