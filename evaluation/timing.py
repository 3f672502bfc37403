"""What a forecast step costs next to a full step, and what the hooks cost when nothing is forecast.

Times are CPU times on one torch thread, so that other work on the machine does not count; on a GPU
they are wall times of a synchronised device.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from foreseer.integration.forecaster import Forecaster
from foreseer.integration.host.clock import Clock
from foreseer.integration.host.denoisers import transformers_of
from foreseer.integration.observers import Observer, StepRecord
from foreseer.integration.session import Session
from foreseer.predictors.base import Predictor

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
