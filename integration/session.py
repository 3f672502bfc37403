"""One predictor (or recorder) at work on one pipeline: what every call of the transformer does.

A session watches the scheduler (its clock) and routes the transformer's calls. At an anchor the
network runs and its tap is observed; at the other steps the tap is forecast. A controller may also
look at the first block before it decides, or have a forecast checked at the last one. Calls outside
a run, and everything after detaching, are the host's own.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..predictors.base import Step
from .adaptive import take_rows
from .clock import Clock
from .controller import Controller
from .gate import FirstLook, LastBlock
from .hook import LAST_BLOCK, TrunkSkipper, capturing, install, own, remove
from .host import Trunk, UnsupportedHost
from .proof import Call, check_rows, output_tensor, prove
from .report import Report
from .time_facts import modulations


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
        self.first_look: FirstLook | None = None
        self.last_block: LastBlock | None = None
        self._proven = not (controller.taps - {"output"}) and controller.probe is None
        self._rows_proven = LAST_BLOCK not in controller.taps  # else checked on the first batch
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
            self.controller.finish(self.report)

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
        if not self._proven:
            self._prove(forward, args, kwargs)
        action = self.controller.action(step)
        if action == "look":
            output, ran = self._look(forward, args, kwargs, key, step)
        elif action == "check":
            output, ran = self._check(forward, args, kwargs, key, step)
        elif action == "anchor":
            output, ran = self._run(forward, args, kwargs, key, x_t), True
        else:
            output, ran = self._forecast(forward, args, kwargs, key, step), False
        self._calls += 1
        kind = "anchor" if ran else "forecast"
        self.report.count(step.index, kind, time.perf_counter() - started)
        return output

    def _key(self) -> str:
        """Branch key of a call: its ordinal in the step."""
        return str(self._calls)

    def _run(self, forward: Callable, args: tuple, kwargs: dict, key: str, x_t: Any) -> Any:
        with self._capturing() as found:
            output = forward(*args, **kwargs)
        self._keep(key, found, output, x_t)
        sample = output_tensor(output)
        if not self._rows_proven and len(sample) > 1:
            check_rows(Call(self.transformer, forward, args, kwargs), sample)
            self._rows_proven = True
        return output

    def _capturing(self) -> contextlib.AbstractContextManager[dict[str, Tensor]]:
        return capturing(self.transformer, self.trunk, set(self.controller.taps))

    def _keep(
        self, key: str, found: dict[str, Tensor], output: Any, x_t: Any, rows: int | None = None
    ) -> None:
        """Put a call's taps aside until its step is over.

        Args:
            key: branch key of the call.
            found: the taps captured.
            output: what the call returned.
            x_t: the network's input.
            rows: rows of the pipeline's call, where only some of them were computed.
        """
        self._templates[key] = type(output)
        sample = output_tensor(output)
        taps = set(self.controller.taps)
        if "output" in taps:
            found["output"] = own(sample)
        if LAST_BLOCK in taps and self.trunk is not None:
            taps.remove(LAST_BLOCK)
            taps |= {f"{LAST_BLOCK}.{number}" for number in range(len(self.trunk.streams))}
        kept = {tap: found[tap] for tap in taps if tap in found}
        if len(kept) < len(taps):
            raise UnsupportedHost(
                f"{type(self.transformer).__name__} produced the taps {sorted(kept)}, "
                f"expected {sorted(taps)}."
            )
        self._pending.append((key, self._calls, kept, rows or len(sample), x_t))

    def _forecast(self, forward: Callable, args: tuple, kwargs: dict, key: str, step: Step) -> Any:
        if self.controller.needs:
            return self._forecast_inside(forward, args, kwargs, key, step)
        tap, feature = self.controller.forecast(key, step)
        if tap == "output":
            return self._wrap(key, feature)
        return self._skip(forward, args, kwargs, _entering(tap, feature))

    def _forecast_inside(
        self, forward: Callable, args: tuple, kwargs: dict, key: str, step: Step
    ) -> Any:
        """Forecast from what only the forward knows: its tokens and its modulation vector."""

        def entering(tokens: Tensor) -> Tensor:
            inside = replace(step, tokens=tokens, modulation=found[-1])
            tap, feature = self.controller.forecast(key, inside)
            return _entering(tap, feature)(tokens)

        with modulations(self.transformer) as found:
            return self._skip(forward, args, kwargs, entering)

    def _skip(
        self, forward: Callable, args: tuple, kwargs: dict, entering: Callable[[Tensor], Tensor]
    ) -> Any:
        """The forward without its trunk."""
        if self.skipper is None:
            raise UnsupportedHost("the trunk of this host was never traced; report this as a bug.")
        return self.skipper(forward, args, kwargs, entering)

    def _wrap(self, key: str, sample: Tensor) -> Any:
        """A prediction in the form this call returned one before."""
        template = self._templates[key]
        return (sample,) if template is tuple else template(sample)

    def _look(
        self, forward: Callable, args: tuple, kwargs: dict, key: str, step: Step
    ) -> tuple[Any, bool]:
        """Run the first block, then the rest of the network or a forecast."""
        assert self.first_look is not None  # made with the trunk
        forecasts: list[tuple[str, Tensor]] = []

        def entering(tensor: Tensor) -> Tensor:
            tap, feature = self.controller.forecast(key, step)
            forecasts.append((tap, feature))
            return tensor if tap == "output" else _entering(tap, feature)(looked(tensor))

        def looked(tensor: Tensor) -> Tensor:
            return found.get("trunk_in", tensor)

        with self._capturing() as found:
            output, ran = self.first_look(
                forward, args, kwargs, lambda seen: self.controller.judge(step, seen), entering
            )
        if ran:
            self._keep(key, found, output, step.x_t)
        elif forecasts[0][0] == "output":
            output = self._wrap(key, forecasts[0][1])
        return output, ran

    def _check(
        self, forward: Callable, args: tuple, kwargs: dict, key: str, step: Step
    ) -> tuple[Any, bool]:
        """Forecast, check at the last block, and compute the samples that are refused."""
        assert self.last_block is not None  # made with the trunk
        inputs = self.controller.check_inputs(key, step)
        output = self.last_block(
            forward, args, kwargs, inputs, lambda made: self.controller.check(key, step, made)
        )
        rejected = self.controller.rejected(step)
        if not rejected:
            return output, False
        sample = output_tensor(output)
        per_branch = len(sample) // len(step.branches)
        rows = [b * per_branch + i for b in range(len(step.branches)) for i in rejected]
        if len(rejected) < per_branch:
            args, kwargs = take_rows((args, kwargs), rows, len(sample))
        with self._capturing() as found:
            computed = forward(*args, **kwargs)
        x_t = args[0] if args else kwargs.get("hidden_states")
        self._keep(key, found, computed, x_t, len(sample))
        merged = sample.clone()
        merged[torch.as_tensor(rows, device=sample.device)] = output_tensor(computed)
        return self._wrap(key, merged), True

    def _prove(self, forward: Callable, args: tuple, kwargs: dict) -> None:
        """Find the trunk on this call's inputs and check everything the controller relies on."""
        call = Call(self.transformer, forward, args, kwargs)
        proven = prove(call, set(self.controller.taps), self.controller.probe)
        self.trunk, self.skipper = proven.trunk, proven.skipper
        self.first_look, self.last_block = proven.first_look, proven.last_block
        self._proven = True


def _entering(tap: str, feature: Tensor) -> Callable[[Tensor], Tensor]:
    """What enters the head given what came through the empty trunk."""
    return lambda came: came + feature if tap == "residual" else feature
