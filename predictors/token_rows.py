"""Rows over each token's own past, and what it takes from tokens that are computed beside it.

Shapes: S sampling steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.lattice_policy import LatticePolicy
from foreseer.predictors.linear import L2P
from foreseer.predictors.pruning_policy import PruningPolicy
from foreseer.predictors.tokens import TokenPolicy

Learned = LatticePolicy | PruningPolicy
POLICIES: dict[str, type[Learned]] = {
    policy.__name__: policy for policy in (LatticePolicy, PruningPolicy)
}


class TokenRows(L2P):
    """L2P with a token policy whose past and gain were fitted for every step and branch.

    Between anchors F_hat_t = sum_a W[branch, t, a] F_a; a `LatticePolicy` corrects it by what it
    computes at forecast steps, a `PruningPolicy` prunes the attention of the anchors. Starts with
    past 1 and gain 0: forecasts alone.

    Args:
        num_steps: sampling steps S.
        anchors: steps at which the network runs.
        num_branches: guidance branches.
        policy: the token policy, or what it `describe`d itself by.

    Raises:
        ValueError: there is no such policy, it refuses its arguments, or see `L2P`.
    """

    from_grams = False  # past and gain are fitted on runs

    def __init__(
        self,
        num_steps: int,
        anchors: Sequence[int],
        num_branches: int = 1,
        policy: Learned | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(num_steps, anchors, num_branches)
        told = LatticePolicy() if policy is None else policy
        self.policy = dict(told) if isinstance(told, Mapping) else told.describe()
        policy_of(self.policy)  # raises what it refuses
        self.pairs: Float[Tensor, "branches S 2"]
        start = torch.tensor([1.0, 0.0], dtype=torch.float64)
        self.register_buffer("pairs", start.repeat(num_branches, num_steps, 1))

    @property
    def tokens(self) -> TokenPolicy:
        """A policy with the fitted past and gain, for one attachment."""
        made = policy_of(self.policy)
        made.innovation.pairs = self.pairs
        return made

    def size(self) -> str:
        """How many weights, and of which policy."""
        return f"{super().size()} with a {self.policy['class']}"


def policy_of(told: Mapping[str, Any]) -> Learned:
    """The policy that described itself so.

    Raises:
        ValueError: there is none, or it refuses.
    """
    arguments = dict(told)
    name = arguments.pop("class", None)
    if name not in POLICIES:
        raise ValueError(f"the policy is of the class {name!r}, expected one of {list(POLICIES)}.")
    try:
        return POLICIES[name](**arguments)
    except TypeError as error:
        raise ValueError(f"{name} does not take {sorted(arguments)}: {error}.") from error
