"""Forecasters of cache-dit in our own form, to state exactly what they compute.

Shapes: K history length, d numbers in one sample's feature.
Each is written from the behaviour of cache-dit 1.5.3; `parity.py` proves that they agree with it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, LinearPredictor, Predictor, Step


class CacheDitFoCa(LinearPredictor):
    """cache-dit's FoCa: F_hat = F_full + (h / 2) ((F_full - F_full_prev) + (F_k - F_km1)).

    F_full and F_full_prev are the last two anchors, whatever their gap; F_k and F_km1 the last two
    values used, anchors or forecasts; h = min(horizon, 3). The recursion over forecasts is linear
    in the anchors, so it is run on coefficient vectors. With one anchor it repeats it.
    """

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Weights of all anchors so far, from running the recursion up to `step`."""
        places = {at: k for k, at in enumerate(history.steps)}
        unit = torch.eye(len(places), dtype=torch.float64)
        full: list[Tensor] = []  # the last two anchors, oldest first
        used: list[Tensor] = []  # the last two values, oldest first
        forecast, last = unit[0], 0
        for at in range(history.steps[0], step.index + 1):
            if at in places:
                last = at
                full = [*full, unit[places[at]]][-2:]
                used = [*used, full[-1]][-2:]
                continue
            forecast = full[-1]
            if len(full) == 2:
                horizon = min(at - last, 3)
                forecast = full[-1] + horizon / 2 * (full[1] - full[0] + used[1] - used[0])
                used = [used[-1], forecast]
        return forecast


class TwoBack(LinearPredictor):
    """The fallback of cache-dit's DMD: F_hat = F_0 + j (F_0 - F_2) / g_1.

    The difference reaches two anchors back but is divided by the last gap alone: on even gaps its
    slope is twice the feature's. With fewer than three anchors it repeats the newest.
    """

    def coefficients(self, history: History, step: Step) -> Float[Tensor, " K"]:
        """Weights of the anchors so far."""
        steps = history.steps
        weights = torch.zeros(len(steps), dtype=torch.float64)
        weights[-1] = 1.0
        if len(steps) > 2:
            slope = (step.index - steps[-1]) / (steps[-1] - steps[-2])
            weights[-1] += slope
            weights[-3] -= slope
        return weights


class DMD(Predictor):
    """Dynamic mode decomposition of the newest evenly spaced anchors (Schmid 2010), per sample.

    With X the anchors but the last, Y the anchors but the first and the economy SVD X = U S V^H:
    A = U^H Y V S^-1 = W diag(lambda) W^-1, Phi = Y V S^-1 W, b = Phi^+ y_last and
    F_hat = Re Phi (lambda^k b) at the horizon k in anchor gaps. The anchors enter only through the
    triangular factor of their QR decomposition, so a forecast is a weighted sum of anchors whose
    weights depend on the data. With fewer than four such anchors the fallback forecasts.

    Args:
        fallback: the linear rule to use until four anchors are evenly spaced.
        window: anchors kept.
        threshold: singular values below this share of the largest are dropped.
        ridge: added to the singular values that are inverted.
    """

    def __init__(
        self,
        fallback: LinearPredictor,
        window: int = 6,
        threshold: float = 1e-4,
        ridge: float = 1e-8,
    ) -> None:
        super().__init__()
        self.window = window
        self.threshold = threshold
        self.ridge = ridge
        self.fallback = fallback

    def forward(self, history: History, step: Step) -> Float[Tensor, " B *shape"]:
        """The weighted sum of the evenly spaced anchors, or the fallback."""
        steps = history.steps
        gap = steps[-1] - steps[-2] if len(steps) > 1 else 0
        count = 1
        while count < len(steps) and steps[-count] - steps[-count - 1] == gap:
            count += 1
        if count < 4:
            return self.fallback(history, step)
        horizon = (step.index - steps[-1]) / gap
        window = torch.stack(history.features[-count:], -1).double()  # (B, ..., K)
        flat = window.flatten(1, -2)
        rows = [sample @ self._weights(sample, horizon) for sample in flat]
        return torch.stack(rows).reshape(window.shape[:-1]).to(history.features[-1].dtype)

    def _weights(self, anchors: Float[Tensor, "d K"], horizon: float) -> Float[Tensor, " K"]:
        small = torch.linalg.qr(anchors, mode="r").R
        left, values, right = torch.linalg.svd(small[:, :-1], full_matrices=False)
        rank = max(1, int((values > values[0] * self.threshold).sum()))
        mix = right[:rank].mH / (values[:rank] + self.ridge)  # V S^-1
        lam, vectors = torch.linalg.eig(left[:, :rank].mH @ small[:, 1:] @ mix)
        modes = mix.to(lam.dtype) @ vectors  # weights of the columns of Y in each mode
        phi = small[:, 1:].to(lam.dtype) @ modes
        b = torch.linalg.lstsq(phi, small[:, -1:].to(lam.dtype)).solution.squeeze(1)
        weights = modes @ (lam.pow(horizon) * b)
        # The weighted anchors are real although the weights are complex only up to rounding.
        return torch.cat([torch.zeros(1, dtype=torch.float64), weights.real])
