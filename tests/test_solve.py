"""The one ridge is the minimiser it says it is, in units of its own, at one strength or several."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_hosts import seeded

from foreseer.predictors.solve import closed_form, least_squares_rows, ridge, ridges

strengths = st.sampled_from([1e-8, 1e-4, 1e-2, 1.0, 1e3])


def system(seed: int = 0, size: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, what they should sum to, and the norms by which the features are scaled."""
    random = torch.randn(size + 2, 40, dtype=torch.float64, generator=seeded(seed))
    return random[:size], random[size:], torch.logspace(-3, 3, size, dtype=torch.float64)


@settings(max_examples=30)
@given(strength=strengths, seed=st.integers(0, 99))
def test_the_gradient_of_what_it_minimises_is_zero(strength, seed):
    features, targets, _ = system(seed)
    normal, right = features @ features.T, features @ targets.T
    found = ridge(normal, right, strength)
    gradient = normal @ found - right + strength * normal.diagonal()[:, None] * found
    assert float(gradient.abs().max()) <= 1e-9 * (1 + strength) * float(normal.abs().max())


@settings(max_examples=30)
@given(strength=strengths, seed=st.integers(0, 99))
def test_a_strength_means_the_same_for_features_of_any_size(strength, seed):
    features, targets, norms = system(seed)
    plain = ridge(features @ features.T, features @ targets.T, strength)
    scaled = features * norms[:, None]
    found = ridge(scaled @ scaled.T, scaled @ targets.T, strength)
    torch.testing.assert_close(found * norms[:, None], plain, atol=1e-8, rtol=1e-8)


def test_with_units_it_is_the_textbooks_ridge():
    features, targets, norms = system()
    scaled = features * norms[:, None]
    normal, right = scaled @ scaled.T, scaled @ targets.T
    found = ridge(normal, right, 0.1, units=torch.ones(len(normal), dtype=torch.float64))
    expected = torch.linalg.solve(normal + 0.1 * torch.eye(len(normal)).double(), right)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_several_strengths_at_once_are_each_of_them():
    features, targets, _ = system()
    normal, right = features @ features.T, features @ targets.T
    tried = [0.0, 1e-8, 1e-4, 1e-1]
    for strength, found in zip(tried, ridges(normal, right, tried), strict=True):
        torch.testing.assert_close(found, ridge(normal, right, strength), atol=1e-9, rtol=1e-9)


def test_what_no_feature_explains_gets_no_weight_without_a_ridge():
    features, targets, _ = system()
    twice = torch.cat([features, features[:1]])  # one feature is there twice
    found = ridge(twice @ twice.T, twice @ targets.T, 0.0)
    plain = ridge(features @ features.T, features @ targets.T, 0.0)
    torch.testing.assert_close(found[0], plain[0] / 2, atol=1e-8, rtol=1e-6)  # the least norm
    torch.testing.assert_close(found[5], plain[0] / 2, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("strength", [-1e-9, float("nan")])
def test_a_strength_that_means_nothing_is_refused(strength):
    normal = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected a strength >= 0"):
        ridge(normal, normal, strength)


def test_rows_of_a_segment_are_solved_at_once_as_one_by_one():
    features = torch.randn(8, 30, dtype=torch.float64, generator=seeded()).cumsum(0)
    gram = (features @ features.T)[None]
    rows = least_squares_rows(gram, [0, 1, 4])
    for step in (2, 3, 5, 6, 7):
        history = [a for a in (0, 1, 4) if a < step]
        alone = closed_form(gram, history, [step], [1e-4])[0, 0, :, 0]
        torch.testing.assert_close(rows[0, step, history], alone, atol=1e-12, rtol=1e-12)
    assert torch.equal(rows[0, [0, 1, 4]], torch.eye(8, dtype=torch.float64)[[0, 1, 4]])
