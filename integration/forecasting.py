"""The public way to use a predictor: `with forecasting(pipe, predictor): pipe(...)`."""

import contextlib
import copy
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from foreseer.checkpoints.spec import (
    DEEP_TAP,
    TAPS,
    PredictorMismatch,
    PredictorSpec,
    check_evaluations,
    check_host,
    choose_anchors,
    is_tap,
)
from foreseer.integration.call_groups import CallGroups, Groups
from foreseer.integration.combinations import (
    check_after,
    check_between,
    check_shallow,
    check_together,
    hidden_for,
)
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.handover import Handover
from foreseer.integration.host.hosts import host_of, transformers_of
from foreseer.integration.host.loop import Steps
from foreseer.integration.host.module_host import ModuleHost
from foreseer.integration.memory import check_budget
from foreseer.integration.policy import Anchors, Schedule
from foreseer.integration.report import Report
from foreseer.integration.schedule import Shallow
from foreseer.integration.session import SESSIONS, Session
from foreseer.predictors.base import LinearPredictor, Predictor
from foreseer.predictors.pruning_policy import PruningPolicy
from foreseer.predictors.tokens import TokenPolicy


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
    shallow: Shallow | None = None,
) -> Run:
    """Make a pipeline forecast with `predictor` until `detach`.

    Args:
        pipe: a diffusers pipeline with a `transformer` and a `scheduler`, or a `host`.
        predictor: a forecaster, several by their evaluations, or the folder, `zoo:<name>` or hub
            name of either.
        anchors: steps at which the network runs; None takes the predictor's own.
        tap: `output`, `hidden`, `residual`, `before_last` (the last block runs) or `deep.<d>` (d at
            each end); None takes the predictor's own, else `output`, or `hidden` under `SpeCa`.
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
        shallow: anchors at which the outer blocks alone run, and what forecasts the rest there.

    Returns:
        The run, for its report and for detaching.

    Raises:
        PredictorMismatch: a learned predictor was fitted on another model.
        ValueError: no anchors are known, or the host has a cache enabled.
    """
    check_budget(memory_budget)
    predictor = one_of(predictor, evaluations)
    tokens = _own_tokens(tokens, predictor)
    check_shallow(shallow, tokens, after)
    if tokens is not None or attention_rule is not None:
        tap = hidden_for(tokens, attention_rule, predictor, tap, schedule)
    source = checked_forecaster(pipe, predictor, anchors, tap, schedule, tokens, shallow)
    source.memory_budget = memory_budget
    own = _call_groups(groups, predictor, tokens, source.tap)
    check_after(predictor, after, schedule, tokens)
    if tokens is None:
        source.before = after
        return Run(Session(pipe, source, groups=own), after)
    runner = _token_runner(pipe, source, tokens, attention_rule)
    return Run(Session(pipe, source, [runner], runner, groups=own))


def _token_runner(
    pipe: Any, source: Forecaster, tokens: TokenPolicy, attention_rule: LinearPredictor | None
) -> Any:
    """What computes some tokens of a call; loaded by whoever asks for it."""
    from foreseer.integration.pruning_runner import PruningRunner
    from foreseer.integration.token_runner import TokenRunner

    if isinstance(tokens, PruningPolicy):
        return PruningRunner(pipe, source, tokens, attention_rule)
    return TokenRunner(pipe, source, tokens, attention_rule)


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
    shallow: Shallow | None = None,
) -> Forecaster:
    """What `attach` attaches, once everything it is given has been checked against the pipeline.

    Args:
        pipe: see `attach`; None where whoever runs the steps has checked the model.
        predictor: see `attach`.
        anchors: see `attach`.
        tap: see `attach`.
        schedule: see `attach`.
        tokens: see `attach`.
        shallow: see `attach`.

    Raises:
        PredictorMismatch: a learned predictor was fitted on another model.
        ValueError: no anchors are known, or tap, schedule and shallow steps do not go together.
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
    if not is_tap(tap):
        expected = ", ".join(map(repr, (*TAPS, "deep.1")))
        raise ValueError(f"tap is {tap!r}, expected one of {expected}, deep.2, ...")
    check_together(predictor, tap, schedule)
    if shallow is None:
        return Forecaster(predictor, tap, anchors, spec, pipe, copy.copy(schedule), tokens=tokens)
    deep = _deep(pipe, shallow, anchors, tap, schedule)
    kinds = Anchors(anchors, frozenset(shallow.steps))
    return Forecaster(predictor, tap, anchors, spec, pipe, kinds, deep=deep)


def _deep(
    pipe: Any, shallow: Shallow, anchors: tuple[int, ...], tap: str, schedule: Schedule | None
) -> Forecaster:
    """What forecasts between the outer blocks at the shallow steps of a list.

    Raises:
        PredictorMismatch: a learned predictor was fitted on another model or for other full steps.
        ValueError: the steps are no part of the list, or it does not go with the tap or a schedule.
    """
    check_between(tap, schedule)
    predictor = one_of(shallow.predictor)
    own = shallow.tap if predictor.spec is None else None
    if own is not None and DEEP_TAP.fullmatch(own) is None:
        raise ValueError(f"the tap of shallow steps is {own!r}, expected 'deep.1', 'deep.2', ...")
    deep = checked_forecaster(pipe, predictor, shallow.full_steps(anchors), own)
    if DEEP_TAP.fullmatch(deep.tap) is None:
        raise PredictorMismatch(
            f"the predictor of the shallow steps was fitted on the tap {deep.tap!r}, expected "
            "deep.1, deep.2, ...; record that tap and fit on it."
        )
    return deep


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
    shallow: Shallow | None = None,
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
        shallow,
    )
    try:
        yield run
    finally:
        run.detach()
