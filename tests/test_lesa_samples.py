"""LESA trains on what it will see: recorded or forecast features, branch by branch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lesa_training_cases import (
    ANCHORS,
    STEPS,
    factory,
    make_recording,
    synthetic,
    trained_predictor,
)
from tiny_hosts import items, pipeline, settings

from foreseer.evaluation.measure import References, item_of, log_error
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.observers import Observer, StepRecord
from foreseer.integration.session import Session
from foreseer.training.lesa.lesa_samples import collect, recorded_samples
from foreseer.training.lesa.linear_equivalent import add_samples, refit
from foreseer.training.lesa.stages import from_grams
from foreseer.trajectories.prompts import generate_batch
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    return make_recording(tmp_path_factory.mktemp("recording") / "tiny")


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


@pytest.mark.parametrize("feedback", [True, False])
def test_the_second_phase_sees_what_a_deployed_run_sees(recording, feedback):
    source = Recording(recording)
    predictor = trained_predictor(recording, feedback=feedback)
    batch = [item_of(source, item) for item in source.items[:3]]
    call = References(source, []).settings
    pipe = pipeline("dit_guided")
    features = source.stack("feature/hidden", source.items[:3])
    collector = collect(pipe, predictor, "hidden", ANCHORS, batch, **call)
    deployed = Watching()
    session = Session(pipe, Forecaster(predictor, "hidden", ANCHORS), [deployed])
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


class Watching(Observer):
    """Writes down the feature of every step."""

    wants_forecasts = True

    def __init__(self) -> None:
        self.seen: dict[int, torch.Tensor] = {}

    def on_step(self, record: StepRecord) -> None:
        (call,) = record.calls
        self.seen[record.index] = call.feature if call.taps is None else call.taps["hidden"]


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
