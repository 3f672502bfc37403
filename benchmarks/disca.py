"""What a distilled student and DisCa on it are worth, in network evaluations, counted honestly.

    python benchmarks/disca.py record
    python benchmarks/disca.py fit
    python benchmarks/disca.py bench

A step with two guidance branches is two evaluations, one with an embedded scale is one. Everything
is compared with the guided teacher's 50 steps (100 evaluations) on the same held-out (label, seed)
pairs, and what forecasts on the student also with the student's own 20 steps. Every stage resumes.
Writes benchmarks/results/disca.json: rows of `foreseer bench` with `num_network_evaluations`,
`host`, `reference`, `class_accuracy` and `speedup_measured`; FLOPs are not counted here.
"""

import functools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from fashion_dit import HELD_OUT
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import ModelCheckpoint
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "bundled_models"))
from judge import load_classifier

from foreseer.checkpoints.format import load_predictor
from foreseer.evaluation.benchmark import FIRST_ITEM
from foreseer.evaluation.plan import Entry
from foreseer.evaluation.results import collect_meta, to_record
from foreseer.evaluation.runs import Judge, Samples, run_entry
from foreseer.evaluation.timing import first_call, step_flops
from foreseer.integration.host.hosts import transformer_of
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.training.closed_loop import L2PClosedLoop
from foreseer.training.disca.disca_fit import DiscaModule
from foreseer.training.export import export_predictor
from foreseer.training.l2p import L2PLeastSquares
from foreseer.training.lesa.lesa_fit import LesaModule
from foreseer.trajectories.datamodule import GramDataModule, RecordingDataModule
from foreseer.trajectories.prompts import Item, class_items, generate_batch
from foreseer.trajectories.recorder import record as record_trajectories

ROOT = Path("runs/disca")
RESULT = Path("benchmarks/results/disca.json")
TEACHER, STUDENT = "zoo:fashion_dit", "zoo:fashion_dit_student"
CONFIGS = Path("configs/fit")
GUIDANCE = 3.0
STEPS = (4, 5, 8, 10, 20)
STUDENT_STEPS = 20
LISTS = {
    8: (0, 1, 2, 5, 9, 13, 17, 19),  # released, "N=4"
    11: (0, 1, 2, 5, 8, 11, 14, 16, 17, 18, 19),  # "N=3", reconstructed
    13: (0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 17, 18, 19),  # "N=2", reconstructed
}
"""Anchors of 20 steps by number of evaluations (arXiv 2602.05449)."""
SHORT = {4: (0, 8, 20, 34), 5: (0, 6, 16, 27, 39)}
"""Anchors of 50 steps, picked by hand, at which L2P is fitted on the teacher."""
BUNDLED = (6, 8, 11)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "disca": ("disca", {}),
    "disca_published": ("disca_published", {}),
}
"""Config and changes by the method's name in the table."""


def record(num_trajectories: int = 192, num_threads: int = 1, out: str = str(ROOT)) -> None:
    """Record the student's 20 steps with features, and fewer runs of both for closed-loop L2P.

    Args:
        num_trajectories: trajectories of the student, validation included.
        num_threads: torch threads.
        out: folder of everything.
    """
    torch.set_num_threads(num_threads)
    options: dict[str, Any] = {"taps": ["output", "hidden"], "batch_size": 16}
    record_trajectories(
        silent(STUDENT),
        class_items(num_trajectories, 10),
        Path(out) / "student",
        features="full",
        guidance_scale=GUIDANCE,
        num_inference_steps=STUDENT_STEPS,
        **options,
    )
    record_trajectories(
        silent(STUDENT),
        class_items(80, 10),
        Path(out) / "student_states",
        guidance_scale=GUIDANCE,
        num_inference_steps=STUDENT_STEPS,
        **options,
    )
    record_trajectories(
        silent(TEACHER),
        class_items(96, 10),
        Path(out) / "teacher",
        guidance_scale=GUIDANCE,
        num_inference_steps=50,
        **options,
    )


def fit(
    methods: Sequence[str] = (*VARIANTS, "lesa", "l2p_lstsq", "l2p_closed_loop", "l2p_teacher"),
    num_threads: int = 1,
    out: str = str(ROOT),
) -> None:
    """Fit what is not there yet.

    Args:
        methods: what to fit.
        num_threads: torch threads.
        out: folder of everything.
    """
    torch.set_num_threads(num_threads)
    root = Path(out)
    for method in methods:
        if method in VARIANTS:
            fit_disca(method, root)
        elif method == "lesa":
            fit_lesa(root)
        elif method == "l2p_teacher":
            for budget, anchors in SHORT.items():
                fit_l2p("l2p_closed_loop", TEACHER, root / "teacher", anchors, root, str(budget))
        else:
            for budget, anchors in LISTS.items():
                name = f"student_{budget}"
                if method == "l2p_closed_loop" and budget != 8:
                    continue  # minutes each
                fit_l2p(method, STUDENT, root / "student_states", anchors, root, name)


def fit_disca(method: str, root: Path) -> None:
    """Train one variant and export its best epoch; goes on at its last epoch."""
    folder = root / "predictors" / method / "student_any"
    if (folder / "config.json").exists():
        return
    name, changes = VARIANTS[method]
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    told = config["model"]["init_args"] | {"recording": str(root / "student")} | changes
    lightning.seed_everything(config["seed_everything"], verbose=False)
    module = DiscaModule(**told)
    data = config["data"]["init_args"] | {"folder": str(root / "student")}
    work = root / "work" / method
    keep = [
        ModelCheckpoint(work, "best", "val/error_db", enable_version_counter=False),
        ModelCheckpoint(work, "last", enable_version_counter=False),
    ]
    trainer = quiet_trainer(sum(module.epochs.values()), keep)
    last = work / "last.ckpt"
    trainer.fit(
        module, datamodule=RecordingDataModule(**data), ckpt_path=last if last.exists() else None
    )
    seconds, monitors = float(module.fit_seconds), trainer.callback_metrics
    best = torch.load(work / "best.ckpt", weights_only=True)
    module.load_state_dict(best["state_dict"])
    metrics = {"fit_seconds": seconds, "val_error_db": float(module.val_error)}
    metrics |= {"val_error_db_start": float(module.start_error), "best_epoch": best["epoch"]}
    if module.adversary is not None:
        metrics["discriminator_accuracy"] = float(monitors["train/discriminator_accuracy"])
    export_predictor(module, folder, metrics)
    print(f"{folder}: {metrics}", flush=True)


def fit_lesa(root: Path) -> None:
    """Train LESA with our settings on the student's list of 8."""
    folder = root / "predictors" / "lesa" / "student_8"
    if (folder / "config.json").exists():
        return
    config = yaml.safe_load((CONFIGS / "lesa.yaml").read_text())
    told: dict[str, Any] = config["model"]["init_args"]
    arguments = told.pop("predictor")["init_args"]
    told |= {"recording": str(root / "student"), "pipeline": STUDENT, "anchors": list(LISTS[8])}
    told |= {"closed_loop_epochs": 3}
    lightning.seed_everything(config["seed_everything"], verbose=False)
    module = LesaModule(predictor=functools.partial(LesaPredictor, **arguments), **told)
    data = config["data"]["init_args"] | {"folder": str(root / "student")}
    best = ModelCheckpoint(
        root / "work" / "lesa", "best", "val/error_db", enable_version_counter=False
    )
    trainer = quiet_trainer(4, [best])
    trainer.fit(module, datamodule=RecordingDataModule(**data))
    seconds = float(module.fit_seconds)
    module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    export_predictor(module, folder, {"fit_seconds": seconds})
    print(f"{folder}: {seconds:.0f} s, {float(module.val_error):.2f} dB", flush=True)


def quiet_trainer(max_epochs: int, callbacks: Sequence[Any] = ()) -> lightning.Trainer:
    """A trainer that writes nothing but what its callbacks write."""
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        num_sanity_val_steps=0,
        limit_val_batches=None if callbacks else 0,
        logger=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def fit_l2p(
    method: str, pipeline: str, recording: Path, anchors: Sequence[int], root: Path, name: str
) -> None:
    """Fit L2P on the hidden tap for one list."""
    folder = root / "predictors" / method / name
    if (folder / "config.json").exists():
        return
    kind = method.removeprefix("l2p_")
    data: lightning.LightningDataModule
    if kind == "closed_loop":
        items = str(recording)
        module: Any = L2PClosedLoop(items, pipeline, anchors, "hidden")
        data = RecordingDataModule(items, ["final"], 16, HELD_OUT, 0)
    else:
        module = L2PLeastSquares(str(recording), anchors, "hidden")
        data = GramDataModule(str(recording), "hidden", HELD_OUT, 0)
    trainer = quiet_trainer(1)  # a second epoch of the closed loop found nothing before (LOG.md)
    started = time.perf_counter()
    trainer.fit(module, datamodule=data)
    metrics = {"fit_seconds": time.perf_counter() - started}
    export_predictor(module, folder, metrics)
    print(f"{folder}: {metrics}", flush=True)


def bench(
    num_samples: int = 64,
    judged: int = 64,
    classifier: str = "runs/teacher/judge/judge.ckpt",
    students: Sequence[str] = (f"student={STUDENT}",),
    parts: Sequence[str] = ("teacher", "students", "forecasts"),
    num_threads: int = 1,
    out: str = str(ROOT),
) -> None:
    """Generate the held-out samples with everything and write the table.

    Args:
        num_samples: held-out (label, seed) pairs behind PSNR.
        judged: images behind the class accuracy, the first of which are those samples.
        classifier: checkpoint of the classifier (examples/bundled_models/judge.yaml).
        students: students to compare at every number of steps, NAME=FOLDER; forecasts run on the
            bundled one.
        parts: what to run; all other rows come from earlier starts.
        num_threads: torch threads.
        out: folder of everything.
    """
    torch.set_num_threads(num_threads)
    table = Table(Path(out) / "rows.jsonl", num_samples, judged, load_classifier(classifier))
    teacher, student = silent(TEACHER), silent(STUDENT)
    table.full_run(teacher)
    if "teacher" in parts:
        table.teacher(teacher)
    for given in students if "students" in parts else ():
        name, _, folder = given.rpartition("=")
        table.student(name, student if folder == STUDENT else silent(folder))
    if "forecasts" in parts:
        table.forecasts(student, Path(out))
    table.write(RESULT)


class Table:
    """The rows, one line of a file each, so that an interrupted benchmark goes on.

    Args:
        path: the file.
        num_samples: pairs behind PSNR.
        judged: images behind the class accuracy.
        classifier: the judge.
    """

    def __init__(self, path: Path, num_samples: int, judged: int, classifier: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.classifier = path, classifier
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: dict[str, dict[str, Any]] = {}
        for line in lines:
            row = json.loads(line)
            self.rows[row.pop("key")] = row
        items = class_items(judged, 10, first_item=FIRST_ITEM)
        self.num_samples = num_samples
        self.batches = [items[i : i + 16] for i in range(0, judged, 16)]
        self.reference: dict[str, Samples] = {}
        self.flops: dict[str, Any] = {}

    def full_run(self, pipe: Any) -> None:
        """The 50 steps of the teacher."""
        full = Entry("full", "full", "none", "all", tuple(range(50)))
        self.reference["teacher_50"] = self._run(pipe, full, 50)
        self._add("teacher", full, self.reference["teacher_50"], 100)

    def teacher(self, pipe: Any) -> None:
        """Few-step solvers on the teacher, and closed-loop L2P."""
        self.flops["teacher"] = self._flops(pipe, 50)
        for steps in STEPS:
            sigmas = [1 - i / steps for i in range(steps)]
            for method in ("euler", "ab2", "dpmpp_2m"):
                entry = Entry(method, "solver", "none", "uniform", tuple(range(steps)))
                self._entry("teacher", pipe, entry, steps, 2 * steps, sigmas)
        for budget in (*SHORT, *BUNDLED):
            folder = f"zoo:fashion_dit_l2p_{budget}"
            if budget in SHORT:
                folder = str(self.path.parent / "predictors" / "l2p_closed_loop" / str(budget))
            predictor = load_predictor(folder)
            anchors = predictor.spec.anchors
            named = "given" if budget in SHORT else "searched"
            entry = Entry("l2p_closed_loop", "learned", "hidden", named, anchors, predictor)
            self._entry("teacher", pipe, entry, 50, 2 * len(anchors))

    def student(self, name: str, pipe: Any) -> None:
        """A student at every number of steps."""
        for steps in STEPS:
            entry = Entry(name, "full", "none", "all", tuple(range(steps)))
            self._entry("student", pipe, entry, steps, steps * branches(pipe))

    def forecasts(self, pipe: Any, root: Path) -> None:
        """Everything that forecasts on 20 steps of the student, on the same anchors."""
        self.flops["student"] = self._flops(pipe, STUDENT_STEPS)
        full = Entry("student_full", "full", "none", "all", tuple(range(STUDENT_STEPS)))
        self.reference["student_20"] = self._run(pipe, full, STUDENT_STEPS)
        for budget, anchors in LISTS.items():
            spent = budget * branches(pipe)
            entries = [
                Entry("reuse", "formula", "hidden", "published", anchors, Reuse()),
                Entry("taylor_1", "formula", "hidden", "published", anchors, Taylor(1)),
                Entry("taylor_2", "formula", "hidden", "published", anchors, Taylor(2)),
            ]
            for folder in sorted((root / "predictors").glob("*/student_*")):
                if folder.name in ("student_any", f"student_{budget}"):
                    predictor = load_predictor(folder)
                    method = folder.parent.name
                    entries.append(
                        Entry(method, "learned", "hidden", "published", anchors, predictor)
                    )
            for entry in entries:
                self._entry("student", pipe, entry, STUDENT_STEPS, spent, (), "student_20")
            plain = Entry("student", "full", "none", "all", tuple(range(budget)))
            self._entry("student", pipe, plain, budget, spent, (), "student_20")

    def _entry(
        self,
        host: str,
        pipe: Any,
        entry: Entry,
        steps: int,
        evaluations: int,
        sigmas: Sequence[float] = (),
        own: str | None = None,
    ) -> None:
        references = ["teacher_50", *([own] if own else [])]
        missing = [r for r in references if self._key(host, entry, steps, r) not in self.rows]
        if missing:
            samples = self._run(pipe, entry, steps, sigmas)
            for reference in missing:
                self._add(host, entry, samples, evaluations, reference)

    def _run(self, pipe: Any, entry: Entry, steps: int, sigmas: Sequence[float] = ()) -> Samples:
        with tqdm(total=len(self.batches), desc=f"{entry.method} {steps}", leave=False) as bar:
            return run_entry(
                pipe,
                entry,
                sigmas,
                self.batches,
                lambda evaluations: bar.update(1),
                guidance_scale=GUIDANCE,
                num_inference_steps=steps,
            )

    def _add(
        self,
        host: str,
        entry: Entry,
        samples: Samples,
        evaluations: int,
        reference: str = "teacher_50",
    ) -> None:
        key = self._key(host, entry, len(samples.sigmas), reference)
        if key in self.rows:
            return
        cost = self.flops.get(host, {})
        near = first(samples, self.num_samples)
        full = first(self.reference[reference], self.num_samples)
        row, _ = Judge(full, range(self.num_samples), GUIDANCE, cost).row(entry, near)
        per_image = self.reference["teacher_50"].seconds
        told = to_record(replace(row, flops_ratio=None)) | {
            "host": host,
            "reference": reference,
            "num_network_evaluations": evaluations,
            "class_accuracy": self._accuracy(samples),
            "num_judged": len(samples.images),
            "speedup_measured": per_image / samples.seconds,
        }
        self.rows[key] = told
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, **told}) + "\n")
        print(
            f"{host:8} {entry.method:20} {evaluations:4} evaluations, against {reference}: "
            f"{told['psnr_db']} dB, {told['class_accuracy']:.3f}, x {told['speedup_measured']:.2f}",
            flush=True,
        )

    @torch.no_grad()
    def _accuracy(self, samples: Samples) -> float:
        labels = [item.inputs["class_labels"] for batch in self.batches for item in batch]
        answers = self.classifier(2 * samples.images - 1).argmax(1)
        return float((answers == torch.tensor(labels)).double().mean())

    def _key(self, host: str, entry: Entry, steps: int, reference: str) -> str:
        anchors = " ".join(map(str, entry.anchors))
        return f"{host}|{entry.method}|{entry.tap}|{anchors}|{steps}|{reference}"

    def _flops(self, pipe: Any, steps: int) -> dict[str, Any]:
        transformer = transformer_of(pipe)
        settings = {"guidance_scale": GUIDANCE, "num_inference_steps": steps}
        items: list[Item] = self.batches[0][:1]
        call = first_call(transformer, lambda: generate_batch(pipe, items, **settings))
        return {"hidden": step_flops(transformer, call, "hidden")}

    def write(self, path: Path) -> None:
        """Write all rows and what is needed to repeat them."""
        path.write_text(json.dumps(list(self.rows.values()), indent=1) + "\n")
        seeds = [item.seed for batch in self.batches for item in batch]
        meta = asdict(collect_meta("python benchmarks/disca.py bench", seeds))
        path.with_suffix(".meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        print(f"wrote {path}")


def branches(pipe: Any) -> int:
    """Evaluations of a student's step."""
    return 1 if pipe.conditioner.takes_guidance else 2


def first(samples: Samples, count: int) -> Samples:
    """The first samples of many."""
    return replace(samples, images=samples.images[:count], latents=samples.latents[:count])


def silent(name: str) -> Any:
    """A pipeline without its progress bar."""
    pipe = load_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    auto_cli([record, fit, bench])
