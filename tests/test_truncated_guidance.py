"""Guidance that stops in mid-run: the branch that is left goes on with its own history."""

import functools

import pytest
import torch
from families import FAMILIES, MORE, call
from test_hosts import fitted, recorded

from foreseer.evaluation.rows import analytic_rows
from foreseer.integration.forecasting import forecasting
from foreseer.integration.host.call import Conditions, take_rows
from foreseer.integration.session import Session
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.schedules import FirstBlock, SpeCa, TeaCache
from foreseer.training.closed_loop import L2PClosedLoop
from foreseer.training.gauss_newton import directions, feature_bases, linearise
from foreseer.training.tracking import check_guidance, track
from foreseer.trajectories.collector import Recorder
from foreseer.trajectories.prompts import Item

EVERY = FAMILIES | MORE
STOPS = {"zimage": "cfg_truncation", "lumina2": "cfg_trunc_ratio"}
every_stop = pytest.mark.parametrize("ratio", [0.2, 0.35, 0.5, 0.65])
LISTS = ([0, 2, 5], [0, 3], [0, 1, 2])


@pytest.mark.parametrize("name", STOPS)
@every_stop
def test_truncated_guidance_runs_the_list_and_nothing_else(name, ratio, tmp_path):
    changes = {STOPS[name]: ratio}
    pipe, recording = recorded(name, tmp_path / "r", **changes)
    for anchors in LISTS:
        predictor = fitted(recording, "output", anchors, tmp_path / f"p{len(anchors)}{anchors[-1]}")
        for given in ((predictor,), (Taylor(1), anchors, "output"), (Taylor(1), anchors, "hidden")):
            with forecasting(pipe, *given) as run:
                assert call(EVERY[name], pipe, **changes).isfinite().all()
            assert run.report().anchors == anchors


@pytest.mark.parametrize(
    ("schedule", "tap", "expected"),
    [
        (SpeCa(1e9), "hidden", [0, 3]),
        (SpeCa(0.0), "hidden", list(range(8))),
        (FirstBlock(1e9), "hidden", [0, 3]),
        (TeaCache(1e9), "output", [0, 3, 7]),  # it computes the last step
    ],
)
@pytest.mark.parametrize("name", STOPS)
@pytest.mark.filterwarnings("ignore:SpeCa")
def test_truncated_guidance_changes_no_decision(name, schedule, tap, expected):
    pipe = EVERY[name].build()
    with forecasting(pipe, Reuse(), [0, 3], tap, schedule) as run:
        assert call(EVERY[name], pipe, **{STOPS[name]: 0.2}).isfinite().all()
    assert run.report().anchors == expected


def without_guidance(pipe, index, timestep, kwargs):
    """What users' callbacks do: go on with the prompt's half of everything, here the second."""
    if index == 3:
        pipe._guidance_scale = 1.0
        return {name: value.chunk(2)[-1] for name, value in kwargs.items()}
    return {}


def test_truncated_guidance_of_a_callback_goes_on_with_the_prompts_branch(monkeypatch):
    pipe, seen, given = FAMILIES["sd3"].build(), {}, {}
    calling = functools.partial(
        call,
        FAMILIES["sd3"],
        pipe,
        callback_on_step_end=without_guidance,
        callback_on_step_end_tensor_inputs=["prompt_embeds", "pooled_prompt_embeds"],
    )
    with forecasting(pipe, Reuse(), [0, 2], "output") as run:
        source = run.session.source
        on_step = source.on_step

        def watched(record):
            given[record.index] = record.v.clone()
            for made in record.calls:
                if made.taps is not None:
                    seen[record.index] = made.taps["output"].clone()
            on_step(record)

        monkeypatch.setattr(source, "on_step", watched)
        calling()
    assert run.report().anchors == [0, 2]
    prompts, negative = seen[2].chunk(2)[1], seen[2].chunk(2)[0]
    assert not torch.equal(prompts, negative)
    for index in range(4, 8):
        assert torch.equal(given[index], prompts)
    recorder = Recorder(["output"])
    session = Session(pipe, observers=[recorder])
    calling()
    session.detach()
    assert [sorted(step) for step in recorder.features["output"]] == [[0, 1]] * 4 + [[1]] * 4
    assert recorder.branch_steps == [4, 8]


def rows_of(name, recording, anchors):
    rows = analytic_rows(anchors, recording.header.sigmas)["taylor_1"]
    return rows.repeat(recording.header.num_branches, 1, 1)


@pytest.mark.parametrize("name", STOPS)
def test_truncated_guidance_in_closed_loop_fits(name, tmp_path):
    changes, family = {STOPS[name]: 0.2}, EVERY[name]
    pipe, recording = recorded(name, tmp_path / "r", **changes)
    items = [Item(i, i, family.inputs(i)) for i in range(2)]
    rows, settings = rows_of(name, recording, [0, 3]), {**family.settings, **changes}
    bases = feature_bases(recording.stack("gram/hidden"), [0, 3])
    moves = directions([0, 3], bases, rows)
    finals = recording.stack("final", [0, 1])
    predictor = L2P(rows.shape[-1], [0, 3], len(rows))
    predictor.set_rows(rows)
    found = linearise(pipe, predictor, moves, "hidden", items, finals, **settings)
    assert found.curvature.isfinite().all() and bool((found.constant > 0).all())
    with pytest.raises(ValueError, match=r"last \[8, \d\] steps; this fit is for guidance"):
        L2PClosedLoop(str(tmp_path / "r"), "none", [0, 3])


def test_guidance_that_varies_in_time_is_refused_at_the_anchor_that_shows_it(tmp_path):
    family = FAMILIES["sd3"]
    pipe, recording = recorded("sd3", tmp_path / "r")
    items = [Item(i, i, family.inputs(i)) for i in range(2)]

    def stronger(pipe, index, timestep, kwargs):
        pipe._guidance_scale = 5.0 + index
        return {}

    batches, states = [items], recording.stack("states", [0, 1])
    rows = rows_of("sd3", recording, [0, 3, 5])
    settings = {**family.settings, "callback_on_step_end": stronger}
    with pytest.raises(ValueError, match="guidance combines the branches by .* at step 3"):
        track(pipe, batches, states, [0, 3, 5], rows, **settings)
    found, _ = track(pipe, batches, states, [0, 3, 5], rows, **family.settings)
    assert found.isfinite().all()
    weights = torch.tensor([-2.0, 3.0])
    check_guidance(weights, weights * (1 + 1e-4), 3, torch.float32)


def test_conditions_know_a_branch_only_where_that_is_certain():
    x_t, shared = torch.randn(1, 3, 4).repeat(2, 1, 1), torch.randn(5, 3)
    text = torch.randn(2, 6)
    known = Conditions(((x_t,), {"text": text, "ids": shared}), 2, 2, listed=False)
    later = torch.randn(1, 3, 4)

    def find(text, x_t=later, ids=shared):
        return known.find(((x_t,), {"text": text, "ids": ids}))

    assert find(text[1:]) == (1,) and find(text[:1]) == (0,)
    assert find(torch.randn(1, 6)) is None  # another prompt
    assert find(text[1:], torch.randn(1, 3, 8)) is None  # latents of another size
    assert find(text[1:], ids=torch.randn(9, 3)) is None
    assert find(text, x_t) is None  # no fewer rows
    alike = Conditions(((x_t,), {"text": text[:1].repeat(2, 1)}), 2, 2, listed=False)
    assert alike.find(((later,), {"text": text[:1]})) is None  # nothing tells them apart
    entries = [torch.randn(2, 3), torch.randn(3, 3), torch.randn(2, 3), torch.randn(3, 3)]
    lists = Conditions((([later[0]] * 4, entries), {}), 2, 4, listed=True)
    assert lists.find((([later[0]] * 2, entries[2:]), {})) == (1,)


def test_rows_of_lists_are_taken_where_the_host_takes_lists():
    each = [torch.full((3, 2), float(i)) for i in range(3)]
    assert take_rows({"x": each}, [2], 3, listed=True)["x"] == each[2:]
    sides = take_rows({"residuals": each}, [2], 3)["residuals"]  # of three blocks, a row a sample
    assert [tuple(side.shape) for side in sides] == [(1, 2)] * 3
