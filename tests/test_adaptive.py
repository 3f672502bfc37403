"""Adaptive schedules compute what they say, with any predictor, and share one decision per step."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from tiny_hosts import (
    HOSTS,
    STEPS,
    adding_pipeline,
    items,
    pipeline,
    run,
    seeded,
    spec_for,
    tiny_dit,
)

from foreseer.integration.forecasting import forecasting
from foreseer.integration.host.call import take_rows
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.integration.policy import Action, relative_errors
from foreseer.predictors.base import History, Step
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.schedules import FirstBlock, SeaCache, SpeCa, TeaCache

ANCHORS = (0, 1, 4)
PROBES = {"teacache": TeaCache, "first_block": FirstBlock}
every_host = pytest.mark.parametrize("host", HOSTS)
every_tap_somewhere = pytest.mark.parametrize(
    ("host", "tap"),
    [
        *((host, "hidden") for host in HOSTS),
        *(
            (host, tap)
            for host in ("dit_guided", "flux_two_calls")
            for tap in ("output", "residual")
        ),
    ],
)
every_probe = pytest.mark.parametrize("probe", PROBES)


def learned(pipe: Any, num_branches: int = 2) -> L2P:
    """Rows for the hidden tap that are not reuse's."""
    predictor = L2P(STEPS, ANCHORS, num_branches)
    on_anchors = torch.zeros(STEPS)
    on_anchors[list(ANCHORS)] = 0.05
    predictor.weight += (
        torch.randn(predictor.weight.shape, generator=seeded(3)) * on_anchors
    ).tril(-1)
    predictor.spec = spec_for(pipe, num_branches=num_branches, tap="hidden")
    return predictor


def quietly(host: str, pipe: Any, **changes: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(host, pipe, **changes)


# ----------------------------------------------------------------------------------- first looks


@every_tap_somewhere
@every_probe
def test_a_tiny_threshold_computes_every_step_and_changes_no_bit(host, probe, tap):
    pipe = pipeline(host)
    plain = run(host, pipe)
    with forecasting(pipe, Taylor(2), tap=tap, schedule=PROBES[probe](1e-12)) as attached:
        assert torch.equal(run(host, pipe), plain)
    assert attached.report().anchors == list(range(STEPS))


@every_tap_somewhere
@every_probe
def test_a_huge_threshold_leaves_the_planned_anchors_and_their_image(host, probe, tap):
    planned = (0, 1, 4, STEPS - 1)  # TeaCache computes the last step
    pipe = pipeline(host)
    with forecasting(pipe, Taylor(2), planned, tap):
        fixed = run(host, pipe)
    with forecasting(pipe, Taylor(2), planned, tap, PROBES[probe](1e9)) as attached:
        assert torch.equal(run(host, pipe), fixed)
    assert attached.report().anchors == list(planned)


@every_probe
def test_a_threshold_in_between_skips_the_same_steps_in_both_calls(probe):
    pipe = pipeline("flux_two_calls")
    for threshold in (0.1, 0.2, 0.4, 0.8, 1.6):
        schedule = PROBES[probe](threshold)
        with forecasting(pipe, Reuse(), tap="hidden", schedule=schedule) as attached:
            run("flux_two_calls", pipe)
        report = attached.report()
        if 2 < len(report.anchors) < STEPS:
            break
    assert 2 < len(report.anchors) < STEPS
    assert sorted(report.anchors + report.forecasts) == list(range(STEPS))
    assert len(report.seconds["anchor"]) == 2 * len(report.anchors)


def test_teacache_accumulates_the_mapped_change_and_an_anchor_sets_it_back():
    schedule = TeaCache(0.3, (2.0, 0.0))  # p(x) = 2 x
    schedule.open(6)
    values = [1.0, 1.1, 1.21, 1.331, 1.4641, 1.61051]  # each changes by a tenth
    anchors = [schedule.judge(i, torch.tensor([v]), False) for i, v in enumerate(values)]
    assert anchors == [True, False, True, False, True, True]


def test_first_block_compares_with_the_last_anchor_not_the_last_step():
    schedule = FirstBlock(0.25)
    schedule.open(6)
    values = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    anchors = [schedule.judge(i, torch.tensor([v]), False) for i, v in enumerate(values)]
    assert anchors == [True, False, False, True, False, False]


def test_teacache_says_when_a_host_has_no_attention_to_look_at():
    pipe = adding_pipeline()
    with forecasting(pipe, Reuse(), tap="hidden", schedule=TeaCache(0.1)):
        with pytest.raises(UnsupportedHost, match="no attention module"):
            pipe([0], num_inference_steps=STEPS)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
@every_probe
def test_a_threshold_that_is_not_positive_is_refused(probe, bad):
    with pytest.raises(ValueError, match="expected a number > 0"):
        PROBES[probe](bad)


# -------------------------------------------------------------------------------------- SeaCache


def released_filter(x: torch.Tensor, sigma: float, power: float) -> torch.Tensor:
    """diffusers' filter of latents `(B, C, *grid)`, axis after axis, as sums over frequencies."""
    x, mean = x.to(torch.complex128), 1.0
    for axis in range(2, x.ndim):
        size = x.shape[axis]
        numbers = torch.arange(size, dtype=torch.float64)
        cycles = torch.where(numbers < size / 2, numbers, numbers - size) / size
        clean = 1 / (cycles.abs() ** power + 1e-16)
        gain = (1 - sigma) * clean / ((1 - sigma) ** 2 * clean + sigma**2 + 1e-16)
        waves = torch.exp(2j * torch.pi * numbers[:, None] * numbers / size)
        operator = waves @ torch.diag(gain.to(x.dtype)) @ waves.conj().T / size
        x = torch.tensordot(x, operator, dims=([axis], [1])).movedim(-1, axis)
        mean = mean * gain.mean()
    return (x / mean).real.float()


@pytest.mark.parametrize("shape", [(2, 4, 8, 6), (1, 3, 5, 4, 7)])
@pytest.mark.parametrize("sigma", [0.97, 0.4, 0.03])
def test_seacache_filters_as_released_and_packed_latents_as_their_grid(shape, sigma):
    x = torch.randn(shape, generator=seeded(1))
    expected = released_filter(x, sigma, 3.0)
    found = SeaCache(0.1).filtered(Step(3, sigma, 10, x_t=x))
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    packed = Step(3, sigma, 10, x_t=x.flatten(2).mT)
    assert torch.equal(SeaCache(0.1, grid=shape[2:]).filtered(packed), found)


def test_seacache_sums_filtered_changes_and_runs_no_block_to_decide():
    schedule, sigmas = SeaCache(0.3, power=2.0), [0.999 * (1 - s / 8) for s in range(8)]
    moves = torch.tensor([1, 0.02, 0.03, 0.05, 0.2, 0.02, 0.1, 0.1]).reshape(-1, 1, 1, 1, 1)
    samples = (torch.randn(8, 1, 2, 6, 6, generator=seeded(2)) * moves).cumsum(0)
    indicators = [released_filter(x, s, 2.0) for x, s in zip(samples, sigmas, strict=True)]
    total, expected = 0.0, [True]
    for old, new in itertools.pairwise(indicators[:-1]):
        total += float((new - old).abs().mean() / old.abs().mean())
        expected.append(total >= 0.3)
        total *= total < 0.3
    schedule.open(8)
    steps = [Step(i, s, 8, x_t=x) for i, (s, x) in enumerate(zip(sigmas, samples, strict=True))]
    found = [schedule.before(step) for step in steps for _ in range(2)]  # both guidance branches
    assert [action is Action.RUN for action in found[::2]] == [*expected, True]
    assert found[::2] == found[1::2] and {*found} == {Action.RUN, Action.FORECAST}


@pytest.mark.parametrize(("host", "grid"), [("dit_guided", None), ("flux_two_calls", (2, 2))])
def test_seacache_decides_once_for_all_branches_of_a_run(host, grid):
    pipe = pipeline(host)
    plain = run(host, pipe)
    with forecasting(pipe, Reuse(), tap="hidden", schedule=SeaCache(1e-12, grid=grid)) as attached:
        assert torch.equal(run(host, pipe), plain)
    with forecasting(pipe, Reuse(), tap="hidden", schedule=SeaCache(1e9, grid=grid)) as attached:
        run(host, pipe)
    assert attached.report().anchors == [0, STEPS - 1]


def test_seacache_refuses_samples_without_a_grid():
    packed = Step(0, 1.0, 10, x_t=torch.zeros(1, 12, 4))
    for schedule in (SeaCache(0.1), SeaCache(0.1, grid=(3, 5))):
        with pytest.raises(ValueError, match=r"found a sample \(1, 12, 4\) with grid="):
            schedule.filtered(packed)
    with pytest.raises(ValueError, match="found no sample"):
        SeaCache(0.1).filtered(Step(0, 1.0, 10))
    with pytest.raises(ValueError, match="power is 0.0, expected a number > 0"):
        SeaCache(0.1, power=0.0)


# ------------------------------------------------------------------------------------- checking


@every_host
def test_refusing_everything_changes_no_bit_and_warns(host):
    pipe = pipeline(host)
    plain = run(host, pipe)
    with forecasting(pipe, Taylor(1), schedule=SpeCa(0.0)) as attached:
        with pytest.warns(UserWarning, match=r"refused all .* \(accept rate 0%\): raise"):
            assert torch.equal(run(host, pipe), plain)
    assert attached.report().evaluations == [STEPS, STEPS]
    assert attached.report().accepted == 0


@every_host
def test_accepting_everything_keeps_the_planned_anchors_and_warns(host):
    pipe = pipeline(host)
    with forecasting(pipe, Taylor(1), ANCHORS, schedule=SpeCa(1e9)) as attached:
        with pytest.warns(UserWarning, match=r"accepted all .* \(accept rate 100%\): lower"):
            run(host, pipe)
    report = attached.report()
    assert report.anchors == list(ANCHORS)
    assert report.evaluations == [len(ANCHORS)] * 2
    assert report.checked == report.accepted == 2 * (STEPS - len(ANCHORS))
    assert "accepted 100%" in str(report)


@pytest.mark.parametrize("host", ["dit_guided", "flux_two_calls"])
def test_samples_of_a_batch_are_refused_on_their_own(host):
    """Alone or in a batch, a sample has the same anchors and, up to rounding, the same latents."""
    pipe = pipeline(host)
    schedule = SpeCa(middle_threshold(host))
    with forecasting(pipe, Taylor(1), schedule=schedule) as attached:
        together = quietly(host, pipe, generator=[seeded(0), seeded(1)])
        evaluations = attached.report().evaluations
        assert 0 < attached.report().accepted < attached.report().checked
        for sample in range(2):
            alone = quietly(host, pipe, **only(host, sample))
            assert attached.report().evaluations == [evaluations[sample]]
            torch.testing.assert_close(alone[0], together[sample], rtol=1e-4, atol=1e-4)


def middle_threshold(host: str) -> float:
    """A tolerance that refuses some forecasts of some samples."""
    pipe = pipeline(host)
    for threshold in (0.001 * 1.5**k for k in range(20)):
        with forecasting(pipe, Taylor(1), schedule=SpeCa(threshold)) as attached:
            quietly(host, pipe, generator=[seeded(0), seeded(1)])
        report = attached.report()
        if 0 < report.accepted < report.checked:
            return threshold
    raise AssertionError("no threshold splits the samples")


def only(host: str, sample: int) -> dict[str, Any]:
    """What makes `run` draw one of its two samples."""
    inputs = {"class_labels": [[0, 2][sample]]}
    if not host.startswith("dit"):
        inputs = items(host, 2)[sample].inputs
    return {**inputs, "generator": [seeded(sample)]}


class MixesRows(DiTTransformer2DModel):
    """Every row also sees the mean of its batch."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states + hidden_states.mean(0, keepdim=True), **kwargs)


def test_a_host_that_mixes_rows_is_refused_at_its_first_batch():
    """One sample alone proves nothing about rows; the first call with two does."""
    pipe = pipeline("dit")
    pipe.transformer = tiny_dit(MixesRows)
    with forecasting(pipe, Reuse(), schedule=SpeCa(0.1)):
        quietly("dit", pipe, **only("dit", 0))
        with pytest.raises(UnsupportedHost, match="a row of a batch .* computed alone differs"):
            quietly("dit", pipe)


def test_no_sample_is_forecast_longer_than_allowed():
    pipe = pipeline("dit_guided")
    with forecasting(pipe, Reuse(), schedule=SpeCa(1e9, max_run=2, warmup=2)) as attached:
        quietly("dit_guided", pipe)
    assert attached.report().anchors == [0, 1, 4, 7]


def test_nothing_is_checked_before_the_least_run():
    pipe = pipeline("dit_guided")
    with forecasting(pipe, Reuse(), (0, 4), schedule=SpeCa(0.0, min_run=2)) as attached:
        quietly("dit_guided", pipe)
    assert attached.report().anchors == [0, 3, 4, 7]
    assert attached.report().checked == 4


def test_the_tolerance_falls_to_its_floor():
    schedule = SpeCa(0.4, decay=0.01, floor=0.1)
    assert schedule.tolerance(0, 10) == 0.4
    assert schedule.tolerance(5, 10) == pytest.approx(0.1)
    assert schedule.tolerance(9, 10) == 0.1


def test_the_worst_branch_decides_for_a_sample():
    computed = torch.ones(4, 3)
    forecast = computed.clone()
    forecast[3] = 0.5  # branch 1 of sample 1
    torch.testing.assert_close(relative_errors(forecast, computed, 2), torch.tensor([0.0, 0.5]))


def test_checking_needs_the_hidden_tap():
    with pytest.raises(ValueError, match="tap must be 'hidden'"):
        with forecasting(pipeline("dit"), Reuse(), tap="output", schedule=SpeCa(0.1)):
            pass


@pytest.mark.parametrize(
    "arguments",
    [
        {"threshold": -1.0},
        {"threshold": 1.0, "decay": 0.0},
        {"threshold": 1.0, "max_run": 0},
        {"threshold": 1.0, "warmup": 0},
    ],
)
def test_limits_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        SpeCa(**arguments)


# ---------------------------------------------------------------------------- learned predictors


@pytest.mark.parametrize("schedule", [TeaCache(1e9), FirstBlock(1e9), SpeCa(1e9)])
def test_a_learned_predictor_keeps_its_anchors_under_every_schedule(schedule):
    pipe = pipeline("dit_guided")
    with forecasting(pipe, learned(pipe), schedule=schedule) as attached:
        quietly("dit_guided", pipe)
    assert set(ANCHORS) <= set(attached.report().anchors) <= {*ANCHORS, STEPS - 1}


@pytest.mark.parametrize("schedule", [TeaCache(1e-12), FirstBlock(1e-12), SpeCa(0.0)])
def test_a_learned_predictor_on_every_step_changes_no_bit(schedule):
    pipe = pipeline("dit_guided")
    plain = run("dit_guided", pipe)
    with forecasting(pipe, learned(pipe), schedule=schedule):
        assert torch.equal(quietly("dit_guided", pipe), plain)


# ------------------------------------------------------------------------------ leaving no trace


@pytest.mark.parametrize("schedule", [TeaCache(0.05), FirstBlock(0.05), SpeCa(0.05)])
def test_an_exception_inside_leaves_the_host_as_it_was(schedule):
    pipe = pipeline("dit_guided")
    plain = run("dit_guided", pipe)
    before = dict(pipe.transformer._modules)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory, say")

    with forecasting(pipe, Reuse(), tap="hidden", schedule=schedule):
        handle = pipe.transformer.transformer_blocks[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run("dit_guided", pipe)
        handle.remove()
    assert dict(pipe.transformer._modules) == before
    assert torch.equal(run("dit_guided", pipe), plain)


@pytest.mark.parametrize("schedule", [TeaCache(0.05), FirstBlock(0.05), SpeCa(0.05)])
def test_the_second_run_equals_the_first(schedule):
    pipe = pipeline("dit_guided")
    with forecasting(pipe, Taylor(1), tap="hidden", schedule=schedule) as attached:
        first = quietly("dit_guided", pipe)
        anchors = attached.report().anchors
        assert torch.equal(quietly("dit_guided", pipe), first)
        assert attached.report().anchors == anchors


def test_rows_are_taken_from_tensors_of_the_batch_only():
    batch, other = torch.arange(4), torch.zeros(3, 2)
    taken = take_rows({"x": batch, "ids": other, "pair": (batch, 1.5)}, [1, 3], 4)
    assert taken["x"].tolist() == [1, 3]
    assert taken["ids"] is other
    assert taken["pair"][0].tolist() == [1, 3] and taken["pair"][1] == 1.5


def test_after_an_added_step_rows_are_moved_by_what_they_were_wrong_there():
    predictor = L2P(STEPS, ANCHORS)
    noise = torch.randn(STEPS, len(ANCHORS), dtype=torch.float64, generator=seeded(1))
    predictor.weight[0, :, list(ANCHORS)] += 0.1 * noise
    features = torch.randn(STEPS, 1, 3, dtype=torch.float64, generator=seeded(2))

    def forecast(steps: list[int], at: int) -> torch.Tensor:
        history = History()
        for s in steps:
            history.push(Step(s, 1 - s / STEPS, STEPS), features[s])
        return predictor(history, Step(at, 1 - at / STEPS, STEPS))

    wrong = features[5] - forecast([0, 1, 4], 5)
    moved = forecast([0, 1, 4], 6) + wrong
    torch.testing.assert_close(forecast([0, 1, 4, 5], 6), moved, atol=1e-12, rtol=0)
    # an added step before the newest anchor of the rows no longer counts
    assert torch.equal(forecast([0, 1, 3, 4], 6), forecast([0, 1, 4], 6))
    with pytest.raises(ValueError, match="must start at step 0 and evaluate every anchor"):
        forecast([0, 4, 5], 6)


def test_teacache_computes_from_a_change_that_is_no_number_on():
    schedule, zero, one = TeaCache(0.1), torch.zeros(1, 2), torch.ones(1, 2)
    schedule.open(10)
    probes = [zero, zero, one, one, 5 * one, 5 * one]  # 0 / 0, 1 / 0, then 0, 4 and 0
    found = [schedule.judge(index, probe, False) for index, probe in enumerate(probes)]
    assert found == [True, True, True, False, True, False]
