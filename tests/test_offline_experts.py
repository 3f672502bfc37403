"""Where transformers take turns, anchors and rules begin anew with each of them."""

import itertools
import json
import re

import pytest
import torch
from row_cases import rows_fitted
from test_offline import RUN_STEPS, SIGMAS, recorded, smooth

from foreseer.cli import main
from foreseer.evaluation.offline import LEARNED, Remembered, TapGrams, offline_rows
from foreseer.evaluation.rows import formula_tables
from foreseer.evaluation.search import beam_search, start_lists
from foreseer.evaluation.verdict import Rival, estimate
from foreseer.fit_commands import search
from foreseer.integration.schedule import uniform, warped
from foreseer.predictors.rules import RULES
from foreseer.trajectories.gram import accumulated_error, gram

STARTS = [0, 4]  # of two transformers over ten steps


@pytest.mark.parametrize(
    ("num_anchors", "num_steps", "starts", "expected"),
    [
        (4, 10, [0, 5], (0, 2, 5, 7)),
        (5, 10, [0, 2], (0, 2, 4, 6, 8)),
        (2, 50, [0, 13], (0, 13)),
        (8, 40, [0, 10], (0, 5, 10, 15, 20, 25, 30, 35)),
        (3, 9, [0, 3, 6], (0, 3, 6)),
        (6, 6, [0, 1], (0, 1, 2, 3, 4, 5)),
    ],
)
def test_anchors_are_shared_out_in_proportion_to_the_steps(
    num_anchors, num_steps, starts, expected
):
    assert uniform(num_anchors, num_steps, starts) == expected


def test_of_one_transformer_the_lists_are_what_they_were():
    for gamma in (0.8, 1.0, 1.2, 1.5):
        expected = tuple(round(50 * (i / 8) ** gamma) for i in range(8))
        assert warped(8, 50, gamma) == warped(8, 50, gamma, [0]) == expected


def test_fewer_anchors_than_transformers_are_refused():
    with pytest.raises(ValueError, match=r"found 1 anchor\(s\) for 2 transformer\(s\), expected"):
        uniform(1, 10, STARTS)
    with pytest.raises(ValueError, match=r"num_anchors is 1, expected 2 \(transformers\)"):
        beam_search(gram(smooth(2)), SIGMAS, 1, RULES["reuse"], expert_steps=STARTS)


def test_every_common_list_holds_the_starts_and_none_is_the_published_one():
    for num_anchors in (2, 6, 11):
        lists = start_lists(num_anchors, 50, [0, 13])
        assert lists and {len(one) for one in lists} == {num_anchors}
        assert all({0, 13} <= {*one} for one in lists)


@pytest.mark.parametrize("name", ["reuse", "taylor_2", "newton_2", "foca_recursive"])
@pytest.mark.parametrize(("starts", "num_anchors"), [(STARTS, 4), ([0, 7], 3), ([0, 1, 6], 5)])
def test_a_wide_beam_finds_the_list_that_trying_all_of_them_finds(name, starts, num_anchors):
    grams, rule = gram(smooth(3)), RULES[name]

    def error(anchors: tuple[int, ...]) -> float:
        rows = rule.rows(anchors, SIGMAS, starts)[0, 0]
        return float(accumulated_error(grams, rows, SIGMAS).square().mean())

    lists = [(0, *rest) for rest in itertools.combinations(range(1, 10), num_anchors - 1)]
    allowed = [one for one in lists if {*starts} <= {*one}]
    found = beam_search(grams, SIGMAS, num_anchors, rule, 800, len(SIGMAS), starts)
    assert {*found} <= {*allowed}
    assert error(found[0]) == pytest.approx(min(map(error, allowed)), rel=1e-9)


@pytest.mark.parametrize("starts", [[0, 45], [0, 2], [0, 1, 2], [0, 30, 49], [0, 10, 20, 30, 40]])
def test_the_search_never_ends_without_a_list(starts):
    sigmas = [1 - step / 50 for step in range(50)]
    grams, rule = gram(smooth(2, 50)), Remembered(RULES["reuse"])
    for num_anchors in (len(starts), 2 * len(starts), 2 * len(starts) + 1, 11):
        longest = max(2, round(2.5 * 50 / num_anchors))
        found = beam_search(grams, sigmas, num_anchors, rule, 1, longest, starts)
        assert found and all({*starts} <= {*one} for one in found)
        assert {len(one) for one in found} == {num_anchors}


def test_no_transformer_is_forecast_from_anothers_features():
    grams = TapGrams("output", gram(smooth(6)), SIGMAS, STARTS)
    rules = {name: Remembered(rule) for name, rule in RULES.items()}
    rows = offline_rows(grams, rules, 5)
    for row in rows:
        assert {*STARTS} <= {*row.anchors} and row.num_anchors == len(row.anchors) == 5
        assert not grams.rows(row.method, row.anchors)[:, 4:, :4].any()
    assert {row.anchors for row in rows if row.anchors_name == "uniform"} == {(0, 2, 4, 6, 8)}
    learned = grams.rows(LEARNED, rows[0].anchors)
    assert torch.equal(learned, rows_fitted(grams.fit, rows[0].anchors, expert_steps=STARTS))


def test_inspect_estimates_what_the_verdict_of_a_fit_does():
    grams = TapGrams("output", gram(smooth(6)), SIGMAS, STARTS)
    anchors = (0, 2, 4, 5, 7)
    chunks = [(grams.held[:, :, None], grams.rows(LEARNED, anchors)[:, None])]
    tables = formula_tables(anchors, SIGMAS, STARTS)
    rivals = [Rival(name, anchors, table, 0.0) for name, table in tables.items()]
    told = estimate(chunks, rivals, len(anchors), SIGMAS)
    learned = grams.measure(LEARNED, "uniform", anchors).estimate_db
    assert told.learned_db == pytest.approx(learned, abs=1e-6)
    for name in RULES:
        found = grams.measure(name, "uniform", anchors).estimate_db
        assert told.formulas_db[name] == pytest.approx(found, abs=1e-6)


def test_a_search_in_closed_loop_is_refused_with_what_to_do(tmp_path):
    folder = str(recorded(tmp_path / "r", 2, expert_steps=[0, 3]))
    with pytest.raises(ValueError, match=r"steps \[0, 3\]; lists are tried .*`foreseer inspect`"):
        search(folder, "none", str(tmp_path / "out.json"), [4], ["taylor_1|output"])
    assert not (tmp_path / "out.json").exists()


def test_inspect_of_two_transformers_names_lists_that_hold_both_starts(tmp_path, capsys):
    folder = recorded(tmp_path / "r", 6, expert_steps=[0, 3])
    main(["inspect", str(folder), "--budgets", "[4, 3]"])
    printed = capsys.readouterr().out
    assert re.search(r"^transformers +2, from the steps 0 3 on$", printed, re.MULTILINE)
    assert re.search(r"3 evaluations: uniform +0 3 5", printed)
    rows = json.loads((folder / "plots" / "offline.json").read_text())["rows"]
    assert {row["num_anchors"] for row in rows} == {3, 4}
    assert all({0, 3} <= {*row["anchors"]} for row in rows)
    for wrong in (RUN_STEPS, 1):
        with pytest.raises(SystemExit, match="from 2 to 7"):
            main(["inspect", str(folder), "--budgets", f"[{wrong}]"])
