"""Any torch module in a loop of somebody's own: `foreseer.host(module)`, and the clock of a loop.

    host = fs.host(net, blocks="layers", head="norm")
    with fs.forecasting(host, predictor) as run, run.steps(times) as steps:
        for t in steps:
            x = x + dt * net(x, t)

A loop is told apart from others by the `steps` that it goes through, so no code of it is looked at.
What it does between two calls of the network is its own: the input of the next call is the state
that the step came to.
"""

import contextvars
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foreseer.integration.host.call import prediction
from foreseer.integration.host.caller import Caller
from foreseer.integration.host.hook import ReplacedMethod, replace_method, restore_method
from foreseer.integration.host.hosts import Host, is_compiled
from foreseer.integration.host.trunk import Given, UnsupportedHost, first_tensor, give_trunk

Sample = Callable[[dict[str, Any], Any], Tensor]
"""One run: inputs by name, a row per sample, and their generator (of several a list), to a result.
"""


class LoopClock:
    """Stands where a scheduler is expected, for a loop whose steps `Steps` counts.

    Attributes:
        sigmas: flow time of every step, 1 to 0.
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


class ModuleHost(Host):
    """A module and the loop it is called in; see `host`.

    Attributes:
        module: the network.
        sample: see `host`; may be set later.
    """

    def __init__(
        self,
        module: nn.Module,
        given: Given,
        sample: Sample | None,
        scheduler: Any,
        branches: int,
    ) -> None:
        self.given = self
        self.module = module
        self.sample = sample
        self.branches = branches
        self.in_loop = scheduler is None
        self.scheduler = LoopClock() if scheduler is None else scheduler
        self.by_hand = not self.in_loop
        self._lock = threading.Lock()
        self._open: dict[Hashable, Steps] = {}
        self._replaced: ReplacedMethod | None = None
        self._runs: list[Steps] | None = None  # opened by the call of `sample` under way
        give_trunk(module, given)

    def __repr__(self) -> str:
        """What it is around."""
        return f"<{self.name}>"

    @property
    def name(self) -> str:
        """See `Host`."""
        return f"the host of {type(self.module).__name__}"

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self.module.parameters()).device

    def networks(self) -> dict[str, nn.Module]:
        """See `Host`.

        Raises:
            UnsupportedHost: the module is compiled as a whole.
        """
        if is_compiled(self.module):
            raise UnsupportedHost(
                f"the whole {type(self.module).__name__} is compiled, which fixes one path through "
                "it; compile its blocks one by one instead: for block in net.layers: "
                "block.compile(fullgraph=True)."
            )
        return {"module": self.module}

    def samples(self, latents: Tensor) -> int:
        """See `Host`."""
        count = self.branches if self.in_loop else 1
        return max(1, len(latents) // count)

    def caller(self) -> Any:
        """See `Host`."""
        if not self.in_loop:
            return super().caller()
        steps = self.current()
        return None if steps is None else steps.token

    def new_caller(self) -> Any:
        """See `Host`."""
        if not self.in_loop:
            return super().new_caller()
        steps = self.current()
        assert steps is not None  # opening a run makes it the current one
        return steps.token

    def beside(self) -> Any:
        """See `Host`."""
        steps = self.current()
        return None if steps is None or steps.key is None else steps

    def check_outside(self) -> None:
        """See `Host`.

        Raises:
            ValueError: the loop is not counted.
        """
        if self.in_loop:
            raise ValueError(
                f"{type(self.module).__name__} is called outside of a run, so nothing says which "
                "step this is. Put the loop inside of `with host.steps(times) as steps: for t in "
                "steps:`, in the thread that runs it; detach first to call the module by itself."
            )

    def steps(self, times: Sequence[float] | Tensor | int, key: Hashable = None) -> "Steps":
        """The steps of one run: `with host.steps(times) as steps: for t in steps: ...`.

        The module is called inside of the loop. Runs may go on side by side, one call of one and
        then one of another, where each has a key.

        Args:
            times: flow time at every step, falling in (0, 1] or rising in [0, 1), without the end
                of the last step; or the number of steps, where the sampler has no such time.
            key: tells runs apart that are open at one time, such as an environment's number.

        Raises:
            ValueError: these are no flow times, or the host's clock is a scheduler.
        """
        if not self.in_loop:
            raise ValueError(
                f"the clock of this host is {type(self.scheduler).__name__}, whose set_timesteps "
                "opens a run; leave scheduler= out to count the steps of a loop."
            )
        return Steps(self, times, key)

    def current(self) -> "Steps | None":
        """The run whose loop the code now running is in; None outside of all."""
        steps = (_now.get() or {}).get(id(self))
        return steps if steps is not None and steps.host is self and steps.is_open else None

    @property
    def is_sampling(self) -> bool:
        """Whether a call of `sample` is under way, which will say what its run came to."""
        return self._runs is not None

    def open(self, steps: "Steps") -> None:
        """A run begins.

        Raises:
            ValueError: one of the same key is open.
        """
        with self._lock:
            if steps.key in self._open:
                raise ValueError(
                    f"a run of this host is open{steps.told} already; runs that go on side by side "
                    "need a key each: host.steps(times, key=...)."
                )
            if not self._open:
                self._replaced = replace_method(self.module, "forward", self._call)
            self._open[steps.key] = steps
            if self._runs is not None:
                self._runs.append(steps)

    def close(self, steps: "Steps") -> None:
        """A run is over, however it ended."""
        with self._lock:
            del self._open[steps.key]
            if not self._open and self._replaced is not None:
                restore_method(self.module, "forward", self._replaced)

    def _call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        steps = self.current()
        if steps is None:
            return forward(*args, **kwargs)
        steps.called(args, kwargs)
        output = forward(*args, **kwargs)
        steps.answered(args, kwargs, output)
        return output

    def settings(
        self, num_steps: int | None, guidance_scale: float | None, others: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Arguments of every call of this host.

        Args:
            num_steps: what the loop is expected to make; None for any number.
            guidance_scale: None, since guidance is the loop's own.
            others: none, likewise.

        Raises:
            ValueError: something else is asked for.
        """
        if guidance_scale is not None or others:
            asked = ["guidance_scale"] * (guidance_scale is not None) + sorted(others)
            raise ValueError(
                f"{self.name} takes no {', '.join(asked)}: what its loop goes by is its own, or "
                "among the inputs of every sample."
            )
        return {} if num_steps is None else {"num_inference_steps": num_steps}

    def __call__(
        self,
        generator: Any = None,
        output_type: str = "latent",
        num_inference_steps: int | None = None,
        **inputs: Any,
    ) -> tuple[Tensor]:
        """One run of `sample`, as a pipeline is called: what records, fits and measures does so.

        Args:
            generator: of the run; a list of them where it has several samples.
            output_type: as pipelines take it; the result is one tensor in any case.
            num_inference_steps: what the loop is expected to make; None for any number.
            inputs: by name, with a row per sample.

        Returns:
            The result, a row per sample.

        Raises:
            ValueError: there is no `sample`, or it made no whole run of the host.
        """
        if self.sample is None:
            raise ValueError(
                "this host cannot be run, since nothing says how; give it one run of your loop: "
                "foreseer.host(module, sample=sample) with sample(inputs, generator) -> tensor."
            )
        moved = {name: _moved(value, self.device) for name, value in inputs.items()}
        runs = self._runs = []
        try:
            with torch.no_grad():
                result = self.sample(moved, generator)
            if self.in_loop:
                self._check_runs(runs, result, num_inference_steps)
                runs[0].finish(result)
        finally:
            self._runs = None
            for steps in runs:
                steps.token = None  # tells whoever waits for the end of the run
        return (result,)

    def _check_runs(self, runs: Sequence["Steps"], result: Any, num_steps: int | None) -> None:
        told = [f"{steps.done} of {len(steps.sigmas)} steps" for steps in runs]
        if len(runs) != 1 or runs[0].done < len(runs[0].sigmas):
            raise ValueError(
                f"sample made {' and '.join(told) or 'no run'}, expected one whole run: one `with "
                "host.steps(times) as steps:` whose loop goes to its end."
            )
        if num_steps not in (None, runs[0].done):
            raise ValueError(
                f"sample made {runs[0].done} steps, asked for num_inference_steps={num_steps}; "
                "leave it out, the loop says its own number."
            )
        if not isinstance(result, Tensor):
            raise ValueError(
                f"sample returned {type(result).__name__}, expected the tensor that the run came "
                "to, a row per sample."
            )
        rows = runs[0].rows
        if rows != self.branches * len(result):
            raise ValueError(
                f"{type(self.module).__name__} was called with {rows} rows for {len(result)} "
                f"samples, expected {self.branches} per sample: say branches={rows // len(result)} "
                "where a call holds so many guidance branches, one after the other."
            )


_now: contextvars.ContextVar[Mapping[int, "Steps"] | None] = contextvars.ContextVar(
    "foreseer_steps", default=None
)
"""The run that this thread or task has taken its latest step in, by the host's id."""


class Steps:
    """The steps of one run, see `ModuleHost.steps`; iterating gives the times.

    Attributes:
        sigmas: flow time of every step, 1 to 0.
        index: the step under way.
        done: steps that are over.
        token: lives as long as the run may go on.
    """

    def __init__(
        self, host: ModuleHost, times: Sequence[float] | Tensor | int, key: Hashable
    ) -> None:
        self.host = host
        self.key = key
        self.times: Any = range(times) if isinstance(times, int) else times
        self.sigmas = flow_times(times)
        self.clock = host.scheduler if key is None else LoopClock()
        self.is_open = False
        self.index, self.done, self.closed = -1, 0, 0
        self.token: Caller | None = None
        self._place: int | str | None = None  # where the module is given the sample
        self._calls = 0  # of the step under way
        self._v: Tensor | None = None
        self._before: Tensor | None = None

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
        if self.done > self.closed:
            self.finish(_at(self._place, args, kwargs))

    def answered(self, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """The module was called."""
        self._calls += 1
        if self._calls > 1:
            return
        self._v = prediction(output)
        if self._place is None:
            self._place = _place_of(args, kwargs, self._v)
        self._before = _at(self._place, args, kwargs)

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
            self.clock.step(self._v, self.clock.timesteps[index], self._before, after)
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
        self.is_open = False
        self.host.close(self)
        if not self.host.is_sampling:
            self.token = None
        held = dict(_now.get() or {})
        if held.get(id(self.host)) is self:
            del held[id(self.host)]
            _now.set(held)


def flow_times(times: Sequence[float] | Tensor | int) -> list[float]:
    """Flow time of every step, 1 to 0.

    Args:
        times: falling in (0, 1], which is flow time itself; rising in [0, 1), which is 1 - flow
            time; or a number of steps, of which step i is given 1 - i / n.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(times, int):
        if times < 1:
            raise ValueError(f"found {times} steps, expected at least 1.")
        return [1 - i / times for i in range(times)]
    values = [float(t) for t in (times.tolist() if isinstance(times, Tensor) else times)]
    pairs = list(zip(values, values[1:], strict=False))
    if values and all(a > b for a, b in pairs) and values[0] <= 1 and values[-1] > 0:
        return values
    if values and all(a < b for a, b in pairs) and values[0] >= 0 and values[-1] < 1:
        return [1 - value for value in values]
    shown = f"{values[:3]} ... {values[-1]}" if len(values) > 4 else f"{values}"
    raise ValueError(
        f"the times are {shown}, expected one per call of the module: falling in (0, 1], or rising "
        "in [0, 1), without the end of the last step. Of other times (a scheduler's timesteps) "
        "give their number, host.steps(len(times)), or the scheduler, foreseer.host(module, "
        "scheduler=...)."
    )


def _place_of(args: tuple, kwargs: dict[str, Any], v: Tensor) -> int | str:
    """Where a module is given the sample: the first tensor of its output's shape, else the first.

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
    return alike[0] if alike else next(place for place, value in tensors if value is found)


def _at(place: int | str | None, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    found = args[place] if isinstance(place, int) and place < len(args) else kwargs.get(str(place))
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the module was given its sample as argument {place}, in this call there is "
            f"{type(found).__name__}; call it alike at every step."
        )
    return found


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_moved(each, device) for each in value]
    return value.to(device) if isinstance(value, Tensor) else value


def host(
    module: Any,
    blocks: str | Sequence[str] | None = None,
    head: str | None = None,
    *,
    sample: Sample | None = None,
    scheduler: Any = None,
    branches: int = 1,
) -> ModuleHost:
    """A host of any module: everything that takes a pipeline takes it.

    Args:
        module: the network that a sampler calls at every step. It returns a tensor, a tuple of one,
            or an object with `sample` or `logits`, a row per sample.
        blocks: name of its `ModuleList` of blocks, such as `model.transformer.blocks`, or several
            in calling order; None finds them.
        head: name of the first module after the blocks; None finds it.
        sample: one run of the loop, for whatever records, fits or measures: `sample(inputs,
            generator)` is given the inputs of some samples, by name with a row each, and their
            generator (of several a list, as `diffusers.utils.torch_utils.randn_tensor` takes it),
            and returns what the run came to.
        scheduler: of diffusers, where the loop calls its `set_timesteps` and `step`; None for a
            loop through `steps`.
        branches: guidance branches that a call's rows hold, one after the other; those of calls of
            their own are told apart anyway.

    Raises:
        UnsupportedHost: this is no module, it is compiled, or has no such block list or head.
    """
    if not isinstance(module, nn.Module):
        raise UnsupportedHost(
            f"found {type(module).__name__}, expected a torch module; a pipeline is a host by "
            "itself and goes wherever a host does."
        )
    if branches < 1:
        raise ValueError(f"branches is {branches}, expected at least 1.")
    lists = None if blocks is None else (blocks,) if isinstance(blocks, str) else tuple(blocks)
    made = ModuleHost(module, Given(lists, head), sample, scheduler, branches)
    made.networks()  # refuses a compiled one
    return made
