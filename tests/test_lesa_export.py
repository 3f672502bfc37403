"""An exported LESA forecasts as it was trained, without pykan."""

import functools
from pathlib import Path

import pytest
import torch
from lesa_training_cases import (
    ANCHORS,
    data_for,
    data_items,
    make_recording,
    module_for,
    trainer_for,
)

from foreseer.checkpoints.format import load_predictor
from foreseer.predictors.lesa_values import LesaValues
from foreseer.training.export import export_command, export_predictor
from foreseer.training.lesa.lesa_samples import recorded_samples
from foreseer.trajectories.recording import Recording


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    return make_recording(tmp_path_factory.mktemp("recording") / "tiny")


@pytest.mark.parametrize("pykan_seed", [None, 0])
def test_an_exported_fit_forecasts_as_it_was_trained(recording, tmp_path, pykan_seed):
    pytest.importorskip("kan") if pykan_seed is not None else None
    module = module_for(recording, open_loop_epochs=1, closed_loop_epochs=0, pykan_seed=pykan_seed)
    trainer = trainer_for(1)
    trainer.fit(module, datamodule=data_for(recording))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    export_command(str(tmp_path / "last.ckpt"), str(tmp_path / "lesa"))
    loaded = load_predictor(tmp_path / "lesa")
    assert not any("Pykan" in type(part).__name__ for part in loaded.modules())
    assert loaded.spec.anchors == ANCHORS and loaded.spec.metrics["val_error_db"] < 100
    source = Recording(recording)
    features = source.stack("feature/hidden", source.items[:2])
    for sample in recorded_samples(features, ANCHORS, module.predictor):
        trained = module.predictor.correct(sample.queue, sample.step)
        found = loaded.correct(sample.queue, sample.step)
        torch.testing.assert_close(found, trained, atol=1e-5, rtol=1e-5)
    export_predictor(module, tmp_path / "module", {})
    state = load_predictor(tmp_path / "module").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_a_checkpoint_with_another_predictor_is_refused(recording, tmp_path):
    module = module_for(recording, open_loop_epochs=1, closed_loop_epochs=0)
    trainer = trainer_for(1)
    trainer.fit(module, datamodule=data_for(recording))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["arguments"]["hidden"] = [5]
    torch.save(content, tmp_path / "changed.ckpt")
    with pytest.raises(ValueError, match="does not hold the predictor it describes"):
        export_command(str(tmp_path / "changed.ckpt"), str(tmp_path / "lesa"))


def test_the_range_of_the_values_is_that_of_the_training_features(recording):
    values = functools.partial(LesaValues, boundaries=(0.6,), taps=(2, 2), value_hidden=(2,))
    module = module_for(recording, predictor=values, open_loop_epochs=1, closed_loop_epochs=0)
    trainer_for(1).fit(module, datamodule=data_for(recording))
    features = Recording(recording).stack("feature/hidden", data_items(recording)[0])
    expected = features.abs().transpose(0, 1).flatten(1).amax(1)
    assert torch.equal(module.predictor.value_range, expected)
