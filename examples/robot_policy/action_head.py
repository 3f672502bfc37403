"""The action head of a robot policy: a small flow-matching transformer over a chunk of actions.

A plain `torch.nn.Module` without a config, a scheduler or a pipeline, as policies have it.

Shapes: B observations, T actions of a chunk, A numbers of an action, O numbers of an observation,
W width.
Convention: x_t = (1 - sigma) x_0 + sigma eps, v = eps - x_0, sigma runs 1 to 0.
Source: Peebles & Xie, arXiv 2212.09748 (adaLN-Zero blocks); Black et al., arXiv 2410.24164 (chunks
of actions by flow matching, 10 Euler steps).
"""

import math
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

CHUNK, ACTION, OBSERVATION, TASK_COUNT = 16, 4, 39, 6
HEAD_FILE = Path(__file__).parent / "action_head.safetensors"


class Attention(nn.Module):
    """Self-attention over the actions of a chunk.

    Args:
        width: W.
        heads: equal parts of the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B T W"]) -> Float[Tensor, "B T W"]:
        """What every action takes from the others."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One block: attention and MLP, each modulated and gated by the condition.

    Args:
        width: W.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self, x: Float[Tensor, "B T W"], condition: Float[Tensor, "B W"]
    ) -> Float[Tensor, "B T W"]:
        """The stream after the block."""
        parts = self.modulation(condition)[:, None].chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        x = x + gate_a * self.attention(self.norm(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(self.norm(x) * (1 + scale_m) + shift_m)


class Final(nn.Module):
    """Norm, modulation and projection onto actions.

    Args:
        width: W.
        action: A.
    """

    def __init__(self, width: int, action: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(width, action)

    def forward(
        self, x: Float[Tensor, "B T W"], condition: Float[Tensor, "B W"]
    ) -> Float[Tensor, "B T A"]:
        """The velocity of every action."""
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.projection(self.norm(x) * (1 + scale) + shift)


class ActionHead(nn.Module):
    """The velocity of a noisy chunk of actions, given what the robot sees and its task.

    Args:
        width: W.
        depth: blocks.
        heads: of every attention.
    """

    observation_mean: Tensor
    observation_scale: Tensor

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.register_buffer("observation_mean", torch.zeros(OBSERVATION))
        self.register_buffer("observation_scale", torch.ones(OBSERVATION))
        self.embed = nn.Linear(ACTION, width)
        self.place = nn.Parameter(0.02 * torch.randn(CHUNK, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.task = nn.Embedding(TASK_COUNT, width)
        self.observe = nn.Sequential(
            nn.Linear(OBSERVATION + width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width),
        )
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final = Final(width, ACTION)
        zeroed = [self.final.modulation, self.final.projection]
        for layer in [*zeroed, *(block.modulation for block in self.blocks)]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def condition(
        self,
        sigma: Float[Tensor, " B"],
        observation: Float[Tensor, "B O"],
        task: Int[Tensor, " B"],
    ) -> Float[Tensor, "B W"]:
        """What modulates the blocks: flow time, observation and task."""
        half = self.place.shape[1] // 2
        rates = torch.exp(-math.log(1000.0) * torch.arange(half, device=sigma.device) / half)
        angles = 100 * sigma.float()[:, None] * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.place.dtype)
        seen = (observation - self.observation_mean) / self.observation_scale
        told = torch.cat([seen.to(self.place.dtype).clamp(-10, 10), self.task(task)], dim=-1)
        return nn.functional.silu(self.time(waves) + self.observe(told))

    def forward(
        self,
        actions: Float[Tensor, "B T A"],
        sigma: Float[Tensor, " B"],
        observation: Float[Tensor, "B O"],
        task: Int[Tensor, " B"],
    ) -> Float[Tensor, "B T A"]:
        """Velocity v = eps - x_0 of noisy actions.

        Args:
            actions: noisy chunk.
            sigma: flow time in [0, 1].
            observation: as the simulator gives it.
            task: its number.
        """
        condition = self.condition(sigma, observation, task)
        x = self.embed(actions) + self.place
        for block in self.blocks:
            x = block(x, condition)
        return self.final(x, condition)


def load_head(file: Path = HEAD_FILE) -> ActionHead:
    """The trained head in float32, for evaluation.

    Args:
        file: safetensors in half precision.
    """
    state = load_file(file)
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    head = ActionHead(state["place"].shape[1], len(blocks))
    head.load_state_dict(state)
    return head.eval().requires_grad_(False)
