"""Script: what the toys of tests/test_contributing.py do in a copy of the package that has them.

Usage: recipes_followed.py FOLDER, with the copy on PYTHONPATH. Prints what was seen as JSON.
"""

import contextlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from families import MORE, call
from tiny_pipelines import tiny_pipeline

import foreseer as fs
from foreseer.cli import main
from foreseer.evaluation.results import load_rows
from foreseer.evaluation.verify import check_tap, final_latents
from foreseer.integration.policy import Action, Schedule
from foreseer.integration.schedule import common_lists
from foreseer.predictors.base import Step
from foreseer.predictors.rules import RULES

STEPS, BUDGET = 6, 3
CALL: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0}


class EverySecond(Schedule):
    """Even steps are anchors."""

    def before(self, step: Step) -> Action:
        """What becomes of the next call."""
        return Action.FORECAST if step.index % 2 else Action.RUN


def bench(folder: Path) -> dict[str, Any]:
    """The benchmark's rows and page, which the predictor, the schedule and the figure are on."""
    words = ["--pipeline", str(folder / "pipe"), "--out", str(folder / "bench")]
    words += ["--num_inference_steps", str(STEPS), "--budgets", f"[{BUDGET}]"]
    main(["bench", *words, "--methods", "[toy, euler]", "--num_samples", "2"])
    rows = load_rows(folder / "bench" / "results.json")
    return {
        "methods": sorted({row.method for row in rows}),
        "lists": {row.anchors_name: row.steps for row in rows if row.method == "toy"},
        "page": (folder / "bench" / "report.html").read_text(),
        "files": sorted(path.name for path in (folder / "bench").glob("*.png")),
    }


def forecast(predictor: Any, anchors: Any = None, schedule: Schedule | None = None) -> list[int]:
    """The anchors of a run."""
    pipe = tiny_pipeline()
    with fs.forecasting(pipe, predictor, anchors, schedule=schedule) as run:
        images = pipe([0, 2], generator=torch.Generator().manual_seed(0), **CALL).images
    assert len(images) == 2
    return run.report().anchors


def fit(folder: Path) -> dict[str, Any]:
    """The fit by its name, from Python, and by its configuration with the export, from a shell."""
    pipe = tiny_pipeline()
    place = str(folder / "recording")
    recording = fs.record(pipe, None, place, num_trajectories=6, batch_size=2, **CALL)
    predictor = fs.fit(recording, BUDGET, method="toy", out=str(folder / "fitted"))
    words = ["--model.init_args.recording", place, "--model.init_args.anchors", "[0, 2, 4]"]
    with contextlib.chdir(folder):
        main(["fit", "--config", "toy", *words])
        main(["export", "--checkpoint", "runs/fit/toy/last.ckpt", "--out", "exported"])
    loaded = fs.load(str(folder / "fitted"))
    return {
        "anchors": forecast(loaded),
        "expected": list(predictor.spec.anchors),
        "same": torch.equal(loaded.weight, predictor.weight),
        "exported": forecast(fs.load(str(folder / "exported"))),
        "weights": float(loaded.weight.tril(-1).sum()),
    }


def host() -> dict[str, list[bool]]:
    """What passes on a transformer of the toy's name, by tap."""
    family = MORE["ernie_image"]
    pipe = family.build()
    kind = type(pipe.transformer)
    pipe.transformer.__class__ = type("ToyTransformer2DModel", (kind,), {})
    run = lambda: call(family, pipe)  # noqa: E731
    expected = final_latents(pipe, run)
    checks = {tap: list(check_tap(pipe, run, tap, expected)) for tap in ("output", "hidden")}
    return {
        tap: [check.passed for check in found if check.passed is not None]
        for tap, found in checks.items()
    }


def seen(folder: Path) -> dict[str, Any]:
    tiny_pipeline().save_pretrained(folder / "pipe")
    return {
        "package": str(Path(fs.__file__).parent),
        "predictor": forecast(fs.predictors.Toy(), [0, 2, 4]) and "toy" in RULES,
        "schedule": forecast(fs.predictors.Toy(), fs.schedules.toy(BUDGET, STEPS)),
        "decided": forecast(fs.predictors.Toy(), schedule=EverySecond()),
        "common": common_lists(BUDGET, STEPS)["toy"],
        "bench": bench(folder),
        "fit": fit(folder),
        "host": host(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        found = seen(Path(sys.argv[1]))
    print(json.dumps(found))
