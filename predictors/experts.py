"""L2P for pipelines with several transformers: rows of each over its own anchors.

Shapes: S sampling steps, K history length.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, Step
from foreseer.predictors.linear import L2P, rows_at


class L2PExperts(L2P):
    """F_hat_t = sum_a W[branch, t, a] F_a over the anchors a < t of the transformer that runs at t.

    The rows are L2P's (arXiv 2604.26365), those of one transformer in its block of the matrix. Wan
    2.2 runs one at high noise and another at low noise, whose features have nothing in common.

    Args:
        num_steps: sampling steps S.
        anchors: steps at which the network runs, the first step of every transformer among them.
        num_branches: guidance branches.
        expert_steps: first step of each transformer, starting with 0.

    Raises:
        ValueError: the anchors are not a schedule of such a run.
    """

    def __init__(
        self,
        num_steps: int,
        anchors: Sequence[int],
        num_branches: int = 1,
        expert_steps: Sequence[int] = (0,),
    ) -> None:
        super().__init__(num_steps, anchors, num_branches)
        missing = sorted({0, *expert_steps} - set(anchors))
        if missing or list(expert_steps) != sorted(set(expert_steps)):
            raise ValueError(
                f"expert_steps are {list(expert_steps)} and the anchors {list(anchors)}; expected "
                "rising steps starting with 0, all of them anchors: what one transformer computed "
                f"says nothing about the next (missing: {missing})."
            )
        self.expert_steps = tuple(expert_steps)

    def coefficients(self, history: History, step: Step) -> Float[Tensor, "K branches"]:
        """The learned row of each branch at this step.

        Raises:
            ValueError: a branch or step the rows do not have, or another history than theirs.
        """
        first = expert_start(self.expert_steps, step.index)
        own = [anchor for anchor in self.anchors if anchor >= first]
        return rows_at(self.weight, own, history, step).mT


def expert_start(expert_steps: Sequence[int], index: int) -> int:
    """First step of the transformer that runs at a step."""
    return max(step for step in expert_steps if step <= index)
