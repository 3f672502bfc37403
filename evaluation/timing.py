"""What steps cost: FLOPs, and seconds measured in turns.

Matrix products are counted by `torch.utils.flop_counter`, with attention on its plain path, since
the fused CPU kernel counts as 0. The counter knows no elementwise work, so a forecast's own 2 K
operations per element are added by hand.

Times are CPU times on one torch thread, so that other work on the machine does not count; on a GPU
they are wall times of a synchronised device.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from foreseer.integration.forecaster import Forecaster
from foreseer.integration.host.call import prediction
from foreseer.integration.host.clock import Clock
from foreseer.integration.host.hook import TrunkSkipper
from foreseer.integration.host.hosts import transformers_of
from foreseer.integration.host.outer import outer_part
from foreseer.integration.host.taps import capturing, outer_blocks
from foreseer.integration.host.trunk import TrunkTracer
from foreseer.integration.observers import Observer, StepRecord
from foreseer.integration.session import Session
from foreseer.predictors.base import Predictor

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


@dataclass(frozen=True)
class StepFlops:
    """Cost of one call of the transformer.

    Args:
        full: FLOPs when the network runs.
        base: FLOPs of a forecast call before its sum over the history: the head on the `hidden` and
            `residual` taps, nothing on `output`.
        elements: elements of the feature that is forecast.
    """

    full: int
    base: int
    elements: int

    def forecast(self, num_features: int) -> int:
        """FLOPs of a forecast from `num_features` anchors."""
        return self.base + 2 * num_features * self.elements


class _Stop(Exception):
    """Ends a pipeline call once the transformer's inputs are known."""


def first_call(transformer: nn.Module, run: Callable[[], Any]) -> Call:
    """The arguments of the first call of a transformer within `run()`, which is cut short there.

    Raises:
        ValueError: `run` never calls the transformer.
    """

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Stop

    seen: list[Call] = []
    handle = transformer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Stop:
        return seen[0]
    finally:
        handle.remove()
    raise ValueError(
        f"the run never called {type(transformer).__name__}, so its inputs are unknown."
    )


@torch.no_grad()
def step_flops(transformer: nn.Module, call: Call, tap: str) -> StepFlops:
    """Count a full call and a forecast call on one tap.

    Args:
        transformer: the host, with nothing attached.
        call: arguments of one call, as `first_call` gives them.
        tap: `output`, `hidden`, `residual` or `deep.<d>`.

    Raises:
        ValueError: the tap is unknown.
    """
    deep = outer_blocks(tap) is not None
    if tap not in ("output", "hidden", "residual") and not deep:
        raise ValueError(f"tap is {tap!r}, expected 'output', 'hidden', 'residual' or 'deep.<d>'.")
    args, kwargs = call
    forward = transformer.forward
    full, output = _counted(lambda: forward(*args, **kwargs))
    if tap == "output":
        return StepFlops(full, 0, prediction(output).numel())
    with TrunkTracer(transformer) as tracer:
        forward(*args, **kwargs)
    trunk = tracer.trunk()
    with capturing(transformer, trunk, {tap if deep else "hidden"}) as found:
        forward(*args, **kwargs)
    if deep:
        part, between = outer_part(transformer, trunk, tap), found[tap]
        inputs = functools.partial(part.put, between)
        base, _ = _counted(lambda: part(forward, args, kwargs, inputs))
        return StepFlops(full, base, between.numel())
    hidden: Tensor = found["hidden"]
    skipper = TrunkSkipper(transformer, trunk)
    base, _ = _counted(lambda: skipper(forward, args, kwargs, lambda entering: hidden))
    return StepFlops(full, base, hidden.numel())


def run_flops(
    cost: StepFlops, anchors: Sequence[int], num_steps: int, window: int | None
) -> tuple[int, int]:
    """FLOPs of an accelerated run and of the full run.

    Args:
        cost: cost of each kind of step.
        anchors: steps at which the network runs.
        num_steps: steps of the run.
        window: anchors a forecast looks at; None means all there are.
    """
    total = cost.full * len(anchors)
    for step in range(num_steps):
        if step not in anchors:
            known = sum(anchor < step for anchor in anchors)
            total += cost.forecast(known if window is None else min(known, window))
    return total, cost.full * num_steps


def _counted(call: Callable[[], Any]) -> tuple[int, Any]:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


Run = Callable[[], Any]  # one call of the pipeline


@dataclass(frozen=True)
class StepCost:
    """Median cost of the two kinds of step, the scheduler's work and the pipeline's own included.

    Args:
        full_seconds: seconds of a step of the pipeline alone.
        forecast_seconds: seconds of a step that is forecast.
        rounds: number of forecast steps behind the median.
    """

    full_seconds: float
    forecast_seconds: float
    rounds: int

    @property
    def ratio(self) -> float:
        """Forecast step over full step."""
        return self.forecast_seconds / self.full_seconds


@dataclass
class StepTimes:
    """Seconds of each step of the runs of one kind, step 0 left out: it holds the run's set-up."""

    device: torch.device
    seconds: list[tuple[int, float]] = field(default_factory=list)
    _last: float = 0.0

    def open(self, sigmas: list[float]) -> None:
        """A run starts."""
        self._last = now(self.device)

    def close(self, step_index: int) -> None:
        """A step is over."""
        current = now(self.device)
        if step_index > 0:
            self.seconds.append((step_index, current - self._last))
        self._last = current

    def median(self, steps: Callable[[int], bool]) -> float | None:
        """Median over the steps for which `steps(index)` holds; None when there is none."""
        chosen = [seconds for index, seconds in self.seconds if steps(index)]
        return median(chosen) if chosen else None


class StepTimer(Observer):
    """Keeps the time of every step and the last latents.

    Args:
        device: where the network runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.times = StepTimes(device)
        self.final: Tensor | None = None

    def on_step(self, record: StepRecord) -> None:
        """A step is over."""
        self.final = record.after
        self.times.close(record.index)

    def ratio(self, anchors: Collection[int]) -> float | None:
        """Median forecast step over median anchor step, of the runs so far; None without both."""
        full = self.times.median(lambda step: step in anchors)
        forecast = self.times.median(lambda step: step not in anchors)
        return forecast / full if full and forecast else None


def forecast_step_ratio(
    pipe: Any,
    predictor: Predictor,
    tap: str,
    anchors: Sequence[int],
    run: Run,
    min_rounds: int = 15,
) -> StepCost:
    """Time full steps of the pipeline alone and forecast steps, in turns, on one torch thread.

    Args:
        pipe: the pipeline, with nothing attached.
        predictor: the forecaster.
        tap: `output`, `hidden` or `residual`.
        anchors: steps at which the network runs.
        run: calls the pipeline once; the first call of each kind is not counted.
        min_rounds: steps of each kind to time at least.

    Raises:
        ValueError: the run has no forecast step after step 0.
    """
    device = transformer_device(pipe)
    full, timer = StepTimes(device), StepTimer(device)
    source = Forecaster(predictor, tap, tuple(anchors), None, pipe)
    with threads(1):
        _timed_runs(pipe, full, source, timer, run)
        full.seconds, timer.times.seconds = [], []  # warm now
        rounds = 0
        while rounds < min_rounds:
            _timed_runs(pipe, full, source, timer, run)
            rounds = sum(step not in anchors for step, _ in timer.times.seconds)
            if not rounds:
                raise ValueError(
                    f"the anchors {list(anchors)} leave no step to forecast; nothing to time."
                )
    forecast = timer.times.median(lambda step: step not in anchors)
    whole = full.median(lambda step: True)
    if forecast is None or whole is None:
        raise ValueError("the run never reached a second step; nothing to time.")
    return StepCost(whole, forecast, rounds)


def anchor_step_ratios(
    pipe: Any, predictor: Predictor, tap: str, num_steps: int, run: Run, rounds: int = 15
) -> list[float]:
    """What an anchor step costs over a step of the pipeline alone, one ratio per pair of runs.

    Plain and hooked runs take turns in one process, on one torch thread and the same weights; a
    ratio is that of the medians over the steps of neighbouring runs.

    Args:
        pipe: the pipeline, with nothing attached.
        predictor: the forecaster, whose history is kept but never used.
        tap: `output`, `hidden` or `residual`.
        num_steps: steps of a run, all of them anchors.
        run: calls the pipeline once; the first call of each kind is not counted.
        rounds: pairs of runs.
    """
    device = transformer_device(pipe)
    full, timer = StepTimes(device), StepTimer(device)
    source = Forecaster(predictor, tap, tuple(range(num_steps)), None, pipe)
    ratios = []
    with threads(1):
        for _ in range(rounds + 1):
            full.seconds, timer.times.seconds = [], []
            _timed_runs(pipe, full, source, timer, run)
            plain, hooked = (t.median(lambda step: True) for t in (full, timer.times))
            if plain is None or hooked is None:
                raise ValueError("the run never reached a second step; nothing to time.")
            ratios.append(hooked / plain)
    return ratios[1:]


def _timed_runs(pipe: Any, full: StepTimes, source: Forecaster, timer: StepTimer, run: Run) -> None:
    """One run of the pipeline alone, one with forecasts."""
    clock = Clock(pipe.scheduler, full.open, lambda index, v, before, after: full.close(index))
    try:
        run()
    finally:
        clock.detach()
    session = Session(pipe, source, [timer])
    try:
        run()
    finally:
        session.detach()


def attach_overhead(
    pipe: Any, predictor: Predictor, tap: str, num_steps: int, run: Run, rounds: int = 15
) -> float:
    """Relative cost of the hooks: a run with every step an anchor over a plain run, minus one.

    Both kinds of run alternate, in changing order, on one torch thread; the result is the median
    over the pairs.

    Args:
        pipe: the pipeline, with nothing attached.
        predictor: the forecaster, whose history is kept but never used.
        tap: `output`, `hidden` or `residual`.
        num_steps: steps of the run.
        run: calls the pipeline once; the first call of each kind is not counted.
        rounds: pairs of runs.
    """
    device = transformer_device(pipe)

    def attached() -> float:
        session = Session(pipe, Forecaster(predictor, tap, tuple(range(num_steps))))
        try:
            run()  # proves the tap, once per attaching
            return _seconds(run, device)
        finally:
            session.detach()

    ratios = []
    with threads(1):
        for index in range(rounds + 1):
            if index % 2:
                hooked, plain = attached(), _seconds(run, device)
            else:
                plain, hooked = _seconds(run, device), attached()
            ratios.append(hooked / plain - 1)
    return median(ratios[1:])


def _seconds(run: Run, device: torch.device) -> float:
    started = now(device)
    run()
    return now(device) - started


def transformer_device(pipe: Any) -> torch.device:
    """Where a pipeline's transformer is."""
    return next(next(iter(transformers_of(pipe).values())).parameters()).device


def now(device: torch.device) -> float:
    """CPU seconds of this process; on a GPU, wall seconds once the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
