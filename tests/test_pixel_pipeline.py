"""The pixel pipeline integrates from noise to image, saves bit for bit and checks its labels."""

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline


def tiny_transformer(cls=DiTTransformer2DModel) -> DiTTransformer2DModel:
    """A DiT with the default random weights, whose output is not zero."""
    torch.manual_seed(0)
    return cls(
        num_attention_heads=1,
        attention_head_dim=64,
        in_channels=1,
        num_layers=1,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=3,
    ).eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class ExactVelocity(DiTTransformer2DModel):
    """Knows x_0 = 0.25 and returns v = eps - x_0 = (x_t - x_0) / sigma."""

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        sigma = (timestep / 1000)[:, None, None, None]
        return ((hidden_states - 0.25) / sigma,)


def test_the_exact_velocity_leads_from_noise_to_the_image():
    pipe = PixelDiTPipeline(tiny_transformer(ExactVelocity), FlowMatchEulerDiscreteScheduler())
    x_0 = pipe([0, 1], num_inference_steps=7, generator=seeded(), output_type="latent").images
    torch.testing.assert_close(x_0, torch.full_like(x_0, 0.25))


def test_one_scheduler_step_moves_along_the_line_from_noise_to_image():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    eps, x_0 = torch.randn(2, 1, 8, 8, generator=seeded()), torch.full((2, 1, 8, 8), 0.25)
    sigma_0, sigma_1 = scheduler.sigmas[:2]
    assert sigma_0 == 1 and sigma_1 < sigma_0 and scheduler.sigmas[-1] == 0
    x_t = scheduler.step(eps - x_0, scheduler.timesteps[0], eps, return_dict=False)[0]
    torch.testing.assert_close(x_t, (1 - sigma_1) * x_0 + sigma_1 * eps)


def test_a_saved_pipeline_draws_the_same_images_bit_for_bit(tmp_path):
    pipe = PixelDiTPipeline(tiny_transformer(), FlowMatchEulerDiscreteScheduler())
    pipe.save_pretrained(tmp_path)
    loaded = PixelDiTPipeline.from_pretrained(tmp_path)
    assert not loaded.transformer.training
    drawn = [
        each([0, 2], num_inference_steps=3, generator=seeded(), output_type="latent").images
        for each in (pipe, loaded)
    ]
    assert torch.equal(drawn[0], drawn[1])


def test_guidance_of_one_runs_the_conditional_branch_only():
    pipe = PixelDiTPipeline(tiny_transformer(), FlowMatchEulerDiscreteScheduler())
    noise = torch.randn(2, 1, 8, 8, generator=seeded())
    options = dict(num_inference_steps=3, latents=noise, output_type="latent")
    drawn = pipe([0, 2], guidance_scale=1.0, **options).images
    scheduler, x_t = FlowMatchEulerDiscreteScheduler(), noise
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            v = pipe.transformer(x_t, timestep.expand(2), torch.tensor([0, 2])).sample
            x_t = scheduler.step(v, timestep, x_t, return_dict=False)[0]
    assert torch.equal(drawn, x_t)
    assert not torch.allclose(drawn, pipe([0, 2], guidance_scale=3.0, **options).images)


@pytest.mark.parametrize("labels", [3, -1, [0, 7], []])
def test_labels_out_of_range_are_refused(labels):
    pipe = PixelDiTPipeline(tiny_transformer(), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match=r"expected labels in \[0, 3\)"):
        pipe(labels)


@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_other_flow_solvers_reach_the_image_too(cls):
    pipe = PixelDiTPipeline(tiny_transformer(ExactVelocity), FlowMatchEulerDiscreteScheduler())
    pipe.scheduler = cls(prediction_type="flow_prediction", use_flow_sigmas=True)
    x_0 = pipe([0, 1], num_inference_steps=8, generator=seeded(), output_type="latent").images
    torch.testing.assert_close(
        x_0, torch.full_like(x_0, 0.25), atol=0.01, rtol=0
    )  # whole timesteps
