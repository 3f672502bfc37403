"""LESA folded onto anchors is its recursion, and without a constant a linear rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lesa_cases import SIGMAS, STEPS, feature_at, history_on, lesa, lesa_values, step_at
from row_cases import tabulate

from foreseer.predictors.base import History
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import Reuse

GATES = ["kan", "mlp", "table"]
ANCHORS = (0, 1, 4, 7)


def stepped(predictor: LesaPredictor, anchors: tuple[int, ...], last: int) -> torch.Tensor:
    """The published recursion with all features kept, forecasts among them."""
    queue: list[torch.Tensor] = []
    for index in range(last + 1):
        if index in anchors:
            queue.append(feature_at(index).double())
        else:
            queue.append(predictor.correct(queue, step_at(index)))
    return queue[-1]


@given(
    anchors=st.sets(st.integers(1, STEPS - 2)),
    bias=st.booleans(),
    gate=st.sampled_from(GATES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_folding_is_the_recursion_through_own_forecasts(anchors, bias, gate, seed):
    predictor = lesa(seed, gate=gate, bias=bias).double()
    steps = (0, *sorted(anchors))
    expected = stepped(predictor, steps, STEPS - 1)
    history = history_on(steps, dtype=torch.float64)
    with torch.no_grad():
        found = predictor(history, step_at(STEPS - 1))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(predictor(history, step_at(STEPS - 1)), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["anchors", "values"])
def test_without_feedback_the_queue_is_the_newest_anchors(kind):
    predictor = lesa_values() if kind == "values" else lesa(feedback=False)
    history = history_on((0, 1, 2, 3, 5, 7), predictor.window)
    assert len(history) == 4
    found = predictor(history, step_at(9))
    assert torch.allclose(found, predictor.correct(history.features, step_at(9)), atol=1e-6)


def test_one_branch_at_a_time_gives_what_both_together_give():
    for predictor in (lesa(), lesa_values()):
        history = history_on((0, 2, 5), predictor.window)
        together = predictor(history, step_at(8))
        for branch, expected in enumerate(together.chunk(2)):
            features = [feature.chunk(2)[branch] for feature in history.features]
            half = History(None, history.steps, history.sigmas, features)
            alone = predictor(half, step_at(8, (branch,)))
            torch.testing.assert_close(alone, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_a_table_in_place_of_the_gate_changes_no_bit(gate):
    predictor = lesa(gate=gate)
    table = predictor.tabulated()
    assert table.gate == "table"
    assert sum(p.numel() for p in table.parameters()) == 2 * (3 * 4 + 3 + STEPS)
    history = history_on(ANCHORS)
    with torch.no_grad():
        assert torch.equal(table(history, step_at(10)), predictor(history, step_at(10)))


@pytest.mark.parametrize("feedback", [True, False])
def test_without_constants_it_is_a_linear_rule(feedback):
    predictor = lesa(bias=False, feedback=feedback)
    linear = L2P(STEPS, ANCHORS, predictor.num_branches)
    linear.set_rows(predictor.rows(ANCHORS, SIGMAS))
    history = History(predictor.window)
    whole = History()
    for index in range(STEPS):
        if index in ANCHORS:
            history.push(step_at(index), feature_at(index))
            whole.push(step_at(index), feature_at(index))
        else:
            with torch.no_grad():
                found = predictor(history, step_at(index))
            assert torch.equal(linear(whole, step_at(index)), found)


def test_at_its_start_its_rows_are_those_of_reuse():
    rows = tabulate(lesa(None, num_branches=1), ANCHORS, SIGMAS)
    expected = tabulate(Reuse(), ANCHORS, SIGMAS)
    forecasts = [t for t in range(STEPS) if t not in ANCHORS]
    assert torch.equal(rows[forecasts], expected[forecasts])


def test_what_is_added_to_the_sum_is_left_out_of_the_rows():
    for predictor in (lesa(bias=True), lesa_values()):
        rows = predictor.rows(ANCHORS, SIGMAS)
        weights = predictor.affine(history_on((0, 1, 4), predictor.window), step_at(6, (0, 1)))[0]
        kept = [0, 1, 4][-len(weights) :]
        torch.testing.assert_close(rows[:, 0, 6, kept].mT, weights.detach())


def test_an_anchor_more_takes_the_place_of_a_forecast():
    predictor = lesa().double()
    expected = stepped(predictor, (0, 1, 4, 6), 8)
    with torch.no_grad():
        predictor(history_on((0, 1, 4), dtype=torch.float64), step_at(5))
        found = predictor(history_on((0, 1, 4, 6), dtype=torch.float64), step_at(8))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
