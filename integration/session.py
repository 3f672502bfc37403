"""One predictor (or recorder) at work on one pipeline: what every call of the transformer does.

A session watches the scheduler (its clock) and routes the transformer's calls. At an anchor the
network runs and its tap is observed; at the other steps the tap is forecast. Calls outside a run,
and everything after detaching, are the host's own.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..predictors.base import Step
from .clock import Clock
from .hook import TrunkSkipper, capturing, install, own, remove
from .host import Trunk, TrunkTracer, UnsupportedHost
from .report import Report


class Controller:
    """What a session asks for decisions; `Forecaster` and `Recorder` are the two there are.

    Attributes:
        taps: the taps to capture at anchors.
    """

    taps: frozenset[str] = frozenset()

    def open(self, sigmas: list[float]) -> None:
        """A new run starts on this grid of sigmas; forget the last one."""

    def is_anchor(self, step: Step) -> bool:
        """Whether the network runs at this step."""
        return True

    def observe(self, key: str, call: int, step: Step, taps: dict[str, Tensor]) -> None:
        """The taps of a call at an anchor, once the number of its branches is known."""

    def forecast(self, key: str, step: Step) -> tuple[str, Tensor]:
        """The tap to put back (`output`, `hidden` or `residual`) and its forecast."""
        raise NotImplementedError

    def close(self, step_index: int, v: Tensor, before: Tensor, after: Tensor) -> None:
        """A step is over: the guided prediction `v` took the latents from `before` to `after`."""

    def state_bytes(self) -> int:
        """Bytes of cached features."""
        return 0


class Session:
    """Attach a controller to a pipeline until `detach`.

    Args:
        transformer: the host.
        scheduler: the instance whose steps are the clock.
        controller: decides and keeps the state.

    Raises:
        ValueError: the host already has a cache or a session.
    """

    def __init__(self, transformer: nn.Module, scheduler: Any, controller: Controller) -> None:
        self.transformer = transformer
        self.controller = controller
        self.trunk: Trunk | None = None
        self.skipper: TrunkSkipper | None = None
        self.report = Report()
        self._proven = not (controller.taps - {"output"})
        self._templates: dict[str, type] = {}
        self._reset_run()
        install(transformer, self._route)
        self.clock = Clock(scheduler, self._open, self._close)

    def detach(self) -> None:
        """Give the host and the scheduler their own methods back."""
        self.clock.detach()
        remove(self.transformer)
        self._reset_run()

    def _reset_run(self) -> None:
        self._open_run = False
        self._calls = 0
        self._pending: list[tuple[str, int, dict[str, Tensor], int, Tensor | None]] = []
        self._branches_per_call: int | None = None

    def _open(self, sigmas: list[float]) -> None:
        self._reset_run()
        self._num_steps = len(sigmas)
        self._sigmas = sigmas
        self.report.open(sigmas)
        self.controller.open(sigmas)
        self._open_run = True

    def _close(self, index: int, v: Tensor, before: Tensor, after: Tensor) -> None:
        """Observe the step's calls, now that the sample tells how many branches each one held."""
        if not self._open_run:
            return
        for key, call, taps, batch, x_t in self._pending:
            if self._branches_per_call is None or call == 0:
                self._branches_per_call = max(1, batch // max(1, len(before)))
            self.controller.observe(key, call, self._step(index, call, x_t), taps)
        self._pending = []
        self._calls = 0
        self.controller.close(index, v, before, after)
        self.report.state_bytes = max(self.report.state_bytes, self.controller.state_bytes())
        if index == self._num_steps - 1:
            self._open_run = False

    def _step(self, index: int, call: int, x_t: Tensor | None) -> Step:
        per_call = self._branches_per_call or 1
        branches = tuple(range(call * per_call, (call + 1) * per_call))
        return Step(index, self._sigmas[index], self._num_steps, branches, x_t)

    def _route(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self._open_run:
            return forward(*args, **kwargs)
        started = time.perf_counter()
        x_t = args[0] if args else kwargs.get("hidden_states")
        key = self._key()
        step = self._step(self.clock.index, self._calls, x_t)
        if self.controller.is_anchor(step):
            output = self._run(forward, args, kwargs, key, x_t)
            kind = "anchor"
        else:
            output = self._forecast(forward, args, kwargs, key, step)
            kind = "forecast"
        self._calls += 1
        self.report.count(step.index, kind, time.perf_counter() - started)
        return output

    def _key(self) -> str:
        """Branch key of a call: its ordinal in the step."""
        return str(self._calls)

    def _run(self, forward: Callable, args: tuple, kwargs: dict, key: str, x_t: Any) -> Any:
        taps = self.controller.taps
        if not self._proven:
            self._prove(forward, args, kwargs)
        with capturing(self.transformer, self.trunk, set(taps)) as found:
            output = forward(*args, **kwargs)
        self._templates[key] = type(output)
        sample = output_tensor(output)
        if "output" in taps:
            found["output"] = own(sample)
        kept = {tap: found[tap] for tap in taps if tap in found}
        if len(kept) < len(taps):
            raise UnsupportedHost(
                f"{type(self.transformer).__name__} produced the taps {sorted(kept)}, "
                f"expected {sorted(taps)}."
            )
        self._pending.append((key, self._calls, kept, len(sample), x_t))
        return output

    def _forecast(self, forward: Callable, args: tuple, kwargs: dict, key: str, step: Step) -> Any:
        tap, feature = self.controller.forecast(key, step)
        if tap == "output":
            template = self._templates[key]
            return (feature,) if template is tuple else template(feature)
        if self.skipper is None:
            raise UnsupportedHost("the trunk of this host was never traced; report this as a bug.")
        if tap == "residual":
            return self.skipper(forward, args, kwargs, lambda entering: entering + feature)
        return self.skipper(forward, args, kwargs, lambda entering: feature)

    def _prove(self, forward: Callable, args: tuple, kwargs: dict) -> None:
        """Find the trunk on this call's inputs and check that replaying its tap is exact.

        Raises:
            UnsupportedHost: it is not, so nothing may be forecast on this tap.
        """
        with TrunkTracer(self.transformer) as tracer:
            forward(*args, **kwargs)
        trunk = tracer.trunk()
        with capturing(self.transformer, trunk, {"hidden"}) as found:
            expected = output_tensor(forward(*args, **kwargs))
        skipper = TrunkSkipper(self.transformer, trunk)
        replayed = output_tensor(skipper(forward, args, kwargs, lambda entering: found["hidden"]))
        if not torch.equal(expected.nan_to_num(), replayed.nan_to_num()):
            worst = float((expected - replayed).abs().max())
            raise UnsupportedHost(
                f"replaying the head input ({trunk.head}) of {type(self.transformer).__name__} "
                f"changes its output by up to {worst:.2e}, expected bitwise equality; use the "
                "`output` tap."
            )
        self.trunk, self.skipper, self._proven = trunk, skipper, True


def output_tensor(output: Any) -> Tensor:
    """The prediction in a transformer's return value.

    Raises:
        UnsupportedHost: the return value is neither a 1-tuple nor has a tensor `sample`.
    """
    sample = output[0] if isinstance(output, tuple) and len(output) == 1 else output
    sample = getattr(sample, "sample", sample)
    if not isinstance(sample, Tensor):
        raise UnsupportedHost(
            f"the transformer returned {type(output).__name__}, expected a tuple of one tensor or "
            "an output with a `sample` tensor."
        )
    return sample
