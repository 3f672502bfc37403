"""Prompts through the whole road: record, search, fit in closed loop, generate, bench."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from matplotlib.image import imread
from tiny_text import PROMPTS, tiny_text_pipeline

from foreseer.checkpoints.format import load_predictor
from foreseer.cli import main
from foreseer.evaluation.generate import draw, titles
from foreseer.evaluation.results import load_rows
from foreseer.integration.forecasting import forecasting
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.predictors.lesa import LesaPredictor
from foreseer.training.closed_loop import L2PClosedLoop
from foreseer.training.disca.disca_fit import DiscaModule
from foreseer.training.export import export_predictor
from foreseer.training.lesa.lesa_fit import LesaModule
from foreseer.trajectories.datamodule import RecordingDataModule
from foreseer.trajectories.prompts import Item
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

STEPS = 6
SETTINGS = ["--num_inference_steps", str(STEPS), "--guidance_scale", "2.0"]


def quiet_trainer(max_epochs: int, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(accelerator="cpu", max_epochs=max_epochs, **quiet, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved pipeline, a file of prompts, a recording and a predictor fitted in closed loop."""
    root = tmp_path_factory.mktemp("text")
    tiny_text_pipeline().save_pretrained(root / "pipe")
    (root / "prompts.txt").write_text("\n".join(PROMPTS[1:]))
    words = ["--pipeline", str(root / "pipe"), "--prompts", str(root / "prompts.txt")]
    out = ["--out", str(root / "recording"), "--num_trajectories", "12", "--batch_size", "4"]
    main(["record", *words, *out, *SETTINGS])
    recording = str(root / "recording")
    module = L2PClosedLoop(recording, str(root / "pipe"), (0, 2, 4), num_probe=2, batch_size=4)
    trainer = quiet_trainer(1, limit_val_batches=0)
    trainer.fit(module, datamodule=RecordingDataModule(recording, ["final"], 4, 0.4, 0))
    assert float(module.best_error) <= float(module.start_error)
    export_predictor(module, root / "predictor", metrics={})
    return root


def test_a_recording_names_the_prompts_and_goes_round_them(folder):
    recording = Recording(str(folder / "recording"))
    asked = [recording.meta(item)["prompt"] for item in range(12)]
    assert asked == [PROMPTS[1:][i % 3] for i in range(12)]


def test_a_comparison_of_prompts_is_written_and_measured(folder, capsys):
    words = ["--pipeline", str(folder / "pipe"), "--predictor", str(folder / "predictor")]
    out = ["--out", str(folder / "samples.png")]
    asked = ["--prompts", '["a cat", "a dog"]']
    main(["generate", *words, *out, *asked, *SETTINGS, "--compare"])
    printed = capsys.readouterr().out
    assert "3 network evaluations" in printed and "mean PSNR" in printed
    assert imread(folder / "samples.png").ndim == 3
    main(["generate", *words, *out, "--prompts", "a dog", *SETTINGS, "--compare", "true"])
    alone = capsys.readouterr().out
    assert len(alone.split("PSNR against the full run: ")[1].splitlines()[0].split()) == 2


def test_headings_are_the_prompts_in_short_lines():
    assert titles([{"prompt": "a cat"}, {"class_labels": 3}]) == ["a cat", ""]
    assert titles([{"prompt": "a very long prompt of words"}]) == ["a very long\nprompt of words"]


def test_every_sample_of_a_bench_has_its_prompt_and_seed(folder, capsys):
    words = ["--pipeline", str(folder / "pipe"), "--prompts", str(folder / "prompts.txt")]
    options = ["--num_samples", "4", "--budgets", "[3]", "--methods", '["euler", "reuse"]']
    learned = ["--predictors", json.dumps([f"l2p={folder / 'predictor'}"])]
    main(["bench", *words, "--out", str(folder / "bench"), *options, *learned, *SETTINGS])
    rows = load_rows(folder / "bench" / "results.json")
    assert {row.kind for row in rows} == {"full", "solver", "formula", "learned"}
    assert all(row.num_samples == 4 for row in rows)
    meta = json.loads((folder / "bench" / "results.meta.json").read_text())
    assert meta["seeds"] == [10_000, 10_001, 10_002, 10_003]
    learned_row = next(row for row in rows if row.kind == "learned")
    pipe = tiny_text_pipeline()
    prompts = [{"prompt": PROMPTS[1 + (10_000 + i) % 3]} for i in range(4)]
    full = draw(pipe, prompts, 10_000, num_inference_steps=STEPS, guidance_scale=2.0)
    assert full.shape == (4, 3, 16, 16)
    assert torch.isfinite(torch.tensor(learned_row.psnr_db))


def test_anchors_are_searched_on_prompts(folder):
    out = folder / "searched.json"
    words = ["--recording", str(folder / "recording"), "--pipeline", str(folder / "pipe")]
    budget = ["--num_anchors", "[3]", "--num_samples", "2", "--num_moves", "1"]
    methods = ["--methods", '["ab2|none", "taylor_1|output", "l2p_closed_loop|output"]']
    main(["search", *words, "--out", str(out), *budget, *methods])
    found = json.loads(out.read_text())
    assert found.pop("search")  # what was searched with
    assert set(found.pop("effort")) == set(found)
    assert set(found) == {"ab2|none|3", "taylor_1|output|3", "l2p_closed_loop|output|3"}
    assert all(anchors[0] == 0 and len(anchors) == 3 for anchors in found.values())


@pytest.fixture(scope="module")
def features(folder) -> str:
    """A recording with all features of both taps."""
    items = [Item(i, i, {"prompt": PROMPTS[1 + i % 3]}) for i in range(10)]
    settings = {"guidance_scale": 2.0, "num_inference_steps": STEPS}
    taps = {"taps": ["output", "hidden"], "features": "full", "batch_size": 5}
    record(load_pipeline(str(folder / "pipe")), items, folder / "features", **taps, **settings)
    return str(folder / "features")


@pytest.mark.parametrize("kind", ["lesa", "disca"])
def test_neural_predictors_are_trained_and_deployed_on_prompts(folder, features, kind):
    pipeline = str(folder / "pipe")
    if kind == "lesa":
        predictor = functools.partial(LesaPredictor, taps=[2, 2, 2], hidden=[4], bias=False)
        epochs = {"open_loop_epochs": 1, "closed_loop_epochs": 1, "find_boundaries": True}
        module = LesaModule(features, pipeline, (0, 2, 4), predictor=predictor, **epochs)
    else:
        narrow = {"num_heads": 1, "width_mult": 0.5, "order": 1, "max_gap": 0.5}
        epochs = {"mse_epochs": 1, "closed_epochs": 1}
        module = DiscaModule(features, pipeline, (0, 2, 4), **narrow, **epochs)
    names = ["feature/hidden", "feature/output", "final"]
    data = RecordingDataModule(features, names, 2, 0.4, 0)
    quiet_trainer(2).fit(module, datamodule=data)
    export_predictor(module, folder / kind, metrics={})
    pipe = load_pipeline(pipeline)
    with forecasting(pipe, load_predictor(str(folder / kind))) as run:
        images = draw(pipe, [{"prompt": "a cat"}], 0, num_inference_steps=STEPS, guidance_scale=2.0)
    assert run.report().anchors == [0, 2, 4]
    assert torch.isfinite(images).all()


def test_a_bench_without_prompts_says_what_it_needs(folder):
    words = ["--pipeline", str(folder / "pipe"), "--out", str(folder / "none")]
    with pytest.raises(SystemExit, match="give --prompts"):
        main(["bench", *words, *SETTINGS])
