"""The benchmark of the video host goes through on a tiny one, and measures what it says."""

import json

import learned_solvers
import pytest
import torch
import video
from tiny_video import FRAMES, SIDE, tiny_video_pipeline

from foreseer.evaluation.plan import Entry

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
        (video, "OPTIONS", {"disca": {"num_heads": 1, "mse_epochs": 1, "closed_epochs": 1}}),
    ):
        monkeypatch.setattr(module, name, value)
    place = {"pipeline": str(tmp_path / "pipe"), "root": str(tmp_path / "run")}
    video.record(num_trajectories=12, num_features=6, **place)
    place["budgets"] = [3]
    video.search(num_samples=2, num_moves=1, **place)
    video.fit(methods=("readout", "disca"), **place)
    video.solvers(methods=("bns",), num_pairs=4, num_epochs=1, **place)
    video.bench(num_samples=4, **place)
    video.publish(num_samples=4, out=str(tmp_path / "video.json"), **place)
    rows = json.loads((tmp_path / "video.json").read_text())
    kinds = {row["kind"] for row in rows}
    assert kinds == {"learned", "learned solver", "formula", "solver"}
    assert all(row["num_anchors"] == 3 and row["num_samples"] == 4 for row in rows)
    mine = next(row for row in rows if row["method"] == "readout")
    rival = next(row for row in rows if row["method"] == mine["rival"])
    assert mine["paired_db"] == pytest.approx(mine["psnr_db"] - rival["psnr_db"])
    gap = mine["temporal_db"] - rival["temporal_db"]
    assert mine["temporal_paired_db"] == pytest.approx(gap)
    judged = video.Judged(place["pipeline"], place["root"], 4)
    assert judged.full.images.shape == (4, FRAMES, 3, SIDE, SIDE)
    seed = torch.Generator().manual_seed(10_000)
    direct = judged.pipe("a dog", generator=seed, output_type="pt", **CALL)
    torch.testing.assert_close(judged.full.images[:1], direct.frames, rtol=0, atol=1e-5)
