"""Grams alone give the error an Euler run piles up, the anchors that keep it small, and a verdict.

Shapes: n trajectories, S sampling steps, M feature values.
"""

import itertools
import json
import math
import re

import pytest
import torch
from recording_cases import small_header
from row_cases import errors_of, tabulate
from torch import Tensor

from foreseer.cli import main
from foreseer.evaluation.offline import (
    LEARNED,
    OfflineRow,
    Remembered,
    TapGrams,
    offline_rows,
    verdict,
)
from foreseer.evaluation.search import beam_search
from foreseer.predictors.base import History, Step
from foreseer.predictors.rules import RULES
from foreseer.trajectories.gram import accumulated_error, gram, spread
from foreseer.trajectories.recording import RecordingWriter

SIGMAS = [1.0, 0.95, 0.85, 0.8, 0.7, 0.55, 0.4, 0.3, 0.15, 0.1]
ANCHORS = (0, 1, 3, 6)
RUN_STEPS = 8


def smooth(num: int, num_steps: int = len(SIGMAS), branches: int = 2) -> Tensor:
    """Features (num, branches, S, M): cubics in the step with random coefficients."""
    random = torch.Generator().manual_seed(7)
    time = torch.linspace(0, 1, num_steps, dtype=torch.float64)[:, None]
    powers = time ** torch.arange(4)
    return powers @ torch.randn(num, branches, 4, 6, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("name", ["reuse", "taylor_2", "newton_2", "hicache_2"])
def test_the_accumulated_error_is_that_of_a_real_euler_run_on_fixed_features(name):
    features = smooth(1)[0, 0]
    rule = RULES[name]
    history = History(rule.window)
    grid = [*SIGMAS, 0.0]
    true_x = run_x = torch.zeros(6, dtype=torch.float64)
    errors = []
    for t, feature in enumerate(features):
        step = Step(t, SIGMAS[t], len(SIGMAS))
        used = feature if t in ANCHORS else rule(history, step)
        if t in ANCHORS:
            history.push(step, feature)
        true_x = true_x + (grid[t + 1] - grid[t]) * feature
        run_x = run_x + (grid[t + 1] - grid[t]) * used
        errors.append(float((run_x - true_x).norm()))
    rows = tabulate(rule, ANCHORS, SIGMAS)
    found = accumulated_error(gram(features), rows, SIGMAS)
    assert errors[-1] > 0.01
    torch.testing.assert_close(found, torch.tensor(errors, dtype=torch.float64), atol=1e-10, rtol=0)


def test_a_run_that_evaluates_every_step_has_no_error():
    grams = gram(smooth(3))
    every = tuple(range(len(SIGMAS)))
    for rule in RULES.values():
        rows = tabulate(rule, every, SIGMAS)
        assert accumulated_error(grams, rows, SIGMAS).max() == 0
        assert errors_of(grams, rows).max() == 0


def test_taylor_1_is_exact_on_a_feature_that_moves_in_a_line():
    start, velocity = smooth(2, 2)[:, :, :, None].unbind(2)
    features = start + velocity * torch.arange(10.0).double()[:, None]
    rows = tabulate(RULES["taylor_1"], ANCHORS, SIGMAS)
    # The root of float64 rounding on squares of the feature's size, about 1e-8 of it.
    assert accumulated_error(gram(features), rows, SIGMAS).max() < 1e-6
    assert (
        accumulated_error(gram(features), tabulate(RULES["reuse"], ANCHORS, SIGMAS), SIGMAS)[
            ..., -1
        ].min()
        > 0.01
    )


def test_errors_of_all_steps_are_the_error_of_each_step():
    grams, rows = gram(smooth(2)), tabulate(RULES["taylor_2"], ANCHORS, SIGMAS)
    found = errors_of(grams, rows)
    for t in (2, 5, 9):
        c = torch.eye(len(rows), dtype=torch.float64)[t] - rows[t]
        direct = torch.einsum("s,...st,t->...", c, grams, c).clamp_min(0) / grams[..., t, t]
        torch.testing.assert_close(found[..., t], direct.sqrt())


def test_the_spread_leaves_out_what_never_changes():
    features = torch.tensor([[0.0, 5.0], [2.0, 5.0]]).double()
    assert spread(gram(features)) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["reuse", "taylor_1", "newton_2"])
def test_a_wide_beam_finds_the_list_that_trying_all_of_them_finds(name):
    grams, rule = gram(smooth(3)), RULES[name]

    def error(anchors: tuple[int, ...]) -> float:
        found = accumulated_error(grams, tabulate(rule, anchors, SIGMAS), SIGMAS)
        return float(found.square().mean())

    lists = [(0, *rest) for rest in itertools.combinations(range(1, len(SIGMAS)), 3)]
    found = beam_search(grams, SIGMAS, 4, rule, width=800, max_gap=len(SIGMAS))
    assert error(found[0]) == pytest.approx(min(map(error, lists)), rel=1e-9)
    assert [error(a) for a in found[:5]] == pytest.approx(sorted(map(error, lists))[:5], rel=1e-9)


def test_a_short_reach_gives_the_same_costs_as_a_long_one():
    grams, rule = gram(smooth(3)), RULES["taylor_2"]
    near = beam_search(grams, SIGMAS, 5, rule, width=800, max_gap=3)
    far = beam_search(grams, SIGMAS, 5, rule, width=800, max_gap=len(SIGMAS))
    gaps = [max(b - a for a, b in itertools.pairwise(anchors)) for anchors in far]
    assert near[0] == next(a for a, gap in zip(far, gaps, strict=True) if gap <= 3)


def test_the_fit_sees_even_trajectories_and_the_errors_come_from_odd_ones():
    grams = gram(smooth(6))
    changed_odd, changed_even = grams.clone(), grams.clone()
    changed_odd[1::2] = gram(smooth(6).flip(2))[1::2]
    changed_even[::2] = gram(smooth(6).flip(2))[::2]
    whole, odd, even = (TapGrams("output", g, SIGMAS) for g in (grams, changed_odd, changed_even))
    assert torch.equal(whole.rows(LEARNED, ANCHORS), odd.rows(LEARNED, ANCHORS))
    assert not torch.equal(whole.rows(LEARNED, ANCHORS), even.rows(LEARNED, ANCHORS))
    measured = [g.measure("taylor_1", "uniform", ANCHORS) for g in (whole, odd, even)]
    assert measured[0] == measured[2] != measured[1]


def test_errors_do_not_depend_on_the_unit_of_the_feature():
    small, large = (TapGrams("output", g, SIGMAS) for g in (gram(smooth(4)), 1e4 * gram(smooth(4))))
    found = [g.measure("taylor_1", "uniform", ANCHORS) for g in (small, large)]
    for name in ("open_loop_error", "integrated_error", "accumulated_error"):
        assert getattr(found[0], name) == pytest.approx(getattr(found[1], name))


def test_every_rule_is_measured_on_its_own_list_and_on_the_uniform_one():
    rules = {name: Remembered(rule) for name, rule in RULES.items()}
    rows = offline_rows(TapGrams("output", gram(smooth(6)), SIGMAS), rules, 4)
    assert [(row.method, row.anchors_name) for row in rows] == [
        (method, name) for method in [*RULES, LEARNED] for name in ("searched", "uniform")
    ]
    assert {row.anchors for row in rows if row.anchors_name == "uniform"} == {(0, 2, 5, 8)}


def test_no_searched_list_is_worse_on_the_fitted_half_than_the_uniform_one():
    grams = TapGrams("output", gram(smooth(6)), SIGMAS)
    rows = offline_rows(grams, RULES, 4)
    for searched, even in zip(rows[::2], rows[1::2], strict=True):
        lists = [even.anchors, searched.anchors]
        assert grams.best(searched.method, lists) == searched.anchors or (
            searched.anchors == even.anchors
        )


def test_a_remembered_rule_is_the_rule():
    for rule in RULES.values():
        remembered = Remembered(rule)
        for _ in range(2):
            table = tabulate(remembered, ANCHORS, SIGMAS)
            assert torch.equal(table, tabulate(rule, ANCHORS, SIGMAS))


def row(method: str, num_anchors: int, decibels: float, tap: str = "output") -> OfflineRow:
    error = 10 ** (-decibels / 20)
    anchors = tuple(range(num_anchors))
    return OfflineRow(tap, num_anchors, method, "searched", anchors, error, error, error)


def compared(gains: dict[int, float]) -> str:
    """The verdict when the learned rows gain this many dB over Taylor, the best formula."""
    rows = []
    for n, gain in gains.items():
        rows += [row("reuse", n, 10), row("taylor_2", n, 20, "hidden"), row(LEARNED, n, 20 + gain)]
    return verdict(rows, num_held_out=32)


def test_a_verdict_of_gains_asks_for_a_benchmark():
    line = compared({8: 1.5, 6: 2.0})
    assert line.startswith("offline estimate (32 held-out trajectories): learned against the best")
    assert "at 8 evaluations l2p_lstsq (output) gains 1.5 dB over taylor_2 (hidden)" in line
    assert line.endswith("confirm with `foreseer bench` before use.")
    assert "\n" not in line and "do not use" not in line


def test_a_verdict_of_losses_names_the_way_out():
    line = compared({8: -5.0, 6: -6.0})
    assert "at 6 evaluations l2p_lstsq (output) loses 6.0 dB to taylor_2 (hidden)" in line
    assert line.endswith("do not use it as it is: take the formula, or fit closed loop.")


@pytest.mark.parametrize(
    ("gains", "advice"),
    [
        ({11: 3.0, 8: 0.2, 6: -5.0}, "do not use it below 8: take the formula there"),
        ({11: -6.0, 8: 1.2, 6: -5.0}, "do not use it at 11 or 6: take the formula there"),
        ({11: -0.9, 8: 0.9}, "no reason to learn by this estimate; `foreseer bench` decides."),
    ],
)
def test_a_mixed_verdict_names_the_budgets_that_lose(gains, advice):
    assert advice in compared(gains)


def test_a_gap_that_small_gaps_do_not_order_is_called_neither():
    assert "at 8 evaluations l2p_lstsq (output) is not told apart (-0.9 dB) from" in compared(
        {8: -0.9}
    )


def test_an_estimated_loss_that_closed_loop_runs_did_not_show_is_called_neither():
    line = compared({8: -4.0, 6: -2.0})
    assert "is not told apart (-4.0 dB) from" in line
    assert line.endswith("no reason to learn by this estimate; `foreseer bench` decides.")


def test_two_exact_methods_are_not_told_apart():
    rows = [row("taylor_1", 4, math.inf), row(LEARNED, 4, math.inf)]
    assert "is not told apart (+0.0 dB) from taylor_1" in verdict(rows, 3)


def recorded(folder, num: int, taps: tuple[str, ...] = ("output", "hidden"), **changes):
    """A folder with `num` trajectories of smooth features."""
    sigmas = [1 - step / RUN_STEPS for step in range(RUN_STEPS)]
    header = small_header(
        taps=list(taps),
        sigmas=sigmas,
        features="none",
        states=False,
        host={"class": "Tiny", "parameters": 4},
        scheduler={"class": "FlowMatchEulerDiscreteScheduler", "guidance_scale": 3.0},
        **changes,
    )
    grams = gram(smooth(max(1, num), RUN_STEPS))
    with RecordingWriter(folder, header, rank=0) as writer:
        for item in range(num):
            content = {f"gram/{tap}": grams[item].clone() for tap in taps}
            writer.write(item, content, {"seed": item, "prompt": "cat"})
    return folder


def test_inspect_prints_tables_anchors_and_verdict_and_writes_them(tmp_path, capsys):
    folder = recorded(tmp_path / "r", 6)
    main(["inspect", str(folder), "--budgets", "5,3"])
    printed = capsys.readouterr().out
    assert "tap output" in printed and "tap hidden" in printed
    assert re.search(r"3 evaluations: uniform +0 3 5", printed)
    content = json.loads((folder / "plots" / "offline.json").read_text())
    assert content["verdict"] in printed.splitlines() and content["num_held_out"] == 3
    assert len(content["rows"]) == 2 * 2 * 2 * (len(RULES) + 1)
    assert set(content["units"]) < set(content["rows"][0])
    assert list(content["rows"][0])[:5] == [
        "tap",
        "num_anchors",
        "method",
        "anchors_name",
        "anchors",
    ]
    for name in ("rules", "errors_1", "anchors", "unexplained"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_single_trajectory_compares_formulas_only(tmp_path, capsys):
    folder = recorded(tmp_path / "r", 1)
    main(["inspect", str(folder), "--budgets", "[4]"])
    assert "nothing learned was compared" in capsys.readouterr().out
    rows = json.loads((folder / "plots" / "offline.json").read_text())["rows"]
    assert {found["method"] for found in rows} == set(RULES)


def test_a_recording_without_a_finished_trajectory_says_so(tmp_path, capsys):
    main(["inspect", str(recorded(tmp_path / "r", 0))])
    assert (
        "no trajectory is finished, so there is nothing to measure yet" in capsys.readouterr().out
    )
    assert not (tmp_path / "r" / "plots").exists()


def test_a_recording_no_rule_can_forecast_from_says_what_is_missing(tmp_path, capsys):
    main(["inspect", str(recorded(tmp_path / "blocks", 2, ("blocks.0",)))])
    told = capsys.readouterr().out
    assert "found the taps blocks.0" in told
    assert "expected one of the taps output hidden residual and a budget below" in told


@pytest.mark.parametrize("budgets", ["3,0", "[3, 30]", "8"])
def test_a_budget_out_of_range_is_refused_before_anything_is_printed(budgets, tmp_path, capsys):
    folder = recorded(tmp_path / "r", 1)
    with pytest.raises(SystemExit, match=r"do not suit .*expected numbers .* from 1 to \d") as stop:
        main(["inspect", str(folder), "--budgets", budgets])
    assert isinstance(stop.value.code, str) and not (folder / "plots").exists()
    assert capsys.readouterr().out == ""


def test_help_says_that_it_is_an_estimate(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "--help"])
    assert stopped.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--budgets" in out and "an estimate: `foreseer bench` measures" in out
