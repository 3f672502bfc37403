"""Tiny pipelines of the classes the recipes are for, whole: tokenizers, text encoders, decoders.

Weights are random and vocabularies are the bytes, so that a folder of such a pipeline takes prompts
and gives pictures like the real one, through `from_pretrained` and all of the pipeline's own code.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    HunyuanVideo15Pipeline,
)
from families import FAMILIES
from families.family import silent, tiny
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = list(bytes_to_unicode().values())
NUM_SYSTEM_TOKENS = 108  # that HunyuanVideo 1.5 cuts off
TURNS = "<|im_start|>" * NUM_SYSTEM_TOKENS + "{{ messages[1].content }}<|im_end|>"
"""A chat template whose system message has the length of the real one, in fewer bytes."""


def seeded_model(cls: type, config: Any) -> Any:
    torch.manual_seed(0)
    return cls(config).eval()


def clip(width: int, cls: type = CLIPTextModel) -> tuple[Any, Any]:
    """A tokenizer and a text model of the kind of CLIP."""
    marks = ["<|startoftext|>", "<|endoftext|>"]
    words = [*BYTES, *(byte + "</w>" for byte in BYTES), *marks]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    return tokenizer, seeded_model(cls, config)


def t5(width: int, model: type = T5EncoderModel, config: type = T5Config) -> tuple[Any, Any]:
    """A tokenizer and an encoder of the kind of T5."""
    letters = [("\u2581", -1.0), *((chr(code), -2.0) for code in range(33, 127))]
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    tokenizer = T5Tokenizer([*marks, *letters], extra_ids=0)
    shape = {"d_model": width, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return tokenizer, seeded_model(model, config(vocab_size=len(tokenizer), **shape))


def qwen_tokenizer() -> Any:
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = {word: i for i, word in enumerate([*BYTES, *marks])}
    tokenizer = Qwen2Tokenizer(words, [], extra_special_tokens=marks[1:])
    tokenizer.chat_template = TURNS
    return tokenizer


def qwen_config(width: int) -> Any:
    text = {
        "vocab_size": 300,
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 1],
        },
        "pad_token_id": 256,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "out_hidden_size": width,
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision)


def image_decoder() -> Any:
    """Eight pixels per latent, as the real ones."""
    return tiny(
        AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.1,
    )


def video_decoder(cls: type) -> Any:
    """The causal one of Wan, which Qwen-Image uses for pictures."""
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return tiny(cls, base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics)


def with_few_text_tokens(patch: pytest.MonkeyPatch) -> None:
    """HunyuanVideo 1.5 pads its texts to 2,000 tokens, which take a CPU a minute per sample."""
    made = HunyuanVideo15Pipeline.__init__

    def with_fewer(pipe: Any, *args: Any, **kwargs: Any) -> None:
        made(pipe, *args, **kwargs)
        pipe.tokenizer_max_length = 100
        pipe.tokenizer_2_max_length = pipe.vision_num_semantic_tokens = 4

    patch.setattr(HunyuanVideo15Pipeline, "__init__", functools.wraps(made)(with_fewer))


def whole(host: str, **parts: Any) -> Any:
    """A family's pipeline with the parts it lacks."""
    pipe = FAMILIES[host].build()
    rest = {name: part for name, part in pipe.components.items() if name not in parts}
    extra = {"boundary_ratio": pipe.config.boundary_ratio} if host == "wan22" else {}
    return silent(type(pipe)(**rest, **parts, **extra))


def flux() -> Any:
    (tokenizer, clip_model), (tokenizer_2, t5_model) = clip(12), t5(12)
    return whole(
        "flux",
        vae=image_decoder(),
        tokenizer=tokenizer,
        text_encoder=clip_model,
        tokenizer_2=tokenizer_2,
        text_encoder_2=t5_model,
    )


def sd3() -> Any:
    tokenizer, clip_model = clip(6, CLIPTextModelWithProjection)
    tokenizer_2, clip_model_2 = clip(6, CLIPTextModelWithProjection)
    tokenizer_3, t5_model = t5(12)
    return whole(
        "sd3",
        vae=image_decoder(),
        tokenizer=tokenizer,
        text_encoder=clip_model,
        tokenizer_2=tokenizer_2,
        text_encoder_2=clip_model_2,
        tokenizer_3=tokenizer_3,
        text_encoder_3=t5_model,
    )


def qwenimage() -> Any:
    return whole(
        "qwenimage",
        vae=video_decoder(AutoencoderKLQwenImage),
        tokenizer=qwen_tokenizer(),
        text_encoder=seeded_model(Qwen2_5_VLForConditionalGeneration, qwen_config(12)),
    )


def wan22() -> Any:
    tokenizer, encoder = t5(12, UMT5EncoderModel, UMT5Config)
    vae = video_decoder(AutoencoderKLWan)
    return whole("wan22", vae=vae, tokenizer=tokenizer, text_encoder=encoder)


def hunyuan_video15() -> Any:
    _, encoder = t5(10)
    encoder.resize_token_embeddings(len(ByT5Tokenizer()))
    return whole(
        "hunyuan_video15",
        tokenizer=qwen_tokenizer(),
        text_encoder=seeded_model(Qwen2_5_VLTextModel, qwen_config(12).text_config),
        tokenizer_2=ByT5Tokenizer(),
        text_encoder_2=encoder,
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "flux_dev": flux,
    "sd35_large": sd3,
    "qwen_image": qwenimage,
    "wan22_t2v": wan22,
    "hunyuan_video15": hunyuan_video15,
}
"""A builder per recipe."""
