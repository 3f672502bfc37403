"""Predictors without one anchor list, on grids they have not seen, with the bundled DiT.

    python benchmarks/continuous.py record
    python benchmarks/continuous.py choose
    python benchmarks/continuous.py bench
    python benchmarks/continuous.py paired

Every grid is left out once: `L2PContinuous` is fitted on the other two, and compared in closed loop
with L2P fitted on the grid itself, with `L2PGram` of the longest other grid, interpolated, and with
the formulas. Errors are 10 log10 of the mean squared error of the final latents against the full
run on that grid, in dB; lower is better.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from jsonargparse import auto_cli
from torch import Tensor

from foreseer.evaluation.benchmark import FIRST_ITEM
from foreseer.evaluation.measure import References, closed_loop_errors
from foreseer.evaluation.rows import analytic_rows
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.schedule import warped
from foreseer.predictors.any_anchors import L2PGram, regrid
from foreseer.predictors.continuous import L2PContinuous
from foreseer.predictors.solve import least_squares_rows
from foreseer.training.continuous_fit import fit_continuous
from foreseer.trajectories.prompts import class_items
from foreseer.trajectories.recorder import record as record_trajectories
from foreseer.trajectories.recording import Recording

PIPELINE = "zoo:fashion_dit"
ROOT = Path("runs/continuous")
GRIDS = {"20": (20, 1.0), "28": (28, 1.0), "50": (50, 1.0), "28_shift_3": (28, 3.0)}
LEFT_OUT = {
    "20": ("50", "28"),
    "28": ("50", "20"),
    "50": ("28", "20"),
    "28_shift_3": ("50", "28", "20"),
}
TAPS = ("output", "hidden")
FORMULAS = ("taylor_1", "taylor_2", "ab2")
GAMMA = 1.2
CHOICES = ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 2))
RIDGE, NUM_LISTS, SEED = 1e-3, 100, 0
Rows = Float[Tensor, "branches S S"]


def record(num_trajectories: int = 64, num_held_out: int = 32, num_threads: int = 1) -> None:
    """Record calibration and held-out trajectories of every grid.

    Args:
        num_trajectories: calibration trajectories per grid.
        num_held_out: held-out trajectories per grid; the errors are measured on them.
        num_threads: torch threads.
    """
    torch.set_num_threads(num_threads)
    for grid, (num_steps, _) in GRIDS.items():
        for name, count, first in (
            (f"steps_{grid}", num_trajectories, 0),
            (f"steps_{grid}_held_out", num_held_out, FIRST_ITEM),
        ):
            record_trajectories(
                pipe_for(grid),
                class_items(count, 10, first_item=first),
                ROOT / name,
                batch_size=16,
                guidance_scale=3.0,
                num_inference_steps=num_steps,
            )


def choose(num_samples: int = 16, num_threads: int = 1) -> None:
    """Measure orders and degrees on calibration trajectories of each left-out grid, 8 anchors.

    Args:
        num_samples: calibration trajectories generated again.
        num_threads: torch threads.
    """
    torch.set_num_threads(num_threads)
    path = ROOT / "choice.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for tap in TAPS:
        for grid in ("20", "28", "50"):
            anchors = warped(8, GRIDS[grid][0], GAMMA)
            for order, degree in CHOICES:
                key = f"{tap}|{grid}|order {order}, degree {degree}"
                if key in found:
                    continue
                rows = continuous_rows(grid, tap, anchors, order, degree)
                found[key] = error_db(grid, f"steps_{grid}", tap, anchors, rows, num_samples)
                print(key, f"{found[key]:.2f}", flush=True)
                write(path, found)


def bench(
    order: int = 1,
    degree: int = 1,
    budgets: Sequence[int] = (8, 11, 6),
    grids: Sequence[str] = tuple(GRIDS),
    num_samples: int = 32,
    num_threads: int = 1,
    out: str = "benchmarks/results/continuous.json",
) -> None:
    """Measure every method on every grid, tap and budget; finished ones are kept.

    Args:
        order: of the continuous predictor.
        degree: of its basis.
        budgets: network evaluations; a grid too short for a warped list of that many is left out.
        grids: names of the grids to leave out in turn.
        num_samples: held-out trajectories.
        num_threads: torch threads.
        out: file of the results.
    """
    torch.set_num_threads(num_threads)
    path = Path(out)
    found = json.loads(path.read_text()) if path.exists() else {}
    for budget in budgets:
        for grid in grids:
            try:
                anchors = warped(budget, GRIDS[grid][0], GAMMA)
            except ValueError:  # two anchors fall on one step: there is no such list
                continue
            for tap in TAPS:
                methods = rows_by_method(grid, tap, anchors, order, degree)
                for method, rows in methods.items():
                    key = f"{grid}|{tap}|{budget}|{method}"
                    if key in found:
                        continue
                    source = f"steps_{grid}_held_out"
                    found[key] = error_db(grid, source, tap, anchors, rows, num_samples)
                    print(key, f"{found[key]:.2f}", flush=True)
                    write(path, found)


def paired(
    order: int = 1,
    degree: int = 1,
    budget: int = 8,
    grid: str = "20",
    tap: str = "output",
    num_samples: int = 32,
    num_threads: int = 1,
    out: str = "benchmarks/results/continuous_paired.json",
) -> None:
    """Mean and standard error of each method's difference to L2P fitted on the grid, same samples.

    Args:
        order: of the continuous predictor.
        degree: of its basis.
        budget: network evaluations.
        grid: name of the left-out grid.
        tap: forecast tap.
        num_samples: held-out trajectories.
        num_threads: torch threads.
        out: file of the results.
    """
    torch.set_num_threads(num_threads)
    anchors = warped(budget, GRIDS[grid][0], GAMMA)
    methods = rows_by_method(grid, tap, anchors, order, degree)
    source = f"steps_{grid}_held_out"
    errors = {
        name: errors_db(grid, source, tap, anchors, methods[name], num_samples)
        for name in ("l2p_lstsq", "continuous", "taylor_1")
    }
    path = Path(out)
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in ("continuous", "taylor_1"):
        gap = errors[name] - errors["l2p_lstsq"]
        values = (float(gap.mean()), float(gap.std()) / len(gap) ** 0.5)
        found[f"{grid}|{tap}|{budget}|{name}"] = [round(value, 3) for value in values]
        print(grid, tap, budget, name, found[f"{grid}|{tap}|{budget}|{name}"], flush=True)
    write(path, found)


def rows_by_method(
    grid: str, tap: str, anchors: Sequence[int], order: int, degree: int
) -> dict[str, Rows]:
    """Every method's rows on a grid; only the fit on the grid itself has seen it."""
    sigmas = grid_sigmas(grid)
    formulas = analytic_rows(anchors, sigmas)
    rows = {name: formulas[name].repeat(2, 1, 1) for name in FORMULAS}
    rows["l2p_lstsq"] = least_squares_rows(grams(grid, tap).sum(0), anchors)
    other = LEFT_OUT[grid][0]
    gram = L2PGram(GRIDS[other][0], 2)
    gram.set_gram(grams(other, tap).double().mean(0))
    regridded = regrid(gram, grid_sigmas(other), sigmas)
    rows["gram_regridded"] = regridded.rows(anchors, sigmas)[:, 0]
    rows["continuous"] = continuous_rows(grid, tap, anchors, order, degree)
    return rows


def continuous_rows(grid: str, tap: str, anchors: Sequence[int], order: int, degree: int) -> Rows:
    """Rows of the continuous predictor fitted on the other grids."""
    predictor = continuous(LEFT_OUT[grid], tap, order, degree)
    return predictor.rows(anchors, grid_sigmas(grid))[:, 0]


@cache
def continuous(grids: tuple[str, ...], tap: str, order: int, degree: int) -> L2PContinuous:
    """The continuous predictor fitted on these grids."""
    predictor = L2PContinuous([grid_sigmas(name) for name in grids], 2, order, degree)
    means = [grams(name, tap).double().mean(0) for name in grids]
    fit_continuous(predictor, means, NUM_LISTS, RIDGE, SEED)
    return predictor


@cache
def recording(name: str) -> Recording:
    """A recording by the name of its folder."""
    return Recording(ROOT / name)


@cache
def grams(grid: str, tap: str) -> Tensor:
    """Grams of the calibration trajectories on a grid."""
    return recording(f"steps_{grid}").stack(f"gram/{tap}")


def grid_sigmas(grid: str) -> list[float]:
    """Flow time of every step of a grid."""
    return recording(f"steps_{grid}").header.sigmas


@cache
def pipe_for(grid: str) -> Any:
    """The bundled pipeline with the scheduler of a grid."""
    pipe = load_pipeline(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    shift = GRIDS[grid][1]
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=shift)
    return pipe


def error_db(
    grid: str, source: str, tap: str, anchors: Sequence[int], rows: Rows, num_samples: int
) -> float:
    """Mean closed-loop error of rows on the first trajectories of a recording."""
    return round(float(errors_db(grid, source, tap, anchors, rows, num_samples).mean()), 3)


def errors_db(
    grid: str, source: str, tap: str, anchors: Sequence[int], rows: Rows, num_samples: int
) -> Float[Tensor, " n"]:
    """Closed-loop error of rows on each of the first trajectories of a recording."""
    references = References(recording(source), recording(source).items[:num_samples], 16)
    return closed_loop_errors(
        pipe_for(grid),
        rows,
        anchors,
        tap,
        references.batches,
        references.finals,
        **references.settings,
    )


def write(path: Path, found: dict[str, Any]) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    auto_cli([record, choose, bench, paired])
