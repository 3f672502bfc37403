"""Lists of three kinds from Grams: the dynamic programme against all lists, and what it refuses."""

import itertools

import pytest
import torch

from foreseer.evaluation import kinds_search
from foreseer.evaluation.kinds_search import Kinds, changes, three_kind_lists

SIZE = 6
SIGMAS = [1 - step / SIZE for step in range(SIZE)]


def gram(seed: int, drift: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    steps = drift * torch.randn(SIZE, 20, generator=generator).cumsum(0)
    features = steps + torch.randn(20, generator=generator)
    return (features @ features.T).double()


def told(kinds, deep, output, weights, full_price, shallow_price) -> float:
    """The cost of a list, step by step as the docstring has it."""
    total, full, evaluated, wrong = full_price, 0, 0, 0.0
    for t in range(1, SIZE):
        if t in kinds.shallow:
            evaluated, wrong = t, float(deep[full, t])
            total += shallow_price + weights[t] * wrong
        elif t in kinds.anchors:
            full = evaluated = t
            wrong = 0.0
            total += full_price
        else:
            total += weights[t] * (wrong + float(output[evaluated, t]))
    return float(total)


@pytest.mark.parametrize("price", [1e-4, 1e-2, 0.05, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_no_list_is_cheaper_than_the_one_found(seed, price):
    deep, output = changes(gram(seed, 0.2)), changes(gram(seed + 10, 0.5))
    weights = torch.full((SIZE,), 1 / SIZE, dtype=torch.float64)
    prices = price, 0.2 * price
    found = kinds_search._cheapest(deep, output, weights, *prices)
    every = [
        Kinds(
            (0, *(t for t, kind in enumerate(each, 1) if kind)),
            tuple(t for t, kind in enumerate(each, 1) if kind == 1),
        )
        for each in itertools.product((0, 1, 2), repeat=SIZE - 1)
    ]
    costs = [told(each, deep, output, weights, *prices) for each in every]
    assert told(found, deep, output, weights, *prices) == pytest.approx(min(costs), rel=1e-12)


def test_lists_use_the_budget_and_differ():
    lists = three_kind_lists(gram(0, 0.2), gram(1, 0.5), SIGMAS, 0.2, 3.0)
    assert lists and len(set(lists)) == len(lists)
    for each in lists:
        assert each.anchors[0] == 0 and set(each.shallow) < set(each.anchors)
        assert each.cost(0.2) <= 3.0
    assert lists[0].cost(0.2) == max(each.cost(0.2) for each in lists)


def test_changes_are_relative_distances():
    features = torch.tensor([[3.0, 0.0], [0.0, 4.0]]).double()
    assert changes(features @ features.T).tolist() == [[0.0, 25 / 16], [25 / 9, 0.0]]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"share": 1.0}, "share in"),
        ({"budget": 1.0}, "budget of a full and a shallow step"),
        ({"sigmas": SIGMAS[:-1]}, "expected one recording's"),
        ({"deep": torch.zeros(SIZE, SIZE)}, "zero at a step"),
    ],
)
def test_numbers_that_make_no_list_are_refused(given, words):
    asked = {"deep": gram(0, 0.2), "output": gram(1, 0.5), "sigmas": SIGMAS}
    asked |= {"share": 0.2, "budget": 3.0} | given
    with pytest.raises(ValueError, match=words):
        three_kind_lists(**asked)
