"""A predictor in a serving engine, which calls the network of a pipeline in a loop of its own."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from foreseer.checkpoints.spec import check_run
from foreseer.integration.forecast_model import forecast_model
from foreseer.integration.host.call import Call
from foreseer.predictors.base import Predictor


class ServedNetwork:
    """Runs a network at the predictor's anchors only, called as engines call it.

    Engines lay weights out in their own way, so that these are compared as `forecast_model` says.

    Args:
        predictor: a learned one on the tap `output`.
        network: the network.
        scheduler: the scheduler of diffusers' kind that makes the steps; `sigmas` are its own.

    Attributes:
        forecast: the function that decides, see `forecast_model`.

    Raises:
        PredictorMismatch: the predictor was fitted on another model, sampler or tap.
    """

    def __init__(self, predictor: Predictor, network: nn.Module, scheduler: Any) -> None:
        self.predictor = predictor
        self.network = network
        self.scheduler = scheduler
        self.forecast = forecast_model(_velocity, predictor, network, scheduler=scheduler)
        self.reset()

    def reset(self) -> None:
        """Forget the run; the next call begins one."""
        self.forecast.run.reset()
        self._sigmas: list[float] = []
        self._told: Any = None  # the tensor that `_sigmas` were read off

    def __call__(
        self, step: int, branch: int, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """One call of the network, computed or forecast.

        Args:
            step: of the scheduler.
            branch: guidance branch, numbered as in the pipeline of the fit.
            forward: the network's own forward.
            args: for it; the latents come first, or as `hidden_states`.
            kwargs: for it.

        Returns:
            A tensor, or a tuple of it where `return_dict` is false.

        Raises:
            PredictorMismatch: the request leaves the fit's grid, guidance, dtype or latents.
        """
        x_t = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        call, sigma = Call(self.network, forward, args, kwargs), self._sigma(step)
        out = self.forecast(x_t, sigma, branches=(branch,), call=call, own=sigma)
        return (out,) if kwargs.get("return_dict") is False else out

    def _sigma(self, step: int) -> float:
        if self._told is not self.scheduler.sigmas:
            self._told = self.scheduler.sigmas
            self._sigmas = self._told.tolist()  # once a run: it waits for the device
            check_run(self.predictor.spec, self.predictor, self._sigmas[:-1])
        return self._sigmas[step]


def _velocity(x_t: Tensor, sigma: float, call: Call, own: float) -> Tensor:
    """The velocity of a call of the network, however the call returns it.

    Args:
        x_t: its input.
        sigma: flow time to tell the network.
        call: the call.
        own: its flow time.
    """
    out = (call if sigma == own else call.at_time(own, sigma)).run()
    if isinstance(out, Tensor):
        return out
    velocity: Tensor = out[0] if isinstance(out, tuple) else out.sample
    return velocity
