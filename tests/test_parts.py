"""Forecasters per part: FreqCa, HyCa and L2P per part reduce to the plain rules; saved = loaded."""

import dataclasses
import json

import pytest
import torch
from checkpoint_cases import random_predictor, spec_for, tiny_pipe
from tiny_hosts import seeded

from foreseer.checkpoints.card import model_card
from foreseer.checkpoints.format import CheckpointError, load_predictor, save_predictor
from foreseer.integration.forecasting import forecasting
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.predictors.base import History, Predictor, Step
from foreseer.predictors.linear import L2P
from foreseer.predictors.partition import ChannelGroups
from foreseer.predictors.per_part import POOL, FreqCa, HyCa
from foreseer.predictors.rules import HiCache, Taylor
from foreseer.predictors.spectrum import Bands

STEPS, ANCHORS, GRID, WIDTH = 8, (0, 1, 3, 6), (3, 4), 6
LABELS = [0, 1, 0, 2, 1, 1]


def history_of(steps=(0, 1, 3), window=None, shape=(4, 12, WIDTH), dtype=torch.float32) -> History:
    history = History(window)
    for step in steps:
        feature = torch.randn(shape, generator=seeded(step)).to(dtype)
        history.push(Step(step, 1 - step / STEPS, STEPS), feature)
    return history


def at(index: int, branches: tuple[int, ...] = (0,)) -> Step:
    return Step(index, 1 - index / STEPS, STEPS, branches)


def parted(kind: str, num_branches: int = 2) -> L2P:
    if kind == "groups":
        return L2P(STEPS, ANCHORS, num_branches, partition=ChannelGroups(LABELS))
    return L2P(STEPS, ANCHORS, num_branches, partition=Bands([0.3, 0.6], GRID, kind))


def randomised(kind: str) -> L2P:
    predictor = parted(kind)
    rows = [random_predictor(STEPS, ANCHORS, 2, seed).weight for seed in range(3)]
    predictor.weight.copy_(torch.stack(rows, 1))
    return predictor


every_kind = pytest.mark.parametrize("kind", ["dct", "fft", "groups"])

# ------------------------------------------------------------------------------------------ FreqCa


@pytest.mark.parametrize("transform", ["dct", "fft"])
@pytest.mark.parametrize("steps", [(0,), (0, 2), (0, 2, 5)])
def test_freqca_reuses_the_low_band_and_extrapolates_the_high_one(transform, steps):
    history = history_of(steps, window=3)
    step = at(6)
    low, high = Bands([0.1], GRID, transform), HiCache(2, 0.71)(history, step)
    expected = low.split(history.features[-1])[0] + low.split(high)[1]
    torch.testing.assert_close(FreqCa(GRID, transform)(history, step), expected)


def test_freqcas_form_is_the_newest_feature_and_the_high_band_of_one_increment():
    history = history_of((0, 3, 6), window=3)
    step = Step(11, 0.1, 12)  # equal gaps N = 3, horizon 5
    r, gap = 5 / 3, 3
    b_2 = 2 * 0.71**4 * r**2 - 0.71**2 / gap**2
    slope = 2 * 0.71**2 * r
    c_0, c_1, c_2 = 1 + slope + b_2, -slope - 2 * b_2, b_2
    f_2, f_1, f_0 = history.features
    increment = (c_0 - 1) * f_0 + c_1 * f_1 + c_2 * f_2
    expected = f_0 + Bands([0.1], GRID).split(increment)[1]
    torch.testing.assert_close(FreqCa(GRID)(history, step), expected)


def test_freqca_is_exact_where_nothing_moves_and_needs_its_grid():
    history = History(3)
    feature = torch.randn(2, 12, WIDTH)
    for step in (0, 2, 4):
        history.push(at(step), feature)
    torch.testing.assert_close(FreqCa(GRID)(history, at(6)), feature)
    with pytest.raises(ValueError, match=r"\(2, 12, 6\).*grid \[4, 4\]"):
        FreqCa((4, 4))(history, at(6))


# -------------------------------------------------------------------------------------------- HyCa


@pytest.mark.parametrize("solver", POOL)
@pytest.mark.parametrize("steps", [(0,), (0, 2), (0, 1, 4)])
def test_one_group_is_the_plain_solver(solver, steps):
    rule = POOL[solver]
    plain = history_of(steps, window=rule.window)
    hybrid = HyCa([0] * WIDTH, [solver])
    history = history_of(steps, window=hybrid.window)
    assert torch.equal(hybrid(history, at(6)), rule(plain, at(6)))


def test_every_group_follows_its_own_solver():
    hybrid = HyCa(LABELS, ["reuse", "taylor_1", "adams_moulton"])
    history = history_of((0, 2, 5), window=hybrid.window)
    found = hybrid(history, at(7))
    for group, solver in enumerate(hybrid.solvers):
        rule = POOL[solver]
        expected = rule(history_of((0, 2, 5), window=rule.window), at(7))
        channels = [c for c, label in enumerate(LABELS) if label == group]
        assert torch.equal(found[..., channels], expected[..., channels])


@pytest.mark.parametrize("horizon", [1, 2, 3, 5])
def test_the_adams_bashforth_row_is_taylors_second_order(horizon):
    rows = [
        rule.coefficients(history_of((0, 3, 6), window=3), Step(6 + horizon, 0.1, 12))
        for rule in (POOL["ab2"], Taylor(2))
    ]
    torch.testing.assert_close(*rows)


@pytest.mark.parametrize("solvers", [["reuse"], ["reuse", "taylor_1", "euler"]])
def test_hyca_takes_one_known_solver_per_group(solvers):
    with pytest.raises(ValueError, match="3 groups.*adams_moulton"):
        HyCa(LABELS, solvers)


# -------------------------------------------------------------------------------------------- L2P


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_starts_exactly_at_reuse(kind, dtype):
    history = history_of(dtype=dtype)
    assert torch.equal(parted(kind)(history, at(4, (0, 1))), history.features[-1])


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branches", [(0, 1), (0,), (1,)])
def test_equal_rows_in_all_parts_are_exactly_l2p(kind, dtype, branches):
    plain = random_predictor(STEPS, ANCHORS, 2)
    predictor = parted(kind)
    predictor.weight.copy_(plain.weight[:, None].expand_as(predictor.weight))
    history = history_of(dtype=dtype)
    step = at(5, branches)
    assert torch.equal(predictor(history, step), plain(history, step))


@every_kind
def test_every_part_follows_its_own_rows(kind):
    predictor = randomised(kind)
    history = history_of()
    step = at(4, (0, 1))
    found = predictor(history, step)
    parts = predictor.partition.split(found)
    for part in range(3):
        plain = L2P(STEPS, ANCHORS, 2)
        plain.weight.copy_(predictor.weight[:, part])
        expected = predictor.partition.split(plain(history, step))[part]
        torch.testing.assert_close(parts[part], expected, atol=1e-5, rtol=1e-5)


@every_kind
def test_it_refuses_what_l2p_refuses(kind):
    predictor = parted(kind)
    with pytest.raises(ValueError, match="branch 2 at step 4"):
        predictor(history_of(), at(4, (2,)))
    with pytest.raises(ValueError, match=r"holds the steps \[0, 3\]"):
        predictor(history_of((0, 3)), at(4))
    with pytest.raises(ValueError, match="empty"):
        predictor(History(), at(4))
    with pytest.raises(ValueError, match="rising steps"):
        L2P(STEPS, (1, 2), 1, partition=ChannelGroups(LABELS))


@every_kind
def test_another_width_or_grid_is_refused_at_the_first_forecast(kind):
    with pytest.raises(ValueError, match=r"found a feature of shape \(4, 10, 5\)"):
        parted(kind)(history_of(shape=(4, 10, 5)), at(4))


def test_a_forecast_of_the_rules_equals_their_table():
    rule = FreqCa(GRID)
    table = rule.rows((0, 2, 5), [1 - s / STEPS for s in range(STEPS)])[0]
    history = history_of((0, 2, 5), window=3)
    combined = [
        sum(w * f for w, f in zip(rows[[0, 2, 5]].float(), history.features, strict=True))
        for rows in table[:, 7]
    ]
    torch.testing.assert_close(rule(history, at(7)), rule.partition.weigh(combined))


# ------------------------------------------------------------------------------------- checkpoints


def saved_cases() -> dict[str, Predictor]:
    hybrid = HyCa(LABELS, ["reuse", "taylor_1", "bdf2"])
    return {kind: randomised(kind) for kind in ("dct", "fft", "groups")} | {"hyca": hybrid}


def spec_of(predictor: Predictor):
    return spec_for(random_predictor(STEPS, ANCHORS, 2))


@pytest.mark.parametrize("name", saved_cases())
def test_saved_is_loaded_bit_for_bit(name, tmp_path):
    predictor = saved_cases()[name]
    save_predictor(predictor, spec_of(predictor), tmp_path)
    loaded = load_predictor(tmp_path)
    assert type(loaded) is type(predictor) and loaded.spec == spec_of(predictor)
    assert loaded.state_dict().keys() == predictor.state_dict().keys()
    for key, tensor in predictor.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    history, step = history_of(window=predictor.window), at(5, (0, 1))
    assert torch.equal(loaded(history, step), predictor(history, step))


@pytest.mark.parametrize(("old", "new"), [("[0.3, 0.6]", "[0.3, 0.7]"), ("[3, 4]", "[4, 3]")])
def test_an_edited_partition_does_not_replay_the_golden_pair(old, new, tmp_path):
    save_predictor(randomised("dct"), spec_of(randomised("dct")), tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    text = json.dumps(values["arguments"])
    assert old in text
    values["arguments"] = json.loads(text.replace(old, new))
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="golden pair"):
        load_predictor(tmp_path)


def test_clusters_of_another_width_are_refused_before_a_wrong_image():
    pipe = tiny_pipe()  # the hidden tap has 64 channels
    predictor = HyCa(LABELS, ["reuse", "taylor_1", "bdf2"])
    spec = spec_of(predictor)
    host = host_fingerprint(pipe.transformer)
    sigmas = run_sigmas(pipe)
    predictor.spec = dataclasses.replace(spec, tap="hidden", host=host, sigmas=sigmas)
    with forecasting(pipe, predictor), pytest.raises(ValueError, match="64.*6 channels"):
        pipe([1, 2], num_inference_steps=STEPS, guidance_scale=3.0, output_type="latent")


@pytest.mark.parametrize("kind", ["bands", "hyca"])
def test_a_parted_predictor_runs_on_a_pipeline(kind):
    pipe = tiny_pipe()
    anchors = [0, 2, 5]
    rule: Predictor = FreqCa((2, 2), low_radius=0.2)
    if kind == "hyca":
        rule = HyCa([c % 2 for c in range(64)], ["reuse", "ab2"])
        spec = spec_of(rule)
        sigmas = run_sigmas(pipe)
        host = host_fingerprint(pipe.transformer)
        rule.spec = dataclasses.replace(
            spec, tap="hidden", host=host, anchors=tuple(anchors), sigmas=sigmas
        )
    with forecasting(pipe, rule, anchors, "hidden") as run:
        images = pipe([1], num_inference_steps=STEPS, guidance_scale=3.0, output_type="latent")
    assert torch.isfinite(images.images).all()
    assert run.report().anchors == anchors


def run_sigmas(pipe) -> tuple[float, ...]:
    pipe.scheduler.set_timesteps(STEPS)
    return tuple(pipe.scheduler.sigmas[:-1].tolist())


def test_the_card_tells_the_parts():
    cases = saved_cases()
    cards = {name: model_card(predictor, spec_of(predictor)) for name, predictor in cases.items()}
    assert "non-zero weights over 3 frequency bands" in cards["dct"]
    assert "non-zero weights over 3 channel groups" in cards["groups"]
    assert "2 channels: reuse; 3 channels: taylor_1; 1 channels: bdf2" in cards["hyca"]
    assert "- hyca\n" in cards["hyca"] and "- l2p\n" in cards["dct"]
