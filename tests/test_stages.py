"""Stages from a recording are the best there are, and the linear equivalent's loss never rises."""

import itertools

import pytest
import torch
from row_cases import errors_of

from foreseer.integration.schedule import uniform
from foreseer.predictors.linear import fold
from foreseer.training.lesa.linear_equivalent import fit_linear_equivalent, stage_of
from foreseer.training.lesa.stages import (
    Quadratic,
    add_sample,
    best_stages,
    find_stages,
    from_grams,
    solve,
    stage_costs,
    stage_starts,
    window_steps,
)
from foreseer.trajectories.gram import gram

STEPS = 10
SIGMAS = [1 - step / STEPS for step in range(STEPS)]


def features(trajectories: int = 3, elements: int = 30, seed: int = 0) -> torch.Tensor:
    """Random walks, `(n, 2, S, M)`."""
    random = torch.Generator().manual_seed(seed)
    shape = (trajectories, 2, STEPS, elements)
    return torch.randn(shape, dtype=torch.float64, generator=random).cumsum(2)


def explicit_cost(x: torch.Tensor, window: int, steps: list[int]) -> float:
    """Least squared error of one filter per branch over some steps, from the features."""
    total = 0.0
    for branch in range(2):
        seen = torch.cat(
            [x[:, branch, window_steps(t, window)].transpose(1, 2).flatten(0, 1) for t in steps]
        )
        change = torch.cat([(x[:, branch, t] - x[:, branch, t - 1]).flatten() for t in steps])
        found = torch.linalg.lstsq(seen, change[:, None], driver="gelsd").solution
        total += float((change - (seen @ found)[:, 0]).square().sum())
    return total


def test_the_quadratics_are_the_errors_of_explicit_filters():
    x = features()
    quadratic = from_grams(gram(x), 3, (0, 4))
    filters = torch.randn(2, STEPS, 3, dtype=torch.float64)
    errors = quadratic.error(filters)
    for t in range(STEPS):
        for branch in range(2):
            seen = x[:, branch, window_steps(t, 3)]
            forecast = x[:, branch, t - 1] + torch.einsum("k,nkm->nm", filters[branch, t], seen)
            expected = (x[:, branch, t] - forecast).square().sum()
            expected = torch.zeros(()).double() if t in (0, 4) else expected
            torch.testing.assert_close(errors[branch, t], expected)


def test_samples_of_a_run_add_up_to_what_the_grams_say():
    x = features()
    expected = from_grams(gram(x), 3, (0, 4))
    zeros = [torch.zeros_like(part) for part in vars(expected).values()]
    found = Quadratic(*zeros)
    for branch, t in itertools.product(range(2), (1, 2, 3, 5, 6, 7, 8, 9)):
        seen = [x[:, branch, step] for step in window_steps(t, 3)]
        add_sample(found, branch, t, seen, x[:, branch, t])
    for name, part in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), part)
    with pytest.raises(ValueError, match="found 1 features, expected 3"):
        add_sample(found, 0, 1, [x[:, 0, 0]], x[:, 0, 1])


def test_the_cost_of_a_stage_is_that_of_least_squares_on_the_features():
    x = features()
    costs = stage_costs(from_grams(gram(x), 3, (0, 4)))
    for start, end in itertools.combinations(range(STEPS + 1), 2):
        steps = [t for t in range(start, end) if t not in (0, 4)]
        if not steps:
            assert costs[end, start] == torch.inf
            continue
        expected = explicit_cost(x, 3, steps)
        torch.testing.assert_close(float(costs[end, start]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_no_partition_is_better_than_the_one_found(num_stages, seed):
    grams = gram(features(seed=seed))
    tables = [stage_costs(from_grams(grams, 2 + k % 2, (0, 4))) for k in range(num_stages)]

    def cost(starts: tuple[int, ...]) -> float:
        ends = (*starts[1:], STEPS)
        parts = zip(tables, ends, starts, strict=True)
        return sum(float(table[end, start]) for table, end, start in parts)

    found = cost(tuple(best_stages(tables)))
    others = [cost((0, *cuts)) for cuts in itertools.combinations(range(1, STEPS), num_stages - 1)]
    assert found == pytest.approx(min(others), rel=1e-12)


def test_two_regimes_are_told_apart_at_the_step_where_they_change():
    x = torch.empty(2, 2, STEPS, 40, dtype=torch.float64)
    x[:, :, :2] = torch.randn(2, 2, 2, 40, dtype=torch.float64)
    for t in range(2, STEPS):
        factor = 1.5 if t < 6 else -0.7
        x[:, :, t] = x[:, :, t - 1] + factor * (x[:, :, t - 1] - x[:, :, t - 2])
    (boundary,) = find_stages(gram(x), SIGMAS, [2, 2], anchors=(0, 1))
    assert SIGMAS[6] < boundary < SIGMAS[5]
    assert stage_starts(SIGMAS, [boundary]) == [0, 6]


def test_more_stages_than_steps_to_forecast_and_empty_stages_are_refused():
    with pytest.raises(ValueError, match="3 stages with a forecast step in each"):
        best_stages([stage_costs(from_grams(gram(features()), 2, tuple(range(8))))] * 3)
    with pytest.raises(ValueError, match="leave a stage of this grid without steps"):
        stage_starts(SIGMAS, [0.55, 0.54])
    with pytest.raises(ValueError, match="an anchor at step 0"):
        from_grams(gram(features()), 2, (1,))


def test_relative_errors_are_shares_of_reuse():
    quadratic = from_grams(gram(features()), 3, (0, 4))
    filters = torch.randn(2, STEPS, 3, dtype=torch.float64)
    counted = quadratic.constant > 0
    expected = quadratic.error(filters)[counted] / quadratic.constant[counted]
    torch.testing.assert_close(quadratic.relative().error(filters)[counted], expected)
    assert not quadratic.relative().constant[~counted].any()


# --------------------------------------------------------------------------- linear equivalent


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_of_alternating_least_squares_never_rises(seed):
    quadratic = from_grams(gram(features(seed=seed)), 4, uniform(3, STEPS))
    losses = fit_linear_equivalent(quadratic, [0, 4], num_rounds=30).losses
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.999 * losses[0]


def test_a_table_that_made_the_features_is_found_again():
    x = torch.randn(1, 2, STEPS, 60, dtype=torch.float64)
    alpha = torch.rand(2, STEPS, dtype=torch.float64) / 2 + 0.75
    taps = torch.tensor([[[-0.4, 0.1], [0.5, -0.3]], [[0.3, -0.5], [-0.6, 0.2]]]).double()
    stages = stage_of([0, 5], STEPS)
    for t in range(2, STEPS):
        change = torch.einsum("bk,nbkm->nbm", taps[:, stages[t]], x[:, :, t - 2 : t])
        x[:, :, t] = x[:, :, t - 1] + alpha[:, t, None] * change
    fitted = fit_linear_equivalent(from_grams(gram(x), 2, (0, 1)), [0, 5], num_rounds=400)
    expected = (alpha[..., None] * taps[:, stages])[:, 2:]
    torch.testing.assert_close(fitted.filters()[:, 2:], expected, atol=1e-6, rtol=1e-6)


def test_its_rows_have_its_loss_and_fold_onto_anchors():
    grams = gram(features())
    anchors = (0, 3, 6)
    fitted = fit_linear_equivalent(from_grams(grams, 4, anchors), [0, 5])
    rows = fitted.rows()
    squared = errors_of(grams, rows).square() * grams.diagonal(dim1=-2, dim2=-1)
    forecast = [t for t in range(STEPS) if t not in anchors]
    assert float(squared[..., forecast].sum()) == pytest.approx(fitted.losses[-1], rel=1e-8)
    folded = fold(rows, anchors)
    assert not folded[..., forecast].any() and folded[:, 2, 0].all()


def test_a_direction_without_features_gets_no_weight():
    normal = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    found = solve(normal, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert torch.equal(found, torch.tensor([0.5, 0.0], dtype=torch.float64))
