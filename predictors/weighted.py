"""Weighted sums of features, in float32 or wider. Shapes: K features, B batch."""

import torch
from jaxtyping import Float
from torch import Tensor


def wide_dtype(feature: Tensor) -> torch.dtype:
    """Float32, or the feature's dtype where that is wider."""
    return torch.promote_types(feature.dtype, torch.float32)


def combine(
    weights: Float[Tensor, " K"] | Float[Tensor, "K branches"], features: list[Tensor]
) -> Float[Tensor, " B *shape"]:
    """sum_k w_k F_k in float32 or wider, returned in the features' dtype.

    Args:
        weights: one weight per feature, or one per feature and equal part of the batch axis.
        features: tensors of one shape, batch first.
    """
    newest = features[-1]
    dtype = wide_dtype(newest)
    if weights.ndim == 2 and weights.shape[1] > 1:
        parts = [torch.chunk(feature, weights.shape[1]) for feature in features]
        rows = [combine(w, [p[i] for p in parts]) for i, w in enumerate(weights.unbind(1))]
        return torch.cat(rows)
    total: Tensor | None = None
    product: Tensor | None = None  # one buffer for all terms: fresh memory costs more than the sum
    values = weights.flatten() if weights.requires_grad else weights.flatten().tolist()
    for value, feature in zip(values, features, strict=True):
        if isinstance(value, float) and value == 0.0:
            continue
        term = feature.to(dtype)
        if total is None:
            total = term * value
        elif term.requires_grad or not isinstance(value, float):
            total = total + term * value
        else:
            product = torch.mul(term, value, out=product)
            total.add_(product)
    if total is None:
        return torch.zeros_like(newest)
    return total.to(newest.dtype)
