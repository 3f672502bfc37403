"""Tiny random hosts: real diffusers models and pipelines, and hosts to compute in the head."""

import copy
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor, nn

from foreseer.checkpoints.spec import PredictorSpec
from foreseer.integration.host.clock import flow_sigmas
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline
from foreseer.trajectories.prompts import Item

STEPS = 8
CALLS_PER_STEP = {"dit": 1, "dit_guided": 1, "flux": 1, "flux_embedded": 1, "flux_two_calls": 2}
HOSTS = list(CALLS_PER_STEP)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_dit(cls: type = DiTTransformer2DModel, seed: int = 0) -> Any:
    """Two blocks, 4 tokens, 3 classes; random weights, so its output is not zero."""
    torch.manual_seed(seed)
    return cls(
        num_attention_heads=1,
        attention_head_dim=16,
        in_channels=1,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=3,
        norm_num_groups=1,
    ).eval()


def tiny_flux(guidance_embeds: bool = False) -> FluxTransformer2DModel:
    """One double-stream and two single-stream blocks."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def pipeline(host: str, scheduler: Any = None) -> Any:
    """A silent pipeline around one of `HOSTS`."""
    euler = FlowMatchEulerDiscreteScheduler()
    if host.startswith("dit"):
        pipe: Any = PixelDiTPipeline(tiny_dit(), euler)
    else:
        transformer = tiny_flux(guidance_embeds=host == "flux_embedded")
        pipe = FluxPipeline(euler, None, None, None, None, None, transformer)
    pipe.scheduler = scheduler or euler
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(seed: int) -> dict[str, Tensor]:
    """Random embeddings of one prompt."""
    return {
        "prompt_embeds": torch.randn(1, 3, 12, generator=seeded(seed)),
        "pooled_prompt_embeds": torch.randn(1, 12, generator=seeded(seed + 1)),
    }


def settings(host: str, num_inference_steps: int = STEPS) -> dict[str, Any]:
    """What every call of a host's pipeline is given."""
    if host.startswith("dit"):
        scale = 3.0 if host == "dit_guided" else 1.0
        return {"num_inference_steps": num_inference_steps, "guidance_scale": scale}
    size = {"num_inference_steps": num_inference_steps, "height": 32, "width": 32}
    return size | ({"true_cfg_scale": 2.0} if host == "flux_two_calls" else {})


def items(host: str, num_items: int = 4) -> list[Item]:
    """Items to record."""
    found = []
    for i in range(num_items):
        if host.startswith("dit"):
            inputs: dict[str, Any] = {"class_labels": i % 3}
        else:
            inputs = dict(prompt(10 * i))
            if host == "flux_two_calls":
                inputs |= {f"negative_{name}": value for name, value in prompt(1000 + i).items()}
        found.append(Item(i, 100 + i, inputs))
    return found


def run(host: str, pipe: Any, **changes: Any) -> Tensor:
    """The final latents of two samples."""
    joined: dict[str, Any] = {"class_labels": [0, 2]}
    if not host.startswith("dit"):
        first, second = (item.inputs for item in items(host, 2))
        joined = {name: torch.cat([first[name], second[name]]) for name in first}
    arguments = {**joined, **settings(host), "output_type": "latent", "generator": seeded()}
    return pipe(**{**arguments, **changes}).images


def spec_for(pipe: Any, **changes: Any) -> PredictorSpec:
    """The circumstances of a fit on the guided DiT at `STEPS` steps."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    values: dict[str, Any] = {
        "tap": "output",
        "anchors": (0, 1, 4),
        "sigmas": tuple(flow_sigmas(scheduler)),
        "host": host_fingerprint(pipe.transformer),
        "scheduler": type(scheduler).__name__,
        "num_branches": 2,
        "guidance_scale": 3.0,
        "dtype": "float32",
    }
    return PredictorSpec(**{**values, **changes})


class Adds(nn.Module):
    """A block that adds a half."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + 0.5


class Head(nn.Module):
    """Scales by the time."""

    def forward(self, timestep: Tensor, hidden_states: Tensor) -> Tensor:
        return hidden_states * (timestep[:, None, None, None] / 1000)


class AddingHost(DiTTransformer2DModel):
    """v = (x_t + 1) t: its residual is 1 at every step. The head is called by keywords."""

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states)
        return (self.head(timestep=timestep, hidden_states=hidden_states),)


class ConstantVelocity(DiTTransformer2DModel):
    """v = 0.25 everywhere, always."""

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        return (torch.full_like(hidden_states, 0.25),)


class LinearInTime(DiTTransformer2DModel):
    """v = (1 + t) p, p a pattern of the class."""

    def forward(self, hidden_states, timestep, class_labels, return_dict=True):
        pattern = torch.arange(16.0).reshape(1, 1, 4, 4).sin() + class_labels[:, None, None, None]
        return ((1 + timestep[:, None, None, None] / 1000) * pattern,)


def adding_pipeline() -> PixelDiTPipeline:
    """A pipeline whose trunk adds 1."""
    transformer = tiny_dit(AddingHost)
    transformer.transformer_blocks = nn.ModuleList([Adds(), Adds()])
    transformer.head = Head()
    pipe = PixelDiTPipeline(transformer, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bare_pipeline(pipe: Any) -> SimpleNamespace:
    """Only what attaching needs, for loops written out in a test."""
    return SimpleNamespace(transformer=pipe.transformer, scheduler=pipe.scheduler)
