"""Methods of a benchmark share noise and anchors, and an interruption loses one row."""

import functools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_pipeline
from torch import nn

import foreseer as fs
from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.cli import main
from foreseer.evaluation import benchmark
from foreseer.evaluation.benchmark import compare_methods, rows_predictor, rule_key
from foreseer.evaluation.metrics import paired, psnr
from foreseer.evaluation.page.curves import traced
from foreseer.evaluation.pairing import prompts_of
from foreseer.evaluation.plan import Entry, budgets_of, load_learned, plan
from foreseer.evaluation.results import load_errors, load_meta, load_rows, save_rows
from foreseer.evaluation.runs import ROWS_FILE, RowLog
from foreseer.evaluation.timing import (
    StepFlops,
    attach_overhead,
    first_call,
    forecast_step_ratio,
    run_flops,
    step_flops,
)
from foreseer.integration.pipelines.pipeline_call import pictures
from foreseer.predictors.linear import L2P
from foreseer.predictors.per_part import FreqCa
from foreseer.predictors.rules import RULES, Taylor
from foreseer.trajectories.prompts import Item, class_items, generate_batch

STEPS = 6
SETTINGS = {"guidance_scale": 3.0, "num_inference_steps": STEPS}
ITEMS = class_items(3, 3, first_item=100)
SIGMAS = [1.0, 0.8002, 0.6004, 0.4006, 0.2008, 0.001]  # the scheduler's own for 6 steps
MEASURED = ("seconds_per_image", "forecast_step_ratio")  # differ from run to run


def reuse_rows(pipe, anchors, tap="output", sigmas=SIGMAS):
    weight = L2P(STEPS, anchors, 2).weight
    return rows_predictor(pipe, weight, anchors, tap, sigmas, guidance_scale=3.0)


def test_the_command_in_a_report_names_paths_and_what_was_given_itself():
    given = {"pipeline": tiny_pipeline(), "out": Path("runs/a"), "prompts": None, "settings": {}}
    given |= {"budgets": (3, 4), "predictors": [Path("p"), Taylor(1)]}
    expected = "--pipeline '<PixelDiTPipeline>' --out runs/a --budgets '[3, 4]' --predictors "
    expected += """'["p", "<Taylor>"]'"""
    assert benchmark.command_line(given) == f"foreseer bench {expected}"


def test_torch_has_its_threads_again_after_a_bench(tmp_path, monkeypatch):
    before, seen = torch.get_num_threads(), []

    def end(*given, **settings):
        seen.append(torch.get_num_threads())
        raise ValueError("enough")

    monkeypatch.setattr(benchmark, "compare_methods", end)
    with pytest.raises(ValueError, match="enough"):
        fs.bench(tiny_pipeline(), str(tmp_path), num_samples=1, num_threads=before + 1)
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


@pytest.fixture
def rows_only(monkeypatch):
    """Leave out the figures, which take seconds; the test of the command draws them."""

    def write_rows(rows, meta, images, out, step_errors, weights):
        save_rows(rows, out / "results.json")
        return out / "report.html"

    monkeypatch.setattr(benchmark, "write_report", write_rows)


def run(out, budgets=(3,), pipe=None, **options):
    options = {"methods": ["euler", "reuse"], "batch_size": 2, **options}
    page = compare_methods(pipe or tiny_pipeline(), ITEMS, out, budgets, **options, **SETTINGS)
    return load_rows(page.parent / "results.json")


def quality(row, *without):
    return {k: v for k, v in asdict(row).items() if k not in (*MEASURED, *without)}


@pytest.mark.usefixtures("rows_only")
def test_with_every_step_an_anchor_every_forecast_is_exact(tmp_path):
    pipe = tiny_pipeline()
    methods = ["euler", *RULES]
    learned = {"l2p": reuse_rows(pipe, range(STEPS), "hidden")}
    rows = run(tmp_path, (STEPS,), pipe, methods=methods, predictors=learned)
    assert {(row.method, row.tap) for row in rows} == {
        ("full", "none"),
        ("euler", "none"),
        ("l2p", "hidden"),
        *((name, tap) for name in RULES for tap in ("output", "hidden")),
    }
    for row in rows:
        assert row.psnr_db == math.inf and row.latent_rel_l2 == 0 and row.ssim == 1, row
        assert row.flops_ratio == 1 and row.forecast_step_ratio is None


@pytest.mark.usefixtures("rows_only")
@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_a_learned_predictor_equal_to_reuse_gets_the_row_of_reuse(tap, tmp_path):
    pipe = tiny_pipeline()
    rows = run(tmp_path, pipe=pipe, predictors={"l2p": reuse_rows(pipe, (0, 2, 4), tap)})
    same = {row.method: row for row in rows if row.tap == tap and row.anchors == "0 2 4"}
    own = ("method", "kind", "state_bytes", "flops_ratio", "fit_seconds", "fit_evaluations")
    own += ("rival", "paired_db", "paired_low_db", "paired_high_db", "wins")
    assert quality(same["l2p"], *own) == quality(same["reuse"], *own)
    assert math.isfinite(same["reuse"].psnr_db)
    assert same["l2p"].state_bytes == 3 * same["reuse"].state_bytes
    assert 0 < same["reuse"].forecast_step_ratio < 1


@pytest.mark.usefixtures("rows_only")
def test_euler_at_the_anchors_is_reuse_on_the_output_tap(tmp_path):
    rows = {(row.method, row.tap): row for row in run(tmp_path)}
    euler, reuse = rows["euler", "none"], rows["reuse", "output"]
    assert euler.psnr_db == pytest.approx(reuse.psnr_db, abs=1e-3)
    assert euler.flops_ratio == 0.5 and euler.state_bytes is None
    assert rows["reuse", "hidden"].psnr_db != pytest.approx(reuse.psnr_db, abs=1e-3)


@pytest.mark.usefixtures("rows_only")
def test_an_interrupted_benchmark_resumes_and_ends_with_the_same_rows(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", (3, 2))
    real, calls = benchmark.run_entry, []

    def counting(pipe, entry, *args, **settings):
        calls.append(entry.kind)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(pipe, entry, *args, **settings)

    monkeypatch.setattr(benchmark, "run_entry", counting)
    pipe = tiny_pipeline()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", (3, 2), pipe)
    partial = tmp_path / "cut" / ROWS_FILE
    assert len(partial.read_text().splitlines()) == 3
    with partial.open("a") as file:
        file.write('{"key": "torn')
    calls[:] = ["resumed"] * 10
    rows = run(tmp_path / "cut", (3, 2), pipe)
    assert calls.count("full") == 0
    assert [quality(row) for row in rows] == [quality(row) for row in whole]
    finished = len(calls)
    run(tmp_path / "cut", (3, 2), pipe)
    assert len(calls) == finished  # the runs that are shown are those of bench_curves


@pytest.mark.usefixtures("rows_only")
def test_other_settings_share_no_row(tmp_path):
    pipe = tiny_pipeline()
    run(tmp_path, pipe=pipe)
    before = len(RowLog(tmp_path / ROWS_FILE).rows)
    run(tmp_path, pipe=pipe, batch_size=3)
    assert len(RowLog(tmp_path / ROWS_FILE).rows) == 2 * before
    with torch.no_grad():
        pipe.transformer.proj_out_2.bias.add_(0.01)
    run(tmp_path, pipe=pipe)
    assert len(RowLog(tmp_path / ROWS_FILE).rows) == 3 * before


def test_rivals_run_on_the_lists_of_learned_predictors_and_on_their_own():
    pipe = tiny_pipeline()
    learned = {"l2p@hidden": reuse_rows(pipe, (0, 1, 4), "hidden")}
    searched = {"ab2|none|3": [0, 1, 5], "reuse|hidden|3": [0, 2, 4]}
    entries = plan([3], STEPS, learned, searched, ["ab2", "reuse"])
    found = [(e.method, e.tap, e.anchors_name, e.anchors) for e in entries]
    assert found == [
        ("l2p", "hidden", "searched", (0, 1, 4)),
        ("ab2", "none", "uniform", (0, 2, 4)),
        ("ab2", "none", "searched", (0, 1, 4)),
        ("ab2", "none", "searched", (0, 1, 5)),
        ("reuse", "output", "uniform", (0, 2, 4)),
        ("reuse", "output", "searched", (0, 1, 4)),
        ("reuse", "hidden", "uniform", (0, 2, 4)),
        ("reuse", "hidden", "searched", (0, 1, 4)),
    ]
    names = {e.anchors_name for e in plan([8], 50, {}, {}, ["euler"])}
    assert names == {"uniform", "published", "warped"}


def test_wrong_requests_are_refused_before_anything_runs(tmp_path):
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="unknown methods \\['teacache'\\]"):
        run(tmp_path, methods=["teacache"])
    with pytest.raises(
        ValueError, match=r"budgets are \[7, 3\], expected .* from 1 to 6, the steps"
    ):
        run(tmp_path, (7, 3))
    with pytest.raises(ValueError, match="has 3 anchors, budgets are \\[2\\]"):
        run(tmp_path, (2,), pipe, predictors={"l2p": reuse_rows(pipe, (0, 2, 4))})
    with pytest.raises(ValueError, match="L2P has no spec"):
        run(tmp_path, pipe=pipe, predictors={"l2p": L2P(STEPS, (0, 2, 4), 2)})
    with pytest.raises(PredictorMismatch, match="another host"):
        run(tmp_path, pipe=tiny_pipeline(3), predictors={"l2p": reuse_rows(pipe, (0, 2, 4))})
    shifted = reuse_rows(pipe, (0, 2, 4), sigmas=[0.9 * s for s in SIGMAS])
    with pytest.raises(PredictorMismatch, match="sigma grid differs"):
        run(tmp_path, pipe=pipe, predictors={"l2p": shifted})


@pytest.mark.parametrize("method", ["full", "ab2", "taylor_1"])
def test_what_is_shown_does_not_depend_on_the_batches(method):
    pipe, kinds = tiny_pipeline(), {"full": "full", "ab2": "solver"}
    anchors = tuple(range(STEPS)) if method == "full" else (0, 2, 3)
    entry = Entry(method, kinds.get(method, "formula"), "output", "own", anchors, RULES.get(method))
    whole, states = traced(pipe, entry, SIGMAS, [ITEMS], SETTINGS)
    parts, others = traced(pipe, entry, SIGMAS, [ITEMS[:2], ITEMS[2:]], SETTINGS)
    assert list(states) == list(others) == ([1, 2, 5] if method == "ab2" else list(range(STEPS)))
    torch.testing.assert_close(parts.images, whole.images, atol=1e-5, rtol=0)
    for step, state in states.items():
        torch.testing.assert_close(others[step], state, atol=1e-5, rtol=0)


def test_in_python_predictors_are_taken_as_they_are(tmp_path, rows_only):
    pipe = tiny_pipeline()
    own, options = [reuse_rows(pipe, (0, 2, 4))], {"num_samples": 2, "methods": ["euler"]}
    page = fs.bench(pipe, str(tmp_path), budgets=[3], predictors=own, **options, **SETTINGS)
    rows = load_rows(page.parent / "results.json")
    assert [row.method for row in rows if row.kind == "learned"] == ["l2p"]


def test_the_command_writes_the_report_and_prints_the_verdict(tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    searched = tmp_path / "searched.json"
    effort = {"reuse|output|2": "9 lists tried on 16 samples, 288 network evaluations"}
    searched.write_text(json.dumps({"search": "0", "effort": effort, "reuse|output|2": [0, 1]}))
    words = ["bench", "--pipeline", str(tmp_path / "pipe"), "--out", str(tmp_path / "out")]
    words += ["--budgets", "[3,2]", "--num_samples", "2", "--num_inference_steps", str(STEPS)]
    words += ["--searched", str(searched), "--methods", '["ab2","reuse"]']
    main(words)
    printed = capsys.readouterr().out
    assert "at 3 evaluations use " in printed and "report.html" in printed
    meta = load_meta(tmp_path / "out" / "results.json")
    assert meta.seeds == [10_000, 10_001]
    assert "--budgets '[3, 2]'" in meta.command and "cores" in meta.hardware
    rows = load_rows(tmp_path / "out" / "results.json")
    assert [row.anchors for row in rows if row.anchors_name == "searched"] == ["0 1"]
    assert meta.lists == {"reuse (output) at 2": effort["reuse|output|2"]}
    assert "288 network evaluations" in (tmp_path / "out" / "report.html").read_text()


def test_flops_of_a_run_add_up():
    cost = StepFlops(full=100, base=10, elements=5)
    assert run_flops(cost, (0, 2), 4, window=1) == (240, 400)
    assert run_flops(cost, (0, 2), 4, window=None) == (250, 400)


def test_attention_is_counted_although_the_fused_kernel_is_not():
    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    batch, heads, tokens, channels = 2, 3, 5, 8
    call = ((torch.randn(batch, heads, tokens, channels),), {})
    counted = step_flops(Attention(), call, "output")
    assert counted.full == 4 * batch * heads * tokens**2 * channels
    assert counted.forecast(2) == 4 * batch * heads * tokens * channels


def test_a_forecast_on_the_hidden_tap_costs_the_head_but_not_the_blocks():
    costs = []
    for num_layers in (2, 4):
        pipe = tiny_pipeline(num_layers)
        draw = functools.partial(generate_batch, pipe, ITEMS, **SETTINGS)
        call = first_call(pipe.transformer, draw)
        costs.append(step_flops(pipe.transformer, call, "hidden"))
    assert costs[0].base == costs[1].base > 0
    assert costs[0].full < costs[1].full
    assert costs[0].elements == 2 * len(ITEMS) * 16 * 32  # (guided batch, tokens, channels)


def test_timing_leaves_the_pipeline_as_it_was_and_a_forecast_is_cheaper():
    pipe = tiny_pipeline(6)
    settings = {**SETTINGS, "output_type": "latent"}

    def draw():
        return generate_batch(pipe, ITEMS, **settings).images

    before = draw()
    cost = forecast_step_ratio(pipe, Taylor(1), "output", (0, 2, 4), draw, min_rounds=4)
    assert cost.rounds >= 4 and 0 < cost.ratio < 1
    assert -1 < attach_overhead(pipe, Taylor(1), "hidden", STEPS, draw, rounds=2) < 2
    assert "step" not in vars(pipe.scheduler) and "forward" not in vars(pipe.transformer)
    assert torch.equal(draw(), before)
    with pytest.raises(ValueError, match="no step to forecast"):
        forecast_step_ratio(pipe, Taylor(1), "output", range(STEPS), draw)


def test_a_run_without_the_transformer_is_refused():
    with pytest.raises(ValueError, match="never called"):
        first_call(tiny_pipeline().transformer, lambda: None)


@pytest.mark.usefixtures("rows_only")
def test_a_row_log_keeps_infinity(tmp_path):
    row = replace(run(tmp_path / "a")[0], psnr_db=math.inf)
    RowLog(tmp_path / "log").add("k", row, {"psnr_db": torch.tensor([math.inf, 1.0])})
    found, errors = RowLog(tmp_path / "log").rows["k"]
    assert found == row and errors["psnr_db"].tolist() == [math.inf, 1.0]


@pytest.mark.usefixtures("rows_only")
def test_later_rows_are_paired_with_earlier_ones_without_running_those_again(tmp_path, monkeypatch):
    pipe, real, ran = tiny_pipeline(), benchmark.run_entry, []
    first = run(tmp_path, (3,), pipe)
    assert {row.rival for row in first if row.kind != "full"} == {"euler", "reuse"}

    def counting(pipe, entry, *args, **settings):
        ran.append(entry.method)
        return real(pipe, entry, *args, **settings)

    monkeypatch.setattr(benchmark, "run_entry", counting)
    learned = {"l2p": reuse_rows(pipe, (0, 2, 4))}
    rows = run(tmp_path, (3,), pipe, predictors=learned)
    assert ran == ["l2p"]
    ours = next(row for row in rows if row.method == "l2p")
    best = max((r for r in rows if r.kind in ("solver", "formula")), key=lambda r: r.psnr_db)
    assert ours.rival == best.method
    errors, prompts = load_errors(tmp_path / "results.json")
    psnrs = {row: each["psnr_db"] for row, each in zip(rows, errors, strict=True)}
    gap = paired(psnrs[ours], psnrs[best], prompts)
    assert (ours.paired_db, ours.paired_low_db) == (gap.mean, gap.low)
    assert ours.wins == gap.wins and ours.fit_evaluations is None and best.fit_evaluations == 0
    assert {row.rival for row in rows if row.kind in ("solver", "formula")} == {"l2p"}


@pytest.mark.usefixtures("rows_only")
def test_a_row_without_its_samples_errors_is_measured_again(tmp_path):
    rows = run(tmp_path)
    partial = tmp_path / ROWS_FILE
    lines = [json.loads(line) for line in partial.read_text().splitlines()]
    partial.write_text("".join(f"{json.dumps({k: r[k] for k in ('key', 'row')})}\n" for r in lines))
    assert [quality(row) for row in run(tmp_path)] == [quality(row) for row in rows]


def test_samples_of_one_prompt_are_known_and_classes_count_one_by_one():
    asked = [Item(i, i, {"prompt": text}) for i, text in enumerate("abab")]
    assert prompts_of(asked) == [0, 1, 0, 1]
    assert prompts_of(class_items(4, 2)) == [0, 1, 2, 3]


def test_formulas_of_other_parts_are_not_taken_for_one_another():
    anchors, sigmas = (0, 2, 5), [1 - step / 8 for step in range(8)]
    bands = [FreqCa((2, 2), transform) for transform in ("dct", "fft")]
    tables = [rule.rows(anchors, sigmas) for rule in bands]
    assert torch.equal(*tables)  # and yet they forecast otherwise
    entries = [Entry("freqca", "formula", "hidden", "own", anchors, rule) for rule in bands]
    assert [rule_key(entry, sigmas) for entry in entries] == [None, None]
    names = ("taylor_1", "newton_1", "taylor_2")
    plain = [Entry(name, "formula", "hidden", "own", anchors, RULES[name]) for name in names]
    first, same, other = (rule_key(entry, sigmas) for entry in plain)
    assert first == same != other


@pytest.mark.usefixtures("rows_only")
def test_the_distance_to_a_finer_run_is_measured_where_asked_for(tmp_path):
    pipe = tiny_pipeline()
    rows = run(tmp_path, (3,), pipe, asked=benchmark.Asked(2 * STEPS))
    settings = {**SETTINGS, "output_type": "pt"}
    finer = pictures(generate_batch(pipe, ITEMS, **settings | {"num_inference_steps": 2 * STEPS}))
    own = pictures(generate_batch(pipe, ITEMS, **settings))
    full = next(row for row in rows if row.kind == "full")
    assert full.fine_psnr_db == pytest.approx(float(psnr(own, finer).mean()), abs=0.01)
    assert all(row.fine_psnr_db is not None and row.st_lpips is None for row in rows)
    plain = run(tmp_path, (3,), pipe)  # rows without it are other rows
    assert {row.fine_psnr_db for row in plain} == {None}
    with pytest.raises(ValueError, match="reference_steps is 6, the full run has 6 steps"):
        run(tmp_path, (3,), pipe, asked=benchmark.Asked(STEPS))


def test_predictors_of_several_budgets_in_one_folder_are_all_compared(tmp_path):
    pipe = tiny_pipeline()
    several = {n: reuse_rows(pipe, tuple(range(n))) for n in (3, 2)}
    fs.save(several, str(tmp_path / "both"))
    learned = load_learned([str(tmp_path / "both")])
    assert [len(each.spec.anchors) for each in learned.values()] == [2, 3]
    assert budgets_of(learned) == [2, 3] and budgets_of({}) == [11, 8, 6]
    entries = plan(budgets_of(learned), STEPS, learned, {}, ["euler"])
    own = [(entry.method, len(entry.anchors)) for entry in entries if entry.kind == "learned"]
    assert own == [("both", 3), ("both", 2)]
