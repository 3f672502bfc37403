"""Left-out errors from Grams are those of refits without each trajectory, and name bad shards."""

import pytest
import torch
from lightning import Trainer
from recording_cases import small_header
from row_cases import errors_of, rows_fitted, rows_of

from foreseer.predictors.any_anchors import L2PGram
from foreseer.predictors.rules import Taylor
from foreseer.predictors.solve import segments
from foreseer.training.cross_validation import RIDGES, cross_validate, left_out_errors
from foreseer.training.l2p import L2PLeastSquares
from foreseer.trajectories.datamodule import GramDataModule
from foreseer.trajectories.files.writer import RecordingWriter
from foreseer.trajectories.gram import gram, relative_errors

STEPS, ANCHORS, NUM = 12, [0, 1, 4, 8], 7
SIGMAS = [1 - i / STEPS for i in range(STEPS)]


def grams_of(num: int = NUM, parts: int = 1, seed: int = 0) -> torch.Tensor:
    """Grams (num, 2, parts, S, S) of smooth features."""
    random = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, STEPS, dtype=torch.float64)[:, None]
    shape = (num, 2, parts, 1, 40)
    a, b, c = torch.randn(3, *shape, dtype=torch.float64, generator=random)
    noise = torch.randn(num, 2, parts, STEPS, 40, dtype=torch.float64, generator=random)
    return gram(a + b * t + 0.5 * c * (4 * t).sin() + 0.02 * noise)


def without(grams: torch.Tensor, place: int) -> torch.Tensor:
    return torch.cat([grams[:place], grams[place + 1 :]])


@pytest.mark.parametrize("ridge", [1e-6, 1e-4, 1e-1])
def test_left_out_errors_are_those_of_refits_without_each_trajectory(ridge):
    grams = grams_of()
    found = left_out_errors(grams.sum(0), grams, ANCHORS, [1.0, ridge])[1]
    for place in range(NUM):
        rows = rows_fitted(without(grams, place)[:, :, 0], ANCHORS, ridge)
        expected = errors_of(grams[place : place + 1, :, 0], rows).mean()
        # c^T G c cancels to about 1e-16 of G, so errors of 1e-2 are good to 1e-12 relative; the
        # ridge bounds what solving adds.
        assert float(found[place]) == pytest.approx(float(expected), rel=1e-9)


def test_without_a_ridge_they_agree_as_far_as_the_condition_lets_them():
    grams = grams_of()
    found = left_out_errors(grams.sum(0), grams, ANCHORS, [0.0])[0]
    for place in range(NUM):
        rows = rows_fitted(without(grams, place)[:, :, 0], ANCHORS, 0.0)
        expected = errors_of(grams[place : place + 1, :, 0], rows).mean()
        assert float(found[place]) == pytest.approx(float(expected), rel=1e-7)


def test_parts_are_solved_apart_and_their_errors_add_up():
    grams = grams_of(parts=3)
    found = left_out_errors(grams.sum(0), grams, ANCHORS, [1e-4])[0]
    for place in range(NUM):
        rows = rows_fitted(without(grams, place), ANCHORS, 1e-4)
        expected = relative_errors(grams[place : place + 1], rows).mean()
        assert float(found[place]) == pytest.approx(float(expected), rel=1e-9)


def test_several_transformers_see_their_own_anchors():
    grams, starts = grams_of(), [0, 4]
    found = left_out_errors(grams.sum(0), grams, ANCHORS, [1e-4], starts)[0]
    for place in range(NUM):
        rows = rows_fitted(without(grams, place)[:, :, 0], ANCHORS, 1e-4, starts)
        expected = errors_of(grams[place : place + 1, :, 0], rows).mean()
        assert float(found[place]) == pytest.approx(float(expected), rel=1e-9)


def test_a_window_is_that_of_the_predictor_that_solves_while_sampling():
    grams = grams_of()
    found = left_out_errors(grams.sum(0), grams, ANCHORS, [1e-4], window=2)[0]
    predictor = L2PGram(STEPS, 2, 1e-4, window=2)
    for place in range(NUM):
        predictor.set_gram(without(grams, place)[:, :, 0].mean(0))
        rows = rows_of(predictor, ANCHORS, SIGMAS)
        expected = errors_of(grams[place : place + 1, :, 0], rows).mean()
        assert float(found[place]) == pytest.approx(float(expected), rel=1e-9)


def test_segments_cover_every_forecast_step_once():
    found = segments([0, 1, 4, 8], STEPS, (0, 4))
    assert found == [([0, 1], [2, 3]), ([4], [5, 6, 7]), ([4, 8], [9, 10, 11])]
    assert segments([0, 1, 4, 8], STEPS, window=2)[-1] == ([4, 8], [9, 10, 11])


def test_a_formula_begins_anew_with_every_transformer():
    rows = Taylor(1).rows(ANCHORS, SIGMAS, (0, 4))[0, 0]
    assert not rows[4:, :4].any()
    assert rows[5, 4] == 1.0  # one anchor so far: reuse
    assert rows[9, 8] > 1.0


# ----------------------------------------------------------------------------------- what it tells


def chunked(grams: torch.Tensor, size: int):
    for first in range(0, len(grams), size):
        part = grams[first : first + size]
        yield [f"item {first + i}" for i in range(len(part))], part


def test_the_best_ridge_does_not_depend_on_the_chunks():
    grams = grams_of()
    whole = cross_validate(grams.sum(0), chunked(grams, NUM), ANCHORS)
    pieces = cross_validate(grams.sum(0), chunked(grams, 2), ANCHORS)
    assert torch.equal(whole.errors, pieces.errors) and whole.items == pieces.items
    assert whole.errors.shape == (len(RIDGES), NUM)
    assert whole.ridge == RIDGES[int(whole.errors.mean(1).argmin())]
    assert whole.standing_out == {}
    assert "least at" in whole.lines()[0] and len(whole.lines()) == 1


BAD = {
    "noise": lambda g: gram(torch.randn(2, 1, STEPS, 40, dtype=torch.float64)),
    "loud noise": lambda g: 1e4 * gram(torch.randn(2, 1, STEPS, 40, dtype=torch.float64)),
}


@pytest.mark.parametrize("kind", ["noise", "loud noise"])
def test_a_bad_shard_is_named_and_dropping_it_restores_the_fit(kind):
    torch.manual_seed(3)
    grams = grams_of(20)
    fresh = grams_of(10, seed=1)[:, :, 0]
    spoiled = grams.clone()
    spoiled[5] = BAD[kind](grams[5])
    found = cross_validate(spoiled.sum(0), chunked(spoiled, 8), ANCHORS)
    assert list(found.standing_out) == ["item 5"]
    assert "item 5 stands out" in found.lines()[1]

    def error(*places: int) -> float:
        kept = spoiled[[i for i in range(20) if i not in places]][:, :, 0]
        return float(errors_of(fresh, rows_fitted(kept, ANCHORS)).mean())

    clean = rows_fitted(without(grams, 5)[:, :, 0], ANCHORS)
    restored = rows_fitted(without(spoiled, 5)[:, :, 0], ANCHORS)
    assert torch.equal(restored, clean)
    assert error() > 1.3 * error(5)


def test_nothing_left_out_or_nothing_left_is_refused():
    grams = grams_of(1)
    with pytest.raises(ValueError, match="nothing is left of the sum without any one of 1"):
        cross_validate(grams.sum(0), chunked(grams, 1), ANCHORS)
    with pytest.raises(ValueError, match="found no trajectories"):
        cross_validate(grams.sum(0), [], ANCHORS)
    with pytest.raises(ValueError, match=r"the ridges are \[-1.0\]"):
        cross_validate(grams.sum(0), chunked(grams, 1), ANCHORS, [-1.0])


# ------------------------------------------------------------------------------------ in the fit


def test_a_fit_without_a_ridge_takes_the_cross_validated_one(tmp_path, capsys):
    guidance = {"class": "FlowMatchEulerDiscreteScheduler", "guidance_scale": 3.0}
    header = small_header(sigmas=SIGMAS, taps=["output"], num_branches=2, scheduler=guidance)
    grams = grams_of(12)[:, :, 0].contiguous()
    with RecordingWriter(tmp_path / "recording", header) as writer:
        for item, each in enumerate(grams):
            writer.write(item, {"gram/output": each}, {"seed": item})
    module = L2PLeastSquares(str(tmp_path / "recording"), ANCHORS, ridge=None)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = GramDataModule(tmp_path / "recording", validation_fraction=0.0)
    trainer.fit(module, datamodule=data)
    expected = cross_validate(grams[:, :, None].sum(0), chunked(grams[:, :, None], 64), ANCHORS)
    rows = rows_fitted(grams, ANCHORS, expected.ridge)
    torch.testing.assert_close(module.predictor.weight, rows, rtol=1e-9, atol=1e-9)
    assert float(trainer.callback_metrics["train/ridge"]) == pytest.approx(expected.ridge)
    assert f"least at {expected.ridge:g}" in capsys.readouterr().out
