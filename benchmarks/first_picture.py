"""The README's first picture, and the seconds beside it: benchmarks/results/first_picture.json.

    OMP_NUM_THREADS=1 python benchmarks/first_picture.py

The prompts are among those the model draws best in full; forecasts chose nothing.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from readout_page import README, put

from foreseer.demo import GUIDANCE_SCALE, NUM_STEPS, PROMPTS
from foreseer.evaluation.metrics import psnr
from foreseer.evaluation.page.side_by_side import picture, side_by_side, told
from foreseer.evaluation.results import collect_meta
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.pipelines.pipeline_call import samples

MODEL, BUDGETS = "zoo:emoji_flux_2", (11, 8, 6)
PICTURE = Path("docs/images/first.png")
RESULT = Path("benchmarks/results/first_picture.json")


def main() -> None:
    """Draw and measure."""
    pipe = load_pipeline(MODEL)
    asked = samples(pipe, PROMPTS, ())
    predictors = [f"{MODEL}_readout_{budget}" for budget in BUDGETS]
    call: dict[str, Any] = {"num_inference_steps": NUM_STEPS, "guidance_scale": GUIDANCE_SCALE}
    runs = side_by_side(pipe, asked, predictors, repeats=3, **call)
    picture(runs, asked).save(PICTURE)
    lines = [
        {
            "evaluations": run.evaluations,
            "seconds": run.seconds,
            "psnr_db": float(psnr(run.images, runs[0].images).mean()) if number else None,
        }
        for number, run in enumerate(runs)
    ]
    seeds = list(range(len(asked)))
    meta = collect_meta("python benchmarks/first_picture.py", seeds)
    found = {"model": MODEL, "runs": lines, "meta": asdict(meta)}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    put(README, "first", sentence())
    print(told(runs))


def sentence() -> str:
    """What the README says under the picture."""
    found = json.loads(RESULT.read_text())
    full, *others = found["runs"]
    times = [full["seconds"] / run["seconds"] for run in others]
    each = [
        f"{run['seconds']:.1f} s with {run['evaluations']} (**{faster:.1f} times faster**, "
        f"{run['psnr_db']:.1f} dB)"
        for run, faster in zip(others, times, strict=True)
    ]
    return (
        f"The same eight prompts and seeds, on one core: {full['seconds']:.1f} s with all "
        f"{full['evaluations']} steps; {', '.join(each)}."
    )


if __name__ == "__main__":
    main()
