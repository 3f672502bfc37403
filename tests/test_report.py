"""Benchmark rows survive their files, gaps compare equals, and the report is complete."""

import csv
import json
import math
import re
from dataclasses import asdict, replace

import pytest
import torch

from foreseer.evaluation.advice import advice, best_rows, gaps
from foreseer.evaluation.page.html import anchor_lists, write_report
from foreseer.evaluation.page.sheet import GAP, MARGIN, SHRUNK, against
from foreseer.evaluation.page.table import markdown, markdown_table, save_csv, short_table
from foreseer.evaluation.pairing import with_rivals
from foreseer.evaluation.results import (
    BenchMeta,
    BenchRow,
    load_errors,
    load_meta,
    load_rows,
    save_errors,
    save_meta,
    save_rows,
)
from foreseer.predictors.linear import L2P

LISTS = {8: "0 1 2 4 10 20 31 41", 6: "0 1 4 11 24 38", 2: "0 9"}
META = BenchMeta({"torch": "2.13.0"}, [7, 8], "one <CPU>", "foreseer bench", "2026-01-02", "abc")


def row(method="ab2", kind="solver", psnr_db=30.0, num_anchors=8, **changes):
    values = {
        "tap": "none" if kind in ("solver", "full") else "output",
        "anchors_name": "published",
        "anchors": LISTS[num_anchors],
        "guidance_scale": 3.0,
        "psnr_median": psnr_db,
        "psnr_q10": psnr_db - 3,
        "psnr_q90": psnr_db + 3,
        "psnr_ci_low": psnr_db - 1,
        "psnr_ci_high": psnr_db + 1,
        "ssim": 0.9,
        "latent_rel_l2": 0.1,
        "forecast_step_ratio": None,
        "state_bytes": 2048,
        "fit_seconds": 0.0,
        "num_trajectories": 0,
        "flops_ratio": 0.16,
        "num_samples": 2,
        "seconds_per_image": 0.25,
    }
    return BenchRow(method, kind, num_anchors=num_anchors, psnr_db=psnr_db, **{**values, **changes})


@pytest.fixture
def rows():
    return [
        row("euler", psnr_db=25.0),
        row("ab2", psnr_db=30.0),
        row("ab2", psnr_db=31.0, anchors_name="searched", anchors="0 1 3 6 12 21 32 43"),
        row("taylor_1", "formula", 29.0),
        row("l2p_closed_loop", "learned", 35.0),
        row("l2p_closed_loop", "learned", 33.5, tap="hidden"),
        row("l2p_closed_loop", "learned", 20.0, 6),
        row("ab2", psnr_db=24.0, num_anchors=6),
        row("l2p_closed_loop", "learned", 50.0, 6, guidance_scale=1.0),
        row("full", "full", math.inf, 2, anchors_name="all"),
    ]


def test_rows_and_their_origin_round_trip_through_files(rows, tmp_path):
    path = tmp_path / "results.json"
    save_rows(rows, path)
    save_meta(META, path)
    assert load_rows(path) == rows
    assert load_meta(path) == META
    assert (tmp_path / "results.meta.json").exists()


def test_infinity_is_written_as_null_with_a_flag(rows, tmp_path):
    save_rows(rows, tmp_path / "results.json")
    text = (tmp_path / "results.json").read_text()
    full = json.loads(text)[-1]
    assert "Infinity" not in text
    assert full["psnr_db"] is None and "psnr_db" in full["infinite"].split()
    assert "infinite" not in json.loads(text)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 1.0}, "unknown keys: speed"),
        ({"ssim": ...}, "missing keys: ssim"),
        ({"psnr_db": None}, "psnr_db must be float"),
        ({"psnr_db": "30"}, "psnr_db must be float"),
        ({"num_anchors": 7}, "7 ascending step"),
        ({"anchors": "0 1 2 4 10 20 31 31"}, "ascending step"),
        ({"anchors": "0,1"}, "separated by spaces"),
        ({"kind": "magic"}, "expected one of solver"),
        ({"infinite": "ssim"}, "must be null"),
    ],
)
def test_malformed_rows_are_refused_with_the_reason(change, message, tmp_path):
    record = {**asdict(row()), **change}
    record = {key: value for key, value in record.items() if value is not ...}
    path = tmp_path / "results.json"
    path.write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=message):
        load_rows(path)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="ab2: ssim is nan"):
        row(ssim=math.nan)


def test_the_best_anchor_list_stands_for_each_method_and_tap(rows):
    best = {
        (r.method, r.tap): r.psnr_db
        for r in best_rows(rows, "method", "tap")
        if (r.num_anchors, r.guidance_scale) == (8, 3.0)
    }
    assert list(best.items()) == [
        (("l2p_closed_loop", "output"), 35.0),
        (("l2p_closed_loop", "hidden"), 33.5),
        (("ab2", "none"), 31.0),
        (("taylor_1", "output"), 29.0),
        (("euler", "none"), 25.0),
    ]


def test_gaps_compare_only_equal_evaluations_and_guidance_and_may_be_negative(rows):
    found = [(g.learned.guidance_scale, g.learned.num_anchors, g.psnr_db) for g in gaps(rows)]
    assert found == [(3.0, 8, 4.0), (3.0, 6, -4.0)]  # guidance 1 has no rival, the full run is none


def errors(*values):
    return {"psnr_db": torch.tensor(values, dtype=torch.float64)}


def test_rivals_are_the_best_of_the_other_side_and_wins_add_up(rows):
    spread = [*range(16)]
    noise = {r.method: errors(*(r.psnr_db + 8 * ((i * 7) % 5) for i in spread)) for r in rows}
    found = with_rivals(rows, [noise[r.method] for r in rows], spread)
    rivals = [(r.num_anchors, r.guidance_scale, r.method, r.rival) for r in found]
    assert rivals == [
        (8, 3.0, "euler", "l2p_closed_loop"),
        (8, 3.0, "ab2", "l2p_closed_loop"),
        (8, 3.0, "ab2", "l2p_closed_loop"),
        (8, 3.0, "taylor_1", "l2p_closed_loop"),
        (8, 3.0, "l2p_closed_loop", "ab2"),
        (8, 3.0, "l2p_closed_loop", "ab2"),
        (6, 3.0, "l2p_closed_loop", "ab2"),
        (6, 3.0, "ab2", "l2p_closed_loop"),
        (6, 1.0, "l2p_closed_loop", None),  # at guidance 1 there is no rival, the full run is none
        (2, 3.0, "full", None),
    ]
    pair = [row("a", "learned"), row("b")]
    values = [errors(1, 2, 3, 4, 5), errors(2, 1, 3, 1, 1)]
    ours, other = with_rivals(pair, values, range(5))
    assert (ours.wins, other.wins) == (3, 1)  # and one sample on which they are equal
    assert ours.paired_db == pytest.approx(-other.paired_db)
    assert ours.paired_low_db == pytest.approx(-other.paired_high_db, abs=0.05)
    alone = with_rivals([row("a"), row("b")], values, range(5))
    assert [each.rival for each in alone] == ["b", "a"]  # of formulas alone, the best other one


def judged(mine, other, **changes):
    """A learned row and a formula's with these errors of their samples."""
    pair = [
        row(name, kind, sum(values) / len(values), num_samples=len(values), **changes)
        for name, kind, values in (("readout_8", "learned", mine), ("taylor_2", "formula", other))
    ]
    return with_rivals(pair, [errors(*mine), errors(*other)], range(len(mine)))


HARD = [20 + 0.7 * ((7 * i) % 32) for i in range(32)]  # samples differ far more than methods


def test_the_word_follows_the_paired_interval_and_not_those_of_the_means():
    ahead = judged([db + 0.5 + 0.2 * (i % 3) for i, db in enumerate(HARD)], HARD)
    mean = sum(HARD) / 32
    apart = [replace(r, psnr_ci_low=r.psnr_db - 2, psnr_ci_high=r.psnr_db + 2) for r in ahead]
    assert apart[0].psnr_ci_low < apart[1].psnr_ci_high  # the intervals of the means overlap
    assert [r.standing for r in apart] == ["ahead", "behind"] and ahead[0].wins == 32
    assert gaps(apart)[0].sentence().endswith("; ahead, paired +0.6 to +0.7, ahead on 32 of 32)")
    told = advice([*apart, row("full", "full", math.inf, 2, anchors_name="all")])
    assert told == [
        f"at 8 evaluations use readout_8: {mean + 0.69:.1f} dB, 0.25 s per image, 1.0 x faster; "
        "0.7 dB ahead of taylor_2 (paired 0.6 to 0.7)."
    ]
    behind = advice(judged([db - 0.5 - 0.2 * (i % 3) for i, db in enumerate(HARD)], HARD))
    assert "use taylor_2" in behind[0] and "0.7 dB ahead of readout_8 (paired 0.6 to" in behind[0]


def test_of_two_that_are_level_the_cheaper_is_to_be_used():
    close = [db + (-1) ** i for i, db in enumerate(HARD)]
    same = advice(judged(close, HARD))[0]
    assert "use taylor_2" in same and "level with readout_8" in same and "needs no fit" in same
    mine, other = judged(close, HARD)
    quicker = advice([replace(mine, seconds_per_image=0.2), other])[0]
    assert "use readout_8" in quicker and "and faster: 0.20 s against 0.25" in quicker


def test_overall_the_fewest_evaluations_that_reach_thirty_decibels_are_advised(rows):
    told = [line for line in advice(rows) if line.startswith("overall")]
    assert told == [
        "overall at guidance 3 use l2p_closed_loop at 8 evaluations, the fewest with 30 dB or "
        "more: 35.0 dB, 0.25 s per image, 1.0 x faster."
    ]
    fewer = [replace(each, psnr_db=each.psnr_db - 10) for each in rows[:8]]
    assert "overall nothing reaches 30 dB; nearest is l2p_closed_loop at 8" in advice(fewer)[-1]


def test_rows_of_before_pairing_still_read_and_say_so(rows, tmp_path):
    later = ("rival", "paired_db", "paired_low_db", "paired_high_db", "wins")
    later += ("fit_evaluations", "st_lpips", "fine_psnr_db")
    old = [{k: v for k, v in asdict(each).items() if k not in later} for each in rows[:-1]]
    (tmp_path / "results.json").write_text(json.dumps(old))
    assert load_rows(tmp_path / "results.json") == rows[:-1]
    assert "not paired" in gaps(rows)[0].sentence()
    assert "not paired with any other" in advice(rows)[0] or "not paired" in " ".join(advice(rows))


def test_errors_of_samples_lie_beside_the_rows_and_can_be_paired_later(tmp_path):
    made = [errors(1.5, math.inf), errors(2.25, 3.0) | {"ssim": torch.tensor([0.5, 1.0])}]
    save_errors(made, [4, 4], tmp_path / "results.json")
    found, prompts = load_errors(tmp_path / "results.json")
    assert (tmp_path / "results.samples.json").exists() and prompts == [4, 4]
    for one, other in zip(found, made, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name].double()) for name in one)


def test_markdown_holds_one_block_per_budget_ordered_by_psnr(rows):
    text = markdown_table(rows)
    assert re.findall(r"^### (.*)$", text, re.M) == [
        "6 evaluations, guidance 1",
        "8 evaluations, guidance 3",
        "6 evaluations, guidance 3",
    ]
    block = text.split("### ")[2]
    values = [float(value) for value in re.findall(r"\| (\d+\.\d+) \[", block)]
    assert values == sorted(values, reverse=True) and len(values) == 5
    assert "searched: 0 1 3 6 12 21 32 43" in block and "| 30.00 [" not in block
    assert "+4.00 dB" in block and "-4.00 dB" in text
    assert "no untrained method" in text.split("### ")[1]


def test_what_was_asked_for_has_columns_and_the_full_run_its_own_distance(rows):
    assert "ST-LPIPS" not in markdown(rows) and "finer" not in markdown(rows)
    more = [replace(each, st_lpips=0.00064, fine_psnr_db=38.5) for each in rows]
    text = markdown(more)
    assert "| ST-LPIPS | PSNR to the finer run |" in text and "| 0.00064 | 38.50 |" in text
    assert "the full run of 2 steps is itself 38.50 dB from the finer run" in text


def test_the_short_table_lists_rivals_and_the_gap(rows):
    lines = short_table(rows[:-2]).splitlines()
    assert lines[0] == "| PSNR in dB, guidance 3 | 11 evaluations | 8 evaluations | 6 evaluations |"
    assert "| best learned | – | 35.00 (l2p_closed_loop) | 20.00 (l2p_closed_loop) |" in lines
    assert "| `ab2` | – | 31.00 | 24.00 |" in lines
    assert lines[-1].endswith("| – | **+4.00** | **-4.00** |")


def test_csv_holds_every_row(rows, tmp_path):
    save_csv(rows, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    assert read[0]["method"] == "euler" and read[0]["forecast_step_ratio"] == ""
    assert float(read[-1]["psnr_db"]) == math.inf


def test_every_anchor_list_is_shown_once_and_searched_ones_name_their_method(rows):
    other = replace(rows[0], anchors="0 2 4 6 10 20 31 41")
    assert list(anchor_lists([*rows, other])) == [
        "8 published",
        "8 published, list 2",
        "8 searched (ab2)",
        "6 published",
    ]


def test_the_report_is_complete_and_needs_no_network(rows, tmp_path):
    images = {"full run": torch.rand(2, 1, 32, 32), "ab2 <8>": torch.rand(2, 1, 32, 32)}
    errors = {"ab2": [(0, 0.0), (1, 0.1), (2, 0.2)]}
    rule = L2P(4, [0, 2])
    weights = {"ab2, branch 0": (rule.weight[0], rule.anchors)}
    page = write_report(rows, META, images, tmp_path / "out", errors, weights)
    assert {path.name for path in page.parent.iterdir()} == {
        "results.json",
        "results.meta.json",
        "results.csv",
        "results.md",
        "pareto_1.png",
        "pareto_3.png",
        "contact_sheet.png",
        "timeline.png",
        "step_errors.png",
        "weights_1.png",
        "report.html",
    }
    text = page.read_text()
    assert len(re.findall(r'"data:image/png;base64,iVBOR', text)) == 9  # sheet, samples, heat, bar
    outside = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|url\((?!#)|@import|<link|<iframe", outside)
    assert "one &lt;CPU&gt;" in text and "one <CPU>" not in text
    first = advice(rows)[0]
    assert first[0].upper() + first[1:] in text
    assert load_rows(page.parent / "results.json") == rows


def test_a_report_needs_only_rows_and_images(tmp_path):
    images = {"full run": torch.rand(1, 3, 16, 16)}
    page = write_report([row("l2p_lstsq", "learned")], META, images, tmp_path)
    assert page.exists() and not (tmp_path / "step_errors.png").exists()
    with pytest.raises(ValueError, match="at least one benchmark row"):
        write_report([], META, images, tmp_path)


def test_the_contact_sheet_shows_whole_pixels_of_every_sample():
    full = torch.zeros(2, 1, 32, 32)
    full[:, :, 0, 0] = 1
    sheet = against({"full": full, "reuse": full * 0.5})
    side = 4 * 32  # of a sample
    assert sheet.height == 2 * MARGIN + 3 * (side + GAP)  # full, reuse, difference
    left = sheet.width - MARGIN - 2 * side - GAP
    assert left > 2 * MARGIN  # room for labels
    levels = [
        sheet.getpixel((left + x, MARGIN + row * (side + GAP) + y))[0]
        for row, x, y in ((0, 3, 3), (0, 4, 4), (1, 3, 3), (2, 3, 3))
    ]
    assert levels[:2] == [255, 0]  # one pixel became a 4 x 4 square
    assert levels[2] == pytest.approx(127.5, abs=1)
    assert levels[3] == 255  # |difference| 0.5 x 4, clipped


def test_large_samples_are_averaged_down_on_a_contact_sheet():
    sheet = against({"full": torch.rand(1, 3, 512, 256)})
    assert sheet.height == 2 * MARGIN + SHRUNK + GAP


def test_a_contact_sheet_without_the_full_run_is_refused():
    with pytest.raises(ValueError, match="full run"):
        against({})
