"""Fits run the pipeline they are given or name, where and in the dtype that it runs in."""

import functools
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from tiny_hosts import items, pipeline, settings

from foreseer.evaluation.measure import log_error
from foreseer.fit_commands import search
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.predictors.lesa import LesaPredictor
from foreseer.training.closed_loop import L2PClosedLoop
from foreseer.training.disca.disca_fit import DiscaModule
from foreseer.training.lesa.lesa_fit import LesaModule
from foreseer.training.readout.readout_fit import ReadoutFit
from foreseer.trajectories.datamodule import ItemsDataModule, RecordingDataModule
from foreseer.trajectories.recorder import record

HOST = "dit_guided"
ANCHORS = [0, 2, 4]
STEPS = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A recording in bfloat16 and the saved pipeline."""
    folder = tmp_path_factory.mktemp("places")
    pipe = pipeline(HOST).to(torch.bfloat16)
    pipe.save_pretrained(folder / "pipe")
    given = {"taps": ["hidden", "output"], "features": "full", "batch_size": 4}
    record(pipe, items(HOST, 4), folder / "recording", **given, **settings(HOST, STEPS))
    return str(folder / "recording"), str(folder / "pipe")


def closed(recording: str, pipe: Any, **changes: Any) -> Any:
    data = RecordingDataModule(recording, ["final"], 3, 0.25, 4)
    return L2PClosedLoop(recording, pipe, [0, 2], num_probe=2, **changes), data, 1


def lesa(recording: str, pipe: Any, target: str = "sample") -> Any:
    factory = functools.partial(LesaPredictor, boundaries=(), taps=(2,), hidden=(4,), grid_size=3)
    phases = {"open_loop_epochs": 1, "closed_loop_epochs": 1, "closed_loop_target": target}
    data = RecordingDataModule(recording, ["feature/hidden", "final"], 3, 0.25, 4)
    return LesaModule(recording, pipe, ANCHORS, factory, **phases), data, 2


def disca(recording: str, pipe: Any) -> Any:
    phases = {"mse_epochs": 1, "closed_epochs": 1}
    names = ["feature/hidden", "feature/output", "final"]
    data = RecordingDataModule(recording, names, 3, 0.25, 4)
    return DiscaModule(recording, pipe, ANCHORS, num_heads=1, max_gap=0.5, **phases), data, 2


def readout(recording: str, pipe: Any) -> Any:
    return ReadoutFit(recording, pipe, ANCHORS, rank=4), ItemsDataModule(recording, 0.25, 4), -1


FITS = {
    "closed_loop": closed,
    "closed_loop_hidden": functools.partial(closed, tap="hidden"),
    "lesa_sample": lesa,
    "lesa_feature": functools.partial(lesa, target="feature"),
    "disca": disca,
    "readout": readout,
}


def run(module: Any, data: Any, epochs: int) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("name", FITS)
def test_a_fit_loads_the_pipeline_in_the_dtype_of_its_recording(name, made):
    recording, folder = made
    module = run(*FITS[name](recording, folder))
    assert module.pipe.transformer.dtype is torch.bfloat16
    error = module.best_error if name.startswith("closed") else module.val_error
    assert bool(torch.isfinite(error))


def test_a_pipeline_itself_and_another_dtype_can_be_given(made):
    recording, folder = made
    pipe = pipeline(HOST)
    assert run(*closed(recording, pipe)).pipe is pipe
    module, data, epochs = closed(recording, folder, dtype="float32", device="cpu")
    assert run(module, data, epochs).pipe.transformer.dtype is torch.float32


def test_search_takes_a_pipeline_and_a_dtype(made, tmp_path):
    recording, folder = made
    call = {"num_anchors": [2], "methods": ["newton_1|output"], "num_samples": 2, "num_moves": 0}
    found = search(recording, folder, str(tmp_path / "a.json"), **call)
    other = search(
        recording, folder, str(tmp_path / "b.json"), dtype="float32", device="cpu", **call
    )
    given = search(recording, pipeline(HOST).to(torch.bfloat16), str(tmp_path / "c.json"), **call)
    assert found.keys() == other.keys() and found == given


def test_a_training_follows_the_pipeline_to_its_device(made):
    recording, _ = made
    module, _, _ = lesa(recording, pipeline(HOST))
    elsewhere = pipeline(HOST)
    elsewhere.transformer.to("meta")  # stands for a GPU
    module.follow(elsewhere)
    assert {parameter.device.type for parameter in module.predictor.parameters()} == {"meta"}
    batch = {"final": torch.zeros(2), "item": torch.tensor([0])}
    moved = module.at_home(batch)
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}
    assert log_error(torch.empty(2, 3, device="meta"), torch.zeros(2, 3)).device.type == "meta"


FACTORY = """
import torch
from tiny_hosts import pipeline

def plain():
    return pipeline("dit_guided")

def placed(dtype, device="cpu"):
    return pipeline("dit_guided").to(dtype)

def nothing():
    return 3
"""


def test_a_pipeline_is_made_by_a_function_of_the_users(tmp_path: Path, monkeypatch):
    (tmp_path / "my_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    try:
        assert load_pipeline("my_models:plain").transformer.dtype is torch.float32
        pipe = load_pipeline("my_models:placed", torch.bfloat16)
        assert pipe.transformer.dtype is torch.bfloat16
        with pytest.raises(ValueError, match="my_models:nothing returned int, expected a pipel"):
            load_pipeline("my_models:nothing")
        for name in ("my_models:missing", "no_such_module:make"):
            with pytest.raises(ValueError, match=f"there is no {name} .*package.module:factory"):
                load_pipeline(name)
    finally:
        sys.modules.pop("my_models", None)
    assert sys.path == before
