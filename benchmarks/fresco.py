"""Growing pictures on the model of two grids: record, fit, judge; and what the lift alone loses.

    python benchmarks/fresco.py ideal
    python benchmarks/fresco.py stages
    python benchmarks/fresco.py across
    python benchmarks/fresco_page.py

Three splits by prompt: fitted on (the first of the calibration list), chosen on (others of it) and
judged on (captions kept from training and fits). All noise is the field of the judged full run, and
the reference is the run of 50 steps on the fine grid. A cost is in evaluations of 64 tokens, one of
16 tokens counted at its measured price.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from PIL import Image
from torch import Tensor, nn

import foreseer as fs
from foreseer.evaluation.metrics import paired, psnr, summarise
from foreseer.evaluation.rows import adams_bashforth_rows
from foreseer.integration.pipelines.pixel_pipeline import image_ids, pack, unpack
from foreseer.integration.pipelines.progressive import (
    ProgressivePipeline,
    haar,
    inverse_haar,
    noise_field,
)
from foreseer.integration.schedule import uniform, warped
from foreseer.predictors.base import Predictor
from foreseer.predictors.linear import L2P
from foreseer.predictors.resampled import Resampled
from foreseer.predictors.rules import Reuse
from foreseer.predictors.solve import ridge
from foreseer.training.recorded import spec_of
from foreseer.training.resampling import extended_gram, set_rows, shrunk_row
from foreseer.trajectories.recording import Recording

MODEL = "examples/bundled_models/emoji_flux_grids"
RESULT = Path("benchmarks/results/fresco.json")
ROOT = Path("runs/fresco")
STEPS, GUIDANCE, BATCH = 50, 3.0, 16
JUDGED_SEED, CHOSEN_SEED = 20_000, 10_000
SWITCHES = (0.8, 0.7, 0.6)
COARSE_ANCHORS = 4
FINE_ANCHORS = 6
IDEAL_TIMES = (0.9, 0.8, 0.7, 0.6, 0.5)
IDEAL_STEPS, IDEAL_PROMPTS = 20, 16

Under = tuple[Predictor, Sequence[int], str]
"""A predictor, its anchors, its tap."""


def prompts(which: str) -> list[str]:
    """Lines of a list of prompts."""
    return Path(f"benchmarks/emoji_{which}.txt").read_text().split("\n")[:-1]


def told(key: str, value: Any) -> None:
    """Put a result into the file."""
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(found | {key: value}, indent=1) + "\n")


def known(key: str) -> Any:
    """A result that is in the file; None where it is not."""
    return json.loads(RESULT.read_text()).get(key) if RESULT.exists() else None


# ---------------------------------------------------------------------------- what the lift loses


@torch.no_grad()
def ideal(pipeline: str = "zoo:emoji_flux") -> None:
    """An ideal coarse stage: the full run's own state, its three detail bands drawn anew.

    Args:
        pipeline: the pipeline.
    """
    pipe = fs.load_pipeline(pipeline)
    words = [word for word in pipe.text_encoder.known if word][:IDEAL_PROMPTS]
    field = noise_field(range(len(words)), 3, 32, 32)
    fresh = noise_field(range(JUDGED_SEED, JUDGED_SEED + len(words)), 3, 32, 32)
    states, velocity = [], Velocity(pipe, words)
    sigmas = [1 - step / IDEAL_STEPS for step in range(IDEAL_STEPS + 1)]
    x = field
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        states.append(x)
        x = x + (after - sigma) * velocity(x, sigma)
    full, rows = as_pictures(x), []
    for wanted in IDEAL_TIMES:
        start = min(range(IDEAL_STEPS), key=lambda i: abs(sigmas[i] - wanted))
        for name, noise in (("field", field), ("fresh", fresh)):
            s = sigmas[start]
            bands = haar(states[start])
            bands[:, 1:] = s * haar(noise)[:, 1:]
            x = inverse_haar(bands)
            for sigma, after in zip(sigmas[start:], sigmas[start + 1 :], strict=False):
                x = x + (after - sigma) * velocity(x, sigma)
            mean = float(psnr(as_pictures(x), full).mean())
            rows.append({"switch": wanted, "s": s, "noise": name, "psnr_db": mean})
            print(rows[-1], flush=True)
    told("ideal", {"pipeline": pipeline, "steps": IDEAL_STEPS, "rows": rows})


class Velocity:
    """v of pictures after guidance.

    Args:
        pipe: a `PixelFluxPipeline`.
        words: a prompt per picture.
    """

    def __init__(self, pipe: Any, words: Sequence[str]) -> None:
        self.pipe = pipe
        embeds, pooled = pipe.text_encoder(words)
        null, null_pooled = pipe.text_encoder([""] * len(words))
        self.embeds, self.pooled = torch.cat([embeds, null]), torch.cat([pooled, null_pooled])

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Their velocity at a flow time."""
        tokens = pack(x, 4)
        v = self.pipe.transformer(
            torch.cat([tokens, tokens]),
            timestep=torch.full((2 * len(x),), sigma),
            encoder_hidden_states=self.embeds,
            pooled_projections=self.pooled,
            img_ids=image_ids(8),
            txt_ids=torch.zeros(16, 3),
        ).sample
        cond, uncond = v.chunk(2)
        return unpack(uncond + GUIDANCE * (cond - uncond), 4)


def grid(pipe: Any, steps: int) -> list[float]:
    """Flow times of a run's steps, and its end."""
    pipe.scheduler.set_timesteps(steps)
    return [float(sigma) for sigma in pipe.scheduler.sigmas]


def as_pictures(latents: Tensor) -> Tensor:
    """Pictures in [0, 1]."""
    return (latents / 2 + 0.5).clamp(0, 1)


# ------------------------------------------------------------------------------------- the stages


class Bench:
    """Pictures of a split, their full run, and what a way to draw them comes to.

    Args:
        words: a prompt per picture.
        first_seed: of the first picture.
        name: of the split.
    """

    def __init__(self, words: Sequence[str], first_seed: int, name: str) -> None:
        self.words, self.name = list(words), name
        self.seeds = range(first_seed, first_seed + len(words))
        place = ROOT / f"full_{name}.pt"
        if not place.exists():
            plain = ProgressivePipeline(fs.load_pipeline(MODEL), [])
            ROOT.mkdir(parents=True, exist_ok=True)
            torch.save(self.draw(plain, STEPS), place)
        self.full = torch.load(place)

    def draw(self, grown: ProgressivePipeline, steps: int = STEPS) -> Tensor:
        """All pictures in [0, 1]."""
        drawn = []
        for start in range(0, len(self.words), BATCH):
            part = slice(start, start + BATCH)
            drawn.append(
                grown(
                    self.words[part],
                    seeds=list(self.seeds)[part],
                    guidance_scale=GUIDANCE,
                    num_inference_steps=steps,
                    output_type="latent",
                ).images
            )
        return as_pictures(unpack(torch.cat(drawn), 4))

    def under(self, grown: ProgressivePipeline, *stages: Under, across: bool = False) -> Tensor:
        """All pictures, with a predictor on every stage.

        Args:
            grown: the pipeline.
            stages: coarsest first.
            across: whether the fine stage begins with the coarse one's features.
        """
        runs: list[Any] = []
        try:
            for number, (pipe, stage) in enumerate(zip(grown.stages, stages, strict=True)):
                predictor, anchors, tap = stage
                after = grown.after(runs[0]) if across and number else None
                runs.append(fs.attach(pipe, predictor, list(anchors), tap, after=after))
            return self.draw(grown)
        finally:
            for run in reversed(runs):
                run.detach()


def rows_of(matrix: Tensor, anchors: Sequence[int], branches: int = 2) -> L2P:
    """A formula's rows as a predictor of no host."""
    predictor = L2P(len(matrix), anchors, branches)
    predictor.set_rows(matrix.expand(branches, -1, -1))
    predictor.learned = False
    return predictor


def ab2(sigmas: Sequence[float], anchors: Sequence[int]) -> Under:
    """Adams-Bashforth 2 over the steps of a stage, whose end is the last of the sigmas."""
    times = [sigma - sigmas[-1] for sigma in sigmas[:-1]]
    return rows_of(adams_bashforth_rows(list(anchors), times), anchors), anchors, "output"


def euler(anchors: Sequence[int]) -> Under:
    """Euler on the anchors: reuse of the output."""
    return Reuse(), anchors, "output"


def price(grown: ProgressivePipeline) -> float:
    """Time of a coarse evaluation over that of a fine one, of 16 pictures with guidance."""
    seconds = []
    for stage in grown.stages:
        words, run = ["red apple"] * BATCH, []
        with fs.forecasting(stage, Reuse(), anchors=range(0, 5)) as attached:
            tokens = (stage.config.sample_size // stage.config.patch_size) ** 2
            latents = torch.randn(BATCH, tokens, 48)
            stage(words, latents=latents, num_inference_steps=STEPS, output_type="latent")
            run = attached.report().seconds["anchor"]
        seconds.append(median(run[1:]))
    return seconds[0] / seconds[1]


def stage_sigmas(switch: float) -> list[list[float]]:
    """Flow times of both stages, each with its end."""
    grown = ProgressivePipeline(fs.load_pipeline(MODEL), [switch])
    for stage in grown.stages:
        stage.scheduler.set_timesteps(STEPS)
    return [[float(s) for s in stage.scheduler.sigmas] for stage in grown.stages]


LISTS: dict[str, Callable[..., tuple[int, ...]]] = {
    "uniform": lambda n, steps: uniform(n, steps),
    "warped": lambda n, steps: warped(n, steps, 1.3),
}


def choose(count: int) -> dict[str, Any]:
    """Switch and lists, by Adams-Bashforth 2 in both stages: what the learned rows are not told.

    Args:
        count: pictures.
    """
    if (found := known("chosen")) is not None:
        return dict(found)
    bench = Bench(prompts("calibration")[-count:], CHOSEN_SEED, "choose")
    tried = []
    for switch in SWITCHES:
        grown = ProgressivePipeline(fs.load_pipeline(MODEL), [switch])
        coarse, fine = stage_sigmas(switch)
        first = uniform(COARSE_ANCHORS, len(coarse) - 1)
        for name, made in LISTS.items():
            second = made(FINE_ANCHORS, len(fine) - 1)
            values = bench.under(grown, ab2(coarse, first), ab2(fine, second))
            row = {"switch": switch, "list": name, "coarse": first, "fine": second}
            tried.append(row | {"psnr_db": float(psnr(values, bench.full).mean())})
            print(tried[-1], flush=True)
    best = max(tried, key=lambda row: row["psnr_db"])
    cost = price(ProgressivePipeline(fs.load_pipeline(MODEL), [best["switch"]]))
    chosen = best | {"price": cost, "tried": tried}
    told("chosen", chosen)
    return chosen


def record(switch: float, count: int) -> tuple[Recording, Recording]:
    """Both stages in full, the fine one from what the coarse one came to.

    Args:
        switch: flow time of the change of grid.
        count: pictures.
    """
    grown = ProgressivePipeline(fs.load_pipeline(MODEL), [switch])
    words = prompts("calibration")[:count]
    latents, (details,) = grown.noise(range(count))
    options: dict[str, Any] = {
        "taps": ["output", "hidden"],
        "features": "full",
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "batch_size": BATCH,
    }
    items = [{"prompt": w, "latents": latents[i, None]} for i, w in enumerate(words)]
    coarse = fs.record(grown.stages[0], items, str(ROOT / f"coarse_{switch}"), **options)
    ends = torch.stack([coarse.load(i, ["final"])["final"] for i in range(count)])
    sigma = stage_sigmas(switch)[0][-1]
    starts = grown.changes[0].latents(ends, details, sigma)
    items = [{"prompt": w, "latents": starts[i, None]} for i, w in enumerate(words)]
    return coarse, fs.record(grown.stages[1], items, str(ROOT / f"fine_{switch}"), **options)


class Rows:
    """The rows of all learned ways, from one extended Gram.

    Args:
        coarse: recording of the coarse stage.
        fine: of the fine one.
        before: coarse anchors to forecast from.
    """

    def __init__(self, coarse: Recording, fine: Recording, before: Sequence[int]) -> None:
        self.coarse, self.fine, self.before = coarse, fine, tuple(before)
        self.gram: Tensor | None = None

    def made(self, kind: str, anchors: Sequence[int], strength: float = 1e-4) -> Resampled:
        """A predictor.

        Args:
            kind: `joint`, `innovation`, `drop` (rows over fine anchors alone) or `copy` (copies of
                the parents up to the first fine anchor, then as `drop`).
            anchors: of the fine stage.
            strength: of the ridge.
        """
        header = self.fine.header
        sizes = (header.num_steps, anchors, self.before, self.coarse.header.sigmas, (8, 8))
        found = Resampled(*sizes, header.num_branches)
        if self.gram is None:
            parts = [
                extended_gram(found, self.coarse, self.fine, i, "hidden") for i in self.fine.items
            ]
            self.gram = torch.stack(parts).sum(0)
        if kind in ("joint", "innovation"):
            set_rows(found, self.gram, strength, kind == "innovation")
        else:
            pairs = found.weight[0, 0].numel()
            for t in range(header.num_steps):
                own = [pairs + anchor for anchor in anchors if anchor < t]
                if own:
                    row = shrunk_row(self.gram, own, own[-1], pairs + t, strength)
                    found.own[:, t] = row[:, pairs:]
        found.spec = spec_of(header, "hidden", anchors, len(self.fine))
        return found


SHOWN = ("ab2", "stages_full", "stages_ab2", "innovation")
"""Ways in the picture, after the full run."""


def draw_sheet(columns: Sequence[Tensor], path: Path, scale: int = 2) -> None:
    """A row of every way, a column of every picture."""
    rows = [torch.cat([nn.functional.pad(p, (2, 2, 2, 2), value=1.0) for p in each], 2)
            for each in columns]  # fmt: skip
    pixels = (255 * torch.cat(rows, 1)).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1)).save(path)


def later(anchors: Sequence[int]) -> tuple[int, ...]:
    """The list with its first anchor at step 2."""
    return (2, *[anchor for anchor in anchors[1:] if anchor > 2])


LEARNED = {"": ("drop", "joint", "innovation"), "_late": ("copy", "joint", "innovation")}
"""Learned ways by list: dropping needs an anchor at step 0, which leaves copies no step."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def choose_strengths(plan: dict[str, Any], count: int, fitted: int) -> dict[str, float]:
    """The ridge of every learned way, by its distance to the stages with every step computed.

    Args:
        plan: chosen before.
        count: pictures to choose on.
        fitted: pictures fitted on.
    """
    if (found := known("strengths")) is not None:
        return {name: max(each, key=lambda row: row[1])[0] for name, each in found.items()}
    bench = Bench(prompts("calibration")[-count:], CHOSEN_SEED, "choose")
    grown = ProgressivePipeline(fs.load_pipeline(MODEL), [plan["switch"]])
    sigmas = stage_sigmas(plan["switch"])
    staged = bench.draw(grown)
    rows = Rows(*record(plan["switch"], fitted), plan["coarse"][-2:])
    tried: dict[str, list[tuple[float, float]]] = {}
    for kind, anchors in (("", tuple(plan["fine"])), ("_late", later(plan["fine"]))):
        for name in LEARNED[kind]:
            for strength in RIDGES:
                under = rows.made(name, anchors, strength), anchors, "hidden"
                drawn = bench.under(grown, ab2(sigmas[0], plan["coarse"]), under, across=True)
                mean = float(psnr(drawn, staged).mean())
                tried.setdefault(name + kind, []).append((strength, mean))
                print(name + kind, strength, mean, flush=True)
    told("strengths", tried)
    return {name: max(each, key=lambda row: row[1])[0] for name, each in tried.items()}


def stages(fitted: int = 48, chosen_on: int = 16, judged: int = 64) -> None:
    """Choose, record, fit and judge.

    Args:
        fitted: pictures to fit on.
        chosen_on: to choose on.
        judged: to judge on.
    """
    plan = choose(chosen_on)
    switch, first, second = plan["switch"], tuple(plan["coarse"]), tuple(plan["fine"])
    coarse, fine = record(switch, fitted)
    sigmas = stage_sigmas(switch)
    rows, strengths = Rows(coarse, fine, first[-2:]), choose_strengths(plan, chosen_on, fitted)
    late = later(second)
    grown = ProgressivePipeline(fs.load_pipeline(MODEL), [switch])
    plain = ProgressivePipeline(fs.load_pipeline(MODEL), [])
    cost = plan["price"] * len(first) + len(second)
    whole = [float(s) for s in grid(fs.load_pipeline(MODEL), STEPS)]
    base = ab2(sigmas[0], first)
    equal = uniform(round(cost), STEPS)
    bench = Bench(prompts("held_out")[:judged], JUDGED_SEED, "judge")
    ways: dict[str, tuple[Any, ...]] = {
        "euler": (plain, euler(equal)),
        "ab2": (plain, ab2(whole, equal)),
        "stages_full": (grown, *(euler(range(len(each) - 1)) for each in sigmas)),
        "stages_euler": (grown, euler(first), euler(second)),
        "stages_ab2": (grown, base, ab2(sigmas[1], second)),
    }
    for kind, anchors in (("", second), ("_late", late)):
        for name in LEARNED[kind]:
            learned = rows.made(name, anchors, strengths[name + kind])
            ways[name + kind] = (grown, base, (learned, anchors, "hidden"))
    values: dict[str, Tensor] = {}
    to_staged: dict[str, Tensor] = {}
    staged: Tensor | None = None
    made = []
    shown = [bench.full[:: judged // 8]]
    for name, (pipe, *under) in ways.items():
        began = time.perf_counter()
        across = isinstance(under[-1][0], Resampled)
        drawn = bench.under(pipe, *under, across=across)
        values[name] = psnr(drawn, bench.full)
        if name in SHOWN:
            shown.append(drawn[:: judged // 8])
        staged = drawn if name == "stages_full" else staged
        if staged is not None and name != "stages_full":
            to_staged[name] = psnr(drawn, staged)
        anchors = [list(each[1]) for each in under]
        counts = [len(each) for each in anchors]
        own = counts[0] if len(counts) == 1 else plan["price"] * counts[0] + counts[1]
        summary = summarise(values[name])
        made.append(
            {"method": name, "anchors": anchors, "evaluations": counts, "cost": own}
            | {"psnr_db": summary.mean, "psnr_median": summary.median, "psnr_q10": summary.q10}
            | ({"to_stages_db": float(to_staged[name].mean())} if name in to_staged else {})
            | {"num_samples": judged, "seconds": time.perf_counter() - began}
        )
        print(made[-1], flush=True)
    told("stages", {"switch": switch, "fitted": fitted, "rows": made})
    told("pairs", [compared(values, *pair) for pair in PAIRS])
    inside = [pair for pair in PAIRS if set(pair) <= to_staged.keys()]
    told("pairs_to_stages", [compared(to_staged, *pair) for pair in inside])
    draw_sheet(shown, Path("docs/images/progressive.png"))
    told("samples", {name: [round(v, 4) for v in each.tolist()] for name, each in values.items()})


# ---------------------------------------------------------------------- readouts across the grids


def across(fitted: int = 32) -> None:
    """Read the change of the output off an anchor's hidden state, by a map of either grid.

    Both recordings have an anchor and a later step at nearly the same flow times, each on its own
    clock. Open loop: the share of the squared change, which reuse leaves whole, that the map
    explains on pictures it was not fitted on.

    Args:
        fitted: pictures to fit on, of those recorded; half of the others choose the ridge, the
            rest are judged on.
    """
    switch = known("chosen")["switch"]
    own: dict[str, tuple[Tensor, Tensor]] = {}
    times: dict[str, list[float]] = {}
    for name in ("coarse", "fine"):
        recording = Recording(ROOT / f"{name}_{switch}")
        sigmas = recording.header.sigmas
        places = [min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - t)) for t in ACROSS]
        times[name] = [sigmas[place] for place in places]
        read, change = [], []
        for item in recording.items:
            kept = recording.load(item, ["feature/hidden", "feature/output"])
            hidden, output = kept["feature/hidden"], kept["feature/output"]
            normal = nn.functional.layer_norm(hidden[:, places[0]], hidden.shape[-1:])
            read.append(normal.flatten(0, 1))
            change.append((output[:, places[1]] - output[:, places[0]]).flatten(0, 1))
        own[name] = torch.stack(read).double(), torch.stack(change).double()
    half = (fitted + len(own["fine"][0])) // 2
    maps = {}
    for name, (x, y) in own.items():
        tried = [fitted_map(x[:fitted], y[:fitted], strength) for strength in STRENGTHS]
        maps[name] = max(tried, key=lambda each: explained(x[fitted:half], y[fitted:half], *each))
    rows = []
    for grid_name, (x, y) in own.items():
        for fit_name, found in maps.items():
            share = explained(x[half:], y[half:], *found)
            rows.append({"grid": grid_name, "fitted_on": fit_name, "explained": share})
            print(rows[-1], flush=True)
    told("across", {"times": times, "fitted": fitted, "rows": rows})


ACROSS = (0.78, 0.69)
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def explained(x: Tensor, y: Tensor, matrix: Tensor, bias: Tensor) -> float:
    """The share of squared changes that a map explains."""
    return 1 - float((y - x @ matrix - bias).square().sum() / y.square().sum())


def fitted_map(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Ridge regression of changes on hidden states, with a constant."""
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    means = x.mean(0), y.mean(0)
    x, y = x - means[0], y - means[1]
    matrix = ridge(x.T @ x, x.T @ y, strength)
    return matrix, means[1] - means[0] @ matrix


PAIRS = (
    ("stages_euler", "euler"),
    ("stages_ab2", "ab2"),
    ("innovation", "drop"),
    ("joint", "drop"),
    ("innovation_late", "copy_late"),
    ("joint_late", "copy_late"),
    ("innovation_late", "drop"),
    ("innovation", "stages_ab2"),
    ("innovation", "euler"),
    ("innovation", "ab2"),
)
"""A way and its rival."""


def compared(values: dict[str, Tensor], way: str, rival: str) -> dict[str, Any]:
    """The paired difference of two ways."""
    found = asdict(paired(values[way], values[rival]))
    mean, low, high, wins, count = found.values()
    row = {"method": way, "rival": rival, "paired_db": mean, "paired_low_db": low}
    return row | {"paired_high_db": high, "wins": wins, "num_samples": count}


if __name__ == "__main__":
    auto_cli([ideal, stages, across], as_positional=False)
