"""The benchmark of the video host goes through on a tiny one, and measures what it says."""

import json
from unittest.mock import Mock

import learned_solvers
import pytest
import torch
import video
import video_page
import video_students
from clips import read_clips, write_clips
from readout_lists import BEGUN
from safetensors.torch import load_file
from student_cases import RANGE, awake
from tiny_video import FRAMES, SIDE, tiny_video_pipeline, write_packages

from foreseer.checkpoints.format import load_predictor
from foreseer.evaluation.plan import Entry
from foreseer.integration.pipelines.average_velocity import conditioner_for
from foreseer.integration.pipelines.student_pipeline import student_of

STEPS = 8
CALL = {"guidance_scale": 2.0, "num_inference_steps": STEPS}


def test_temporal_error_is_of_the_changes_alone():
    reference = torch.rand(2, 3, 1, 4, 4)
    brighter = reference / 2 + 0.25  # every frame off, changes halved
    assert float(video.temporal_psnr(reference + 0.1, reference).min()) > 120  # rounding
    expected = -10 * (reference.diff(dim=1) / 2).square().mean((1, 2, 3, 4)).log10()
    torch.testing.assert_close(video.temporal_psnr(brighter, reference).float(), expected)
    frames = video.frame_psnr(
        torch.tensor([0.1, 0.01]).view(1, 2, 1, 1, 1), torch.zeros(1, 2, 1, 1, 1)
    )
    assert frames.item() == pytest.approx((20 + 40) / 2)


def test_every_second_caption_is_one_that_the_model_never_saw():
    loops = [("cat", "cat"), ("dog face", "dog"), ("tiger", "tiger face")]
    named = [(names, "Animals") for names in (*loops, ("cow", "cow"), ("dog", "hound"))]
    named += [(("hen", "hen"), "Animals"), (("keycap", "keycap"), "Symbols")]
    found = video.calibration(loops[:2], loops, named)
    assert {*found[::2]} == {"cat", "dog face"} and {*found[1::2]} == {"cow", "hen"}
    assert found == video.calibration(loops[1::-1], loops, named[::-1])


@pytest.mark.slow
def test_every_stage_runs_and_the_rows_have_rivals(tmp_path, monkeypatch):
    tiny_video_pipeline().save_pretrained(tmp_path / "pipe")
    for name in video.PROMPTS:
        (tmp_path / f"{name}.txt").write_text("a cat\na dog\na red apple\n")
        monkeypatch.setitem(video.PROMPTS, name, tmp_path / f"{name}.txt")
    full = Entry("full", "full", "none", "all", tuple(range(STEPS)))
    for module, name, value in (
        (video, "CALL", CALL),
        (learned_solvers, "CALL", CALL),
        (learned_solvers, "NUM_CHOSEN", 4),
        (video, "FULL", full),
        (video, "BATCH", 4),
        (video, "FORMULAS", {"taylor_1": ("output", "hidden")}),
        (video, "FITS", ("readout", "rows", "rows_refined", "lstsq", "disca")),
        (video, "OPTIONS", {"disca": {"num_heads": 1, "mse_epochs": 1, "closed_epochs": 1}}),
    ):
        monkeypatch.setattr(module, name, value)
    place = {"pipeline": str(tmp_path / "pipe"), "root": str(tmp_path / "run")}
    video.record(num_trajectories=12, num_features=6, **place)
    place["budgets"] = [3]
    video.search(num_samples=2, num_moves=1, **place)
    known = json.loads((tmp_path / "run" / "lists.json").read_text())
    video.lists(num_samples=4, **place)
    walks = Mock(wraps=video.fit_walk)
    monkeypatch.setattr(video, "fit_walk", walks)
    video.fit(methods=video.FITS, **place)
    fitted = [(call.args[0], call.args[4].name, call.args[5]) for call in walks.call_args_list]
    assert fitted == [
        ("readout", "readout_3", 2),
        ("rows", "rows_3", 0),
        ("rows", "rows_refined_3", 2),
    ]
    assert not load_predictor(video.fitted_at(place["root"], "rows_refined", 3)).outer.any()
    video.solvers(methods=("bns",), num_pairs=4, num_epochs=1, **place)
    video.bench(num_samples=4, **place)
    video.publish(num_samples=4, out=str(tmp_path / "video.json"), **place)
    asked = json.loads((tmp_path / "run" / "tried.json").read_text())["3 of 4"]
    own = " ".join(map(str, video.own_list(place["root"], 3)))
    assert asked[own] == min(asked.values(), key=sum)
    assert {" ".join(map(str, known[f"{name}|3"])) for name in BEGUN} <= set(asked)
    rows = json.loads((tmp_path / "video.json").read_text())
    kinds = {row["kind"] for row in rows}
    assert kinds == {"learned", "learned solver", "formula", "solver"}
    assert all(row["num_anchors"] == 3 and row["num_samples"] == 4 for row in rows)
    mine = next(row for row in rows if row["method"] == "readout")
    rival = next(row for row in rows if row["method"] == mine["rival"])
    assert mine["paired_db"] == pytest.approx(mine["psnr_db"] - rival["psnr_db"])
    assert mine["rival"] not in ("rows", "rows_refined", "l2p_lstsq")  # which are ours
    gap = mine["temporal_db"] - rival["temporal_db"]
    assert mine["temporal_paired_db"] == pytest.approx(gap)
    judged = video.Judged(place["pipeline"], place["root"], 4)
    assert judged.full.images.shape == (4, FRAMES, 3, SIDE, SIDE)
    seed = torch.Generator().manual_seed(10_000)
    direct = judged.pipe("a dog", generator=seed, output_type="pt", **CALL)
    torch.testing.assert_close(judged.full.images[:1], direct.frames, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_students_are_judged_beside_their_teacher(tmp_path, monkeypatch):
    pipe = tiny_video_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "packages").mkdir()
    folder = write_packages(tmp_path / "packages")
    write_clips(str(folder), str(tmp_path / "clips.npz"), FRAMES, SIDE)
    captions = [clip.captions[0] for clip in read_clips(str(tmp_path / "clips.npz"))]
    for name in video.PROMPTS:
        (tmp_path / f"{name}.txt").write_text("\n".join(captions[:3]))
        monkeypatch.setitem(video.PROMPTS, name, tmp_path / f"{name}.txt")
    conditioner = awake(conditioner_for(pipe.transformer, **RANGE))
    student_of(pipe, conditioner).save_pretrained(tmp_path / "student")
    root = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lists.json").write_text(json.dumps({"ab2|none|3": [0, 2, 5]}))
    given = {"pipeline": str(tmp_path / "pipe"), "student": str(tmp_path / "student"), "root": root}
    for module, name, value in (
        (video, "CALL", CALL),
        (video, "BATCH", 4),
        (video, "OPTIONS", {"disca": {"num_heads": 1, "mse_epochs": 1, "closed_epochs": 1}}),
        (video_students, "STEPS", 12),
        (video_students, "LISTS", {6: (0, 1, 3, 6, 9, 11)}),
        (video_students, "SOLVED", (3,)),
        (video_students, "FEWER", (12, 3)),  # 3 are refused
    ):
        monkeypatch.setattr(module, name, value)
    video_students.conditions(given["pipeline"], root)
    kept = load_file(f"{root}/conditions.safetensors")
    assert [len(each) for each in kept.values()] == [1, 3]  # null, own
    assert torch.equal(kept["own.encoder_hidden_states"], pipe.text_encoder(captions[:3])[0])
    video_students.record(given["student"], root, num_trajectories=6)
    video_students.fit(given["student"], root, budgets=[6])
    out = str(tmp_path / "students.json")
    clips = str(tmp_path / "clips.npz")
    video_students.bench(**given, clips=clips, num_samples=4, out=out)
    found = json.loads((tmp_path / "students.json").read_text())
    spent = {(r["host"], r["method"]): r["num_network_evaluations"] for r in found["rows"]}
    assert spent == {
        ("teacher", "full"): 2 * STEPS,
        ("teacher", "ab2"): 2 * 3,
        ("student", "full"): 12,
        **{("student", each): 6 for each in ("reuse", "taylor_1", *video_students.FITS)},
    }
    full = found["rows"][0]
    assert full["speedup_measured"] == 1 and full["minus_teacher"] == [0, 0, 0]
    for row in found["rows"][1:]:
        gap = row["shares_a_word"][0] - full["shares_a_word"][0]
        assert row["minus_teacher"][0] == pytest.approx(gap)
    assert 0 < found["judge"]["chance"] < 1
    video_students.seconds(**given, repeats=1, out=out)
    share = json.loads((tmp_path / "students.json").read_text())["share_aside"]
    assert 0 < share < 1
    twice = {"speedup_measured": 2 / (1 + share)}  # half the steps, and all of what is aside
    assert video_page.sampling(twice, share) == pytest.approx(2)
    assert video_page.students_table(found | {"share_aside": share}).count("student") > 5
