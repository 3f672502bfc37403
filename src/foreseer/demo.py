"""`foreseer demo`: pictures first, then the road to a predictor of one's own, on bundled models.

The expected seconds are those of one thread on an idle core, measured by `make demo`.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from foreseer.commands import inspect
from foreseer.commands import record as record_trajectories
from foreseer.evaluation.advice import advice
from foreseer.evaluation.benchmark import FIRST_ITEM, compare_methods
from foreseer.evaluation.page.side_by_side import picture, side_by_side, told
from foreseer.evaluation.plan import load_learned
from foreseer.evaluation.results import load_rows
from foreseer.evaluation.solvers import SOLVERS
from foreseer.evaluation.verdict import rivals_on
from foreseer.fit_commands import fit as fit_predictor
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.pipelines.pipeline_call import samples
from foreseer.trajectories.gram import sum_grams
from foreseer.trajectories.prompts import asked_items
from foreseer.trajectories.recording import Recording

GUIDANCE_SCALE, NUM_STEPS = 3.0, 50
BUDGETS = (11, 8, 6)
BUNDLED = {
    "words": ("zoo:emoji_flux_2", "words into pictures", (11, 8)),
    "clothes": ("zoo:fashion_dit", "classes into pictures", (8, 6)),
}
"""For each picture of the first stage: the bundled model, what it does, budgets of its readouts."""

PROMPTS = (  # stored with the model, and among those it draws best
    "grinning face",
    "panda face",
    "cat face",
    "sunflower",
    "christmas tree",
    "red apple",
    "hamburger",
    "rocket",
)
LABELS = (0, 2, 3, 5, 7, 8, 9, 1)
NUM_RECORDED, NUM_COMPARED = 64, 16
NUM_LAYERS, LAYER_ITEMS = 8, 20_000  # trajectories with every block's features, and their first
RIVALS = ("ab2", "dpmpp_2m", "taylor_2")  # the best solvers and formula of docs/readout.md here
CLOSED_LOOP, CLOSED_LOOP_ANCHORS = 8, (0, 3, 8, 14, 20, 27, 34, 43)  # by `foreseer search`

Run = Callable[[Path, str], None]


@dataclass(frozen=True)
class Stage:
    """A part of the demonstration.

    Attributes:
        purpose: what it is for, in a line.
        seconds: how long it takes on an idle core.
        run: what runs it, given the folder and the pipeline of one's own road.
    """

    purpose: str
    seconds: int
    run: Run


def run_stages(folder: Path, pipeline: str, stages: Mapping[str, Stage]) -> None:
    """Run the stages that are not done yet in a folder, and say where their pictures are.

    Args:
        folder: of everything the demonstration makes.
        pipeline: folder of a class-to-image pipeline, or a bundled one, for one's own road.
        stages: by name, `STAGES` with or without `MORE`.

    Raises:
        ValueError: the folder holds a demonstration on another pipeline.
    """
    done = seconds_spent(folder, pipeline)
    for number, (name, stage) in enumerate(stages.items(), start=1):
        print(f"\n=== {number} of {len(stages)}: {stage.purpose}", flush=True)
        if name in done:
            print(f"    done before, in {done[name]:.0f} s")
            continue
        print(f"    takes about {length(stage.seconds)} on an idle processor", flush=True)
        started = time.perf_counter()
        stage.run(folder, pipeline)
        done[name] = time.perf_counter() - started
        note_seconds(folder, pipeline, done)
        print(f"    ({done[name]:.0f} s)", flush=True)
    print("", *advice(load_rows(folder / "bench" / "results.json")), sep="\n")
    print(f"Look at {folder / 'bench' / 'report.html'} and the pictures in {folder}.")
    left = [stage for name, stage in MORE.items() if name not in stages]
    if left:
        seconds = length(sum(stage.seconds for stage in left))
        print(f"More (layer by layer, the closed-loop fit; {seconds}): foreseer demo --all")


def length(seconds: int) -> str:
    """A time in words, rounded."""
    return f"{seconds} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def pictures(folder: Path, pipeline: str) -> None:
    """The bundled predictors' pictures, whatever pipeline was asked for."""
    for name, (model, purpose, budgets) in BUNDLED.items():
        predictors = [f"{model}_readout_{n}" for n in budgets]
        prompts = PROMPTS if name == "words" else None
        show(folder / f"{name}.png", model, purpose, predictors, prompts)


def show(
    path: Path,
    model: str,
    purpose: str,
    predictors: list[str],
    prompts: Sequence[str] | None = None,
) -> None:
    """Draw with a model in full and with predictors, say what it took, and write the picture."""
    pipe = load_pipeline(model)
    asked = samples(pipe, prompts, () if prompts else LABELS)
    print(f"    {purpose} with {model}, {len(asked)} at once:", flush=True)
    runs = side_by_side(
        pipe, asked, predictors, num_inference_steps=NUM_STEPS, guidance_scale=GUIDANCE_SCALE
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(runs, asked).save(path)
    print(f"{told(runs)}\n    picture: {path}", flush=True)


def record(folder: Path, pipeline: str) -> None:
    """Trajectories for the fits."""
    record_trajectories(
        pipeline,
        None,
        str(folder / "recording"),
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=NUM_STEPS,
        num_trajectories=NUM_RECORDED,
        batch_size=16,
        taps=("output", "hidden"),
    )


def fit(folder: Path, pipeline: str) -> None:
    """A readout per number of evaluations, each a folder that loads without Lightning."""
    pipe = load_pipeline(pipeline)
    for budget in BUDGETS:
        fit_predictor(
            str(folder / "recording"),
            budget,
            pipeline=pipe,
            out=predictor_folder(folder, budget),
        )


def draw(folder: Path, pipeline: str) -> None:
    """Pictures by the predictors that were just fitted."""
    predictors = [predictor_folder(folder, budget) for budget in BUDGETS]
    show(folder / "own.png", pipeline, "your own predictors", predictors)


def compare(folder: Path, pipeline: str) -> None:
    """The predictors, and the formula and solvers one would use, each on steps that suit it."""
    pipe = load_pipeline(pipeline)
    recording = Recording(folder / "recording")
    page = compare_methods(
        pipe,
        asked_items(pipe, None, NUM_COMPARED, FIRST_ITEM),
        folder / "bench",
        BUDGETS,
        load_learned([f"readout@{n}={predictor_folder(folder, n)}" for n in BUDGETS]),
        searched={key: steps for n in BUDGETS for key, steps in rival_steps(recording, n).items()},
        methods=RIVALS,
        command="foreseer demo",
        common=(),
        num_inference_steps=NUM_STEPS,
        guidance_scale=GUIDANCE_SCALE,
    )
    print(f"    page: {page}")


def rival_steps(recording: Recording, budget: int) -> dict[str, tuple[int, ...]]:
    """The steps that suit each rival best by recorded Grams, as the verdict of a fit finds them.

    A solver that is no formula on Grams takes the steps of the best formula among the rivals.
    """
    sigmas, items = recording.header.sigmas, list(recording.items)
    found: dict[str, tuple[int, ...]] = {}
    for tap in ("output", "hidden"):
        name = f"gram/{tap}"
        mean = sum_grams(recording, [name], items)[name] / len(items)
        best = {each.name: each.anchors for each in rivals_on(mean, budget, sigmas)}
        for rival in RIVALS:
            key = f"{rival}|none|{budget}" if rival in SOLVERS else f"{rival}|{tap}|{budget}"
            found.setdefault(key, best.get(rival, best["taylor_2"]))
    return found


def layers(folder: Path, pipeline: str) -> None:
    """How every block's features move, and what formulas would do, on a page."""
    record_trajectories(
        pipeline,
        None,
        str(folder / "layers"),
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=NUM_STEPS,
        num_trajectories=NUM_LAYERS,
        first_item=LAYER_ITEMS,
        batch_size=NUM_LAYERS,
        taps=("blocks.*", "hidden"),
        features="full",
        states=False,
    )
    inspect(str(folder / "layers"), str(folder / "plots"))


def closed_loop(folder: Path, pipeline: str) -> None:
    """L2P in closed loop, which takes far longer than a readout for about the same error."""
    fit_predictor(
        str(folder / "recording"),
        method="closed_loop",
        anchors=CLOSED_LOOP_ANCHORS,
        tap="hidden",
        pipeline=pipeline,
        out=predictor_folder(folder, "closed_loop"),
    )
    predictors = [predictor_folder(folder, name) for name in (CLOSED_LOOP, "closed_loop")]
    show(folder / "closed_loop.png", pipeline, "readout, then closed loop", predictors)


def predictor_folder(folder: Path, name: object) -> str:
    """Where a fitted predictor lies."""
    return str(folder / "predictors" / str(name))


STAGES = {
    "pictures": Stage("what the bundled predictors do", 35, pictures),
    "record": Stage(f"your own: record {NUM_RECORDED} runs of {NUM_STEPS} steps", 40, record),
    "fit": Stage("your own: fit predictors for 11, 8 and 6 evaluations", 110, fit),
    "draw": Stage("your own: pictures by them", 10, draw),
    "compare": Stage("your own: beside the formula and solvers one would use instead", 90, compare),
}
"""What `make demo` runs."""

MORE = {
    "layers": Stage("how every layer's features move", 90, layers),
    "closed_loop": Stage("the fit in closed loop, minutes for what took seconds", 480, closed_loop),
}
"""What `foreseer demo --all` runs besides."""


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
