"""Tokens near an edit are computed more often: the spatial locality caching of EEdit.

Shapes: B samples, M = branches * B rows of a call, N tokens of the stream, of which those of a
source picture come last, h x w tokens of the picture, D channels, n selected tokens.
Source: EEdit, arXiv 2503.10270; yuriYanZeXuan/EEdit (MIT).
"""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foreseer.predictors.token_groups import REGIONS, dilated
from foreseer.predictors.tokens import TokenPolicy, flat_index, take


class RegionPolicy(TokenPolicy):
    """The tokens with the highest scores, which are higher in and around the edit's mask.

    score = (u + weight * staleness / interval) * s, u uniform in [0, 1); s = 1 + boost decay^(1+k)
    in ring k of the mask (ring 0 is the mask), 1 beyond the last ring. Staleness counts the partial
    steps since a token was computed. Scores depend on nothing that is computed, so the picks of all
    steps are made at the first anchor (the release's token index preprocessing).

    What a computed token adds to its forecast is kept until the next anchor, F_t = F_hat_t + e:
    with `Reuse` the token keeps its newest value, as in the release. There every module of every
    layer has picks of its own; here a step has one set for all.

    Args:
        ratio: share of the picture's tokens computed at a partial step, in (0, 1].
        grid: height and width of the picture in tokens; None takes a square.
        rings: rings around the mask, >= 0.
        weight: of staleness, >= 0.
        interval: steps from an anchor to the next, by which staleness is divided.
        boost: b, >= 0.
        decay: r, in (0, 1].
        seed: see the base class.
        pattern: see the base class.

    Raises:
        ValueError: an argument is out of range.
    """

    group_names = REGIONS

    def __init__(
        self,
        ratio: float = 0.1,
        grid: tuple[int, int] | None = None,
        rings: int = 3,
        weight: float = 0.25,
        interval: int = 3,
        boost: float = 2.0,
        decay: float = 0.8,
        seed: int = 0,
        pattern: Sequence[bool] = (True,),
    ) -> None:
        if not 0 < ratio <= 1 or rings < 0 or weight < 0 or interval < 1:
            raise ValueError(
                f"found ratio {ratio}, rings {rings}, weight {weight} and interval {interval}; "
                "expected a ratio in (0, 1], rings and a weight >= 0 and an interval >= 1."
            )
        if boost < 0 or not 0 < decay <= 1:
            raise ValueError(
                f"found boost {boost} and decay {decay}, expected a boost >= 0 and a decay in "
                "(0, 1]."
            )
        self.ratio, self.grid, self.rings, self.weight = ratio, grid, rings, weight
        self.interval, self.boost, self.decay = interval, boost, decay
        super().__init__(seed, pattern)

    def reset(self) -> None:
        """Forget the picks and what was computed."""
        super().reset()
        self.picks: dict[int, Tensor] = {}
        self.added: dict[tuple[int, ...], Tensor] = {}

    def prepare(
        self, groups: Int[Tensor, "B N"] | None, anchors: Collection[int], num_steps: int
    ) -> None:
        """Make the picks of all partial steps.

        Raises:
            ValueError: a sample has no token to edit, or the picture is no square and no grid was
                given.
        """
        assert groups is not None  # whoever attaches the policy has asked for them
        factor = self.factors(groups)
        self.num_samples, self.num_tokens = groups.shape
        self.device = groups.device
        count = max(1, int(self.ratio * factor.shape[1]))
        staleness = torch.zeros_like(factor)
        newest, self.picks = 0, {}
        for step in range(num_steps):
            if step in anchors:
                newest, staleness = step, torch.zeros_like(factor)
            elif self.is_partial(step - newest):
                score = self._scores(step)[:, : factor.shape[1]]
                score = (score + self.weight * staleness / self.interval) * factor
                self.picks[step] = score.topk(count).indices.sort().values
                staleness = (staleness + 1).scatter(1, self.picks[step], 0.0)

    def factors(self, groups: Int[Tensor, "B N"]) -> Float[Tensor, "B hw"]:
        """S of every token of the picture, float64."""
        num_tokens = int((groups[0] != REGIONS.index("reference")).sum())
        side = round(num_tokens**0.5)
        height, width = self.grid or (side, side)
        if height * width != num_tokens:
            raise ValueError(
                f"the picture has {num_tokens} tokens, found the grid {height} x {width}; say "
                "grid=(height, width) in tokens."
            )
        inside = groups[:, :num_tokens].unflatten(1, (height, width)) == REGIONS.index("edit")
        if not bool(inside.flatten(1).any(1).all()):
            raise ValueError("a sample has no token of the group 'edit', so no region to go by.")
        factor = torch.ones(inside.shape, dtype=torch.float64, device=groups.device)
        for ring in reversed(range(self.rings + 1)):
            near = dilated(inside, ring)
            factor = torch.where(near, 1 + self.boost * self.decay ** (1 + ring), factor)
        return factor.flatten(1)

    def observe(self, features: Float[Tensor, "B N C"]) -> None:
        """An anchor has computed all tokens."""
        super().observe(features)
        self.added = {}

    def select(self, step_index: int) -> Int[Tensor, "B n"]:
        """The picks of a step."""
        return self.picks[step_index]

    def merge(
        self,
        forecast: Float[Tensor, "M N D"],
        fresh: Float[Tensor, "M n D"],
        selected: Int[Tensor, "M n"],
        branches: tuple[int, ...] = (0,),
    ) -> Float[Tensor, "M N D"]:
        """The forecast and what the tokens computed since the anchor add to it."""
        added = self.added.get(branches)
        if added is None:
            added = self.added[branches] = torch.zeros_like(forecast)
        places = flat_index(selected, forecast.shape[1])
        new = (fresh - take(forecast, selected)).to(added.dtype)
        added.flatten(0, 1).index_copy_(0, places, new.flatten(0, 1))
        return super().merge(forecast + added, fresh, selected, branches)

    def state_bytes(self) -> int:
        """Bytes of the picks and of what was computed."""
        kept = [*self.picks.values(), *self.added.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)
