"""Tiny real pipelines of the situations that users of caches report."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from families.edits import picture_vae
from families.family import Family, noise, prompt, silent, size, tiny
from families.images import dynamic_euler, flux_transformer
from torch import Tensor

TEXT = 4  # tokens of a prompt


class PromptsAsNumbers(Ideogram4Pipeline):
    """Ideogram 4 without a text encoder: a prompt is the seed of its features."""

    def encode_prompt(
        self, prompt: Any, grid_h: int, grid_w: int, max_sequence_length: int, device: Any
    ) -> tuple[Tensor, ...]:
        prompts, tokens = [prompt] if isinstance(prompt, str) else prompt, grid_h * grid_w
        text = torch.cat([noise(int(words), TEXT, 12) for words in prompts])
        features = torch.cat([text, torch.zeros(len(prompts), tokens, 12)], 1)
        place = torch.stack([torch.arange(TEXT + tokens)] * 3, -1).repeat(len(prompts), 1, 1)
        kind = torch.tensor([[3] * TEXT + [2] * tokens] * len(prompts))
        return features, place, torch.ones_like(kind), kind


def ideogram4() -> Any:
    networks = [
        tiny(
            Ideogram4Transformer2DModel,
            seed,
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=12,
            rope_theta=10000,
            mrope_section=(4, 2, 2),
        )
        for seed in (0, 1)
    ]
    pipe = PromptsAsNumbers(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=networks[0],
        unconditional_transformer=networks[1],
        prompt_enhancer_head=None,
    )
    return silent(pipe)


def skyreels_forcing() -> Any:
    transformer = tiny(
        SkyReelsV2Transformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=12,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        inject_sample_info=True,
    )
    solver = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformer,
        vae=wan_vae(),
        scheduler=solver,
    )
    return silent(pipe)


def wan_vae() -> Any:
    return tiny(
        AutoencoderKLWan,
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


IDEOGRAM = Family(
    "ideogram4",
    ideogram4,
    lambda seed: {"prompt": str(seed)},
    size(
        64,
        guidance_scale=5.0,
        guidance_schedule=None,
        prompt_upsampling=False,
        max_sequence_length=TEXT,
    ),
    2,
)
FORCING = Family(
    "skyreels_forcing",
    skyreels_forcing,
    lambda seed: prompt(seed, 6, 12),
    size(prompt=None, num_frames=9, base_num_frames=9, guidance_scale=4.0, fps=16),
    2,
)


def wan(cls: type, network: type, **more: Any) -> Any:
    """A Wan pipeline that starts from a picture."""
    transformer = tiny(
        network,
        num_attention_heads=2,
        attention_head_dim=12,
        out_channels=16,
        text_dim=12,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **more,
    )
    solver = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    nothing = dict.fromkeys(("tokenizer", "text_encoder"))
    if cls is WanImageToVideoPipeline:
        nothing |= dict.fromkeys(("image_encoder", "image_processor"))
    return silent(cls(**nothing, vae=wan_vae(), scheduler=solver, transformer=transformer))


def wan_from_picture() -> Any:
    return wan(WanImageToVideoPipeline, WanTransformer3DModel, in_channels=36)


def wan_vace() -> Any:
    more = {"in_channels": 16, "vace_layers": [0], "vace_in_channels": 96}
    return wan(WanVACEPipeline, WanVACETransformer3DModel, **more)


def kontext() -> Any:
    nothing = [None] * 4
    return silent(FluxKontextPipeline(dynamic_euler(), picture_vae(), *nothing, flux_transformer()))
