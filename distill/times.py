"""Which intervals a student is trained on.

Shapes: B batch.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Pair = tuple[Float[Tensor, " B"], Float[Tensor, " B"]]  # r, t


class Times:
    """A law of (r, t), 0 <= r <= t <= 1."""

    def draw(self, size: int, generator: torch.Generator | None = None, share: float = 1.0) -> Pair:
        """Draw pairs.

        Args:
            size: number of pairs.
            generator: source of randomness; None takes torch's own.
            share: longest interval in this call over the longest of all, in (0, 1]; rises to 1 in
                a warm-up.

        Returns:
            r and t.
        """
        raise NotImplementedError


class EqualTimes(Times):
    """r = t ~ U(0, 1): instantaneous velocities, for guidance distillation."""

    def draw(self, size: int, generator: torch.Generator | None = None, share: float = 1.0) -> Pair:
        """Draw pairs, see the base class; `share` does not apply."""
        t = torch.rand(size, generator=generator)
        return t, t


class RestrictedTimes(Times):
    """t ~ U(0, 1), l ~ U(0, R), r = max(0, t - l): Restricted MeanFlow (arXiv 2602.05449).

    Args:
        max_interval: R, in (0, 1].
        equal_share: share of pairs with r = t instead, in [0, 1].

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, max_interval: float = 0.2, equal_share: float = 0.0) -> None:
        if not 0 < max_interval <= 1 or not 0 <= equal_share <= 1:
            raise ValueError(
                f"found max_interval {max_interval} and equal_share {equal_share}; expected an "
                "interval in (0, 1] and a share in [0, 1]."
            )
        self.max_interval = max_interval
        self.equal_share = equal_share

    def draw(self, size: int, generator: torch.Generator | None = None, share: float = 1.0) -> Pair:
        """Draw pairs, see the base class."""
        t = torch.rand(size, generator=generator)
        interval = share * self.max_interval * torch.rand(size, generator=generator)
        equal = torch.rand(size, generator=generator) < self.equal_share
        return torch.where(equal, t, (t - interval).clamp(min=0)), t


class MeanFlowTimes(Times):
    """Two draws of sigmoid(N(mean, deviation)), the larger is t (arXiv 2505.13447).

    Args:
        mean: mean of the normal law; -0.4 on ImageNet.
        deviation: its standard deviation.
        equal_share: share of pairs with r = t; 0.75 on ImageNet.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, mean: float = -0.4, deviation: float = 1.0, equal_share: float = 0.75
    ) -> None:
        if not 0 <= equal_share <= 1 or deviation <= 0:
            raise ValueError(
                f"found equal_share {equal_share} and deviation {deviation}; expected a share in "
                "[0, 1] and a positive deviation."
            )
        self.mean = mean
        self.deviation = deviation
        self.equal_share = equal_share

    def draw(self, size: int, generator: torch.Generator | None = None, share: float = 1.0) -> Pair:
        """Draw pairs, see the base class; a share below 1 shortens the intervals."""
        drawn = torch.randn(2, size, generator=generator)
        low, t = (self.mean + self.deviation * drawn).sigmoid().sort(0).values
        equal = torch.rand(size, generator=generator) < self.equal_share
        return torch.where(equal, t, t - share * (t - low)), t


class SamplerTimes(Times):
    """The intervals a sampler of equal steps asks for: t = 1 - i / n, r = t - 1 / n.

    Ours: n is drawn from a range, i from 0 to n - 1, so that t = 1, where every run begins, has the
    weight it has in use. For targets that are not differentiated in time.

    Args:
        fewest_steps: smallest n.
        most_steps: largest n.

    Raises:
        ValueError: the range is empty.
    """

    def __init__(self, fewest_steps: int = 4, most_steps: int = 20) -> None:
        if not 1 <= fewest_steps <= most_steps:
            raise ValueError(
                f"found steps from {fewest_steps} to {most_steps}; expected a range from 1."
            )
        self.fewest_steps = fewest_steps
        self.most_steps = most_steps

    def draw(self, size: int, generator: torch.Generator | None = None, share: float = 1.0) -> Pair:
        """Draw pairs, see the base class; `share` does not apply."""
        steps = torch.randint(
            self.fewest_steps, self.most_steps + 1, (size,), generator=generator
        ).double()
        number = (torch.rand(size, generator=generator) * steps).floor().clamp(max=steps - 1)
        t, r = (1 - number / steps).float(), (1 - (number + 1) / steps).float()
        return r.clamp(min=0), t
