"""`foreseer generate` draws what the pipeline draws, and compares with the same noise."""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from tiny_pipelines import tiny_pipeline

from foreseer.cli import main
from foreseer.evaluation import generate as module
from foreseer.evaluation.benchmark import rows_predictor
from foreseer.evaluation.generate import draw, save_panels, save_samples
from foreseer.evaluation.page.sheet import MARGIN, Row, cell_size, sheet
from foreseer.integration.host.clock import flow_sigmas
from foreseer.predictors.linear import L2P

STEPS = 6


@pytest.fixture
def generate(tmp_path, monkeypatch, capsys):
    """Call the command with a reuse predictor on the given anchors; returns what it printed."""
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    pipe.scheduler.set_timesteps(STEPS)
    sigmas = flow_sigmas(pipe.scheduler)

    def call(*words, anchors=(0, 2, 4), steps=("--num_inference_steps", str(STEPS))):
        def load_predictor(name, evaluations=None):
            assert name == "reuse"
            weight = L2P(STEPS, anchors, 2).weight
            return rows_predictor(pipe, weight, anchors, "output", sigmas, 3.0)

        loader = SimpleNamespace(load_predictor=load_predictor)
        monkeypatch.setitem(sys.modules, "foreseer.checkpoints.format", loader)
        out = str(tmp_path / "new" / "samples.png")
        given = ["--pipeline", str(tmp_path / "pipe"), "--class_labels", "[0,2]", "--out", out]
        main(["generate", *given, *steps, *words])
        return capsys.readouterr().out

    return call


def test_each_sample_has_its_own_seed_whatever_is_drawn_beside_it():
    settings = {"guidance_scale": 3.0, "num_inference_steps": 3}
    first, second = {"class_labels": 0}, {"class_labels": 2}
    pair = draw(tiny_pipeline(), [first, second], 5, **settings)
    alone = draw(tiny_pipeline(), [second], 6, **settings)
    torch.testing.assert_close(pair[1:], alone)
    assert not torch.allclose(pair[0], pair[1])


def test_the_samples_themselves_are_written_at_their_own_size(generate, tmp_path):
    printed = generate("--predictor", "reuse", "--compare")
    folder = tmp_path / "new" / "samples"
    names = ["forecast_0", "forecast_1", "full_0", "full_1"]
    assert sorted(each.name for each in folder.iterdir()) == [f"{name}.png" for name in names]
    drawn = draw(
        tiny_pipeline(), [{"class_labels": 0}], 0, guidance_scale=3.0, num_inference_steps=STEPS
    )
    with Image.open(folder / "full_0.png") as full:
        assert full.size == tuple(drawn.shape[2:])
        off = np.abs(np.asarray(full) / 255 - drawn[0, 0].numpy())
    assert off.max() <= 0.5 / 255 + 1e-6
    told = r"forecast \d+\.\d s, full run \d+\.\d s: \d+\.\d x faster"
    assert re.search(told, printed)


def test_what_takes_long_shows_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(module, "QUIET_SECONDS", 0)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0}
    module.timed(tiny_pipeline(), [{"class_labels": 1}], 0, "full run", settings)
    assert "full run:   0%|" in capsys.readouterr().err


def test_a_large_image_stays_large(tmp_path):
    (path,) = save_samples(torch.rand(1, 3, 1024, 1024), tmp_path / "new", "full")
    with Image.open(path) as image:
        assert (image.size, image.mode) == ((1024, 1024), "RGB")


def test_a_video_is_an_mp4_or_its_frames(tmp_path, monkeypatch, capsys):
    videos, exported = torch.rand(2, 5, 3, 8, 6), []
    paths = save_samples(videos, tmp_path, "full")  # without imageio
    assert [path.name for path in paths] == ["full_0", "full_1"]
    assert len(list(paths[1].glob("*.png"))) == 5 and "pip install" in capsys.readouterr().out
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    monkeypatch.setattr(module, "export_to_video", lambda *told, **more: exported.append(told))
    assert [path.name for path in save_samples(videos, tmp_path, "full")] == [
        "full_0.mp4",
        "full_1.mp4",
    ]
    assert [len(frames) for frames, _ in exported] == [5, 5]
    assert exported[0][0][0].size == (6, 8)


def test_the_steps_are_the_predictors_own_unless_given(generate):
    assert "3 of 6 steps forecast" in generate("--predictor", "reuse", steps=())
    with pytest.raises(SystemExit, match="fitted on 6 steps, this run has 4"):
        generate("--predictor", "reuse", steps=("--num_inference_steps", "4"))


def test_without_a_predictor_the_full_run_is_drawn(generate, tmp_path):
    printed = generate()
    assert printed.strip().endswith("samples.png") and "PSNR" not in printed
    assert imread(tmp_path / "new" / "samples.png").ndim == 3


def test_a_comparison_reports_the_run_and_the_error(generate):
    printed = generate("--predictor", "reuse", "--compare", "true")
    assert "3 of 6 steps forecast: 2.0 x fewer evaluations" in printed
    values = re.search(r"PSNR against the full run: ([\d.]+) dB ([\d.]+) dB", printed)
    mean = sum(map(float, values.groups())) / 2
    assert f"mean PSNR: {mean:.1f}" in printed


def test_a_forecast_with_every_step_an_anchor_is_exact(generate):
    printed = generate("--predictor", "reuse", "--compare", "true", anchors=range(STEPS))
    assert "mean PSNR: exact dB" in printed


def test_a_comparison_without_a_predictor_is_refused(generate):
    with pytest.raises(SystemExit, match="compare needs a predictor"):
        generate("--compare", "true")


def test_another_guidance_than_the_predictors_is_refused(generate):
    with pytest.raises(SystemExit, match="guidance_scale 3"):
        generate("--predictor", "reuse", "--guidance_scale", "2.0")


def test_panels_have_one_row_each_and_captions_underneath(tmp_path):
    images = torch.rand(3, 1, 16, 16)
    one = imread(save_panels({"full": images}, tmp_path / "one.png"))
    two = imread(save_panels({"full": images, "fu": images}, tmp_path / "two.png"))
    assert two.shape[0] > 1.5 * one.shape[0] and two.shape[1] == one.shape[1]
    named = imread(save_panels({"full": images}, tmp_path / "named.png", ["1 dB", "2 dB", "3 dB"]))
    assert named.shape[0] > one.shape[0] and named.shape[1] == one.shape[1]


def test_samples_are_drawn_larger_by_whole_pixels_and_large_ones_reduced():
    assert cell_size(32, 32) == (128, 128)
    assert cell_size(1024, 512) == (384, 192)
    colours = torch.tensor([[0.0, 1.0], [0.2, 0.6]]).expand(1, 3, 2, 2)
    drawn = np.asarray(sheet([Row("two by two", colours)]))[MARGIN:-MARGIN][
        :112, -MARGIN - 112 : -MARGIN
    ]
    corners = drawn[[0, 55, 56, 111]][:, [0, 55, 56, 111], 0]
    expected = np.repeat(np.repeat([[0, 255], [51, 153]], 2, 0), 2, 1)
    assert (corners == expected).all()


def test_rows_of_other_samples_are_refused():
    rows = [Row("one", torch.rand(2, 1, 8, 8)), Row("other", torch.rand(3, 1, 8, 8))]
    with pytest.raises(ValueError, match="expected one number and size"):
        sheet(rows)
