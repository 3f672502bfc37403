"""A corrector of a masked model starts as its last block, and learns from recorded decodings."""

import copy
import json
import threading

import pytest
import torch
from digit_tasks import MASK
from masked_models import equal_prompts, small_model, unequal_prompts

import foreseer as fs
from foreseer.integration.masked_sampler import sample_masked
from foreseer.predictors.base import History, Step
from foreseer.predictors.neural import DiscaPredictor, OffsetDisca
from foreseer.predictors.rules import Reuse
from foreseer.predictors.tuned_block import TunedLastBlock
from foreseer.training.disca.masked_fit import fit_corrector, record_decodings

LENGTH = 12
TAP = "before_last"


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def host(model):
    return fs.host(model, blocks="model.transformer.blocks", head="model.transformer.ln_f")


@pytest.fixture(scope="module")
def decodings(host):
    return record_decodings(host, equal_prompts(32), LENGTH)


def parts_of(model):
    return model.model["transformer"]


def last_block(model, ids, added, attended=None):
    """The logits of the last block on embeddings and what is added to them, written out."""
    parts, kept = parts_of(model), parts_of(model)["blocks"]
    seen = []
    handle = kept[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(ids, attended)
        handle.remove()
        (embedded, kwargs) = seen[0]
        return parts["ff_out"](parts["ln_f"](kept[-1](embedded + added, **kwargs)))


def test_a_recorded_decoding_is_what_the_model_was_given_and_what_entered_its_last_block(
    model, decodings
):
    assert decodings.ids.shape == (32, LENGTH, 26)
    masks = (decodings.ids == MASK).sum(-1)
    assert torch.equal(masks, torch.arange(12, 0, -1).expand(32, -1))
    parts = parts_of(model)
    with torch.no_grad():
        expected = model(decodings.ids[:, 5]).logits
        logits = parts["ff_out"](parts["ln_f"](decodings.hidden[:, 5]))
    torch.testing.assert_close(logits, expected)
    again = last_block(model, decodings.ids[:, 5], decodings.before_last[:, 5])
    torch.testing.assert_close(again, expected)


class Logits:
    """The model, and the logits of its calls."""

    def __init__(self, model):
        self.model, self.config, self.calls = model, model.config, []

    def __call__(self, **kwargs):
        output = self.model(**kwargs)
        self.calls.append((kwargs, output.logits))
        return output


def decoded(host, predictor, prompts, anchors=(0, 4, 8)):
    seen = Logits(host.module)
    with fs.forecasting(host, predictor, anchors, TAP) as run, run.steps(LENGTH) as steps:
        found = sample_masked(seen, prompts, LENGTH, LENGTH, clock=steps)
    assert run.report().anchors == list(anchors)
    return found.responses, seen.calls


@pytest.mark.parametrize("prompts", [equal_prompts(), unequal_prompts()])
def test_between_anchors_the_last_block_runs_on_what_was_committed_under_the_calls_own_mask(
    model, host, prompts
):
    _, calls = decoded(host, Reuse(), prompts)
    (first, _), (later, logits) = calls[4], calls[6]
    parts, entered = parts_of(model), []
    for place in (0, -1):
        hook = parts["blocks"][place].register_forward_pre_hook(
            lambda module, args: entered.append(args[0])
        )
        with torch.no_grad():
            model(**first)
        hook.remove()
    wanted = last_block(model, later["input_ids"], entered[1] - entered[0], later["attention_mask"])
    kept = later["attention_mask"].bool()
    torch.testing.assert_close(logits[kept], wanted[kept])


def test_a_fresh_corrector_is_the_models_own_last_block(model, host):
    block = parts_of(model)["blocks"][-1]
    own = TunedLastBlock.of(4, block, 0.5, 26)
    step = Step(2, 0.9, LENGTH, tokens=torch.randn(1, 2, 4))
    assert all(torch.equal(w, own.block_weights[n]) for n, w in block.named_parameters())
    with pytest.raises(ValueError, match="history is empty"):
        own(History(1), step)
    history = History(1)
    history.push(Step(0, 1.0, LENGTH), torch.ones(1, 2, 4))
    assert torch.equal(own(history, step), torch.ones(1, 2, 4))
    with pytest.raises(ValueError, match=r"is 0\.700 in sigma after the newest anchor"):
        own(history, Step(8, 0.3, LENGTH, tokens=step.tokens))
    with pytest.raises(ValueError, match="without its tokens"):
        own(history, Step(2, 0.9, LENGTH))
    with pytest.raises(ValueError, match="found width 4, 0 weights"):
        TunedLastBlock(4, {}, 0.5, 26)


def test_a_fit_lowers_the_divergence_and_leaves_the_model_as_it_was(model, host, decodings):
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = []
    made = fit_corrector(host, decodings, 3, 60, 16, tell=lambda _, loss: losses.append(loss))
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in made.parameters())


def test_it_decodes_as_the_last_block_until_fitted_and_a_fitted_one_is_a_file(
    model, host, decodings, tmp_path
):
    made = fit_corrector(host, decodings, 4, 1, learning_rate=0.0)
    own, _ = decoded(host, Reuse(), equal_prompts())
    assert torch.equal(decoded(host, made, equal_prompts())[0], own)
    for weight in made.parameters():
        torch.nn.init.normal_(weight)
    moved, _ = decoded(host, made, equal_prompts())
    assert not torch.equal(moved, own)  # its weights are used
    fs.save(made, str(tmp_path / "corrector"))
    loaded = fs.load(str(tmp_path / "corrector"))
    assert torch.equal(decoded(host, loaded, equal_prompts())[0], moved)
    other = fs.host(small_model(seed=3), blocks="model.transformer.blocks")
    with pytest.raises(fs.PredictorMismatch, match="weights"):
        decoded(other, loaded, equal_prompts())


def test_a_padded_batch_is_corrected_as_one_by_one(host):
    rows = unequal_prompts()
    made = fit_corrector(host, record_decodings(host, rows, LENGTH), 4, 20, 16)
    together, _ = decoded(host, made, rows)
    for i, row in enumerate(rows):
        assert torch.equal(together[i], decoded(host, made, row[None])[0][0])


def test_a_prompt_longer_than_those_of_the_fit_is_refused(host, decodings):
    made = fit_corrector(host, decodings, 4, 1, learning_rate=0.0)
    with pytest.raises(ValueError, match="response are 39 tokens, .* fitted on at most 26"):
        decoded(host, made, unequal_prompts()[1][None])


@pytest.mark.parametrize("horizon", [0, 12])
def test_a_horizon_out_of_reach_is_refused(host, decodings, horizon):
    with pytest.raises(ValueError, match=f"horizon is {horizon}"):
        fit_corrector(host, decodings, horizon, 1)


def test_padded_decodings_are_recorded_with_their_mask(host):
    found = record_decodings(host, unequal_prompts(), LENGTH)
    assert found.attended.tolist()[0] == [0] * 13 + [1] * 26
    assert found.attended.tolist()[1] == [1] * 39


def test_weights_of_a_block_go_with_its_tap_alone(model, host):
    made = TunedLastBlock.of(32, parts_of(model)["blocks"][-1], 0.5, 26)
    made.learned = False  # without a fit
    with pytest.raises(ValueError, match="has weights for the last block"):
        fs.attach(host, made, [0], "hidden")
    with pytest.raises(ValueError, match="exist on the tap 'hidden' or 'before_last'"):
        fs.attach(host, made, [0], "output")
    with pytest.raises(ValueError, match="'before_last' does not go with"):
        fs.attach(host, Reuse(), [0], TAP, schedule=fs.schedules.FirstBlock(0.1))


def test_a_corrector_of_an_earlier_release_is_still_read_and_none_is_built_without_modulation(
    tmp_path, host, decodings
):
    made = OffsetDisca(32, num_heads=2, depth=1, max_gap=0.5)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    spec = fit_corrector(host, decodings, 4, 1, learning_rate=0.0).spec
    made.spec = type(spec)(**{**vars(spec), "tap": "hidden"})
    fs.save(made, str(tmp_path / "old"))
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    config["arguments"]["modulation_width"] = 0
    old = {**config, "schema_version": 7, "predictor_class": "DiscaPredictor"}
    path.write_text(json.dumps(old))
    loaded = fs.load(str(tmp_path / "old"))
    history, tokens = History(1), torch.randn(2, 5, 32)
    history.push(Step(0, 1.0, LENGTH), torch.randn(2, 5, 32))
    step = Step(2, 1 - 2 / LENGTH, LENGTH, tokens=tokens)
    assert type(loaded) is OffsetDisca
    assert torch.equal(loaded(history, step), made(history, step))
    with pytest.raises(ValueError, match="modulation_width 0"):
        DiscaPredictor(32, 0, num_heads=2)


@pytest.mark.fault
def test_decodings_of_another_model_and_what_is_no_host_are_refused(model, host, decodings):
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    elsewhere = fs.host(other, blocks="model.transformer.blocks", head="model.transformer.ln_f")
    with pytest.raises(ValueError, match="decodings are those of another model"):
        fit_corrector(elsewhere, decodings, num_steps=1)
    with pytest.raises(ValueError, match="expected the host of a masked language model"):
        fit_corrector(model, decodings, num_steps=1)
    with pytest.raises(ValueError, match="expected the host of a masked language model"):
        record_decodings(model, equal_prompts(), LENGTH)


@pytest.mark.fault
def test_no_other_thread_calls_the_model_during_a_fit(model, host, decodings):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = []

    def call(number, loss):
        def run():
            try:
                model(decodings.ids[:1, 0])
            except ValueError as error:
                told.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    fit_corrector(host, decodings, num_steps=2, tell=call)
    assert len(told) == 2 and "fitted on in another thread" in told[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(decodings.ids[:1, 0])


@pytest.mark.fault
def test_a_clock_of_another_number_of_steps_is_refused(model, host):
    with host.steps(LENGTH) as steps, pytest.raises(ValueError, match="steps and steps is 6"):
        sample_masked(model, equal_prompts(), LENGTH, LENGTH // 2, clock=steps)
    with pytest.raises(ValueError, match="still masked after 3 steps"):
        sample_masked(model, equal_prompts(), LENGTH, LENGTH, clock=range(3))
