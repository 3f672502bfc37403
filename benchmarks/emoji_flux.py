"""The bundled text-to-image model: record, search, fit all three kinds, bench on held-out prompts.

    python benchmarks/emoji_flux.py record
    python benchmarks/emoji_flux.py search
    python benchmarks/emoji_flux.py fit
    python benchmarks/emoji_flux.py bench
    python benchmarks/emoji_flux.py publish
    python benchmarks/emoji_flux.py sheet
    python benchmarks/emoji_flux.py page

Each method runs on the list searched for it and on those of the learned ones.
Every stage is made of commands of foreseer's and resumes; stages of different budgets may run at
the same time. Predictors are fitted on captions the model was trained on
(configs/record/emoji_prompts.txt); the benchmark's prompts (benchmarks/emoji_held_out.txt) were
kept from the model's training and from every fit. `publish` writes
benchmarks/results/emoji_flux.json.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse import auto_cli

from foreseer.checkpoints.format import load_predictor
from foreseer.cli import main
from foreseer.evaluation.advice import advice
from foreseer.evaluation.benchmark import FIRST_ITEM, compare_methods
from foreseer.evaluation.generate import draw, save_panels, titles
from foreseer.evaluation.metrics import psnr
from foreseer.evaluation.page.figures import pareto
from foreseer.evaluation.page.table import markdown, short_table
from foreseer.evaluation.plan import load_learned
from foreseer.evaluation.results import load_meta, load_rows, save_meta, save_rows
from foreseer.integration.forecasting import forecasting
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.trajectories.prompts import asked_items

PIPELINE = "zoo:emoji_flux"
RECORDING = "runs/record/emoji_flux"
FEATURES = "runs/record/emoji_flux_features"
HELD_OUT_PROMPTS = "benchmarks/emoji_held_out.txt"
ROOT = Path("runs/emoji_flux")
RESULT = Path("benchmarks/results/emoji_flux.json")
SHEET = Path("docs/images/emoji_flux.png")
PAGES = (Path("docs/text_to_image.md"),)
GUIDANCE_SCALE = 3.0
BUDGETS = (11, 8)
NEURAL_BUDGET = 8  # LESA and DisCa are trained on one list
SOLVERS = ("euler", "ab2", "dpmpp_2m", "unipc")
FORMULAS = ("reuse", "taylor_1", "taylor_2", "adams_moulton", "hicache_2")
METHODS = [
    *(f"{solver}|none" for solver in SOLVERS),
    *(f"{rule}|{tap}" for rule in FORMULAS for tap in ("output", "hidden")),
]
LIST_OF = {11: "adams_moulton|output", 8: "taylor_2|output"}  # the search's best of L2P's tap
NEURAL_LIST = "adams_moulton|hidden"  # the search's best formula on the tap of LESA and DisCa
SHEET_PROMPTS = (
    "grinning face",
    "crying face",
    "panda face",
    "octopus",
    "sunflower",
    "red apple",
    "slice of pizza",
    "soccer ball",
)


def record(kinds: Sequence[str] = ("emoji_flux", "emoji_flux_features")) -> None:
    """Record the calibration trajectories: Grams and states; features for LESA and DisCa.

    Args:
        kinds: configurations of configs/record.
    """
    for kind in kinds:
        main(["record", "--config", f"configs/record/{kind}.yaml"])


def search(budgets: Sequence[int] = BUDGETS, num_samples: int = 6, num_moves: int = 2) -> None:
    """Search the anchors of every method at every budget on calibration trajectories.

    Args:
        budgets: network evaluations.
        num_samples: calibration trajectories.
        num_moves: single moves tried from the best list.
    """
    for budget in budgets:
        words = ["--recording", RECORDING, "--pipeline", PIPELINE, "--out", str(searched(budget))]
        words += ["--num_anchors", f"[{budget}]", "--methods", json.dumps(METHODS)]
        effort = ["--num_samples", str(num_samples), "--num_moves", str(num_moves)]
        main(["search", *words, *effort])


def searched(budget: int) -> Path:
    """Where the searched lists of a budget lie."""
    return ROOT / f"searched_{budget}.json"


def fit(
    budgets: Sequence[int] = BUDGETS, methods: Sequence[str] = ("l2p", "lesa", "disca")
) -> None:
    """Fit what is not there yet: L2P in closed loop at every budget, LESA and DisCa at one.

    Args:
        budgets: network evaluations.
        methods: what to fit.
    """
    for method in methods:
        for budget in budgets:
            out = predictor_folder(method, budget)
            if (out / "config.json").exists() or (method != "l2p" and budget != NEURAL_BUDGET):
                continue
            source = LIST_OF[budget] if method == "l2p" else NEURAL_LIST
            anchors = json.loads(searched(budget).read_text())[f"{source}|{budget}"]
            words = ["--model.anchors", json.dumps(anchors)]
            work = Path(f"runs/fit/emoji_{method}_{budget}")
            main(["fit", "--config", str(redirected(f"emoji_{method}", work)), *words])
            kept = work / ("last.ckpt" if method == "l2p" else "best.ckpt")
            main(["export", "--checkpoint", str(kept), "--out", str(out)])


def redirected(name: str, work: Path) -> Path:
    """A shipped configuration that writes to a folder of its own."""
    text = Path(f"configs/fit/{name}.yaml").read_text()
    path = work.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    version = f"version: {name}"
    path.write_text(
        text.replace(f"runs/fit/{name}\n", f"{work}\n").replace(version, f"version: {work.name}")
    )
    return path


def predictor_folder(method: str, budget: int) -> Path:
    """Where a fitted predictor lies."""
    return ROOT / "predictors" / f"{method}_{budget}"


def bench(budgets: Sequence[int] = BUDGETS, num_samples: int = 32) -> None:
    """Run everything on the held-out prompts.

    Args:
        budgets: network evaluations.
        num_samples: (prompt, seed) pairs.
    """
    lists: dict[str, list[int]] = {}
    for budget in budgets:
        lists |= json.loads(searched(budget).read_text())
    name = "_".join(map(str, budgets))
    learned = [
        f"{method}={predictor_folder(method, budget)}"
        for method in ("l2p", "lesa", "disca")
        for budget in budgets
        if predictor_folder(method, budget).exists()
    ]
    out = ROOT / f"bench_{name}"
    pipe = load_pipeline(PIPELINE)
    compare_methods(
        pipe,
        asked_items(pipe, HELD_OUT_PROMPTS, num_samples, FIRST_ITEM),
        out,
        budgets,
        load_learned(learned),
        lists,
        [*SOLVERS, *FORMULAS],
        command=f"python benchmarks/emoji_flux.py bench --budgets '{list(budgets)}'",
        common=(),  # the search has tried uniform and warped lists
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=50,
    )


def publish(budgets: Sequence[int] = BUDGETS) -> None:
    """Write the rows of the budgets' reports, and their table, to benchmarks/results.

    Args:
        budgets: those that were benched, each in a run of its own.
    """
    folders = [ROOT / f"bench_{budget}" for budget in budgets]
    parts = [load_rows(folder / "results.json") for folder in folders]
    rows = parts[0] + [row for part in parts[1:] for row in part if row.kind != "full"]
    save_rows(rows, RESULT)
    meta = load_meta(folders[0] / "results.json")
    save_meta(replace(meta, command="python benchmarks/emoji_flux.py bench, publish"), RESULT)
    RESULT.with_suffix(".md").write_text(markdown(rows, BUDGETS))
    for name, chart in pareto(rows).items():
        chart.save(RESULT.with_name(f"emoji_flux_{name}.png"))


@torch.no_grad()
def sheet(prompts: Sequence[str] = SHEET_PROMPTS, seed: int = 0) -> None:
    """Draw the README's sheet: the full run and the forecasts at 11 and 8 evaluations.

    Args:
        prompts: prompts that are stored with the model.
        seed: seed of the first picture.
    """
    pipe = load_pipeline(PIPELINE)
    asked = [{"prompt": prompt} for prompt in prompts]
    settings = {"guidance_scale": GUIDANCE_SCALE, "num_inference_steps": 50}
    panels = {"50 evaluations": draw(pipe, asked, seed, **settings)}
    for budget in BUDGETS:
        predictor = load_predictor(f"zoo:emoji_flux_l2p_{budget}")
        with forecasting(pipe, predictor):
            images = draw(pipe, asked, seed, **settings)
        mean = float(psnr(images, panels["50 evaluations"]).mean())
        panels[f"{budget} evaluations\n{mean:.1f} dB"] = images
    print(f"wrote {save_panels(panels, SHEET, headings=titles(asked))}")


def page() -> None:
    """Write the table of docs/text_to_image.md from the published rows."""
    rows = load_rows(RESULT)
    told = "\n".join(f"- {sentence}" for sentence in advice(rows))
    block = f"<!-- emoji -->\n{told}\n\n{short_table(rows, BUDGETS)}<!-- /emoji -->"
    for path in PAGES:
        text = path.read_text()
        path.write_text(
            re.sub("<!-- emoji -->.*<!-- /emoji -->", lambda _: block, text, flags=re.S)
        )


if __name__ == "__main__":
    auto_cli([record, search, fit, bench, publish, sheet, page])
