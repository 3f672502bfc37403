"""Measure what a forecast step and idle hooks cost, and write `benchmarks/results/step_cost.json`.

    python benchmarks/step_cost.py --pipeline zoo:fashion_dit
    python benchmarks/step_cost.py --anchors-of flux_70m

One torch thread, CPU time, full and forecast steps in turns within one process, medians. With
`--anchors-of`, what an anchor step costs over a plain one on the host of `overhead.py`, plain and
hooked runs in turns: the median over the pairs and its 95 % interval (order statistics), added to
the file as `anchor_steps`.
"""

import argparse
import json
import platform
from pathlib import Path
from statistics import median

import overhead_host
import torch

from foreseer.evaluation.timing import (
    anchor_step_ratios,
    attach_overhead,
    first_call,
    forecast_step_ratio,
    run_flops,
    step_flops,
)
from foreseer.integration.host.hosts import transformer_of
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.schedule import warped
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import Taylor
from foreseer.trajectories.prompts import class_items, generate_batch

RESULT = Path(__file__).parent / "results" / "step_cost.json"
NUM_STEPS = 24
ANCHOR_STEPS = 4  # of the runs of `flux_70m`
ANCHORS = warped(8, NUM_STEPS)


def measure(pipe: object, tap: str, batch_size: int, rounds: int) -> dict:
    """One line of the table."""
    items = class_items(batch_size, 10)

    def run(steps: int = NUM_STEPS) -> None:
        settings = {"guidance_scale": 3.0, "num_inference_steps": steps, "output_type": "latent"}
        generate_batch(pipe, items, **settings)

    call = first_call(transformer_of(pipe), run)
    line = {"batch_size": batch_size, "tap": tap}
    for predictor in (Taylor(1), L2P(NUM_STEPS, ANCHORS, 2)):
        cost = forecast_step_ratio(pipe, predictor, tap, ANCHORS, run, rounds)
        flops = step_flops(transformer_of(pipe), call, tap)
        name = type(predictor).__name__.lower()
        used, whole = run_flops(flops, ANCHORS, NUM_STEPS, predictor.window)
        line["full_step_ms"] = round(1e3 * cost.full_seconds, 2)
        line[f"{name}_step_ms"] = round(1e3 * cost.forecast_seconds, 3)
        line[f"{name}_ratio"] = round(cost.ratio, 4)
        line[f"{name}_run_flops_ratio"] = round(used / whole, 4)
    overhead = attach_overhead(pipe, Taylor(1), tap, 4, lambda: run(4), rounds)
    line["attached_overhead"] = round(overhead, 4)
    return line


def anchor_steps(rounds: int) -> list[dict]:
    """Anchor steps of `flux_70m`, a line per tap."""
    pipe, lines = overhead_host.pipeline(overhead_host.flux_70m()), []
    for tap in ("output", "hidden", "residual"):
        ratios = sorted(
            anchor_step_ratios(
                pipe,
                Taylor(1),
                tap,
                ANCHOR_STEPS,
                lambda: overhead_host.run(pipe, ANCHOR_STEPS),
                rounds,
            )
        )
        outside = int((rounds - 1.96 * rounds**0.5) / 2)
        low, high = ratios[outside], ratios[rounds - 1 - outside]
        line = {"host": "flux_70m", "tap": tap, "pairs": rounds, "ratio": median(ratios)}
        lines.append(line | {"ci_low": low, "ci_high": high})
        print(" | ".join(map(str, lines[-1].values())), flush=True)
    return lines


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="zoo:fashion_dit")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--anchors-of", choices=["flux_70m"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.anchors_of:
        result = json.loads(RESULT.read_text()) | {"anchor_steps": anchor_steps(options.rounds)}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        return
    pipe = load_pipeline(options.pipeline)
    lines = []
    for batch_size in options.batch_sizes:
        for tap in ("output", "hidden"):
            lines.append(measure(pipe, tap, batch_size, options.rounds))
            if len(lines) == 1:
                print(" | ".join(lines[0]))
            print(" | ".join(str(value) for value in lines[-1].values()), flush=True)
    transformer = transformer_of(pipe)
    result = {
        "host": type(transformer).__name__,
        "parameters": sum(p.numel() for p in transformer.parameters()),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "guidance_scale": 3.0,
        "num_steps": NUM_STEPS,
        "anchors": list(ANCHORS),
        "rows": lines,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
