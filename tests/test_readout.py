"""A readout is L2P plus what a token's hidden state tells; it finds its place on every host."""

import contextlib
import dataclasses
import gc
import weakref

import pytest
import torch
from families import FAMILIES, MORE, call
from tiny_hosts import STEPS, pipeline, prompt, run, seeded, spec_for

from foreseer.checkpoints.format import CheckpointError, load_predictor, save_predictor
from foreseer.checkpoints.spec import PredictorMismatch, PredictorSpec
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.forecasting import forecasting
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.integration.host.layout import Layout, find_grid, find_layout
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.integration.observers import Observer, StepRecord
from foreseer.integration.session import Session
from foreseer.predictors.base import History, Step
from foreseer.predictors.linear import L2P
from foreseer.predictors.readout import Readout, neighbourhood
from foreseer.schedules import TeaCache

ANCHORS = (0, 2, 5)
EVERY = FAMILIES | MORE
REFUSED = {
    "latte": "has frames and samples on one axis; use the `output` tap",
    "ltx2": "predicts sound beside the video, with a head for each",
    "ltx2_all_guidance": "predicts sound beside the video, with a head for each",
}
"""The hosts without a layout: those without the `hidden` tap, by the reason that is given."""
TEXT_IN_THE_HEAD = {"lumina2": 3, "zimage": 60, "ernie_image": 4}
"""Tokens of text and padding among those of the head; the picture's are four."""


def awake(predictor: Readout, size: float = 0.3, seed: int = 0) -> Readout:
    """The readout with arbitrary rows, directions and constants."""
    predictor.weight += 0.1 * torch.randn(predictor.weight.shape, generator=seeded(seed)).double()
    mask = torch.zeros(predictor.num_steps).double()
    mask[list(predictor.anchors)] = 1
    predictor.weight *= mask
    for number, name in enumerate(("inner", "outer", "constant")):
        tensor = getattr(predictor, name)
        drawn = torch.randn(tensor.shape, generator=seeded(seed + 1 + number))
        tensor.copy_(size * drawn)
    return predictor


def readout(**changes) -> Readout:
    sizes = {"width": 16, "patch": 4, "rank": 3, "neighbours": True}
    return Readout(STEPS, ANCHORS, **{**sizes, **changes})


def clock(index: int, branches: tuple[int, ...] = (0,)) -> Step:
    return Step(index, 1 - index / STEPS, STEPS, branches)


@contextlib.contextmanager
def forecasts_of(pipe, predictor, anchors=ANCHORS):
    """A predictor at work without a spec, which `forecasting` asks for."""
    session = Session(pipe, Forecaster(predictor, "output", anchors))
    try:
        yield session
    finally:
        session.detach()


# ----------------------------------------------------------------------------- it starts as L2P

HOSTS = {"dit_guided": 4, "flux_embedded": 16, "flux_two_calls": 16}


def quiet(host: str, anchors: tuple[int, ...] = ANCHORS) -> tuple[Readout, L2P]:
    """A readout that reads nothing, though it has directions, and L2P of the same rows."""
    branches = 1 if host == "flux_embedded" else 2
    predictor = awake(Readout(STEPS, anchors, branches, (0,), 16, HOSTS[host], 3))
    predictor.outer.zero_()
    predictor.constant.zero_()
    rows = L2P(STEPS, anchors, branches)
    rows.weight.copy_(predictor.weight)
    return predictor, rows


def in_dtype(host: str, dtype: torch.dtype):
    pipe = pipeline(host)
    pipe.transformer.to(dtype)
    changes = {}
    if host.startswith("flux"):
        names = ["prompt_embeds", "pooled_prompt_embeds"]
        names += [f"negative_{name}" for name in names] if host == "flux_two_calls" else []
        drawn = {True: {0: prompt(1000), 1: prompt(1001)}, False: {0: prompt(0), 1: prompt(10)}}
        for name in names:
            each = drawn[name.startswith("negative_")]
            parts = [each[i][name.removeprefix("negative_")] for i in (0, 1)]
            changes[name] = torch.cat(parts).to(dtype)
    return pipe, changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("host", HOSTS)
def test_nothing_read_is_l2p_bit_for_bit(host, dtype):
    pipe, changes = in_dtype(host, dtype)
    latents = []
    for predictor in quiet(host):
        with forecasts_of(pipe, predictor) as session:
            latents.append(run(host, pipe, **changes))
        assert session.report.anchors == list(ANCHORS)
    assert torch.equal(*latents)
    assert not torch.equal(latents[0], run(host, pipe, **changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("host", HOSTS)
def test_anchors_at_every_step_are_the_full_run_bit_for_bit(host, dtype):
    pipe, changes = in_dtype(host, dtype)
    every = tuple(range(STEPS))
    branches = 1 if host == "flux_embedded" else 2
    predictor = awake(Readout(STEPS, every, branches, (0,), 16, HOSTS[host], 3))
    full = run(host, pipe, **changes)
    with forecasts_of(pipe, predictor, every):
        assert torch.equal(run(host, pipe, **changes), full)


@pytest.mark.parametrize("host", HOSTS)
def test_what_is_read_moves_the_picture(host):
    pipe, _ = in_dtype(host, torch.float32)
    predictor, rows = quiet(host)
    with forecasts_of(pipe, rows):
        plain = run(host, pipe)
    predictor.outer.fill_(0.1)
    with forecasts_of(pipe, predictor):
        assert not torch.equal(run(host, pipe), plain)


# --------------------------------------------------------------------------------- the predictor


def test_without_neighbours_tokens_are_read_alone_whatever_their_order():
    predictor = awake(readout(neighbours=False))
    hidden = torch.randn(2, 12, 16, generator=seeded())
    order = torch.randperm(12, generator=seeded(1))
    read = predictor.read(hidden, clock(2)).values
    assert torch.equal(predictor.read(hidden[:, order], clock(2)).values, read[:, order])


def test_with_neighbours_a_shifted_picture_is_read_shifted_away_from_the_border():
    predictor = awake(readout())
    picture = torch.randn(2, 3, 8, 7, 16, generator=seeded())  # frames, height, width

    def read(planes, grid):
        values = predictor.read(planes.flatten(1, 3), clock(2), grid).values
        return values.unflatten(1, (3, 8, 7))

    plain = read(picture, (3, 8, 7))
    shifted = read(picture.roll((1, 2), (2, 3)), (3, 8, 7))
    torch.testing.assert_close(shifted[:, :, 2:-1, 3:-1], plain[:, :, 1:-2, 1:-3])
    assert not torch.allclose(read(picture, (1, 24, 7)), plain)  # frames are not neighbours
    assert not torch.allclose(read(picture, (3, 7, 8)), plain)


def test_the_readout_is_a_convolution_over_the_grid():
    predictor = awake(readout())
    hidden = torch.randn(2, 30, 16, generator=seeded())
    read = predictor.read(hidden, clock(5), (1, 5, 6)).values
    values = torch.nn.functional.layer_norm(hidden, (16,)) @ predictor.inner[2].float().T
    planes = values.mT.unflatten(2, (5, 6))
    kernel, bias = predictor.outer[2].float(), predictor.constant[2]
    expected = torch.nn.functional.conv2d(planes, kernel, bias, padding=1)
    torch.testing.assert_close(read, expected.flatten(2).mT, atol=1e-5, rtol=1e-5)


def test_a_neighbourhood_is_what_lies_around_a_token_row_by_row():
    values = torch.arange(1.0, 13.0)[None, :, None]  # 3 x 4
    near = neighbourhood(values, (1, 3, 4))
    assert near[0, 5].tolist() == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert near[0, 0].tolist() == [0, 0, 0, 0, 1, 2, 0, 5, 6]


def test_nothing_is_read_at_a_step_that_is_no_anchor():
    assert awake(readout()).read(torch.randn(1, 4, 16), clock(3), (1, 2, 2)) is None


def test_what_cannot_be_read_is_refused_in_words():
    predictor = readout()
    with pytest.raises(ValueError, match="has 17 channels, the readout was fitted on 16"):
        predictor.read(torch.randn(1, 4, 17), clock(2), (1, 2, 2))
    with pytest.raises(ValueError, match="the 4 tokens of this host lie on the grid None"):
        predictor.read(torch.randn(1, 4, 16), clock(2))
    with pytest.raises(ValueError, match=r"the grid \(1, 2, 3\), expected frames x height x width"):
        predictor.read(torch.randn(1, 4, 16), clock(2), (1, 2, 3))
    with pytest.raises(ValueError, match="the history is empty"):
        predictor(History(), clock(3))
    history = History()
    history.push(clock(0), torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="nothing was read off the hidden state at step 0"):
        predictor(history, clock(1))
    for sizes in ({"rank": 17}, {"rank": 0}, {"patch": 0}, {"width": 0, "rank": 0}, {"past": -1}):
        with pytest.raises(ValueError, match="at least 1, a rank up to the width, and 0 earlier"):
            readout(**sizes)


def test_the_sum_is_the_rows_and_what_was_read_at_the_last_anchor():
    predictor = awake(readout(num_branches=2))
    history = History()
    read = []
    features = torch.randn(2, 4, 4, 4, generator=seeded())
    for anchor, feature in zip((0, 2), features, strict=True):
        hidden = torch.randn(4, 4, 16, generator=seeded(anchor))
        read.append(predictor.read(hidden, clock(anchor), (1, 2, 2)))
        history.push(clock(anchor), feature, read[-1])
    rows = predictor.weight[:, 4, [0, 2]].float()
    expected = torch.cat([rows[b, 0] * x + rows[b, 1] * y for b, x, y in _halves(features)])
    found = predictor(history, clock(4, (0, 1)))
    torch.testing.assert_close(found, expected + read[1].values, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("past", [1, 2, 3])
def test_what_earlier_anchors_tell_is_added_before_the_neighbours_are_read(past):
    anchors, hidden, carried = (0, 2, 4, 5), {}, None
    predictor = awake(Readout(STEPS, anchors, 1, (0,), 16, 4, 3, past=past))
    history = History()
    for number, anchor in enumerate(anchors):
        hidden[number] = torch.randn(2, 30, 16, generator=seeded(anchor))
        read = predictor.read(hidden[number], clock(anchor), (1, 5, 6), carried)
        carried = read.carried
        assert carried.shape == (2, 30, past, 3)
        inner = predictor.inner[number].float().unflatten(1, (1 + past, 16))
        h = sum(
            torch.nn.functional.layer_norm(hidden[number - q], (16,)) @ inner[:, q].T
            for q in range(min(past, number) + 1)
        )
        kernel, bias = predictor.outer[number].float(), predictor.constant[number]
        expected = torch.nn.functional.conv2d(h.mT.unflatten(2, (5, 6)), kernel, bias, padding=1)
        torch.testing.assert_close(read.values, expected.flatten(2).mT, atol=1e-5, rtol=1e-5)
        history.push(clock(anchor), torch.zeros(2, 30, 4), read)
    assert history.state_bytes() == 4 * (5 * 2 * 30 * 4 + 2 * 30 * past * 3)
    assert torch.equal(history.map(torch.clone).carried, carried)
    history.reset()
    assert history.carried is None and history.state_bytes() == 0


def test_an_added_anchor_leaves_what_is_carried_alone():
    predictor = awake(readout(past=2))
    history = History()
    for index in (0, 2):
        hidden = torch.randn(1, 4, 16, generator=seeded(index))
        read = predictor.read(hidden, clock(index), (1, 2, 2), history.carried)
        history.push(clock(index), torch.zeros(1, 4, 4), read)
    carried = history.carried
    assert predictor.read(hidden, clock(3), (1, 2, 2), carried) is None
    history.push(clock(3), torch.zeros(1, 4, 4))
    assert history.carried is carried and history.reading is None


def test_another_transformer_reads_its_own_anchors_alone():
    predictor = awake(Readout(STEPS, (0, 1, 3, 4), 1, (0, 3), 16, 4, 3, past=2))
    assert [predictor.reach(number) for number in range(4)] == [0, 1, 0, 1]
    hidden = torch.randn(1, 4, 16, generator=seeded())
    carried = predictor.read(hidden, clock(0), (1, 2, 2)).carried
    carried = predictor.read(hidden, clock(1), (1, 2, 2), carried).carried
    assert not carried.any()  # nothing for the anchors of the next one
    predictor.read(hidden, clock(3), (1, 2, 2))
    with pytest.raises(ValueError, match="nothing was carried from the anchors before step 4"):
        predictor.read(hidden, clock(4), (1, 2, 2))


def _halves(features):
    first, second = (feature.chunk(2) for feature in features)
    return [(b, first[b], second[b]) for b in (0, 1)]


def test_an_added_anchor_cancels_what_was_read_until_the_next_of_the_rows():
    predictor = awake(readout())
    quiet_one = awake(readout())
    quiet_one.outer.zero_()
    quiet_one.constant.zero_()
    features = torch.randn(3, 1, 4, 4, generator=seeded())
    forecasts = []
    for each in (predictor, quiet_one):
        history = History()
        for index, feature in zip((0, 2, 3), features, strict=True):
            hidden = torch.randn(1, 4, 16, generator=seeded(index))
            history.push(clock(index), feature, each.read(hidden, clock(index), (1, 2, 2)))
        assert history.reading is None
        assert torch.equal(each(history, clock(3)), features[2])  # exact at the added step
        forecasts.append(each(history, clock(4)))
    assert torch.equal(*forecasts)
    # F_hat_4 + F_3 - F_hat_3, and what was read at step 2 is in both forecasts
    history = History()
    for index, feature in zip((0, 2), features, strict=False):
        hidden = torch.randn(1, 4, 16, generator=seeded(index))
        history.push(clock(index), feature, predictor.read(hidden, clock(index), (1, 2, 2)))
    moved = predictor(history, clock(4)) + features[2] - predictor(history, clock(3))
    torch.testing.assert_close(forecasts[0], moved, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("host", ["dit_guided", "flux_two_calls"])
def test_a_schedule_that_looks_first_adds_anchors_and_reads_at_the_rows_own(host):
    pipe = pipeline(host)
    predictor = awake(Readout(STEPS, ANCHORS, 2, (0,), 16, HOSTS[host], 3), 0.05)
    latents = {}
    for threshold in (1e9, 1e-9):
        source = Forecaster(predictor, "output", ANCHORS, schedule=TeaCache(threshold))
        session = Session(pipe, source)
        latents[threshold] = run(host, pipe)
        session.detach()
        added = [step for step in session.report.anchors if step not in ANCHORS]
        assert added == ([7] if threshold > 1 else [1, 3, 4, 6, 7])  # it ends on an anchor
    with forecasts_of(pipe, predictor, (*ANCHORS, 7)):
        assert torch.equal(run(host, pipe), latents[1e9])
    assert torch.equal(run(host, pipe), latents[1e-9])


def test_between_an_added_anchor_and_the_next_a_run_forecasts_as_if_nothing_were_read():
    pipe = pipeline("dit_guided")
    predictor, rows = quiet("dit_guided")
    predictor.outer[1].fill_(0.1)  # only anchor 2 reads anything
    with forecasts_of(pipe, predictor, (0, 2, 3, 5)):
        latents = run("dit_guided", pipe)
    with forecasts_of(pipe, rows, (0, 2, 3, 5)):
        assert torch.equal(run("dit_guided", pipe), latents)
    with forecasts_of(pipe, predictor):
        assert not torch.equal(run("dit_guided", pipe), latents)


# ------------------------------------------------------------------------------------- the layout


class Look(Observer):
    """Keeps the layouts of a run's calls, by their branches, and its sigmas."""

    taps = frozenset({"output", "hidden"})
    wants_layout = True

    def __init__(self):
        self.found = {}
        self.exact = []

    def on_step(self, record: StepRecord) -> None:
        self.sigmas = record.sigmas
        for each in record.calls:
            layout, output = each.layout, each.taps["output"]
            hidden = each.taps["hidden"]
            self.found[each.step.expert, each.step.branches] = layout, hidden.shape
            self.exact.append(torch.equal(layout.place(layout.pick(output)), output))
            assert layout.hidden(hidden).shape[1] == len(layout.elements)


def looked_at(name: str, dtype: torch.dtype | None = None, **changes) -> Look:
    pipe = EVERY[name].build()
    if dtype is not None:
        pipe.transformer.to(dtype)
        inputs = [EVERY[name].inputs(seed) for seed in (0, 1)]
        floats = [key for key, value in inputs[0].items() if value.is_floating_point()]
        changes |= {key: torch.cat([each[key] for each in inputs]).to(dtype) for key in floats}
    look = Look()
    session = Session(pipe, observers=[look])
    call(EVERY[name], pipe, num_inference_steps=4, **changes)
    session.detach()
    return look


@pytest.mark.parametrize("name", [name for name in EVERY if name not in REFUSED])
def test_every_host_with_the_hidden_tap_has_a_layout_and_a_grid(name):
    look = looked_at(name)
    assert look.exact and all(look.exact)
    for layout, _ in look.found.values():
        frames, height, width = layout.grid
        assert frames * height * width == len(layout.elements) == layout.tokens.shape[1]
        assert layout.elements.flatten().sort().values.tolist() == list(
            range(layout.elements.numel())
        )


@pytest.mark.parametrize("name", REFUSED)
def test_a_host_without_the_hidden_tap_is_refused_with_the_reason(name):
    predictor = readout(num_branches=2)
    pipe = EVERY[name].build()
    with pytest.raises(UnsupportedHost, match=REFUSED[name]):
        with forecasts_of(pipe, predictor):
            call(EVERY[name], pipe)


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "cogvideox"])
def test_a_layout_is_the_same_in_bfloat16(name):
    exact, rounded = looked_at(name), looked_at(name, torch.bfloat16)
    assert all(rounded.exact)
    for (one, _), (other, _) in zip(exact.found.values(), rounded.found.values(), strict=True):
        assert one.shape == other.shape and one.grid == other.grid
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.elements, other.elements)


@pytest.mark.parametrize("name", TEXT_IN_THE_HEAD)
def test_only_the_tokens_of_the_picture_are_in_a_layout(name):
    for layout, shape in looked_at(name).found.values():
        assert shape[1] == 4 + TEXT_IN_THE_HEAD[name] and len(layout.elements) == 4


WIDE = {
    "flux": {"height": 32, "width": 64},
    "qwenimage": {"height": 32, "width": 64},
    "sd3": {"height": 32, "width": 64},
    "lumina2": {"height": 32, "width": 64},
    "zimage": {"height": 32, "width": 64},
    "krea2": {"height": 32, "width": 64},
    "wan": {"height": 32, "width": 64},
    "ltx": {},
    "kandinsky5": {},
}


@pytest.mark.parametrize("name", WIDE)
def test_a_grid_tells_height_from_width(name):
    settings = EVERY[name].settings
    height, width = settings["height"], settings["width"]
    grids = {}
    for down, right in ((height, 2 * width), (2 * height, width)):
        look = looked_at(name, height=down, width=right)
        assert all(look.exact)
        grids[down, right] = {layout.grid for layout, _ in look.found.values()}
    ((frames, rows, columns),) = grids[height, 2 * width]
    assert columns == 2 * rows
    assert grids[2 * height, width] == {(frames, columns, rows)}


def test_one_session_reads_two_pictures_of_as_many_tokens_by_their_own_grids():
    pipe = EVERY["flux"].build()
    look = Look()
    session = Session(pipe, observers=[look])
    grids = []
    for height, width in ((32, 64), (64, 32)):
        call(EVERY["flux"], pipe, height=height, width=width)
        grids += [layout.grid for layout, _ in look.found.values()]
    session.detach()
    assert grids == [(1, 2, 4), (1, 4, 2)]


def test_a_head_that_mixes_tokens_or_cuts_one_off_is_refused():
    weight = torch.randn(6, 6, generator=seeded())
    hidden = torch.randn(2, 6, 4, generator=seeded(1))
    match = r"\(6\) do not each decide an equal share of the 24 elements"
    for mixing in (weight, weight.tril(), torch.eye(6) + torch.eye(6).roll(1, 0)):
        with pytest.raises(UnsupportedHost, match=match):
            find_layout(
                lambda tokens, by=mixing: torch.einsum("nm,bmd->bnd", by, tokens), hidden, "x"
            )
    with pytest.raises(UnsupportedHost, match="do not each decide an equal share"):
        find_layout(lambda tokens: tokens.flatten(1)[:, :-1], hidden, "x")
    with pytest.raises(UnsupportedHost, match="do not each decide an equal share"):
        find_layout(lambda tokens: torch.zeros(2, 24), hidden, "x")


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layout_is_found_for_any_number_of_tokens_in_any_order(tokens, dtype):
    order = torch.randperm(tokens * 4, generator=seeded())
    hidden = torch.randn(2, tokens, 4, generator=seeded(1)).to(dtype)
    layout = find_layout(lambda t: (2 * t).flatten(1)[:, order], hidden, "x")
    output = (2 * hidden).flatten(1)[:, order]
    assert torch.equal(layout.place(layout.pick(output)), output)
    channels = layout.pick(output).sort(-1).values
    assert torch.equal(channels, (2 * layout.hidden(hidden)).sort(-1).values)


def test_nothing_that_tells_a_grid_is_none_and_other_arguments_do_not_mislead():
    elements = torch.arange(24).view(6, 4)
    layout = Layout(torch.arange(6)[None], elements, (6, 4))
    prompt_embeds, mask = torch.randn(1, 9, 12), torch.ones(1, 9)
    assert (
        find_grid(layout, (prompt_embeds, mask, 3, None, [1, 2]), {"height": 32, "width": 48})
        is None
    )
    assert find_grid(layout, (), {"height": 2, "width": 3}) == (1, 2, 3)
    assert find_grid(layout, (), {"img_shapes": [[(1, 3, 2)]]}) == (1, 3, 2)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(2.0))
    assert find_grid(layout, (ids,), {}) == (1, 3, 2)
    assert find_grid(layout, (torch.cat([torch.zeros(4, 3), ids]),), {}) == (1, 3, 2)
    assert find_grid(layout, (ids.flip(0),), {}) is None  # in no reading order
    array = Layout(layout.tokens, torch.arange(6)[:, None], (2, 1, 3))
    assert find_grid(array, (), {}) == (1, 2, 3)


# --------------------------------------------------------------------------------- what it keeps


class Keeping(Observer):
    """Remembers, weakly, what the forecaster was shown of the hidden state."""

    def __init__(self, source: Forecaster) -> None:
        self.source = source
        self.seen, self.bytes = [], []

    def on_step(self, record: StepRecord) -> None:
        for each in record.calls:
            if each.taps is not None:
                self.seen.append(weakref.ref(each.taps["hidden"]))
        self.bytes.append(self.source.state_bytes())
        gc.collect()
        self.alive = sum(each() is not None for each in self.seen[:-2])


@pytest.mark.parametrize("host", HOSTS)
def test_a_run_keeps_one_more_output_per_call_and_nothing_of_the_hidden_state(host):
    pipe = pipeline(host)
    branches = 1 if host == "flux_embedded" else 2
    predictor = awake(Readout(STEPS, ANCHORS, branches, (0,), 16, HOSTS[host], 3), 0.01)
    source = Forecaster(predictor, "output", ANCHORS)
    keeping = Keeping(source)
    session = Session(pipe, source, [keeping])
    latents = run(host, pipe)
    one = latents.numel() * latents.element_size() * branches  # of all calls of a step
    anchors = [sum(a <= step for a in ANCHORS) for step in range(STEPS)]
    assert keeping.bytes == [(count + 1) * one for count in anchors]
    assert session.report.state_bytes == (len(ANCHORS) + 1) * one
    assert source.most_bytes(0, STEPS) >= 0 and keeping.alive == 0
    gc.collect()
    assert len(keeping.seen) >= len(ANCHORS) and all(each() is None for each in keeping.seen)
    session.detach()


# ---------------------------------------------------------------------- what is asked for wrongly


@pytest.mark.parametrize("tap", ["hidden", "residual"])
def test_a_readout_forecasts_the_output_only(tap):
    with pytest.raises(ValueError, match=f"forecasts the tap 'output', not '{tap}'"):
        predictor = readout(num_branches=2)
        pipe = pipeline("dit_guided")
        predictor.spec = spec_for(pipe, anchors=ANCHORS, tap=tap)
        with forecasting(pipe, predictor):
            raise AssertionError("it attached")


def deployed(pipe, **changes) -> Readout:
    predictor = awake(readout(num_branches=2), 0.01)
    predictor.spec = spec_for(pipe, anchors=ANCHORS, latent_shapes=((1, 4, 4),), **changes)
    return predictor


def test_another_host_guidance_or_grid_is_a_mismatch_as_for_l2p(tmp_path):
    pipe = pipeline("dit_guided")
    predictor = deployed(pipe)
    save_predictor(predictor, predictor.spec, tmp_path)
    predictor = load_predictor(tmp_path)
    with forecasting(pipe, predictor) as attached:
        run("dit_guided", pipe)
    assert attached.report().anchors == list(ANCHORS)
    for changes, match in (
        ({"guidance_scale": 2.0}, "guidance"),
        ({"num_inference_steps": STEPS + 1}, "steps"),
        ({"num_inference_steps": STEPS, "guidance_scale": 1.0}, "guidance"),
    ):
        with pytest.raises(PredictorMismatch, match=match):
            with forecasting(pipe, predictor):
                run("dit_guided", pipe, **changes)
    pipe.transformer.transformer_blocks[0].ff.net[2].weight.data.mul_(2)
    with pytest.raises(PredictorMismatch, match="weights"):
        with forecasting(pipe, predictor):
            run("dit_guided", pipe)


def test_a_readout_of_another_width_or_patch_is_refused_in_words():
    pipe = pipeline("dit_guided")
    with pytest.raises(ValueError, match="has 16 channels, the readout was fitted on 8"):
        with forecasts_of(pipe, readout(num_branches=2, width=8)):
            run("dit_guided", pipe)
    with pytest.raises(
        ValueError, match="found 5 elements for each of 4 tokens, and 4 tokens decide 4"
    ):
        with forecasts_of(pipe, readout(num_branches=2, patch=5)):
            run("dit_guided", pipe)


def test_a_saved_readout_is_loaded_bit_for_bit_and_its_golden_pair_is_replayed(tmp_path):
    pipe = pipeline("dit_guided")
    predictor = deployed(pipe)
    save_predictor(predictor, predictor.spec, tmp_path)
    loaded = load_predictor(tmp_path)
    state, other = predictor.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert {other[name].dtype for name in ("inner", "outer")} == {torch.bfloat16}
    assert loaded.spec == predictor.spec


@pytest.mark.parametrize("name", ["inner", "outer", "constant", "weight"])
def test_a_tensor_that_was_changed_does_not_replay_the_golden_pair(name, tmp_path, monkeypatch):
    pipe = pipeline("dit_guided")
    predictor = deployed(pipe)
    other = deployed(pipe)
    getattr(other, name)[..., 0].add_(0.5)
    pair = {}
    from foreseer.checkpoints import format as checkpoint_format

    real = checkpoint_format.golden_pair
    monkeypatch.setattr(checkpoint_format, "golden_pair", lambda *_: pair["of"])
    pair["of"] = real(predictor, predictor.spec)
    save_predictor(other, other.spec, tmp_path)
    with pytest.raises(CheckpointError, match="replaying the golden pair differs"):
        load_predictor(tmp_path)


@pytest.mark.parametrize(
    ("rank", "past", "limit"),
    [(64, 0, 5_200_000), (56, 0, 5_000_000), (22, 2, 5_000_000), (64, 2, 14_000_000)],
)
def test_a_readout_of_the_size_of_flux_dev_takes_few_megabytes(rank, past, limit, tmp_path):
    anchors = (0, 3, 7, 11, 15, 20, 25, 30, 36, 41, 46)
    predictor = Readout(50, anchors, 1, (0,), 3072, 64, rank, past=past)
    spec = dataclasses.replace(
        spec_for(pipeline("dit_guided"), anchors=anchors, num_branches=1),
        sigmas=tuple(1 - step / 50 for step in range(50)),
    )
    save_predictor(predictor, spec, tmp_path)
    bytes_on_disk = (tmp_path / "model.safetensors").stat().st_size
    print(f"rank {rank}: {bytes_on_disk} bytes")
    state = 2 * 11 * rank * (3072 * (1 + past) + 64 * 9) + 4 * 11 * 64 + 8 * 50 * 50
    assert state < bytes_on_disk < limit


# ------------------------------------------------------------------------------ other resolutions


def wide_flux():
    """Rotary positions: no size is built in."""
    pipe = EVERY["flux"].build()
    predictor = awake(Readout(8, ANCHORS, 1, (0,), 16, 16, 3), 0.01)
    return pipe, predictor


def test_a_readout_serves_another_resolution():
    pipe, predictor = wide_flux()
    pictures = {}
    for height, width in ((32, 32), (32, 64), (64, 32), (48, 80)):
        with forecasts_of(pipe, predictor) as session:
            latents = call(EVERY["flux"], pipe, height=height, width=width)
        assert session.report.anchors == list(ANCHORS)
        assert latents.isfinite().all() and latents.shape[1] == height * width // 256
        pictures[height, width] = latents
    assert not torch.equal(pictures[32, 64], pictures[64, 32])


def test_what_is_read_at_another_resolution_is_what_the_predictor_reads_there():
    pipe, predictor = wide_flux()
    seen = {}

    source = Forecaster(predictor, "output", ANCHORS)

    class Reading(Observer):
        def on_step(self, record: StepRecord) -> None:
            (call,), (history,) = record.calls, source.histories
            if call.taps is not None:
                seen[record.index] = call.taps["hidden"], history.reading

    session = Session(pipe, source, [Reading()])
    call(EVERY["flux"], pipe, height=32, width=64)
    session.detach()
    for index, (hidden, reading) in seen.items():
        expected = predictor.read(hidden, clock(index), (1, 2, 4))
        assert torch.equal(reading, expected.values)


def wan_spec(pipe) -> PredictorSpec:
    """What a recording at the family's own size says."""
    look = Look()
    session = Session(pipe, observers=[look])
    call(EVERY["wan"], pipe)
    session.detach()
    return PredictorSpec(
        tap="output",
        anchors=ANCHORS,
        sigmas=tuple(look.sigmas),
        host=host_fingerprint(pipe.transformer),
        scheduler=type(pipe.scheduler).__name__,
        num_branches=2,
        guidance_scale=EVERY["wan"].settings["guidance_scale"],
        dtype="float32",
        latent_shapes=((4, 2, 4, 4),),
    )


@pytest.mark.parametrize("changes", [{"height": 64}, {"num_frames": 9}])
def test_a_spec_decides_which_shapes_of_latents_a_readout_serves(changes):
    pipe = EVERY["wan"].build()
    predictor = awake(Readout(8, ANCHORS, 2, (0,), 24, 16, 3), 0.01)
    predictor.spec = spec = wan_spec(pipe)
    with forecasting(pipe, predictor):
        assert call(EVERY["wan"], pipe).isfinite().all()
        with pytest.raises(PredictorMismatch, match="latents"):
            call(EVERY["wan"], pipe, **changes)
    with forecasts_of(pipe, predictor):
        expected = call(EVERY["wan"], pipe, **changes)
    assert expected.shape[1:] != spec.latent_shapes[0]
    allowed = (*spec.latent_shapes, tuple(expected.shape[1:]))
    predictor.spec = dataclasses.replace(spec, latent_shapes=allowed)
    with forecasting(pipe, predictor):
        assert torch.equal(call(EVERY["wan"], pipe, **changes), expected)
