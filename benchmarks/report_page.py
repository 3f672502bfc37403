"""The HTML page of the reference table: its rows as they are, and samples drawn again at 8 steps.

    python benchmarks/report_page.py OUT

The rows are those of results/reference_table.json; nothing is measured again. The samples, errors
after each step and weights are of the first held-out items of the same benchmark, drawn by the
bundled predictor and the best formulas and solvers.
"""

from pathlib import Path

import torch
from jsonargparse import auto_cli

from foreseer.checkpoints.format import load_predictor
from foreseer.evaluation.advice import best_rows
from foreseer.evaluation.benchmark import FIRST_ITEM
from foreseer.evaluation.page.curves import sheet
from foreseer.evaluation.page.html import write_report
from foreseer.evaluation.plan import Entry, spec_of
from foreseer.evaluation.results import BenchRow, load_meta, load_rows
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.predictors.rules import RULES
from foreseer.trajectories.prompts import class_items

ROWS = Path(__file__).parent / "results" / "reference_table.json"
LEARNED, BUDGET = "l2p_closed_loop", 8
SHOWN = (LEARNED, "taylor_2", "dpmpp_2m", "euler", "reuse")


def main(out: str, num_samples: int = 6, num_threads: int = 1) -> None:
    """Write the page and what lies beside it.

    Args:
        out: folder, made when missing.
        num_samples: held-out samples to draw.
        num_threads: torch threads.
    """
    torch.set_num_threads(num_threads)
    rows = load_rows(ROWS)
    predictor = load_predictor(f"zoo:fashion_dit_l2p_{BUDGET}")
    sigmas = list(spec_of(predictor).sigmas)

    def entry(row: BenchRow) -> Entry:
        rule = predictor if row.method == LEARNED else RULES.get(row.method)
        return Entry(row.method, row.kind, row.tap, row.anchors_name, row.steps, rule)

    best = best_rows([row for row in rows if row.num_anchors == BUDGET], "method")
    chosen = [row for row in rows if row.kind == "full"][:1]
    chosen += [row for row in best if row.method in SHOWN]
    drawn = sheet(
        load_pipeline("zoo:fashion_dit"),
        [(entry(row), row) for row in chosen],
        sigmas,
        [class_items(num_samples, 10, first_item=FIRST_ITEM)],
        {"guidance_scale": chosen[0].guidance_scale, "num_inference_steps": len(sigmas)},
    )
    page = write_report(
        rows, load_meta(ROWS), drawn.images, Path(out), drawn.step_errors, weights=drawn.weights
    )
    print(f"The report lies in {page}.")


if __name__ == "__main__":
    auto_cli(main)
