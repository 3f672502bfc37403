"""The bundled text host in ComfyUI's own FLUX class, and nodes by which its server runs it.

Put into `custom_nodes`, this file is a custom node of ComfyUI; imported by a test, it is a module.
"""

from typing import Any

import comfy.latent_formats
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor

import foreseer as fs

PIPELINE = "zoo:emoji_flux"


class Pixels(comfy.latent_formats.LatentFormat):
    """The host has no autoencoder."""

    latent_channels, spacial_downscale_ratio = 3, 1


class Config(comfy.supported_models.FluxSchnell):
    """As ComfyUI configures FLUX."""

    latent_format = Pixels


def comfy_model(transformer: Any) -> Any:
    """A FLUX transformer of diffusers as a model of ComfyUI, by ComfyUI's map of the weights."""
    host = transformer.config
    sizes = {
        "image_model": "flux",
        "in_channels": 3,
        "out_channels": 3,
        "patch_size": 4,
        "vec_in_dim": host.pooled_projection_dim,
        "context_in_dim": host.joint_attention_dim,
        "hidden_size": host.num_attention_heads * host.attention_head_dim,
        "mlp_ratio": 4.0,
        "num_heads": host.num_attention_heads,
        "depth": host.num_layers,
        "depth_single_blocks": host.num_single_layers,
        "axes_dim": list(host.axes_dims_rope),
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": False,
        "txt_ids_dims": [],
        "dtype": torch.float32,
    }
    model = Config(sizes).get_model({})
    state = model.diffusion_model.state_dict()
    places = comfy.utils.flux_to_diffusers(sizes)
    for name, value in transformer.state_dict().items():
        place = places[name]
        target, cut, *change = (place, None) if isinstance(place, str) else place
        value = change[0](value) if change else value
        (state[target] if cut is None else state[target].narrow(*cut)).copy_(value)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def conditioning(pipe: Any, text: str) -> list[list[Any]]:
    """A prompt, as ComfyUI's nodes pass it on."""
    embeds, pooled = pipe.text_encoder([text])
    return [[embeds, {"pooled_output": pooled}]]


class Node:
    """A node of the test's."""

    RETURN_TYPES: tuple[str, ...] = ()
    INPUTS: dict[str, Any] = {}
    FUNCTION = "run"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": cls.INPUTS}


class TextHost(Node):
    """The model, two prompts and an empty latent."""

    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("model", "positive", "negative", "latent")
    INPUTS = {"text": ("STRING", {"default": "smiling face"})}

    def run(self, text: str) -> tuple[Any, ...]:
        pipe = fs.load_pipeline(PIPELINE)
        latent = {"samples": torch.zeros(1, 3, 32, 32)}
        model = comfy_model(pipe.transformer)
        return model, conditioning(pipe, text), conditioning(pipe, ""), latent


class Picture(Node):
    """Pixels in [-1, 1] as a picture, eight times as large."""

    RETURN_TYPES = ("IMAGE",)
    INPUTS = {"samples": ("LATENT",)}

    def run(self, samples: dict[str, Tensor]) -> tuple[Tensor]:
        large = samples["samples"].clamp(-1, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
        return ((large.movedim(1, -1) + 1) / 2,)


NODE_CLASS_MAPPINGS = {"TextHost": TextHost, "TextHostPicture": Picture}
NODE_DISPLAY_NAME_MAPPINGS = {"TextHost": "Bundled text host", "TextHostPicture": "Its picture"}
