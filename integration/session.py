"""One predictor (or recorder) at work on one pipeline: what every call of its transformers does.

A session watches the scheduler (its clock) and routes the transformers' calls. At an anchor the
network runs and its tap is observed; at the other steps the tap is forecast. A controller may also
look at the first block before it decides, or have a forecast checked at the last one. Calls outside
a run, calls from elsewhere than the pipeline call that opened it, and everything after detaching
are the host's own. Since a run exchanges parts of the transformer, calls from several threads take
turns.
"""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from foreseer.integration.attachment import Attachment
from foreseer.integration.controller import Controller
from foreseer.integration.decided_calls import Decided, check, entering_head, look
from foreseer.integration.host.branches import Branches, rows_per_branch
from foreseer.integration.host.call import Call, Seen
from foreseer.integration.host.call_rows import Narrowed
from foreseer.integration.host.clock import Pace
from foreseer.integration.host.expert import Expert
from foreseer.integration.host.hook import LAST_BLOCK, own
from foreseer.integration.host.prediction import form_of, prediction
from foreseer.integration.host.read_settings import CallSettings
from foreseer.integration.host.running import Caller, pipeline_call, steps_made_elsewhere
from foreseer.integration.host.time_facts import modulations
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.integration.memory import check_memory
from foreseer.integration.report import Report
from foreseer.predictors.base import Step

SESSIONS: "weakref.WeakSet[Session]" = weakref.WeakSet()
"""Those that are attached; each is kept alive by what it has put on its pipeline."""


class Session:
    """Attach a controller to a pipeline until `detach`.

    Args:
        pipe: its transformers (`transformers_of`) are the hosts, its `scheduler` the clock.
        controller: decides and keeps the state.

    Attributes:
        report: what the latest run did.

    Raises:
        UnsupportedHost: the pipeline has no transformer.
        ValueError: the host already has a cache or a session.
    """

    def __init__(self, pipe: Any, controller: Controller) -> None:
        self.pipe = pipe
        self.controller = controller
        self.report = Report()
        self._forms: dict[str, Callable[[Tensor], Any]] = {}
        self._turn = threading.RLock()  # of the threads that call the transformer
        self.attachment = Attachment(pipe, controller)
        self.experts = self.attachment.experts
        self._reset_run()
        ticks = (self._open, self._close, self._check_caller)
        self.clock = self.attachment.install(self._route, self._counts, ticks)
        SESSIONS.add(self)

    def detach(self) -> None:
        """Give the host and the scheduler their own methods back."""
        with self._turn:
            SESSIONS.discard(self)
            self.attachment.remove()
            self._reset_run()

    def _reset_run(self) -> None:
        self.controller.forget()
        self._caller: weakref.ref[Caller] | None = None  # who opened the run
        self._begun = False
        self._branches = Branches()
        self.attachment.pace = Pace()
        self._pending: list[Seen] = []
        self._asked: set[str] = set()  # calls the tokens of whose head are known

    def _open(self, sigmas: list[float]) -> None:
        with self._turn:
            self._reset_run()
            call = pipeline_call()
            if call is not None and not self.attachment.is_of(call):
                return  # another pipeline on the same scheduler
            self.report.open()
            self.attachment.check()
            self._announced, self._by_hand = sigmas, call is None
            self._caller = weakref.ref(Caller.new(), self._left)

    def _left(self, caller: weakref.ref[Caller]) -> None:
        """The call that opened the run is over, before its last step where it was interrupted."""
        if self._caller is caller:
            self._reset_run()

    def _check_caller(self) -> None:
        if self._caller is not None and not self._is_inside():
            raise ValueError(steps_made_elsewhere(self.pipe))

    def _begin(self) -> None:
        """The first call of a run: the pipeline has said by now with which step it starts."""
        self._sigmas = self._announced[self.clock.begin :]
        self._num_steps = len(self._sigmas)
        self.report.num_steps = self._num_steps
        self._step_began = time.perf_counter()
        self._settings = CallSettings(expert.transformer for expert in self.experts.values())
        self.controller.settings = self._settings.read(pipeline_call())
        self.controller.image_tokens, self.controller.layouts = {}, {}
        self.controller.open(self._sigmas)
        self._begun = True

    def _close(self, index: int, v: Tensor, before: Tensor, after: Tensor) -> None:
        with self._turn:
            self._check_caller()
            if self._caller is None:
                return
            try:
                self._close_step(index, v, before, after)
            except BaseException:
                self._reset_run()
                raise

    def _close_step(self, index: int, v: Tensor, before: Tensor, after: Tensor) -> None:
        """Observe the step's calls, now that the sample tells how many branches each one held."""
        if not self._begun:
            self._begin()
        self.attachment.check_step(index)
        self._branches.close(rows_per_branch(self.pipe, after))
        for seen in self._pending:
            step = self._step(index, seen.key, seen.x_t)
            self.controller.observe(seen.key, seen.call, step, seen.taps)
        self._pending = []
        self.controller.settings = self._settings.read(pipeline_call())
        self.controller.close(index, v, before, after)
        self.report.state_bytes = max(self.report.state_bytes, self.controller.state_bytes())
        check_memory(self.controller, self.report, index, v.device)
        now = time.perf_counter()
        self.report.steps.append(now - self._step_began)
        self._step_began = now
        if index == self._num_steps - 1:
            self.controller.finish(self.report)
            self._reset_run()

    def _step(self, index: int, key: str, x_t: Tensor | None) -> Step:
        branches, expert = self._branches.of(key), self._branches.expert_of(key)
        return Step(index, self._sigmas[index], self._num_steps, branches, expert, x_t)

    def _is_inside(self) -> bool:
        """Whether the code now running belongs to the run that is open."""
        opened = self._opened_by()
        return opened is not None and Caller.here() is opened

    def _opened_by(self) -> Caller | None:
        """Who opened the run; None when it is over or its call is, however that ended."""
        return None if self._caller is None else self._caller()

    def _counts(self) -> Counter[str] | None:
        return self.report.others if self._is_inside() else None

    def _route(self, expert: Expert, forward: Callable, args: tuple, kwargs: dict) -> Any:
        call = Call(expert.transformer, forward, args, kwargs)
        with self._turn:
            if not (self._is_inside() and self.attachment.has_clock):
                try:
                    self.attachment.check_outside(call.time if not self._opened_by() else None)
                except ValueError:
                    self._reset_run()
                    self.report.open()
                    raise
                return call.run()
            try:
                if self._by_hand and not self.attachment.pace.calls:
                    if self.clock.is_elsewhere(call.time):  # the loop has ended before its last
                        self._reset_run()
                        return call.run()
                self.attachment.pace.call(call.time)
                if not self._begun:
                    self._begin()
                return self._answer(expert, call)
            except BaseException:
                self._reset_run()
                raise

    def _answer(self, expert: Expert, call: Call) -> Any:
        started = time.perf_counter()
        key, narrowed = self._branches.enter(expert.number, expert.name, call)
        if narrowed is not None:
            self._adopt(expert, key, narrowed)
        step = self._step(self.clock.index, key, call.x_t)
        if not expert.proven:
            self._prove(expert, call)
        action = self.controller.action(step)
        if action == "look":
            looked = look(self.controller, expert, call, key, step)
            output, ran = self._decided(expert, looked, call, key)
        elif action == "anchor" or not self.controller.knows(key):
            output, ran = self._run(expert, call, key), True
        elif action == "check":
            checked = check(self.controller, expert, call, key, step)
            output, ran = self._decided(expert, checked, call, key)
        else:
            output, ran = self._forecast(expert, call, key, step), False
        self._branches.count(key, len(prediction(output)))
        kind = "anchor" if ran else "forecast"
        self.report.count(step.index, kind, time.perf_counter() - started)
        return output

    def _adopt(self, expert: Expert, key: str, narrowed: Narrowed) -> None:
        """Let a call that holds some branches of an earlier one go on with what is kept of them."""
        self._forms[key] = self._forms[narrowed.source]
        self.controller.adopt(key, narrowed)
        if expert.first_look is not None:
            expert.first_look.adopt(narrowed)

    def _prove(self, expert: Expert, call: Call) -> None:
        expert.prove(call, self.controller)

    def _run(self, expert: Expert, call: Call, key: str) -> Any:
        with expert.capturing(self.controller.taps) as found:
            output = call.run()
        self._keep(expert, key, found, output, call.x_t)
        expert.prove_rows(call, output)
        self._ask(expert, call, key, found, output)
        return output

    def _ask(
        self, expert: Expert, call: Call, key: str, found: dict[str, Tensor], output: Any
    ) -> None:
        """Find out, once a run, what the controller wants to know of a call's tokens."""
        hidden = found.get("hidden")
        if hidden is None or key in self._asked:
            return
        self._asked.add(key)
        if self.controller.wants_image_tokens:
            mask = expert.image_tokens(call, hidden)
            if mask is not None:
                self.controller.image_tokens = {**self.controller.image_tokens, key: mask}
        if self.controller.wants_layout:
            layout = expert.layout(call, hidden, prediction(output))
            self.controller.layouts = {**self.controller.layouts, key: layout}

    def _keep(
        self, expert: Expert, key: str, found: dict[str, Tensor], output: Any, x_t: Tensor | None
    ) -> None:
        """Put a call's captured taps and its input aside until its step is over."""
        self._forms[key] = form_of(output)
        taps = set(self.controller.taps)
        if "output" in taps:
            found["output"] = own(prediction(output))
        if LAST_BLOCK in taps and expert.trunk is not None:
            taps.remove(LAST_BLOCK)
            taps |= {f"{LAST_BLOCK}.{number}" for number in range(len(expert.trunk.streams))}
        kept = {tap: found[tap] for tap in taps if tap in found}
        if len(kept) < len(taps):
            raise UnsupportedHost(
                f"{type(expert.transformer).__name__} produced the taps {sorted(kept)}, "
                f"expected {sorted(taps)}."
            )
        self._pending.append(Seen(key, self._branches.calls, kept, x_t))

    def _forecast(self, expert: Expert, call: Call, key: str, step: Step) -> Any:
        if self.controller.needs:
            return self._forecast_inside(expert, call, key, step)
        tap, feature = self.controller.forecast(key, step)
        if tap == "output":
            return self._forms[key](feature)
        return expert.skip(call, entering_head(tap, feature))

    def _forecast_inside(self, expert: Expert, call: Call, key: str, step: Step) -> Any:
        """Forecast from what only the forward knows: its tokens and its modulation vector."""

        def entering(tokens: Tensor) -> Tensor:
            inside = replace(step, tokens=tokens, modulation=found[-1])
            tap, feature = self.controller.forecast(key, inside)
            return entering_head(tap, feature)(tokens)

        with modulations(expert.transformer) as found:
            return expert.skip(call, entering)

    def _decided(self, expert: Expert, decided: Decided, call: Call, key: str) -> tuple[Any, bool]:
        """What a call that was decided on the way returns, and whether the network ran."""
        if decided.taps is not None:
            self._keep(expert, key, decided.taps, decided.output, call.x_t)
            self._ask(expert, call, key, decided.taps, decided.output)
        if decided.sample is None:
            return decided.output, decided.taps is not None
        return self._forms[key](decided.sample), decided.taps is not None
