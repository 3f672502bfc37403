"""Modules of nobody's library, and loops written by hand around them."""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

import foreseer as fs

TIMES = [1 - i / 10 for i in range(10)]
TOKENS, CHANNELS, WIDTH = 6, 4, 16


class Layer(nn.Module):
    """Tokens see their mean and the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.condition = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + torch.tanh(self.mix(x + x.mean(1, keepdim=True)) + self.condition(c)[:, None])


class ActionHead(nn.Module):
    """Blocks and a head, without a configuration; `form` makes what it returns of a tensor."""

    def __init__(self, form: Any = None, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.enter = nn.Linear(CHANNELS, WIDTH)
        self.observe = nn.Linear(3, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.leave = nn.Linear(WIDTH, CHANNELS)
        self.form = form
        self.calls = 0
        self.eval()

    def forward(self, x: Tensor, t: Any, observation: Tensor) -> Any:
        self.calls += 1
        time = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1).expand(len(x), 1)
        c = self.time(time) + self.observe(observation)
        h = self.enter(x)
        for layer in self.layers:
            h = layer(h, c)
        v = self.leave(self.norm(h))
        return v if self.form is None else self.form(v)


class Wrapped(nn.Module):
    """The same with its blocks deep inside."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.transformer = net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.transformer.forward(*args, **kwargs)


class MaskedModel(nn.Module):
    """Token ids to logits in an object, as language models return them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.embed = nn.Embedding(9, WIDTH)
        self.model.blocks = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 8)
        self.eval()

    def forward(self, input_ids: Tensor) -> Any:
        h = self.model.embed(input_ids)
        for block in self.model.blocks:
            h = block(h, h.mean(1))
        return SimpleNamespace(logits=self.head(self.norm(h)))


def tensor_of(output: Any) -> Tensor:
    """The prediction in any form."""
    only = output[0] if isinstance(output, tuple) else output
    return getattr(only, "sample", only)


@torch.no_grad()
def euler(net: Any, inputs: dict[str, Tensor], generator: Any, times: Any = TIMES) -> Tensor:
    """The plain loop, of which nothing is known."""
    observation = inputs["observation"]
    x = randn_tensor((len(observation), TOKENS, CHANNELS), generator=generator)
    for t in times:
        x = x - 0.1 * tensor_of(net(x, t, observation))
    return x


def host_with_loop(net: nn.Module, **settings: Any) -> Any:
    """A host that knows the loop."""
    host = fs.host(net, **settings)

    def sample(inputs: dict[str, Tensor], generator: Any) -> Tensor:
        with host.steps(TIMES) as steps:
            return euler(net, inputs, generator, steps)

    host.sample = sample
    return host


def observation(seed: int, rows: int = 1) -> dict[str, Tensor]:
    """Inputs of a run."""
    return {"observation": torch.randn(rows, 3, generator=seeded(seed))}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
