"""A transformer shared by several callers: each is answered as if it had the transformer alone."""

import contextlib
import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from tiny_hosts import STEPS, bare_pipeline, pipeline, prompt, run, seeded

from foreseer.integration.forecasting import attach, forecasting
from foreseer.integration.session import Session
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.predictors.tokens import ClusterPolicy
from foreseer.schedules import FirstBlock, SpeCa
from foreseer.trajectories.collector import Recorder

pytestmark = pytest.mark.fault
ANCHORS = (0, 1, 4)
PATIENCE = 60  # seconds that a thread of a test may take
CALLS = 6
ROWS = 4  # as many as a guided call of two samples


class Meeting:
    """Two threads that wait for each other inside a block of a shared transformer.

    A pre-hook on the first block holds the plain thread there until the forecasting one has made
    some progress, or has shown that it waits for its turn.
    """

    def __init__(self, transformer: Any) -> None:
        self.inside = threading.Event()
        self.go_on = threading.Event()
        self.plain: int | None = None
        self.handle = transformer.transformer_blocks[0].register_forward_pre_hook(self.hold)

    def hold(self, module: Any, args: Any) -> None:
        if threading.get_ident() == self.plain and not self.inside.is_set():
            self.inside.set()
            assert self.go_on.wait(PATIENCE)


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A thread that is started, and what it is going to have returned or raised."""
    found: list[Any] = []

    def caught() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    return thread, found


def joined(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def beside(pipe: Any) -> Any:
    """Another pipeline around the same transformer, with a scheduler of its own."""
    other = FluxPipeline(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    return other


def other_run(pipe: Any) -> torch.Tensor:
    """Another picture than `run` makes."""
    return run("flux", pipe, generator=seeded(7), **prompt(77))


@contextlib.contextmanager
def attached(setup: str, pipe: Any):
    """Something that exchanges parts of the transformer while it runs."""
    if setup in ("output", "hidden", "residual"):
        with forecasting(pipe, Taylor(1), ANCHORS, setup) as found:
            yield found
    elif setup == "clusters":
        with forecasting(pipe, Taylor(1), ANCHORS, tokens=ClusterPolicy(2)) as found:
            yield found
    elif setup == "recorder":
        session = Session(pipe, observers=[Recorder(["hidden", "residual", "blocks.0"])])
        yield session
        session.detach()
    else:
        schedule = FirstBlock(0.5) if setup == "first_block" else SpeCa(0.5)
        with forecasting(pipe, Taylor(1), schedule=schedule) as found:
            yield found


SETUPS = ["output", "hidden", "residual", "clusters", "recorder", "first_block", "speca"]


@pytest.mark.filterwarnings("ignore:SpeCa")
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("setup", SETUPS)
def test_field_threads_a_thread_that_shares_the_transformer_draws_its_own_pictures(setup, warm):
    pipe = pipeline("flux")
    other = beside(pipe)
    plain = other_run(other)
    with attached(setup, pipe):
        alone = run("flux", pipe)
    with attached(setup, pipe):
        if warm:
            run("flux", pipe)
        mine, ours = in_thread(lambda: [run("flux", pipe) for _ in range(CALLS)])
        theirs, others = in_thread(lambda: [other_run(other) for _ in range(CALLS)])
        joined(mine, theirs)
    for found, wanted in ((ours[0], alone), (others[0], plain)):
        assert not isinstance(found, BaseException), found
        assert all(torch.equal(image, wanted) for image in found)


def test_field_threads_attaching_waits_for_a_call_that_another_thread_is_inside_of():
    pipe = pipeline("flux")
    other = beside(pipe)
    plain, meeting = other_run(other), Meeting(pipe.transformer)

    def theirs() -> torch.Tensor:
        meeting.plain = threading.get_ident()
        return other_run(other)

    def ours() -> torch.Tensor:
        with forecasting(pipe, Reuse(), (0, 2), "hidden"):
            started.set()
            return run("flux", pipe)

    started = threading.Event()
    first, others = in_thread(theirs)
    assert meeting.inside.wait(PATIENCE)
    second, mine = in_thread(ours)
    assert not started.wait(0.3)  # else what it puts on the transformer meets the call under way
    meeting.go_on.set()
    joined(first, second)
    meeting.handle.remove()
    assert torch.equal(others[0], plain)
    with forecasting(pipe, Reuse(), (0, 2), "hidden"):
        assert torch.equal(mine[0], run("flux", pipe))


def by_hand(pipe: Any, steps: int = STEPS) -> torch.Tensor:
    """A loop without a pipeline call; `steps` of its steps are made."""
    with torch.no_grad():
        pipe.scheduler.set_timesteps(STEPS)
        x_t, label = torch.randn(ROWS, 1, 4, 4, generator=seeded()), torch.tensor([0, 1, 3, 3])
        for timestep in pipe.scheduler.timesteps[:steps]:
            v = pipe.transformer(x_t, timestep.expand(ROWS), label).sample
            x_t = pipe.scheduler.step(v, timestep, x_t, return_dict=False)[0]
    return x_t


def test_field_threads_a_loop_by_hand_is_known_by_its_thread():
    pipe = bare_pipeline(pipeline("dit"))
    inputs = (
        torch.randn(2, 1, 4, 4, generator=seeded(9)),
        torch.tensor([3, 3]),
        torch.tensor([0, 1]),
    )
    with torch.no_grad():
        plain = pipe.transformer(*inputs).sample
        with forecasting(pipe, Reuse(), (0,), "output"):
            by_hand(pipe, 3)  # broken off: its run is open
            thread, found = in_thread(lambda: no_grad(pipe.transformer, inputs))
            joined(thread)
    assert torch.equal(found[0], plain)


def no_grad(transformer: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return transformer(*inputs).sample


def test_field_threads_a_loop_by_hand_that_broke_off_leaves_other_pipelines_alone():
    pipe = pipeline("dit_guided")
    plain = run("dit_guided", pipe)
    hand = bare_pipeline(pipe)
    hand.scheduler = copy.deepcopy(pipe.scheduler)
    with forecasting(hand, Reuse(), (0,), "output"):
        by_hand(hand, 3)
        assert torch.equal(run("dit_guided", pipe), plain)


def test_field_threads_two_threads_in_one_pipeline_are_told_and_the_later_one_is_right():
    pipe = pipeline("flux")
    opened, stepped = threading.Event(), threading.Event()

    def wait_at_first(_: Any, index: int, timestep: Any, kwargs: Any) -> Any:
        if index == 0:
            opened.set()
            assert stepped.wait(PATIENCE)
        return kwargs

    def let_go(_: Any, index: int, timestep: Any, kwargs: Any) -> Any:
        if index == 2:
            stepped.set()
            thread.join(PATIENCE)
        return kwargs

    with forecasting(pipe, Taylor(1), ANCHORS, "hidden"):
        alone = run("flux", pipe)
        thread, early = in_thread(lambda: run("flux", pipe, callback_on_step_end=wait_at_first))
        assert opened.wait(PATIENCE)
        late = run("flux", pipe, callback_on_step_end=let_go)
    assert isinstance(early[0], ValueError)
    assert "two threads share one FluxPipeline" in str(early[0])
    assert "scheduler of its own" in str(early[0])
    assert torch.equal(late, alone)


def test_field_threads_a_loop_by_hand_that_moves_to_another_thread_is_refused():
    pipe = bare_pipeline(pipeline("dit"))
    run_ = attach(pipe, Reuse(), (0,), "output")
    by_hand(pipe, 1)
    x_t = torch.randn(ROWS, 1, 4, 4, generator=seeded())
    step = pipe.scheduler.step
    thread, found = in_thread(lambda: step(x_t, pipe.scheduler.timesteps[1], x_t))
    joined(thread)
    run_.detach()
    assert isinstance(found[0], ValueError)
    assert "a loop has moved to another thread" in str(found[0])


def test_field_threads_what_locals_returned_is_not_emptied():
    class Keeping(FluxPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            mine = locals()
            output = super().__call__(*args, **kwargs)
            assert set(mine) >= {"self", "args", "kwargs"}
            return output

    pipe = pipeline("flux")
    with forecasting(pipe, Taylor(1), ANCHORS, "hidden"):
        expected = run("flux", pipe)
    keeping = Keeping(**pipe.components)
    keeping.set_progress_bar_config(disable=True)
    with forecasting(keeping, Taylor(1), ANCHORS, "hidden"):
        assert torch.equal(run("flux", keeping), expected)
