"""What is computed from Grams equals what is computed from the features themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import errors_of
from tiny_hosts import seeded

from foreseer.predictors.solve import ridge
from foreseer.trajectories.gram import (
    cosine_to_previous,
    explained,
    gram,
    projection_fidelity,
    relative_change,
    relative_errors,
    squared_errors,
)

STEPS, ELEMENTS = 7, 60


@pytest.fixture
def features() -> torch.Tensor:
    """Three trajectories of two branches whose features change slowly, `(3, 2, S, M)`."""
    steps = torch.randn(3, 2, STEPS, ELEMENTS, dtype=torch.float64, generator=seeded())
    return 3 + steps.cumsum(2) / 4


def test_entries_are_inner_products(features):
    grams = gram(features.float())
    assert grams.dtype == torch.float64
    assert grams.shape == (3, 2, STEPS, STEPS)
    inner = (features[1, 0, 2].float().double() * features[1, 0, 5].float().double()).sum()
    assert float(grams[1, 0, 2, 5]) == pytest.approx(float(inner), rel=1e-13)
    torch.testing.assert_close(grams, grams.mT, rtol=1e-14, atol=0)


def test_bfloat16_features_lose_nothing_more_in_the_gram(features):
    rounded = features.bfloat16()
    assert torch.equal(gram(rounded), gram(rounded.double()))


def test_relative_change_is_that_of_the_features(features):
    direct = (features[:, :, 1:] - features[:, :, :-1]).norm(dim=-1) / features[:, :, :-1].norm(
        dim=-1
    )
    torch.testing.assert_close(relative_change(gram(features)), direct, atol=1e-9, rtol=1e-9)


def test_relative_change_of_equal_features_is_zero():
    grams = gram(torch.full((4, 10), 0.1))
    assert not relative_change(grams).any()
    assert torch.equal(cosine_to_previous(grams), torch.ones(3, dtype=torch.float64))


def test_cosine_is_that_of_the_features(features):
    direct = torch.cosine_similarity(features[:, :, 1:], features[:, :, :-1], dim=-1)
    torch.testing.assert_close(cosine_to_previous(gram(features)), direct, atol=1e-9, rtol=1e-9)


@settings(max_examples=30)
@given(t=st.integers(1, STEPS - 1), seed=st.integers(0, 99))
def test_the_open_loop_error_is_that_of_the_features(t, seed):
    random = torch.randn(2, STEPS, ELEMENTS, dtype=torch.float64, generator=seeded(seed))
    weights = torch.zeros(2, STEPS, dtype=torch.float64)
    weights[:, :t] = torch.randn(2, t, dtype=torch.float64, generator=seeded(seed + 1))
    forecast = torch.einsum("bs,bsm->bm", weights, random)
    direct = (random[:, t] - forecast).norm(dim=-1) / random[:, t].norm(dim=-1)
    rows = torch.eye(STEPS, dtype=torch.float64).repeat(2, 1, 1)
    rows[:, t] = weights
    found = errors_of(gram(random), rows)
    assert not found[:, [s for s in range(STEPS) if s != t]].any()
    torch.testing.assert_close(found[:, t], direct, atol=1e-9, rtol=1e-9)


def test_the_error_of_parts_is_that_of_the_sum_of_what_they_miss(features):
    halves = torch.stack([gram(half) for half in features.chunk(2, dim=-1)], 2)  # (n, b, P, S, S)
    rows = torch.randn(2, 2, STEPS, STEPS, dtype=torch.float64, generator=seeded(3))
    forecasts = [
        torch.einsum("bts,nbsm->nbtm", rows[:, part], half)
        for part, half in enumerate(features.chunk(2, dim=-1))
    ]
    missed = (features - torch.cat(forecasts, -1)).norm(dim=-1)
    torch.testing.assert_close(relative_errors(halves, rows), missed / features.norm(dim=-1))
    squares = squared_errors(halves, rows).sum(2)
    torch.testing.assert_close(squares, missed.square())


@pytest.mark.parametrize("anchors", [None, (0, 2, 3)])
def test_projection_fidelity_is_the_residual_of_least_squares(features, anchors):
    found = projection_fidelity(gram(features), anchors)
    for t in range(1, STEPS):
        history = [s for s in (range(t) if anchors is None else anchors) if s < t]
        if anchors is not None and t in anchors:
            assert (found[..., t] == 1).all()
            continue
        basis, target = features[..., history, :].mT, features[..., t, :, None]
        solution = torch.linalg.lstsq(basis, target).solution
        residual = (target - basis @ solution).norm(dim=(-2, -1)) / target.norm(dim=(-2, -1))
        torch.testing.assert_close(found[..., t], 1 - residual, atol=1e-9, rtol=0)
    assert not found[..., 0].any()


def test_a_feature_within_the_span_of_its_history_is_explained_whole():
    basis = torch.randn(3, ELEMENTS, dtype=torch.float64, generator=seeded())
    features = torch.cat([basis, (2 * basis[0] - basis[2])[None], basis[:1]])  # a doubled one too
    fidelity = projection_fidelity(gram(features))
    assert float(fidelity[3]) == pytest.approx(1, abs=1e-6)  # a root of float64 rounding
    assert float(fidelity[4]) == pytest.approx(1, abs=1e-6)
    assert float(explained(gram(features), [0, 1], 2)) < float(gram(features)[2, 2])


@settings(max_examples=30)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_a_singular_system_gets_its_least_squares_solution(scale, seed):
    basis = torch.randn(3, ELEMENTS, dtype=torch.float64, generator=seeded(seed))
    basis = torch.cat([basis, basis[:1] * scale])  # rank 3 of 4, steps of very different size
    target = torch.randn(ELEMENTS, dtype=torch.float64, generator=seeded(seed + 1))
    weights = ridge(basis @ basis.T, (basis @ target)[:, None], 0.0)[:, 0]
    projected = basis[:3].T @ torch.linalg.lstsq(basis[:3].T, target[:, None]).solution[:, 0]
    torch.testing.assert_close(weights @ basis, projected, atol=1e-8, rtol=0)
