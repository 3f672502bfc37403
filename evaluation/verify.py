"""Whether foreseer is exact on somebody's own pipeline: the checks behind `foreseer verify`.

What is recorded must not change a run, a recorded feature put back must give the same run bit for
bit, and nothing may be left behind.
"""

import functools
import gc
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from tqdm.auto import tqdm

from foreseer.checkpoints.spec import PredictorMismatch, PredictorSpec
from foreseer.evaluation.timing import forecast_step_ratio
from foreseer.integration.forecasting import attach
from foreseer.integration.histories import Kept
from foreseer.integration.host.clock import Clock
from foreseer.integration.host.hosts import others_of, transformers_of
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.integration.observers import Source, StepRecord
from foreseer.integration.pipelines.pipeline_call import joined
from foreseer.integration.policy import Anchors, Schedule
from foreseer.integration.session import Session
from foreseer.predictors.base import Predictor, Step
from foreseer.predictors.rules import Reuse

Run = Callable[[], Any]
EXACT_TAPS = ("output", "hidden")  # `residual` adds, so that it is exact up to rounding only


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Args:
        name: what, such as `record hidden`.
        passed: whether it holds; None where it was measured and nothing was asked of it.
        found: what was found, for a person.
    """

    name: str
    passed: bool | None
    found: str


class Replay(Source):
    """Keep a tap at every step of a run, then put it back at every other step.

    Args:
        tap: `output`, `hidden` or `residual`.

    Attributes:
        kept: the features.
        fail_at: step whose forecast is broken off with `Broken`, inside of the network's call; None
            for none.
    """

    def __init__(self, tap: str) -> None:
        self.tap = tap
        self.taps = frozenset({tap})
        self.fail_at: int | None = None
        self.record()

    def record(self) -> None:
        """Run every step from now on, and keep its tap."""
        self.kept = Kept()
        self.schedule = Schedule()

    def replay(self) -> None:
        """Put the tap back at every other step from now on."""
        self.schedule = Anchors(range(0, sys.maxsize, 2))

    def on_step(self, record: StepRecord) -> None:
        """Keep the tap of what ran."""
        for call in record.calls:
            if call.taps is not None:
                self.kept.keep(call.step, call.taps[self.tap])

    def knows(self, step: Step, slot: Hashable = None) -> bool:
        """Whether the call was kept at this step."""
        return step.index in self.kept.steps(step)

    def forecast(self, step: Step, slot: Hashable = None) -> Tensor:
        """The tap as it was kept."""
        if step.index == self.fail_at:
            raise Broken
        return self.kept.at(step)

    def state_bytes(self) -> int:
        """Bytes of the features of one step, all branches."""
        return self.kept.state_bytes()


class Broken(Exception):
    """Breaks a run off."""


def final_latents(pipe: Any, run: Run) -> Tensor:
    """The final latents of a run, whatever is attached to the pipeline.

    Raises:
        UnsupportedHost: the pipeline never stepped its scheduler.
    """
    found: list[Tensor] = []
    clock = Clock(pipe.scheduler, lambda sigmas: None, lambda i, v, before, x: found.append(x))
    try:
        run()
    finally:
        clock.detach()
    if not found:
        raise UnsupportedHost(
            f"{type(pipe).__name__} never called scheduler.step, so its steps cannot be counted."
        )
    return found[-1]


def verify_pipeline(pipe: Any, run: Run, predictor: Predictor | None = None) -> Iterator[Check]:
    """Check everything on a pipeline's own calls, one check at a time.

    Args:
        pipe: the pipeline, with nothing attached.
        run: calls it once, always on the same inputs and noise.
        predictor: also run this one, fitted or loaded.

    Yields:
        The checks. The first that makes the others meaningless is the last.

    Raises:
        ValueError: the predictor has no spec.
    """
    if predictor is not None and predictor.spec is None:
        raise ValueError(
            f"this {type(predictor).__name__} has no spec, which says what it may be used on; "
            "expected a predictor that was fitted or loaded."
        )
    expected = final_latents(pipe, run)
    before = footprint(pipe)  # after a run: the first one makes attributes of its own
    repeated = same(final_latents(pipe, run), expected)
    yield Check(
        "repeatable", repeated, "two plain runs are equal" if repeated else "two runs differ"
    )
    if not repeated:
        return
    graphs = num_graphs()
    taps = []
    for tap in (*EXACT_TAPS, "residual"):
        checks = list(check_tap(pipe, run, tap, expected))
        yield from checks
        if len(checks) > 1 and all(check.passed is not False for check in checks):
            taps.append(tap)
    if num_graphs():
        extra = num_graphs() - graphs
        yield Check("graphs", extra == 0, f"{extra} more compiled graphs than without")
    for tap in (tap for tap in EXACT_TAPS if tap in taps):
        yield check_abort(pipe, run, tap, expected)
    yield check_detached(pipe, before)
    yield Check("after detach", same(final_latents(pipe, run), expected), "a plain run, once more")
    for tap in taps:
        yield measure_cost(pipe, run, tap)
    if predictor is not None:
        yield check_predictor(pipe, run, predictor, expected)


def check_tap(pipe: Any, run: Run, tap: str, expected: Tensor) -> Iterator[Check]:
    """Record a tap, put it back at every other step, compare both runs with the plain one."""
    replay = Replay(tap)
    session = Session(pipe, replay)
    try:
        recorded = final_latents(pipe, run)
        replay.replay()
        replayed, report = final_latents(pipe, run), session.report
    except UnsupportedHost as error:
        passed = None if tap == "residual" else False
        yield Check(f"record {tap}", passed, f"no such tap: {error}")
        return
    finally:
        session.detach()
    yield Check(f"record {tap}", same(recorded, expected), difference(recorded, expected))
    stood_in = [*report.forecasts, *report.shallow]
    told = f"{difference(replayed, expected)}, {len(stood_in)} steps replayed"
    exact = None if tap == "residual" else same(replayed, expected) and bool(stood_in)
    yield Check(f"replay {tap}", exact, told)
    yield Check(f"memory {tap}", None, f"{replay.state_bytes() / 1024:,.1f} KiB per anchor kept")


def check_abort(pipe: Any, run: Run, tap: str, expected: Tensor) -> Check:
    """Break a run off inside of a forecast; the next one must know nothing of it."""
    replay = Replay(tap)
    session = Session(pipe, replay)
    try:
        run()
        replay.replay()
        replay.fail_at = 1
        try:
            run()
            return Check(f"abort {tap}", False, "the run could not be broken off at step 1")
        except Broken:
            replay.fail_at = None
        replay.record()
        after = final_latents(pipe, run)
    finally:
        session.detach()
    return Check(f"abort {tap}", same(after, expected), difference(after, expected))


def check_detached(pipe: Any, before: dict[str, Any]) -> Check:
    """Compare what is on a pipeline now with what was on it before anything was attached."""
    gc.collect()
    after = footprint(pipe)
    changed = sorted(name for name in before if after.get(name) != before[name])
    changed += sorted(after.keys() - before.keys())
    return Check("detach", not changed, f"left behind: {changed}" if changed else "nothing is left")


def footprint(pipe: Any) -> dict[str, Any]:
    """What attaching could leave behind: attributes and hooks by the place they are at."""
    found: dict[str, Any] = {"scheduler": sorted(vars(pipe.scheduler))}
    for expert, transformer in (transformers_of(pipe) | others_of(pipe)).items():
        found[f"{expert}.attributes"] = sorted(vars(transformer))
        for name, module in transformer.named_modules():
            hooks = len(module._forward_pre_hooks) + len(module._forward_hooks)
            registry = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
            found[f"{expert}.{name}"] = (id(module), hooks, sorted(registry))
    return found


def measure_cost(pipe: Any, run: Run, tap: str) -> Check:
    """Time of a forecast step over that of a full step, the scheduler and the pipeline included."""
    cost = forecast_step_ratio(pipe, Reuse(), tap, (0,), run)
    full, forecast = 1000 * cost.full_seconds, 1000 * cost.forecast_seconds
    told = f"a forecast step takes {cost.ratio:.2%} of a full one ({forecast:.2f} / {full:.2f} ms)"
    return Check(f"cost {tap}", None, told)


def check_predictor(pipe: Any, run: Run, predictor: Predictor, expected: Tensor) -> Check:
    """Run a predictor, and reuse on the same steps and tap beside it."""
    spec: PredictorSpec = predictor.spec
    errors = []
    for each in (predictor, Reuse()):
        try:
            attached = attach(pipe, each, spec.anchors, spec.tap)
        except PredictorMismatch as error:
            return Check("predictor", False, str(error))
        try:
            final, report = final_latents(pipe, run), attached.report()
        except PredictorMismatch as error:
            return Check("predictor", False, str(error))
        finally:
            attached.detach()
        errors.append(relative_error(final, expected))
    told = (
        f"{len(report.anchors)} of {report.num_steps} steps run on the tap {spec.tap}; final "
        f"latents are {errors[0]:.3g} off (reuse on the same steps: {errors[1]:.3g})"
    )
    return Check("predictor", errors[0] == errors[0] and errors[0] < 1, told)


def num_graphs() -> int:
    """Graphs compiled so far in this process."""
    return int(counters["stats"]["unique_graphs"])


def same(found: Tensor | None, expected: Tensor) -> bool:
    """Whether two results are equal bit for bit."""
    return found is not None and torch.equal(found, expected)


def relative_error(found: Tensor | None, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; NaN where nothing was found."""
    if found is None:
        return float("nan")
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def difference(found: Tensor | None, expected: Tensor) -> str:
    """Words for how far two results are apart."""
    if same(found, expected):
        return "bit for bit the plain run"
    return f"final latents differ by {relative_error(found, expected):.1e}"


DEFAULT_STEPS = 8
WORDS = {True: "ok", False: "FAILED", None: ""}


@dataclass(frozen=True)
class Verified:
    """What checking a pipeline came to; true where no check failed.

    Args:
        checks: every check, in the order made.
    """

    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def __str__(self) -> str:
        return f"{table(self.checks)}\n\n{verdict(self.checks)}"


def verified(pipe: Any, run: Callable[[], Any], predictor: Predictor | None) -> Verified:
    """Check a pipeline under a bar; one that cannot be hooked has failed the check `host`.

    Args:
        pipe: a pipeline with nothing attached.
        run: calls it on one sample, the same inputs and noise every time.
        predictor: to be run too.
    """
    checks: list[Check] = []
    try:
        with tqdm(desc="verify", unit="check", leave=False) as bar:
            for check in verify_pipeline(pipe, run, predictor):
                checks.append(check)
                bar.update()
    except UnsupportedHost as error:
        checks.append(Check("host", False, str(error)))
    return Verified(tuple(checks))


def num_steps_of(predictor: Predictor | None) -> int:
    """The steps a predictor was fitted on; a few where there is none."""
    if predictor is None or predictor.spec is None:
        return DEFAULT_STEPS
    return len(predictor.spec.sigmas)


def one_call(
    pipe: Any, sample: Mapping[str, Any], settings: Mapping[str, Any]
) -> Callable[[], Any]:
    """A call of the pipeline on one sample, the same inputs and noise every time.

    Args:
        pipe: a pipeline.
        sample: its per-sample arguments.
        settings: the other ones.
    """
    return functools.partial(_call, pipe, joined([sample]), settings)


def _call(pipe: Any, inputs: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipe(**inputs, **given, generator=generator, output_type="latent")


def table(checks: Sequence[Check]) -> str:
    """A line per check."""
    width = max(len(check.name) for check in checks)
    return "\n".join(f"{c.name:<{width}}  {WORDS[c.passed]:<6}  {c.found}" for c in checks)


def verdict(checks: Sequence[Check]) -> str:
    """One sentence: what this pipeline can be used with."""
    failed = [check.name for check in checks if check.passed is False]
    exact = [tap for tap in EXACT_TAPS if not any(name.endswith(tap) for name in failed)]
    others = [name for name in failed if not name.endswith(EXACT_TAPS)]
    if "repeatable" in failed:
        return (
            "VERDICT: nothing can be said, since two plain runs differ: fix the seed, or turn on "
            "torch.use_deterministic_algorithms."
        )
    if others:
        return f"VERDICT: do not use it yet: {', '.join(others)}."
    if not exact:
        return "VERDICT: not supported: no tap of this pipeline can be put back exactly."
    if failed:
        return f"VERDICT: works on the tap {exact[0]!r} only; the others are refused on attaching."
    return "VERDICT: works, and is exact, on the taps " + " and ".join(map(repr, exact)) + "."
