"""A corrector of a masked model starts as reuse and learns from recorded decodings."""

import pytest
import torch
from digit_tasks import MASK
from masked_models import equal_prompts, small_model, unequal_prompts

import foreseer as fs
from foreseer.integration.masked_sampler import sample_masked
from foreseer.predictors.base import History, Step
from foreseer.predictors.neural import DiscaPredictor
from foreseer.training.disca.masked_fit import fit_corrector, record_decodings

LENGTH = 12


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def host(model):
    return fs.host(model, blocks="model.transformer.blocks", head="model.transformer.ln_f")


@pytest.fixture(scope="module")
def decodings(host):
    return record_decodings(host, equal_prompts(32), LENGTH)


def corrector(**changes):
    torch.manual_seed(0)
    return DiscaPredictor(32, 0, **{"num_heads": 2, "depth": 1, "max_gap": 0.5, **changes})


def test_a_recorded_decoding_is_what_the_model_was_given_and_what_entered_its_head(
    model, decodings
):
    assert decodings.ids.shape == (32, LENGTH, 26)
    masks = (decodings.ids == MASK).sum(-1)
    assert torch.equal(masks, torch.arange(12, 0, -1).expand(32, -1))
    parts = model.model["transformer"]
    with torch.no_grad():
        logits = parts["ff_out"](parts["ln_f"](decodings.hidden[:, 5]))
        torch.testing.assert_close(logits, model(decodings.ids[:, 5]).logits)


def test_without_modulation_a_fresh_predictor_is_reuse_and_needs_tokens_alone(decodings):
    made, history = corrector(), History(1)
    assert made.needs == {"tokens"}
    history.push(Step(0, 1.0, LENGTH), decodings.hidden[:, 0])
    tokens = torch.randn(32, 26, 32)
    step = Step(2, 1 - 2 / LENGTH, LENGTH, tokens=tokens)
    assert torch.equal(made(history, step), decodings.hidden[:, 0])
    with pytest.raises(ValueError, match="needs the tokens"):
        made(history, Step(2, 1 - 2 / LENGTH, LENGTH))


def test_a_fit_lowers_the_divergence_and_leaves_the_model_as_it_was(model, host, decodings):
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = []
    made = fit_corrector(
        corrector(), host, decodings, 3, 60, 16, tell=lambda _, loss: losses.append(loss)
    )
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert not made.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    moved = [name for name, p in made.named_parameters() if p.grad is not None]
    assert {"gap.weight", "fuse.0.weight", "blocks.0.modulate.weight", "out.weight"} <= set(moved)


def decoded(host, predictor, anchors=(0, 4, 8)):
    with fs.forecasting(host, predictor, anchors) as run, run.steps(LENGTH) as steps:
        found = sample_masked(host.module, equal_prompts(), LENGTH, LENGTH, clock=steps)
    assert run.report().anchors == list(anchors)
    return found.responses


def test_a_fresh_one_decodes_as_several_tokens_an_evaluation_and_a_fitted_one_is_a_file(
    model, host, decodings, tmp_path
):
    made = fit_corrector(corrector(), host, decodings, 4, 1, learning_rate=0.0)
    parallel = sample_masked(model, equal_prompts(), LENGTH, 3).responses
    assert torch.equal(decoded(host, made), parallel)
    torch.nn.init.normal_(made.out.weight, std=30.0)
    moved = decoded(host, made)
    assert not torch.equal(moved, parallel)  # it is asked
    fs.save(made, str(tmp_path / "corrector"))
    assert torch.equal(decoded(host, fs.load(str(tmp_path / "corrector"))), moved)
    other = fs.host(small_model(seed=3), blocks="model.transformer.blocks")
    with pytest.raises(fs.PredictorMismatch, match="weights"):
        decoded(other, made)
    with pytest.raises(ValueError, match="where its blocks and its head are"):
        fit_corrector(corrector(), other, decodings, 4, 1)


@pytest.mark.parametrize("horizon", [0, 7, 12])
def test_a_horizon_out_of_reach_is_refused(host, decodings, horizon):
    with pytest.raises(ValueError, match=f"horizon is {horizon}"):
        fit_corrector(corrector(), host, decodings, horizon, 1)


def test_padded_decodings_are_recorded_with_their_mask(host):
    found = record_decodings(host, unequal_prompts(), LENGTH)
    assert found.attended.tolist()[0] == [0] * 13 + [1] * 26
    assert found.attended.tolist()[1] == [1] * 39
