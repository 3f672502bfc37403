"""DPCache's programme finds the cheapest list there is; BudCache's annealing goes as released."""

import itertools

import pytest
import torch
from row_cases import tabulate

from foreseer.evaluation.published_search import annealed, shortest_path
from foreseer.predictors.rules import RULES
from foreseer.trajectories.gram import gram

SIGMAS = [1 - s / 9 for s in range(9)]


@pytest.mark.parametrize("forced", [1, 3])
@pytest.mark.parametrize("num_anchors", [3, 4, 6])
@pytest.mark.parametrize("name", ["reuse", "taylor_1"])
def test_the_dynamic_programme_finds_the_list_that_trying_all_of_them_finds(
    name, num_anchors, forced
):
    random = torch.Generator().manual_seed(num_anchors)
    grams = gram(torch.randn(2, 2, 9, 5, generator=random).double().cumsum(2))
    rule, first = RULES[name], tuple(range(forced))

    def cost(anchors: tuple[int, ...]) -> float:
        errors = tabulate(rule, anchors, SIGMAS) - torch.eye(9)
        return float((errors @ grams.mean((0, 1)) * errors).sum())

    others = itertools.combinations(range(forced, 9), num_anchors - forced)
    best = min(((*first, *rest) for rest in others), key=cost)
    found = shortest_path(grams, SIGMAS, num_anchors, rule, forced)
    assert found == best and len(found) == num_anchors
    if num_anchors == 3 and forced == 1:
        assert found != (0, 1, 2)


def test_what_the_programme_is_not_exact_for_is_refused():
    grams = gram(torch.ones(1, 1, 9, 2))
    with pytest.raises(ValueError, match=r"Taylor\(.*weighs 3 anchors; expected a rule over at mo"):
        shortest_path(grams, SIGMAS, 4, RULES["taylor_2"])
    with pytest.raises(ValueError, match="weighs all anchors"):
        shortest_path(grams, SIGMAS, 4, RULES["spectrum"])
    for num_anchors, forced in ((2, 3), (4, 0), (10, 3)):
        with pytest.raises(ValueError, match=f"found {forced} forced first steps and num_anchors"):
            shortest_path(grams, SIGMAS, num_anchors, RULES["reuse"], forced)


@pytest.mark.parametrize("target", [(0, 1, 9, 20, 33, 40, 44, 49), (0, 1, 2, 3, 4, 5, 6, 7)])
def test_annealing_climbs_to_the_best_list_and_tries_none_twice(target):
    tried = []

    def evaluate(anchors: tuple[int, ...]) -> float:
        tried.append(anchors)
        return -40 + sum(abs(a - b) for a, b in zip(anchors, target, strict=True)) / 4

    found = annealed(evaluate, 8, 50)
    assert found[0] == (target, -40.0)
    assert [one.error_db for one in found] == sorted(one.error_db for one in found)
    assert len(set(tried)) == len(tried) == len(found) > 100
    assert all(anchors[:2] == (0, 1) and len(anchors) == 8 for anchors in tried)  # a quarter is set
    assert annealed(evaluate, 8, 50) == found
    assert annealed(evaluate, 8, 50, seed=1)[-1] != found[-1]


@pytest.mark.parametrize("num_anchors", [1, 2, 5, 6])
def test_annealing_of_few_steps_tries_the_lists_there_are(num_anchors):
    lists = {one.anchors for one in annealed(lambda anchors: -sum(anchors), num_anchors, 6)}
    assert lists <= {(0, *rest) for rest in itertools.combinations(range(1, 6), num_anchors - 1)}
    assert (0, *range(7 - num_anchors, 6)) in lists
    with pytest.raises(ValueError, match="num_anchors is 7, expected 1 to 6"):
        annealed(lambda anchors: 0.0, 7, 6)
