"""Any torch module in a loop of somebody's own: `foreseer.host(module)`.

    host = fs.host(net, blocks="layers", head="norm")
    with fs.forecasting(host, predictor) as run, run.steps(times) as steps:
        for t in steps:
            x = x + dt * net(x, t)

A loop is told apart from others by the `steps` that it goes through, so no code of it is looked at.
"""

import itertools
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foreseer.integration.host.fingerprint import adapter_state
from foreseer.integration.host.hook import ReplacedMethod, replace_method, restore_method
from foreseer.integration.host.hosts import Host, is_compiled
from foreseer.integration.host.loop import LoopClock, Steps, steps_of
from foreseer.integration.host.trunk import Given, UnsupportedHost, give_trunk

Sample = Callable[[dict[str, Any], Any], Tensor]
"""One run: inputs by name, a row per sample, and their generator (of several a list), to a result.
"""


STEPS_ELSEWHERE = (
    "the loop took no step between. Steps count calls of the module, those of guidance together: "
    "where a step of the sampler calls it at several times, take one step for each of these calls, "
    "of host.steps(number of calls). Of runs that go on by turns, let none take over between the "
    "calls of another's step."
)


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
        if self.in_loop:
            self.steps_elsewhere = STEPS_ELSEWHERE
        self._lock = threading.Lock()
        self._open: dict[Hashable, Steps] = {}
        self._replaced: ReplacedMethod | None = None
        self._fingerprint: tuple[Any, dict[str, Any]] | None = None  # of what state
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

    def fingerprint(self) -> dict[str, Any]:
        """See `Host`; read anew once a weight changes, since every run asks for it.

        A loop may have thousands of runs a minute.
        """
        weights = list(itertools.chain(self.module.parameters(), self.module.buffers()))
        if any(each.is_meta or each.is_inference() for each in weights):
            return super().fingerprint()  # changes of theirs cannot be told
        state = [(id(each), each.data_ptr(), each._version) for each in weights]
        told = (state, adapter_state(self.module))
        if self._fingerprint is None or self._fingerprint[0] != told:
            self._fingerprint = told, super().fingerprint()
        return self._fingerprint[1]

    def samples(self, latents: Tensor) -> int:
        """See `Host`."""
        count = self.branches if self.in_loop else 1
        return max(1, latents.shape[0] // count)

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

    def steps(self, times: Any, key: Hashable = None, inversion: bool = False) -> Steps:
        """The steps of one run: `with host.steps(times) as steps: for t in steps: ...`.

        The module is called inside of the loop. Runs may go on side by side, one call of one and
        then one of another, where each has a key.

        Args:
            times: flow time at every step, falling in (0, 1] or rising in [0, 1), without the end
                of the last step; or the number of steps, where the sampler has no such time.
            key: tells runs apart that are open at one time, such as an environment's number.
            inversion: whether the run goes from a sample to noise, so that flow time rises: rising
                times are flow time itself then, falling ones 1 - flow time.

        Raises:
            ValueError: these are no flow times, or the host's clock is a scheduler.
        """
        if not self.in_loop:
            raise ValueError(
                f"the clock of this host is {type(self.scheduler).__name__}, whose set_timesteps "
                "opens a run; leave scheduler= out to count the steps of a loop."
            )
        return Steps(self, times, key, inversion)

    def current(self) -> Steps | None:
        """The run whose loop the code now running is in; None outside of all."""
        return steps_of(self)

    @property
    def is_sampling(self) -> bool:
        """Whether a call of `sample` is under way, which will say what its run came to."""
        return self._runs is not None

    def open(self, steps: Steps) -> None:
        """A run begins.

        Raises:
            ValueError: one of the same key is open.
        """
        with self._lock:
            if steps.key in self._open:
                raise ValueError(
                    f"a run of this host is open{steps.told} already; end it first, or give runs "
                    "that go on side by side a key each where the loop is yours: "
                    "host.steps(times, key=...)."
                )
            if not self._open:
                self._replaced = replace_method(self.module, "forward", self._call)
            self._open[steps.key] = steps
            if self._runs is not None:
                self._runs.append(steps)

    def close(self, steps: Steps) -> None:
        """A run is over, however it ended."""
        with self._lock:
            del self._open[steps.key]
            if not self._open and self._replaced is not None:
                restore_method(self.module, "forward", self._replaced)

    def others_than(self, steps: Steps) -> list[Steps]:
        """The other runs that are open."""
        with self._lock:
            return [each for each in self._open.values() if each is not steps]

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

    def _check_runs(self, runs: Sequence[Steps], result: Any, num_steps: int | None) -> None:
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


def has_loop(pipe: Any) -> bool:
    """Whether what is given is a host whose loop is its own."""
    return isinstance(pipe, ModuleHost)


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
