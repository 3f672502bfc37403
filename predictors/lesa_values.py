"""LESA with a KAN on the feature values themselves, element by element.

Shapes: K taps, B batch.
Source: ours; the published KAN (arXiv 2602.20497) sees only the time and so reduces to a table.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.predictors.base import History, Step
from foreseer.predictors.gates import SplineNet, same_values, values_of
from foreseer.predictors.lesa import LesaPredictor
from foreseer.predictors.weighted import wide_dtype


class LesaValues(LesaPredictor):
    """F_hat = h_-1 + alpha_k (w_k . h + b_k + r KAN_k(h / r)), h the newest K anchors.

    The KAN maps the K values of one element to one number and is shared by all elements; values
    beyond the range r enter as r. Its last layer starts at 0, so that the predictor starts as plain
    reuse, and it contains `LesaPredictor` on the same anchors. Forecasts are not fed back: the
    recursion of a curve cannot be folded onto anchors.

    Args:
        sigmas: flow time of every step of the run.
        num_branches: guidance branches; each has its own experts.
        boundaries: falling flow times between the stages, see `LesaPredictor`.
        taps: K of every stage, one more than boundaries.
        value_hidden: widths of the hidden layers of the KAN on values; empty for a sum of curves.
        gate: `kan`, `mlp` or `table`, see `LesaPredictor`.
        hidden: widths of the gate's hidden layers.
        grid_size: intervals of the spline grids.
        grid_range: the gate's spline grid covers -grid_range to grid_range; that on values, -1 to
            1 in units of r.
        bias: whether there is a b_k.

    Raises:
        ValueError: an argument is out of range.
    """

    form = "curves of"

    def __init__(
        self,
        sigmas: Sequence[float],
        num_branches: int = 1,
        boundaries: Sequence[float] = (0.9, 0.5),
        taps: Sequence[int] = (4, 4, 4),
        value_hidden: Sequence[int] = (8,),
        gate: str = "kan",
        hidden: Sequence[int] = (16,),
        grid_size: int = 5,
        grid_range: float = 1.0,
        bias: bool = True,
    ) -> None:
        super().__init__(
            sigmas,
            num_branches,
            boundaries,
            taps,
            gate,
            hidden,
            grid_size,
            grid_range,
            feedback=False,
            bias=bias,
        )
        self.value_hidden = tuple(value_hidden)
        self.bends: dict[tuple, tuple[list[Tensor], list[weakref.ref], Tensor]] = {}
        self.value_range: Float[Tensor, " branches"]
        self.register_buffer("value_range", torch.ones(num_branches))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            self.curves = nn.ModuleList(
                nn.ModuleList(
                    SplineNet((k, *self.value_hidden, 1), grid_size, 1.0, zero_start=True)
                    for k in self.taps
                )
                for _ in range(num_branches)
            )

    def set_value_range(self, value_range: Float[Tensor, " branches"]) -> None:
        """Set r of every branch, such as the largest absolute value in a recording.

        Raises:
            ValueError: a range is not positive and finite.
        """
        if not bool(((value_range > 0) & torch.isfinite(value_range)).all()):
            raise ValueError(f"found ranges {value_range.tolist()}, expected finite ones above 0.")
        self.value_range.copy_(value_range)

    def correct(
        self, queue: Sequence[Float[Tensor, " B *shape"]], step: Step
    ) -> Float[Tensor, " B *shape"]:
        """The forecast from the anchors so far, differentiable, see the base class."""
        dtype = wide_dtype(queue[-1]) if len(queue) else torch.float32
        wide = [feature.to(dtype) for feature in queue]
        straight = super().correct(wide, step)
        return self._added(straight, self._bend(wide, step), step).to(queue[-1].dtype)

    def forward(self, history: History, step: Step) -> Float[Tensor, " B *shape"]:
        """The forecast, see the base class.

        Raises:
            ValueError: the history is empty, or see `affine`.
        """
        features = history.features
        dtype = wide_dtype(features[-1]) if features else torch.float32
        wide = [feature.to(dtype) for feature in features]
        seen = History(None, list(history.steps), list(history.sigmas), wide)
        straight = super().forward(seen, step)
        if torch.is_grad_enabled():
            bend = self._bend(wide, step)
        else:
            bend = self._kept_bend(features, wide, step)
        return self._added(straight, bend, step).to(features[-1].dtype)

    def train(self, mode: bool = True) -> "LesaValues":
        """Switch the mode and forget what is kept, see `torch.nn.Module.train`."""
        self.bends.clear()
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bends": {}}  # references to features are nothing to copy

    def _added(self, straight: Tensor, bend: Tensor, step: Step) -> Float[Tensor, " B *shape"]:
        """The forecast of the filter plus alpha of each branch times its curves."""
        alpha = self.alpha([step.index])[list(step.branches), 0].to(straight)
        parts = straight.unflatten(0, (len(alpha), -1))
        bends = bend.to(straight.dtype).view_as(parts)
        scale = alpha.view(-1, *(1 for _ in parts.shape[1:]))
        return torch.addcmul(parts, scale, bends).flatten(0, 1)

    def _kept_bend(self, features: list[Tensor], wide: list[Tensor], step: Step) -> Tensor:
        """What the curves made of these very features, computed once per anchor and stage."""
        key = (step.branches, self.stages[step.index])
        state = values_of((*self.curves.parameters(), self.value_range))
        known = self.bends.get(key)
        if known is not None and same_values(known[0], state) and len(known[1]) == len(features):
            if all(ref() is feature for ref, feature in zip(known[1], features, strict=True)):
                return known[2]
        bend = self._bend(wide, step)
        self.bends[key] = (state, [weakref.ref(feature) for feature in features], bend)
        return bend

    def _bend(self, wide: list[Tensor], step: Step) -> Float[Tensor, " B *shape"]:
        """What the curves of each branch make of its values: r KAN(h / r)."""
        stage = self.stages[step.index]
        taps = self.taps[stage]
        if wide[-1].device != self.curves[0][0].layers[0].coef.device:  # type: ignore[index]
            self.curves.to(wide[-1].device)  # the rest only makes weights and may stay where it is
        filled = torch.stack([wide[0]] * (taps - len(wide)) + wide[-taps:])  # (K, B, ...)
        parts = []
        for branch, values in zip(step.branches, filled.chunk(len(step.branches), 1), strict=True):
            r = self.value_range[branch]
            rows = (values.flatten(1).mT / r).clamp(-1, 1).to(self.weight.dtype)  # (elements, K)
            bend = r * self.curves[branch][stage](rows)[:, 0]  # type: ignore[index]
            parts.append(bend.view(values.shape[1:]))
        return torch.cat(parts)
