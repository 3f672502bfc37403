"""Every predictor obeys one contract; the formulas are the published ones to float64 precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import tabulate

from foreseer.integration.schedule import PUBLISHED_L2P
from foreseer.predictors.base import History, LinearPredictor, Step, combine
from foreseer.predictors.bounded import GapBounded
from foreseer.predictors.linear import L2P, fold
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

ANCHORS = (0, 2, 5, 9, 14)
NUM_STEPS = 20
SIGMAS = [(1 - i / NUM_STEPS) ** 1.5 for i in range(NUM_STEPS)]
PREDICTORS = {
    **{name: lambda rule=rule: rule for name, rule in RULES.items()},
    "reuse": Reuse,
    **{f"taylor_{o}": lambda o=o: Taylor(o) for o in (1, 2, 3, 4)},
    **{f"newton_{o}": lambda o=o: Newton(o) for o in (1, 2, 3, 4)},
    **{f"newton_{o}_sigma": lambda o=o: Newton(o, clock="sigma") for o in (1, 2, 3, 4)},
    **{f"hicache_{o}": lambda o=o: HiCache(o) for o in (1, 2, 3, 4)},
    **{f"scaled_taylor_{o}": lambda o=o: ScaledTaylor(o) for o in (1, 2, 3, 4)},
    "taylor_3_warmup": lambda: Taylor(3, warmup=3),
    "taylor_2_sigma": lambda: Taylor(2, clock="sigma"),
    "hicache_2_sigma": lambda: HiCache(2, clock="sigma"),
    "rk2": RungeKutta2,
    "ab2": AdamsBashforth2,
    "bdf2": BDF2,
    "adams_moulton": AdamsMoulton,
    "foca_2pt": Foca2Point,
    "foca_recursive": FocaRecursive,
    **{f"meancache_{k}": lambda k=k: MeanCache(k) for k in (2, 4)},
    "spectrum_unblended": lambda: Spectrum(1.0),
    "damped": Damped,
    "bounded": lambda: GapBounded(Taylor(2), 0.5),
    "l2p": lambda: learned(num_branches=2),
}
STATIC = [name for name in PREDICTORS if name != "l2p"]
every_predictor = pytest.mark.parametrize("name", PREDICTORS)
SHRINKING = ("spectrum", "spectrum_unblended")  # by their ridge
every_rule = pytest.mark.parametrize("name", STATIC)
gaps = st.lists(st.integers(1, 9), min_size=0, max_size=5)
orders = st.integers(1, 4)
horizons = st.integers(1, 12)


def learned(num_branches: int = 1) -> L2P:
    """An L2P whose rows are arbitrary and differ between branches."""
    predictor = L2P(NUM_STEPS, ANCHORS, num_branches)
    noise = torch.randn(predictor.weight.shape, generator=torch.Generator().manual_seed(1))
    on_anchors = torch.zeros(NUM_STEPS)
    on_anchors[list(ANCHORS)] = 0.1
    predictor.weight += (noise * on_anchors).tril(-1)
    return predictor


def clock(index: int, branches: tuple[int, ...] = (0,)) -> Step:
    return Step(index, SIGMAS[index], NUM_STEPS, branches, sigmas=SIGMAS)


def history_at(anchors, features, window: int | None = None) -> History:
    """A history on the grid of this file."""
    history = History(window)
    for anchor, feature in zip(anchors, features, strict=True):
        history.push(clock(anchor), feature)
    return history


def steps_from(gap_list: list[int]) -> list[int]:
    return [sum(gap_list[:i]) for i in range(len(gap_list) + 1)]


def weights_at(rule: LinearPredictor, steps: list[int], index: int) -> torch.Tensor:
    """Weights of features at arbitrary steps, with the flow time linear in the step."""
    history = History(None)
    for step in steps:
        history.push(Step(step, 1 - step / 100, 100), torch.zeros(1))
    sigmas = [1 - step / 100 for step in range(100)]
    return rule.coefficients(history, Step(index, sigmas[index], 100, sigmas=sigmas))


# ------------------------------------------------------------------ the contract of every predictor


@every_predictor
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 3, 4, 5), (4,)])
def test_a_forecast_has_the_shape_and_dtype_of_the_history(name, dtype, shape):
    features = torch.randn(len(ANCHORS), *shape).to(dtype)
    predictor = PREDICTORS[name]()
    forecast = predictor(history_at(ANCHORS, features, predictor.window), clock(17, (0, 1)))
    assert forecast.shape == shape
    assert forecast.dtype == dtype
    assert forecast.isfinite().all()


@every_predictor
def test_an_empty_history_is_refused(name):
    with pytest.raises(ValueError, match="the history is empty"):
        PREDICTORS[name]()(History(), clock(3))


@every_predictor
def test_a_forecast_needs_no_more_than_the_window(name):
    predictor = PREDICTORS[name]()
    features = torch.randn(len(ANCHORS), 2, 3)
    history = history_at(ANCHORS, features, predictor.window)
    assert len(history) == min(predictor.window or len(ANCHORS), len(ANCHORS))
    assert history.state_bytes() == len(history) * 2 * 3 * 4
    kept = slice(-len(history), None)
    newest = history_at(ANCHORS[kept], features[kept])
    assert torch.equal(predictor(history, clock(17)), predictor(newest, clock(17)))


@every_predictor
def test_a_batched_call_gives_each_branch_what_its_own_call_gives(name):
    predictor = PREDICTORS[name]()
    features = torch.randn(len(ANCHORS), 6, 3)
    batched = predictor(history_at(ANCHORS, features, predictor.window), clock(17, (0, 1)))
    for branch, part in enumerate(features.chunk(2, dim=1)):
        history = history_at(ANCHORS, part, predictor.window)
        single = predictor(history, clock(17, (branch,)))
        assert torch.equal(batched.chunk(2)[branch], single)


def test_the_two_branches_of_l2p_differ():
    features = torch.randn(len(ANCHORS), 1, 8).repeat(1, 2, 1)
    both = learned(2)(history_at(ANCHORS, features), clock(17, (0, 1)))
    assert not torch.allclose(both[0], both[1], atol=1e-2)


@every_predictor
def test_a_bfloat16_history_is_summed_in_float32(name):
    predictor = PREDICTORS[name]()
    features = torch.randn(len(ANCHORS), 1, 4000).bfloat16()
    history = history_at(ANCHORS, features, predictor.window)
    weights = predictor.coefficients(history, clock(17)).flatten()
    exact = torch.einsum("k,k...->...", weights.double(), torch.stack(history.features).double())
    error = (predictor(history, clock(17)).double() - exact).abs()
    # One rounding to bfloat16's 8 bits, at the end; where terms cancel, float32's is added.
    size = torch.einsum("k,k...->...", weights.abs(), torch.stack(history.features).double().abs())
    assert (error <= 2.0**-8 * exact.abs() + 1e-6 * size).all()


def test_a_sum_that_bfloat16_could_not_hold_is_right():
    features = [torch.full((1,), value).bfloat16() for value in (256.0, 1.0, 1.0)]
    assert float(combine(torch.ones(3), features)) == 258.0  # in bfloat16, 256 + 1 is 256


def test_gradients_reach_the_weights():
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    features = [torch.full((2,), 3.0), torch.full((2,), 5.0)]
    combine(weights, features).sum().backward()
    assert weights.grad.tolist() == [6.0, 10.0]


# ------------------------------------------------------------------------- what a history may hold


def test_a_step_that_does_not_follow_is_refused():
    history = history_at((0, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="step 3 was pushed after step 3; call reset"):
        history.push(clock(3), torch.zeros(1))
    history.reset()
    history.push(clock(3), torch.zeros(1))
    assert len(history) == 1


# ------------------------------------------------------------------------------ the fixed formulas


@pytest.mark.parametrize("name", sorted({*STATIC} - {*SHRINKING}))
@settings(max_examples=20)
@given(gaps=gaps, horizon=horizons)
def test_the_weights_of_a_formula_sum_to_one(name, gaps, horizon):
    steps = steps_from(gaps)
    rule = PREDICTORS[name]()
    weights = weights_at(rule, steps[-(rule.window or 0) :], steps[-1] + horizon)
    assert weights.dtype == torch.float64
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12 * float(weights.abs().sum()))


def released_ladder(steps: list[int], features: torch.Tensor, order: int) -> list[torch.Tensor]:
    """TaylorSeer's update as released: each level divides by the newest gap."""
    ladder: list[torch.Tensor] = []
    for k, step in enumerate(steps):
        previous, ladder = ladder, [features[k]]
        for i in range(order):
            if i < len(previous):
                ladder.append((ladder[i] - previous[i]) / (step - steps[k - 1]))
    return ladder


@given(gaps=gaps, horizon=horizons, order=orders, seed=st.integers(0, 99))
def test_the_weights_of_taylor_are_the_released_ladder(gaps, horizon, order, seed):
    steps = steps_from(gaps)
    features = torch.randn(len(steps), dtype=torch.float64, generator=seeded(seed))
    ladder = released_ladder(steps, features, order)
    forecast = sum(d * horizon**i / math.factorial(i) for i, d in enumerate(ladder))
    weights = weights_at(Taylor(order), steps, steps[-1] + horizon)
    size = float((weights * features).abs().sum())
    assert float(weights @ features) == pytest.approx(float(forecast), abs=1e-12 * max(size, 1))


@given(gaps=gaps, horizon=horizons, order=orders, seed=st.integers(0, 99))
def test_the_weights_of_hicache_are_hermite_polynomials_of_the_ladder(gaps, horizon, order, seed):
    steps = steps_from(gaps)
    features = torch.randn(len(steps), dtype=torch.float64, generator=seeded(seed))
    y, s = 0.5 * horizon, 0.5
    hermite = [1, 2 * y, 4 * y**2 - 2, 8 * y**3 - 12 * y, 16 * y**4 - 48 * y**2 + 12]
    ladder = released_ladder(steps, features, order)
    terms = [d * s**i * hermite[i] / math.factorial(i) for i, d in enumerate(ladder)]
    weights = weights_at(HiCache(order, s), steps, steps[-1] + horizon)
    size = float((weights * features).abs().sum())
    assert float(weights @ features) == pytest.approx(float(sum(terms)), abs=1e-12 * max(size, 1))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rule_clock", ["step", "sigma"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_newton_is_exact_on_polynomials_of_its_order(order, rule_clock):
    u = torch.tensor(SIGMAS if rule_clock == "sigma" else range(NUM_STEPS), dtype=torch.float64)
    u = u / u.max()
    polynomial = torch.stack([u**i for i in range(order + 1)]).cumsum(0)[-1] - 3 * u
    rule = Newton(order, rule_clock)
    history = history_at(ANCHORS, polynomial[list(ANCHORS)][:, None], rule.window)
    for index in (15, 19):
        forecast = rule(history, clock(index))
        assert float(forecast) == pytest.approx(float(polynomial[index]), abs=1e-11)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_error_of_newton_shrinks_at_the_theoretical_rate(order):
    def error(h: float) -> float:
        history = History(None)
        for k in range(order + 1):
            sigma = 0.5 - h * k
            feature = torch.tensor([math.exp(2 * sigma)], dtype=torch.float64)
            history.push(Step(k, sigma, 50), feature)
        sigma = 0.5 - h * (order + 0.7)
        forecast = Newton(order, "sigma")(history, Step(order + 1, sigma, 50))
        return abs(float(forecast) - math.exp(2 * sigma))

    slope = math.log2(error(0.02) / error(0.01))
    assert slope == pytest.approx(order + 1, abs=0.15)


@pytest.mark.parametrize("horizon", [1, 3, 5])
def test_taylor_2_misses_a_parabola_by_curvature_times_gap_times_horizon(horizon):
    weights = weights_at(Taylor(2), [0, 6, 12], 12 + horizon)
    forecast = float(weights @ torch.tensor([3.0 * u**2 for u in (0, 6, 12)]).double())
    assert 3.0 * (12 + horizon) ** 2 - forecast == pytest.approx(3.0 * 6 * horizon, abs=1e-9)


@given(gaps=st.lists(st.integers(1, 9), min_size=1, max_size=5), horizon=horizons, order=orders)
def test_taylor_and_hicache_at_full_slope_continue_a_ramp(gaps, horizon, order):
    steps = steps_from(gaps)
    ramp = torch.tensor([7.0 - 2 * step for step in steps]).double()
    for rule in (Taylor(order), Newton(order), HiCache(order, math.sqrt(0.5))):
        recent = steps[-rule.window :]
        weights = weights_at(rule, recent, steps[-1] + horizon)
        size = float((weights * ramp[-len(recent) :]).abs().sum())
        expected = 7.0 - 2 * (steps[-1] + horizon)
        assert float(weights @ ramp[-len(recent) :]) == pytest.approx(expected, abs=1e-12 * size)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_hicache_as_published_goes_half_the_way_in_the_right_direction(order):
    weights = weights_at(HiCache(order), [0, 4, 8, 12], 15)
    ramp = torch.tensor([0.0, 4.0, 8.0, 12.0]).double()
    assert float(weights @ ramp) == pytest.approx(12 + 0.5 * 3)


@pytest.mark.parametrize("order", [0, 5])
def test_an_order_out_of_range_is_refused(order):
    for rule in (Taylor, Newton, HiCache):
        with pytest.raises(ValueError, match=f"order is {order}, expected 1 to 4"):
            rule(order)


def test_an_unknown_clock_or_contraction_is_refused():
    with pytest.raises(ValueError, match="clock is 'time', expected 'step' or 'sigma'"):
        Newton(1, "time")
    for contraction in (0.0, -0.5, 1.5):
        with pytest.raises(ValueError, match="expected a number in"):
            HiCache(2, contraction)


# ---------------------------------------------------------------------------------- learned rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_l2p_starts_as_reuse_bit_for_bit(dtype):
    features = torch.randn(len(ANCHORS), 4, 3).to(dtype)
    predictor = L2P(NUM_STEPS, ANCHORS, num_branches=2)
    for index in set(range(1, NUM_STEPS)) - set(ANCHORS):
        past = [a for a in ANCHORS if a < index]
        history = history_at(past, features[: len(past)])
        assert torch.equal(predictor(history, clock(index, (0, 1))), features[len(past) - 1])


@every_rule
@pytest.mark.parametrize("anchors", [PUBLISHED_L2P[8], ANCHORS])
def test_l2p_with_the_rows_of_a_formula_is_that_formula(name, anchors):
    num_steps = 50 if max(anchors) > NUM_STEPS else NUM_STEPS
    sigmas = [(1 - i / num_steps) ** 1.5 for i in range(num_steps)]
    rule = PREDICTORS[name]()
    predictor = L2P(num_steps, anchors)
    predictor.weight.copy_(tabulate(rule, anchors, sigmas)[None])
    by_rule, by_rows = History(rule.window), History(predictor.window)
    for index, sigma in enumerate(sigmas):
        step = Step(index, sigma, num_steps, sigmas=sigmas)
        if index in anchors:
            feature = torch.randn(2, 3, dtype=torch.float64)
            by_rule.push(step, feature)
            by_rows.push(step, feature)
        else:
            expected = rule(by_rule, step)
            size = max(1.0, float(rule.coefficients(by_rule, step).abs().sum()))
            torch.testing.assert_close(
                predictor(by_rows, step), expected, atol=1e-12 * size, rtol=0
            )


@pytest.mark.parametrize("branches", [1, 2])
def test_folded_rows_are_the_recursion_on_fed_back_forecasts(branches):
    weight = torch.randn(branches, NUM_STEPS, NUM_STEPS, dtype=torch.float64).tril(-1) / 4
    features = torch.randn(NUM_STEPS, 7, dtype=torch.float64)
    folded = fold(weight, ANCHORS)
    assert not folded[..., [s for s in range(NUM_STEPS) if s not in ANCHORS]].any()
    for b in range(branches):
        used = torch.zeros_like(features)  # a feature at an anchor, else its forecast
        for t in range(NUM_STEPS):
            used[t] = features[t] if t in ANCHORS else weight[b, t] @ used
        torch.testing.assert_close(folded[b] @ features, used, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, [1, 2]), "starting with 0"),
        ((10, []), "starting with 0"),
        ((10, [0, 3, 3]), "rising"),
        ((10, [0, 4, 2]), "rising"),
        ((10, [0, 10]), "anchors end at 10"),
        ((10, [0, 3], 0), "at least one branch"),
    ],
)
def test_anchors_that_are_no_schedule_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        L2P(*arguments)


def test_a_branch_or_step_without_a_row_is_refused():
    predictor = L2P(NUM_STEPS, ANCHORS)
    history = history_at(ANCHORS, torch.zeros(len(ANCHORS), 2))
    with pytest.raises(ValueError, match="found branch 1 at step 17"):
        predictor(history, clock(17, (0, 1)))
    with pytest.raises(ValueError, match="at step 25"):
        predictor(history, Step(25, 0.1, 30))


def test_a_row_is_never_applied_to_a_history_with_other_anchors():
    incomplete = history_at(ANCHORS[1:], torch.zeros(len(ANCHORS) - 1, 2))
    with pytest.raises(ValueError, match=r"the history holds the steps \[2, 5, 9, 14\]"):
        L2P(NUM_STEPS, ANCHORS)(incomplete, clock(17))
