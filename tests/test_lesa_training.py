"""LESA trains in two phases on what it will see, alone, and goes on exactly where it stopped."""

import copy
import functools
import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tiny_hosts import items, pipeline, settings

from foreseer.checkpoints.format import load_predictor
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.host import transformer_of
from foreseer.integration.session import Session
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.lesa_values import LesaValues
from foreseer.training.export import export_command, export_predictor
from foreseer.training.lesa import LesaModule
from foreseer.training.lesa_rates import rate_factor
from foreseer.training.lesa_samples import (
    collect,
    mean_absolute_error,
    recorded_samples,
    stage_errors,
)
from foreseer.training.linear_refit import add_samples, refit
from foreseer.training.measure import References, item_of, log_error
from foreseer.training.windows import from_grams
from foreseer.trajectories.datamodule import RecordingDataModule
from foreseer.trajectories.prompts import generate_batch
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

STEPS = 12
ANCHORS = (0, 1, 4, 8)
SMALL: dict[str, Any] = {"boundaries": (0.6,), "taps": (2, 3), "hidden": (4,), "grid_size": 3}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def factory(**changes: Any) -> functools.partial[LesaPredictor]:
    return functools.partial(LesaPredictor, **{**SMALL, **changes})


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    """Eight trajectories of the tiny guided DiT, with all features of the hidden tap."""
    out = tmp_path_factory.mktemp("recording") / "tiny"
    call = settings("dit_guided", STEPS)
    pipe = pipeline("dit_guided")
    options: dict[str, Any] = {"taps": ["hidden"], "features": "full", "batch_size": 4}
    return record(pipe, items("dit_guided", 8), out, **options, **call)


def module_for(recording: Path, **changes: Any) -> LesaModule:
    """A module on the tiny host, its pipeline given instead of loaded."""
    options: dict[str, Any] = {"predictor": factory(), "open_loop_epochs": 2} | changes
    module = LesaModule(str(recording), "none", ANCHORS, **options)
    module.pipe = pipeline("dit_guided")
    return module


def data_for(recording: Path, **changes: Any) -> RecordingDataModule:
    names = ["feature/hidden", "final"]
    options: dict[str, Any] = {"batch_size": 3, "validation_fraction": 0.3, "seed": 3} | changes
    return RecordingDataModule(recording, names, **options)


def trainer_for(max_epochs: int, **changes: Any) -> lightning.Trainer:
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False} | changes
    return lightning.Trainer(max_epochs=max_epochs, **QUIET, **options)


def synthetic(trajectories: int = 4, branches: int = 2) -> torch.Tensor:
    """Features that turn slowly, `(n, branches, S, tokens, channels)`."""
    t = torch.linspace(0, 1, STEPS)[:, None, None]
    a, b, c = torch.randn(3, trajectories, branches, 1, 5, 4)
    return a + b * t + c * torch.sin(3 * t)


# ------------------------------------------------------------------------------------- samples


def test_recorded_samples_hold_the_features_before_each_forecast_step():
    features = synthetic()
    predictor = factory()([1 - s / STEPS for s in range(STEPS)], 2)
    found = recorded_samples(features, ANCHORS, predictor)
    assert [sample.step.index for sample in found] == [2, 3, 5, 6, 7, 9, 10, 11]
    sample = found[3]
    assert sample.step.branches == (0, 1) and len(sample.queue) == 3
    for place, step in enumerate((3, 4, 5)):
        assert torch.equal(sample.queue[place], features[:, :, step].transpose(0, 1).flatten(0, 1))
    assert torch.equal(sample.target, features[:, :, 6].transpose(0, 1).flatten(0, 1))


def test_without_feedback_the_samples_hold_anchors_only():
    features = synthetic()
    predictor = factory(feedback=False)([1 - s / STEPS for s in range(STEPS)], 2)
    sample = recorded_samples(features, ANCHORS, predictor)[3]
    assert len(sample.queue) == 3
    for place, step in enumerate((0, 1, 4)):
        assert torch.equal(sample.queue[place], features[:, :, step].transpose(0, 1).flatten(0, 1))


def trained_predictor(recording: Path, **changes: Any) -> LesaPredictor:
    """One that forecasts unlike reuse."""
    header = Recording(recording).header
    predictor = factory(**changes)(header.sigmas, header.num_branches)
    with torch.no_grad():
        predictor.weight.normal_(std=0.2)
        predictor.offset.normal_(std=0.02)
    return predictor


@pytest.mark.parametrize("feedback", [True, False])
def test_the_second_phase_sees_what_a_deployed_run_sees(recording, feedback):
    source = Recording(recording)
    predictor = trained_predictor(recording, feedback=feedback)
    batch = [item_of(source, item) for item in source.items[:3]]
    call = References(source, []).settings
    pipe = pipeline("dit_guided")
    features = source.stack("feature/hidden", source.items[:3])
    collector = collect(pipe, predictor, "hidden", ANCHORS, batch, **call)
    deployed = Watching(predictor, "hidden", ANCHORS)
    session = Session(transformer_of(pipe), pipe.scheduler, deployed)
    try:
        latents = generate_batch(pipe, batch, output_type="latent", **call)[0]
    finally:
        session.detach()
    assert torch.equal(collector.final, latents)
    samples = collector.samples(features)
    assert len(samples) == STEPS - len(ANCHORS)
    for sample in samples:
        t = sample.step.index
        seen = [s for s in range(t) if feedback or s in ANCHORS][-3:]
        assert len(sample.queue) == len(seen)
        for step, feature in zip(seen, sample.queue, strict=True):
            assert torch.equal(feature, deployed.seen[step])
        forecast = predictor.correct(sample.queue, sample.step)
        torch.testing.assert_close(forecast, deployed.seen[t], atol=1e-5, rtol=1e-5)
        assert torch.equal(sample.target, torch.cat([features[:, 0, t], features[:, 1, t]]))


class Watching(Forecaster):
    """A plain forecaster that writes down the feature of every step."""

    def open(self, sigmas: list[float]) -> None:
        super().open(sigmas)
        self.seen: dict[int, torch.Tensor] = {}

    def observe(self, key, call, step, taps):
        super().observe(key, call, step, taps)
        self.seen[step.index] = taps["hidden"]

    def forecast(self, key, step):
        tap, feature = super().forecast(key, step)
        self.seen[step.index] = feature
        return tap, feature


def test_recorded_tokens_are_picked_from_the_run(recording):
    source = Recording(recording)
    predictor = trained_predictor(recording)
    batch = [item_of(source, item) for item in source.items[:2]]
    call = References(source, []).settings
    tokens = torch.tensor([0, 3])
    features = source.stack("feature/hidden", source.items[:2])
    pipe = pipeline("dit_guided")
    whole = collect(pipe, predictor, "hidden", ANCHORS, batch, **call).samples(features)
    some = collect(pipe, predictor, "hidden", ANCHORS, batch, tokens, **call)
    for all_of, part in zip(whole, some.samples(features[:, :, :, tokens]), strict=True):
        assert torch.equal(part.target, all_of.target[:, tokens])
        for mine, theirs in zip(part.queue, all_of.queue, strict=True):
            assert torch.equal(mine, theirs[:, tokens])


def test_two_calls_per_step_keep_a_queue_each(tmp_path):
    call = settings("flux_two_calls", STEPS)
    pipe = pipeline("flux_two_calls")
    everything = items("flux_two_calls", 2)
    options: dict[str, Any] = {"taps": ["hidden"], "features": "full"}
    source = Recording(record(pipe, everything, tmp_path / "flux", **options, **call))
    predictor = factory()(source.header.sigmas, 2)
    features = source.stack("feature/hidden")
    found = collect(pipe, predictor, "hidden", ANCHORS, everything, **call).samples(features)
    assert [sample.step.branches for sample in found[:4]] == [(0,), (1,), (0,), (1,)]
    for sample in found[:2]:  # nothing has been forecast before: all true features
        (branch,) = sample.step.branches
        for step, feature in zip((0, 1), sample.queue, strict=True):
            torch.testing.assert_close(feature, features[:, branch, step], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------ training


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
    errors = stage_errors(predictor, samples)
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


def data_items(recording: Path) -> tuple[list[int], list[int]]:
    data = data_for(recording)
    data.setup()
    return data.train_items, data.val_items


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


# ------------------------------------------------------------------------------------- export


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


# --------------------------------------------------------------------------- linear equivalent


def test_the_linear_equivalent_improves_on_the_windows_of_its_own_runs(recording):
    source = Recording(recording)
    pipe = pipeline("dit_guided")
    options: dict[str, Any] = {"window": 3, "num_stages": 2, "num_runs": 2, "batch_size": 4}
    found = refit(pipe, source, ANCHORS, source.items[:6], source.items[6:], **options)
    assert len(found) == 3
    references = References(source, source.items[6:])
    batch = references.batches[0]
    for predictor, error in found:
        run = collect(pipe, predictor, "hidden", ANCHORS, batch, **references.settings)
        measured = log_error(run.final, references.finals).mean()
        assert float(measured) == pytest.approx(error, abs=1e-4)
    assert min(error for _, error in found[1:]) < found[0][1]


def test_windows_of_a_run_without_forecasts_before_are_those_of_the_grams(recording):
    source = Recording(recording)
    features = source.stack("feature/hidden")
    predictor = factory()(source.header.sigmas, 2)
    expected = from_grams(source.stack("gram/hidden"), 3, ANCHORS)
    found = from_grams(torch.zeros_like(source.stack("gram/hidden")), 3, ANCHORS)
    add_samples(found, recorded_samples(features, ANCHORS, predictor))
    for name, part in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), part, rtol=1e-6, atol=1e-6)
