"""A run without a scheduler: a forecaster at work on a loop that is known by its sigmas.

What evaluates a network through a plain function (k-diffusion, ComfyUI, loops of original
repositories) tells it sigma and nothing else. A sigma below the last one is the next step, the same
one another call of that step, and one above it begins a new run.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from foreseer.checkpoints.spec import SIGMA_TOLERANCE, PredictorMismatch, PredictorSpec, off_grid
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.host.layout import Layout
from foreseer.integration.host.taps import own
from foreseer.integration.memory import check_memory
from foreseer.integration.observers import CallRecord, StepRecord
from foreseer.integration.policy import Action
from foreseer.integration.report import Report
from foreseer.predictors.base import Predictor, Step

RETURNS = ("v", "eps", "denoised")
FLOW = "FlowMatch"  # how the names of diffusers' flow schedulers begin


def one_sigma(sigma: Tensor | float) -> float:
    """The sigma of a call, which gives it per sample.

    Raises:
        ValueError: samples of one call have several.
    """
    values = torch.as_tensor(sigma).flatten().tolist()
    if not values or any(value != values[0] for value in values):
        raise ValueError(
            f"the samples of one call are at the sigmas {values}, expected one sigma for all: "
            "steps are counted by it. Draw samples at different noise in calls of their own."
        )
    return float(values[0])


def without_end(sigmas: Sequence[float] | Tensor) -> tuple[float, ...]:
    """The sigmas of the steps of a list that ends with 0, or of one that leaves the 0 out."""
    values = tuple(float(sigma) for sigma in sigmas)
    return values[:-1] if values and values[-1] == 0.0 else values


def grid_of(
    predictor: Predictor, sigmas: Sequence[float] | Tensor | None, kind: str
) -> tuple[float, ...]:
    """Flow time of every step.

    Args:
        predictor: its fit's grid is taken where none is given.
        sigmas: as the sampler has them.
        kind: `v` or `eps`.

    Raises:
        ValueError: none are given and there is no fit.
    """
    if sigmas is not None:
        return tuple(flow_time(sigma, kind) for sigma in without_end(sigmas))
    if predictor.spec is None:
        raise ValueError("this predictor has no grid of its own; pass sigmas, those of the steps.")
    return tuple(predictor.spec.sigmas)


def flow_time(sigma: float, kind: str) -> float:
    """Flow time of a sampler's sigma: itself for `v`, sigma / (1 + sigma) for `eps`.

    The second is b / (a + b) of x = a x_0 + b eps at noise over signal b / a.
    """
    return sigma if kind == "v" else sigma / (1 + sigma)


def kind_of(spec: PredictorSpec | None, returns: str, fitted_on: str | None) -> str:
    """What is forecast, `v` or `eps`.

    Raises:
        ValueError: it is not known, or the function returns the other.
    """
    if returns not in RETURNS or fitted_on not in (None, "v", "eps"):
        raise ValueError(
            f"returns is {returns!r} and fitted_on {fitted_on!r}, expected returns to be one of "
            f"{list(RETURNS)} and fitted_on 'v' or 'eps'."
        )
    flow = spec is not None and spec.scheduler.startswith(FLOW)
    kind = fitted_on or ("v" if flow else returns)
    if kind == "denoised":
        raise ValueError(
            "the function returns denoised samples, which do not tell what the network of the fit "
            "returned; pass fitted_on='v' of a flow model, or 'eps'."
        )
    if returns not in (kind, "denoised"):
        raise ValueError(
            f"the function returns {returns}, the predictor forecasts {kind}: at sigma 1 one does "
            f"not tell the other. Return {kind}, or denoised."
        )
    return kind


def check_first_time(predictor: Predictor, kind: str) -> None:
    """Raise where another time at step 0 would be another input too: `eps` are scaled by it.

    Args:
        predictor: the predictor.
        kind: `v` or `eps`.

    Raises:
        ValueError: it tells another time, and eps are forecast.
    """
    if predictor.first_time is not None and kind != "v":
        raise ValueError(
            "the predictor tells the network another time at step 0, and a function that returns "
            "eps scales its input by it; use a pipeline, or fit with first_times=0."
        )


class SigmaRun:
    """A forecaster and the run it is in, step by step.

    Args:
        forecaster: decides and keeps the state.
        sigmas: flow time of every step, 1 to 0, without the end.
        check: called at the start of every run; what it raises keeps the run from starting.

    Attributes:
        report: what the latest run did.
    """

    def __init__(
        self, forecaster: Forecaster, sigmas: Sequence[float], check: Callable[[], None]
    ) -> None:
        self.forecaster = forecaster
        self.sigmas = tuple(sigmas)
        self.check = check
        self.report = Report()
        self.reset()

    def reset(self) -> None:
        """Forget the run; the next call begins one."""
        self.forecaster.forget()
        self._place: int | None = None  # of the step in progress on the grid
        self._first = 0  # step of the grid that the run began with
        self._calls: dict[Hashable, tuple[int, ...]] = {}  # branches of the step's calls
        self._before = 0  # calls of the step before it
        self.layouts: dict[Hashable, Layout] = {}  # of the run's calls

    def enter(
        self, sigma: float, keys: Sequence[Hashable], branches: Sequence[int], x_t: Tensor
    ) -> Step:
        """The step a call belongs to, once everything before it is closed.

        Args:
            sigma: flow time the network is told, 1 to 0.
            keys: what tells the call's histories apart where several hold the same branches; a
                step has each of them once, of one part of the rows or of all.
            branches: branch number of each equal part of its rows.
            x_t: the network's input, shaped like the latents of a pipeline.

        Raises:
            PredictorMismatch: the sigma, the branches or the latents are not the fit's.
            ValueError: the run does not go down the grid step by step.
        """
        place = min(range(len(self.sigmas)), key=lambda i: abs(self.sigmas[i] - sigma))
        if abs(self.sigmas[place] - sigma) > SIGMA_TOLERANCE:
            raise PredictorMismatch(off_grid(place, sigma, self.sigmas[place]))
        again = place == self._place and not set(keys).isdisjoint(self._calls)
        if self._place is None or place < self._place or (again and place == self._first):
            self._begin(place)
        elif again or place > self._place:
            self._next(place, sigma, x_t)
        alone = len(keys) == len(branches)
        self._calls |= {k: (branches[i],) if alone else tuple(branches) for i, k in enumerate(keys)}
        index, sigmas = place - self._first, self.sigmas[self._first :]
        return Step(index, sigma, len(sigmas), tuple(branches), x_t=x_t, sigmas=sigmas)

    def _begin(self, place: int) -> None:
        self.reset()
        self.check()
        self.report.open()
        self.forecaster.open(list(self.sigmas[place:]))
        self.report.num_steps = len(self.sigmas) - place
        self._place = self._first = place
        self._began = time.perf_counter()

    def _next(self, place: int, sigma: float, x_t: Tensor) -> None:
        assert self._place is not None  # a run is under way
        self._close(x_t)
        expected = self._place + 1
        if place != expected:
            if expected == len(self.sigmas):
                raise ValueError(
                    f"the run goes on after its {len(self.sigmas)} steps, at sigma {sigma:.6f}; "
                    "use a sampler with one evaluation per step, such as Euler."
                )
            raise PredictorMismatch(off_grid(expected, sigma, self.sigmas[expected]))
        self._place, self._before, self._calls = place, len(self._calls), {}

    def _close(self, x_t: Tensor) -> None:
        assert self._place is not None  # a run is under way
        index = self._place - self._first
        source = self.forecaster
        settings = source.settings
        source.on_step(StepRecord(index, self.sigmas[self._first :], settings, x_t, x_t, x_t))
        check_memory([source], source.memory_budget, self.report, index, x_t.device)
        now = time.perf_counter()
        self.report.steps.append(now - self._began)
        self._began = now

    def computes(self, keys: Sequence[Hashable], step: Step) -> bool:
        """Whether the network runs: at anchors, and where a call has none yet."""
        parts = [(replace(step, branches=self._calls[key]), key) for key in keys]
        known = all(self.forecaster.knows(part, key) for part, key in parts)
        return not known or self.forecaster.schedule.before(step) is Action.RUN

    def observe(
        self, key: Hashable, step: Step, feature: Tensor, hidden: Tensor | None = None
    ) -> None:
        """Keep what the network computed.

        Args:
            key: of the history.
            step: the step, with the branches of this feature.
            feature: the network's output.
            hidden: what entered its head, where the predictor reads it.

        Raises:
            PredictorMismatch: the feature is not of the fit's dtype.
            ValueError: it is not finite, or has another shape than before.
        """
        taps = {"output": own(feature)}
        if hidden is not None:
            taps["hidden"] = hidden
        layout = self.layouts.get(key)
        self.forecaster.keep(CallRecord(step, taps, layout=layout, slot=key))

    def forecast(self, key: Hashable, step: Step) -> Tensor:
        """The network's output at a step that is none of the anchors."""
        self.forecaster.branches.update(step.branches)
        return self.forecaster.forecast(step, key)

    def leave(self, step: Step, x_t: Tensor, ran: bool, seconds: float) -> None:
        """A call is over; the run is too, once the last step has had the calls of the one before.

        Args:
            step: the call's.
            x_t: see `enter`.
            ran: whether the network ran.
            seconds: that the call took.
        """
        self.report.count(step.index, "anchor" if ran else "forecast", seconds)
        if step.index == step.num_steps - 1 and len(self._calls) >= max(1, self._before):
            self._close(x_t)
            self.reset()
