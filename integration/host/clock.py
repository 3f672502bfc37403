"""The clock of a run: a scheduler instance, watched through `set_timesteps` and `step`.

Convention: sigma runs 1 to 0, x_t = (1 - sigma) x_0 + sigma eps, v = eps - x_0.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foreseer.integration.host.hook import replace_method, restore_method


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is one of flow matching, whose timesteps are 1000 sigma."""
    named = type(scheduler).__name__.startswith("FlowMatch")
    return named or bool(getattr(scheduler, "config", {}).get("use_flow_sigmas"))


def flow_sigmas(scheduler: Any) -> list[float]:
    """Flow time of every step of a scheduler after `set_timesteps`, without the terminal one.

    Flow schedulers hold it as `sigmas`. A variance-preserving x = a x_0 + b eps has flow time
    b / (a + b), since scaling x by 1 / (a + b) gives the convention above.

    Raises:
        ValueError: the scheduler has neither flow sigmas nor `alphas_cumprod`.
    """
    num_steps = len(scheduler.timesteps)
    if hasattr(scheduler, "sigmas") and is_flow(scheduler):
        return [float(sigma) for sigma in scheduler.sigmas[:num_steps]]
    if hasattr(scheduler, "alphas_cumprod"):
        index = scheduler.timesteps.long().cpu().clamp(0, len(scheduler.alphas_cumprod) - 1)
        alpha = scheduler.alphas_cumprod[index].double().sqrt()
        noise = (1 - scheduler.alphas_cumprod[index].double()).sqrt()
        return (noise / (alpha + noise)).tolist()
    raise ValueError(
        f"{type(scheduler).__name__} has neither flow sigmas nor alphas_cumprod, so its steps have "
        "no flow time; use a flow-matching scheduler, DDIM, DPM-Solver++ or UniPC."
    )


ROUNDING = 1e-2  # of a time that is given in bfloat16, relative


class Clock:
    """Watch one scheduler: `set_timesteps` opens a run, `step` closes a step.

    The wrappers live on the instance only, keep the signatures (pipelines inspect them), and deep
    copies of the scheduler do not tick.

    Args:
        scheduler: a diffusers scheduler instance.
        on_open: called with the sigmas of all steps of the scheduler's new list.
        on_step: called after each scheduler step with its index, counted from the first one that is
            evaluated, the model output, and the sample before and after it.
        check: called before each scheduler step; what it raises keeps the scheduler as it is.
    """

    def __init__(
        self,
        scheduler: Any,
        on_open: Callable[[list[float]], None],
        on_step: Callable[[int, Tensor, Tensor, Tensor], None],
        check: Callable[[], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.on_open = on_open
        self.on_step = on_step
        self.check = check
        self.sigmas: list[float] = []
        self.steps_done = 0
        self._unit = 0.0  # what the network is given per timestep, as its first call shows
        self._wrap()

    @property
    def index(self) -> int:
        """The step now being evaluated, counted from the first one that is."""
        return self.steps_done

    @property
    def begin(self) -> int:
        """Steps of the scheduler's list that are left out at its start, as in image-to-image.

        Pipelines tell after `set_timesteps`, before they call the network.
        """
        return getattr(self.scheduler, "begin_index", None) or 0

    def is_elsewhere(self, time: Tensor | None) -> bool:
        """Whether the network is given the time of another step than the one now being evaluated.

        It is given timesteps or a multiple of them, which the first step shows. A time that is no
        step's, as of a network that is given something else, says nothing.

        Args:
            time: what it is given; None where that is not known.
        """
        if time is None:
            return False
        given = float(time.flatten()[0])
        steps = self.scheduler.timesteps[self.begin :].tolist()
        if self.index == 0:
            self._unit = given / steps[0] if steps[0] else 0.0
        times = [self._unit * step for step in steps]
        expected = times[min(self.index, len(times) - 1)]
        off = abs(given - expected) > ROUNDING * abs(expected)
        return off and any(abs(given - each) <= 1e-4 * abs(each) for each in times)

    def _wrap(self) -> None:
        scheduler = self.scheduler
        parameters = step_signature(scheduler)

        def opening(set_timesteps: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = set_timesteps(*args, **kwargs)
            self.steps_done = 0
            self.sigmas = flow_sigmas(scheduler)
            self.on_open(self.sigmas)
            return result

        def closing(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            given = parameters.bind(scheduler, *args, **kwargs).arguments if args else kwargs
            if self.check is not None:
                self.check()
            index = self.index
            if self.sigmas and self.steps_done == 0:
                self._check_start(self.begin, float(given["timestep"]))
            result = step(*args, **kwargs)
            self.steps_done += 1
            self.on_step(index, given["model_output"], given["sample"], step_output(result))
            return result

        self._replaced = {
            "set_timesteps": replace_method(scheduler, "set_timesteps", opening),
            "step": replace_method(scheduler, "step", closing),
        }

    def _check_start(self, index: int, found: float) -> None:
        """Raise unless the run's first step is the one the scheduler says it is."""
        expected = float(self.scheduler.timesteps[index])
        if found != expected:
            raise ValueError(
                f"step {index} of the run has timestep {expected:g}, found {found:g}: the pipeline "
                f"left out steps without telling {type(self.scheduler).__name__} by "
                "set_begin_index; they cannot be counted."
            )

    def detach(self) -> None:
        """Give the scheduler its own methods back."""
        for name, replaced in self._replaced.items():
            restore_method(self.scheduler, name, replaced)


class Pace:
    """Whether the network's calls keep to the clock: all calls of one step are given one time.

    Times are compared only where a step has more calls than any before it: reading one waits for
    the device.

    Args:
        elsewhere: words for calls that do not, see `Host.steps_elsewhere`.
    """

    def __init__(self, elsewhere: str) -> None:
        self.elsewhere = elsewhere
        self.calls = 0  # of the step in progress
        self._most = 0  # of a step so far
        self._time: Tensor | None = None

    def call(self, time: Tensor | None) -> None:
        """The network is called.

        Args:
            time: what it is given; None where that is not known.

        Raises:
            ValueError: the calls before were given another, and no step is over since.
        """
        if self.calls == 0:
            self._time = time
        elif self.calls >= self._most and time is not None and self._time is not None:
            before, now = self._time.unique(), time.unique()
            if not torch.equal(before, now):
                raise ValueError(
                    f"the network is called at the time {_in_words(now)} after "
                    f"{_in_words(before)}, but {self.elsewhere}"
                )
        self.calls += 1

    def step(self) -> None:
        """A step is over."""
        self._most, self.calls = max(self._most, self.calls), 0


def _in_words(times: Tensor) -> str:
    values = times.tolist()
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def step_signature(scheduler: Any) -> inspect.Signature:
    """How a scheduler's `step` takes its arguments, `self` first; a wrapper around it may not say.

    Raises:
        ValueError: no class it is made of has a `step` that names what it takes.
    """
    for owner in type(scheduler).__mro__:
        if "step" in vars(owner):
            signature = inspect.signature(vars(owner)["step"])
            if {"model_output", "timestep", "sample"} <= signature.parameters.keys():
                return signature
    raise ValueError(
        f"{type(scheduler).__name__} has no step(model_output, timestep, sample), by which steps "
        "are counted."
    )


def step_output(result: Any) -> Tensor:
    """The sample a scheduler's `step` returned, in either of its return forms."""
    return result[0] if isinstance(result, tuple) else result.prev_sample
