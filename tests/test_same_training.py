"""A training goes on from a checkpoint of its own, and from no other."""

import importlib
import inspect
import pkgutil
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_hosts import items, pipeline, settings

import foreseer.distill
import foreseer.training
from foreseer.predictors.lesa import LesaPredictor
from foreseer.training.closed_loop import L2PClosedLoop
from foreseer.training.l2p import L2PAdam, L2PLeastSquares
from foreseer.training.plumbing.resuming import Resumable, check_same, described
from foreseer.training.readout.readout_fit import ReadoutFit
from foreseer.trajectories.datamodule import GramDataModule, ItemsDataModule, RecordingDataModule
from foreseer.trajectories.recorder import record

HOST = "dit_guided"
ANCHORS = [0, 2, 4]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("same") / "recording"
    return str(record(pipeline(HOST), items(HOST, 6), out, batch_size=6, **settings(HOST, 6)))


def fit(module: Any, data: Any, folder: Path, **changes: Any) -> Any:
    """What `ckpt_path: last` does: go on from the folder's last checkpoint, if there is one."""
    keeps = ModelCheckpoint(folder, save_last=True, enable_version_counter=False)
    options = {"max_epochs": 1, "num_sanity_val_steps": 0} | changes
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[keeps],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    last = folder / "last.ckpt"
    trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None)
    return module


def solved(recording: str, anchors: Any = ANCHORS, tap: str = "output", **changes: Any) -> Any:
    return L2PLeastSquares(recording, anchors, tap, **changes)


def grams(recording: str, tap: str = "output", fraction: float = 0.25, seed: int = 4) -> Any:
    return GramDataModule(recording, tap, fraction, seed)


OTHERS = {
    "anchors": (
        partial(solved, anchors=[0, 3]),
        grams,
        r"model.anchors \[0, 2, 4\], here \[0, 3\]",
    ),
    "tap": (partial(solved, tap="hidden"), partial(grams, tap="hidden"), "model.tap output, here"),
    "ridge": (partial(solved, ridge=1e-2), grams, "model.ridge 0.0001, here 0.01"),
    "split": (solved, partial(grams, seed=5), "data.seed 4, here 5"),
    "fraction": (solved, partial(grams, fraction=0.5), "data.validation_fraction 0.25, here 0.5"),
    "fit": (lambda r: L2PAdam(r, ANCHORS), grams, "model.class L2PLeastSquares, here L2PAdam"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_fit_in_the_same_folder_is_refused(other, recording, tmp_path):
    fit(solved(recording), grams(recording), tmp_path)
    before = (tmp_path / "last.ckpt").read_bytes()
    make, data, message = OTHERS[other]
    with pytest.raises(ValueError, match=message) as error:
        fit(make(recording), data(recording), tmp_path, max_epochs=2)
    assert "is of another fit" in str(error.value) and "--out" in str(error.value)
    assert (tmp_path / "last.ckpt").read_bytes() == before  # nothing is lost


def test_the_same_fit_goes_on_wherever_its_recording_lies(recording, tmp_path):
    module = fit(solved(recording), grams(recording), tmp_path / "fit")
    moved = str(shutil.copytree(recording, tmp_path / "moved"))
    again = fit(solved(moved), grams(moved), tmp_path / "fit")
    assert torch.equal(again.predictor.weight, module.predictor.weight)


@pytest.mark.parametrize("change", ["prompts", "more"])
def test_another_recording_in_the_same_place_is_refused(change, tmp_path):
    place, call = tmp_path / "recording", settings(HOST, 6)
    record(pipeline(HOST), items(HOST, 6), place, batch_size=6, **call)
    fit(solved(str(place)), grams(str(place)), tmp_path / "fit")
    if change == "prompts":
        shutil.rmtree(place)
        record(pipeline(HOST), items(HOST, 12)[6:], place, batch_size=6, **call)
        message = "model.recording.contents"
    else:
        record(pipeline(HOST), items(HOST, 12)[6:], place, batch_size=6, **call)
        message = "model.recording.trajectories 6, here 12"
    with pytest.raises(ValueError, match=message):
        fit(solved(str(place)), grams(str(place)), tmp_path / "fit")


def test_fits_that_run_the_network_refuse_too(recording, tmp_path):
    def closed(**changes: Any) -> L2PClosedLoop:
        module = L2PClosedLoop(recording, "none", ANCHORS, "hidden", **changes)
        module.pipe = pipeline(HOST)
        return module

    def readout(**changes: Any) -> ReadoutFit:
        module = ReadoutFit(recording, "none", ANCHORS, **changes)
        module.pipe = pipeline(HOST)
        return module

    data = partial(RecordingDataModule, recording, ["final"], 6, 0.25, 4)
    fit(closed(), data(), tmp_path / "closed", limit_train_batches=1)
    with pytest.raises(ValueError, match="model.num_probe 16, here 2"):
        fit(closed(num_probe=2), data(), tmp_path / "closed", max_epochs=2)
    items_ = partial(ItemsDataModule, recording, 0.25, 4)
    fit(readout(), items_(), tmp_path / "readout", max_epochs=-1)
    with pytest.raises(ValueError, match="model.rank 64, here 8"):
        fit(readout(rank=8), items_(), tmp_path / "readout", max_epochs=-1)


def test_a_checkpoint_that_notes_nothing_is_refused(recording, tmp_path):
    fit(solved(recording), grams(recording), tmp_path)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del content["training"]
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt, does not note what .* start anew"):
        fit(solved(recording), grams(recording), tmp_path, max_epochs=2)


def modules_of(package: Any) -> list[type]:
    names = [each.name for each in pkgutil.iter_modules(package.__path__)]
    found = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    classes = {kind for module in found for kind in vars(module).values() if inspect.isclass(kind)}
    return [kind for kind in classes if issubclass(kind, lightning.LightningModule)]


def test_every_training_compares():
    trainings = {*modules_of(foreseer.training), *modules_of(foreseer.distill)}
    ours = {kind for kind in trainings if kind.__module__.startswith("foreseer.")}
    assert len(ours) > 12
    assert [kind.__name__ for kind in ours if not issubclass(kind, Resumable)] == []


def test_what_is_compared_is_plain_and_tells_objects_apart():
    class Law:
        def __init__(self, share: float) -> None:
            self.share = share

    def told(**arguments: Any) -> dict[str, Any]:
        return {"model": described("Some", arguments)}

    factory = partial(LesaPredictor, taps=[2, 2])
    check_same(told(law=Law(0.5), factory=factory), told(law=Law(0.5), factory=factory), "here")
    check_same(told(device="cpu"), told(device="cuda"), "here")  # another place, the same fit
    with pytest.raises(ValueError, match=r"model.law.share 0.25, here 0.5"):
        check_same(told(law=Law(0.5)), told(law=Law(0.25)), "here")
    with pytest.raises(ValueError, match="model.factory.with"):
        check_same(told(factory=partial(LesaPredictor, taps=[3])), told(factory=factory), "here")
    first, second = pipeline(HOST), pipeline(HOST)
    torch.nn.init.zeros_(second.transformer.proj_out_2.weight)
    check_same(told(pipeline=first), told(pipeline=pipeline(HOST)), "here")
    with pytest.raises(ValueError, match="weights_sha256"):
        check_same(told(pipeline=first), told(pipeline=second), "here")
