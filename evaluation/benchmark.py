"""Full run, few-step solvers, formulas and learned predictors, on equal terms."""

import hashlib
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from foreseer import __version__
from foreseer.checkpoints.spec import PredictorSpec, check_host
from foreseer.evaluation.page.curves import sheet
from foreseer.evaluation.page.html import write_report
from foreseer.evaluation.pairing import prompts_of, with_rivals
from foreseer.evaluation.plan import Entry, plan, spec_of
from foreseer.evaluation.results import (
    RESULTS_FILE,
    BenchMeta,
    BenchRow,
    Errors,
    collect_meta,
    save_errors,
)
from foreseer.evaluation.runs import (
    ROWS_FILE,
    Judge,
    RowLog,
    Samples,
    Tick,
    as_pictures,
    load_samples,
    run_entry,
    save_samples,
    steps_made,
)
from foreseer.evaluation.solvers import SOLVERS
from foreseer.evaluation.st_lpips import StLpips
from foreseer.evaluation.timing import StepFlops, first_call, step_flops
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.integration.host.hosts import transformer_of
from foreseer.integration.host.module_host import has_loop
from foreseer.integration.pipelines.pipeline_call import guidance_of_call
from foreseer.integration.schedule import COMMON
from foreseer.predictors.base import LinearPredictor, Predictor
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import RULES
from foreseer.trajectories.prompts import Item, digest, generate_batch

FIRST_ITEM = 10_000  # far from every item a recording starts with
SHEET_SAMPLES = 8


@dataclass(frozen=True)
class Asked:
    """What a benchmark measures and tells beyond its rows.

    Args:
        reference_steps: also measure the distance to a full run of so many steps; None does not.
        perceptual: also measure ST-LPIPS.
        efforts: `<method>|<tap>|<num_anchors>` to what the search for that list took, in words.
    """

    reference_steps: int | None = None
    perceptual: bool = False
    efforts: Mapping[str, str] = field(default_factory=dict)


ASKED = Asked()


def compare_methods(
    pipe: Any,
    items: Sequence[Item],
    out: str | Path,
    budgets: Sequence[int] = (11, 8, 6),
    predictors: Mapping[str, Predictor] | None = None,
    searched: Mapping[str, Sequence[int]] | None = None,
    methods: Sequence[str] | None = None,
    batch_size: int = 16,
    command: str = "foreseer.evaluation.benchmark.compare_methods",
    rules: Mapping[str, Predictor | Mapping[str, Predictor]] = RULES,
    common: Collection[str] = COMMON,
    asked: Asked = ASKED,
    **settings: Any,
) -> Path:
    """Run every method of a plan (plan.py) on the same items and write the report.

    Called again with the same arguments it goes on after the last finished row.

    Args:
        pipe: a diffusers pipeline with a flow-matching scheduler.
        items: held-out items.
        out: folder of the report.
        budgets: numbers of network evaluations.
        predictors: learned predictors with a spec, by table name; what follows an `@` in a name
            tells predictors of one method apart and is not shown.
        searched: `<method>|<tap>|<num_anchors>` to anchors, as `foreseer search` writes them.
        methods: solvers and formulas to run; None runs all.
        batch_size: samples per pipeline call.
        command: how this was called, for the report.
        rules: the formulas, see `plan`.
        common: names of the common lists to run.
        asked: what else is measured and told.
        settings: keyword arguments of every pipeline call: `guidance_scale`, `num_inference_steps`.

    Returns:
        Path of the HTML page.

    Raises:
        PredictorMismatch: a learned predictor was fitted on another host, grid or guidance.
        ValueError: an argument is wrong, or a method diverged.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if has_loop(pipe):
        methods, settings = of_loop(pipe, items[:1], methods, rules, settings)
    num_steps = int(settings["num_inference_steps"])
    host = host_fingerprint(transformer_of(pipe))
    entries = plan(budgets, num_steps, predictors or {}, searched or {}, methods, rules, common)
    for predictor in (predictors or {}).values():
        check_host(spec_of(predictor), host, pipe.scheduler)
    entries = [Entry("full", "full", "none", "all", tuple(range(num_steps))), *entries]
    common = _common_key(pipe, host, items, batch_size, settings, asked)
    batches = _in_batches(items, batch_size)
    ran, judge = _measure(pipe, entries, out, batches, common, settings, asked)
    lists = told_lists(entries, searched or {}, asked.efforts)
    meta = collect_meta(command, [item.seed for item in items], lists)
    few = _in_batches(items[:SHEET_SAMPLES], batch_size)
    return _report(pipe, entries, ran, judge, few, settings, meta, out)


def _report(
    pipe: Any,
    entries: Sequence[Entry],
    ran: Sequence[tuple[BenchRow, Errors]],
    judge: Judge,
    few: Sequence[Sequence[Item]],
    settings: dict[str, Any],
    meta: BenchMeta,
    out: Path,
) -> Path:
    """Pair the rows, draw a few samples again and write everything down; the HTML page."""
    errors = [each for _, each in ran]
    rows = with_rivals([row for row, _ in ran], errors, judge.prompts)
    save_errors(errors, judge.prompts, out / RESULTS_FILE)
    drawn = list(zip(entries, rows, strict=True))
    shown = sheet(pipe, drawn, judge.reference.sigmas, few, settings)
    return write_report(rows, meta, shown.images, out, shown.step_errors, weights=shown.weights)


def of_loop(
    pipe: Any,
    items: Sequence[Item],
    methods: Sequence[str] | None,
    rules: Mapping[str, Predictor | Mapping[str, Predictor]],
    settings: dict[str, Any],
) -> tuple[list[str], dict[str, Any]]:
    """Methods and settings of a benchmark on a loop, whose solver and steps are its own.

    Raises:
        ValueError: solvers are asked for.
    """
    if asked := sorted(set(methods or ()) & set(SOLVERS)):
        raise ValueError(
            f"the solvers {asked} take the place of a scheduler, and this host's loop has none; "
            "leave them out of `methods`. Reuse on the output is Euler with as many evaluations "
            "where the loop is Euler's, ab2 likewise."
        )
    chosen = list(rules) if methods is None else list(methods)
    return chosen, {"num_inference_steps": steps_made(pipe, items), **settings}


def rows_predictor(
    pipe: Any,
    rows: Float[Tensor, "branches S S"],
    anchors: Sequence[int],
    tap: str,
    sigmas: Sequence[float],
    guidance_scale: float,
) -> L2P:
    """Rows that are not saved yet, as a predictor with the spec of this pipeline.

    Args:
        pipe: the pipeline they were fitted on.
        rows: weights at anchors.
        anchors: steps at which the network runs.
        tap: `output` or `hidden`.
        sigmas: flow time of every step.
        guidance_scale: guidance they were fitted at.
    """
    transformer = transformer_of(pipe)
    predictor = L2P(rows.shape[-1], anchors, rows.shape[0])
    predictor.weight.copy_(rows)
    spec = PredictorSpec(
        tap=tap,
        anchors=tuple(anchors),
        sigmas=tuple(sigmas),
        host=host_fingerprint(transformer),
        scheduler=type(pipe.scheduler).__name__,
        num_branches=rows.shape[0],
        guidance_scale=guidance_scale,
        dtype=str(next(transformer.parameters()).dtype).removeprefix("torch."),
    )
    predictor.spec = spec
    return predictor


def command_line(options: Mapping[str, Any]) -> str:
    """`foreseer bench` with every option written out."""
    words = ["foreseer", "bench"]
    for name, value in options.items():
        if value is not None and value != {}:
            plain = json.loads(json.dumps(value, default=_named))
            words += [f"--{name}", plain if isinstance(plain, str) else json.dumps(plain)]
    return shlex.join(words)


def _named(value: Any) -> str:
    """A path as a word; of a pipeline or predictor that was given itself, what stands for it."""
    return str(value) if isinstance(value, Path) else f"<{type(value).__name__}>"


def _in_batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _common_key(
    pipe: Any,
    host: dict[str, Any],
    items: Sequence[Item],
    batch_size: int,
    settings: dict[str, Any],
    asked: Asked,
) -> str:
    """Digest of what all rows of a benchmark share."""
    config = {k: str(v) for k, v in dict(pipe.scheduler.config).items() if not k.startswith("_")}
    told = [__version__, host, type(pipe.scheduler).__name__, config, batch_size]
    # the digest of the weights does not tell their dtype
    dtype = str(next(transformer_of(pipe).parameters()).dtype)
    told += [torch.get_num_threads(), str(pipe.device), dtype, digest(items, settings)]
    if asked.reference_steps or asked.perceptual:  # rows without them are other rows
        told += [asked.reference_steps, asked.perceptual]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def told_lists(
    entries: Sequence[Entry], searched: Mapping[str, Sequence[int]], efforts: Mapping[str, str]
) -> dict[str, str]:
    """What the searched lists of solvers and formulas took, by method, tap and evaluations."""
    found = {}
    for entry in entries:
        key = f"{entry.method}|{entry.tap}|{len(entry.anchors)}"
        if key in searched:
            tap = "" if entry.tap == "none" else f" ({entry.tap})"
            told = efforts.get(key, "a list was given, but not what finding it took")
            found[f"{entry.method}{tap} at {len(entry.anchors)}"] = told
    return found


def _measure(
    pipe: Any,
    entries: Sequence[Entry],
    out: Path,
    batches: Sequence[Sequence[Item]],
    common: str,
    settings: dict[str, Any],
    asked: Asked,
) -> tuple[list[tuple[BenchRow, Errors]], Judge]:
    """Run every entry whose row is not on disk yet, the full run first; all rows, their judge."""
    log = RowLog(out / ROWS_FILE)
    same: dict[tuple[str, tuple[int, ...], bytes], tuple[BenchRow, Errors]] = {}
    keys = [entry.key(common) for entry in entries]
    pending = [
        (entry, key) for entry, key in zip(entries, keys, strict=True) if key not in log.rows
    ]
    work = sum(len(entry.anchors) for entry, _ in pending)
    steps = asked.reference_steps
    if steps is not None and not _kept(out, f"reference_{steps}", common).exists():
        work += steps
    work *= sum(map(len, batches))
    with tqdm(total=work, desc="bench", unit="evaluation") as bar:
        judge = _judge(pipe, entries, out, batches, common, settings, bar.update, asked)
        sigmas = judge.reference.sigmas
        for entry, key in pending:
            bar.set_postfix_str(f"{entry.method} {entry.tap}")
            alike = rule_key(entry, sigmas)
            if alike in same:  # newton_1 has the very weights of taylor_1
                row, errors = same[alike]
                log.add(key, replace(row, method=entry.method), errors)
                continue
            samples = judge.reference
            if entry.kind != "full":
                samples = run_entry(pipe, entry, sigmas, batches, bar.update, **settings)
                samples = as_pictures(pipe, samples, judge.reference)
            log.add(key, *judge.row(entry, samples))
            if alike is not None:
                same[alike] = log.rows[key]
    return [log.rows[key] for key in keys], judge


def _judge(
    pipe: Any,
    entries: Sequence[Entry],
    out: Path,
    batches: Sequence[Sequence[Item]],
    common: str,
    settings: dict[str, Any],
    tick: Tick,
    asked: Asked,
) -> Judge:
    """What the rows are measured against; full runs are drawn where they are not on disk yet."""

    def drawn(name: str, **changed: Any) -> Samples:
        kept = _kept(out, name, common)
        if not kept.exists():
            found = run_entry(pipe, entries[0], [], batches, tick, **{**settings, **changed})
            save_samples(as_pictures(pipe, found, found), kept)
        return load_samples(kept)

    reference, steps = drawn("reference"), asked.reference_steps
    if steps is not None:
        check_finer(pipe, steps, settings)
    return Judge(
        reference,
        prompts_of([item for batch in batches for item in batch]),
        guidance_of_call(pipe, settings),
        _flops(pipe, entries, batches[0][:1], settings),
        None if steps is None else drawn(f"reference_{steps}", num_inference_steps=steps),
        StLpips() if asked.perceptual else None,
    )


def _kept(out: Path, name: str, common: str) -> Path:
    """Where the samples of a full run lie."""
    return out / f"{name}.{common[:12]}.safetensors"


def check_finer(pipe: Any, steps: int, settings: Mapping[str, Any]) -> None:
    """Raise unless a full run can be made of so many steps, more than its own.

    Raises:
        ValueError: it cannot.
    """
    own = int(settings["num_inference_steps"])
    given = sorted({"sigmas", "timesteps"} & settings.keys())
    if has_loop(pipe) or given or steps <= own:
        found = f"{own} steps"
        found += " in a loop of its own" if has_loop(pipe) else f" by its {given}" if given else ""
        raise ValueError(
            f"reference_steps is {steps}, the full run has {found}; expected more steps, of a "
            "pipeline whose call takes their number alone."
        )


def rule_key(entry: Entry, sigmas: Sequence[float]) -> tuple[str, tuple[int, ...], bytes] | None:
    """What decides a formula's samples: tap, anchors and weights to 12 digits; None for others.

    Weights of parts do not say what the parts are.
    """
    rule = entry.predictor
    if entry.kind != "formula" or not isinstance(rule, LinearPredictor) or rule.partition:
        return None
    weights = rule.rows(entry.anchors, sigmas)
    return entry.tap, entry.anchors, weights.round(decimals=12).numpy().tobytes()


def _flops(
    pipe: Any, entries: Sequence[Entry], items: Sequence[Item], settings: dict[str, Any]
) -> dict[str, StepFlops]:
    """Cost of a step on every tap that is forecast."""
    transformer = transformer_of(pipe)
    call = first_call(transformer, lambda: generate_batch(pipe, items, **settings))
    taps = sorted({entry.tap for entry in entries} - {"none"})
    return {tap: step_flops(transformer, call, tap) for tap in taps}
