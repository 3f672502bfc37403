"""Histories go by transformer and branches; whoever takes part in a run has one of three roles."""

import jaxtyping
import pytest
import torch
from tiny_hosts import STEPS, pipeline, run
from torch import nn

from foreseer.integration.forecaster import Forecaster
from foreseer.integration.forecasting import attach, forecasting
from foreseer.integration.histories import Histories, Kept, push
from foreseer.integration.host.branches import Branches
from foreseer.integration.host.call import Call
from foreseer.integration.observers import Observer, StepRecord
from foreseer.integration.policy import Action, Anchors, Schedule
from foreseer.integration.session import Session
from foreseer.predictors.base import History, Step
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.predictors.tokens import RandomPolicy
from foreseer.schedules import FirstBlock, SpeCa, TeaCache

ANCHORS = (0, 1, 4)
FEATURE = torch.arange(8.0).view(4, 2)  # two samples of two branches


def clock(index: int, branches: tuple[int, ...], expert: int = 0) -> Step:
    return Step(index, 1 - index / STEPS, STEPS, branches, expert)


def pushed(histories: Histories, step: Step, feature: torch.Tensor) -> None:
    found = histories.at(step)
    if found is None:
        found = histories.start(step)
    push(found.setdefault("output", [History(histories.window)]), step, feature, None)


# ------------------------------------------------------------------------------------- histories


def test_a_call_of_some_branches_goes_on_with_their_rows():
    histories = Histories(None)
    pushed(histories, clock(0, (0, 1)), FEATURE)
    (kept,) = histories.at(clock(1, (1,)))["output"]
    assert torch.equal(kept.features[0], FEATURE[2:]) and kept.steps == [0]
    assert histories.at(clock(1, (0, 1))) is None  # the other branch has ended
    assert histories.state_bytes() == FEATURE[2:].nbytes


def test_branches_in_another_order_are_put_in_theirs():
    histories = Histories(None)
    pushed(histories, clock(0, (0, 1)), FEATURE)
    (kept,) = histories.at(clock(1, (1, 0)))["output"]
    assert torch.equal(kept.features[0], torch.cat([FEATURE[2:], FEATURE[:2]]))


def test_a_transformer_and_a_slot_have_histories_of_their_own():
    histories = Histories(None)
    pushed(histories, clock(0, (0,)), FEATURE)
    assert histories.at(clock(1, (0,), expert=1)) is None
    assert histories.at(clock(1, (0,)), "other") is None
    assert histories.at(clock(1, (0,))) is not None


def test_a_call_of_more_branches_starts_anew_and_drops_what_it_holds():
    histories = Histories(None)
    pushed(histories, clock(0, (0,)), FEATURE[:2])
    pushed(histories, clock(0, (2,)), FEATURE[:2])
    pushed(histories, clock(3, (0, 1)), FEATURE)
    assert [history.steps for history in histories] == [[0], [3]]  # that of branch 2 stays
    (kept,) = histories.at(clock(4, (0,)))["output"]
    assert kept.steps == [3]


# -------------------------------------------------------------------------------------- branches


def call(rows: int, width: int = 3) -> Call:
    return Call(nn.Linear(1, 1), lambda x: x, (torch.zeros(rows, width),), {})


def step_of(branches: Branches, *calls: Call, samples: int = 2) -> list[tuple[int, ...] | None]:
    """The branches of a step's calls, as known before it closes."""
    found = []
    for each in calls:
        form, _ = branches.enter(0, "transformer", each)
        found.append(branches.of(form))
        branches.count(form, len(each.args[0]))
    branches.close(samples)
    return found


def test_branches_are_numbered_when_the_first_step_closes():
    branches = Branches()
    assert step_of(branches, call(2), call(4)) == [None, None]
    assert step_of(branches, call(2), call(4)) == [(0,), (1, 2)]


def test_a_call_of_another_shape_takes_the_branches_over():
    """Latents grow: were the old call known on, it would forecast from features of the new one."""
    branches = Branches()
    step_of(branches, call(2))
    assert step_of(branches, call(2)) == [(0,)]
    assert step_of(branches, call(2, width=5)) == [None]
    assert step_of(branches, call(2, width=5)) == [(0,)]
    assert step_of(branches, call(2)) == [None]


def test_runs_that_repeat_know_their_branches_and_refuse_others():
    branches = Branches()
    step_of(branches, call(4))
    branches.restart()
    assert step_of(branches, call(4)) == [(0, 1)]
    branches.restart()
    with pytest.raises(ValueError, match="held 2 guidance branches in the run before"):
        step_of(branches, call(4), samples=4)


def test_kept_features_are_put_together_for_any_call():
    kept = Kept()
    kept.keep(clock(0, (0, 1)), FEATURE)
    assert torch.equal(kept.at(clock(0, (1,))), FEATURE[2:])
    assert torch.equal(kept.at(clock(3, (0, 1)), 0), FEATURE)
    assert torch.equal(kept.by_branch(0), FEATURE.view(2, 2, 2))
    assert kept.steps(clock(3, (0, 1))) == [0] and kept.steps(clock(3, (2,))) == []
    assert kept.at_steps([1]).steps(clock(3, (0,))) == []


# ------------------------------------------------------------------------- schedules, observers


class EverySecond(Schedule):
    """What a user would write."""

    def before(self, step):
        return Action.FORECAST if step.index % 2 else Action.RUN


def test_a_schedule_of_ones_own_is_three_lines():
    pipe = pipeline("dit_guided")
    with forecasting(pipe, Reuse(), schedule=EverySecond()) as own:
        expected = run("dit_guided", pipe)
    with forecasting(pipe, Reuse(), range(0, STEPS, 2)) as listed:
        assert torch.equal(run("dit_guided", pipe), expected)
    assert own.report().anchors == listed.report().anchors == list(range(0, STEPS, 2))


@pytest.mark.parametrize("schedule", [TeaCache(0.1), FirstBlock(0.3), SpeCa(0.05, max_run=2)])
@pytest.mark.filterwarnings("ignore:SpeCa")
def test_one_schedule_on_two_pipelines_decides_for_each_alone(schedule):
    pipes = [pipeline("dit_guided"), pipeline("dit_guided")]
    with forecasting(pipes[0], Reuse(), tap="hidden", schedule=schedule) as alone:
        expected = run("dit_guided", pipes[0])
    anchors = alone.report().anchors
    runs = [attach(pipe, Reuse(), tap="hidden", schedule=schedule) for pipe in pipes]

    for pipe, attached in zip(pipes, runs, strict=True):
        assert torch.equal(run("dit_guided", pipe), expected)
        assert attached.report().anchors == anchors
    for attached in runs:
        attached.detach()


class Watching(Observer):
    """Writes down what a run's steps are."""

    taps = frozenset({"hidden"})
    wants_forecasts = True

    def __init__(self):
        self.records = []

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)


def test_an_observer_is_told_of_every_step_and_changes_none():
    pipe = pipeline("flux_two_calls")
    with forecasting(pipe, Taylor(1), ANCHORS, "output"):
        expected = run("flux_two_calls", pipe)
    watching = Watching()
    session = Session(pipe, Forecaster(Taylor(1), "output", ANCHORS), [watching])
    assert torch.equal(run("flux_two_calls", pipe), expected)
    session.detach()
    records = watching.records
    assert [record.index for record in records] == list(range(STEPS))
    assert torch.equal(records[-1].after, expected)
    for before, after in zip(records, records[1:], strict=False):
        assert torch.equal(before.after, after.before)
    for record in records:
        assert [made.step.branches for made in record.calls] == [(0,), (1,)]
        for made in record.calls:
            ran = record.index in ANCHORS
            assert (made.taps is not None, made.feature is not None) == (ran, not ran)
            assert not ran or set(made.taps) == {"hidden", "output"}


def test_a_list_of_anchors_takes_those_of_the_run_unless_it_has_its_own():
    of_the_run, own = Anchors(), Anchors([0, 3])
    for schedule in (of_the_run, own):
        schedule.open(STEPS, [0, 2])
    runs = [[s.before(clock(i, (0,))) is Action.RUN for i in range(4)] for s in (of_the_run, own)]
    assert runs == [[True, False, True, False], [True, False, False, True]]
    assert own.to_come(0, STEPS) == 1


# ---------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"attention_rule": Reuse()}, "pass tokens="),
        ({"tokens": RandomPolicy(2), "schedule": TeaCache(0.1)}, "not under TeaCache"),
        ({"tokens": RandomPolicy(2), "tap": "output"}, "on the tap 'hidden', not on 'output'"),
        (
            {"tokens": RandomPolicy(2), "attention_rule": L2P(STEPS, ANCHORS, 2)},
            "attention rule L2P is learned",
        ),
    ],
)
def test_tokens_go_with_a_list_of_anchors_on_the_hidden_tap(arguments, match):
    pipe = pipeline("dit_guided")
    with pytest.raises(ValueError, match=match), forecasting(pipe, Reuse(), ANCHORS, **arguments):
        pass
    assert "forward" not in vars(pipe.transformer)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"schedule": TeaCache}, "such as TeaCache"),
        ({"schedule": (0, 4)}, "a list of steps is anchors="),
        ({"tokens": 16}, "such as ClusterPolicy"),
    ],
)
def test_what_is_no_schedule_or_policy_is_refused_in_words(arguments, match):
    jaxtyping.config.update("jaxtyping_disable", True)  # as users run it
    try:
        with pytest.raises(ValueError, match=match):
            attach(pipeline("dit_guided"), Reuse(), ANCHORS, **arguments)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
