"""The published linear rules: golden weights, what each is exact on, and what changes them."""

import math

import pytest
import torch
from diffusers.hooks.taylorseer_cache import TaylorSeerState
from hypothesis import given
from hypothesis import strategies as st
from row_cases import tabulate

from foreseer.integration.schedule import PUBLISHED_L2P, uniform
from foreseer.predictors.base import History, LinearPredictor, Step
from foreseer.predictors.bounded import GapBounded
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import (
    BDF2,
    RULES,
    AdamsBashforth2,
    AdamsMoulton,
    Damped,
    Foca2Point,
    FocaRecursive,
    HiCache,
    MeanCache,
    Newton,
    Reuse,
    RungeKutta2,
    ScaledTaylor,
    Spectrum,
    Taylor,
)

SIGMAS = [(1 - s / 50) ** 1.5 for s in range(50)]
FULL_SLOPE = math.sqrt(0.5)
gaps = st.lists(st.integers(1, 9), min_size=1, max_size=5)
horizons = st.integers(1, 12)
seeds = st.integers(0, 99)


def steps_from(gap_list: list[int]) -> list[int]:
    return [sum(gap_list[:i]) for i in range(len(gap_list) + 1)]


def weights_at(
    rule: LinearPredictor, steps: list[int], index: int, sigma=lambda s: 1 - s / 100
) -> torch.Tensor:
    """Weights of the newest anchors, oldest first, as a run of 100 steps gives them."""
    history = History(rule.window)
    for step in steps:
        history.push(Step(step, sigma(step), 100), torch.zeros(1))
    grid = [sigma(step) for step in range(100)]
    return rule.coefficients(history, Step(index, sigma(index), 100, sigmas=grid))


def after(rule: LinearPredictor, gap_list: list[int], horizon: int) -> list[float]:
    """Weights newest first, `horizon` steps after the last of anchors with these gaps."""
    steps = steps_from(gap_list)
    return weights_at(rule, steps, steps[-1] + horizon).flip(0).tolist()


def forecast_of(rule: LinearPredictor, steps: list[int], index: int, f) -> float:
    """The forecast of a scalar function of the step."""
    weights = weights_at(rule, steps, index)
    values = torch.tensor([f(s) for s in steps[-len(weights) :]], dtype=torch.float64)
    return float(weights @ values)


# --------------------------------------------------------------------------------- golden weights


@pytest.mark.parametrize(
    ("rule", "gap_list", "horizon", "newest_first", "norms"),
    [
        (Taylor(1), [5], 2, [1.4, -0.4], (1.800, 1.456)),
        (Taylor(2), [5, 5], 2, [1.48, -0.56, 0.08], (2.120, 1.584)),
        (HiCache(2), [5, 5], 2, [1.21, -0.22, 0.01], (1.440, 1.230)),
        (Taylor(1), [6], 3, [1.5, -0.5], (2.000, 1.581)),
        (Taylor(2), [6, 6], 3, [1.625, -0.75, 0.125], (2.500, 1.794)),
        (Taylor(3), [6] * 3, 3, [1.645833, -0.8125, 0.1875, -0.020833], (2.667, 1.845)),
        (Newton(2), [6, 6], 3, [1.875, -1.25, 0.375], (3.500, 2.284)),
        (Taylor(1), [6], 5, [1.833333, -0.833333], (2.667, 2.014)),
        (Taylor(2), [6, 6], 5, [2.180556, -1.527778, 0.347222], (4.056, 2.685)),
        (Taylor(3), [6] * 3, 5, [2.277006, -1.817130, 0.636574, -0.096451], (4.827, 2.983)),
        (Newton(2), [6, 6], 5, [2.597222, -2.361111, 0.763889], (5.722, 3.592)),
        (Newton(3), [6] * 3, 5, [3.318673, -4.525463, 2.928241, -0.721451], (11.494, 6.371)),
        (HiCache(2), [6, 6], 5, [1.496528, -0.576389, 0.079861], (2.153, 1.606)),
        (HiCache(2, 0.71), [6, 6], 5, [2.179104, -1.518041, 0.338937], (4.036, 2.677)),
        (Taylor(2), [5, 3], 2, [1.888889, -1.022222, 0.133333], (3.044, 2.152)),
        (Newton(2), [5, 3], 2, [2.083333, -1.333333, 0.25], (3.667, 2.486)),
        (HiCache(2), [5, 3], 2, [1.361111, -0.377778, 0.016667], (1.756, 1.413)),
        (Reuse(), [], 4, [1.0], (1.0, 1.0)),
    ],
)
def test_weights_worked_out_by_hand_are_reproduced(rule, gap_list, horizon, newest_first, norms):
    weights = torch.tensor(after(rule, gap_list, horizon), dtype=torch.float64)
    assert weights.tolist() == pytest.approx(newest_first, abs=5.1e-7)
    assert float(weights.norm(1)) == pytest.approx(norms[0], abs=5.1e-4)
    assert float(weights.norm(2)) == pytest.approx(norms[1], abs=5.1e-4)


@pytest.mark.parametrize(
    ("rule", "at_unit_spacing"),
    [
        (Taylor(1), [2, -1]),
        (RungeKutta2(), [1.5, 0, -0.5]),
        (AdamsBashforth2(), [2.5, -2, 0.5]),
        (BDF2(), [4 / 3, -1 / 3]),
        (AdamsMoulton(), [55 / 24, -19 / 12, 7 / 24]),
        (Foca2Point(), [2, -1]),
        (ScaledTaylor(2), [1 + 1 / 4 + 1 / 32, -1 / 4 - 1 / 16, 1 / 32]),
    ],
)
def test_the_solvers_at_unit_spacing_are_the_published_ones(rule, at_unit_spacing):
    for gap in (1, 6):  # r = 1 either way; the contraction of scaled Taylor acts on r alone
        weights = after(rule, [gap, gap], gap)
        assert weights == pytest.approx(at_unit_spacing, abs=1e-14)


@pytest.mark.parametrize("horizon", [1, 3, 5])
def test_the_solvers_at_other_horizons_follow_their_formulas(horizon):
    r = horizon / 6
    end, now = r * (3 + 2 * r) / (6 * (1 + r)), r * (3 + r) / 6
    a, b = end * (1 + r / 2) + now, -end * r / 2 - r**3 / (6 * (1 + r))
    expected = {
        RungeKutta2: [1 + r / 2, 0, -r / 2],
        AdamsBashforth2: [1 + r + r**2 / 2, -(r + r**2), r**2 / 2],
        BDF2: [1 + r / 3, -r / 3],
        AdamsMoulton: [1 + a, -a + b, -b],
        Foca2Point: [7 / 6 + 5 * r / 6, -(1 / 6 + 5 * r / 6)],
    }
    for rule, weights in expected.items():
        assert after(rule(), [6, 6], horizon) == pytest.approx(weights, abs=1e-14), rule


@pytest.mark.parametrize(
    ("rule", "newest_first"),
    [
        (RungeKutta2(), [5 / 4, 0, -1 / 4]),
        (AdamsMoulton(), [242 / 135, -586 / 675, 51 / 675]),
        (BDF2(), [11 / 9, -2 / 9]),
        (Foca2Point(), [31 / 18, -13 / 18]),
    ],
)
def test_unequal_gaps_enter_as_the_docstrings_say(rule, newest_first):
    assert after(rule, [5, 3], 2) == pytest.approx(newest_first, abs=1e-14)  # r = 2/3


@given(gap_list=gaps, horizon=horizons)
def test_adams_bashforth_2_is_taylor_2_on_any_gaps(gap_list, horizon):
    expected = after(Taylor(2), gap_list, horizon)
    size = sum(map(abs, expected))
    assert after(AdamsBashforth2(), gap_list, horizon) == pytest.approx(expected, abs=1e-14 * size)


@given(gap_list=gaps, horizon=horizons)
def test_one_number_covers_five_published_rules(gap_list, horizon):
    same = {
        0.0: Reuse(),
        1 / 3: BDF2(),
        0.5: HiCache(1, 0.5),
        0.25: ScaledTaylor(1, 0.5),
        1.0: Taylor(1),
    }
    for rho, rule in same.items():
        expected = [*after(rule, gap_list, horizon), 0.0][:2]
        assert after(Damped(rho), gap_list, horizon) == pytest.approx(expected, abs=1e-13)


@given(gap_list=gaps, horizon=horizons, order=st.integers(1, 4))
def test_scaled_taylor_is_taylor_at_a_contracted_horizon(gap_list, horizon, order):
    expected = after(Taylor(order), gap_list, 4 * horizon)
    scaled = after(ScaledTaylor(order, 0.5), gap_list, 16 * horizon)
    assert scaled == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------------- too few anchors, and ramps


@pytest.mark.parametrize("rule", [RungeKutta2(), AdamsBashforth2(), AdamsMoulton()])
def test_a_three_point_solver_starts_as_reuse_then_forward_euler(rule):
    assert after(rule, [], 3) == [1.0]
    assert after(rule, [4], 3) == pytest.approx([1.75, -0.75])


@pytest.mark.parametrize(
    "rule", [BDF2(), Damped(0.7), Foca2Point(), FocaRecursive(), MeanCache(), Spectrum()]
)
def test_a_slope_rule_starts_as_reuse(rule):
    assert after(rule, [], 3) == [1.0]


@given(gap_list=gaps, horizon=horizons)
def test_rules_of_full_slope_continue_a_ramp_on_any_gaps(gap_list, horizon):
    steps = steps_from(gap_list)
    adjacent = [0] + [step + 1 for step in steps]
    rules = [Taylor(3, warmup=1), HiCache(2, FULL_SLOPE), RungeKutta2(), AdamsBashforth2()]
    for rule, at in [(r, steps) for r in (*rules, AdamsMoulton())] + [(FocaRecursive(), adjacent)]:
        index = at[-1] + horizon
        size = float(weights_at(rule, at, index).abs().sum()) * 200
        forecast = forecast_of(rule, at, index, lambda s: 7.0 - 2 * s)
        assert forecast == pytest.approx(7.0 - 2 * index, abs=1e-13 * size), rule


@pytest.mark.parametrize(
    ("rule", "part"),
    [(BDF2(), 1 / 3), (Damped(0.7), 0.7), (ScaledTaylor(2), 0.25), (HiCache(), 0.5)],
)
def test_a_damped_rule_goes_its_part_of_the_way_in_the_right_direction(rule, part):
    assert forecast_of(rule, [0, 3, 9], 13, lambda s: 2.0 * s) == pytest.approx(18 + part * 8)


def test_foca_2pt_misses_a_ramp_by_a_sixth_of_the_missing_gap():
    for horizon in range(1, 13):
        forecast = forecast_of(Foca2Point(), [0, 6], 6 + horizon, lambda s: 2.0 * s)
        assert forecast == pytest.approx(2 * (6 + horizon) + (1 - horizon / 6) / 6 * 12)


ORDER_OF_ERROR = [
    *((Newton(order), [0, 6, 12, 18], order + 1) for order in (1, 2, 3)),
    *((Taylor(order), [0, 6, 12, 18], 2) for order in (1, 2, 3)),
    (HiCache(2, FULL_SLOPE), [0, 6, 12], 2),
    *((rule, [0, 6, 12], 2) for rule in (RungeKutta2(), AdamsBashforth2(), AdamsMoulton())),
    (FocaRecursive(), [0, 1, 7, 13], 2),
    *((rule, [0, 6, 12], 1) for rule in (BDF2(), Damped(0.5), HiCache(2), ScaledTaylor(2))),
    (Foca2Point(), [0, 6], 1),
    (MeanCache(3), [0, 6, 12], 1),
]


@pytest.mark.parametrize(("rule", "steps", "rate"), ORDER_OF_ERROR, ids=lambda v: type(v).__name__)
def test_halving_the_spacing_divides_the_error_by_the_stated_power_of_two(rule, steps, rate):
    def error(h: float) -> float:
        index = steps[-1] + 4
        return abs(forecast_of(rule, steps, index, lambda s: math.exp(h * s)) - math.exp(h * index))

    assert math.log2(error(0.002) / error(0.001)) == pytest.approx(rate, abs=0.1)


# ---------------------------------------------------------------------------- warm-up and its hook


def fixed_interval(interval: int, warmup: int) -> list[int]:
    return [*range(warmup), *range(warmup - 1 + interval, 50, interval)]


def released_run(
    anchors: list[int], features: torch.Tensor, order: int, warmup: int
) -> dict[int, torch.Tensor]:
    """The release's loop: a ladder of levels that exist or not, and forecasts between anchors."""
    ladder: dict[int, torch.Tensor] = {}
    forecasts, last = {}, 0
    for s in range(50):
        if s in anchors:
            grown = {0: features[s]}
            for i in range(order):
                if i not in ladder or s <= warmup - 2:
                    break
                grown[i + 1] = (grown[i] - ladder[i]) / (s - last)
            ladder, last = grown, s
        else:
            terms = [d * (s - last) ** i / math.factorial(i) for i, d in ladder.items()]
            forecasts[s] = torch.stack(terms).sum(0)
    return forecasts


@pytest.mark.parametrize("warmup", [1, 2, 3, 5])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_with_a_warmup_is_the_released_loop(order, warmup):
    anchors = fixed_interval(6, warmup)
    features = torch.randn(50, 4, dtype=torch.float64)
    table = tabulate(Taylor(order, warmup), anchors, SIGMAS)
    for s, expected in released_run(anchors, features, order, warmup).items():
        torch.testing.assert_close(table[s] @ features, expected, atol=1e-11, rtol=1e-12)


@pytest.mark.parametrize(
    ("warmup", "levels"), [(1, [0, 1, 2, 3]), (2, [0, 1, 2, 3]), (3, [0, 0, 1, 2, 3, 3])]
)
def test_the_order_grows_as_in_the_release(warmup, levels):
    rule = Taylor(3, warmup)
    anchors = fixed_interval(6, warmup)
    for count, level in enumerate(levels, start=1):
        assert rule.levels(anchors[:count][-rule.window :]) == level
        at = weights_at(rule, anchors[:count], anchors[count - 1] + 1)
        assert int((at != 0).sum()) == level + 1


def test_a_warmup_of_three_keeps_a_cubic_out_of_the_first_window():
    assert after(Taylor(2, warmup=3), [1, 1], 5) == [6.0, -5.0, 0.0]
    assert after(Taylor(2), [1, 1], 5) == [18.5, -30.0, 12.5]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("anchors", [[0, 1, 2, *range(4, 50, 5)], [0, 2, 3, 11, 20, 31]])
def test_the_hook_of_diffusers_computes_taylor(order, anchors):
    features = torch.randn(50, 4, dtype=torch.float64)
    table = tabulate(Taylor(order), anchors, SIGMAS)
    state = TaylorSeerState(torch.float64, max_order=order)
    for s in range(50):
        state.current_step = s
        if s in anchors:
            state.update((features[s],))
        else:
            torch.testing.assert_close(table[s] @ features, state.predict()[0])


def test_a_warmup_below_one_is_refused():
    with pytest.raises(ValueError, match="warmup is 0, expected None or at least 1"):
        Taylor(2, warmup=0)


# ------------------------------------------------------------------------------------------- clocks


@given(gap_list=gaps, horizon=horizons, order=st.integers(1, 4))
def test_taylor_and_newton_depend_on_ratios_of_the_clock_alone(gap_list, horizon, order):
    steps = steps_from(gap_list)
    index = steps[-1] + horizon
    for rule in (Taylor(order, clock="sigma"), Newton(order, clock="sigma")):
        by_step = weights_at(type(rule)(order), steps, index)
        size = 1e-11 * float(by_step.abs().sum())
        for scale in (0.004, 0.02, -0.007):  # another unit, another zero, and a falling clock
            moved = weights_at(rule, steps, index, lambda s, scale=scale: 0.9 - scale * s)
            assert moved.tolist() == pytest.approx(by_step.tolist(), abs=size)


def test_hicache_depends_on_the_unit_of_the_clock():
    wide = after(HiCache(2), [12, 12], 10)
    assert wide != pytest.approx(after(HiCache(2), [6, 6], 5), abs=1e-3)
    assert after(ScaledTaylor(2), [12, 12], 10) == pytest.approx(after(ScaledTaylor(2), [6, 6], 5))


@given(gap_list=gaps, horizon=horizons)
def test_hicache_on_an_even_sigma_grid_is_hicache_in_steps(gap_list, horizon):
    steps = steps_from(gap_list)
    expected = weights_at(HiCache(2), steps, steps[-1] + horizon)
    found = weights_at(HiCache(2, clock="sigma"), steps, steps[-1] + horizon)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-10)


def test_a_ramp_in_sigma_is_continued_on_the_sigma_clock():
    def sigma(s: int) -> float:
        return (1 - s / 100) ** 2

    for rule in (Taylor(2, clock="sigma"), HiCache(2, FULL_SLOPE, clock="sigma")):
        weights = weights_at(rule, [2, 9, 14], 22, sigma)
        ramp = torch.tensor([sigma(2), sigma(9), sigma(14)], dtype=torch.float64)
        assert float(weights @ ramp) == pytest.approx(sigma(22), abs=1e-12)


@pytest.mark.parametrize("rule", [Taylor, Newton, HiCache])
def test_an_unknown_clock_is_refused(rule):
    with pytest.raises(ValueError, match="clock is 'time', expected 'step' or 'sigma'"):
        rule(1, clock="time")


@pytest.mark.parametrize("contraction", [0.0, 1.5])
def test_a_contraction_out_of_range_is_refused(contraction):
    with pytest.raises(ValueError, match="expected a number in"):
        ScaledTaylor(2, contraction)


@pytest.mark.parametrize("rho", [-0.1, math.nan, math.inf])
def test_a_damping_out_of_range_is_refused(rho):
    with pytest.raises(ValueError, match="expected a finite number >= 0"):
        Damped(rho)


# -------------------------------------------------------------------------------- FoCa, recursive


@given(gap_list=gaps, horizon=horizons, seed=seeds)
def test_foca_recursive_is_the_stepwise_recursion_over_its_own_forecasts(gap_list, horizon, seed):
    anchors = steps_from(gap_list)
    values = torch.randn(len(anchors), dtype=torch.float64, generator=_seeded(seed)).tolist()
    used, slope, move = values[0], 0.0, 0.0
    for step in range(1, anchors[-1] + horizon + 1):
        if step in anchors:
            k = anchors.index(step)
            slope = (values[k] - values[k - 1]) / (step - anchors[k - 1])
            move, used = values[k] - used, values[k]
        else:
            move = (slope + move) / 2
            used = used + move
    weights = weights_at(FocaRecursive(), anchors, anchors[-1] + horizon)
    found = float(weights @ torch.tensor(values, dtype=torch.float64))
    assert found == pytest.approx(used, abs=1e-12 * max(1.0, float(weights.abs().sum())))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------- MeanCache and Spectrum


@pytest.mark.parametrize(
    ("length", "newest_first"),
    [(2, [5 / 4, -1 / 4]), (3, [10 / 9, 1 / 9, -2 / 9]), (4, [17 / 16, 1 / 16, 1 / 16, -3 / 16])],
)
def test_the_weights_of_meancache_after_adjacent_anchors_are_the_published_ones(
    length, newest_first
):
    assert after(MeanCache(length), [1] * 4, 1) == pytest.approx(
        [*newest_first, *[0] * (5 - length)], abs=1e-14
    )


def released_meancache(
    velocities: dict[int, float], length: int, grid: list[float], end: int
) -> float:
    """The release's loop up to a forecast: Euler's states, the mean velocity between two."""
    x, states, used = 0.7, [], []
    for i in range(end + 1):
        if i in velocities:
            v = velocities[i]
        else:
            first = max(0, i - length)
            span = grid[i] - grid[first]
            mean = (x - states[first]) / span
            v = used[-1] - (used[first] - mean) / span * (grid[i + 1] - grid[i])
        states.append(x)
        used.append(v)
        x += (grid[i + 1] - grid[i]) * v
    return used[-1]


@pytest.mark.parametrize("length", [2, 3, 4])
@pytest.mark.parametrize("power", [1, 1.5])
@pytest.mark.parametrize("anchors", [PUBLISHED_L2P[8], uniform(8, 50)])
def test_meancache_is_the_released_loop_on_even_and_uneven_sigmas(length, power, anchors):
    sigmas = [(1 - s / 50) ** power for s in range(50)]
    values = torch.randn(8, dtype=torch.float64, generator=_seeded(length)).tolist()
    velocities = dict(zip(anchors, values, strict=True))
    table = tabulate(MeanCache(length), anchors, sigmas)[:, list(anchors)]
    found = table @ torch.tensor(values, dtype=torch.float64)
    for s in range(50):
        known = {a: v for a, v in velocities.items() if a <= s}
        expected = released_meancache(known, length, [*sigmas, 0.0], s)
        assert float(found[s]) == pytest.approx(expected, abs=1e-11 * max(1, abs(expected)))


def test_meancache_asks_for_the_flow_times_of_all_steps():
    history = History(None, [0, 2], [1.0, 0.9], [torch.zeros(1)] * 2)
    with pytest.raises(ValueError, match="0 flow times of a run of 50 steps; MeanCache averages"):
        MeanCache()(history, Step(4, 0.8, 50))
    twice = [1.0, 1.0, 0.5, 0.5, 0.2, 0.2]
    history = History(None, [0, 1], [1.0, 1.0], [torch.zeros(1)] * 2)
    with pytest.raises(ValueError, match="2 steps begin and end at the flow time 0.5"):
        MeanCache(2).rows((0, 2, 3), [1.0, 0.7, 0.5, 0.6, 0.5, 0.2])
    assert MeanCache(2).rows((0, 1, 2), twice).isfinite().all()


@pytest.mark.parametrize("length", [1, 0, -3])
def test_a_mean_over_less_than_two_steps_is_refused(length):
    with pytest.raises(ValueError, match=f"length is {length}, expected at least 2 steps"):
        MeanCache(length)


@pytest.mark.parametrize(
    ("blend", "anchors", "step", "weights"),
    [
        (1.0, [0, 10, 20, 30], 35, [-0.052924, 0.342334, -0.749424, 1.331767]),
        (0.5, [0, 10, 20, 30], 35, [-0.026462, 0.171167, -0.624712, 1.415883]),
        (
            0.5,
            [0, 1, 2, 3, 4, 5, 7, 9, 12],
            14,
            [0.114494, 0.012575, -0.053315, -0.08729, -0.093281, -0.075039]
            + [0.020051, -0.161721, 1.287644],
        ),
    ],
)
def test_the_weights_of_spectrum_are_the_released_ones(blend, anchors, step, weights):
    history = History(None, anchors, [1 - a / 50 for a in anchors], [])
    found = Spectrum(blend).coefficients(history, Step(step, 1 - step / 50, 50))
    assert found.tolist() == pytest.approx(weights, abs=5.1e-7)


@given(gap_list=gaps, horizon=horizons, seed=seeds)
def test_spectrum_is_a_ridge_fit_of_chebyshev_polynomials_blended_with_a_line(
    gap_list, horizon, seed
):
    steps = steps_from(gap_list)
    values = torch.randn(len(steps), dtype=torch.float64, generator=_seeded(seed))
    at = steps[-1] + horizon
    tau = torch.tensor([*steps, at]).double() / 50 - 1
    columns = [torch.ones_like(tau), tau]
    for _ in range(3):
        columns.append(2 * tau * columns[-1] - columns[-2])
    phi = torch.stack(columns, dim=1)
    penalty = math.sqrt(0.1) * torch.eye(5, dtype=torch.float64)
    design, target = torch.cat([phi[:-1], penalty]), torch.cat([values, torch.zeros(5).double()])
    fitted = float(phi[-1] @ torch.linalg.lstsq(design, target).solution)
    line = float(weights_at(Taylor(1), steps[-2:], at) @ values[-2:])
    expected = 0.25 * fitted + 0.75 * line
    weights = weights_at(Spectrum(0.25), steps, at)
    assert float(weights @ values) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "arguments", [(-0.1,), (1.1,), (0.5, 0), (0.5, 4, 0.0), (0.5, 4, math.inf)]
)
def test_a_spectrum_out_of_range_is_refused(arguments):
    with pytest.raises(ValueError, match="expected a blend in"):
        Spectrum(*arguments)


# ------------------------------------------------------------------------------------ the gap bound


@pytest.mark.parametrize(
    ("gap_list", "horizon", "unbounded"),
    [([1, 1], 5, [6.0, -5.0]), ([2], 9, [5.5, -4.5]), ([1], 4, [5.0, -4.0]), ([2], 4, [3.0, -2.0])],
)
def test_a_short_last_gap_is_a_hazard_that_the_bound_turns_into_reuse(gap_list, horizon, unbounded):
    assert after(Taylor(1), gap_list, horizon) == unbounded
    assert after(GapBounded(Taylor(1), 1.5), gap_list, horizon) == [1.0, 0.0]
    assert after(GapBounded(Taylor(1), 10.0), gap_list, horizon) == unbounded


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("anchors", [PUBLISHED_L2P[6], uniform(8, 50)])
def test_a_bounded_rule_is_the_rule_up_to_the_bound_and_reuse_above_it(name, anchors):
    rule = RULES[name]
    bounded = GapBounded(rule, 1.5)
    assert bounded.window == rule.window
    plain, found = tabulate(rule, anchors, SIGMAS), tabulate(bounded, anchors, SIGMAS)
    reuse = tabulate(Reuse(), anchors, SIGMAS)
    past = {s: [a for a in anchors if a <= s][-2:] for s in range(50)}
    above = [s for s, at in past.items() if len(at) == 2 and s - at[1] > 1.5 * (at[1] - at[0])]
    assert bool(above) == (anchors == PUBLISHED_L2P[6])
    for s in range(50):
        assert torch.equal(found[s], (reuse if s in above else plain)[s])


def test_a_bound_keeps_one_column_per_branch():
    class PerBranch(LinearPredictor):
        window = 2

        def coefficients(self, history, step):
            return Taylor(1).coefficients(history, step)[:, None].repeat(1, len(step.branches))

    history = History(2, [0, 1], [1.0, 0.98], [torch.zeros(2), torch.ones(2)])
    both = GapBounded(PerBranch(), 1.5).coefficients(history, Step(6, 0.9, 50, (0, 1)))
    assert both.tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_a_bound_that_means_nothing_is_refused():
    for ratio in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected a finite number > 0"):
            GapBounded(Taylor(1), ratio)
    with pytest.raises(ValueError, match="found the learned L2P, expected a fixed rule"):
        GapBounded(L2P(4, [0, 2]), 1.5)


# ------------------------------------------------------------------------------ the table of rules


@pytest.mark.parametrize("num_anchors", [6, 8, 11])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_finite_rows_on_the_usual_anchors(name, num_anchors):
    for anchors in (PUBLISHED_L2P[num_anchors], uniform(num_anchors, 50)):
        table = tabulate(RULES[name], anchors, SIGMAS)
        assert table.isfinite().all()
        size = table.abs().sum(1)
        if name != "spectrum":  # its ridge shrinks
            assert ((table.sum(1) - 1).abs() <= 1e-13 * size).all()
        others = [s for s in range(50) if s not in anchors]
        assert not table[:, others].any()
        assert (table.triu(1) == 0).all()


def test_two_names_of_the_table_mean_the_same_rule_only_for_order_one():
    tables = {name: tabulate(rule, PUBLISHED_L2P[8], SIGMAS) for name, rule in RULES.items()}
    names = list(RULES)
    same = [
        (a, b)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if torch.allclose(tables[a], tables[b], atol=1e-12)
    ]
    assert same == [("taylor_1", "newton_1")]
