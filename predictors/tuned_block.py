"""A masked language model's corrector: its last block, run between evaluations on what is new.

Shapes: B batch, N tokens, D channels of the host.
Source: ours; that a small trained network on the kept hidden state pays where what was committed is
shown to it is multi-token residual prediction's, arXiv 2605.18817.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.predictors.base import SMALLEST, History, Predictor, Step


class TunedLastBlock(Predictor):
    """h_hat_t = block_w(E(x_t) + F_a + U norm(E(x_t))), F_a = s_a - E(x_a).

    E(x) enters the first block and s the last one. What the blocks in between added at the newest
    anchor is kept; the embeddings are those of the tokens as they are now, so that the last block
    sees what was committed since. U makes them as loud as a stream is by the last block; it starts
    at zero and w at the host's own weights, which is `Reuse` on this tap.

    Args:
        width: D.
        block: the shapes of the block's weights by name.
        max_gap: longest distance in sigma to the newest anchor that was trained on.
        max_tokens: longest sequence that was trained on, padding included.

    Raises:
        ValueError: no weights, or a number out of range.
    """

    needs = frozenset({"tokens"})
    window = 1
    learned = True
    any_anchors = True
    tag = "corrector"
    form = "the host's last block, with weights of its own, on the step's tokens and"

    def __init__(
        self, width: int, block: Mapping[str, Sequence[int]], max_gap: float, max_tokens: int
    ) -> None:
        super().__init__()
        if width < 1 or not block or not 0 < max_gap <= 1 or max_tokens < 1:
            raise ValueError(
                f"found width {width}, {len(block)} weights, max_gap {max_gap} and max_tokens "
                f"{max_tokens}; expected the shapes of a block's weights by name, a gap in (0, 1], "
                "and at least one channel and token."
            )
        self.width = width
        self.block = {name: list(shape) for name, shape in block.items()}
        self.max_gap = max_gap
        self.max_tokens = max_tokens
        self._cast: dict[str, Tensor] = {}  # where the host's dtype is another
        self.louder = nn.Parameter(torch.zeros(width, width))  # U
        for name, shape in self.block.items():
            self.register_parameter(_slot(name), nn.Parameter(torch.zeros(*shape)))

    @classmethod
    def of(cls, width: int, block: nn.Module, max_gap: float, max_tokens: int) -> "TunedLastBlock":
        """One that starts with a block's own weights, in float32 on their device.

        Args:
            width: see the class.
            block: a host's last block.
            max_gap: see the class.
            max_tokens: see the class.
        """
        weights = dict(block.named_parameters())
        shapes = {name: weight.shape for name, weight in weights.items()}
        made = cls(width, shapes, max_gap, max_tokens)
        with torch.no_grad():
            for name, weight in weights.items():
                made.get_parameter(_slot(name)).copy_(weight)
        return made.to(next(block.parameters()).device)

    @property
    def block_weights(self) -> dict[str, Tensor]:
        """See the base class."""
        return self._cast or {name: self.get_parameter(_slot(name)) for name in self.block}

    @property
    def smallest(self) -> tuple[int, int]:
        """Tokens and channels, see the base class."""
        return SMALLEST[0], self.width

    def size(self) -> str:
        """Its parameters."""
        return f"{sum(p.numel() for p in self.parameters())} parameters"

    def forward(self, history: History, step: Step) -> Float[Tensor, "B N D"]:
        """What the blocks before the last had added at the newest anchor, and U norm(E(x_t)).

        Raises:
            ValueError: the history is empty, the step has no tokens, the newest anchor is too far,
                or the sequence longer than those of the fit.
        """
        if not len(history) or step.tokens is None:
            raise ValueError(
                "the history is empty, or the step comes without its tokens: a forecast needs at "
                "least one anchor, and what enters the first block."
            )
        gap = abs(history.sigmas[-1] - step.sigma)
        if gap > self.max_gap + 1e-4:  # float32 grids round
            raise ValueError(
                f"step {step.index} is {gap:.3f} in sigma after the newest anchor, but the "
                f"predictor was trained on gaps up to {self.max_gap:g}; add an anchor."
            )
        kept = history.features[-1]
        if kept.shape[1] > self.max_tokens:
            raise ValueError(
                f"prompt and response are {kept.shape[1]} tokens, but the predictor was fitted on "
                f"at most {self.max_tokens}; fit it on decodings of such prompts."
            )
        own = next(self.parameters())
        if own.device != kept.device:
            self.to(kept.device)  # loaded predictors come on the CPU
        if own.dtype != kept.dtype and not self._cast:
            self._cast = {name: w.detach().to(kept) for name, w in self.block_weights.items()}
        return self.added(kept, step.tokens)

    def added(
        self, kept: Float[Tensor, "B N D"], tokens: Float[Tensor, "B N D"]
    ) -> Float[Tensor, "B N D"]:
        """What is added to the tokens before they enter the last block.

        Args:
            kept: F_a.
            tokens: E(x_t).
        """
        normed = nn.functional.layer_norm(tokens, tokens.shape[-1:])
        return kept + nn.functional.linear(normed, self.louder.to(normed))


def _slot(name: str) -> str:
    """Name under which a weight is held: that of a parameter has no dots."""
    return name.replace(".", "/")
