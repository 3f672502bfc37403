"""Lists of anchors are those of the releases they are named after, and masks go there and back."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foreseer.integration.schedule import (
    SCM_RUNS,
    anchors_mask,
    diffusers_interval,
    interval,
    magcache,
    mask_anchors,
    scm,
    spectrum,
)
from foreseer.trajectories.gram import gram, magnitude_ratios


@pytest.mark.parametrize(
    ("every", "warmup", "count", "first"),
    [
        (3, 3, 18, (0, 1, 2, 5, 8)),
        (4, 3, 14, (0, 1, 2, 6, 10)),
        (5, 3, 12, (0, 1, 2, 7, 12)),
        (6, 3, 10, (0, 1, 2, 8, 14)),
        (7, 3, 9, (0, 1, 2, 9, 16)),
        (8, 3, 8, (0, 1, 2, 10, 18)),
        (9, 3, 8, (0, 1, 2, 11, 20)),
        (4, 2, 14, (0, 1, 5, 9, 13)),
    ],
)
def test_the_interval_rule_counts_as_taylorseers_release(every, warmup, count, first):
    anchors = interval(50, every, warmup)
    assert len(anchors) == count
    assert anchors[:5] == first


def test_diffusers_rule_is_its_hooks():
    assert diffusers_interval(50) == (0, 1, 2, 4, 9, 14, 19, 24, 29, 34, 39, 44, 49)
    assert diffusers_interval(12, 4, 2, last_forecast=10) == (0, 1, 3, 7, 10, 11)
    with pytest.raises(ValueError, match="expected both >= 1"):
        diffusers_interval(50, interval=0)


@pytest.mark.parametrize(
    ("growth", "anchors"),
    [
        (0.75, [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46]),
        (3.0, [0, 1, 2, 3, 4, 6, 11, 19, 30, 44]),
        (0.0, [0, 1, 2, 3, *range(4, 50, 2)]),
    ],
)
def test_spectrums_windows_grow_as_in_its_release(growth, anchors):
    assert list(spectrum(50, growth=growth)) == anchors
    computed, window, run = [], 2.0, 0
    for step in range(50):  # the released counter
        computes = step < 5 or (run + 1) % math.floor(window) == 0
        if computes and step >= 5:
            window = round(window + growth, 3)
        run = 0 if computes else run + 1
        computed += [step] * computes
    assert computed == anchors


def test_spectrum_refuses_arguments_out_of_range():
    for wrong in ({"window": 0.5}, {"growth": -1.0}, {"growth": math.nan}, {"warmup": 0}):
        with pytest.raises(ValueError, match="expected window >= 1"):
            spectrum(50, **wrong)


def test_magcache_forecasts_while_the_product_stays_near_one():
    ratios = [1.0] * 4 + [0.98] * 6
    # |1 - 0.98| = 0.02, then + |1 - 0.9604| = 0.0596, then + |1 - 0.941192| = 0.118408
    assert magcache(ratios, threshold=0.06, retention=0.4) == (0, 1, 2, 3, 6, 9)
    assert magcache(ratios, threshold=0.2, max_run=1, retention=0.4) == (0, 1, 2, 3, 5, 7, 9)
    assert magcache(ratios, threshold=0.0, retention=0.1) == (0, 4, 5, 6, 7, 8, 9)


@pytest.mark.parametrize(
    "wrong", [{"threshold": -0.1}, {"max_run": 0}, {"retention": 0.0}, {"retention": 1.5}]
)
def test_magcache_refuses_arguments_out_of_range(wrong):
    with pytest.raises(ValueError, match="expected threshold >= 0"):
        magcache([1.0, 0.9], **wrong)
    with pytest.raises(ValueError, match="positive"):
        magcache([1.0, -0.9])


def test_magnitude_ratios_are_those_of_the_features():
    features = torch.randn(3, 2, 5, 7, dtype=torch.float64)
    norms = features.norm(dim=-1)
    expected = (norms[..., 1:] / norms[..., :-1]).mean((0, 1))
    found = magnitude_ratios(gram(features))
    assert found[0] == 1.0
    torch.testing.assert_close(torch.tensor(found[1:], dtype=torch.float64), expected)


@pytest.mark.parametrize(
    ("policy", "count"), [("slow", 18), ("medium", 15), ("fast", 11), ("ultra", 8)]
)
def test_scm_masks_at_28_steps_are_cache_dits(policy, count):
    computed, cached = SCM_RUNS[policy]
    mask: list[int] = []
    for i, run in enumerate(computed):
        mask += [1] * run + [0] * (cached[i] if i < len(cached) else 0)
    assert anchors_mask(scm(policy), 28) == mask
    assert sum(mask) == count


@pytest.mark.parametrize("policy", SCM_RUNS)
@pytest.mark.parametrize("num_steps", [20, 40, 50])
def test_scm_masks_keep_their_share_of_anchors(policy, num_steps):
    share = len(scm(policy)) / 28
    assert abs(len(scm(policy, num_steps)) / num_steps - share) < 0.1
    assert scm(policy, num_steps)[0] == 0


def test_scm_refuses_what_it_has_no_table_for():
    with pytest.raises(ValueError, match="expected one of slow, medium, fast, ultra"):
        scm("faster")
    with pytest.raises(ValueError, match="at least 16 steps"):
        scm("slow", 8)


@given(st.lists(st.booleans(), max_size=60))
def test_masks_go_there_and_back(rest):
    mask = [1, *map(int, rest)]
    assert anchors_mask(mask_anchors(mask), len(mask)) == mask
    assert mask_anchors(" ".join(map(str, mask))) == mask_anchors(mask)
    assert mask_anchors(",".join(map(str, mask))) == mask_anchors(mask)


def test_a_mask_holds_ones_and_zeros_and_starts_with_an_anchor():
    with pytest.raises(ValueError, match="the mask holds 2; expected ones and zeros"):
        mask_anchors("1 0 2")
    with pytest.raises(ValueError, match="starts with step 0"):
        mask_anchors([0, 1, 1])
