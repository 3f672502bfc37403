"""The loop: what every call of a pipeline's transformers comes to, step by step.

A session watches the scheduler (its clock) and routes the transformers' calls. For every call the
source's schedule says whether the network runs, is forecast, or is decided on the way; at the end
of a step everybody who takes part is told of it (`on_step`). Calls outside a run, calls from
elsewhere than the pipeline call that opened it, and everything after detaching are the host's own.
Since a run exchanges parts of the transformer, calls from several threads take turns.
"""

import copy
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from foreseer.integration.attachment import Attachment
from foreseer.integration.call_groups import CallGroups
from foreseer.integration.host.branches import Branches, CallForm
from foreseer.integration.host.call import Call, prediction
from foreseer.integration.host.caller import CallSettings, steps_made_elsewhere
from foreseer.integration.host.clock import Clock, Pace
from foreseer.integration.host.expert import Expert
from foreseer.integration.host.hosts import host_of
from foreseer.integration.host.layout import Layout
from foreseer.integration.memory import check_memory
from foreseer.integration.observers import CallRecord, Observer, Source, StepRecord
from foreseer.integration.policy import Action
from foreseer.integration.report import Kind, Report
from foreseer.integration.runner import Answer, Runner, check, probe
from foreseer.predictors.base import Step

SESSIONS: "weakref.WeakSet[Session]" = weakref.WeakSet()
"""Those that are attached; each is kept alive by what it has put on its pipeline."""


class Session:
    """Take part in the runs of a pipeline until `detach`.

    Args:
        pipe: its transformers (`transformers_of`) are the hosts, its `scheduler` the clock.
        source: says which calls run and stands in for the others; None runs all.
        observers: told of every step, after the source.
        runner: how calls are run and forecasts put back.
        repeats: whether every run makes the calls of the first, whose guidance branches are then
            known before a step of theirs has run.
        groups: token groups of every run; None for none.

    Attributes:
        report: what the latest run did.

    Raises:
        UnsupportedHost: the pipeline has no transformer.
        ValueError: the host already has a cache or a session.
    """

    def __init__(
        self,
        pipe: Any,
        source: Source | None = None,
        observers: Sequence[Observer] = (),
        runner: Runner | None = None,
        repeats: bool = False,
        groups: CallGroups | None = None,
    ) -> None:
        self.host = host_of(pipe)
        self.pipe = self.host.given
        self.source = source
        self.observers = [*observers] if source is None else [source, *observers]
        self.runner = Runner() if runner is None else runner
        self.repeats = repeats
        self.groups = groups
        self.report = Report()
        self._turn = threading.RLock()  # of the threads that call the transformer
        self._keeps_forecasts = any(each.wants_forecasts for each in self.observers)
        self._asks_for_tokens = any(each.wants_image_tokens for each in self.observers)
        self._asks_for_layout = any(each.wants_layout for each in self.observers)
        taps = frozenset[str]().union(*(each.taps for each in self.observers))
        self.attachment = Attachment(
            self.host, taps, None if source is None else source.schedule.probe
        )
        self.experts = self.attachment.experts
        self._branches = Branches()
        self._beside: dict[Any, Session] = {}  # of runs that go on beside the one this follows
        self._reset_run()
        ticks = (self._open, self._close, self._check_caller)
        self.clock = self.attachment.install(self._route, self._counts, ticks)
        SESSIONS.add(self)

    def _at(self, steps: Any) -> "Session":
        """What answers the calls of a run beside others, which has a clock of its own.

        Raises:
            ValueError: whoever takes part in runs here follows one at a time.
        """
        found = self._beside.get(steps)
        if found is not None:
            return found
        if steps.done:
            self.host.check_outside()  # attached in its middle
        if self.source is None or self.observers != [self.source]:
            raise ValueError(
                "recordings and fits follow one run at a time; open it without a key, "
                "host.steps(times)."
            )
        for other in [each for each in self._beside if not each.is_open]:
            del self._beside[other]
        found = self._beside[steps] = copy.copy(self)
        found.source = self.source.beside()
        found.observers = [found.source]
        found.attachment = copy.copy(self.attachment)
        found.groups = copy.copy(self.groups)
        found._reset_run()
        found.clock = Clock(steps.clock, found._open, found._close, found._check_caller)
        self.report = found.report = Report()
        found._open(steps.sigmas)
        return found

    def reset(self, reason: str) -> None:
        """Forget what the run under way has computed so far; its next calls are computed.

        Args:
            reason: what made it worthless, for the report.

        Raises:
            ValueError: no run is under way here, or it cannot go on from its middle.
        """
        with self._turn:
            beside = self.host.beside()
            run = self if beside is None else self._at(beside)
            if run.source is None or not run._begun or not run._is_inside():
                raise ValueError(
                    "no run is under way here, so there is nothing to reset; every run begins anew."
                )
            run._reset_reason = reason  # until the step before it is known to be over

    def join(self, observer: Observer) -> None:
        """Let one more take part, from the next run on.

        Raises:
            ValueError: a run is under way.
        """
        with self._turn:
            if self._begun:
                raise ValueError("a run is under way; whoever joins does so between two runs.")
            self.observers.append(observer)
            for expert in self.experts.values():
                expert.taps |= observer.taps
                expert.proven = not (expert.taps - {"output"}) and expert.probe is None

    def leave(self, observer: Observer) -> None:
        """Let go of one that has joined."""
        with self._turn:
            self.observers = [each for each in self.observers if each is not observer]

    def detach(self) -> None:
        """Give the host and the scheduler their own methods back."""
        with self._turn:
            SESSIONS.discard(self)
            self.attachment.remove()
            for run in self._beside.values():
                run.clock.detach()
                run._reset_run()
            self._reset_run()

    def _reset_run(self) -> None:
        for observer in self.observers:
            observer.forget()
        self._caller: weakref.ref[Any] | None = None  # who opened the run
        self._begun = False
        self._reset_reason = ""
        if self.repeats:
            self._branches.restart()
        else:
            self._branches = Branches()
        self.attachment.pace = Pace(self.host.steps_elsewhere)
        self._pending: list[tuple[CallForm, CallRecord]] = []  # calls of the step in progress
        self._masks: dict[CallForm, Tensor | None] = {}  # tokens of the picture
        self._layouts: dict[CallForm, Layout] = {}
        if self.groups is not None:
            self.groups.close()

    def _open(self, sigmas: list[float]) -> None:
        with self._turn:
            self._reset_run()
            call = self.host.call()
            if call is not None and not self.attachment.is_of(call):
                return  # another pipeline on the same scheduler
            self.report.open()
            self.attachment.check()
            self._announced, self._by_hand = sigmas, call is None and self.host.by_hand
            self._caller = weakref.ref(self.host.new_caller(), self._left)

    def _left(self, caller: weakref.ref[Any]) -> None:
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
        self._opening = self._settings.read(self.host.call())
        if self.groups is not None:
            self.groups.open(self.host.call())
            self.report.groups = self.groups.shares()
        if self.source is not None:
            self.source.settings = self._opening
            self.source.open(self._sigmas)
            self._branches.follow(self.source.follows)
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
        """Tell of the step, now that the sample says how many branches each call held."""
        if not self._begun:
            self._begin()
        self.attachment.check_step(index)
        samples = self.host.samples(after)
        if self.groups is not None:
            self.groups.check_samples(samples)
        started = self._branches.close(samples)
        calls = [self._with_branches(form, call, started) for form, call in self._pending]
        self._pending = []
        settings = self._settings.read(self.host.call())
        record = StepRecord(index, self._sigmas, settings, v, before, after, calls, self._opening)
        for observer in self.observers:
            observer.on_step(record)
        budget = None if self.source is None else self.source.memory_budget
        check_memory(self.observers, budget, self.report, index, v.device)
        now = time.perf_counter()
        self.report.steps.append(now - self._step_began)
        self._step_began = now
        if index == self._num_steps - 1:
            if self.source is not None:
                self.source.finish(self.report)
            self._reset_run()

    def _with_branches(
        self, form: CallForm, call: CallRecord, started: set[CallForm]
    ) -> CallRecord:
        if form not in started:
            return call
        branches = self._branches.of(form)
        assert branches is not None  # the step is over
        return replace(call, step=replace(call.step, branches=branches), starts=True)

    def _is_inside(self) -> bool:
        """Whether the code now running belongs to the run that is open."""
        opened = self._opened_by()
        return opened is not None and self.host.caller() is opened

    def _opened_by(self) -> Any:
        """Who opened the run; None when it is over or its call is, however that ended."""
        return None if self._caller is None else self._caller()

    def _counts(self) -> Counter[str] | None:
        return self.report.others if self._is_inside() else None

    def _route(self, expert: Expert, forward: Callable, args: tuple, kwargs: dict) -> Any:
        call = Call(expert.transformer, forward, args, kwargs)
        with self._turn:
            beside = self.host.beside()
            run = self if beside is None else self._at(beside)
            return run._answer_call(expert, call)

    def _answer_call(self, expert: Expert, call: Call) -> Any:
        with self._turn:
            if not (self._is_inside() and self.attachment.has_clock):
                self.host.check_outside()
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
        form, narrowed = self._branches.enter(expert.number, expert.name, call)
        if narrowed is not None:
            expert.narrow(narrowed)
            if self.source is not None:
                self.source.schedule.narrow(narrowed)
        if self._reset_reason and self.source is not None:
            self.source.reset(self._reset_reason)
            self.report.resets.append((self.clock.index, self._reset_reason))
            self._reset_reason = ""
        if not expert.proven:
            self.runner.prove(expert, call)
        branches, index = self._branches.of(form), self.clock.index
        held = (self._branches.calls,) if branches is None else branches  # one, while not known
        sigmas = self._sigmas
        step = Step(
            index, sigmas[index], self._num_steps, held, expert.number, call.x_t, sigmas=sigmas
        )
        if self.groups is not None:
            step = replace(step, groups=self.groups.rows(call.num_rows, call.device))
        answer = self._decide(expert, call, step, branches is not None)
        if self.groups is not None and answer.taps is not None:
            self.groups.check_tokens(answer.taps)
        self._branches.count(form, prediction(answer.output).shape[0])
        self._put_aside(form, expert, call, step, answer)
        kind: Kind = "anchor" if answer.taps is not None else "forecast"
        if answer.partial:
            kind = "partial"
        if answer.shallow:
            kind = "shallow"
        self.report.count(index, kind, time.perf_counter() - started)
        return answer.output

    def _decide(self, expert: Expert, call: Call, step: Step, met: bool) -> Answer:
        """Let the schedule say what becomes of a call; one that cannot be forecast is run."""
        source = self.source
        if source is None:
            return self.runner.run(expert, call, step)
        if (told := source.told(step)) is not None:
            call = call.at_time(step.sigma, told)
        action = source.schedule.before(step)
        known = met and source.knows(step)
        if action is Action.PROBE:
            return probe(expert, call, step, source, known)
        if action is Action.RUN or not known:
            return self.runner.run(expert, call, step)
        if action is Action.SHALLOW:
            deep = source.deep
            if deep is None or not deep.knows(step):
                return self.runner.run(expert, call, step)
            return self.runner.shallow(expert, call, step, deep)
        if action is Action.CHECK:
            return check(expert, call, step, source)
        return self.runner.forecast(expert, call, step, source)

    def _put_aside(
        self, form: CallForm, expert: Expert, call: Call, step: Step, answer: Answer
    ) -> None:
        """Keep what a call came to until its step is over."""
        hidden = None if answer.taps is None else answer.taps.get("hidden")
        if hidden is not None:
            self._ask(form, expert, call, hidden, answer)
        record = CallRecord(
            step,
            answer.taps,
            answer.feature if self._keeps_forecasts else None,
            attention=answer.attention,
            image_tokens=self._masks.get(form),
            layout=self._layouts.get(form),
        )
        self._pending.append((form, record))

    def _ask(
        self, form: CallForm, expert: Expert, call: Call, hidden: Tensor, answer: Answer
    ) -> None:
        """Find out, once a run, what is wanted of a call's tokens."""
        if self._asks_for_tokens and form not in self._masks:
            self._masks[form] = expert.image_tokens(call, hidden)
        if self._asks_for_layout and form not in self._layouts:
            self._layouts[form] = expert.layout(call, hidden, prediction(answer.output))
