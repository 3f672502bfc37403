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
REACH = 16  # tokens, of a language model
HIGHEST_FREQUENCY = 30.0  # radians per unit of flow time


class DiscaPredictor(Predictor):
    """F_hat = base + out(blocks(fuse([tokens; cache]), k)), two adaLN blocks under the host's k.

    `base` is 0 as published (`residual` false), the newest anchor's feature (reuse), or the line
    through the two newest ones (`order` 1); `out` starts at zero, so that training starts exactly
    at that formula. Anchors refresh the cache, forecasts never do. The distance to the newest
    anchor is added to k by an embedding that starts at zero.

    Args:
        width: D, channels of a hidden state.
        modulation_width: W; 0 of a host without modulation, such as a language model: the blocks
            are then modulated by the distance to the anchor alone.
        num_heads: attention heads of a block; must divide the predictor's width.
        depth: blocks.
        width_mult: P / D, in (0, 1].
        residual: whether there is a base.
        order: 0 for reuse, 1 for linear extrapolation in sigma where two anchors are known.
        max_gap: longest distance in sigma to the newest anchor that was trained on.

    Raises:
        ValueError: an argument is out of range.
    """

    needs = frozenset({"tokens", "modulation"})  # of a host with modulation
    learned = True
    any_anchors = True
    tag = "disca"
    form = "a small transformer's view of the step's tokens and"

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
        if not 0 < width_mult <= 1 or inner % num_heads or depth < 1 or not 0 < max_gap <= 1:
            raise ValueError(
                f"found width {width} times {width_mult}, {num_heads} heads, depth {depth} and "
                f"max_gap {max_gap}; expected a multiplier and a gap in (0, 1], at least one block "
                "and heads that divide the width."
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
        k_width = modulation_width or 2 * NUM_FREQUENCIES
        self.gap = nn.Linear(2 * NUM_FREQUENCIES, k_width)
        reach = 0 if modulation_width else REACH
        blocks = [AdaLNBlock(inner, k_width, num_heads, reach) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.out = nn.Linear(inner, width)
        if modulation_width:
            nn.init.zeros_(self.gap.weight)
            nn.init.zeros_(self.gap.bias)
        else:
            self.needs = frozenset({"tokens"})
            for block in blocks:
                open_gates(block)
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
        forecast = self.correction(cache, step.tokens, step.modulation, gap)
        if self.residual:
            forecast = forecast + self.base(history, step).to(forecast.dtype)
        return forecast.to(cache.dtype)

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
        if not self.modulation_width:  # a language model's stream is far larger than what enters it
            tokens, cache = _normalised(tokens), _normalised(cache)
        hidden = self.fuse(torch.cat([tokens, cache], dim=-1))
        k = self.gap(_waves(gap).to(self.gap.weight)).expand(len(tokens), -1)
        if modulation is not None and self.modulation_width:
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
        reach: farthest offset between two tokens in a row that attention has a bias of its own for;
            0 where the features say where a token is, as those of pictures do.
    """

    def __init__(self, width: int, modulation_width: int, num_heads: int, reach: int = 0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.reach = reach
        if reach:
            slopes = 2.0 ** -torch.arange(
                num_heads
            )  # near tokens first, as ALiBi, arXiv 2108.12409
            far = torch.arange(-reach, reach + 1).abs()
            self.offsets = nn.Parameter(-slopes[:, None] * far)
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
        bias = self._bias(x.shape[1]) if self.reach else None
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, bias
        )  # (B, heads, N, P / heads)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _bias(self, num_tokens: int) -> Float[Tensor, "heads N N"]:
        """What attention adds for the offset from one token to another."""
        places = torch.arange(num_tokens, device=self.offsets.device)
        offset = (places - places[:, None]).clamp(-self.reach, self.reach) + self.reach
        return self.offsets[:, offset]


def open_gates(block: AdaLNBlock) -> None:
    """Start a block as a plain one: under no modulation of a host its gates would stay shut."""
    with torch.no_grad():
        for gate in (2, 5):
            block.modulate.bias.unflatten(0, (6, -1))[gate].fill_(1.0)


def _normalised(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:])


def _waves(gap: float) -> Float[Tensor, "1 features"]:
    """Sines and cosines of a distance in sigma."""
    lowest = 1.0
    ratio = HIGHEST_FREQUENCY / lowest
    frequencies = [lowest * ratio ** (i / (NUM_FREQUENCIES - 1)) for i in range(NUM_FREQUENCIES)]
    angles = [gap * frequency for frequency in frequencies]
    return torch.tensor([[*map(math.sin, angles), *map(math.cos, angles)]])
