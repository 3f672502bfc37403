"""Adaptive schedules against fixed ones at an equal mean number of network evaluations.

    python benchmarks/adaptive.py run --learned_11 FOLDER --any_anchors FOLDER
    python benchmarks/adaptive.py plot

The threshold of every adaptive schedule is set on calibration samples, by bisection, so that their
mean number of evaluations is the target; held-out samples then tell what it is worth. A check by
SpeCa runs one of the network's blocks: `cost` counts it, `evaluations` does not. The first looks of
TeaCache and FirstBlock are counted as one block as well. Under those two, samples are drawn one per
call, so that a decision is a sample's own; SpeCa decides for every sample of a call alone. Finished
rows are kept, the same command goes on.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor
from tqdm.auto import tqdm

from foreseer.checkpoints.format import load_predictor
from foreseer.evaluation.benchmark import FIRST_ITEM
from foreseer.evaluation.metrics import psnr
from foreseer.integration.forecasting import forecasting
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.policy import Schedule
from foreseer.predictors.base import Predictor
from foreseer.predictors.rules import Taylor
from foreseer.schedules import FirstBlock, SpeCa, TeaCache
from foreseer.trajectories.prompts import Item, class_items, generate_batch

RESULT = Path("benchmarks/results/adaptive.json")
SEARCHED = Path("benchmarks/results/fashion_dit_searched.json")
SETTINGS = {"guidance_scale": 3.0, "num_inference_steps": 50, "output_type": "pt"}
HALVINGS = 9
BATCH_SIZE = 16
SCHEDULES: dict[str, Callable[[float], Schedule]] = {
    "speca": lambda threshold: SpeCa(threshold, max_run=8),
    "speca_falling": lambda threshold: SpeCa(threshold, decay=0.1, max_run=8),
    "speca_free": lambda threshold: SpeCa(threshold),
    "speca_free_falling": lambda threshold: SpeCa(threshold, decay=0.1),
    "teacache": lambda threshold: TeaCache(threshold),
    "first_block": lambda threshold: FirstBlock(threshold),
}
ADAPTIVE: dict[int, dict[str, tuple[str, ...]]] = {
    8: {
        "learned": ("speca_free", "speca_free_falling"),
        "taylor_1": ("speca", "speca_falling", "teacache", "first_block"),
        "l2p_any": ("speca", "teacache", "first_block"),
    },
    11: {"learned": ("speca",), "taylor_1": ("speca",), "l2p_any": ("speca",)},
}
"""The schedules tried at each mean number of evaluations, by predictor; `learned` starts from the
anchors of the closed-loop predictor of the next smaller budget."""


def run(
    learned_11: str = "zoo:fashion_dit_l2p_11",
    any_anchors: str = "zoo:fashion_dit_l2p_any",
    num_samples: int = 64,
    num_calibration: int = 12,
    num_threads: int = 1,
) -> None:
    """Measure every pair of predictor and schedule.

    Args:
        learned_11: closed-loop predictor for 11 evaluations.
        any_anchors: predictor whose rows are solved for whatever anchors there are.
        num_samples: held-out (label, seed) pairs.
        num_calibration: samples the thresholds are set on; a recording starts with the same.
        num_threads: torch threads.
    """
    torch.set_num_threads(num_threads)
    pipe = load_pipeline("zoo:fashion_dit")
    pipe.set_progress_bar_config(disable=True)
    num_classes: int = pipe.transformer.config.num_embeds_ada_norm
    calibration = class_items(num_calibration, num_classes)
    held_out = class_items(num_samples, num_classes, first_item=FIRST_ITEM)
    full = torch.cat([images_of(pipe, batch) for batch in tqdm(cut(held_out, BATCH_SIZE))])
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
    done = {(row["predictor"], row["schedule"], row["target"]) for row in rows}
    for name, predictor, anchors, schedule, target in cases(learned_11, any_anchors):
        if (name, schedule, target) in done:
            continue
        runner = Runner(pipe, predictor, anchors)
        threshold = None
        if schedule != "fixed":
            threshold = find_threshold(runner, SCHEDULES[schedule], target, calibration)
        made = SCHEDULES[schedule](threshold) if threshold is not None else None
        rows.append(
            {"predictor": name, "schedule": schedule, "target": target, "threshold": threshold}
            | measure(runner, made, held_out, full)
        )
        RESULT.write_text(json.dumps(rows, indent=1) + "\n")
        print({key: value for key, value in rows[-1].items() if key != "samples"}, flush=True)


def cases(
    learned_11: str, any_anchors: str
) -> list[tuple[str, Predictor, tuple[int, ...] | None, str, int]]:
    """Name, predictor, anchors, schedule and target number of evaluations of every row."""
    lists = json.loads(SEARCHED.read_text())
    learned = {
        6: load_predictor("zoo:fashion_dit_l2p_6"),
        8: load_predictor("zoo:fashion_dit_l2p_8"),
        11: load_predictor(learned_11),
    }
    rules = {"l2p_any": load_predictor(any_anchors), "taylor_1": Taylor(1)}
    found: list[tuple[str, Predictor, tuple[int, ...] | None, str, int]] = []
    for target, start in ((8, 6), (11, 8)):
        found.append((f"l2p_{target}", learned[target], None, "fixed", target))
        for schedule in ADAPTIVE[target]["learned"]:
            found.append((f"l2p_{start}", learned[start], None, schedule, target))
        for name, predictor in rules.items():
            anchors = tuple(lists[f"taylor_1|hidden|{target}"])
            found.append((name, predictor, anchors, "fixed", target))
            for schedule in ADAPTIVE[target].get(name, ()):
                found.append((name, predictor, (0,), schedule, target))
    return found


@dataclass(frozen=True)
class Drawn:
    """Samples drawn under a schedule.

    Args:
        images: in [0, 1], `(B, C, H, W)`.
        evaluations: network evaluations of each.
        cost: their mean, with checks and first looks, each of which runs one block.
    """

    images: Tensor
    evaluations: list[int]
    cost: float


class Runner:
    """Draw items with a predictor under a schedule."""

    def __init__(self, pipe: Any, predictor: Predictor, anchors: Sequence[int] | None) -> None:
        self.pipe = pipe
        self.predictor = predictor
        self.anchors = anchors

    def __call__(self, items: Sequence[Item], schedule: Schedule | None) -> Drawn:
        """The samples of all items."""
        alone = isinstance(schedule, TeaCache | FirstBlock)
        images: list[Tensor] = []
        evaluations: list[int] = []
        blocks = 0
        with forecasting(self.pipe, self.predictor, self.anchors, "hidden", schedule) as attached:
            for batch in cut(items, 1 if alone else BATCH_SIZE):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a few samples may well have all accepted
                    images.append(images_of(self.pipe, batch))
                report = attached.report()
                evaluations += report.evaluations or [len(report.anchors)] * len(batch)
                blocks += len(report.forecasts) if alone else report.checked
        num_blocks = len(self.pipe.transformer.transformer_blocks)
        cost = mean(evaluations) + blocks / num_blocks / len(items)
        return Drawn(torch.cat(images), evaluations, cost)


def cut(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """The items in batches."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def images_of(pipe: Any, items: Sequence[Item]) -> Tensor:
    """The images of a batch, in [0, 1]."""
    images: Tensor = generate_batch(pipe, items, **SETTINGS).images
    return images.float().clamp(0, 1)


def find_threshold(
    runner: Runner,
    family: Callable[[float], Schedule],
    target: int,
    items: Sequence[Item],
) -> float:
    """The threshold at which calibration samples take `target` evaluations in the mean."""
    low, high = 1e-3, 3.0  # small thresholds compute more
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        spent = mean(runner(items, family(middle)).evaluations)
        if abs(spent - target) < 0.1:
            break
        low, high = (middle, high) if spent > target else (low, middle)
    return middle


def measure(
    runner: Runner, schedule: Schedule | None, items: Sequence[Item], full: Tensor
) -> dict[str, Any]:
    """Mean, quantiles and every sample's own PSNR and evaluations."""
    drawn = runner(items, schedule)
    errors = psnr(drawn.images, full).double()
    q10, median = errors.quantile(torch.tensor([0.1, 0.5], dtype=torch.float64)).tolist()
    return {
        "evaluations": mean(drawn.evaluations),
        "cost": drawn.cost,
        "psnr_db": float(errors.mean()),
        "psnr_median": median,
        "psnr_q10": q10,
        "psnr_min": float(errors.min()),
        "samples": {"psnr_db": errors.tolist(), "evaluations": drawn.evaluations},
    }


def plot(out: str = "docs/images/adaptive.png", target: int = 8) -> None:
    """Draw the distributions over samples of the main rows.

    Args:
        out: PNG file.
        target: mean number of evaluations.
    """
    from matplotlib.figure import Figure

    rows = [row for row in json.loads(RESULT.read_text()) if row["target"] == target]
    rows.sort(key=lambda row: -row["psnr_db"])
    figure = Figure(figsize=(9, 0.36 * len(rows) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    labels = [f"{row['predictor']}, {row['schedule']}" for row in rows]
    left.boxplot([row["samples"]["psnr_db"] for row in rows], orientation="horizontal")
    left.set_xlabel("PSNR of each sample (dB)")
    right.boxplot([row["samples"]["evaluations"] for row in rows], orientation="horizontal")
    right.set_xlabel("network evaluations of each sample")
    left.set_yticks(range(1, len(rows) + 1), labels)
    left.invert_yaxis()
    figure.savefig(out, dpi=120)
    print(f"wrote {out}")


if __name__ == "__main__":
    auto_cli([run, plot])
