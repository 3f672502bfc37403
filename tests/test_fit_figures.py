"""Every fit shows its error per step, its weights and its anchors in TensorBoard."""

from pathlib import Path

import pytest
import torch
from lesa_training_cases import ANCHORS, STEPS, factory, trainer_for
from row_cases import errors_of, rows_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_hosts import items, pipeline, settings

from foreseer.evaluation.page import figures
from foreseer.evaluation.page.sheet import SMALLEST
from foreseer.predictors.base import Step
from foreseer.predictors.linear import L2P
from foreseer.predictors.neural import DiscaPredictor
from foreseer.training.closed_loop import L2PClosedLoop
from foreseer.training.continuous_fit import L2PContinuousModule, SeveralGrams
from foreseer.training.disca import disca_fit as disca
from foreseer.training.disca.disca_fit import DiscaModule
from foreseer.training.fit_figures import NUM_SAMPLES, SAMPLES, StepMeans
from foreseer.training.fit_report import FitReport
from foreseer.training.l2p import L2PAdam, L2PGramModule, L2PLeastSquares
from foreseer.training.lesa.lesa_fit import LesaModule
from foreseer.training.plumbing.progress import Board
from foreseer.trajectories.datamodule import GramDataModule, RecordingDataModule
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

ERRORS, LISTS = "figures/error_per_step", "figures/anchors"
WEIGHTS = {"figures/weights_branch_0", "figures/weights_branch_1"}


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    """Eight guided runs with all features of two taps."""
    out = tmp_path_factory.mktemp("figures") / "r"
    options = {"taps": ["hidden", "output"], "features": "full", "batch_size": 4}
    call = settings("dit_guided", STEPS)
    return record(pipeline("dit_guided"), items("dit_guided", 8), out, **options, **call)


def events(module, data, out: Path, max_epochs: int = 1, callbacks=()) -> EventAccumulator:
    """Fit, and read what TensorBoard was told."""
    logger = Board(str(out), name="", version="")
    trainer = trainer_for(max_epochs, logger=logger, log_every_n_steps=1, callbacks=list(callbacks))
    trainer.fit(module, datamodule=data)
    found = EventAccumulator(str(out), {"images": 0, "scalars": 0})
    found.Reload()
    return found


def epochs(found: EventAccumulator, tag: str) -> list[int]:
    return [image.step for image in found.Images(tag)]


def grams(recording: Path) -> GramDataModule:
    return GramDataModule(str(recording), "hidden", 0.3, 3)


def test_least_squares_draws_its_held_out_errors(recording, tmp_path, monkeypatch):
    drawn = []
    real = figures.step_errors
    monkeypatch.setattr(figures, "step_errors", lambda told: drawn.append(told) or real(told))
    module, data = L2PLeastSquares(str(recording), ANCHORS, "hidden"), grams(recording)
    found = events(module, data, tmp_path, callbacks=[FitReport(str(tmp_path / "report"))])
    assert {ERRORS, LISTS, "figures/fit_report"} | WEIGHTS == set(found.Tags()["images"])
    ((label, points),) = drawn[0].items()
    held_out = Recording(recording).stack("gram/hidden", data.val_items)
    errors = errors_of(held_out, module.predictor.weight).mean((0, 1))
    assert label == "held-out features, open loop"
    assert [step for step, _ in points] == list(range(STEPS))
    assert [error for _, error in points] == pytest.approx(errors.tolist(), rel=1e-9)
    assert [step for step, error in points if error == 0] == list(ANCHORS)


def test_a_long_fit_draws_rarely_and_at_its_end(recording, tmp_path):
    found = events(L2PAdam(str(recording), ANCHORS, "hidden"), grams(recording), tmp_path, 6)
    assert {ERRORS, LISTS} | WEIGHTS == set(found.Tags()["images"])
    for tag in found.Tags()["images"]:
        assert epochs(found, tag) == [0, 1, 3, 5]


def test_the_gram_fit_draws_the_weights_of_its_own_list(recording, tmp_path):
    found = events(L2PGramModule(str(recording), ANCHORS, "hidden"), grams(recording), tmp_path)
    assert {ERRORS, LISTS} | WEIGHTS == set(found.Tags()["images"])


def test_the_continuous_fit_draws_too(recording, tmp_path):
    module = L2PContinuousModule([str(recording)], ANCHORS, "hidden", num_lists=3)
    data = SeveralGrams([str(recording)], "hidden", 0.3, 3)
    assert {ERRORS, LISTS} | WEIGHTS == set(events(module, data, tmp_path).Tags()["images"])


def test_the_closed_loop_draws_every_epoch_that_is_due(recording, tmp_path):
    module = L2PClosedLoop(str(recording), "none", ANCHORS, "hidden", num_probe=2)
    module.pipe = pipeline("dit_guided")
    data = RecordingDataModule(recording, ["final"], 4, 0.3, 3)
    found = events(module, data, tmp_path, 3)
    assert {ERRORS, LISTS, SAMPLES} | WEIGHTS == set(found.Tags()["images"])
    assert epochs(found, ERRORS) == epochs(found, LISTS) == epochs(found, SAMPLES) == [0, 1, 2]
    told = set(found.Tags()["scalars"])
    assert told == {"train/error_db", "val/error_db", "val/gain_over_start_db"}
    count = min(NUM_SAMPLES, len(data.val_items))
    full, forecast = module.samples.full, module.samples._drawn(module.pipe)
    assert full.shape[0] == count and (full == forecast).all()  # the hooks are off again
    image = found.Images(SAMPLES)[-1]
    assert image.width > count * SMALLEST and image.height > 2 * SMALLEST


def test_lesa_draws_both_kinds_of_error_and_its_linear_part(recording, tmp_path, monkeypatch):
    drawn = []
    real = figures.step_errors
    monkeypatch.setattr(figures, "step_errors", lambda told: drawn.append(told) or real(told))
    module = LesaModule(
        str(recording), "none", ANCHORS, factory(), open_loop_epochs=1, closed_loop_epochs=0
    )
    module.pipe = pipeline("dit_guided")
    data = RecordingDataModule(recording, ["feature/hidden", "final"], 3, 0.3, 3)
    found = events(module, data, tmp_path)
    assert {ERRORS, LISTS, "gates"} | WEIGHTS == set(found.Tags()["images"])
    assert set(drawn[0]) == {"from recorded features", "in closed loop"}
    for points in drawn[0].values():
        assert [step for step, error in points if error == 0] == list(ANCHORS)


def test_disca_draws_errors_and_anchors_and_has_no_weights(recording, tmp_path, monkeypatch):
    monkeypatch.setattr(disca, "opened_for", lambda *_, **__: pipeline("dit_guided"))
    module = DiscaModule(str(recording), "none", ANCHORS, num_heads=1, max_gap=0.5, mse_epochs=1)
    data = RecordingDataModule(recording, ["feature/hidden", "feature/output", "final"], 2, 0.25, 3)
    found = events(module, data, tmp_path)
    assert {ERRORS, LISTS} == set(found.Tags()["images"])


def test_a_fit_without_tensorboard_draws_nothing(recording, monkeypatch):
    monkeypatch.setattr(figures, "step_errors", None)
    module = L2PLeastSquares(str(recording), ANCHORS, "hidden")
    trainer_for(1).fit(module, datamodule=grams(recording))


def test_step_means_count_every_batch():
    means = StepMeans()
    for error in (0.1, 0.3):
        means.add([(Step(3, 0.5, 6), torch.tensor(error)), (Step(1, 0.8, 6), torch.tensor(1.0))])
    assert means.by_step() == {1: 1.0, 3: pytest.approx(0.2)}


def test_weights_are_those_a_run_would_use():
    sigmas, anchors = [1 - t / STEPS for t in range(STEPS)], list(ANCHORS)
    learned = L2P(STEPS, anchors, 2)
    lesa = factory()(sigmas, 2)  # untrained: reuse
    forecast = [t for t in range(STEPS) if t not in anchors]  # rows of anchors are not used
    rows = rows_of(lesa, anchors, sigmas)
    assert torch.equal(rows_of(learned, anchors, sigmas)[:, forecast], learned.weight[:, forecast])
    assert torch.equal(rows[:, forecast], learned.weight[:, forecast])
    assert DiscaPredictor(8, 8, 1).rows(anchors, sigmas) is None
