"""A text-to-image pipeline small enough for a test, which knows four prompts by itself."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from foreseer.integration.pipelines.pixel_pipeline import PixelFluxPipeline
from foreseer.integration.pipelines.sentence_encoder import NUM_TOKENS, WIDTH, SentenceEncoder

PROMPTS = ("", "a cat", "a dog", "a red apple")


def tiny_encoder() -> SentenceEncoder:
    """Random vectors in place of the sentence encoder's."""
    torch.manual_seed(1)
    encoder = SentenceEncoder(PROMPTS).eval()
    encoder.prompt_embeds.copy_(torch.randn(len(PROMPTS), NUM_TOKENS, WIDTH))
    encoder.pooled_prompt_embeds.copy_(torch.randn(len(PROMPTS), WIDTH))
    return encoder


def tiny_text_pipeline(num_layers: int = 1, num_single_layers: int = 2) -> PixelFluxPipeline:
    """Random weights, 16 x 16 pixels in 16 tokens, large enough for SSIM's window."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=48,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=32,
        num_attention_heads=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = PixelFluxPipeline(transformer, tiny_encoder(), scheduler, sample_size=16)
    pipe.set_progress_bar_config(disable=True)
    return pipe
