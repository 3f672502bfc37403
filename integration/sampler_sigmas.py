"""What a sampler's sigmas and a model function's output mean, in flow time and the fit's terms."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foreseer.checkpoints.spec import PredictorSpec
from foreseer.predictors.base import Predictor

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
