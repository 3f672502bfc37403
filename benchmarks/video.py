"""Forecasting on the video host: record, search, fit everything, judge whole videos.

    python benchmarks/video.py prompts --clips clips.npz
    python benchmarks/video.py record
    python benchmarks/video.py search
    python benchmarks/video.py lists
    python benchmarks/video.py solvers
    python benchmarks/video.py lists
    python benchmarks/video.py fit
    python benchmarks/video.py bench
    python benchmarks/video.py publish

Every stage takes `--pipeline DIR` and `--root DIR`, those after the recording `--budgets '[8]'`,
and each resumes. Recorded are captions the model was trained on and others that it never saw, by
turns; judged are those kept from its training. PSNR is the mean over the frames of a video; the
temporal difference error compares the changes from frame to frame, x_{f+1} - x_f, with those of the
full run, as a PSNR in dB too (`temporal_db`). Rivals run on the lists searched for them and on the
readout's, and stand in the table with the better one. The readout's list is one of those that
readout_lists.py tries, by the error of readouts fitted on 96 trajectories that the table's are not
fitted on; once `bns` is fitted, its times are tried too. Rows have the form of
benchmarks/results/readout.json.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from jsonargparse import auto_cli
from learned_solvers import Calibration, Place, fit_cell
from readout import FORMULAS, FULL, SOLVER_NAMES, STARTS, compared, fit_walk
from readout_lists import best_list, candidates
from torch import Tensor
from tqdm.auto import tqdm

import foreseer
from foreseer.checkpoints.format import load_predictor
from foreseer.cli import main
from foreseer.evaluation.benchmark import FIRST_ITEM
from foreseer.evaluation.learned_solver import LearnedSolver
from foreseer.evaluation.metrics import latent_rel_l2, paired, psnr, ssim, summarise
from foreseer.evaluation.pairing import prompts_of
from foreseer.evaluation.plan import Entry
from foreseer.evaluation.results import BenchRow, Errors, to_record
from foreseer.evaluation.runs import Judge, Samples, run_entry
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.predictors.rules import RULES
from foreseer.training.fits import Recipe, chosen
from foreseer.training.readout.refine import NUM_CHOOSING
from foreseer.trajectories.datamodule import ItemsDataModule
from foreseer.trajectories.prompts import asked_items
from foreseer.trajectories.recording import Recording, split

HOST = "emoji_wan"
PIPELINE = f"zoo:{HOST}"
ROOT = "runs/video"
HERE = Path("benchmarks")
PROMPTS = {each: HERE / f"{HOST}_{each}.txt" for each in ("trained", "calibration", "held_out")}
RESULT = HERE / "results" / "video.json"
BUDGETS = (11, 8, 6, 4)
SIGNS = ("Flags", "Symbols", "Component")
"""Categories that are not recorded: nothing of them moves."""
CALL: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": 50}
WALKS = {
    "readout": ("readout", True),
    "walk": ("readout", False),
    "rows": ("rows", False),
    "rows_refined": ("rows", True),
}
"""Fits that walk over the anchors: what they fit, and whether it is refined."""
EPOCHS = {11: 1}
"""Epochs of refinement, where it is not two: at 11 one takes 2.6 times the evaluations of 8."""
FITS = (*WALKS, "lstsq", "closed_loop", "lesa", "disca")
"""Every method, of which closed loop takes half an hour at 8."""
SOLVERS = ("bns", "gs")
FORM = "free times"
SEARCHED = ("euler|none", "ab2|none", "dpmpp_2m|none", "unipc|none", "taylor_1|output")
SEARCHED += ("taylor_1|hidden",)  # whose list the other formulas of the tap take
BATCH = 16
NAMES = {"closed_loop": "l2p_closed_loop", "lstsq": "l2p_lstsq"}
"""What a row is called, where it is not its method."""
OPTIONS: dict[str, dict[str, Any]] = {
    "lstsq": {"validation_fraction": 0.5},  # the same half
    "disca": {"num_heads": 4},  # of 32 channels
    "closed_loop": {"validation_fraction": 0.75},  # fitted on a quarter of 128
}
"""Arguments of a fit that are not its method's own, by method."""


def prompts(clips: str = "clips.npz", archive: str = "emoji-datasource-google-16.0.0.tgz") -> None:
    """Write the captions trained on, those to record and those to judge on.

    Args:
        clips: file of `examples/bundled_models/clips.py`.
        archive: the package with the names of all emoji, as `npm pack` downloads it.
    """
    import sys

    sys.path.append("examples/bundled_models")
    from clips import names_of, read_clips, split

    loops = read_clips(clips)
    train, held_out = split(loops)
    named = names_of(Path(archive)).values()
    written = {
        "trained": [clip.captions[0] for clip in train],
        "calibration": calibration([c.captions for c in train], [c.captions for c in loops], named),
        "held_out": [clip.captions[0] for clip in held_out],
    }
    for name, captions in written.items():
        PROMPTS[name].write_text("".join(f"{caption}\n" for caption in captions))
        print(f"{PROMPTS[name]}: {len(captions)} captions")


def calibration(
    trained: Iterable[tuple[str, str]],
    loops: Iterable[tuple[str, str]],
    named: Iterable[tuple[tuple[str, str], str]],
) -> list[str]:
    """Captions to record: by turns one that the model was trained on and one that it never saw.

    Args:
        trained: both names of the loops trained on.
        loops: both names of all loops, whose names are not taken for unseen ones.
        named: both names and the category of all emoji.
    """
    taken = {name for names in loops for name in names}
    unseen = {names[0] for names, kind in named if kind not in SIGNS and not taken & set(names)}
    known = {names[0] for names in trained}
    parts = (sorted(part, key=digest) for part in (known, unseen))
    return [caption for pair in zip(*parts, strict=False) for caption in pair]


def digest(caption: str) -> bytes:
    """A key that mixes captions, in the same way everywhere."""
    return hashlib.sha256(caption.encode()).digest()


def record(
    pipeline: str = PIPELINE,
    root: str = ROOT,
    num_trajectories: int = 1024,
    num_features: int = 128,
) -> None:
    """Record Grams and states for the fits along a run, and features for neural predictors.

    Args:
        pipeline: the video host.
        root: folder of everything.
        num_trajectories: trajectories with Grams and states.
        num_features: of those that are recorded with all features too, from the first on.
    """
    given = ["--pipeline", pipeline, "--prompts", str(PROMPTS["calibration"])]
    given += [word for name, value in CALL.items() for word in (f"--{name}", str(value))]
    given += ["--batch_size", str(BATCH)]
    for name, count, features in (
        ("recording", num_trajectories, "none"),
        ("features", num_features, "full"),
    ):
        words = ["--num_trajectories", str(count), "--features", features]
        main(["record", *given, *words, "--out", f"{root}/{name}"])


def search(
    pipeline: str = PIPELINE,
    root: str = ROOT,
    budgets: Sequence[int] = BUDGETS,
    num_samples: int = 8,
    num_moves: int = 4,
) -> None:
    """Search lists of anchors for every rival.

    Args:
        pipeline: the video host.
        root: folder of everything.
        budgets: network evaluations.
        num_samples: recorded trajectories that lists are compared on.
        num_moves: lists tried by moving single anchors of the best one.
    """
    words = [
        "--recording",
        f"{root}/recording",
        "--pipeline",
        pipeline,
        "--out",
        f"{root}/lists.json",
    ]
    words += ["--num_anchors", json.dumps(list(budgets)), "--methods", json.dumps(SEARCHED)]
    main(["search", *words, "--num_samples", str(num_samples), "--num_moves", str(num_moves)])


def lists(
    pipeline: str = PIPELINE,
    root: str = ROOT,
    budgets: Sequence[int] = BUDGETS,
    num_samples: int = 128,
) -> None:
    """Choose the readout's list on trajectories that are not fitted on afterwards.

    Args:
        pipeline: the video host.
        root: folder of everything.
        budgets: network evaluations.
        num_samples: trajectories, every fourth of them held out.
    """
    pipe, source = load_pipeline(pipeline), Recording(f"{root}/recording")
    fitted, others = halves(source)
    items, path = others[:num_samples], Path(root) / "lists.json"
    for budget in budgets:
        known = json.loads(path.read_text())
        begun = tuple(chosen(Recipe("readout", {}), source, budget, None, None, fitted).anchors)
        solved = Path(root) / "solvers"
        asked = (begun, *candidates(begun, known, source.header.sigmas, solved))
        best = best_list(pipe, f"{root}/recording", items, asked, Path(root) / "tried.json")
        known[f"readout|output|{budget}"] = list(best)
        path.write_text(json.dumps(known))


def halves(source: Recording) -> list[list[int]]:
    """The trajectories that readouts and rows are fitted on, and those that lists are chosen on."""
    return split(source.items, (0.5, 0.5), 0)


class Halves(ItemsDataModule):
    """The half of a recording that is fitted on, and others to choose a refinement's ridge on.

    Args:
        folder: recording folder.
        refined: whether the fit is refined.
    """

    def __init__(self, folder: str, refined: bool) -> None:
        super().__init__(folder)
        self.refined = refined

    def setup(self, stage: str | None = None) -> None:
        """Split the items."""
        fitted, others = halves(Recording(self.folder))
        self.train_items = fitted + (others[-NUM_CHOOSING:] if self.refined else [])
        self.val_items = others[: self.batch_size]


def fit(
    pipeline: str = PIPELINE,
    root: str = ROOT,
    budgets: Sequence[int] = BUDGETS,
    methods: Sequence[str] = FITS,
) -> None:
    """Fit every learned predictor on the readout's list; a neural one takes a quarter of an hour.

    Args:
        pipeline: the video host.
        root: folder of everything.
        budgets: network evaluations.
        methods: of `foreseer.fit`.
    """
    for method in methods:
        for budget in budgets:
            out = fitted_at(root, method, budget)
            if (out / "config.json").exists():
                continue
            anchors = own_list(root, budget)
            if method in WALKS:
                kind, refined = WALKS[method]
                epochs = EPOCHS.get(budget, 2) if refined else 0
                data = Halves(f"{root}/recording", refined)
                fit_walk(kind, pipeline, data, anchors, out, epochs)
                continue
            folder = "recording" if method == "lstsq" else "features"
            given: dict[str, Any] = {"anchors": list(anchors)} | OPTIONS.get(method, {})
            foreseer.fit(
                f"{root}/{folder}", method=method, pipeline=pipeline, out=str(out), **given
            )


def fitted_at(root: str, method: str, budget: int) -> Path:
    """Where a fit lies."""
    return Path(root) / "fits" / f"{method}_{budget}"


def own_list(root: str, budget: int) -> tuple[int, ...]:
    """The anchors of the readout."""
    found = json.loads((Path(root) / "lists.json").read_text())
    return tuple(found[f"readout|output|{budget}"])


def solvers(
    pipeline: str = PIPELINE,
    root: str = ROOT,
    budgets: Sequence[int] = BUDGETS,
    methods: Sequence[str] = SOLVERS,
    num_pairs: int = 32,
    num_epochs: int = 3,
) -> None:
    """Fit learned solvers by Gauss-Newton, as benchmarks/learned_solvers.py does.

    Args:
        pipeline: the video host.
        root: folder of everything.
        budgets: network evaluations.
        methods: families.
        num_pairs: recorded pairs to fit on.
        num_epochs: epochs at most.
    """
    given = f"{root}/recording", Path(root) / "lists.json"
    place = Place(HOST, pipeline, *given, Path(root) / "solvers")
    data = Calibration(place, 0, num_pairs)
    for budget in budgets:
        for method in methods:
            fit_cell(data, method, budget, FORM, num_pairs, num_epochs)


def planned(root: str, budget: int) -> list[Entry]:
    """Everything of a budget that there is: fits, learned solvers, formulas and solvers."""
    own = own_list(root, budget)
    made = []
    for method in FITS:
        folder = fitted_at(root, method, budget)
        if (folder / "config.json").exists():
            predictor: Any = load_predictor(folder)
            spec = predictor.spec
            name = NAMES.get(method, method)
            made.append(Entry(name, "learned", spec.tap, "searched", spec.anchors, predictor))
    for path in sorted((Path(root) / "solvers").glob(f"*_{budget}_free_gn_*.json")):
        method = path.stem.split("_")[0]
        found = LearnedSolver.load(path)
        made.append(Entry(method, "learned solver", "none", "given", (), solver=found))
    searched = json.loads((Path(root) / "lists.json").read_text())
    for method, taps in (FORMULAS | SOLVER_NAMES).items():
        for tap in taps:
            key = method if f"{method}|{tap}|{budget}" in searched else "taylor_1"
            lists = {"given": own, "searched": tuple(searched[f"{key}|{tap}|{budget}"])}
            kind = "solver" if tap == "none" else "formula"
            for name, anchors in lists.items():
                made.append(Entry(method, kind, tap, name, anchors, RULES.get(method)))
    return made


def begun_on(root: str, entry: Entry, budget: int) -> Entry:
    """A learned solver with the list that its fit began on, as a row has it."""
    if entry.kind != "learned solver":
        return entry
    (path,) = (Path(root) / "solvers").glob(f"starts_{budget}_free_*.json")
    starts = json.loads(path.read_text())
    usable = STARTS.get(entry.method, [each["solver"] for each in starts])
    began = next(each["anchors"] for each in starts if each["solver"] in usable)
    return replace(entry, anchors=tuple(began))


def bench(
    pipeline: str = PIPELINE,
    root: str = ROOT,
    budgets: Sequence[int] = BUDGETS,
    num_samples: int = 64,
) -> None:
    """Draw the judged videos with every method and keep their latents.

    Args:
        pipeline: the video host.
        root: folder of everything.
        budgets: network evaluations.
        num_samples: judged videos.
    """
    judged = Judged(pipeline, root, num_samples)
    for budget in budgets:
        for entry in planned(root, budget):
            error = frame_psnr(judged.drawn(entry).images, judged.full.images)
            print(f"{budget} {entry}: {summarise(error).mean:.2f} dB", flush=True)


class Judged:
    """The judged videos: their full runs, and what every method made of them, kept on disk.

    Args:
        pipeline: the video host.
        root: folder of everything.
        num_samples: judged videos.
    """

    def __init__(self, pipeline: str, root: str, num_samples: int) -> None:
        self.pipe = load_pipeline(pipeline)
        self.root = Path(root)
        self.items = asked_items(self.pipe, str(PROMPTS["held_out"]), num_samples, FIRST_ITEM)
        self.batches = [self.items[i : i + BATCH] for i in range(0, num_samples, BATCH)]
        self.full = self.drawn(FULL)

    def drawn(self, entry: Entry) -> Samples:
        """The videos of an entry, whole, from its file where it has run before."""
        path = self.root / "samples" / f"{entry.key(f'{HOST} {len(self.items)}')}.pt"
        if not path.exists():
            sigmas = [] if entry.kind == "full" else self.full.sigmas
            made = run_entry(self.pipe, entry, sigmas, self.batches, lambda done: None, **CALL)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(vars(made) | {"images": decoded(self.pipe, made.latents)}, path)
        return Samples(**torch.load(path))


class VideoJudge(Judge):
    """Rows with the errors of whole videos."""

    def errors(self, samples: Samples) -> dict[str, Float[Tensor, " B"]]:
        """PSNR and SSIM of every video, the mean over its frames, and the error of its latents.

        SSIM is of every fourth frame: it takes half a second a video.
        """
        some, wanted = (each.images[:, ::4].flatten(0, 1) for each in (samples, self.reference))
        return {
            "psnr_db": frame_psnr(samples.images, self.reference.images),
            "ssim": ssim(some, wanted).unflatten(0, (len(samples.images), -1)).mean(1),
            "latent_rel_l2": latent_rel_l2(samples.latents, self.reference.latents),
        }


@torch.no_grad()
def decoded(pipe: Any, latents: Float[Tensor, "B Z f h w"]) -> Float[Tensor, "B F C H W"]:
    """Videos in [0, 1] of final latents, as the pipeline decodes them."""
    config = pipe.vae.config
    mean, std = (
        torch.tensor(each)[:, None, None, None]
        for each in (config.latents_mean, config.latents_std)
    )
    videos = [pipe.vae.decode(part * std + mean).sample for part in latents.float().split(BATCH)]
    return (torch.cat(videos) / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def frame_psnr(
    videos: Float[Tensor, "B F C H W"], reference: Float[Tensor, "B F C H W"]
) -> Float[Tensor, " B"]:
    """PSNR of every video in dB, the mean over its frames."""
    each = psnr(videos.flatten(0, 1), reference.flatten(0, 1))
    return each.unflatten(0, (len(videos), -1)).mean(1)


def temporal_psnr(
    videos: Float[Tensor, "B F C H W"], reference: Float[Tensor, "B F C H W"]
) -> Float[Tensor, " B"]:
    """Temporal difference error: -10 log10 mean (dx - dx_ref)^2, where dx = x_{f+1} - x_f."""
    changes, wanted = (each.double().diff(dim=1) for each in (videos, reference))
    return -10 * (changes - wanted).square().flatten(1).mean(1).log10()


def publish(
    pipeline: str = PIPELINE,
    root: str = ROOT,
    budgets: Sequence[int] = BUDGETS,
    num_samples: int = 64,
    out: str = str(RESULT),
) -> None:
    """Write one row per method, on the list that suits it best, with its paired differences.

    Args:
        pipeline: the video host.
        root: folder of everything.
        budgets: network evaluations.
        num_samples: judged videos.
        out: JSON file of the rows.
    """
    judged = Judged(pipeline, root, num_samples)
    numbers = prompts_of(judged.items)
    judge = VideoJudge(judged.full, numbers, CALL["guidance_scale"], {})
    records = []
    for budget in budgets:
        nearest: dict[str, tuple[float, Entry]] = {}
        for entry in planned(root, budget):
            error = float(frame_psnr(judged.drawn(entry).images, judged.full.images).mean())
            if entry.method not in nearest or error > nearest[entry.method][0]:
                nearest[entry.method] = error, entry
        best: dict[str, tuple[BenchRow, Errors]] = {}
        temporal: dict[str, Float[Tensor, " B"]] = {}
        for method, (_, entry) in tqdm(nearest.items(), desc=f"{budget} evaluations", unit="row"):
            samples = judged.drawn(entry)
            best[method] = judge.row(begun_on(root, entry, budget), samples)
            temporal[method] = temporal_psnr(samples.images, judged.full.images)
        for row in compared(list(best.values()), numbers):
            records.append({"host": HOST} | to_record(row) | over_time(row, temporal, numbers))
    Path(out).write_text(json.dumps(records, indent=1) + "\n")
    print(f"wrote {out}: {len(records)} rows")


def over_time(
    row: BenchRow, temporal: dict[str, Float[Tensor, " B"]], numbers: Sequence[int]
) -> dict[str, float | None]:
    """What a row tells of the changes from frame to frame, against its rival of the PSNR."""
    found: dict[str, float | None] = {"temporal_db": float(temporal[row.method].mean())}
    names = ("temporal_paired_db", "temporal_paired_low_db", "temporal_paired_high_db")
    if row.rival is None:
        return found | dict.fromkeys(names)
    gap = paired(temporal[row.method], temporal[row.rival], numbers)
    return found | dict(zip(names, (gap.mean, gap.low, gap.high), strict=True))


if __name__ == "__main__":
    auto_cli([prompts, record, search, lists, fit, solvers, bench, publish])
