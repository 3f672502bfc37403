"""Time the closed form of a KAN against pykan's own; writes `benchmarks/results/kan_speed.json`.

    python benchmarks/kan_speed.py

One torch thread, CPU time, all forms of a row in turns within one process, medians. `pykan_whole`
hands pykan all rows at once, as its own examples do; `pykan_chunks` is our adapter. The last rows
set a forecast step in the bundled pipeline against a full step.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from foreseer.evaluation.timing import forecast_step_ratio
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.schedule import warped
from foreseer.predictors.base import History, Step
from foreseer.predictors.kan import PykanNet, splines_of, with_pykan
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.lesa_values import LesaValues
from foreseer.trajectories.prompts import class_items, generate_batch

RESULT = Path(__file__).parent / "results" / "kan_speed.json"
SHAPES = ((2, 64, 192), (1, 4096, 256))
CURVES = ((4, 1), (4, 8, 1), (8, 8, 1))
GRID_SIZE = 5
STEPS = 50
SHORT_RUN = 24
ANCHORS = (0, 1, 2, 3, 9, 16, 23, 30)
GATES = {"published": (256, 256), "small": (16,)}


def timed(forms: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of every form, in turns."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            started = time.process_time()
            form()
            times[name].append(1e3 * (time.process_time() - started))
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


def curves_row(shape: tuple[int, ...], widths: tuple[int, ...], rounds: int) -> dict:
    """A KAN on every value of a feature."""
    net = PykanNet(widths, GRID_SIZE, 1.0)
    x = torch.rand(torch.Size(shape).numel(), widths[0]) * 3 - 1.5
    row = {"what": "curves on values", "shape": list(shape), "widths": list(widths)}
    return row | compared(net, x, rounds)


def gate_row(name: str, rounds: int) -> dict:
    """The gate at every step of a run."""
    widths = (STEPS + 1, *GATES[name], 1)
    net = PykanNet(widths, GRID_SIZE, 3.0)
    times = torch.linspace(1.0, 0.0, STEPS + 1)
    x = times[:-1, None] - times
    row = {"what": f"{name} gate", "shape": [STEPS], "widths": list(widths)}
    return row | compared(net, x, rounds)


def compared(net: PykanNet, x: Tensor, rounds: int) -> dict:
    """Times, ratios and the largest difference of the forms."""
    splines = splines_of(net)
    forms: dict[str, Callable[[], Tensor]] = {
        "pykan_whole": lambda: net._whole(x),
        "pykan_chunks": lambda: net(x),
        "closed_form": lambda: splines(x),
    }
    gap = (net(x) - splines(x)).abs().max() / net(x).abs().max().clamp(min=1.0)
    found = timed(forms, rounds)
    return {
        **{f"{name}_ms": value for name, value in found.items()},
        "times_faster_than_pykan_whole": round(found["pykan_whole"] / found["closed_form"], 1),
        "times_faster_than_pykan_chunks": round(found["pykan_chunks"] / found["closed_form"], 1),
        "difference": float(f"{float(gap):.2e}"),
    }


def forecast_row(kind: type[LesaPredictor], shape: tuple[int, ...], rounds: int) -> dict:
    """One forecast of a whole predictor: as trained, exported, and with its gate in a table.

    The first one after an anchor; `again` is for the others up to the next anchor.
    """
    sigmas = [1 - index / STEPS for index in range(STEPS)]
    exported = kind(sigmas, boundaries=(0.9, 0.5), taps=(4, 4, 4), hidden=(16,)).eval()
    for parameter in exported.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    history = History(exported.window)
    for index in ANCHORS:
        history.push(Step(index, sigmas[index], STEPS), torch.randn(shape))
    step = Step(STEPS - 15, sigmas[STEPS - 15], STEPS)
    predictors = {"pykan": with_pykan(exported).eval(), "exported": exported}
    predictors["table"] = exported.tabulated().eval()
    forms = {name: lambda p=p: fresh(p)(history, step) for name, p in predictors.items()}
    forms["table_again"] = lambda: predictors["table"](history, step)
    found = timed(forms, rounds)
    row = {"what": f"forecast of {kind.__name__}", "shape": list(shape)}
    return row | {f"{name}_ms": value for name, value in found.items()}


def step_row(kind: type[LesaPredictor], batch_size: int, rounds: int) -> dict:
    """A forecast step of an exported predictor in the bundled pipeline, relative to a full step."""
    pipe = load_pipeline("zoo:fashion_dit")
    pipe.set_progress_bar_config(disable=True)
    items = class_items(batch_size, 10)
    anchors = warped(8, SHORT_RUN)
    settings = {"guidance_scale": 3.0, "output_type": "latent", "num_inference_steps": SHORT_RUN}
    sigmas = [1 - index / SHORT_RUN for index in range(SHORT_RUN)]
    exported = kind(sigmas, 2, boundaries=(0.9, 0.5), taps=(4, 4, 4), hidden=(16,)).eval()
    for parameter in exported.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    cost = forecast_step_ratio(
        pipe,
        exported,
        "hidden",
        anchors,
        lambda: generate_batch(pipe, items, **settings),
        rounds,
    )
    row = {"what": f"step of {kind.__name__}, exported", "batch_size": batch_size}
    row |= {"full_step_ms": round(1e3 * cost.full_seconds, 2)}
    row |= {"forecast_step_ms": round(1e3 * cost.forecast_seconds, 3)}
    return row | {"ratio": round(cost.ratio, 4)}


def fresh(predictor: LesaPredictor) -> LesaPredictor:
    """The predictor, as it is at the first forecast after an anchor."""
    if isinstance(predictor, LesaValues):
        predictor.bends.clear()
    return predictor


def main() -> None:
    """Print the rows and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        rows += [gate_row(name, options.rounds) for name in GATES]
        rows += [curves_row(s, w, options.rounds) for s in SHAPES for w in CURVES]
        kinds: tuple[type[LesaPredictor], ...] = (LesaPredictor, LesaValues)
        rows += [forecast_row(k, s, options.rounds) for k in kinds for s in SHAPES]
        rows += [step_row(kind, size, options.rounds) for kind in kinds for size in (1, 8)]
    for row in rows:
        print(row, flush=True)
    packages = ("torch", "pykan")
    versions = {name: importlib.metadata.version(name) for name in packages}
    result = {
        "versions": {"python": platform.python_version(), **versions},
        "threads": 1,
        "rounds": options.rounds,
        "time": "median CPU milliseconds of one evaluation, without gradients",
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
