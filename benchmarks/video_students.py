r"""DisCa's headline on a video host: its distilled student, and what forecasts on it, end to end.

    python benchmarks/video_students.py conditions
    foreseer distill --config configs/distill/emoji_wan.yaml
    python -m foreseer.distill.student_export --checkpoint runs/distill/emoji_wan/last.ckpt \
        --out runs/video/student
    python benchmarks/video_students.py record
    python benchmarks/video_students.py fit
    python benchmarks/video_students.py bench
    python benchmarks/video_students.py seconds

Everything is compared with the guided teacher's 50 steps, 100 network evaluations, on the captions
kept from training: times faster as measured in one run, the share of videos whose nearest real clip
shares a word of the caption, motion, and PSNR. A step of two guidance branches is two evaluations.
The first parts of benchmarks/video.py (`record` to `solvers`) come before this.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import video
from jaxtyping import Float
from jsonargparse import auto_cli
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from video import PIPELINE, PROMPTS, ROOT, Judged, decoded, fitted_at, frame_psnr

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "bundled_models"))
from clips import pixels, read_clips
from text_judge import load_features, sharing
from video_judge import looks, motion, through

import foreseer
from foreseer.checkpoints.format import load_predictor
from foreseer.cli import main
from foreseer.evaluation.metrics import paired, summarise
from foreseer.evaluation.pairing import prompts_of
from foreseer.evaluation.plan import Entry
from foreseer.evaluation.runs import Samples, run_entry
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.predictors.rules import Reuse, Taylor

STUDENT = f"{ROOT}/student"
RESULT = Path("benchmarks/results/video_students.json")
STEPS = 20
LISTS = {
    6: (0, 2, 6, 11, 15, 18),  # ours
    8: (0, 1, 2, 5, 9, 13, 17, 19),  # released, "N=4"
    11: (0, 1, 2, 5, 8, 11, 14, 16, 17, 18, 19),  # "N=3", reconstructed
}
"""Anchors of a student's 20 steps by number (arXiv 2602.05449)."""
SOLVED = (4, 6, 8, 11)
"""Steps of the teacher with a solver, on the list searched for it."""
FEWER = (STEPS, 11, 9)
"""Steps of the student alone, as far as its R allows."""
FITS = ("lstsq", "readout", "disca")
"""What is fitted on the student."""


def conditions(pipeline: str = PIPELINE, root: str = ROOT) -> None:
    """Write the captions trained on as the transformer takes them, for the teacher's runs.

    Args:
        pipeline: the video host.
        root: folder of everything.
    """
    encoder = load_pipeline(pipeline).text_encoder
    captions = PROMPTS["trained"].read_text().splitlines()
    asked = {"own": captions, "null": [""]}
    given = {
        f"{kind}.encoder_hidden_states": encoder(texts)[0].contiguous()
        for kind, texts in asked.items()
    }
    path = Path(root) / "conditions.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(given, path)
    print(f"wrote {path}: {len(captions)} captions")


def record(student: str = STUDENT, root: str = ROOT, num_trajectories: int = 128) -> None:
    """Record the student's steps, with features.

    Args:
        student: its pipeline.
        root: folder of everything.
        num_trajectories: trajectories, validation included.
    """
    given = {
        "pipeline": student,
        "prompts": PROMPTS["trained"],
        "guidance_scale": video.CALL["guidance_scale"],
        "num_inference_steps": STEPS,
        "batch_size": video.BATCH,
        "num_trajectories": num_trajectories,
        "features": "full",
        "out": f"{root}/student_features",
    }
    main(["record", *(str(word) for name, value in given.items() for word in (f"--{name}", value))])


def fit(student: str = STUDENT, root: str = ROOT, budgets: Sequence[int] = tuple(LISTS)) -> None:
    """Fit DisCa, least-squares rows and readouts on the student.

    Args:
        student: its pipeline.
        root: folder of everything.
        budgets: anchors.
    """
    for budget in budgets:
        for method in FITS:
            out = fitted_at(root, f"student_{method}", budget)
            if (out / "config.json").exists():
                continue
            given: dict[str, Any] = {"anchors": list(LISTS[budget])}
            given |= {"tap": "hidden"} if method == "lstsq" else {}
            given |= {} if method == "disca" else {"validation_fraction": 0.5}
            given |= video.OPTIONS.get(method, {})
            recording = f"{root}/student_features"
            foreseer.fit(recording, method=method, pipeline=student, out=str(out), **given)


@dataclass(frozen=True)
class Scores:
    """What the judge says of videos.

    Args:
        hits: 1 where the nearest real clip shares a word of the caption, else 0.
        moved: mean absolute difference of neighbouring frames, in [0, 255].
    """

    hits: Float[Tensor, " B"]
    moved: float


class Retrieval:
    """Looks up the real clip that is nearest to a drawn one.

    Args:
        vae: the host's autoencoder, through which real clips go too.
        captions: of the drawn videos.
        clips: file of `examples/bundled_models/clips.py`.
    """

    def __init__(self, vae: Any, captions: Sequence[str], clips: str) -> None:
        everything = read_clips(clips)
        places = {clip.captions[0]: place for place, clip in reversed([*enumerate(everything)])}
        self.places = [places[caption] for caption in captions]
        self.network = load_features()
        self.known = looks(self.network, through(vae, [pixels(each.frames) for each in everything]))
        self.shared = sharing(self.places, everything)

    def __call__(self, videos: Float[Tensor, "B F 3 H W"]) -> Scores:
        """The judge's word on videos in [0, 1], one per caption."""
        nearest = (looks(self.network, videos) @ self.known.T).argmax(1)
        hits = self.shared[torch.arange(len(videos)), nearest].double()
        return Scores(hits, motion(videos))

    @property
    def chance(self) -> float:
        """Share of all clips that share a word of a caption."""
        return float(self.shared.float().mean())

    @property
    def ceiling(self) -> float:
        """What the real clips of the captions reach, each without itself."""
        others = self.known[self.places] @ self.known.T
        rows = torch.arange(len(self.places))
        others[rows, self.places] = -1.0
        return float(self.shared[rows, others.argmax(1)].float().mean())


def planned(root: str, fewer: Sequence[int]) -> Iterator[tuple[str, Entry, int]]:
    """What to run: host, method, and how many steps of a video are computed.

    Args:
        root: folder of everything.
        fewer: numbers of steps that the student can be run in, see `allowed`.
    """
    searched = json.loads((Path(root) / "lists.json").read_text())
    for steps in SOLVED:
        anchors = tuple(searched[f"ab2|none|{steps}"])
        yield "teacher", Entry("ab2", "solver", "none", "searched", anchors), steps
    for budget in video.BUDGETS:
        if not (fitted_at(root, "readout", budget) / "config.json").exists():
            continue
        for entry in video.planned(root, budget):
            if entry.method in ("readout", "disca") or entry.kind == "learned solver":
                yield "teacher", entry, budget
    for steps in fewer:
        yield "student", Entry("full", "full", "none", "all", tuple(range(steps))), steps
    for budget, anchors in LISTS.items():
        for method, rule in (("reuse", Reuse()), ("taylor_1", Taylor(1))):
            yield "student", Entry(method, "formula", "hidden", "given", anchors, rule), budget
        for method in FITS:
            folder = fitted_at(root, f"student_{method}", budget)
            if (folder / "config.json").exists():
                predictor: Any = load_predictor(folder)
                tap = predictor.spec.tap
                yield "student", Entry(method, "learned", tap, "given", anchors, predictor), budget


def allowed(student: Any) -> list[int]:
    """Numbers of steps none of which is longer than a student's R."""

    def longest(steps: int) -> float:
        student.scheduler.set_timesteps(steps)
        return float(-student.scheduler.sigmas.diff().min())

    farthest = student.conditioner.config.max_interval + 1e-4  # float32 grids round
    return [n for n in FEWER if longest(n) <= farthest]


def bench(
    pipeline: str = PIPELINE,
    student: str = STUDENT,
    root: str = ROOT,
    clips: str = "clips.npz",
    num_samples: int = 156,
    out: str = str(RESULT),
) -> None:
    """Draw the captions kept from training by every method, one after the other, and judge them.

    Args:
        pipeline: the guided teacher.
        student: its student; rows of it are left out where there is none.
        root: folder of everything.
        clips: file of `examples/bundled_models/clips.py`.
        num_samples: judged videos, which go round the captions.
        out: JSON file of the rows.
    """
    judged = Judged(pipeline, root, num_samples)
    prompts = prompts_of(judged.items)
    hosts, fewer = _hosts(judged, student)
    branches = {"teacher": 2}
    if "student" in hosts:
        branches["student"] = 1 if hosts["student"].conditioner.takes_guidance else 2
    captions = [item.inputs["prompt"] for item in judged.items]
    judge = Retrieval(judged.pipe.vae, captions, clips)
    full = Entry("full", "full", "none", "all", tuple(range(len(judged.full.sigmas))))
    plan = [("teacher", full, len(full.anchors)), *planned(root, fewer)]
    rows: list[dict[str, Any]] = []
    reference: tuple[Samples, Scores] | None = None
    for host, entry, computed in tqdm([each for each in plan if each[0] in hosts], unit="row"):
        made = _run(hosts[host], host, entry, judged)
        scores = judge(made.images)
        reference = reference or (made, scores)
        place = {"host": host, "method": entry.method, "num_anchors": computed}
        spent = {"num_network_evaluations": branches[host] * computed}
        rows.append(place | spent | _row((made, scores), reference, prompts))
        print(rows[-1], flush=True)
    facts = {"chance": judge.chance, "real": judge.ceiling, "num_samples": num_samples}
    Path(out).write_text(json.dumps({"judge": facts, "rows": rows}, indent=1) + "\n")
    print(f"wrote {out}: {len(rows)} rows")


def seconds(
    pipeline: str = PIPELINE,
    student: str = STUDENT,
    root: str = ROOT,
    repeats: int = 2,
    out: str = str(RESULT),
) -> None:
    """Time every row again on one batch, one after the other on a machine left alone.

    Also what share of a full run encodes words and decodes latents, which no method shortens.

    Args:
        pipeline: the guided teacher.
        student: its student.
        root: folder of everything.
        repeats: times that each is run, of which the shortest counts.
        out: JSON file of the rows.
    """
    judged = Judged(pipeline, root, video.BATCH)
    hosts, fewer = _hosts(judged, student)
    (batch,) = judged.batches
    full = Entry("full", "full", "none", "all", tuple(range(len(judged.full.sigmas))))
    found = json.loads(Path(out).read_text())
    plan = [("teacher", full, len(full.anchors)), *planned(root, fewer)]
    whole = 0.0
    for host, entry, computed in tqdm([each for each in plan if each[0] in hosts], unit="row"):
        once = 1 if entry is full else repeats
        took = min(_run(hosts[host], host, entry, judged).seconds for _ in range(once))
        whole = whole or took
        for row in found["rows"]:
            if (row["host"], row["method"], row["num_anchors"]) == (host, entry.method, computed):
                row["speedup_measured"] = whole / took
    spent = []
    for _ in range(repeats):
        started = time.perf_counter()
        judged.pipe.text_encoder([*(item.inputs["prompt"] for item in batch), ""])
        decoded(judged.pipe, judged.full.latents)
        spent.append(time.perf_counter() - started)
    found["share_aside"] = min(spent) / (whole * len(batch))
    Path(out).write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {out}: {100 * found['share_aside']:.1f} % of a full run is words and decoding")


def _hosts(judged: Judged, student: str) -> tuple[dict[str, Any], list[int]]:
    """The teacher, the student where there is one, and the numbers of steps it can be run in."""
    hosts = {"teacher": judged.pipe}
    if not Path(student).exists() and not student.startswith("zoo:"):
        return hosts, []
    pipe = load_pipeline(student)
    pipe.set_progress_bar_config(disable=True)
    return hosts | {"student": pipe}, allowed(pipe)


def _run(pipe: Any, host: str, entry: Entry, judged: Judged) -> Samples:
    steps = int(video.CALL["num_inference_steps"])
    if host == "student":
        steps = len(entry.anchors) if entry.kind == "full" else STEPS
    settings = video.CALL | {"num_inference_steps": steps}
    made = run_entry(
        pipe, entry, judged.full.sigmas, judged.batches, lambda evaluations: None, **settings
    )
    return Samples(**(vars(made) | {"images": decoded(judged.pipe, made.latents)}))


def _row(
    found: tuple[Samples, Scores], reference: tuple[Samples, Scores], prompts: Sequence[int]
) -> dict[str, Any]:
    """What was measured: hits and PSNR with 95 % intervals, hits also minus the teacher's."""
    (made, scores), (full, wanted) = found, reference
    share, gap = summarise(scores.hits, prompts), paired(scores.hits, wanted.hits, prompts)
    row = {
        "speedup_measured": full.seconds / made.seconds,
        "shares_a_word": [share.mean, share.ci_low, share.ci_high],
        "minus_teacher": [gap.mean, gap.low, gap.high],
        "motion": scores.moved,
    }
    if made is full:
        return row | {"psnr_db": None}
    error = summarise(frame_psnr(made.images, full.images), prompts)
    return row | {"psnr_db": [error.mean, error.ci_low, error.ci_high]}


if __name__ == "__main__":
    auto_cli([conditions, record, fit, bench, seconds])
