"""The public way to use a predictor: `with forecasting(pipe, predictor): pipe(...)`."""

import contextlib
import copy
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from foreseer.checkpoints.spec import (
    PredictorMismatch,
    PredictorSpec,
    check_evaluations,
    check_host,
    choose_anchors,
)
from foreseer.integration.call_groups import CallGroups, Groups
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.handover import Handover
from foreseer.integration.host.hook import BEFORE_LAST
from foreseer.integration.host.hosts import host_of, transformers_of
from foreseer.integration.host.loop import Steps
from foreseer.integration.host.module_host import ModuleHost
from foreseer.integration.memory import check_budget
from foreseer.integration.policy import Schedule
from foreseer.integration.report import Report
from foreseer.integration.session import SESSIONS, Session
from foreseer.predictors.base import LinearPredictor, Predictor
from foreseer.predictors.pruning_policy import PruningPolicy
from foreseer.predictors.tokens import TokenPolicy

TAPS = ("output", "hidden", "residual", BEFORE_LAST)


class Run:
    """A predictor attached to a pipeline; `report()` tells what the latest call did."""

    def __init__(self, session: Session, after: Handover | None = None) -> None:
        self.session: Session | None = session  # None when detached: it holds the pipeline
        self._after = after
        if after is not None and session.source is not None:
            after.join(session.source.tap)
        self._report = session.report

    def steps(self, times: Any, key: Hashable = None, inversion: bool = False) -> Steps:
        """The steps of one run of a loop, see `ModuleHost.steps`.

        Raises:
            ValueError: it is detached, or attached to a pipeline, which counts its own.
        """
        host = None if self.session is None else self.session.host
        if not isinstance(host, ModuleHost):
            raise ValueError(
                f"{self!r} has no loop to count: a pipeline's scheduler says its steps; for a loop "
                "around a module attach to foreseer.host(module)."
            )
        return host.steps(times, key, inversion)

    def reset(self, reason: str) -> None:
        """Forget what the run under way has computed so far; its next calls are computed.

        Every run begins anew by itself. This is for a run in which something changes that no
        forecast can know: another observation, tokens taken back.

        Args:
            reason: of the reset, for the report.

        Raises:
            ValueError: no run is under way in the code that calls this.
            PredictorMismatch: a learned predictor, whose anchors are those of a whole run.
        """
        if self.session is None:
            raise ValueError(f"{self!r} follows no run, so there is nothing to reset.")
        self.session.reset(reason)

    def report(self) -> Report:
        """Which steps ran and which were forecast, state bytes, time per kind of step.

        Raises:
            ValueError: nothing that was attached to is in the pipeline any more, so that calls
                since were not seen.
        """
        if self.session is not None:
            self.session.attachment.check_reached()
            return self.session.report
        return self._report

    def detach(self) -> None:
        """Give the pipeline its own behaviour back."""
        if self.session is not None:
            self._report = self.session.report
            self.session.detach()
            self.session = None
        if self._after is not None:
            self._after.leave()
            self._after = None

    def __repr__(self) -> str:
        """Whether it is attached and to what, and what the latest call did."""
        if self.session is None:
            return f"<Run, detached: {str(self._report).splitlines()[0]}>"
        done = str(self.session.report).splitlines()[0]
        return f"<Run, attached to {self.session.host.name}: {done}>"


def detach(pipe: Any) -> bool:
    """Give a pipeline its own behaviour back, whoever attached what to it.

    Args:
        pipe: the pipeline; others on the same transformers get theirs back too.

    Returns:
        Whether something was attached.
    """
    transformers = {id(transformer) for transformer in transformers_of(pipe).values()}
    attached = [
        session
        for session in list(SESSIONS)
        if session.pipe is pipe
        or any(id(expert.transformer) in transformers for expert in session.experts.values())
    ]
    for session in attached:
        session.detach()
    return bool(attached)


def attach(
    pipe: Any,
    predictor: Predictor | Mapping[int, Predictor] | str | os.PathLike[str],
    anchors: Sequence[int] | None = None,
    tap: str | None = None,
    schedule: Schedule | None = None,
    memory_budget: int | None = None,
    evaluations: int | None = None,
    tokens: TokenPolicy | None = None,
    attention_rule: LinearPredictor | None = None,
    groups: Groups | None = None,
    after: Handover | None = None,
) -> Run:
    """Make a pipeline forecast with `predictor` until `detach`.

    Args:
        pipe: a diffusers pipeline with a `transformer` and a `scheduler`, or a `host`.
        predictor: a forecaster, several by their evaluations, or the folder, `zoo:<name>` or hub
            name of either.
        anchors: steps at which the network runs; None takes the predictor's own.
        tap: `output`, `hidden`, `residual` or `before_last` (the last block runs on the step's
            tokens and the forecast); None takes the predictor's own, else `output`, or `hidden`
            under `SpeCa` and with `tokens`.
        schedule: chooses further anchors while the run goes on; the predictor's own stay anchors,
            and a predictor without any starts with step 0.
        memory_budget: bytes that cached features may take; None for what is available on the
            device. A run that needs more ends after its first step, before it stores more.
        evaluations: which of several predictors; one of its own must be for that number.
        tokens: which tokens are computed at which forecast steps of the tap `hidden`, or take part
            in the self-attention of computed ones; None for the predictor's own, if any.
        attention_rule: how attention outputs are forecast for them; None reuses the newest
            anchor's.
        groups: group number of every sample and token, `(B, N)`, or a function that makes them of
            the call's arguments, for a predictor or a policy that goes by token groups.
        after: what every run begins with, where it goes on from one on a coarser grid, as
            `ProgressivePipeline.after` makes it; anchors may then begin later than step 0.

    Returns:
        The run, for its report and for detaching.

    Raises:
        PredictorMismatch: a learned predictor was fitted on another model.
        ValueError: no anchors are known, or the host has a cache enabled.
    """
    check_budget(memory_budget)
    predictor = one_of(predictor, evaluations)
    tokens = _own_tokens(tokens, predictor)
    if tokens is not None or attention_rule is not None:
        tap = _hidden_for(tokens, attention_rule, predictor, tap, schedule)
    source = checked_forecaster(pipe, predictor, anchors, tap, schedule, tokens)
    source.memory_budget = memory_budget
    own = _call_groups(groups, predictor, tokens, source.tap)
    _check_after(predictor, after, schedule, tokens)
    if tokens is None:
        source.before = after
        return Run(Session(pipe, source, groups=own), after)
    from foreseer.integration.pruning_runner import PruningRunner  # loaded by whoever asks for it
    from foreseer.integration.token_runner import TokenRunner

    if isinstance(tokens, PruningPolicy):
        runner: TokenRunner = PruningRunner(pipe, source, tokens, attention_rule)
    else:
        runner = TokenRunner(pipe, source, tokens, attention_rule)
    return Run(Session(pipe, source, [runner], runner, groups=own))


def _check_after(
    predictor: Predictor,
    after: Handover | None,
    schedule: Schedule | None,
    tokens: TokenPolicy | None,
) -> None:
    """Raise unless a predictor begins its runs with what it is given, or with nothing.

    Raises:
        PredictorMismatch: a learned predictor was fitted on runs that begin otherwise.
        ValueError: a schedule or a token policy decides by what a run itself has computed.
    """
    kind = type(predictor).__name__
    if after is None:
        if predictor.continues:
            raise PredictorMismatch(
                f"this {kind} was fitted on runs that go on from a stage before; attach to that "
                "stage, and give its run: after=pipe.after(run)."
            )
        return
    if predictor.spec is not None and not predictor.continues:
        raise PredictorMismatch(
            f"this {kind} was fitted on runs that begin with nothing; leave after= out, or fit "
            "one with fit_resampled."
        )
    if schedule is not None or tokens is not None:
        name = type(tokens if schedule is None else schedule).__name__
        raise ValueError(
            f"{name} decides by what the run itself has computed, and this run begins with the "
            "features of another; use a list of anchors."
        )


def _own_tokens(tokens: TokenPolicy | None, predictor: Predictor) -> TokenPolicy | None:
    """The policy of a run: the one given, or the one that the predictor was fitted with.

    Raises:
        PredictorMismatch: there are both.
    """
    own: TokenPolicy | None = predictor.tokens
    if own is not None and tokens is not None:
        raise PredictorMismatch(
            f"this {type(predictor).__name__} was fitted with a {type(own).__name__} of its own; "
            "leave tokens= out, or use a predictor without one."
        )
    return tokens if own is None else own


def _call_groups(
    groups: Groups | None, predictor: Predictor, tokens: TokenPolicy | None, tap: str
) -> CallGroups | None:
    """The token groups of the runs to come, once they are known to be wanted.

    Raises:
        ValueError: they are given and nothing goes by them, or the other way round.
    """
    wanting = [each for each in (predictor, tokens) if each is not None and each.group_names]
    if not wanting:
        if groups is not None:
            raise ValueError(
                f"groups= was given, but {type(predictor).__name__} treats all tokens alike; use "
                "a predictor fitted on token groups or a policy that goes by them, or leave it out."
            )
        return None
    names = wanting[0].group_names
    kind = type(wanting[0]).__name__
    if groups is None:
        raise ValueError(
            f"this {kind} goes by the token groups {', '.join(names)}; pass groups=, a group "
            "number per sample and token (region_groups makes them of a mask)."
        )
    if any(each.group_names != names for each in wanting):
        raise ValueError(
            f"the predictor has the token groups {list(predictor.group_names)}, the policy "
            f"{list(wanting[-1].group_names)}; expected the same."
        )
    return CallGroups(groups, names, {tap})


def _hidden_for(
    tokens: TokenPolicy | None,
    attention_rule: LinearPredictor | None,
    predictor: Predictor,
    tap: str | None,
    schedule: Schedule | None,
) -> str:
    """The tap of forecasts of which tokens are computed, once all goes together."""
    if tokens is None:
        raise ValueError("attention_rule is for computed tokens; pass tokens=, which of them.")
    if not isinstance(tokens, TokenPolicy):
        raise ValueError(
            f"tokens is {tokens!r}, expected a policy of foreseer.predictors.tokens, such as "
            "ClusterPolicy(16)."
        )
    if schedule is not None:
        raise ValueError(
            f"tokens are computed on a list of anchors, not under {type(schedule).__name__}; leave "
            "schedule or tokens out."
        )
    if tap not in (None, "hidden"):
        raise ValueError(f"tokens are computed on the tap 'hidden', not on {tap!r}.")
    if predictor.spec is not None and predictor.spec.tap != "hidden":
        raise PredictorMismatch(
            f"the predictor was fitted on the tap {predictor.spec.tap!r}; computed tokens need one "
            "fitted on 'hidden', the stream that enters the head."
        )
    if attention_rule is not None and attention_rule.learned:
        raise ValueError(
            f"the attention rule {type(attention_rule).__name__} is learned, but nothing was "
            "recorded of the attention outputs; use Reuse() or Taylor(1)."
        )
    return "hidden"


def one_of(
    predictor: Predictor | Mapping[int, Predictor] | str | os.PathLike[str],
    evaluations: int | None = None,
) -> Predictor:
    """The predictor for a number of evaluations, loaded where it is named.

    Args:
        predictor: see `attach`.
        evaluations: see `attach`.

    Raises:
        ValueError: there is none for that number, or several and none is asked for.
    """
    if isinstance(predictor, str | os.PathLike):
        from foreseer.checkpoints.format import load_predictor  # every learned class

        return load_predictor(os.fspath(predictor), evaluations=evaluations)
    if not isinstance(predictor, Mapping):
        check_evaluations(predictor, evaluations)
        return predictor
    if evaluations is None or evaluations not in predictor:
        raise ValueError(
            f"these predictors are for {sorted(predictor)} evaluations, asked for {evaluations}; "
            "say evaluations=, one of them."
        )
    return predictor[evaluations]


def checked_forecaster(
    pipe: Any,
    predictor: Predictor,
    anchors: Sequence[int] | None = None,
    tap: str | None = None,
    schedule: Schedule | None = None,
    tokens: TokenPolicy | None = None,
) -> Forecaster:
    """What `attach` attaches, once everything it is given has been checked against the pipeline.

    Args:
        pipe: see `attach`; None where whoever runs the steps has checked the model.
        predictor: see `attach`.
        anchors: see `attach`.
        tap: see `attach`.
        schedule: see `attach`.
        tokens: see `attach`.

    Raises:
        PredictorMismatch: a learned predictor was fitted on another model.
        ValueError: no anchors are known, or tap and schedule do not go together.
    """
    spec: PredictorSpec | None = predictor.spec
    if spec is not None:
        _check_pipeline(spec, pipe)
        if tap is not None and tap != spec.tap:
            raise PredictorMismatch(
                f"the predictor was fitted on the tap {spec.tap!r}, not {tap!r}; leave `tap` out."
            )
        anchors, tap = choose_anchors(spec, predictor, anchors), spec.tap
    if predictor.learned and spec is None:
        raise ValueError(
            "a learned predictor without its spec cannot be checked against this host; load it "
            "with load_predictor, or set predictor.spec."
        )
    if anchors is None and schedule is None:
        raise ValueError("this predictor has no anchors of its own; pass anchors=[0, ...].")
    if not (schedule is None or isinstance(schedule, Schedule)):
        raise ValueError(
            f"schedule is {schedule!r}, expected one of foreseer.schedules, such as TeaCache(0.1), "
            "or a Schedule of your own; a list of steps is anchors=."
        )
    anchors = (0,) if anchors is None else tuple(anchors)
    tap = tap or ("hidden" if schedule is not None and schedule.checks else "output")
    if tap not in TAPS:
        raise ValueError(f"tap is {tap!r}, expected one of {', '.join(map(repr, TAPS))}.")
    _check_together(predictor, tap, schedule)
    return Forecaster(predictor, tap, anchors, spec, pipe, copy.copy(schedule), tokens=tokens)


def _check_together(predictor: Predictor, tap: str, schedule: Schedule | None) -> None:
    """Raise unless predictor, tap and schedule go together."""
    if predictor.reads and tap != "output":
        raise ValueError(
            f"{type(predictor).__name__} reads the output off the hidden state, so it forecasts "
            f"the tap 'output', not {tap!r}."
        )
    inside = sorted(predictor.needs - {"x_t"})
    decides = schedule is not None and (schedule.probe is not None or schedule.checks)
    places = ("hidden", BEFORE_LAST) if inside == ["tokens"] else ("hidden",)
    if inside and (tap not in places or decides):
        raise ValueError(
            f"{type(predictor).__name__} needs the {' and '.join(inside)} of the step, which exist "
            f"on the tap {' or '.join(map(repr, places))} with a list of anchors, not on "
            f"{tap!r} under {type(schedule).__name__ if schedule else 'a list'}."
        )
    if predictor.block_weights is not None and tap != BEFORE_LAST:
        raise ValueError(
            f"{type(predictor).__name__} has weights for the last block, which runs on the tap "
            f"{BEFORE_LAST!r}, not {tap!r}."
        )
    if tap == BEFORE_LAST and decides:
        raise ValueError(
            f"{type(schedule).__name__} looks into the network on its way, which the tap "
            f"{BEFORE_LAST!r} does not go with; use a list of anchors, or a tap of its own."
        )
    if schedule is not None and schedule.checks and tap != "hidden":
        raise ValueError(
            f"{type(schedule).__name__} checks what enters the head, so the tap must be 'hidden', "
            f"not {tap!r}."
        )


def _check_pipeline(spec: PredictorSpec, pipe: Any) -> None:
    if pipe is not None:
        host = host_of(pipe)
        check_host(spec, host.fingerprint(), host.scheduler)


@contextlib.contextmanager
def forecasting(
    pipe: Any,
    predictor: Predictor | Mapping[int, Predictor] | str | os.PathLike[str],
    anchors: Sequence[int] | None = None,
    tap: str | None = None,
    schedule: Schedule | None = None,
    memory_budget: int | None = None,
    evaluations: int | None = None,
    tokens: TokenPolicy | None = None,
    attention_rule: LinearPredictor | None = None,
    groups: Groups | None = None,
    after: Handover | None = None,
) -> Iterator[Run]:
    """`attach` for the length of a `with` block; the pipeline is its old self afterwards."""
    run = attach(
        pipe,
        predictor,
        anchors,
        tap,
        schedule,
        memory_budget,
        evaluations,
        tokens,
        attention_rule,
        groups,
        after,
    )
    try:
        yield run
    finally:
        run.detach()
