"""Learned solvers on both bundled models: fit through the sampler, judge beside the readout.

    python benchmarks/learned_solvers.py fit --hosts '[fashion_dit]' --budgets '[8]'
    python benchmarks/learned_solvers.py adam
    python benchmarks/learned_solvers.py bench
    python benchmarks/learned_solvers.py page

Every stage resumes. Fitted on pairs of the recording that `benchmarks/readout.py record` makes,
chosen on 16 others of them, judged on the samples of `benchmarks/readout.py bench`. The start is
the closed form that does best on calibration samples: of five solvers on the list searched for
each and the readout's, told the best of five times at step 0 where the family may; `anchors` keeps
the readout's times and frees the rest.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from readout import CALL, HOSTS, judged, lists, recording, run_kept
from readout_page import put
from torch import Tensor

from foreseer.checkpoints.format import load_predictor
from foreseer.evaluation.learned_solver import (
    FORMULAS,
    LIBRARY,
    LearnedSolver,
    LinearSolver,
    closed_form,
    linear_scheduler,
)
from foreseer.evaluation.measure import References
from foreseer.evaluation.metrics import paired, psnr, ssim, summarise
from foreseer.evaluation.plan import Entry
from foreseer.evaluation.published_solvers import NEURAL_SOLVER, neural_solver
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.training.solvers.families import FAMILIES, Parametrisation
from foreseer.training.solvers.solver_fit import (
    SolverFit,
    SolverRuns,
    fit_adam,
    fit_gauss_newton,
)
from foreseer.trajectories.recording import Recording

ROOT = Path("runs/learned_solvers")
RESULT = Path("benchmarks/results/learned_solvers.json")
SAMPLES = Path("benchmarks/results/learned_solvers_samples.json")  # PSNR of every judged sample
PAGE = Path("docs/learned_solvers.md")
FORMS = ("free times", "anchors")
NUM_PAIRS = 32
NUM_CHOSEN = 16
METHODS = tuple(FAMILIES)
NAMES = ("method", "num_anchors", "form", "optimiser", "seed", "num_pairs")  # what tells a row
FIRST_TIMES = (0.99, 0.98, 0.97, 0.96)


@dataclass(frozen=True)
class Place:
    """Where what a host's solvers are fitted on lies, and they.

    Args:
        host: name of the host.
        pipeline: name of its pipeline.
        recording: folder of its recording.
        lists: file of the searched lists, see `readout.lists`.
        root: folder of the fits.
    """

    host: str
    pipeline: str
    recording: str
    lists: Path
    root: Path


def bundled(host: str) -> Place:
    """The place of a bundled model."""
    return Place(host, f"zoo:{host}", recording(host), lists(host), ROOT / host)


class Calibration:
    """A host's recorded pairs, split by seed, and the runs on them.

    Args:
        place: of the host.
        seed: of the split.
        num_pairs: pairs to fit on.
    """

    def __init__(self, place: Place, seed: int, num_pairs: int) -> None:
        self.place, self.host, self.seed = place, place.host, seed
        self.pipe = load_pipeline(place.pipeline)
        self.pipe.set_progress_bar_config(disable=True)
        self.recording = Recording(place.recording)
        items = list(self.recording.items)
        generator = torch.Generator().manual_seed(seed)
        mixed = [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
        self.fitted = self._runs(mixed[:num_pairs], place.root / "linearised")
        self.chosen = self._runs(mixed[-NUM_CHOSEN:])

    def _runs(self, items: Sequence[int], folder: Path | None = None) -> SolverRuns:
        return SolverRuns(self.pipe, References(self.recording, sorted(items)), folder)

    def sigmas(self, anchors: Sequence[int]) -> Tensor:
        """Times of the recording's grid."""
        grid = torch.tensor(self.recording.header.sigmas, dtype=torch.float64)
        return grid[list(anchors)].clamp(max=1.0)

    def lists(self, budget: int, solver: str, form: str) -> dict[str, list[int]]:
        """Lists to begin on, by name."""
        found = json.loads(self.place.lists.read_text())
        own = {"readout's": found[f"readout|output|{budget}"]}
        if form == "anchors":
            return own
        searched = found[f"{solver.replace('3m', '2m')}|none|{budget}"]
        return {"searched": searched} | own

    def starts(self, budget: int, form: str) -> list[dict[str, Any]]:
        """Closed forms with their error on calibration samples, the best first, from a file."""
        path = self.place.root / f"starts_{budget}_{form.split()[0]}_{self.seed}.json"
        if not path.exists():
            found = []
            for name in (*FORMULAS, *LIBRARY):
                for label, anchors in self.lists(budget, name, form).items():
                    solver = closed_form(name, self.sigmas(anchors))
                    error = float(self.chosen.errors(solver).mean())
                    told = {"solver": name, "list": label, "anchors": anchors, "error_db": error}
                    found.append(told)
                    print(self.host, budget, told, flush=True)
            found.sort(key=lambda each: float(each["error_db"]))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))
        return json.loads(path.read_text())  # type: ignore[no-any-return]

    def start(self, method: str, budget: int, form: str) -> dict[str, Any]:
        """Where a family begins: GS at its theory, LD3 at a formula, others at the best."""
        usable = {"gs": ("dpmpp_3m",), "ld3": tuple(FORMULAS)}
        allowed = usable.get(method, (*FORMULAS, *LIBRARY))
        return next(each for each in self.starts(budget, form) if each["solver"] in allowed)

    def parametrisation(self, method: str, budget: int, form: str) -> Parametrisation:
        """The family at its start."""
        family, start = FAMILIES[method], self.start(method, budget, form)
        family = family if form == "free times" else family.without_times()
        sigmas, told = self.sigmas(start["anchors"]), None
        if "xi" in family.free:
            told = self.first_time(start, budget, form)
        return Parametrisation(family, start["solver"], sigmas, told)

    def first_time(self, start: dict[str, Any], budget: int, form: str) -> float | None:
        """What is best told to the network at step 0, where it may be told anything: a scan.

        Derivatives do not find it: an embedding of time wiggles.
        """
        path = self.place.root / f"told_{budget}_{form.split()[0]}_{self.seed}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        if start["solver"] not in found:
            errors: dict[float | None, float] = {None: start["error_db"]}
            sigmas = self.sigmas(start["anchors"])
            for time_told in FIRST_TIMES:
                made = Parametrisation(FAMILIES["ld3"], start["solver"], sigmas, time_told)
                errors[time_told] = float(self.chosen.errors(made.start).mean())
            print(self.host, budget, start["solver"], "told", errors, flush=True)
            found[start["solver"]] = min(errors, key=lambda each: errors[each])
            path.write_text(json.dumps(found))
        told: float | None = found[start["solver"]]
        return told


def path_of(
    root: Path, method: str, budget: int, form: str, optimiser: str, seed: int, num_pairs: int
) -> Path:
    """Where a fitted solver lies in the folder of a host's fits."""
    words = (method, budget, form.split()[0], optimiser, seed, num_pairs)
    return root / f"{'_'.join(map(str, words))}.json"


def fit(
    hosts: Sequence[str] = tuple(HOSTS),
    budgets: Sequence[int] = (8,),
    methods: Sequence[str] = METHODS,
    forms: Sequence[str] = FORMS,
    seeds: Sequence[int] = (0,),
    num_pairs: int = NUM_PAIRS,
    num_epochs: int = 3,
) -> None:
    """Fit by Gauss-Newton, and judge each as it is done.

    Args:
        hosts: bundled models.
        budgets: network evaluations.
        methods: families.
        forms: `free times`, `anchors`.
        seeds: of the split of pairs.
        num_pairs: pairs to fit on.
        num_epochs: Gauss-Newton epochs at most.
    """
    for host in hosts:
        for seed in seeds:
            data = Calibration(bundled(host), seed, num_pairs)
            for budget in budgets:
                for form in forms:
                    for method in methods:
                        if fit_cell(data, method, budget, form, num_pairs, num_epochs):
                            bench([host], [budget])


def fit_cell(
    data: Calibration, method: str, budget: int, form: str, num_pairs: int, num_epochs: int
) -> bool:
    """Fit one solver by Gauss-Newton unless it is there; whether it was not."""
    out = path_of(data.place.root, method, budget, form, "gn", data.seed, num_pairs)
    if out.exists():
        return False
    print(f"{out}:", flush=True)
    made = data.parametrisation(method, budget, form)
    before = evaluated(data)
    data.fitted.linearise(made.start, range(len(made.start.flat())))
    restored(data, before)
    found = fit_gauss_newton(made, data.fitted, data.chosen, num_epochs, told)
    keep(data, made, method, found, out)
    return True


def told(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


def evaluated(data: Calibration) -> tuple[int, int]:
    """Evaluations so far of both runs."""
    return data.fitted.evaluations, data.chosen.evaluations


def restored(data: Calibration, before: tuple[int, int]) -> None:
    """Forget what a linearisation for all families cost: each counts what it needs itself."""
    data.fitted.evaluations, data.chosen.evaluations = before


def keep(
    data: Calibration,
    made: Parametrisation,
    method: str,
    found: SolverFit,
    out: Path,
) -> None:
    """Write a fitted solver; a linearisation from a file counts as if it had been run again."""
    solver = made.solver(found.theta)
    metrics = {
        "fit_evaluations": float(found.curve[-1][0]),
        "fit_seconds": found.curve[-1][0] * rate(data, solver),
        "start_chosen_db": found.curve[0][1],
        "chosen_db": found.error_db,
    }
    host = host_fingerprint(data.pipe.transformer)
    LearnedSolver(solver, method, host, CALL["guidance_scale"], metrics).save(out)
    out.with_suffix(".curve").write_text(json.dumps(found.curve))


def rate(data: Calibration, solver: LinearSolver) -> float:
    """Processor seconds of a network evaluation, from one batch."""
    items = data.chosen.references.batches[0]
    started = time.process_time()
    data.chosen.run(linear_scheduler(solver), items)
    return (time.process_time() - started) / len(items) / len(solver)


def adam(
    host: str = "fashion_dit",
    budget: int = 8,
    method: str = "bns",
    form: str = "free times",
    seed: int = 0,
    learning_rate: float = 3e-3,
    num_iterations: int = 64,
    every: int = 8,
) -> None:
    """Fit one cell by Adam from the same start, on the same pairs.

    Args:
        host: bundled model.
        budget: network evaluations.
        method: family.
        form: `free times` or `anchors`.
        seed: of the split of pairs.
        learning_rate: of Adam.
        num_iterations: iterations of a batch of 16.
        every: iterations between two measurements.
    """
    out = path_of(ROOT / host, method, budget, form, "adam", seed, NUM_PAIRS)
    if not out.exists():
        data = Calibration(bundled(host), seed, NUM_PAIRS)
        made = data.parametrisation(method, budget, form)
        numbers = (learning_rate, num_iterations, every, seed)
        found = fit_adam(made, data.fitted, data.chosen, *numbers, told)
        keep(data, made, method, found, out)
    bench([host], [budget])


def bench(
    hosts: Sequence[str] = tuple(HOSTS),
    budgets: Sequence[int] = (11, 8, 6, 4),
    num_samples: int = 64,
) -> None:
    """Judge every fitted solver, its start, and published tables.

    Rows that are there stay, compared with the readout that is bundled now.

    Args:
        hosts: bundled models.
        budgets: network evaluations.
        num_samples: judged samples.
    """
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
    samples = json.loads(SAMPLES.read_text()) if SAMPLES.exists() else {}
    for host in hosts:
        pipe, batches, full = judged(host, num_samples)
        for budget in budgets:
            ours = readout_error(pipe, host, budget, batches, full)
            samples[f"{host}|readout|{budget}"] = rounded(ours)
            for row in rows:
                if (row["host"], row["num_anchors"]) == (host, budget):
                    named = (host, *(row[name] for name in NAMES))
                    row |= beside(torch.tensor(samples["|".join(map(str, named))]), ours)
            for entry, facts in planned(pipe, host, budget):
                name = "|".join(map(str, (host, *facts.values())))
                if name in samples:
                    continue
                made = run_kept(pipe, host, entry, batches, full["sigmas"])
                error = psnr(made["images"], full["images"])
                quality = summarise(error)
                row = {"host": host} | facts | entry.solver.metrics  # type: ignore[union-attr]
                row |= {"kind": entry.kind, "guidance_scale": CALL["guidance_scale"]}
                row |= {"psnr_db": quality.mean, "psnr_median": quality.median}
                row |= {"psnr_q10": quality.q10, "psnr_q90": quality.q90}
                row |= {"psnr_ci_low": quality.ci_low, "psnr_ci_high": quality.ci_high}
                row |= {"ssim": float(ssim(made["images"], full["images"]).mean())}
                row |= {"num_samples": len(error), "seconds_per_image": made["seconds"]}
                row |= beside(error, ours)
                rows.append(row)
                samples[name] = rounded(error)
                print(name, f"{quality.mean:.2f} dB, {row['paired_db']:+.2f} on the readout")
            RESULT.write_text(json.dumps(rows, indent=1) + "\n")
            SAMPLES.write_text(json.dumps(samples, indent=None) + "\n")


def beside(error: Tensor, ours: Tensor) -> dict[str, Any]:
    """What a row says of the readout: PSNR of the same samples, the first ones, minus its."""
    gap = paired(error, ours.to(error.dtype)[: len(error)])
    found = {"rival": "readout", "paired_db": gap.mean, "wins": gap.wins}
    return found | {"paired_low_db": gap.low, "paired_high_db": gap.high}


def rounded(error: Tensor) -> list[float]:
    """PSNR of every sample, for others to pair with."""
    return [round(value, 4) for value in error.tolist()]


def readout_error(
    pipe: Any, host: str, budget: int, batches: Sequence[Sequence[Any]], full: dict[str, Any]
) -> Tensor:
    """PSNR of every sample with the bundled readout."""
    predictor: Any = load_predictor(f"zoo:{host}_readout_{budget}")
    spec = predictor.spec
    entry = Entry("readout", "learned", spec.tap, "searched", spec.anchors, predictor)
    return psnr(run_kept(pipe, host, entry, batches, full["sigmas"])["images"], full["images"])


def planned(pipe: Any, host: str, budget: int) -> list[tuple[Entry, dict[str, Any]]]:
    """Every solver of a budget that there is, with what tells it from others."""
    found = []
    for path in sorted((ROOT / host).glob(f"*_{budget}_*_*_*_*.json")):
        method, _, form, optimiser, seed, num_pairs = path.stem.split("_")
        form = next(each for each in FORMS if each.startswith(form))
        told = (method, budget, form, optimiser, int(seed), int(num_pairs))
        found.append((LearnedSolver.load(path), told))
    fingerprint = host_fingerprint(pipe.transformer)
    grid = pipe.scheduler
    grid.set_timesteps(CALL["num_inference_steps"])
    for path in sorted((ROOT / host).glob(f"starts_{budget}_*_0.json")):
        start = json.loads(path.read_text())[0]
        sigmas = grid.sigmas[start["anchors"]].double().clamp(max=1.0)
        form = next(each for each in FORMS if each.startswith(path.stem.split("_")[2]))
        solver = closed_form(start["solver"], sigmas)
        name = f"start {start['solver']} {start['list']}"
        told = (name, budget, form, "none", 0, 0)
        found.append((LearnedSolver(solver, name, fingerprint, 3.0), told))
    if budget in NEURAL_SOLVER:
        solver = neural_solver(budget)
        told = ("neuralsolver published", budget, "published times", "none", 0, 0)
        found.append((LearnedSolver(solver, told[0], fingerprint, 3.0), told))
    return [
        (
            Entry(str(told[0]), "learned solver", "none", str(told[2]), (), solver=solver),
            dict(zip(NAMES, told, strict=True)),
        )
        for solver, told in found
    ]


def page() -> None:
    """Write the table of docs/learned_solvers.md."""
    rows = json.loads(RESULT.read_text())
    lines = [
        "PSNR in dB against the full 50-step run, mean / median / 10 % quantile, and minus the "
        "bundled [readout](readout.md) at the same number of evaluations on the same judged "
        "samples, with its 95 % interval and on how many the solver is ahead.",
        "",
        "| model | evaluations | solver | form | pairs | PSNR | minus the readout | fit: "
        "evaluations, processor seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in sorted(rows, key=lambda row: (row["host"], -row["num_anchors"], -row["psnr_db"])):
        told = f"{r['psnr_db']:.2f} / {r['psnr_median']:.2f} / {r['psnr_q10']:.2f}"
        gap = f"{r['paired_db']:+.2f} ({r['paired_low_db']:+.2f} to {r['paired_high_db']:+.2f}; "
        gap += f"{r['wins']} of {r['num_samples']})"
        form = r["form"] + (", Adam" if r["optimiser"] == "adam" else "")
        form += f", seed {r['seed']}" if r["seed"] else ""
        cost = f"{r['fit_evaluations']:.0f}" if r["num_pairs"] else ""
        cost += f", {r['fit_seconds']:.0f}" if r.get("fit_seconds") else ""
        lines.append(
            f"| {r['host']} | {r['num_anchors']} | {r['method']} | {form} | "
            f"{r['num_pairs'] or ''} | {told} | {gap} | {cost} |"
        )
    put(PAGE, "learned", "\n".join(lines))


if __name__ == "__main__":
    auto_cli([fit, adam, bench, page])
