"""DisCa's adversary: spectrally normalised heads on features of the frozen network itself.

The published text names a multi-scale, spectrally normalised hinge discriminator on features of the
large model; layers, heads and logits are not stated. Here: the outputs of the blocks at 1/6, 1/3
and 1/2 of the depth, logits per token.
Shapes: B batch, N tokens, D channels.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from foreseer.integration.host.trunk import stream_of, time_facts
from foreseer.training.disca.replayed_runs import Forced
from foreseer.training.plumbing.resuming import mean_over_processes

DEPTHS = (1 / 6, 1 / 3, 1 / 2)
CHANCE, SEPARATING = 0.5, 0.55  # accuracy of a coin, and from where on its verdict is worth a term
MEMORY = 0.95  # of the running accuracy


@dataclass(frozen=True)
class Seen:
    """Features of what recorded outputs and forecasts lead to, a list over depths each."""

    real: list[Float[Tensor, "B N D"]]
    made: list[Float[Tensor, "B N D"]]


class Head(nn.Module):
    """gain * SN(d -> 1)(leaky(SN(d -> d)(norm(f)))), a logit per token.

    Args:
        width: channels D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = spectral_norm(nn.Linear(width, width))
        self.outer = spectral_norm(nn.Linear(width, 1))
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, feature: Float[Tensor, "B N D"]) -> Float[Tensor, "B N"]:
        """Logits."""
        hidden = self.inner(nn.functional.layer_norm(feature, feature.shape[-1:]))
        return self.gain * self.outer(nn.functional.leaky_relu(hidden, 0.2))[..., 0]


class Adversary(nn.Module):
    """Tell where a forecast leads from where the network leads, one step later.

    Args:
        pipe: the pipeline whose transformer is the frozen feature extractor.
        width: channels of its blocks.
    """

    def __init__(self, pipe: Any, width: int) -> None:
        super().__init__()
        self._pipe = [pipe]  # no part of the state
        self.heads = nn.ModuleList(Head(width) for _ in DEPTHS)
        self.accuracy: Tensor
        self.register_buffer("accuracy", torch.tensor(CHANCE))

    @property
    def separates(self) -> bool:
        """Whether the running accuracy is better than a coin's."""
        return float(self.accuracy) > SEPARATING

    def look(self, forced: Sequence[Forced]) -> Seen:
        """Features of all forecasts of a batch, differentiable in the predictor.

        Args:
            forced: forecasts.
        """
        real: list[list[Tensor]] = []
        made: list[list[Tensor]] = []
        for each in forced:
            with torch.no_grad():
                real.append(self._features(each, each.target))
            made.append(self._features(each, each.forecast))
        return Seen(*([torch.cat(depth) for depth in zip(*f, strict=True)] for f in (real, made)))

    def discriminator_loss(self, seen: Seen) -> Float[Tensor, ""]:
        """mean_k [<relu(1 - D_k(f*))> + <relu(1 + D_k(f))>], and the running accuracy."""
        losses, right = [], []
        for real, made in self._logits(seen, detached=True):
            losses.append(nn.functional.relu(1 - real).mean() + nn.functional.relu(1 + made).mean())
            right.append(((real > 0).float().mean() + (made < 0).float().mean()) / 2)
        accuracy = mean_over_processes(torch.stack(right).mean().detach())
        self.accuracy.lerp_(accuracy, 1 - MEMORY)
        return torch.stack(losses).mean()

    def predictor_loss(self, seen: Seen) -> Float[Tensor, ""]:
        """mean_k <relu(1 - D_k(f))>: it stops to push where D is at least 1."""
        logits = self._logits(seen, detached=False)
        return torch.stack([nn.functional.relu(1 - made).mean() for _, made in logits]).mean()

    @torch.no_grad()
    def monitors(self, seen: Seen) -> dict[str, Tensor]:
        """Running accuracy, both hinge parts, and the mean logits of real and made features."""
        pairs = self._logits(seen, detached=True)
        real, made = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
        return {
            "accuracy": self.accuracy,
            "hinge_real": nn.functional.relu(1 - real).mean(),
            "hinge_made": nn.functional.relu(1 + made).mean(),
            "logit_real": real.mean(),
            "logit_made": made.mean(),
        }

    def _logits(self, seen: Seen, detached: bool) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self.heads, seen.real, seen.made, strict=True)
        return [
            (head(real), head(made.detach() if detached else made)) for head, real, made in pairs
        ]

    def _features(self, each: Forced, output: Tensor) -> list[Float[Tensor, "B N D"]]:
        """Features of the latents an output leads to, at their own time and an interval of zero."""
        transformer, t, r = self._pipe[0].transformer, each.step.sigma, each.next_sigma
        if each.x_t.shape != output.shape:
            raise ValueError(
                f"the network is given {tuple(each.x_t.shape)} and returns {tuple(output.shape)}: "
                "it is given more than the sample, so the adversary cannot look at another; train "
                "without it (gan_epochs: 0)."
            )
        latents = each.x_t - (t - r) * output
        kwargs = dict(each.kwargs)
        if "timestep" not in kwargs:
            raise ValueError(
                "the pipeline does not pass its timestep by name, so the adversary cannot look at "
                "another time; train without it (gan_epochs: 0)."
            )
        kwargs["timestep"] = torch.full_like(
            kwargs["timestep"], time_facts(transformer).time_scale * r
        )
        args = each.args
        if args:
            args = (latents, *args[1:])
        else:
            kwargs["hidden_states"] = latents
        with self._at_interval_zero(len(latents), latents.device):
            return _blocks_up_to(transformer, each, args, kwargs)

    def _at_interval_zero(self, size: int, device: torch.device) -> Any:
        conditioning = getattr(self._pipe[0], "conditioning", None)
        if conditioning is None:
            return contextlib.nullcontext()
        scale = None
        if conditioning.conditioner.takes_guidance:
            scale = torch.full((size,), float(self._pipe[0].guidance_scale), device=device)
        return conditioning.at(torch.zeros(size, device=device), scale)


class _Enough(Exception):
    """The deepest block that is looked at has run."""


def _blocks_up_to(
    transformer: nn.Module, each: Forced, args: tuple, kwargs: dict[str, Any]
) -> list[Float[Tensor, "B N D"]]:
    """Outputs of the blocks at `DEPTHS`; the network stops after the last of them."""
    lists = [child for child in transformer.children() if isinstance(child, nn.ModuleList)]
    blocks = [block for listed in lists for block in listed]
    chosen = [max(0, round(depth * len(blocks)) - 1) for depth in DEPTHS]
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            stream = stream_of(output)
            assert stream is not None  # a block returns its stream
            found[number] = stream
            if number == max(chosen):
                raise _Enough

        return hook

    handles = [blocks[number].register_forward_hook(keep(number)) for number in set(chosen)]
    try:
        with contextlib.suppress(_Enough):
            each.forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [found[number] for number in chosen]
