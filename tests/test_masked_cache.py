"""dLLM-Cache equals a literal reference of its section 3, and is exact where nothing is kept."""

import threading

import pytest
import torch
from digit_tasks import MASK, PAD  # noqa: I001
from masked_model import layout
from masked_models import equal_prompts, small_model, unequal_prompts
from torch.nn.functional import cosine_similarity, pad, silu

from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.integration.masked_cache import dllm_cache, prompt_drift
from foreseer.integration.masked_sampler import sample_masked

LENGTH = 12


class Reference:
    """dLLM-Cache for one model, written as the paper's algorithm: heads expanded, sums by hand."""

    def __init__(self, model, prompt_every, response_every, ratio):
        self.parts, self.config = model.model["transformer"], model.config
        self.rotary = model.rotary
        self.every, self.ratio, self.kept, self.t = (prompt_every, response_every), ratio, {}, 0

    def __call__(self, input_ids, attention_mask):
        position, segment = layout(input_ids)
        x = self.parts["wte"](input_ids) + self.parts["segment"](segment)
        self.cos, self.sin = (r[:, 0] for r in self.rotary(position))
        self.seen, self.start = attention_mask.bool(), input_ids.shape[1] - LENGTH
        for number, block in enumerate(self.parts["blocks"]):
            x = torch.stack([self.block(number, block, b, row) for b, row in enumerate(x)])
        self.t += 1
        return self.parts["ff_out"](self.parts["ln_f"](x))

    def block(self, number, block, b, x):
        prompt, response = (number == 0 or self.t % every == 0 for every in self.every)
        n, start = len(x), self.start
        old = self.kept.get((number, b))
        normed = block.attn_norm(x)
        rows = list(range(start)) if prompt else []
        value = torch.zeros(n, block.v_proj.out_features) if old is None else old["v"].clone()
        if prompt:
            value[:start] = block.v_proj(normed[:start])
        if response:
            value[start:] = block.v_proj(normed[start:])
            rows += range(start, n)
        elif int(self.ratio * LENGTH):
            new = block.v_proj(normed[start:])
            likeness = cosine_similarity(new, old["v"][start:], dim=-1)
            rows += (start + likeness.argsort()[: int(self.ratio * LENGTH)]).tolist()
            value[start:] = new
        key = torch.zeros_like(value) if old is None else old["k"].clone()
        attention = torch.zeros_like(x) if old is None else old["attention"].clone()
        mlp = torch.zeros_like(x) if old is None else old["mlp"].clone()
        key[rows] = block.k_proj(normed[rows])
        heads, groups = self.config.num_heads, self.config.num_key_value_heads
        query = self.turn(block.q_proj(normed[rows]), heads, b, rows)
        keys = self.turn(key, groups, b, list(range(n))).repeat_interleave(heads // groups, 0)
        values = (
            value.view(n, groups, value.shape[1] // groups)
            .transpose(0, 1)
            .repeat_interleave(heads // groups, 0)
        )
        scores = query @ keys.transpose(1, 2) / block.head_width**0.5
        weights = scores.masked_fill(~self.seen[b], -torch.inf).softmax(-1)
        mixed = (weights @ values).transpose(0, 1).flatten(1)
        attention[rows] = block.attn_out(mixed)
        x = x + attention
        z = block.ff_norm(x[rows])
        mlp[rows] = block.ff_out(silu(block.ff_proj(z)) * block.up_proj(z))
        self.kept[number, b] = {"k": key, "v": value, "attention": attention, "mlp": mlp}
        return x + mlp

    def turn(self, x, heads, b, rows):
        """Heads first, turned by the angles of the rows' positions."""
        x = x.view(len(x), heads, x.shape[1] // heads).transpose(0, 1)
        first, second = x.chunk(2, -1)
        return x * self.cos[b, rows] + torch.cat([-second, first], -1) * self.sin[b, rows]


def decodings(prompts, seed=0, steps=7):
    """Ids and attention mask of every step of a decoding of one to four random tokens a step."""
    most = max(len(row) for row in prompts)
    rows = torch.stack([pad(row, (most - len(row), 0), value=PAD) for row in prompts])
    ids = torch.cat([rows, torch.full((len(rows), LENGTH), MASK)], 1)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        found.append((ids.clone(), (ids != PAD).long()))
        for row in ids:
            places = most + torch.randint(LENGTH, (4,), generator=generator)
            row[places] = torch.randint(10, (4,), generator=generator)
    return found


@pytest.fixture(scope="module")
def model():
    return small_model(num_layers=4)


@pytest.mark.parametrize(
    ("prompt_every", "response_every", "ratio"),
    [(1, 3, 0.34), (3, 1, 0.25), (3, 2, 0.3), (9, 9, 0.0)],
)
@torch.no_grad()
def test_every_step_equals_the_reference_with_padding_and_grouped_queries(
    model, prompt_every, response_every, ratio
):
    reference = Reference(model, prompt_every, response_every, ratio)
    probe = unequal_prompts()
    settings = (prompt_every, response_every, ratio, probe, float("inf"))
    with dllm_cache(model, LENGTH, *settings) as run:
        for ids, attended in decodings(probe, steps=5):
            found = model(ids, attended).logits
            expected = reference(ids, attended)
            real = attended.bool()
            torch.testing.assert_close(found[real], expected[real], atol=2e-4, rtol=1e-4)
    assert 0.2 < run.share < 0.95


@torch.no_grad()
def test_nothing_kept_is_bit_equal_and_all_of_the_response_is_equal_up_to_rounding(model):
    prompts = equal_prompts()
    steps = decodings(prompts)
    plain = [model(ids, seen).logits for ids, seen in steps]
    with dllm_cache(model, LENGTH, 1, 1) as run:
        for (ids, seen), expected in zip(steps, plain, strict=True):
            assert torch.equal(model(ids, seen).logits, expected)
    assert run.share == 1
    with dllm_cache(model, LENGTH, 1, 99, 1.0):
        for (ids, seen), expected in zip(steps, plain, strict=True):
            torch.testing.assert_close(model(ids, seen).logits, expected, atol=2e-4, rtol=1e-5)
    assert torch.equal(model(*steps[0]).logits, plain[0])  # and nothing is left behind
    assert all("forward" not in vars(module) for module in model.modules())


def decoded(model, prompts, **settings):
    with dllm_cache(model, LENGTH, **settings) as run:
        return sample_masked(model, prompts, LENGTH, LENGTH).responses, run


def test_a_second_decoding_and_an_interrupted_one_start_anew(model):
    prompts, settings = equal_prompts(), {"prompt_every": 1, "response_every": 6}
    first, _ = decoded(model, prompts, **settings)
    with dllm_cache(model, LENGTH, **settings) as run:
        for _ in range(2):
            assert torch.equal(sample_masked(model, prompts, LENGTH, LENGTH).responses, first)
        with torch.no_grad():
            for ids, seen in decodings(prompts, steps=3):
                model(ids, seen)
        assert torch.equal(sample_masked(model, prompts, LENGTH, LENGTH).responses, first)
        assert run.steps == 3 * LENGTH + 3
        assert run.state_bytes() == 4 * 3 * 26 * (2 * 32 + 2 * 16) * 4


def test_a_padded_batch_decodes_as_one_by_one(model):
    rows, settings = unequal_prompts(), {"prompt_every": 4, "response_every": 4}
    settings |= {"probe": rows, "max_drift": float("inf")}
    together, _ = decoded(model, rows, **settings)
    for i, row in enumerate(rows):
        assert torch.equal(together[i], decoded(model, row[None], **settings)[0][0])


def test_two_models_in_two_threads_do_not_share_what_they_keep(model):
    models, found = [model, small_model(num_layers=3, seed=5)], {}
    settings = {"prompt_every": 1, "response_every": 5}
    alone = [decoded(m, equal_prompts(seed=i), **settings)[0] for i, m in enumerate(models)]

    def work(i):
        found[i] = decoded(models[i], equal_prompts(seed=i), **settings)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], alone[i]) for i in range(2))


def test_a_prompt_that_moves_is_measured_and_refused(model):
    prompts = equal_prompts()
    drift = prompt_drift(model, prompts, LENGTH, 8)
    assert drift > 0.1
    assert prompt_drift(model, prompts, LENGTH, 1) == 0
    with pytest.raises(UnsupportedHost, match=f"move by {drift:.2f} of their size .* for 8 steps"):
        decoded(model, prompts, prompt_every=8, probe=prompts)
    with pytest.raises(ValueError, match="there is no probe"):
        decoded(model, prompts, prompt_every=8)
    assert torch.is_tensor(decoded(model, prompts, prompt_every=1)[0])  # nothing stayed attached


def qwen2(masked):
    """Dream's layout: transformers' Qwen2 blocks under a mask that looks both ways, or not."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=20, intermediate_size=48, num_key_value_heads=2, **sizes)
    config.mask_token_id, config.pad_token_id, config.use_cache = MASK, PAD, False
    model = Qwen2ForCausalLM(config).eval()
    if masked:

        class Masked(type(model)):
            def forward(self, input_ids, attention_mask=None):
                seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                both_ways = seen.bool()[:, None, None].expand(-1, 1, seen.shape[1], -1)
                return super().forward(input_ids=input_ids, attention_mask=both_ways)

        model.__class__ = Masked
    return model


@torch.no_grad()
def test_blocks_of_dreams_layout_are_served():
    model, steps = qwen2(masked=True), decodings(equal_prompts())
    plain = [model(ids, seen).logits for ids, seen in steps]
    with dllm_cache(model, LENGTH, 1, 1):
        assert all(
            torch.equal(model(i, s).logits, p) for (i, s), p in zip(steps, plain, strict=True)
        )
    with dllm_cache(model, LENGTH, 1, 99, 1.0):
        for (ids, seen), expected in zip(steps, plain, strict=True):
            torch.testing.assert_close(model(ids, seen).logits, expected, atol=1e-5, rtol=1e-5)
    with dllm_cache(model, LENGTH, 1, 4, 0.25) as run:
        for ids, seen in steps:
            model(ids, seen)
    assert 0.7 < run.share < 0.9


def test_a_causal_model_is_refused():
    with pytest.raises(UnsupportedHost, match="its attention is causal"):
        with dllm_cache(qwen2(masked=False), LENGTH, 1, 4):
            pass


def test_a_model_that_keeps_keys_and_values_itself_is_refused():
    model = qwen2(masked=True)
    model.config.use_cache = True
    with torch.no_grad(), dllm_cache(model, LENGTH, 1, 4):
        with pytest.raises(UnsupportedHost, match="use_cache=False"):
            model(*decodings(equal_prompts())[0])


@pytest.mark.parametrize("name", ["use_cache", "past_key_value", "layer_past", "cache"])
def test_keys_and_values_of_a_models_own_are_refused_under_every_name(model, name):
    stream = torch.zeros(1, 26, 32)
    given = {"position_embeddings": (stream, stream), name: True}
    with torch.no_grad(), dllm_cache(model, LENGTH, 1, 4):
        with pytest.raises(UnsupportedHost, match=rf"of its own \({name}\).*use_cache=False"):
            model.model["transformer"]["blocks"][0](stream, **given)


def test_unknown_blocks_second_caches_gradients_and_odd_numbers_are_refused(model):
    with pytest.raises(UnsupportedHost, match=r"ModuleList'\] of \['Linear'\]"):
        with dllm_cache(torch.nn.ModuleList([torch.nn.Linear(2, 2)]), LENGTH):
            pass
    for settings in ({"prompt_every": 0}, {"response_every": 0}, {"ratio": 1.5}):
        with pytest.raises(ValueError, match="expected intervals"):
            decoded(model, equal_prompts(), **settings)
    with dllm_cache(model, LENGTH, 1):
        with pytest.raises(ValueError, match="already attached"):
            decoded(model, equal_prompts(), prompt_every=1)
        with pytest.raises(ValueError, match="with gradients"):
            model(*decodings(equal_prompts())[0])
        with pytest.raises(ValueError, match="more than the response's 12"):
            model(equal_prompts()[:, :10])
    model.model["transformer"]["blocks"][0].compile()
    with pytest.raises(UnsupportedHost, match="are compiled"):
        decoded(model, equal_prompts(), prompt_every=1)
    model.model["transformer"]["blocks"][0]._compiled_call_impl = None
