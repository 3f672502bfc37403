"""What a token that was not computed takes from its own past, and what from a computed neighbour.

Shapes: M rows of a call, u tokens without a value of their own, D channels, S sampling steps.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

ITERATIONS = 100  # at most; the error falls with each, and two numbers settle soon


class Innovation:
    """F[i] = past F_hat[i] + gain (near_i - past F_hat_near_i), near_i what was computed near i.

    `past` 0 and `gain` 1 leave the neighbour's value alone (a copy, an interpolation), `gain` 0 the
    token's own forecast, both 1 move it by what its neighbour's forecast was wrong.

    Args:
        past: share of the forecasts.
        gain: share of the neighbour's change.

    Attributes:
        pairs: past and gain of every branch and step where they were fitted, `(branches, S, 2)`.

    Raises:
        ValueError: they are no finite numbers.
    """

    def __init__(self, past: float, gain: float) -> None:
        if not (math.isfinite(past) and math.isfinite(gain)):
            raise ValueError(f"found past {past} and gain {gain}, expected finite numbers.")
        self.past, self.gain = past, gain
        self.pairs: Tensor | None = None

    @property
    def forgets(self) -> bool:
        """Whether no forecast enters."""
        return self.pairs is None and self.past == 0

    def at(self, branches: Sequence[int], step_index: int) -> Float[Tensor, "branches 2"]:
        """Past and gain of a call's branches at a step, float64 on the CPU.

        Raises:
            ValueError: they were fitted for fewer branches or steps.
        """
        if self.pairs is None:
            return torch.tensor([[self.past, self.gain]] * len(branches), dtype=torch.float64)
        if max(branches) >= self.pairs.shape[0] or step_index >= self.pairs.shape[1]:
            raise ValueError(
                f"found branch {max(branches)} at step {step_index}, but past and gain are for "
                f"{self.pairs.shape[0]} branch(es) and {self.pairs.shape[1]} steps."
            )
        return self.pairs[list(branches), step_index].detach().double().cpu()

    def __call__(
        self,
        own: Float[Tensor, "M u D"],
        near: Float[Tensor, "M u D"],
        own_near: Float[Tensor, "M u D"],
        branches: Sequence[int],
        step_index: int,
    ) -> Float[Tensor, "M u D"]:
        """The tokens' values, in float32 or wider.

        Args:
            own: their forecasts.
            near: what was computed near them.
            own_near: the forecasts of the same.
            branches: of the rows, in order.
            step_index: of the step.
        """
        wide = torch.promote_types(near.dtype, torch.float32)
        pair = self.at(branches, step_index).to(near.device, wide)
        pair = pair.repeat_interleave(len(near) // len(branches), 0)[:, None, None]
        past, gain = pair[..., 0], pair[..., 1]
        return past * own.to(wide) + gain * (near.to(wide) - past * own_near.to(wide))


def fitted_pair(gram: Float[Tensor, "4 4"]) -> Float[Tensor, " 2"]:
    """Past and gain of least squared error |y - past o - gain (n - past m)|^2.

    Each is the least-squares answer given the other, in turns; the better of two starts, the
    forecast alone (1, 0) and the neighbour alone (0, 1), than which it is never worse.

    Args:
        gram: of (y, o, n, m): the true value, the token's forecast, what was computed near it, and
            the forecast of that; float64.
    """
    found = [_descended(gram, start) for start in ((1.0, 0.0), (0.0, 1.0))]
    best = min(found, key=lambda pair: _error(gram, *pair))
    return torch.tensor(best, dtype=torch.float64)


def _vector(past: float, gain: float) -> Tensor:
    return torch.tensor([1.0, -past, -gain, past * gain], dtype=torch.float64)


def _error(gram: Tensor, past: float, gain: float) -> float:
    v = _vector(past, gain)
    return float(v @ gram @ v)


def _descended(gram: Tensor, start: tuple[float, float]) -> tuple[float, float]:
    past, gain = start
    least = 1e-12 * float(gram.diagonal().max())  # below it there is nothing to fit a number on
    for _ in range(ITERATIONS):
        before = past, gain
        along = torch.tensor([0.0, 1.0, 0.0, -gain], dtype=torch.float64)  # d/d past
        rest = torch.tensor([1.0, 0.0, -gain, 0.0], dtype=torch.float64)
        if float(along @ gram @ along) > least:
            past = float(rest @ gram @ along) / float(along @ gram @ along)
        along = torch.tensor([0.0, 0.0, 1.0, -past], dtype=torch.float64)  # d/d gain
        rest = torch.tensor([1.0, -past, 0.0, 0.0], dtype=torch.float64)
        if float(along @ gram @ along) > least:
            gain = float(rest @ gram @ along) / float(along @ gram @ along)
        if max(abs(past - before[0]), abs(gain - before[1])) < 1e-9:
            break
    return past, gain
