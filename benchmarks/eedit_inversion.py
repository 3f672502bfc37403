"""RF inversion in 8 of 28 evaluations: what comes back of a picture, and what becomes of its edits.

python benchmarks/eedit_inversion.py --archive emoji-datasource-google-16.0.0.tgz --out runs/eedit

Sources are real emoji: pictures that the bundled model was trained on to fit on, and pictures kept
from its training to choose and to judge on. What is computed is kept in the folder `--out`.
"""

import argparse
import functools
import itertools
import json
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import foreseer as fs
from foreseer.evaluation.metrics import paired
from foreseer.integration.pipelines.rf_inversion import Inverted, RFInversion, source_share

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "bundled_models"))
from emoji import ARCHIVE, Picture, read_pictures, split  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "eedit.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "inversion.png"
STEPS, EVALUATIONS = 28, 8
FITTED_ON, CHOSEN_ON, JUDGED_ON = 96, 12, 32
LISTS = {
    "even": (0, 4, 7, 11, 14, 18, 21, 25),
    "early": (0, 1, 3, 6, 10, 14, 19, 24),
    "middle": (0, 2, 4, 7, 11, 15, 19, 23),
    "late": (0, 5, 9, 13, 17, 20, 23, 26),
}
"""Steps at which the network runs, that every method is tried on."""
FORMULAS = {
    "reuse": fs.predictors.Reuse,
    "taylor_1": functools.partial(fs.predictors.Taylor, 1),
}
FITS = {
    "readout_of_inversion": ("readout", "own"),
    "lstsq_of_reconstruction": ("lstsq", "exact"),
    "readout": ("readout", "exact"),
}
"""Fit and recording: of full inversions, or of exact ones, which bring the pictures back."""
SEED = 7_000
EDITED, GAMMA = 8, 0.7
Latents = Callable[["Sources"], Tensor]


class Sources:
    """The pictures of a split, with their names.

    Args:
        pictures: of the split.
        first: seed of the noise of the first one.
    """

    def __init__(self, pictures: Sequence[Picture], first: int) -> None:
        self.images = torch.stack([picture.image for picture in pictures])
        self.names = [picture.captions[0] for picture in pictures]
        self.seeds = [first + number for number in range(len(pictures))]

    def inputs(self) -> list[dict[str, Any]]:
        """A row each, as hosts record them."""
        rows = zip(self.images.split(1), self.names, strict=True)
        return [{"images": image, "prompt": name} for image, name in rows]

    def call(self) -> dict[str, Any]:
        """All of them, as `invert` takes them; the noise is that of the seeds."""
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        return {"images": self.images, "prompt": self.names, "generator": generators}


class Bench:
    """The model, its sources, and what was computed before.

    Args:
        archive: the emoji package.
        out: folder of what is kept.
    """

    def __init__(self, archive: Path, out: Path) -> None:
        self.pipe = fs.load_pipeline("zoo:emoji_flux")
        self.editor = RFInversion(self.pipe)
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        train, held_out = split(read_pictures(archive, 32))
        self.fit = Sources(train[:: len(train) // FITTED_ON][:FITTED_ON], SEED)
        self.judge = Sources(held_out[::3][:JUDGED_ON], SEED + 1_000)
        self.choose = Sources(held_out[1::3][:CHOSEN_ON], SEED + 2_000)

    @functools.cached_property
    def recordings(self) -> dict[str, Any]:
        """Full inversions and exact ones of the sources to fit on."""
        hosts = {"own": self.editor.inversion, "exact": self.editor.exact}
        inputs = self.fit.inputs()
        return {
            name: fs.record(host, inputs, str(self.out / f"recorded_{name}"), batch_size=16)
            for name, host in hosts.items()
        }

    def fitted(self, method: str, anchors: Sequence[int]) -> Any:
        """A predictor, from its folder where it is there."""
        fit, recording = FITS[method]
        folder = self.out / "_".join([method, *map(str, anchors)])
        if not folder.exists():
            given = {"tap": "output"} if fit == "lstsq" else {"pipeline": self.editor.inversion}
            fs.fit(
                self.recordings[recording], anchors=anchors, method=fit, out=str(folder), **given
            )
        return fs.load(str(folder))

    def inverted(self, sources: Sources) -> Inverted:
        """The sources before anything was done to them: latents, noise and sizes."""
        x, size = self.editor.coder.encoded(sources.images)
        noise = torch.cat(
            [
                torch.randn(1, *x.shape[1:], generator=torch.Generator().manual_seed(seed))
                for seed in sources.seeds
            ]
        )
        return Inverted(x, x, noise, STEPS, *size)

    def forecast(self, predictor: Any, anchors: Sequence[int]) -> Latents:
        """Inversion with forecasts between the anchors."""

        def invert(sources: Sources) -> Tensor:
            with fs.forecasting(self.editor.inversion, predictor, anchors):
                return self.editor.invert(gamma=0.0, **sources.call()).latents

        return invert

    def full(self, sources: Sources) -> Tensor:
        """Inversion with every evaluation."""
        return self.editor.invert(gamma=0.0, **sources.call()).latents

    def exact(self, sources: Sources) -> Tensor:
        """The inverse of the steps of the edit."""
        given = {name: value for name, value in sources.call().items() if name != "generator"}
        return self.editor.invert_exactly(**given).latents

    def solver(self, name: str, times: Sequence[float]) -> Latents:
        """Inversion by a few-step solver at flow times of its own, with the end."""

        @torch.no_grad()
        def invert(sources: Sources) -> Tensor:
            start = self.inverted(sources)
            model = self.editor._model(sources.names, 1.0, start.source, (32, 32))
            return SOLVERS[name](model, start.latents, times)

        return invert

    def reconstruction(self, latents: Tensor, sources: Sources) -> Tensor:
        """PSNR of every picture that comes back under its own name, without guidance, in dB."""
        start = replace(self.inverted(sources), latents=latents)
        found = self.editor.edit(
            start, sources.names, 0.0, 0, guidance_scale=1.0, output_type="latent"
        )
        return psnr(found, start.source)


def psnr(found: Tensor, expected: Tensor) -> Tensor:
    """Of every picture in [-1, 1], in dB."""
    error = (found.clamp(-1, 1) - expected.clamp(-1, 1)).square().flatten(1).mean(1).double()
    return 10 * (4 / error).log10()


def ab2(model: Any, x: Tensor, times: Sequence[float]) -> Tensor:
    """Variable-step Adams-Bashforth 2 after a step of Euler."""
    before, last = None, 0.0
    for sigma, after in itertools.pairwise(times):
        v, step = model(x, sigma), after - sigma
        moved = v if before is None else v + step / (2 * last) * (v - before)
        x, before, last = x + step * moved, v, step
    return x


def heun(model: Any, x: Tensor, times: Sequence[float]) -> Tensor:
    """Heun's method, two evaluations a step."""
    for sigma, after in itertools.pairwise(times[::2]):
        v = model(x, sigma)
        end = model(x + (after - sigma) * v, after)
        x = x + (after - sigma) * (v + end) / 2
    return x


def implicit(model: Any, x: Tensor, times: Sequence[float]) -> Tensor:
    """The inverse Euler step by two rounds of its fixed point, two evaluations a step."""
    for sigma, after in itertools.pairwise(times[::2]):
        found = x + (after - sigma) * model(x, after)
        x = x + (after - sigma) * model(found, after)
    return x


def euler(model: Any, x: Tensor, times: Sequence[float]) -> Tensor:
    """Euler, which reuse on these steps is too."""
    for sigma, after in itertools.pairwise(times):
        x = x + (after - sigma) * model(x, sigma)
    return x


SOLVERS = {"euler": euler, "ab2": ab2, "heun": heun, "implicit_euler": implicit}
"""Two evaluations a step of the last two, so that they take every second time."""


def ways(bench: Bench, method: str, anchors: Sequence[int]) -> Latents:
    """A method on a list of steps; what is fitted is fitted now."""
    if method in FORMULAS:
        return bench.forecast(FORMULAS[method](), anchors)
    if method in FITS:
        return bench.forecast(bench.fitted(method, anchors), anchors)
    return bench.solver(method, [*(anchor / STEPS for anchor in anchors), 1.0])


METHODS = ("reuse", "taylor_1", "ab2", "readout")
"""Those that are judged, each on its best list."""
SAME_STEPS = ("reuse", "taylor_1")  # judged on the readout's list too
TRIED = ("heun", "implicit_euler", "readout_of_inversion", "lstsq_of_reconstruction")
"""Those that are measured on the pictures to choose on alone, on even steps."""


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """A value from its JSON file, made where there is none."""
    if not path.exists():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def measured(bench: Bench, name: str, way: Latents, split: str) -> dict[str, Any]:
    """Reconstruction of a split by one way, with its processor time; kept."""

    def make() -> dict[str, Any]:
        sources = getattr(bench, split)
        began = time.process_time()
        latents = way(sources)
        seconds = time.process_time() - began
        values = bench.reconstruction(latents, sources)
        print(f"{split} {name}: {values.mean():.2f} dB", flush=True)
        return {
            "psnr_db": values.tolist(),
            "seconds": seconds / len(sources.names),
            "noise_std": float(latents.std()),
        }

    return kept(bench.out / f"{split}_{name}.json", make)


def chosen(bench: Bench, method: str) -> str:
    """The list on which a method brings the sources to choose on back best."""
    errors = {
        name: sum(
            measured(bench, f"{method}_{name}", Late(bench, method, anchors), "choose")["psnr_db"]
        )
        for name, anchors in LISTS.items()
    }
    return max(errors, key=errors.__getitem__)


class Late:
    """A way that is made when it is first run.

    Args:
        bench: see `ways`.
        method: see `ways`.
        anchors: see `ways`.
    """

    def __init__(self, bench: Bench, method: str, anchors: Sequence[int]) -> None:
        self.bench, self.method, self.anchors = bench, method, anchors

    def __call__(self, sources: Sources) -> Tensor:
        """Make it and run it."""
        return ways(self.bench, self.method, self.anchors)(sources)


def reconstruction_rows(bench: Bench) -> list[dict[str, Any]]:
    """A row per method at 8 of 28 evaluations, each on its own list, compared with the readout."""
    ours = chosen(bench, "readout")
    found = {
        "full": (None, STEPS, measured(bench, "full", bench.full, "judge")),
    }
    for method in METHODS:
        for listed in {chosen(bench, method): 0} | ({ours: 0} if method in SAME_STEPS else {}):
            way = Late(bench, method, LISTS[listed])
            told = measured(bench, f"{method}_{listed}", way, "judge")
            found[f"{method} on {listed}"] = listed, EVALUATIONS, told
    best = torch.tensor(found[f"readout on {ours}"][2]["psnr_db"])
    rows = []
    for name, (listed, evaluations, told) in found.items():
        values = torch.tensor(told["psnr_db"])
        method = name.partition(" on ")[0]
        row = {"method": method, "evaluations": evaluations, "list": listed}
        row |= {"own_list": listed is not None and listed == chosen(bench, method)}
        row |= {"psnr_db": float(values.mean()), "seconds": told["seconds"]}
        row |= {"noise_std": told["noise_std"]}
        if name != f"readout on {ours}":
            ahead = paired(best, values)
            row |= {"readout_ahead_db": ahead.mean, "low_db": ahead.low, "high_db": ahead.high}
            row |= {"wins": int((best > values).sum()), "num_samples": len(values)}
        rows.append(row)
    return rows


def tried_rows(bench: Bench) -> list[dict[str, Any]]:
    """What was measured on the pictures to choose on: every list, and what was not judged."""
    names = [(method, listed) for method in METHODS for listed in LISTS]
    names += [(method, "even") for method in TRIED]
    rows = []
    for method, listed in names:
        way = Late(bench, method, LISTS[listed])
        told = measured(bench, f"{method}_{listed}", way, "choose")
        mean = sum(told["psnr_db"]) / len(told["psnr_db"])
        rows.append({"method": method, "list": listed, "psnr_db": mean})
    told = measured(bench, "exact", bench.exact, "choose")
    mean = sum(told["psnr_db"]) / len(told["psnr_db"])
    return [*rows, {"method": "exact", "list": None, "psnr_db": mean}]


def edit_rows(bench: Bench) -> list[dict[str, Any]]:
    """What skipped inversions do to edits: PSNR to the edit after all evaluations.

    As published: no prompt in the inversion, eta 0.7 up to step 6, guidance in the edit; the prompt
    of an edit is the name of the next picture.
    """
    rows = []
    edits = {name: edited(bench, GAMMA, name, runs) for name, runs in SKIPPED.items()}
    for name, runs in SKIPPED.items():
        told = None if name == "all" else float(psnr(edits[name], edits["all"]).mean())
        rows.append({"inversion": name, "evaluations": len(runs), "psnr_db": told})
    return rows


SKIPPED = {
    "all": range(STEPS),
    "every third": range(0, STEPS, 3),
    "every seventh": range(0, STEPS, 7),
    "the first": range(1),
    "none": range(0),
}
"""Steps of the inversion at which the network runs; in between its output is reused."""


def some(sources: Sources, count: int) -> Sources:
    """The first of them."""
    found = object.__new__(Sources)
    found.images, found.names = sources.images[:count], sources.names[:count]
    found.seeds = sources.seeds[:count]
    return found


def edited(bench: Bench, gamma: float, name: str, runs: range) -> Tensor:
    """Latents of the edits after one way to invert; kept."""

    def make() -> list[Any]:
        sources = some(bench.judge, EDITED)
        start = bench.inverted(sources)
        if runs:
            given = sources.call() | {"prompt": "", "noise": start.noise, "gamma": gamma}
            with fs.forecasting(bench.editor.inversion, fs.predictors.Reuse(), runs):
                start = bench.editor.invert(**given)
        else:
            start = replace(start, latents=start.noise)
        prompts = [*sources.names[1:], sources.names[0]]
        print(f"edit, gamma {gamma:g}, {name}", flush=True)
        return bench.editor.edit(start, prompts, output_type="latent").tolist()

    return torch.tensor(kept(bench.out / f"edit_{gamma:g}_{name.replace(' ', '_')}.json", make))


def pictured(bench: Bench) -> None:
    """Pictures, what comes back of them, and edits, side by side."""
    sources = some(bench.judge, 6)
    start = bench.inverted(sources)
    shown = {"picture": start.source}
    ways_shown: dict[str, Latents] = {"full inversion": bench.full}
    for label, method in (("reuse", "reuse"), ("taylor_1", "taylor_1"), ("readout", "readout")):
        ways_shown[f"{label}, 8"] = Late(bench, method, LISTS[chosen(bench, method)])
    prompts = [*sources.names[1:], sources.names[0]]
    edits = {}
    for label, way in ways_shown.items():
        begun = replace(start, latents=way(sources))
        shown[label] = bench.editor.edit(
            begun, sources.names, 0.0, 0, guidance_scale=1.0, output_type="latent"
        )
        edits[f"edit, {label}"] = bench.editor.edit(begun, prompts, output_type="latent")
    drawn = {name: bench.pipe._pixels(latents) for name, latents in (shown | edits).items()}
    montage(drawn, [f"{a}, edited to {b}" for a, b in zip(sources.names, prompts, strict=True)])


def montage(columns: dict[str, Tensor], rows: Sequence[str]) -> None:
    """Save pictures in a table, a column per way."""
    side, left, top = 96, 190, 34
    size = left + len(columns) * (side + 6), top + len(rows) * (side + 6)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for place, (name, pictures) in enumerate(columns.items()):
        x = left + place * (side + 6)
        draw.text((x, 4), "\n".join(name.split(", ")), fill="black")
        for row, picture in enumerate(pictures):
            pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            small = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(small, (x, top + row * (side + 6)))
    for row, words in enumerate(rows):
        text = "\n".join(textwrap.wrap(words, 28))
        draw.text((4, top + row * (side + 6) + 30), text, fill="black")
    PICTURE.parent.mkdir(exist_ok=True)
    sheet.save(PICTURE)


def main() -> None:
    """See the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, default=Path(ARCHIVE))
    parser.add_argument("--out", type=Path, default=Path("runs/eedit_inversion"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    write(Bench(given.archive, given.out))


def write(bench: Bench) -> None:
    """Measure what is not there yet, and write the results beside those of other parts."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found["inversion"] = {
        "command": "python benchmarks/eedit_inversion.py",
        "steps": STEPS,
        "lists": {name: list(anchors) for name, anchors in LISTS.items()},
        "fitted_on": FITTED_ON,
        "chosen_on": CHOSEN_ON,
        "judged_on": JUDGED_ON,
        "reconstruction": reconstruction_rows(bench),
        "tried": tried_rows(bench),
        "gamma": GAMMA,
        "picture_share": source_share(GAMMA, [i / STEPS for i in range(STEPS + 1)]),
        "edits": edit_rows(bench),
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    pictured(bench)


if __name__ == "__main__":
    main()
