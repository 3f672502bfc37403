"""A fit report puts ceilings above errors, and every shipped fit config runs and resumes."""

import json
from pathlib import Path

import lightning
import pytest
import torch
from row_cases import rows_fitted
from source_files import PACKAGE
from tiny_pipelines import tiny_pipeline

from foreseer.cli import main
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.predictors.linear import L2P
from foreseer.training.fit_report import FitReport, closed_loop_state_errors, fit_report
from foreseer.training.l2p import L2PLeastSquares
from foreseer.trajectories.datamodule import GramDataModule
from foreseer.trajectories.prompts import class_items
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

ANCHORS = [0, 2]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def recording(pipeline, tmp_path_factory) -> Recording:
    """Twelve trajectories of six guided steps."""
    out = tmp_path_factory.mktemp("recording") / "r"
    settings = {"guidance_scale": 3.0, "num_inference_steps": 6}
    record(load_pipeline(pipeline), class_items(12, 3), out, batch_size=4, **settings)
    return Recording(out)


def test_an_oracle_is_never_worse_than_what_it_bounds(recording, tmp_path):
    fitted_on, held_out = recording.items[:8], recording.items[8:]
    rows = rows_fitted(recording.stack("gram/output", fitted_on), ANCHORS)[:, None]
    curves = fit_report(recording, held_out, rows, ANCHORS, "output", None, tmp_path)
    assert list(curves) == ["oracle_all", "oracle_anchors", "open_loop"]
    by_step = zip(*curves.values(), strict=True)
    for (step, oracle_all), (_, oracle_anchors), (_, shared) in by_step:
        if step in ANCHORS:
            assert oracle_anchors == shared == 0
        else:
            assert 0 <= oracle_all <= oracle_anchors <= shared
    assert (tmp_path / "fit_report.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "fit_report.json").read_text())
    assert written["relative_error"]["open_loop"] == [list(pair) for pair in curves["open_loop"]]


def test_states_are_the_recorded_ones_bit_for_bit_until_the_first_forecast(pipeline, recording):
    pipe, items = load_pipeline(pipeline), recording.items[8:]
    every_step = L2P(6, range(6), 2)
    errors = closed_loop_state_errors(pipe, every_step, "output", recording, items, batch_size=4)
    assert errors == [(step, 0.0) for step in range(6)]
    reuse = L2P(6, [0, 1, 2, 4], 2)
    errors = closed_loop_state_errors(pipe, reuse, "output", recording, items, batch_size=4)
    assert [step for step, error in errors if error == 0] == [0, 1, 2]


def trainer(out: Path) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FitReport(str(out))],
    )


def test_a_fit_without_held_out_trajectories_is_refused_before_it_starts(recording, tmp_path):
    module = L2PLeastSquares(str(recording.folder), ANCHORS)
    data = GramDataModule(str(recording.folder), validation_fraction=0.0)
    with pytest.raises(ValueError, match="raise validation_fraction"):
        trainer(tmp_path).fit(module, datamodule=data)
    with pytest.raises(ValueError, match="needs held-out trajectories"):
        fit_report(
            recording, [], module.predictor.weight[:, None], ANCHORS, "output", None, tmp_path
        )


@pytest.mark.parametrize(("config", "curves"), [("l2p_lstsq", 3), ("l2p_adam", 3), ("l2p", 4)])
def test_a_shipped_fit_config_runs_reports_and_resumes(
    config, curves, pipeline, recording, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/record").mkdir(parents=True)
    (tmp_path / "runs/record/fashion_dit").symlink_to(recording.folder)
    epochs = {"l2p": 2, "l2p_adam": 67, "l2p_lstsq": 1}[config]
    words = ["fit", "--config", str(PACKAGE / f"configs/fit/{config}.yaml")]
    words += ["--model.init_args.anchors", str(ANCHORS), "--trainer.max_epochs", str(epochs)]
    words += [
        "--trainer.enable_progress_bar",
        "false",
        "--data.init_args.validation_fraction",
        "0.4",
    ]
    if config == "l2p":
        words += ["--model.init_args.pipeline", pipeline]
    main(words)
    folder = tmp_path / "runs/fit" / config
    report = json.loads((folder / "fit_report.json").read_text())
    assert len(report["relative_error"]) == curves
    fitted = torch.load(folder / "last.ckpt", weights_only=True)
    main(words)  # nothing is left to do
    again = torch.load(folder / "last.ckpt", weights_only=True)
    assert torch.equal(
        again["state_dict"]["predictor.weight"], fitted["state_dict"]["predictor.weight"]
    )
    assert json.loads((folder / "fit_report.json").read_text()) == report
