"""DisCa: a small transformer that forecasts the hidden state from the cache and current tokens.

Shapes: B batch, N tokens, D channels of the host, P channels of the predictor, W width of the
host's modulation vector.
Source: DisCa, arXiv 2602.05449: fused = mlp([tokens; cache]), two blocks of the host's own kind
under its current modulation, the host's own head. The residual form, the extrapolated base, the
narrow form and the embedded gap are ours.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.predictors.base import SMALLEST, History, Predictor, Step

NUM_FREQUENCIES = 16
REACH = 16  # tokens
HIGHEST_FREQUENCY = 30.0  # radians per unit of flow time


class DiscaPredictor(Predictor):
    """F_hat = base + out(blocks(fuse([tokens; cache]), k)), two adaLN blocks under the host's k.

    `base` is 0 as published (`residual` false), the newest anchor's feature (reuse), or the line
    through the two newest ones (`order` 1); `out` starts at zero, so that training starts exactly
    at that formula. Anchors refresh the cache, forecasts never do. The distance to the newest
    anchor is added to k by an embedding that starts at zero.

    Args:
        width: D, channels of a hidden state.
        modulation_width: W.
        num_heads: attention heads of a block; must divide the predictor's width.
        depth: blocks.
        width_mult: P / D, in (0, 1].
        residual: whether there is a base.
        order: 0 for reuse, 1 for linear extrapolation in sigma where two anchors are known.
        max_gap: longest distance in sigma to the newest anchor that was trained on.

    Raises:
        ValueError: an argument is out of range.
    """

    needs = frozenset({"tokens", "modulation"})
    learned = True
    any_anchors = True
    tag = "disca"
    form = "a small transformer's view of the step's tokens and"
    block: type["AdaLNBlock"]

    def __init__(
        self,
        width: int,
        modulation_width: int,
        num_heads: int = 3,
        depth: int = 2,
        width_mult: float = 1.0,
        residual: bool = True,
        order: int = 0,
        max_gap: float = 0.2,
    ) -> None:
        super().__init__()
        inner = round(width * width_mult)
        fits = 0 < width_mult <= 1 and inner % num_heads == 0 and modulation_width >= 1
        if not fits or depth < 1 or not 0 < max_gap <= 1:
            raise ValueError(
                f"found width {width} times {width_mult}, modulation_width {modulation_width}, "
                f"{num_heads} heads, depth {depth} and max_gap {max_gap}; expected a multiplier "
                "and a gap in (0, 1], at least one block, heads that divide the width and a host "
                "with modulation (of a masked language model, fit_corrector tunes the last block)."
            )
        if order not in (0, 1) or (order and not residual):
            raise ValueError(
                f"order is {order} with residual={residual}; expected 0 or 1, and 0 without a base."
            )
        self.width = width
        self.modulation_width = modulation_width
        self.num_heads = num_heads
        self.depth = depth
        self.width_mult = width_mult
        self.residual = residual
        self.order = order
        self.max_gap = max_gap
        self.window = order + 1
        self.fuse = nn.Sequential(nn.Linear(2 * width, inner), nn.SiLU(), nn.Linear(inner, inner))
        self.gap = nn.Linear(2 * NUM_FREQUENCIES, modulation_width)
        self.blocks = nn.ModuleList(
            self.block(inner, modulation_width, num_heads) for _ in range(depth)
        )
        self.out = nn.Linear(inner, width)
        nn.init.zeros_(self.gap.weight)
        nn.init.zeros_(self.gap.bias)
        if residual:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def size(self) -> str:
        """Its parameters."""
        return f"{sum(p.numel() for p in self.parameters())} parameters"

    @property
    def smallest(self) -> tuple[int, int]:
        """Tokens and channels, see the base class."""
        return SMALLEST[0], self.width

    def forward(self, history: History, step: Step) -> Float[Tensor, "B N D"]:
        """The forecast, see the base class.

        Raises:
            ValueError: the history is empty, the newest anchor is too far, or the step comes
                without tokens and modulation.
        """
        forecast, newest = self.seen(history, step), history.features[-1]
        if self.residual:
            forecast = forecast + self.base(history, step).to(forecast.dtype)
        return forecast.to(newest.dtype)

    def seen(self, history: History, step: Step) -> Float[Tensor, "B N D"]:
        """`correction` at a step, of the newest anchor.

        Raises:
            ValueError: see `forward`.
        """
        if not len(history):
            raise ValueError("the history is empty: a forecast needs at least one anchor.")
        given = {"tokens": step.tokens, "modulation": step.modulation}
        if step.tokens is None or any(given[name] is None for name in self.needs):
            raise ValueError(
                "DisCa needs the tokens and the modulation vector of the step; they exist on the "
                "tap `hidden` of a transformer whose class is known to foreseer."
            )
        gap = history.sigmas[-1] - step.sigma
        if gap > self.max_gap + 1e-4:  # float32 grids round
            raise ValueError(
                f"step {step.index} is {gap:.3f} in sigma after the newest anchor, but the "
                f"predictor was trained on gaps up to {self.max_gap:g}; add an anchor."
            )
        cache = history.features[-1]
        if self.out.weight.device != cache.device:
            self.to(cache.device)  # loaded predictors come on the CPU
        return self.correction(cache, step.tokens, step.modulation, gap)

    def base(self, history: History, step: Step) -> Float[Tensor, "B N D"]:
        """The formula training starts at."""
        newest = history.features[-1]
        if self.order == 0 or len(history) < 2:
            return newest
        older, now = history.sigmas[-2], history.sigmas[-1]
        return newest + (newest - history.features[-2]) * ((step.sigma - now) / (now - older))

    def correction(
        self,
        cache: Float[Tensor, "B N D"],
        tokens: Float[Tensor, "B N D"],
        modulation: Float[Tensor, "B W"] | None,
        gap: float,
    ) -> Float[Tensor, "B N D"]:
        """What the network adds, in its own dtype.

        Args:
            cache: the newest anchor's feature.
            tokens: what enters the first block at this step.
            modulation: the host's modulation vector at this step, where it has one.
            gap: distance to the newest anchor in sigma.
        """
        dtype = self.out.weight.dtype
        tokens, cache = tokens.to(dtype), cache.to(dtype)
        hidden = self.fuse(torch.cat([tokens, cache], dim=-1))
        k = self.gap(_waves(gap).to(self.gap.weight)).expand(len(tokens), -1)
        if modulation is not None:
            k = modulation.to(dtype) + k
        for block in self.blocks:
            hidden = block(hidden, k)
        return self.out(hidden)


class AdaLNBlock(nn.Module):
    """A DiT block with adaLN-Zero modulation, identity at the start (arXiv 2212.09748, 3.2).

    Args:
        width: channels P.
        modulation_width: width of the modulation vector.
        num_heads: attention heads.
    """

    def __init__(self, width: int, modulation_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.modulate = nn.Linear(modulation_width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Float[Tensor, "B N P"], k: Float[Tensor, "B W"]) -> Float[Tensor, "B N P"]:
        """The block's output.

        Args:
            x: tokens.
            k: modulation vector.
        """
        parts = self.modulate(nn.functional.silu(k))[:, None].chunk(6, dim=-1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        x = x + gate * self._attend(_normalised(x) * (1 + scale) + shift)
        return x + gate_mlp * self.mlp(_normalised(x) * (1 + scale_mlp) + shift_mlp)

    def _attend(self, x: Float[Tensor, "B N P"]) -> Float[Tensor, "B N P"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self._bias(x.shape[1])
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, bias
        )  # (B, heads, N, P / heads)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _bias(self, num_tokens: int) -> Float[Tensor, "heads N N"] | None:
        """What attention adds from one token to another; nothing, since pictures say where."""
        return None


DiscaPredictor.block = AdaLNBlock


class OffsetBlock(AdaLNBlock):
    """An `AdaLNBlock` whose attention has a bias per offset between two tokens in a row."""

    def __init__(self, width: int, modulation_width: int, num_heads: int) -> None:
        super().__init__(width, modulation_width, num_heads)
        self.offsets = nn.Parameter(torch.zeros(num_heads, 2 * REACH + 1))

    def _bias(self, num_tokens: int) -> Float[Tensor, "heads N N"]:
        places = torch.arange(num_tokens, device=self.offsets.device)
        return self.offsets[:, (places - places[:, None]).clamp(-REACH, REACH) + REACH]


class OffsetDisca(DiscaPredictor):
    """`DiscaPredictor` of a host without modulation; read from files, no fit makes it any more.

    Tokens and cache are normalised, attention has a bias per offset, and the distance to the anchor
    is all that modulates.

    Args:
        width: see `DiscaPredictor`, as all of them.
        num_heads: see there.
        depth: see there.
        width_mult: see there.
        residual: see there.
        order: see there.
        max_gap: see there.
    """

    needs = frozenset({"tokens"})
    block = OffsetBlock

    def __init__(
        self,
        width: int,
        num_heads: int = 3,
        depth: int = 2,
        width_mult: float = 1.0,
        residual: bool = True,
        order: int = 0,
        max_gap: float = 0.2,
    ) -> None:
        waves = 2 * NUM_FREQUENCIES
        super().__init__(width, waves, num_heads, depth, width_mult, residual, order, max_gap)

    def correction(
        self,
        cache: Float[Tensor, "B N D"],
        tokens: Float[Tensor, "B N D"],
        modulation: Float[Tensor, "B W"] | None,
        gap: float,
    ) -> Float[Tensor, "B N D"]:
        """See `DiscaPredictor`."""
        dtype = self.out.weight.dtype
        cache, tokens = _normalised(cache.to(dtype)), _normalised(tokens.to(dtype))
        return super().correction(cache, tokens, None, gap)


def _normalised(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:])


def _waves(gap: float) -> Float[Tensor, "1 features"]:
    """Sines and cosines of a distance in sigma."""
    lowest = 1.0
    ratio = HIGHEST_FREQUENCY / lowest
    frequencies = [lowest * ratio ** (i / (NUM_FREQUENCIES - 1)) for i in range(NUM_FREQUENCIES)]
    angles = [gap * frequency for frequency in frequencies]
    return torch.tensor([[*map(math.sin, angles), *map(math.cos, angles)]])
