"""Closed-loop measurements, and the few coefficients a closed-loop fit refines.

Shapes: S sampling steps, A anchors, B batch, P = branches * A regressors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..integration.differentiable import differentiable
from ..integration.forecasting import Forecaster
from ..integration.host import transformer_of
from ..integration.session import Session
from ..predictors.linear import L2P
from ..trajectories.prompts import Item, generate_batch
from .tracking import whitening

UNIT = 0.01  # a coordinate of one moves the feature or state by this share of its RMS


def generate(
    pipe: Any,
    predictor: L2P,
    tap: str,
    items: Sequence[Item],
    gradients: bool = False,
    **settings: Any,
) -> Float[Tensor, " B *shape"]:
    """The final latents of a batch generated while forecasting.

    Args:
        pipe: the pipeline.
        predictor: rows to forecast with, on its own anchors.
        tap: `output`, `hidden` or `residual`.
        items: the batch.
        gradients: keep the graph through the sampler.
        settings: keyword arguments of the pipeline call.
    """
    controller = Forecaster(predictor, tap, predictor.anchors)
    session = Session(transformer_of(pipe), pipe.scheduler, controller)
    call = differentiable(pipe) if gradients else pipe
    try:
        with torch.set_grad_enabled(gradients):
            output = generate_batch(call, items, output_type="latent", **settings)
    finally:
        session.detach()
    return output[0] if isinstance(output, tuple) else output.images


def log_error(
    latents: Float[Tensor, " B *shape"], reference: Float[Tensor, " B *shape"]
) -> Float[Tensor, " B"]:
    """10 log10 of each sample's mean squared error, in dB: the negative of what PSNR averages."""
    squared = (latents.float() - reference.float()).flatten(1).square().mean(1)
    return 10 * squared.clamp_min(1e-12).log10()


def closed_loop_errors(
    pipe: Any,
    rows: Float[Tensor, "branches S S"],
    anchors: Sequence[int],
    tap: str,
    batches: Sequence[Sequence[Item]],
    finals: Float[Tensor, " n *shape"],
    **settings: Any,
) -> Float[Tensor, " n"]:
    """Error in dB of every item's final latents when forecasting with the given rows."""
    predictor = L2P(rows.shape[-1], anchors, rows.shape[0])
    predictor.weight.copy_(rows)
    latents = [generate(pipe, predictor, tap, batch, **settings) for batch in batches]
    return log_error(torch.cat(latents), finals)


class SegmentRows(nn.Module):
    """Rows = base rows + one learned correction per segment, in coordinates of equal effect.

    rows[b, s, a_j] = base + (bases[k] z[k])[b, j] for the forecast steps s of segment k, j <= k.

    Args:
        num_steps: sampling steps S.
        anchors: steps at which the network runs.
        num_branches: guidance branches.
    """

    base: Float[Tensor, "branches S S"]
    bases: Float[Tensor, "A P P"]

    def __init__(self, num_steps: int, anchors: Sequence[int], num_branches: int) -> None:
        super().__init__()
        self.anchors = list(anchors)
        self.ends = [*self.anchors[1:], num_steps]
        size = num_branches * len(self.anchors)
        self.num_branches = num_branches
        zeros = torch.zeros(num_branches, num_steps, num_steps, dtype=torch.float64)
        self.register_buffer("base", zeros)
        self.register_buffer(
            "bases", torch.zeros(len(self.anchors), size, size, dtype=torch.float64)
        )
        self.z = nn.Parameter(torch.zeros(len(self.anchors), size, dtype=torch.float64))

    def prepare(self, base: Float[Tensor, "branches S S"], bases: Sequence[Tensor]) -> None:
        """Start at `base`, and refine along the columns of `bases` (one matrix per segment)."""
        self.base.copy_(base)
        self.bases.zero_()
        for k, basis in enumerate(bases):
            self.bases[k, : basis.shape[0], : basis.shape[1]] = UNIT * basis
        with torch.no_grad():
            self.z.zero_()

    def forward(self) -> Float[Tensor, "branches S S"]:
        """The rows."""
        rows = self.base
        for k, (anchor, end) in enumerate(zip(self.anchors, self.ends, strict=True)):
            if end == anchor + 1:
                continue
            known = self.anchors[: k + 1]
            size = self.num_branches * len(known)
            delta = (self.bases[k, :size] @ self.z[k]).view(self.num_branches, len(known))
            spread = torch.zeros_like(rows)
            spread[:, anchor + 1 : end, known] = 1.0
            placed = torch.zeros(self.num_branches, rows.shape[-1], dtype=rows.dtype)
            placed = placed.index_copy(1, torch.tensor(known), delta)
            rows = rows + spread * placed[:, None, :]
        return rows


def feature_bases(
    grams: Float[Tensor, "n branches S S"], anchors: Sequence[int], num_elements: int
) -> list[Tensor]:
    """Per segment and branch, directions of the rows that each move the forecast by its own RMS."""
    mean = grams.double().mean(0) / num_elements
    bases = []
    for k, anchor in enumerate(anchors):
        known = list(anchors[: k + 1])
        blocks = []
        for branch in mean:
            basis = whitening(branch[known][:, known])
            blocks.append(basis * branch[anchor, anchor].sqrt())
        bases.append(torch.block_diag(*blocks))
    return bases
