"""`foreseer demo`: the whole road on the bundled model, by the functions behind the commands.

Processor seconds of one thread. A 50-step guided image of the bundled model takes about 1 s in
batches of 16 and one at 6 evaluations 6/50 of that, 0.12 s.

    start     imports and loading                                                          15 s
    record    64 images in full                                                            65 s
    layers    8 images in full, plots                                                      10 s
    fit       two from Grams: 10 s. In closed loop: 8 formulas on 16 images (15 s), one
              Gauss-Newton step on 2 x 16 images at 70 evaluations each (32 x 70/50 = 45 s),
              5 times the 11 held-out ones (7 s)                                           77 s
    export                                                                                  1 s
    generate  10 images in full, 10 at 6 evaluations                                       12 s
    prompts   8 prompts in full and at 8 evaluations on the text-to-image model              15 s
    bench     16 images in full; 4 solvers and 3 formulas on 2 taps on 4 anchor lists, and
              3 predictors: 43 x 16 x 0.12 s                                              100 s
                                                                                    sum   295 s
"""

import json
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from .integration.generate import generate_command
from .integration.report_rows import load_rows
from .integration.report_table import verdict
from .training.benchmark import bench_command
from .training.closed_loop import L2PClosedLoop
from .training.export import export_command
from .training.fit_report import FitReport
from .training.inspect_command import inspect_command
from .training.l2p import L2PAdam, L2PLeastSquares, L2PModule
from .trajectories.datamodule import GramDataModule, RecordingDataModule
from .trajectories.record_command import record_command
from .trajectories.recording import Recording

ANCHORS = (0, 5, 12, 20, 30, 40)  # found by `foreseer search` for taylor_1 on the hidden tap
HELD_OUT = 0.2  # share of the recorded trajectories that no fit sees
LAYER_ITEMS = 20000  # first item of the layer recording; the others start at 0
EPOCHS = {"lstsq": 1, "adam": 201, "closed_loop": 1}
BATCHES = 2  # calibration batches of 16 per epoch: the Gram fits have one batch, of everything
RIVALS = ("euler", "ab2", "dpmpp_2m", "unipc", "reuse", "taylor_1", "taylor_2")
GUIDANCE_SCALE, NUM_STEPS = 3.0, 50
TEXT_PIPELINE, TEXT_PREDICTOR = "zoo:emoji_flux", "zoo:emoji_flux_l2p_8"
PROMPTS = (  # stored with the model
    "grinning face",
    "crying face",
    "panda face",
    "octopus",
    "sunflower",
    "red apple",
    "slice of pizza",
    "soccer ball",
)

Stage = Callable[[Path, str], None]


def demo_command(out: str = "runs/demo", pipeline: str = "zoo:fashion_dit") -> None:
    """Run every stage that is not done yet in `out`, and say where the report is.

    Args:
        out: folder of everything the demonstration makes.
        pipeline: folder of a class-to-image pipeline, or a bundled one.

    Raises:
        ValueError: `out` holds a demonstration on another pipeline.
    """
    folder = Path(out)
    seconds = seconds_spent(folder, pipeline)
    quiet()
    for number, (name, (purpose, run)) in enumerate(STAGES.items(), start=1):
        print(f"\n=== {number} of {len(STAGES)}  {name}: {purpose}", flush=True)
        if name in seconds:
            print(f"    done before, in {seconds[name]:.0f} s")
            continue
        started = time.perf_counter()
        run(folder, pipeline)
        seconds[name] = time.perf_counter() - started
        note_seconds(folder, pipeline, seconds)
        total = sum(seconds.values())
        print(f"--- {name} took {seconds[name]:.0f} s, {total:.0f} s in all", flush=True)
    bench = folder / "bench"
    print(f"\n{verdict(load_rows(bench / 'results.json'))}")
    print(f"report: {bench / 'report.html'}, picture: {folder / 'samples.png'} and prompts.png")


def record(folder: Path, pipeline: str) -> None:
    """64 trajectories for the fits."""
    record_command(
        pipeline,
        str(folder / "recording"),
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=NUM_STEPS,
        num_trajectories=64,
        first_item=0,
        batch_size=16,
        taps=("output", "hidden"),
        features="none",
        num_tokens=0,
        states=True,
    )


def layers(folder: Path, pipeline: str) -> None:
    """Eight trajectories with the features of every block, and the plots of how they move."""
    record_command(
        pipeline,
        str(folder / "layers"),
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=NUM_STEPS,
        num_trajectories=8,
        first_item=LAYER_ITEMS,
        batch_size=8,
        taps=("blocks.*", "hidden"),
        features="full",
        num_tokens=0,
        states=False,
    )
    inspect_command(str(folder / "layers"), str(folder / "plots"))


def fit(folder: Path, pipeline: str) -> None:
    """The three fits of L2P on the same trajectories and anchors."""
    recording = str(folder / "recording")
    grams = GramDataModule(recording, "output", HELD_OUT, seed=0)
    fit_one(folder, L2PLeastSquares(recording, ANCHORS), grams)
    fit_one(folder, L2PAdam(recording, ANCHORS), grams)
    module = L2PClosedLoop(recording, pipeline, ANCHORS, tap="hidden")
    fit_one(folder, module, RecordingDataModule(recording, ["final"], 16, HELD_OUT, seed=0))


def fit_one(folder: Path, module: L2PModule, data: lightning.LightningDataModule) -> None:
    """Fit one module, going on from its last checkpoint if there is one."""
    name = module.fit_name
    out = folder / "fit" / name
    lightning.seed_everything(0, verbose=False)
    checkpoint = ModelCheckpoint(out, "epoch", save_last=True, enable_version_counter=False)
    last = out / "last.ckpt"
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS[name],
        logger=TensorBoardLogger(folder, "logs", name),
        callbacks=[FitReport(str(out)), checkpoint],
        limit_train_batches=BATCHES,
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=name == "closed_loop",
    )
    print(f"    {name}: {EPOCHS[name]} epoch(s)", flush=True)
    trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None)
    print(f"    errors per step: {out / 'fit_report.png'}")


def export(folder: Path, pipeline: str) -> None:
    """Predictor checkpoints, which load without Lightning."""
    for name in EPOCHS:
        export_command(str(folder / "fit" / name / "last.ckpt"), predictor_folder(folder, name))


def generate(folder: Path, pipeline: str) -> None:
    """Ten images of the first classes, by the full run and by the exported predictor."""
    recording = Recording(folder / "recording")
    generate_command(
        pipeline=pipeline,
        predictor=predictor_folder(folder, "closed_loop"),
        class_labels=[int(recording.meta(item)["class_labels"]) for item in range(10)],
        seed=0,
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=NUM_STEPS,
        out=str(folder / "samples.png"),
        compare=True,
    )


def prompts(folder: Path, pipeline: str) -> None:
    """Words into pictures on the bundled text-to-image model, whatever pipeline was asked for."""
    generate_command(
        pipeline=TEXT_PIPELINE,
        predictor=TEXT_PREDICTOR,
        class_labels=(),
        prompts=PROMPTS,
        seed=0,
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=NUM_STEPS,
        out=str(folder / "prompts.png"),
        compare=True,
    )


def bench(folder: Path, pipeline: str) -> None:
    """The three predictors, every formula and the few-step solvers at six evaluations."""
    bench_command(
        pipeline=pipeline,
        out=str(folder / "bench"),
        budgets=(len(ANCHORS),),
        num_samples=16,
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=NUM_STEPS,
        searched=None,
        predictors=[f"l2p_{name}={predictor_folder(folder, name)}" for name in EPOCHS],
        methods=RIVALS,
        batch_size=16,
        num_threads=1,
    )


def predictor_folder(folder: Path, name: str) -> str:
    """Where the exported predictor of a fit lies."""
    return str(folder / "predictors" / name)


STAGES: dict[str, tuple[str, Stage]] = {
    "record": ("64 trajectories at 50 steps, Grams and states", record),
    "layers": ("8 trajectories with every block's features", layers),
    "fit": (f"L2P three ways, for {len(ANCHORS)} network evaluations in place of 50", fit),
    "export": ("predictor checkpoints", export),
    "generate": ("the predictor in an unmodified diffusers pipeline", generate),
    "prompts": ("words into pictures, full and forecast, on the text-to-image model", prompts),
    "bench": ("against the formulas and solvers one would use instead", bench),
}
"""What each stage is for, and what runs it."""


def seconds_spent(folder: Path, pipeline: str) -> dict[str, float]:
    """Seconds of each stage done before in this folder.

    Raises:
        ValueError: it was done with another pipeline.
    """
    path = folder / "demo.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found["pipeline"] != pipeline:
        raise ValueError(
            f"{folder} holds a demonstration on {found['pipeline']}, asked for {pipeline}; give "
            "another --out or delete that folder."
        )
    return dict(found["seconds"])


def note_seconds(folder: Path, pipeline: str, seconds: dict[str, float]) -> None:
    """Write down which stages are done."""
    content = {"pipeline": pipeline, "seconds": seconds}
    (folder / "demo.json").write_text(json.dumps(content, indent=1) + "\n")


def quiet() -> None:
    """Leave out what Lightning says about devices, loggers and its own deprecations."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
