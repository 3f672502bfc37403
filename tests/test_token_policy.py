"""Clusters, picks and corrections of computed tokens do what their equations say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_hosts import seeded

from foreseer.predictors.tokens import (
    ClusterPolicy,
    RandomPolicy,
    TokenPolicy,
    innovate,
    kmeans,
    take,
)


def separated(num_samples: int = 3, per_cluster: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in four tight groups, shuffled by sample, and their groups."""
    centres = 10 * torch.eye(4, 6)
    groups = torch.arange(4).repeat(per_cluster)
    groups = torch.stack([groups[torch.randperm(len(groups))] for _ in range(num_samples)])
    points = centres[groups] + 0.1 * torch.randn(*groups.shape, 6)
    return points, groups


def same_partition(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two labellings put the same pairs together."""
    return torch.equal(
        first[:, :, None] == first[:, None, :], second[:, :, None] == second[:, None, :]
    )


# -------------------------------------------------------------------------------------- k-means


def test_separated_clusters_are_recovered():
    points, groups = separated()
    labels, centroids = kmeans(points, 4)
    assert same_partition(labels, groups)
    means = torch.stack([points[0][labels[0] == k].mean(0) for k in range(4)])
    torch.testing.assert_close(centroids[0], means, atol=1e-5, rtol=1e-5)


def test_every_sample_is_clustered_as_if_alone():
    points = torch.randn(3, 20, 5)
    together, _ = kmeans(points, 4, 50)
    alone = torch.cat([kmeans(points[i : i + 1], 4, 50)[0] for i in range(3)])
    assert same_partition(together, alone)


def test_the_same_points_give_the_same_bits():
    points = torch.randn(2, 30, 8)
    (first, at), (second, also_at) = kmeans(points, 5), kmeans(points, 5)
    assert torch.equal(first, second) and torch.equal(at, also_at)


def test_a_warm_start_does_not_change_a_converged_answer():
    points = torch.randn(2, 30, 8)
    labels, centroids = kmeans(points, 5, 100)
    again, moved = kmeans(points, 5, 1, centroids)
    assert torch.equal(again, labels)
    torch.testing.assert_close(moved, centroids)


def test_a_warm_start_is_used():
    points, groups = separated()
    start = torch.stack(
        [points[i][[int((groups[i] == k).nonzero()[0]) for k in range(4)]] for i in range(3)]
    )
    labels, _ = kmeans(points, 4, 1, start)
    assert torch.equal(labels, groups)  # numbered as the start is, in one iteration


def test_an_empty_cluster_moves_to_the_worst_represented_point():
    points = torch.tensor([[[0.0], [1.0], [2.0], [50.0]]])
    start = torch.tensor([[[1.0], [-1000.0]]])  # nothing is near the second
    labels, _ = kmeans(points, 2, 10, start)
    assert labels.tolist() == [[0, 0, 0, 1]]


def test_fewer_different_points_than_clusters_leave_clusters_empty_not_wrong():
    points = torch.tensor([[[0.0], [0.0], [0.0], [5.0], [5.0]]])
    labels, centroids = kmeans(points, 4)
    assert same_partition(labels, torch.tensor([[0, 0, 0, 1, 1]]))
    assert torch.equal(take(centroids, labels), points)


def test_no_iteration_makes_the_clusters_worse():
    points = torch.randn(4, 40, 3)
    errors = []
    for iterations in (1, 2, 4, 8, 16):
        labels, _ = kmeans(points, 6, iterations)
        member = torch.nn.functional.one_hot(labels, 6).float()
        means = (member.mT @ points) / member.sum(1).clamp(min=1)[..., None]
        errors.append(float((points - take(means, labels)).square().sum()))
    assert all(later <= earlier + 1e-4 for earlier, later in zip(errors, errors[1:], strict=False))


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="5 clusters of 4 tokens"):
        kmeans(torch.zeros(1, 4, 2), 5)
    with pytest.raises(ValueError, match="at least one iteration"):
        kmeans(torch.zeros(1, 4, 2), 2, 0)


# ------------------------------------------------------------------------------------ innovation


def case(num_selected: int = 2, dtype: torch.dtype = torch.float32) -> tuple:
    """Forecast, fresh rows, picks and labels of 2 samples of 6 tokens in 2 clusters."""
    forecast = torch.randn(2, 6, 3, dtype=dtype, generator=seeded(0))
    fresh = torch.randn(2, num_selected, 3, dtype=dtype, generator=seeded(1))
    selected = torch.tensor([[0, 3], [1, 5]])[:, :num_selected]
    labels = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    return forecast, fresh, selected, labels


def test_the_innovation_form_is_what_a_loop_by_hand_gives():
    forecast, fresh, selected, labels = case()
    expected = forecast.clone()
    for b in range(2):
        for place, token in enumerate(selected[b]):
            innovation = fresh[b, place] - forecast[b, token]
            for i in range(6):
                if labels[b, i] == labels[b, token]:
                    expected[b, i] = forecast[b, i] + 0.3 * innovation
    for b in range(2):
        expected[b, selected[b]] = fresh[b]
    torch.testing.assert_close(innovate(forecast, fresh, selected, labels, 0.3), expected)


def test_gamma_0_changes_the_selected_rows_only():
    forecast, fresh, selected, labels = case()
    before = forecast.clone()
    merged = innovate(forecast, fresh, selected, labels, 0.0)
    assert torch.equal(forecast, before)
    assert torch.equal(take(merged, selected), fresh)
    others = torch.ones(2, 6, dtype=torch.bool).scatter(1, selected, False)
    assert torch.equal(merged[others], forecast[others])


@given(gamma=st.floats(0, 1))
@settings(max_examples=20)
def test_a_forecast_that_is_right_at_the_picks_stays_as_it_is(gamma):
    forecast, _, selected, labels = case()
    merged = innovate(forecast, take(forecast, selected), selected, labels, gamma)
    assert torch.equal(merged, forecast)


def test_gamma_1_moves_a_cluster_by_its_whole_innovation():
    forecast, _, selected, labels = case()
    shift = torch.tensor([1.0, -2.0, 0.5])
    merged = innovate(forecast, take(forecast, selected) + shift, selected, labels, 1.0)
    torch.testing.assert_close(merged, forecast + shift)


def test_clusters_without_a_pick_keep_their_forecast():
    forecast, fresh, selected, labels = case(num_selected=1)  # both picks lie in cluster 0
    merged = innovate(forecast, fresh, selected, labels, 0.5)
    assert torch.equal(merged[labels == 1], forecast[labels == 1])
    assert not torch.equal(merged[0, 1], forecast[0, 1])


def test_the_dtype_of_the_forecast_is_kept():
    assert innovate(*case(dtype=torch.bfloat16), 0.5).dtype == torch.bfloat16


# --------------------------------------------------------------------------------------- policies


def test_every_cluster_gets_one_of_its_own_tokens():
    policy = ClusterPolicy(4)
    points, _ = separated()
    policy.observe(points)
    for step in range(20):
        picked = policy.labels.gather(1, policy.select(step))
        assert picked.sort().values.tolist() == [[0, 1, 2, 3]] * 3


def test_picks_change_with_step_and_seed_and_nothing_else():
    points = torch.randn(4, 40, 3)
    first, same, other = ClusterPolicy(6), ClusterPolicy(6), ClusterPolicy(6, seed=1)
    for policy in (first, same, other):
        policy.observe(points)
    assert torch.equal(first.select(3), same.select(3))
    assert not torch.equal(first.select(3), first.select(4))
    assert not torch.equal(first.select(3), other.select(3))


def test_a_random_member_is_picked_not_always_the_same():
    policy = ClusterPolicy(4)
    points, _ = separated(1)
    policy.observe(points)
    seen = {int(i) for step in range(200) for i in policy.select(step).flatten()}
    assert seen == set(range(points.shape[1]))


@pytest.mark.parametrize("policy", [ClusterPolicy(4), RandomPolicy(4)])
def test_no_token_is_picked_twice_even_where_clusters_are_empty(policy):
    policy.observe(torch.tensor([0.0, 0.0, 0.0, 5.0, 5.0, 5.0]).repeat(2, 1)[..., None])
    for step in range(20):
        picks = policy.select(step)
        assert picks.shape == (2, 4)
        assert (picks.diff(dim=1) > 0).all()
        if isinstance(policy, ClusterPolicy):  # both clusters that have members are among them
            assert all(len(set(row)) == 2 for row in policy.labels.gather(1, picks).tolist())


def test_more_random_tokens_than_there_are_means_all():
    policy = RandomPolicy(100)
    policy.observe(torch.zeros(2, 5, 3))
    assert policy.select(1).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_patterns_count_from_the_anchor():
    assert [RandomPolicy().is_partial(offset) for offset in range(1, 6)] == [1, 0, 1, 0, 1]
    assert all(ClusterPolicy().is_partial(offset) for offset in range(1, 6))


def test_branches_of_a_call_share_labels():
    policy = ClusterPolicy(2, gamma=1.0)
    points, _ = separated(2)
    policy.observe(points)
    selected = policy.select(1)
    forecast = torch.randn(4, 20, 6)
    fresh = torch.randn(4, 2, 6)
    merged = policy.merge(forecast, fresh, selected.repeat(2, 1))
    halves = [
        innovate(f, r, selected, policy.labels, 1.0)
        for f, r in zip(forecast.chunk(2), fresh.chunk(2), strict=True)
    ]
    torch.testing.assert_close(merged, torch.cat(halves))


def test_clusters_start_from_the_anchor_before_until_reset():
    policy, points = ClusterPolicy(5), torch.randn(2, 40, 4)
    policy.observe(points)
    kept = policy.centroids
    policy.observe(points + 1e-4)
    expected, _ = kmeans(points + 1e-4, 5, start=kept)
    assert torch.equal(policy.labels, expected)
    policy.observe(torch.randn(2, 40, 8))  # other channels: another start, no error
    policy.reset()
    assert policy.centroids is None and policy.state_bytes() == 0


def test_bytes_of_labels_and_centroids_are_counted():
    policy = ClusterPolicy(3)
    policy.observe(torch.randn(2, 7, 4))
    assert policy.state_bytes() == 2 * 7 * 8 + 2 * 3 * 4 * 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClusterPolicy(0),
        lambda: ClusterPolicy(4, gamma=1.5),
        lambda: RandomPolicy(0),
        lambda: TokenPolicy(0, ()),
    ],
)
def test_meaningless_settings_are_refused(make):
    with pytest.raises(ValueError, match="expected|empty"):
        make()
