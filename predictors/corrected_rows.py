"""Rows over the anchors, and a small transformer for what they leave.

Shapes: S sampling steps, A anchors, B batch, N tokens, D channels of the host.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import SMALLEST, History, Step
from foreseer.predictors.linear import L2P
from foreseer.predictors.neural import DiscaPredictor


class CorrectedRows(L2P):
    """F_hat[b,t] = sum_a W[b,t,a] F[b,a] + G(tokens, F[b,a_k], modulation, sigma_k - sigma_t).

    W are the rows of a fitted L2P, which stay as they are. G is DisCa's network (arXiv 2602.05449)
    on the newest anchor a_k; its last layer starts at zero, so that training starts at the rows bit
    for bit. This is ours: a published predictor has to find in its weights what rows have in
    closed form.

    Args:
        num_steps: sampling steps S.
        anchors: steps at which the network runs, starting with 0.
        num_branches: guidance branches.
        expert_steps: first step of each transformer, starting with 0; all are anchors.
        first_time: flow time that the network is told at step 0, see `L2P`.
        width: D.
        modulation_width: see `DiscaPredictor`.
        num_heads: see there.
        depth: see there.
        width_mult: see there.

    Raises:
        ValueError: see `L2P` and `DiscaPredictor`.
    """

    needs = frozenset({"tokens", "modulation"})
    from_grams = False
    tag = "disca"
    form = "a small transformer's view of the step's tokens, and weighted sums of"

    def __init__(
        self,
        num_steps: int,
        anchors: Sequence[int],
        num_branches: int = 1,
        expert_steps: Sequence[int] = (0,),
        first_time: float | None = None,
        width: int = 1,
        modulation_width: int = 1,
        num_heads: int = 3,
        depth: int = 2,
        width_mult: float = 1.0,
    ) -> None:
        super().__init__(num_steps, anchors, num_branches, expert_steps, first_time=first_time)
        self.network = DiscaPredictor(
            width, modulation_width, num_heads, depth, width_mult, max_gap=1.0
        )
        self.width, self.modulation_width = width, modulation_width
        self.num_heads, self.depth, self.width_mult = num_heads, depth, width_mult

    @classmethod
    def over(cls, rows: L2P, **network: Any) -> "CorrectedRows":
        """One that starts at fitted rows, which are of whole features.

        Args:
            rows: to be corrected.
            network: sizes of the network, by argument of the constructor.
        """
        told = {name: value for name, value in rows.arguments().items() if name != "partition"}
        made = cls(**told, **network)
        made.set_rows(rows.weight)
        return made

    def size(self) -> str:
        """Its parameters, and the rows beside them."""
        return f"{self.network.size()} and {int((self.weight != 0).sum())} non-zero weights"

    @property
    def smallest(self) -> tuple[int, int]:
        """Tokens and channels, see the base class."""
        return SMALLEST[0], self.width

    def forward(self, history: History, step: Step) -> Float[Tensor, "B N D"]:
        """The sum of both, see the class.

        Raises:
            ValueError: the history is empty or not the rows', or the step comes without tokens and
                modulation.
        """
        rows = super().forward(history, step)
        return (rows + self.network.seen(history, step)).to(rows.dtype)
