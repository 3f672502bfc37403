"""Readout: rows over the anchors' outputs, and a velocity read off the last anchor's hidden state.

Shapes: S sampling steps, A anchors, B batch, M tokens of the picture, D channels of a hidden state,
P elements of a token in the output, r channels read, k side of the neighbourhood, Q anchors before.
Ours: rows see nothing outside the span of the anchors' outputs. The hidden state, which the anchor
computed anyway, knows more of what comes next; a second head reads it off (docs/readout.md).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.predictors.base import SMALLEST, Grid, History, Reading, Step
from foreseer.predictors.linear import L2P
from foreseer.predictors.partition import Partition
from foreseer.predictors.solve import known_anchors
from foreseer.predictors.token_groups import TokenGroups
from foreseer.predictors.weighted import combine

STORED = torch.bfloat16  # half of a file's bytes; a rounding of 2^-9 of a correction


class Readout(L2P):
    """F_hat[b,t] = sum_a W[b,t,a] F[b,a] + U[k] * h[b,k] + c[k] up to anchor k + 1.

    h[b,k] = sum_{q <= Q} V[k,q] norm(H[b,a_{k-q}]) on the `output` tap; a_k is the last anchor
    before t, and anchors of another transformer are left out. `norm` is LayerNorm over channels
    without parameters, in float32; V[k,q] maps a token's D channels to r, and * with U[k] is a
    convolution over the picture's grid of tokens, 3 x 3 with `neighbours` and 1 x 1 without. All
    are shared by all tokens, samples, prompts, branches and the forecast steps of a segment;
    guidance combines what is read like the outputs. U = 0, c = 0 is L2P bit for bit. It is computed
    at the anchor, so a run keeps one more tensor of the output's size, nothing of H, and Q tensors
    of r numbers a token for the anchors to come.

    A schedule may compute further steps: after one, until the next of the rows' anchors, forecasts
    are moved by what they were wrong there (see `L2P`), which cancels what was read.

    Args:
        num_steps: sampling steps S.
        anchors: steps at which the network runs, starting with 0.
        num_branches: guidance branches.
        expert_steps: first step of each transformer, starting with 0; all are anchors.
        width: D.
        patch: P.
        rank: r.
        neighbours: whether tokens next to a token, diagonals included, are read for it too.
        past: Q.
        first_time: flow time that the network is told at step 0, see `L2P`.
        partition: `TokenGroups` that have rows, U and c of their own, and share V; None of all
            tokens alike.

    Raises:
        ValueError: the anchors are not a schedule of such a run, a size is below 1, the time is
            not in (0, 1], or the parts are not of tokens.
    """

    reads = True
    from_grams = False
    tag = "readout"
    form = "what was read off the last hidden state, and weighted sums of"

    def __init__(
        self,
        num_steps: int,
        anchors: Sequence[int],
        num_branches: int = 1,
        expert_steps: Sequence[int] = (0,),
        width: int = 1,
        patch: int = 1,
        rank: int = 1,
        neighbours: bool = True,
        past: int = 0,
        first_time: float | None = None,
        partition: Partition | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(num_steps, anchors, num_branches, expert_steps, partition, first_time)
        if self.partition is not None and not isinstance(self.partition, TokenGroups):
            raise ValueError(
                f"a readout works on tokens; found {self.partition.num_parts} "
                f"{self.partition.kind}, expected TokenGroups or none."
            )
        if width < 1 or patch < 1 or not 1 <= rank <= width or past < 0:
            raise ValueError(
                f"found width {width}, patch {patch}, rank {rank} and past {past}, expected at "
                "least 1, a rank up to the width, and 0 earlier anchors or more."
            )
        self.width, self.patch, self.rank, self.neighbours = width, patch, rank, neighbours
        self.past = past
        count, side = len(self.anchors), 3 if neighbours else 1
        self.inner: Float[Tensor, "A r E"]  # E = (1 + Q) D: V of the anchor, of the one before, ...
        self.outer: Float[Tensor, "A *G P r k k"]
        self.constant: Float[Tensor, "A *G P"]
        self.register_buffer("inner", torch.zeros(count, rank, (1 + past) * width, dtype=STORED))
        groups = () if self.partition is None else (self.partition.num_parts,)
        sizes = count, *groups, patch
        self.register_buffer("outer", torch.zeros(*sizes, rank, side, side, dtype=STORED))
        self.register_buffer("constant", torch.zeros(*sizes))

    @property
    def smallest(self) -> tuple[int, int]:
        """Tokens and channels, see the base class."""
        return SMALLEST[0], self.patch

    def set_readout(
        self,
        anchor: int,
        inner: Float[Tensor, "few E"],
        outer: Float[Tensor, "*G P few k k"],
        constant: Float[Tensor, "*G P"],
    ) -> None:
        """Make these V, U and c of one anchor; directions beyond theirs read nothing.

        Args:
            anchor: one of `anchors`.
            inner: V of the anchor, then of those before it, of r directions at most.
            outer: U.
            constant: c.
        """
        number, few = self.anchors.index(anchor), len(inner)
        self.inner[number, :few, : inner.shape[1]] = inner.to(self.inner)
        self.outer[number, ..., :few, :, :] = outer.to(self.outer)
        self.constant[number] = constant.to(self.constant)

    def grow(self, number: int, share: float) -> None:
        """Let U and c of an anchor grow by a share of themselves, and so what is read there.

        Args:
            number: of the anchor, counted from 0.
            share: 0 leaves them, -1 reads nothing.
        """
        self.outer[number] = ((1 + share) * self.outer[number].double()).to(self.outer)
        self.constant[number] *= 1 + share

    def reach(self, number: int) -> int:
        """How many earlier anchors are read at an anchor: Q, or those its transformer has had.

        Args:
            number: of the anchor, counted from 0.
        """
        known = known_anchors(self.anchors, self.expert_steps, self.anchors[number])
        return min(self.past, len(known) - 1)

    def read(
        self,
        hidden: Float[Tensor, "B M D"],
        step: Step,
        grid: Grid | None = None,
        carried: Float[Tensor, "B M Q r"] | None = None,
    ) -> Reading | None:
        """U * h + c at an anchor, float32 or wider; None at a step that is none.

        Raises:
            ValueError: the hidden state has another width, the grid it needs is not known, or
                nothing is carried from the anchors before.
        """
        if step.index not in self.anchors:
            return None
        if hidden.shape[-1] != self.width:
            raise ValueError(
                f"the hidden state has {hidden.shape[-1]} channels, the readout was fitted on "
                f"{self.width}: another host. Record and fit for this one."
            )
        number = self.anchors.index(step.index)
        values = normalised(hidden)
        read = self._share(values, number, 0)
        if self.reach(number):
            if carried is None:
                raise ValueError(
                    f"nothing was carried from the anchors before step {step.index}, which are "
                    "read there too; pass `History.carried` on."
                )
            read = read + carried[:, :, 0]
        near = neighbourhood(read, grid) if self.neighbours else read
        outer = self.outer[number].to(values).movedim(-3, -1).flatten(-3)  # (*G, P, k * k * r)
        constant = self.constant[number].to(values)
        if self.partition is None:
            read = nn.functional.linear(near, outer, constant)
        else:
            each = [nn.functional.linear(near, *own) for own in zip(outer, constant, strict=True)]
            read = self.partition.at(step.groups).weigh(each)
        return Reading(read, self.carry(values, number, carried))

    def carry(
        self,
        values: Float[Tensor, "B M D"],
        number: int,
        carried: Float[Tensor, "B M Q r"] | None = None,
    ) -> Float[Tensor, "B M Q r"] | None:
        """What the anchors up to one add to h of the Q after it; None where Q is 0.

        Args:
            values: norm(H) at the anchor.
            number: of the anchor, counted from 0.
            carried: the same of the anchor before.
        """
        if not self.past:
            return None
        shares = []
        for ahead in range(1, self.past + 1):
            later = number + ahead
            reached = later < len(self.anchors) and ahead <= self.reach(later)
            share = self._share(values, later, ahead) if reached else None
            if share is None:
                share = values.new_zeros(*values.shape[:2], self.rank)
            elif carried is not None and ahead < self.past:
                share = share + carried[:, :, ahead]
            shares.append(share)
        return torch.stack(shares, 2)

    def _share(
        self, values: Float[Tensor, "B M D"], number: int, ahead: int
    ) -> Float[Tensor, "B M r"]:
        """V[number, ahead] of the hidden state of the anchor that many before."""
        columns = slice(ahead * self.width, (ahead + 1) * self.width)
        return nn.functional.linear(values, self.inner[number, :, columns].to(values))

    def forward(self, history: History, step: Step) -> Float[Tensor, " B *shape"]:
        """The sum of both, see the class.

        Raises:
            ValueError: the history is empty, not the rows', or nothing was read at its last anchor.
        """
        if not len(history):
            raise ValueError("the history is empty: a forecast needs at least one anchor.")
        weights, features = self.coefficients(history, step), history.features
        if history.steps[-1] in self.anchors:
            if history.reading is None:
                raise ValueError(
                    f"nothing was read off the hidden state at step {history.steps[-1]}; push what "
                    "`read` returns with the anchor's output."
                )
            one = torch.ones_like(weights.narrow(-2, 0, 1))
            weights, features = torch.cat([weights, one], -2), [*features, history.reading]
        if self.partition is None:
            return combine(weights, features)
        return self.partition.at(step.groups).combine(weights, features)


def normalised(hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """LayerNorm over channels without parameters, in float32 or wider."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return nn.functional.layer_norm(wide, wide.shape[-1:])


def neighbourhood(values: Float[Tensor, "B M r"], grid: Grid | None) -> Float[Tensor, "B M 9*r"]:
    """The values of every token and of the eight around it in its frame, row by row; 0 outside.

    Args:
        values: of the tokens of a picture or video, in reading order.
        grid: frames, height and width, in tokens.

    Raises:
        ValueError: the grid is not known, or is another number of tokens.
    """
    if grid is None or grid[0] * grid[1] * grid[2] != values.shape[1]:
        raise ValueError(
            f"the readout reads neighbours, and the {values.shape[1]} tokens of this host lie on "
            f"the grid {grid}, expected frames x height x width; fit with neighbours=False."
        )
    frames, height, width = grid
    planes = values.unflatten(1, grid)
    padded = nn.functional.pad(planes, (0, 0, 1, 1, 1, 1))
    shifted = [
        padded[:, :, down : down + height, right : right + width]
        for down in range(3)
        for right in range(3)
    ]
    return torch.cat(shifted, -1).flatten(1, 3)
