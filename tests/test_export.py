"""A fitted module becomes a predictor that deploys, with its facts, errors and summed Grams."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from checkpoint_cases import tiny_pipe
from lightning.pytorch import Trainer

from foreseer.checkpoints.format import load_predictor
from foreseer.integration.forecasting import forecasting
from foreseer.training.closed_loop import L2PClosedLoop
from foreseer.training.export import export_command, export_predictor, read_checkpoint
from foreseer.training.l2p import L2PLeastSquares
from foreseer.trajectories.datamodule import GramDataModule
from foreseer.trajectories.files.shards import read_shard
from foreseer.trajectories.prompts import Item
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

ANCHORS = [0, 1, 3]
SETTINGS = {"guidance_scale": 3.0, "num_inference_steps": 6}


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    items = [Item(i, i, {"class_labels": i % 3}) for i in range(6)]
    out = tmp_path_factory.mktemp("recording") / "tiny"
    return record(tiny_pipe(), items, out, taps=["output"], **SETTINGS)


@pytest.fixture(scope="module")
def fitted(recording) -> tuple[L2PLeastSquares, Path]:
    """A module fitted by Lightning and the checkpoint Lightning wrote of it."""
    torch.manual_seed(0)
    module = L2PLeastSquares(str(recording), ANCHORS)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(module, datamodule=GramDataModule(str(recording), validation_fraction=0.0))
    path = recording.parent / "last.ckpt"
    trainer.save_checkpoint(path)
    return module, path


def test_an_exported_predictor_has_the_fitted_rows_and_runs_on_the_model(fitted, tmp_path):
    module, checkpoint = fitted
    export_command(str(checkpoint), str(tmp_path / "l2p"))
    loaded = load_predictor(tmp_path / "l2p")
    assert torch.equal(loaded.weight, module.predictor.weight)
    assert loaded.spec == module.spec()
    pipe = tiny_pipe()
    with forecasting(pipe, loaded) as run:
        pipe([1], output_type="latent", **SETTINGS)
    assert run.report().anchors == ANCHORS


def test_the_grams_beside_it_are_the_sum_over_the_recording(fitted, recording, tmp_path):
    export_command(str(fitted[1]), str(tmp_path))
    grams = read_shard(tmp_path / "grams.safetensors")
    expected = Recording(recording).stack("gram/output").sum(0)
    assert grams["gram/output"].dtype == torch.float64
    assert torch.allclose(grams["gram/output"], expected, rtol=1e-14)  # another order of addition
    assert int(grams["count"]) == 6


def test_a_module_exports_without_a_checkpoint_and_with_its_errors(fitted, tmp_path):
    metrics = {"psnr_db": 30.0, "psnr_db_taylor_1": 28.0}
    assert export_predictor(fitted[0], tmp_path / "l2p", metrics) == tmp_path / "l2p"
    assert load_predictor(tmp_path / "l2p").spec.metrics == metrics
    assert "Better than Taylor 1 by 2 dB" in (tmp_path / "l2p" / "README.md").read_text()
    assert (tmp_path / "l2p" / "grams.safetensors").is_file()


def test_exporting_again_replaces_the_files(fitted, tmp_path):
    for _ in range(2):
        export_command(str(fitted[1]), str(tmp_path))
    load_predictor(tmp_path)


def closed_loop_checkpoint(recording: Path, path: Path, best: float, start: float) -> Path:
    module = L2PClosedLoop(str(recording), "unused", ANCHORS)
    module.best_error.fill_(best)
    module.start_error.fill_(start)
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save(content, path)
    return path


def test_a_closed_loop_checkpoint_brings_its_validation_errors(recording, tmp_path):
    path = closed_loop_checkpoint(recording, tmp_path / "a.ckpt", -31.0, -30.5)
    export_command(str(path), str(tmp_path / "l2p"))
    metrics = load_predictor(tmp_path / "l2p").spec.metrics
    assert metrics == {"val_error_db": -31.0, "val_error_db_start": -30.5}
    assert "Better than start of the fit by 0.5 dB" in (tmp_path / "l2p/README.md").read_text()


def test_a_closed_loop_fit_that_measured_nothing_is_not_exported(recording, tmp_path):
    path = closed_loop_checkpoint(recording, tmp_path / "a.ckpt", float("inf"), float("inf"))
    with pytest.raises(ValueError, match="before the fit measured its start"):
        export_command(str(path), str(tmp_path / "l2p"))
    assert not (tmp_path / "l2p").exists()


def changed(checkpoint: Path, out: Path, change) -> str:
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, out)
    return str(out)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c["hyper_parameters"].update(recordings=["gone/away"]), "away, which is not"),
        (lambda c: c["hyper_parameters"].update(digests=["0123"]), "recipe 0123, .* was replaced"),
        (
            lambda c: c["hyper_parameters"].update({"class": "Taylor"}),
            "of a Taylor, expected one of",
        ),
        (lambda c: c["hyper_parameters"].pop("tap"), r"lacks the hyper-parameters \['tap'\]"),
        (
            lambda c: c.pop("hyper_parameters"),
            r"lacks the hyper-parameters \['recordings', 'digests'",
        ),
        (lambda c: c["state_dict"].pop("predictor.weight"), "or the tensors of a predictor"),
        (
            lambda c: c["state_dict"].update({"predictor.weight": torch.zeros(2, 4, 4)}),
            "(?s)does not hold the predictor it describes .*size mismatch for weight",
        ),
    ],
)
def test_a_checkpoint_that_lacks_something_is_refused(fitted, tmp_path, change, match):
    path = changed(fitted[1], tmp_path / "a.ckpt", change)
    with pytest.raises(ValueError, match=match):
        export_command(path, str(tmp_path / "l2p"))
    assert not (tmp_path / "l2p").exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.fault
def test_a_malicious_checkpoint_runs_no_code(tmp_path):
    path = tmp_path / "a.ckpt"
    for write in (torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))):
        write(Bomb(tmp_path / "ran"), path)
        with pytest.raises(ValueError, match="no checkpoint that can be read without running code"):
            export_command(str(path), str(tmp_path / "l2p"))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        export_command(str(path), str(tmp_path / "l2p"))
    assert not (tmp_path / "ran").exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*a.ckpt; expected the .ckpt"):
        export_command(str(tmp_path / "a.ckpt"), str(tmp_path / "l2p"))


def test_a_damaged_checkpoint_is_named_whatever_its_bytes(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"hyper_parameters": {"fit": "lstsq"}, "state_dict": {"a": torch.ones(3)}}, path)
    content = path.read_bytes()
    draw = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])])
        with pytest.raises(ValueError, match="last.ckpt"):
            read_checkpoint(path)


@pytest.mark.parametrize("key", ["hyper_parameters", "state_dict"])
def test_a_checkpoint_whose_parts_are_no_dicts_is_named(tmp_path, key):
    torch.save({"hyper_parameters": {}, "state_dict": {}, key: [1]}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="last.ckpt has .* expected dicts"):
        read_checkpoint(tmp_path / "last.ckpt")
