"""The clock of a loop written by hand: the steps of a run, one after the other.

What a loop does between two calls of its module is its own: the input of the next call is the state
that the step came to. A run is known by the thread or task that took its latest step.
"""

import contextvars
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreseer.integration.host.call import prediction
from foreseer.integration.host.caller import Caller
from foreseer.integration.host.taps import own
from foreseer.integration.host.trunk import UnsupportedHost, first_tensor


class LoopClock:
    """Stands where a scheduler is expected, for a loop whose steps `Steps` counts.

    Attributes:
        sigmas: flow time of every step; it rises in an inversion, else it falls.
        timesteps: the same as a tensor.
    """

    config: Mapping[str, Any] = {"use_flow_sigmas": True}

    def __init__(self) -> None:
        self.sigmas: list[float] = []
        self.timesteps = torch.zeros(0)

    def set_timesteps(self, sigmas: Sequence[float]) -> None:
        """A run begins."""
        self.sigmas = list(sigmas)
        self.timesteps = torch.tensor(self.sigmas, dtype=torch.float64)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, after: Tensor
    ) -> tuple[Tensor]:
        """A step is over, which took the sample to `after`."""
        return (after,)


_now: contextvars.ContextVar[Mapping[int, "Steps"] | None] = contextvars.ContextVar(
    "foreseer_steps", default=None
)
"""The run that this thread or task has taken its latest step in, by the host's id."""


def steps_of(host: Any) -> "Steps | None":
    """The run of a host whose loop the code now running is in; None outside of all."""
    steps = (_now.get() or {}).get(id(host))
    return steps if steps is not None and steps.host is host and steps.is_open else None


class Steps:
    """The steps of one run, see `ModuleHost.steps`; iterating gives the times.

    Attributes:
        sigmas: flow time of every step; it rises in an inversion, else it falls.
        index: the step under way.
        done: steps that are over.
        token: lives as long as the run may go on.
    """

    def __init__(self, host: Any, times: Any, key: Hashable, inversion: bool) -> None:
        self.host = host
        self.key = key
        self.times, self.sigmas = read_times(times, inversion)
        self.clock = host.scheduler if key is None else LoopClock()
        self.is_open = False
        self.index, self.done, self.closed = -1, 0, 0
        self.token: Caller | None = None
        self._outer: Steps | None = None  # the run in whose loop this one is opened
        self._place: int | str | None = None  # where the module is given the sample
        self._alike: dict[int | str | None, Tensor] = {}  # what may be the sample, at step 0
        self._calls = 0  # of the step under way
        self._v: Tensor | None = None
        self._given: Tensor | None = None  # the sample, as the first call of the step was given it
        self._before: Tensor | None = None  # and as it was then

    @property
    def told(self) -> str:
        """Which run this is, in words."""
        return "" if self.key is None else f" under the key {self.key!r}"

    @property
    def rows(self) -> int:
        """Rows of the latest call of the module."""
        return 0 if self._v is None else len(self._v)

    def __enter__(self) -> "Steps":
        """Open the run.

        Raises:
            ValueError: it was run before, or one of this key is open.
        """
        if self.token is not None or self.index >= 0:
            raise ValueError("these steps were gone through before; ask the host for new ones.")
        self.host.open(self)
        self._outer = steps_of(self.host)
        self.is_open, self.token = True, Caller()
        self._go_on()
        try:
            self.clock.set_timesteps(self.sigmas)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Close the run; one that was left early or broken off is forgotten."""
        whole = kind is None and self.done == len(self.sigmas)
        try:
            if whole and not self.host.is_sampling:
                assert self._v is not None and self._before is not None  # every step had a call
                same = self._v.shape == self._before.shape
                self.finish(self._v if same else self._before)
        finally:
            self._leave()

    def __iter__(self) -> Iterator[Any]:
        """The times, one after the other.

        Raises:
            ValueError: the run is not open, or a step had no call of the module.
        """
        if not self.is_open or self.index >= 0:
            raise ValueError(
                "steps are gone through once, inside of their `with`: with host.steps(times) as "
                "steps: for t in steps: ..."
            )
        for index, time in enumerate(self.times):
            if index:
                self._over()
            self.index = index
            self._go_on()
            yield time
        self._over()

    def called(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """The module is about to be called; what it is given tells what the last step came to."""
        if self.index < 0 or self.done == len(self.sigmas):
            where = "before its first step" if self.index < 0 else "after its last step"
            raise ValueError(
                f"{type(self.host.module).__name__} is called {where} of a run of "
                f"{len(self.sigmas)} steps{self.told}; the loop calls it inside of `for t in "
                "steps:`, once or more per step."
            )
        if self._calls:
            self._check_turn(_at(self._place, args, kwargs))
        elif self.done > self.closed:
            self._choose_place(args, kwargs)
            self._given = _at(self._place, args, kwargs)
            after = own(self._given.detach())  # loops change it in place
            self.finish(after)
            self._before = after

    def answered(self, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """The module was called."""
        self._calls += 1
        if self._calls > 1:
            return
        self._v = own(prediction(output).detach())
        if self._place is None:
            places = _places_of(args, kwargs, self._v)
            self._place = places[0]
            self._given = _at(self._place, args, kwargs)
            self._alike = {place: own(_at(place, args, kwargs).detach()) for place in places}
            self._before = self._alike[self._place]

    def _choose_place(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Of several tensors that look like the sample, take the first that the step has moved."""
        alike, self._alike = self._alike, {}
        if len(alike) > 1:
            moved = (p for p, held in alike.items() if not held.equal(_at(p, args, kwargs)))
            self._place = next(moved, self._place)
            self._before = alike[self._place]

    def _check_turn(self, given: Tensor) -> None:
        """Raise where another call of this step is given the sample of another run's step."""
        others = (steps for steps in self.host.others_than(self) if steps._given is given)
        if given is not self._given and (other := next(others, None)) is not None:
            raise ValueError(
                f"step {other.index} of the run{other.told or ' without a key'} was not over when "
                f"the one{self.told or ' without a key'} took a step, and goes on now. Runs in one "
                "thread take turns between steps: make all calls of a step, those of guidance too, "
                "before another run goes on."
            )

    def finish(self, after: Tensor) -> None:
        """Tell the clock of a step that is over.

        Args:
            after: what the step came to.
        """
        index, self.closed, was_open = self.closed, self.done, self.is_open
        assert self._v is not None and self._before is not None  # the step had a call
        self.is_open = True
        self._go_on()
        try:
            self.clock.step(
                model_output=self._v,
                timestep=self.sigmas[index],
                sample=self._before,
                after=after,
            )
        finally:
            self.is_open = was_open

    def _over(self) -> None:
        if not self._calls:
            raise ValueError(
                f"step {self.index} of a run of {len(self.sigmas)} is over without a call of "
                f"{type(self.host.module).__name__}{self.told}; give one time per call of the "
                "module, and let nothing come between `for t in steps:` and the call."
            )
        self._calls = 0
        self.done += 1

    def _go_on(self) -> None:
        held = _now.get() or {}
        if held.get(id(self.host)) is not self:
            _now.set({**held, id(self.host): self})

    def _leave(self) -> None:
        self.is_open, self._given = False, None
        self.host.close(self)
        if not self.host.is_sampling:
            self.token = None
        held = dict(_now.get() or {})
        if held.get(id(self.host)) is self:
            del held[id(self.host)]
            if self._outer is not None and self._outer.is_open:
                held[id(self.host)] = self._outer
            _now.set(held)
        self._outer = None


def read_times(times: Any, inversion: bool = False) -> tuple[Any, list[float]]:
    """What a loop is given step after step, and flow time of every step.

    Args:
        times: falling in (0, 1], which is flow time itself; rising in [0, 1), which is 1 - flow
            time; or a number of steps n, of which step i is given i, at flow time 1 - i / n.
        inversion: whether the run goes from a sample to noise: rising times are flow time itself
            then, falling ones 1 - flow time, and step i of n lies at i / n.

    Raises:
        ValueError: it is something else.
    """
    times = list(times) if isinstance(times, Iterator) else times
    if isinstance(times, Tensor | np.ndarray) and not times.ndim:
        times = times.item()
    if isinstance(times, Integral) and not isinstance(times, bool):
        if times < 1:
            raise ValueError(f"found {times} steps, expected at least 1.")
        passed = [i / int(times) for i in range(int(times))]
        return range(int(times)), passed if inversion else [1 - share for share in passed]
    try:
        values = [float(t) for t in (times.tolist() if isinstance(times, Tensor) else times)]
    except (TypeError, ValueError):
        values = []
    pairs = list(pairwise(values))
    if values and all(a > b for a, b in pairs) and values[0] <= 1 and values[-1] > 0:
        return times, [1 - value for value in values] if inversion else values
    if values and all(a < b for a, b in pairs) and values[0] >= 0 and values[-1] < 1:
        return times, values if inversion else [1 - value for value in values]
    shown = f"{values[:3]} ... {values[-1]}" if len(values) > 4 else f"{values or times}"
    raise ValueError(
        f"the times are {shown}, expected one per call of the module: falling in (0, 1], or rising "
        f"in [0, 1), without the end of the last step{_turn_of(values)}. Of other times (a "
        "scheduler's timesteps) give their number, host.steps(len(times)), or the scheduler, "
        "foreseer.host(module, scheduler=...)."
    )


def _turn_of(values: Sequence[float]) -> str:
    """Where times turn, in words: two phases in one list are two runs."""
    falls = [a > b for a, b in pairwise(values)]
    turns = [step for step, (a, b) in enumerate(pairwise(falls), start=1) if a != b]
    if len(turns) != 1:
        return ""
    first = turns[0]
    return (
        f"; the first {first + 1} of these {len(values)} go one way and the others back: phases, "
        "such as inversion and editing, are runs of their own, each in a `with host.steps(...)`"
    )


def _places_of(args: tuple, kwargs: dict[str, Any], v: Tensor) -> list[int | str]:
    """Where a module may be given the sample: tensors of its output's shape, else the first.

    Raises:
        UnsupportedHost: it is given no tensor.
    """
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    tensors = [(place, value) for place, value in given if isinstance(value, Tensor)]
    alike = [place for place, value in tensors if value.shape == v.shape]
    found = first_tensor(args, kwargs)
    if found is None:
        raise UnsupportedHost(
            "the module is called without a tensor among its arguments, so its sample is not "
            "known; call it as net(x, t, ...)."
        )
    return alike or [next(place for place, value in tensors if value is found)]


def _at(place: int | str | None, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The sample.

    Raises:
        ValueError: it is not where it was before.
    """
    found = args[place] if isinstance(place, int) and place < len(args) else kwargs.get(str(place))
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the module was given its sample as argument {place}, in this call there is "
            f"{type(found).__name__}; call it alike at every step."
        )
    return found
