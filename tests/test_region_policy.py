"""EEdit's picks are its formula, made beforehand; SpotEdit leads unedited tokens to the source."""

from typing import Any

import pytest
import torch
from families.family import seeded
from field_pipelines import kontext
from test_partial import Oracle
from test_token_groups import ANCHORS, GRID, PICTURE, corner, drawn

from foreseer.integration.forecasting import forecasting
from foreseer.predictors.base import History, Step
from foreseer.predictors.region_policy import RegionPolicy
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.predictors.spot_edit import SpotEdit
from foreseer.predictors.token_groups import region_groups


@pytest.fixture(scope="module")
def pipe() -> Any:
    return kontext()


def online(policy: RegionPolicy, groups, anchors, num_steps):
    """The picks of the published rule, step by step and token by token."""
    edit = (groups[:, :64] == 0).view(-1, 8, 8)
    picks, age = {}, torch.zeros(len(groups), 64)
    for step in range(num_steps):
        if step in anchors:
            age.zero_()
            continue
        generator = torch.Generator().manual_seed(100_003 * policy.seed + step)
        draws = torch.rand(groups.shape, generator=generator, dtype=torch.float64)
        scores = torch.zeros(len(groups), 64, dtype=torch.float64)
        for sample, mask in enumerate(edit):
            inside = mask.nonzero()
            for token in range(64):
                place = torch.tensor([token // 8, token % 8])
                ring = int((inside - place).abs().amax(1).min())
                factor = 1 + 2 * 0.8 ** (1 + ring) if ring <= policy.rings else 1.0
                drawn = draws[sample, token] + 0.25 * age[sample, token] / 3
                scores[sample, token] = drawn * factor
        picks[step] = scores.argsort(descending=True)[:, : int(policy.ratio * 64)].sort().values
        age += 1
        age.scatter_(1, picks[step], 0.0)
    return picks


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_picks_made_beforehand_are_those_of_the_rule_step_by_step(seed):
    mask = torch.zeros(2, 32, 32)
    mask[0, 3:9, 20:] = 1
    mask[1, 17, 2] = 1
    groups = region_groups(mask, (8, 8), num_reference=64)
    policy = RegionPolicy(0.2, seed=seed, rings=2)
    policy.prepare(groups, [0, 4, 5, 9], 12)
    expected = online(policy, groups, [0, 4, 5, 9], 12)
    assert policy.picks.keys() == expected.keys() == {1, 2, 3, 6, 7, 8, 10, 11}
    assert all(torch.equal(policy.select(step), picks) for step, picks in expected.items())
    assert not torch.equal(policy.select(1), policy.select(2))


def test_what_a_token_was_computed_as_is_kept_until_the_next_anchor():
    policy = RegionPolicy(0.2, grid=GRID)
    forecast, fresh = torch.zeros(1, 32, 2), torch.ones(1, 3, 2)
    policy.merge(forecast, fresh, torch.tensor([[0, 1, 2]]))
    later = policy.merge(forecast + 0.25, 2 * fresh, torch.tensor([[2, 3, 4]]))
    assert later[0, :6, 0].tolist() == [1.25, 1.25, 2.0, 2.0, 2.0, 0.25]
    policy.observe(torch.zeros(1, 32, 2))
    after = policy.merge(forecast, fresh, torch.tensor([[5, 6, 7]]))
    assert after[0, :8, 0].tolist() == [0.0] * 5 + [1.0] * 3


def test_all_tokens_with_the_true_attention_are_the_full_step():
    oracle = Oracle("flux")
    policy = RegionPolicy(1.0)
    policy.prepare(region_groups(torch.ones(2, 16, 16), GRID), [0], 3)
    selected = policy.select(1)
    rough = torch.zeros_like(oracle.hidden)
    output = oracle(selected, lambda fresh: policy.merge(rough, fresh, selected))
    torch.testing.assert_close(output, oracle.output, rtol=1e-3, atol=1e-3)


def test_the_policy_computes_tokens_of_an_editing_model(pipe):
    full = drawn(pipe)
    with forecasting(pipe, Reuse(), ANCHORS, tap="hidden"):
        reused = drawn(pipe)
    with forecasting(pipe, Reuse(), ANCHORS, tokens=RegionPolicy(0.3), groups=corner()) as attached:
        region = drawn(pipe)
        assert torch.equal(drawn(pipe), region)
    assert attached.report().partials == [1, 3, 5]
    inside = corner()[0, :PICTURE] == 0
    assert (region - full)[0, inside].norm() != (reused - full)[0, inside].norm()


@pytest.mark.fault
def test_a_region_policy_without_a_region_is_refused(pipe):
    with pytest.raises(ValueError, match="RegionPolicy goes by the token groups edit, near, keep"):
        with forecasting(pipe, Reuse(), ANCHORS, tokens=RegionPolicy()):
            pass
    kept = corner().clamp_min(2)
    with pytest.raises(ValueError, match="no token of the group 'edit'"):
        with forecasting(pipe, Reuse(), ANCHORS, tokens=RegionPolicy(), groups=kept):
            drawn(pipe)
    with pytest.raises(ValueError, match="has 16 tokens, found the grid 3 x 4"):
        policy = RegionPolicy(grid=(3, 4))
        with forecasting(pipe, Reuse(), ANCHORS, tokens=policy, groups=corner()):
            drawn(pipe)
    for wrong in ({"ratio": 0.0}, {"rings": -1}, {"interval": 0}, {"decay": 1.5}, {"boost": -1.0}):
        with pytest.raises(ValueError, match="expected"):
            RegionPolicy(**wrong)


def test_spot_edit_leads_unedited_tokens_to_the_source_and_forecasts_the_others():
    groups = torch.tensor([[0, 1, 2, 2, 3, 3, 3, 3]])
    feature, x_t = torch.randn(1, 8, 3), torch.randn(1, 8, 3)
    history = History()
    history.push(Step(0, 1.0, 4), feature)
    found = SpotEdit()(history, Step(1, 0.8, 4, x_t=x_t, groups=groups))
    assert torch.equal(found[:, :2], feature[:, :2])
    torch.testing.assert_close(found[:, 2:4], (x_t[:, 2:4] - x_t[:, 6:]) / 0.8)
    x = x_t[:, 2:4] - 0.8 * found[:, 2:4]  # one Euler step to the end
    torch.testing.assert_close(x, x_t[:, 6:])
    with pytest.raises(ValueError, match="second half of the network's input; found .*no tensor"):
        SpotEdit()(history, Step(1, 0.8, 4, groups=groups))


def test_spot_edit_ends_at_the_source_where_nothing_is_edited_whatever_the_noise(pipe):
    with forecasting(pipe, SpotEdit(Taylor(1)), [0, 1], groups=corner()) as attached:
        one, other = (drawn(pipe, generator=seeded(seed)) for seed in (3, 4))
    assert attached.report().anchors == [0, 1]
    kept = corner()[0, :PICTURE] == 2
    torch.testing.assert_close(one[0, kept], other[0, kept], rtol=1e-3, atol=1e-4)
    assert (one[0, ~kept] - other[0, ~kept]).abs().amin(-1).min() > 1e-3
