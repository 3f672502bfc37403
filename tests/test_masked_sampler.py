"""Masked decoding: what is committed when, padding changes nothing, and every fault in words."""

from dataclasses import replace

import pytest
import torch
from digit_tasks import EQUALS, MASK, PAD  # noqa: I001
from masked_model import MaskedLanguageModel, Output
from masked_models import equal_prompts, small_model, unequal_prompts

from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.integration.masked_sampler import sample_masked


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def prompts():
    return equal_prompts()


class Reused:
    """Logits of every k-th call, as a reused hidden state gives them."""

    def __init__(self, model, every):
        self.model, self.every, self.config, self.calls = model, every, model.config, 0

    def __call__(self, **kwargs):
        if self.calls % self.every == 0:
            self.logits = self.model(**kwargs).logits
        self.calls += 1
        return Output(self.logits.clone())


@pytest.mark.parametrize("every", [2, 4])
@pytest.mark.parametrize("block", [4, 12])
def test_reuse_every_k_steps_commits_what_k_tokens_an_evaluation_commit(
    model, prompts, every, block
):
    reused = sample_masked(Reused(model, every), prompts, 12, steps=12, block=block)
    parallel = sample_masked(model, prompts, 12, steps=12 // every, block=block)
    assert torch.equal(reused.responses, parallel.responses)
    assert torch.equal(reused.committed_at // every, parallel.committed_at)


def test_every_step_commits_its_share_of_the_first_open_block(model, prompts):
    found = sample_masked(model, prompts, 12, steps=4, block=6)
    per_step = torch.stack([(found.committed_at == i).sum(1) for i in range(4)])
    assert torch.equal(per_step, torch.full((4, 3), 3))
    assert bool((found.committed_at[:, :6] < 2).all())
    assert bool((found.committed_at[:, 6:] >= 2).all())
    uneven = sample_masked(model, prompts, 12, steps=5)
    assert [int((uneven.committed_at[0] == i).sum()) for i in range(5)] == [3, 3, 2, 2, 2]


def test_the_most_confident_tokens_are_committed_and_never_change(model, prompts):
    ids = torch.cat([prompts, torch.full((3, 12), MASK)], 1)
    logits = model(ids).logits[:, -12:]
    logits[..., MASK] = -torch.inf
    confidence, tokens = logits.softmax(-1).max(-1)
    found = sample_masked(model, prompts, 12, steps=3)
    first = found.committed_at == 0
    expected = torch.zeros_like(first).scatter_(1, confidence.topk(4).indices, True)
    assert torch.equal(first, expected)
    assert torch.equal(found.responses[first], tokens[first])


def test_a_threshold_commits_all_that_is_sure_and_at_least_one(model, prompts):
    none_sure = sample_masked(model, prompts, 12, 12, commit="threshold", threshold=0.9999)
    assert none_sure.evaluations.tolist() == [12, 12, 12]
    one_by_one = sample_masked(model, prompts, 12, 12)
    assert torch.equal(none_sure.responses, one_by_one.responses)
    all_sure = sample_masked(model, prompts, 12, 12, commit="threshold", threshold=1e-4)
    assert all_sure.evaluations.tolist() == [1, 1, 1]  # everything is committed at step 0
    blocks = sample_masked(model, prompts, 12, 12, 4, commit="threshold", threshold=1e-4)
    assert blocks.evaluations.tolist() == [3, 3, 3]


@pytest.mark.parametrize("commit", ["confidence", "threshold"])
def test_unequal_prompts_padded_into_one_batch_decode_as_one_by_one(model, commit):
    rows = unequal_prompts()
    settings = {"steps": 12, "block": 6, "commit": commit, "threshold": 0.3}
    together = sample_masked(model, rows, 12, **settings)
    for i, row in enumerate(rows):
        alone = sample_masked(model, row[None], 12, **settings)
        assert torch.equal(together.responses[i], alone.responses[0])
        assert torch.equal(together.committed_at[i], alone.committed_at[0])


def changed(model, **settings):
    """The same weights under another configuration."""
    other = MaskedLanguageModel(model.config)
    other.load_state_dict(model.state_dict())
    other.config = replace(model.config, **settings)
    return other


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"block": 24}, "12 tokens does not divide into blocks of 24"),
        ({"block": 10}, "does not divide into blocks of 10"),
        ({"commit": "entropy"}, "commit is 'entropy'"),
        ({"commit": "threshold", "threshold": 1.0}, "threshold 1.0"),
        ({"steps": 13}, "13 steps do not fit"),
        ({"steps": 10, "block": 4}, "a multiple of 3 from 3 to 12"),
        ({"steps": 3, "commit": "threshold", "threshold": 0.9999}, "tokens are still masked"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(model, prompts, settings, told):
    with pytest.raises(ValueError, match=told):
        sample_masked(model, prompts, 12, **{"steps": 12, **settings})


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"mask_token_id": None}, "mask_token_id = None"),
        ({"max_sequence_length": 25}, "makes 26, but the model was trained on at most 25"),
    ],
)
def test_a_model_that_cannot_serve_the_prompt_is_refused(model, prompts, config, told):
    with pytest.raises(ValueError, match=told):
        sample_masked(changed(model, **config), prompts, 12, 12)


def test_prompts_may_be_lists_of_ids(model, prompts):
    expected = sample_masked(model, [prompts[0], prompts[1][1:]], 12, 4).responses
    listed = [prompts[0].tolist(), prompts[1][1:].tolist()]
    assert torch.equal(sample_masked(model, listed, 12, 4).responses, expected)


def test_prompts_without_tokens_or_without_a_padding_id_are_refused(model, prompts):
    with pytest.raises(ValueError, match="no empty one"):
        sample_masked(model, [prompts[0], prompts[0, :0]], 12, 12)
    with pytest.raises(ValueError, match="pad_token_id = None"):
        sample_masked(changed(model, pad_token_id=None), [prompts[0], prompts[0, 3:]], 12, 12)


def test_logits_that_are_no_numbers_are_refused_where_they_appear(model, prompts):
    other = changed(model)
    with torch.no_grad():
        other.get_input_embeddings().weight[EQUALS] = torch.nan
    with pytest.raises(ValueError, match="logits of 36 of 36 response tokens .* at step 0"):
        sample_masked(other, prompts, 12, 12)


class Causal(MaskedLanguageModel):
    """Every token sees only those before it."""

    def forward(self, input_ids, attention_mask=None):
        logits = torch.stack(
            [
                super(Causal, self).forward(input_ids[:, : i + 1]).logits[:, -1]
                for i in range(input_ids.shape[1])
            ],
            1,
        )
        return Output(logits)


def test_a_causal_model_is_refused(model, prompts):
    causal = Causal(model.config)
    with pytest.raises(UnsupportedHost, match="its attention is causal"):
        sample_masked(causal, prompts, 12, 12)


class Speechless(Reused):
    def __call__(self, **kwargs):
        return {}


def test_a_model_without_logits_is_refused(model, prompts):
    with pytest.raises(UnsupportedHost, match="returned dict, expected logits"):
        sample_masked(Speechless(model, 1), prompts, 12, 12)


def test_masks_are_never_committed(model, prompts):
    other = changed(model)
    with torch.no_grad():
        other.model["transformer"]["ff_out"].weight[MASK] = 50 * torch.randn(32)
    assert not bool((sample_masked(other, prompts, 12, 4).responses == MASK).any())
    assert PAD != MASK
