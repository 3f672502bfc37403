"""Readouts on both bundled models: record, search their lists, fit, bench against everything else.

    python benchmarks/readout.py record
    python benchmarks/readout.py search
    python benchmarks/readout_lists.py
    python benchmarks/readout.py fit
    python benchmarks/readout.py bench
    python benchmarks/readout.py curve
    python benchmarks/readout.py publish
    python benchmarks/readout.py ship
    python benchmarks/readout.py cost
    python benchmarks/readout_page.py

Every stage takes `--hosts '[fashion_dit]'` and `--budgets '[8]'`, and resumes. Fitted on: the first
trajectories of the recording. Chosen on (lists): others of them. Judged on: (label, seed) pairs
that were never recorded, and captions kept from the model's training and from every fit. Every
rival runs on the anchors searched for it (benchmarks/results/*_searched.json) and on those of the
readout, and stands in the table with the list and tap that did better on the judged samples; one
that already stands there runs on those alone. Learned solvers are those that
benchmarks/learned_solvers.py has fitted.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from foreseer.checkpoints.card import PAIRED
from foreseer.checkpoints.format import load_predictor, save_predictor
from foreseer.cli import main
from foreseer.evaluation.advice import advice
from foreseer.evaluation.benchmark import FIRST_ITEM
from foreseer.evaluation.learned_solver import FORMULAS as CLOSED_FORMS
from foreseer.evaluation.learned_solver import LearnedSolver
from foreseer.evaluation.metrics import paired, psnr, summarise
from foreseer.evaluation.pairing import prompts_of, with_rivals
from foreseer.evaluation.plan import Entry
from foreseer.evaluation.results import BenchRow, Errors, to_record
from foreseer.evaluation.runs import Judge, Samples, run_entry
from foreseer.evaluation.timing import attach_overhead, forecast_step_ratio
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.session import Session
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import RULES
from foreseer.training.export import export_predictor
from foreseer.training.fits import Recipe, chosen
from foreseer.training.gauss_newton import RIDGES
from foreseer.training.readout import segment as readout_sums
from foreseer.training.readout.readout_fit import ReadoutFit
from foreseer.training.readout.readout_runs import run_fit
from foreseer.trajectories.datamodule import ItemsDataModule
from foreseer.trajectories.prompts import Item, asked_items, generate_batch
from foreseer.trajectories.recording import Recording

ROOT = Path("runs/readout")
RESULT = Path("benchmarks/results/readout.json")
LEARNED = Path("runs/learned_solvers")
CURVE = Path("benchmarks/results/readout_curve.json")
COST = Path("benchmarks/results/readout_cost.json")
BUDGETS = (11, 8, 6, 4)
FITTED_ON = 512  # trajectories, a twentieth of which is only measured
SIZES = (32, 64, 128, 256, 512, 1000)  # calibration trajectories of the curve
ROWS_FITTED_ON = 64  # more gain nothing (benchmarks/results/readout_curve.json)
COMPARED = ("rival", *PAIRED, "wins")
OTHERS = ("walk", "rows", "rows_refined", "l2p_closed_loop", "l2p_lstsq")  # ours too
FORMULAS = dict.fromkeys(
    ("taylor_1", "taylor_2", "hicache_2", "adams_moulton"), ("output", "hidden")
)
FORMULAS |= {"spectrum": ("hidden",), "meancache_3": ("output",)}
SOLVER_NAMES = dict.fromkeys(("euler", "ab2", "dpmpp_2m", "unipc"), ("none",))
SEARCHED = SOLVER_NAMES | {name: ("output", "hidden") for name in ("reuse", *tuple(FORMULAS)[:4])}
STARTS = {"gs": ("dpmpp_3m",), "ld3": tuple(CLOSED_FORMS)}  # of learned solvers that not all suit
FULL = Entry("full", "full", "none", "all", tuple(range(50)))
CALL = {"guidance_scale": 3.0, "num_inference_steps": 50}


@dataclass(frozen=True)
class Host:
    """A bundled model.

    Args:
        calibration: file of the prompts to record; None goes round the classes.
        judged: file of the held-out prompts.
        shipped: name of the closed-loop rows of 0.2, with the budget left out.
    """

    calibration: str | None
    judged: str | None
    shipped: str


HOSTS = {
    "fashion_dit": Host(None, None, "zoo:fashion_dit_l2p_{}"),
    "emoji_flux": Host(
        "benchmarks/emoji_calibration.txt",
        "benchmarks/emoji_held_out.txt",
        "zoo:emoji_flux_l2p_{}",
    ),
    "emoji_flux_2": Host(
        "benchmarks/emoji_calibration.txt",
        "benchmarks/emoji_held_out.txt",
        "zoo:emoji_flux_2_l2p_{}",
    ),
}


def recording(host: str) -> str:
    """Folder of a host's recording."""
    return str(ROOT / host / "recording")


def lists(host: str) -> Path:
    """The searched lists of a host, `method|tap|evaluations` to anchors."""
    return Path(f"benchmarks/results/{host}_searched.json")


def record(hosts: Sequence[str] = tuple(HOSTS), num_trajectories: int = 1024) -> None:
    """Record Grams and states.

    Args:
        hosts: bundled models.
        num_trajectories: trajectories of each.
    """
    for host in hosts:
        words = ["--config", "configs/record/fashion_dit.yaml", "--pipeline", f"zoo:{host}"]
        words += ["--out", recording(host), "--num_trajectories", str(num_trajectories)]
        prompts = HOSTS[host].calibration
        main(["record", *words, *(["--prompts", prompts] if prompts else [])])


def search(
    hosts: Sequence[str] = tuple(HOSTS),
    budgets: Sequence[int] = BUDGETS,
    num_samples: int = 8,
    num_moves: int = 4,
) -> None:
    """Search the lists of every rival, and begin the readout's; a list that is known stays.

    Args:
        hosts: bundled models.
        budgets: network evaluations.
        num_samples: recorded trajectories that lists are compared on.
        num_moves: lists tried by moving single anchors of the best one.
    """
    named = [f"{method}|{tap}" for method, taps in SEARCHED.items() for tap in taps]
    for host in hosts:
        words = ["--recording", recording(host), "--pipeline", f"zoo:{host}"]
        words += ["--out", str(lists(host)), "--methods", json.dumps(named)]
        words += ["--num_anchors", json.dumps(list(budgets))]
        effort = ["--num_samples", str(num_samples), "--num_moves", str(num_moves)]
        main(["search", *words, *effort])
        found = json.loads(lists(host).read_text())
        source = Recording(recording(host))
        for budget in budgets:
            begun = chosen(Recipe("readout", {}), source, budget, None, None, source.items)
            found.setdefault(f"readout|output|{budget}", list(begun.anchors))
        lists(host).write_text(json.dumps(found, indent=1))


def fit(
    hosts: Sequence[str] = tuple(HOSTS),
    budgets: Sequence[int] = BUDGETS,
    num_trajectories: int = FITTED_ON,
) -> None:
    """Fit the readout, and rows alone by the same walk.

    Args:
        hosts: bundled models.
        budgets: network evaluations.
        num_trajectories: from the recording's first on; a twentieth is only measured.
    """
    for host in hosts:
        found = json.loads(lists(host).read_text())
        for budget in budgets:
            anchors = found[f"readout|output|{budget}"]
            fit_one(host, "readout", anchors, num_trajectories)
            fit_one(host, "rows", anchors, ROWS_FITTED_ON)


def fitted_at(host: str, kind: str, anchors: Sequence[int], num_trajectories: int) -> Path:
    """Where a fit lies."""
    return ROOT / host / f"{kind}_{'_'.join(map(str, anchors))}_of_{num_trajectories}"


def fit_one(host: str, kind: str, anchors: Sequence[int], num_trajectories: int) -> Path:
    """Fit one predictor of a bundled model unless it is there."""
    out = fitted_at(host, kind, anchors, num_trajectories)
    data = ItemsDataModule(recording(host), 0.05, num_trajectories=num_trajectories)
    return fit_walk(kind, f"zoo:{host}", data, anchors, out)


def fit_walk(
    kind: str,
    pipeline: str,
    data: ItemsDataModule,
    anchors: Sequence[int],
    out: Path,
    refine: int = 0,
) -> Path:
    """Fit a readout, or rows alone by the same walk, which read nothing and keep step 0's own time.

    Args:
        kind: `rows`, or a readout by any name.
        pipeline: name or folder of the host.
        data: trajectories of a recording with states.
        anchors: steps at which the network runs.
        out: folder of the predictor; where there is one already nothing is done.
        refine: epochs of refinement.
    """
    if (out / "config.json").exists():
        return out
    before = readout_sums.STRENGTHS
    readout_sums.STRENGTHS = () if kind == "rows" else before  # no strength: nothing is read
    tried = {"first_times": 0} if kind == "rows" else {}
    module = TimedFit(str(data.folder), "", list(anchors), refine=refine, **tried)
    started = time.perf_counter()
    try:
        run_fit(module, load_pipeline(pipeline), data)
    finally:
        readout_sums.STRENGTHS = before
    evaluations = module.evaluations / int(module.num_trajectories)
    times = {"fit_seconds": time.perf_counter() - started, "solve_seconds": module.solve_seconds}
    export_predictor(module, out, module.metrics() | times | {"fit_evaluations": evaluations})
    print(f"{out}: {times} {module.metrics()}", flush=True)
    return out


class TimedFit(ReadoutFit):
    """A fit that tells seconds of solving from those of running the network, and counts runs."""

    solve_seconds = 0.0
    evaluations = 0  # of the network, times trajectories

    def _fit_segment(self, number: int) -> None:
        """The segment, less its visits."""
        self.visit_seconds = 0.0
        started = time.perf_counter()
        super()._fit_segment(number)
        self.solve_seconds += time.perf_counter() - started - self.visit_seconds

    def _visit(self, anchor: int, label: str) -> None:
        started = time.perf_counter()
        super()._visit(anchor, label)
        self.visit_seconds += time.perf_counter() - started
        self.evaluations += sum(len(items) for items, _ in self.batches)

    def _refine(self) -> None:
        """One run of every trajectory, what a move changes of it, and a run for every ridge."""
        moves, count = self._moves(), len(self.anchors)
        after = sum(count - 1 - move.segment for move in moves)
        self.evaluations += len(self.refined.items) * (count + after)
        self.evaluations += (1 + len(RIDGES)) * count * len(self.choosing.items)
        super()._refine()


def ours(host: str, budget: int, num_trajectories: int) -> list[Entry]:
    """The readout, its rows alone and the rows of 0.2, as far as they were fitted."""
    own = tuple(json.loads(lists(host).read_text())[f"readout|output|{budget}"])
    made = []
    for kind, count in (("readout", num_trajectories), ("rows", ROWS_FITTED_ON)):
        folder = fitted_at(host, kind, own, count)
        if (folder / "config.json").exists():
            made.append(Entry(kind, "learned", "output", "searched", own, load_predictor(folder)))
    try:
        shipped: Any = load_predictor(HOSTS[host].shipped.format(budget))
    except ValueError:  # 0.2 has none at this budget
        return made
    spec = shipped.spec
    made.append(Entry("l2p_closed_loop", "learned", spec.tap, "given", spec.anchors, shipped))
    return made


def rivals(host: str, budget: int) -> list[Entry]:
    """Formulas and few-step solvers, the best of the published table first."""
    found = json.loads(lists(host).read_text())
    own = found[f"readout|output|{budget}"]
    told = json.loads(RESULT.read_text()) if RESULT.exists() else []
    told = [row for row in told if (row["host"], row["num_anchors"]) == (host, budget)]
    made = [
        (row["method"], row["tap"], row["anchors_name"], tuple(map(int, row["anchors"].split())))
        for row in sorted(told, key=lambda row: -row["psnr_db"])
        if row["kind"] in ("formula", "solver")
    ]
    known = {method for method, *_ in made}
    for method, taps in (FORMULAS | SOLVER_NAMES).items():
        for tap in taps if method not in known else ():
            named = {"given": own, "searched": found.get(f"{method}|{tap}|{budget}")}
            named["searched"] = named["searched"] or found.get(f"taylor_1|{tap}|{budget}")
            made += [(method, tap, name, tuple(each)) for name, each in named.items() if each]
    return [
        Entry(method, "solver" if tap == "none" else "formula", tap, *of, RULES.get(method))
        for method, tap, *of in made
    ]


def learned_solvers(host: str, budget: int) -> list[tuple[Entry, Entry]]:
    """Learned solvers as they were run, and as a row has them: with the list they began on."""
    made = []
    for path in sorted((LEARNED / host).glob(f"*_{budget}_*_*_*_*.json")):
        method, _, form, optimiser, *_ = path.stem.split("_")
        form = {"free": "free times"}.get(form, form)
        solver = LearnedSolver.load(path)
        starts = json.loads(
            (LEARNED / host / f"starts_{budget}_{form.split()[0]}_0.json").read_text()
        )
        usable = STARTS.get(method, [each["solver"] for each in starts])
        began = next(tuple(each["anchors"]) for each in starts if each["solver"] in usable)
        entry = Entry(method, "learned solver", "none", form, (), solver=solver)
        made.append((entry, replace(entry, anchors_name="given", anchors=began)))
    return made


def bench(
    hosts: Sequence[str] = tuple(HOSTS),
    budgets: Sequence[int] = BUDGETS,
    num_samples: int = 64,
    num_trajectories: int = FITTED_ON,
) -> None:
    """Generate the judged samples with every method and keep them.

    Args:
        hosts: bundled models.
        budgets: network evaluations.
        num_samples: judged samples.
        num_trajectories: that the readout was fitted on.
    """
    for host in hosts:
        pipe, batches, full = judged(host, num_samples)
        for budget in budgets:
            planned = ours(host, budget, num_trajectories) + rivals(host, budget)
            for entry in planned + [entry for entry, _ in learned_solvers(host, budget)]:
                made = run_kept(pipe, host, entry, batches, full["sigmas"])
                error = psnr(made["images"], full["images"])
                print(f"{host} {budget} {entry}: {summarise(error).mean:.2f} dB", flush=True)


def judged(host: str, num_samples: int) -> tuple[Any, list[list[Item]], dict[str, Any]]:
    """A host, the samples it is judged on in batches, and its full runs of them."""
    pipe = load_pipeline(f"zoo:{host}")
    items = asked_items(pipe, HOSTS[host].judged, num_samples, FIRST_ITEM)
    batches = [items[i : i + 16] for i in range(0, num_samples, 16)]
    return pipe, batches, run_kept(pipe, host, FULL, batches)


def run_kept(
    pipe: Any,
    host: str,
    entry: Entry,
    batches: Sequence[Sequence[Item]],
    sigmas: Sequence[float] = (),
) -> dict[str, Any]:
    """The samples of an entry, from its file where it has run before."""
    path = kept(host, entry, sum(map(len, batches)))
    if not path.exists():
        made = run_entry(pipe, entry, sigmas, batches, lambda done: None, **CALL)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(asdict(made), path)
    return torch.load(path)


def curve(
    hosts: Sequence[str] = tuple(HOSTS),
    budgets: Sequence[int] = (8,),
    sizes: Sequence[int] = SIZES,
    num_samples: int = 64,
) -> None:
    """Judge readouts and rows fitted on more and more trajectories.

    Args:
        hosts: bundled models.
        budgets: network evaluations.
        sizes: calibration trajectories.
        num_samples: judged samples.
    """
    rows = json.loads(CURVE.read_text()) if CURVE.exists() else []
    known = {(row["host"], row["num_anchors"], row["trajectories"]) for row in rows}
    for host in hosts:
        pipe, batches, full = judged(host, num_samples)
        found = json.loads(lists(host).read_text())
        for budget in budgets:
            own = tuple(found[f"readout|output|{budget}"])
            for size in (size for size in sizes if (host, budget, size) not in known):
                errors: dict[str, Tensor] = {}
                for kind in ("readout", "rows"):
                    predictor = load_predictor(fit_one(host, kind, own, size))
                    entry = Entry(kind, "learned", "output", "searched", own, predictor)
                    made = run_kept(pipe, host, entry, batches, full["sigmas"])
                    errors[kind] = psnr(made["images"], full["images"])
                gap = paired(errors["readout"], errors["rows"])
                row = {"host": host, "num_anchors": budget, "trajectories": size} | asdict(gap)
                for kind, error in errors.items():
                    told = summarise(error)
                    row |= {f"{kind}_db": told.mean, f"{kind}_q10": told.q10}
                rows.append(row)
                CURVE.write_text(json.dumps(rows, indent=1) + "\n")
                print(row, flush=True)


def publish(
    hosts: Sequence[str] = tuple(HOSTS),
    budgets: Sequence[int] = BUDGETS,
    num_samples: int = 64,
    num_trajectories: int = FITTED_ON,
) -> None:
    """Write one row per method, on the list that suits it best, with its paired differences.

    The readout's rival is the best of what is not ours. Everything else, our older fits among it,
    is compared with the readout. Rows of hosts and budgets that were not benched stay; of methods
    that were not benched again, without a comparison.

    Args:
        hosts: bundled models.
        budgets: network evaluations.
        num_samples: judged samples.
        num_trajectories: that the readout was fitted on.
    """
    by_place: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in json.loads(RESULT.read_text()) if RESULT.exists() else []:
        by_place.setdefault((row["host"], row["num_anchors"]), []).append(row)
    for host in hosts:
        _, batches, full = judged(host, num_samples)
        numbers = prompts_of([item for batch in batches for item in batch])
        judge = Judge(Samples(**full), numbers, CALL["guidance_scale"], {})
        for budget in budgets:
            planned = [(each, each) for each in ours(host, budget, num_trajectories)]
            planned += [(each, each) for each in rivals(host, budget)]
            planned += learned_solvers(host, budget)
            here = [each for each in planned if kept(host, each[0], num_samples).exists()]
            if not here or here[0][0].method != "readout":
                print(f"{host} at {budget} evaluations was not benched: left as it was")
                continue
            best: dict[str, tuple[BenchRow, Errors]] = {}
            for entry, shown in here:
                found = judge.row(shown, Samples(**run_kept(None, host, entry, batches)))
                if entry.method not in best or found[0].psnr_db > best[entry.method][0].psnr_db:
                    best[entry.method] = found
            rows = compared(list(best.values()), judge.prompts)
            before = [r for r in by_place.get((host, budget), []) if r["method"] not in best]
            by_place[host, budget] = [record_of(host, row, here[0][0]) for row in rows]
            by_place[host, budget] += [row | dict.fromkeys(COMPARED) for row in before]
            for line in advice(rows):
                print(f"{host}: {line}")
    order = sorted(by_place, key=lambda place: (list(HOSTS).index(place[0]), -place[1]))
    rows_of = [row for place in order for row in by_place[place]]
    RESULT.write_text(json.dumps(rows_of, indent=1) + "\n")


def record_of(host: str, row: BenchRow, readout: Entry) -> dict[str, Any]:
    """A row as the file has it, with what only the readout's tells."""
    record = {"host": host} | to_record(row)
    if row.method == readout.method:
        fitted: Any = readout.predictor
        solving = fitted.spec.metrics["solve_seconds"]
        record |= {"solve_seconds": solving, "first_time": fitted.first_time}
    return record


def compared(found: Sequence[tuple[BenchRow, Errors]], prompts: Sequence[int]) -> list[BenchRow]:
    """The rows with their rivals: the readout against what is not ours, all else against it."""

    def is_readout(row: BenchRow) -> bool:
        return row.method == "readout"

    rows, errors = [row for row, _ in found], [error for _, error in found]
    others = [place for place, row in enumerate(rows) if row.method not in OTHERS]
    against = with_rivals(
        [rows[i] for i in others], [errors[i] for i in others], prompts, is_readout
    )
    mine = next(row for row in against if is_readout(row))
    every = with_rivals(rows, errors, prompts, is_readout)
    return [mine if is_readout(row) else row for row in every]


def kept(host: str, entry: Entry, num_samples: int) -> Path:
    """Where the samples of an entry lie."""
    return ROOT / host / "samples" / f"{entry.key(f'{host} {num_samples}')}.pt"


def ship(num_trajectories: int = FITTED_ON) -> None:
    """Put the fitted readouts among the bundled predictors, with what was measured of them.

    Args:
        num_trajectories: that the readouts were fitted on.
    """
    rows = json.loads(RESULT.read_text())
    for mine in (row for row in rows if row["method"] == "readout"):
        host, budget = mine["host"], mine["num_anchors"]
        anchors = list(map(int, mine["anchors"].split()))
        fitted = fitted_at(host, "readout", anchors, num_trajectories)
        if not fitted.exists():
            print(f"{host} at {budget} evaluations was fitted elsewhere: the one shipped stays")
            continue
        predictor: Any = load_predictor(fitted)
        if predictor.spec.metrics["fit_seconds"] != mine["fit_seconds"]:
            print(f"{host} at {budget} evaluations was fitted again and not benched: left out")
            continue
        beside = [r for r in rows if r["host"] == host and r["num_anchors"] == budget]
        metrics = {f"psnr_db_{r['method']}": r["psnr_db"] for r in beside if r["kind"] != "learned"}
        names = ("psnr_db", "fit_seconds", "fit_evaluations", *PAIRED)
        metrics |= {name: mine[name] for name in names}
        folder = Path("checkpoints/zoo") / f"{host}_readout_{budget}"
        save_predictor(predictor, replace(predictor.spec, metrics=metrics), folder)
        shutil.copy(fitted / "grams.safetensors", folder)


def cost(num_rounds: int = 15) -> None:
    """Measure a forecast step beside L2P's on both taps, on one thread, in turns.

    Args:
        num_rounds: forecast steps timed at least, for every predictor.
    """
    anchors = json.loads(lists("fashion_dit").read_text())["readout|output|8"]
    pipe = load_pipeline("zoo:fashion_dit")
    items = asked_items(pipe, None, 8, FIRST_ITEM)
    readout = load_predictor(fit_one("fashion_dit", "readout", anchors, FITTED_ON))
    rows = L2P(50, anchors, 2)
    told = []
    for name, predictor, tap in (
        ("l2p", rows, "output"),
        ("l2p", rows, "hidden"),
        ("readout", readout, "output"),
    ):
        run = partial(generate_batch, pipe, items, output_type="latent", **CALL)
        step = forecast_step_ratio(pipe, predictor, tap, anchors, run, num_rounds)
        session = Session(pipe, Forecaster(predictor, tap, tuple(anchors)))
        run()
        session.detach()
        eight = partial(run, num_inference_steps=8)
        told.append(
            {
                "method": name,
                "tap": tap,
                "forecast_step_ratio": step.ratio,
                "anchor_overhead": attach_overhead(pipe, predictor, tap, 8, eight),
                "state_bytes": session.report.state_bytes // len(items),
            }
        )
        print(told[-1], flush=True)
    COST.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    auto_cli([record, search, fit, bench, curve, publish, ship, cost])
