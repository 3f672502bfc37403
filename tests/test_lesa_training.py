"""LESA trains in two phases, alone, and goes on exactly where it stopped."""

import copy
import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lesa_training_cases import (
    ANCHORS,
    STEPS,
    data_for,
    data_items,
    factory,
    make_recording,
    module_for,
    synthetic,
    trainer_for,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tiny_hosts import items, pipeline, settings

from foreseer.evaluation.measure import References, log_error
from foreseer.training.lesa.lesa_fit import LesaModule
from foreseer.training.lesa.lesa_samples import (
    collect,
    mean_absolute_error,
    recorded_samples,
    sample_errors,
    stage_errors,
)
from foreseer.training.lesa.lesa_start import rate_factor
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    return make_recording(tmp_path_factory.mktemp("recording") / "tiny")


def test_the_first_phase_lowers_the_open_loop_error():
    features = synthetic()
    predictor = factory()([1 - s / STEPS for s in range(STEPS)], 2)
    samples = recorded_samples(features, ANCHORS, predictor)
    optimizer = torch.optim.AdamW(predictor.parameters(), 1e-2)
    before = float(mean_absolute_error(predictor, samples))
    reuse = torch.stack([(s.queue[-1] - s.target).abs().mean() for s in samples]).mean()
    assert before == pytest.approx(float(reuse), rel=1e-6)
    for _ in range(60):
        optimizer.zero_grad()
        mean_absolute_error(predictor, samples).backward()
        optimizer.step()
    assert float(mean_absolute_error(predictor, samples)) < 0.5 * before
    errors = stage_errors(predictor, sample_errors(predictor, samples))
    assert errors.keys() == {0, 1} and all(0 < float(error) < 1 for error in errors.values())


def test_both_phases_train_the_predictor_and_leave_the_network_alone(recording):
    module = module_for(recording, tap_rate=1e-2, gate_rate=1e-3)
    network = module.pipe.transformer
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fresh = copy.deepcopy(module.predictor.state_dict())
    trainer_for(4).fit(module, datamodule=data_for(recording))
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    moved = [n for n, t in module.predictor.state_dict().items() if not torch.equal(t, fresh[n])]
    assert {"weight", "offset"} < set(moved)
    assert all(p.dtype == torch.float32 for p in module.predictor.parameters())
    assert float(module.val_error) < float(module.start_error)  # better than reuse
    assert int(module.num_trajectories) == len(data_items(recording)[0])


def test_a_second_phase_on_samples_goes_below_the_first(recording):
    errors = {}
    for target, epochs in (("none", 0), ("sample", 12)):
        changes = {"closed_loop_target": "sample"} if target == "sample" else {}
        module = module_for(recording, tap_rate=5e-2, closed_loop_epochs=epochs, **changes)
        before = copy.deepcopy(module.pipe.transformer.state_dict())
        trainer_for(2 + epochs).fit(module, datamodule=data_for(recording))
        errors[target] = training_error(module, recording)
        state = module.pipe.transformer.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in before.items())
    assert errors["sample"] < errors["none"] - 0.5


def training_error(module: LesaModule, recording: Path) -> float:
    """Mean error of the final latents over the training split, in dB."""
    source = Recording(recording)
    references = References(source, data_items(recording)[0])
    (batch,) = references.batches
    call = references.settings
    run = collect(module.pipe, module.predictor, "hidden", ANCHORS, batch, **call)
    return float(log_error(run.final, references.finals).mean())


class Rates(lightning.Callback):
    """Writes down the learning rates after every batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer, *args):
        self.seen.append(tuple(group["lr"] for group in trainer.optimizers[0].param_groups))


def test_the_learning_rate_starts_anew_with_the_second_phase(recording):
    rates = Rates()
    module = module_for(recording, open_loop_epochs=2, closed_loop_epochs=2, steps_per_update=99)
    trainer_for(4, callbacks=[rates]).fit(module, datamodule=data_for(recording))
    per_phase = len(rates.seen) // 2
    first, second = rates.seen[:per_phase], rates.seen[per_phase:]
    assert first == second
    assert first[0] == (1e-3, 1e-4)
    assert all(a > b for a, b in zip(first, first[1:], strict=False))


def test_the_rate_halves_every_500_updates_or_follows_a_cosine():
    halvings = [rate_factor("halving", 0.0, updates) for updates in (0, 499, 500, 1500)]
    assert halvings == [1.0, 1.0, 0.5, 0.125]
    cosine = [rate_factor("cosine", progress, 0) for progress in (0.0, 0.5, 1.0)]
    assert cosine == pytest.approx([1.0, 0.505, 0.01])


@pytest.mark.parametrize("target", ["feature", "sample"])
def test_a_fit_broken_off_between_epochs_goes_on_bit_for_bit(recording, tmp_path, target):
    def fit(folder: str, epochs: int, resume: bool = False) -> LesaModule:
        torch.manual_seed(0)
        module = module_for(recording, closed_loop_target=target)
        keep = ModelCheckpoint(tmp_path / folder, save_last=True, enable_version_counter=False)
        trainer = trainer_for(epochs, callbacks=[keep], enable_checkpointing=True)
        path = str(tmp_path / folder / "last.ckpt") if resume else None
        trainer.fit(module, datamodule=data_for(recording), ckpt_path=path)
        return module

    whole = fit("whole", 4)
    for epochs in (1, 2, 3):  # within a phase, and between the phases
        fit(f"broken_{epochs}", epochs)
        resumed = fit(f"broken_{epochs}", 4, resume=True)
        for name, tensor in whole.predictor.state_dict().items():
            assert torch.equal(tensor, resumed.predictor.state_dict()[name]), (epochs, name)
        for name in ("start_error", "val_error"):
            assert torch.equal(getattr(whole, name), getattr(resumed, name))
        states = [module.optimizers().optimizer.state_dict() for module in (whole, resumed)]
        assert flat(states[0]) == flat(states[1])


def flat(value: Any) -> Any:
    """Nested state with tensors as lists, to compare exactly."""
    if isinstance(value, dict):
        return {key: flat(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [flat(each) for each in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def test_errors_per_stage_and_the_gates_are_in_tensorboard(recording, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    module = module_for(recording, open_loop_epochs=1, closed_loop_epochs=1)
    trainer_for(2, logger=logger, log_every_n_steps=1).fit(module, datamodule=data_for(recording))
    events = EventAccumulator(str(tmp_path), {"images": 0, "scalars": 0})
    events.Reload()
    named = {f"val/{kind}_error_stage_{k}" for kind in ("guided", "closed_loop") for k in (0, 1)}
    phases = {"train/open_loop_l1", "train/closed_loop_l1", "val/error_db"}
    assert named | phases <= set(events.Tags()["scalars"])
    assert len(events.Images("gates")) == 2


def test_boundaries_come_from_the_recording_when_asked(recording):
    module = module_for(recording, find_boundaries=True)
    (boundary,) = module.predictor.boundaries
    sigmas = module.recording.header.sigmas
    assert any(
        math.isclose(boundary, (a + b) / 2) for a, b in zip(sigmas, sigmas[1:], strict=False)
    )
    assert module.hparams["arguments"]["boundaries"] == [boundary]


def test_grams_alone_are_refused(tmp_path):
    call = settings("dit_guided", STEPS)
    out = tmp_path / "grams"
    record(pipeline("dit_guided"), items("dit_guided", 2), out, taps=["hidden"], **call)
    with pytest.raises(ValueError, match="holds Grams only"):
        module_for(out)


def test_shuffled_steps_are_all_the_steps_in_an_order_of_their_own(recording):
    module = module_for(recording, shuffle_steps=True, steps_per_update=3)
    features = Recording(recording).stack("feature/hidden")
    samples = recorded_samples(features, ANCHORS, module.predictor)

    def steps(batch_idx: int) -> list[list[int]]:
        return [[s.step.index for s in group] for group in module.groups(samples, batch_idx)]

    assert [len(group) for group in steps(0)] == [3, 3, 2]
    assert steps(0) == steps(0) != steps(1)
    everything = [sample.step.index for sample in samples]
    assert sorted(sum(steps(0), [])) == everything != sum(steps(0), [])
    module.shuffle_steps = False
    assert sum(steps(0), []) == everything
