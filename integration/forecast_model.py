"""Forecasting without a pipeline: any function `f(x, sigma, **kw)`, as samplers call it.

Of a flow model x = (1 - sigma) x_0 + sigma eps and the network's output is F = v = eps - x_0; of
k-diffusion's x = x_0 + sigma eps it is F = eps. In both F = (x - x_0) / sigma, so what a function
returns as denoised is turned into F and back by the same line.
"""

import functools
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foreseer.checkpoints.spec import VALUES, PredictorMismatch, PredictorSpec, check_host
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.forecasting import checked_forecaster, one_of
from foreseer.integration.host.call import Call, prediction
from foreseer.integration.host.expert import Expert
from foreseer.integration.host.fingerprint import host_fingerprint, kept_values_digest
from foreseer.integration.host.hook import refuse_other_caches, replace_method, restore_method
from foreseer.integration.host.layout import Layout
from foreseer.integration.host.taps import own
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.integration.memory import check_budget
from foreseer.integration.report import Report
from foreseer.integration.sigma_run import (
    SigmaRun,
    check_first_time,
    flow_time,
    grid_of,
    kind_of,
    one_sigma,
)
from foreseer.predictors.base import Predictor


class Reader:
    """What enters the head of a network when a function calls it.

    Args:
        model: the network.
        predictor: reads the hidden state.

    Raises:
        UnsupportedHost: there is no network to take it from.
        ValueError: it has a cache.
    """

    def __init__(self, model: nn.Module | None, predictor: Predictor) -> None:
        if model is None or not hasattr(model, "config"):
            raise UnsupportedHost(
                f"{type(predictor).__name__} reads the hidden state that enters the "
                "head, which a function does not show; pass model=, the diffusers transformer that "
                "it calls, or use a predictor without a readout, such as L2P."
            )
        refuse_other_caches(model)
        self.model = model
        self.expert = Expert(0, "transformer", model, frozenset({"output", "hidden"}))

    def __call__(
        self, compute: Callable[[], Tensor], key: Hashable, layouts: dict[Hashable, Layout]
    ) -> tuple[Tensor, Tensor]:
        """What a function returns and what entered the head of the network meanwhile.

        Args:
            compute: the function.
            key: of the call.
            layouts: where the tokens of the head lie in the output, by call; added to.

        Raises:
            UnsupportedHost: it did not call the network once, or returned another shape.
        """
        calls: list[tuple[Tensor, tuple[int, ...]]] = []
        through = functools.partial(self._call, calls, key, layouts)
        replaced = replace_method(self.model, "forward", through)
        try:
            out = compute()
        finally:
            restore_method(self.model, "forward", replaced)
        if len(calls) != 1 or calls[0][1] != tuple(out.shape):
            shapes = [shape for _, shape in calls]
            raise UnsupportedHost(
                f"the function returned {tuple(out.shape)} and its network was called for "
                f"{shapes}, "
                "expected one call with that output: what is read off the hidden state is laid out "
                "like it. Guide and unpack outside of the function."
            )
        return out, calls[0][0]

    def _call(
        self,
        calls: list[tuple[Tensor, tuple[int, ...]]],
        key: Hashable,
        layouts: dict[Hashable, Layout],
        forward: Callable,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        call = Call(self.model, forward, args, kwargs)
        if not self.expert.proven:
            self.expert.prove(call)
        with self.expert.capturing() as captured:
            output = call.run()
        sample, hidden = prediction(output), own(captured["hidden"])
        if key not in layouts:
            layouts[key] = self.expert.layout(call, hidden, sample)
        calls.append((hidden, tuple(sample.shape)))
        return output


def forecast_model(
    model_fn: Callable[..., Tensor],
    predictor: Predictor | Mapping[int, Predictor] | str | os.PathLike[str],
    model: nn.Module | None = None,
    returns: str = "v",
    fitted_on: str | None = None,
    sigmas: Sequence[float] | Tensor | None = None,
    anchors: Sequence[int] | None = None,
    guidance_scale: float | None = None,
    scheduler: Any = None,
    memory_budget: int | None = None,
    evaluations: int | None = None,
) -> "ForecastModel":
    """A model function that runs its network at the anchors only: `f(x, sigma, branches, **kw)`.

    For samplers of k-diffusion and loops written by hand. Steps are found by sigma; a sigma that
    rises again begins a new run. `branches` are the guidance branches that the rows of a call
    belong to, numbered as in the pipeline of the fit: `(0,)` if left out, `(0, 1)` of a call with
    both, `(1,)` of the second of two calls.

    Args:
        model_fn: `f(x, sigma, **kw)`; sigma has a value per sample.
        predictor: one on the tap `output`, or the folder, `zoo:<name>` or hub name of one.
        model: the network that `model_fn` calls, whose weights are compared with the fit's (see
            `any_layout` for classes other than diffusers'); a learned predictor needs it. None
            takes `model_fn`, where it is a module.
        returns: what `model_fn` returns: `v`, `eps` or `denoised` (x_0).
        fitted_on: what the network of the fit returned, `v` or `eps`; None reads it off the fit's
            scheduler where that is a flow scheduler, else off `returns`. Sigma is flow time (1 to
            0) for `v`, and k-diffusion's noise over signal for `eps`.
        sigmas: those of the steps, with or without the 0 at the end; None takes the fit's.
        anchors: steps at which the network runs; None takes the predictor's own.
        guidance_scale: what the loop guides with; None where it does not say, and is not compared.
        scheduler: of diffusers, where that makes the steps; None where none is to be compared.
        memory_budget: bytes that cached features may take; None for what the device has.
        evaluations: which of several predictors.

    Returns:
        The function; its `report()` tells what the latest run did.

    Raises:
        PredictorMismatch: the predictor was fitted on another model, sampler, grid or tap.
        UnsupportedHost: it reads hidden states and `model` is no module that shows them.
        ValueError: no anchors, sigmas or kind of output are known.
    """
    check_budget(memory_budget)
    predictor = one_of(predictor, evaluations)
    if model is None and isinstance(model_fn, nn.Module):
        model = model_fn
    kind = kind_of(predictor.spec, returns, fitted_on)
    check_first_time(predictor, kind)
    forecaster = output_forecaster(predictor, anchors)
    forecaster.memory_budget = memory_budget
    forecaster.settings = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    reader = Reader(model, predictor) if predictor.reads else None
    check = functools.partial(check_model, predictor, model, scheduler)
    run = SigmaRun(forecaster, grid_of(predictor, sigmas, kind), check)
    run.check()
    return ForecastModel(model_fn, run, returns, kind, reader)


class ForecastModel:
    """See `forecast_model`, which makes it.

    Args:
        model_fn: the function.
        run: what decides and keeps the state.
        returns: what the function returns: `v`, `eps` or `denoised`.
        kind: what is forecast: `v` or `eps`.
        reader: what takes the hidden state out of a call; None where nothing reads it.
    """

    def __init__(
        self,
        model_fn: Callable[..., Tensor],
        run: SigmaRun,
        returns: str,
        kind: str,
        reader: Reader | None,
    ) -> None:
        self.model_fn = model_fn
        self.run = run
        self.returns = returns
        self.kind = kind
        self.reader = reader

    def __call__(
        self, x: Tensor, sigma: Tensor | float, branches: Sequence[int] = (0,), **kwargs: Any
    ) -> Tensor:
        """What the function returns, computed at an anchor and forecast elsewhere.

        Args:
            x: the network's input, batch first.
            sigma: per sample, or one for all.
            branches: guidance branch of each equal part of the rows.
            kwargs: for the function.

        Raises:
            PredictorMismatch: the loop leaves the fit's grid, guidance, dtype or latents.
            ValueError: an output is not finite.
        """
        try:
            return self._call(x, sigma, tuple(branches), kwargs)
        except BaseException:
            self.run.reset()
            raise

    def _call(
        self, x: Tensor, sigma: Tensor | float, branches: tuple[int, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        started = time.perf_counter()
        value, key = one_sigma(sigma), branches
        step = self.run.enter(flow_time(value, self.kind), [key], branches, x)
        ran = self.run.computes([key], step)
        if ran:
            told = self.run.forecaster.told(step)
            given = sigma if told is None else told
            if told is not None and isinstance(sigma, Tensor):
                given = torch.full_like(sigma, told)
            out, hidden = self._compute(x, given, key, kwargs)
            feature = self._feature(out, x, value if told is None else told)
            self.run.observe(key, step, feature, hidden)
            if told is not None:
                out = self._returned(feature, x, value)
        else:
            out = self._returned(self.run.forecast(key, step), x, value)
        self.run.leave(step, x, ran, time.perf_counter() - started)
        return out

    def _compute(
        self, x: Tensor, sigma: Tensor | float, key: tuple[int, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        compute = functools.partial(self.model_fn, x, sigma, **kwargs)
        if self.reader is None:
            return compute(), None
        return self.reader(compute, key, self.run.layouts)

    def _feature(self, out: Tensor, x: Tensor, sigma: float) -> Tensor:
        return (x - out) / sigma if self.returns == "denoised" else out

    def _returned(self, feature: Tensor, x: Tensor, sigma: float) -> Tensor:
        return x - sigma * feature if self.returns == "denoised" else feature

    def report(self) -> Report:
        """Which steps of the latest run ran and which were forecast, state bytes, time of each."""
        return self.run.report

    def __repr__(self) -> str:
        """What it wraps, and what the latest run did."""
        name = getattr(self.model_fn, "__name__", type(self.model_fn).__name__)
        return f"<ForecastModel of {name}: {str(self.run.report).splitlines()[0]}>"


def output_forecaster(predictor: Predictor, anchors: Sequence[int] | None) -> Forecaster:
    """A forecaster of a network's output, for a loop that shows nothing else.

    Args:
        predictor: see `forecast_model`.
        anchors: see `forecast_model`.

    Raises:
        PredictorMismatch: the predictor forecasts what lies inside the network, or has other
            anchors.
        ValueError: no anchors are known.
    """
    spec: PredictorSpec | None = predictor.spec
    if spec is not None and spec.tap != "output":
        raise PredictorMismatch(
            f"the predictor was fitted on the tap {spec.tap!r}, which lies inside the network; a "
            "model function shows its output only. Fit one with tap='output', or use forecasting "
            "on a pipeline."
        )
    return checked_forecaster(None, predictor, anchors, "output")


def any_layout(spec: PredictorSpec, model: nn.Module) -> dict[str, Any]:
    """What of a network's fingerprint can be told where its weights are laid out in another way.

    Args:
        spec: of the predictor, which tells a digest of the weights' values, or their number only.
        model: the network.
    """
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    if VALUES in spec.host and found["parameters"] == spec.host.get("parameters"):
        found[VALUES] = kept_values_digest(model)
    return found


def check_model(predictor: Predictor, model: nn.Module | None, scheduler: Any = None) -> None:
    """Raise unless a network is the one a learned predictor was fitted on, as far as can be told.

    Args:
        predictor: the predictor; formulas go with any network.
        model: the network.
        scheduler: see `forecast_model`.

    Raises:
        PredictorMismatch: it is another, or the scheduler is.
        ValueError: a learned predictor, and no network to compare.
    """
    if predictor.spec is None:
        return
    if model is None:
        raise ValueError(
            "a learned predictor is fitted on one model; pass model=, the network that the "
            "function calls, so that its weights can be compared with the fit's."
        )
    model = getattr(model, "_orig_mod", model)  # a compiled one
    if hasattr(model, "config") and not isinstance(model.config, type(None)):
        check_host(predictor.spec, host_fingerprint(model), scheduler)
    else:
        check_host(predictor.spec, any_layout(predictor.spec, model), scheduler)
