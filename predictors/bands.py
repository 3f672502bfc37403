"""FreqCa: reuse the low frequencies, extrapolate the high ones.

Shapes: P parts, K history length.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.base import History, Step
from foreseer.predictors.hermite import HiCache
from foreseer.predictors.partition import PartedPredictor
from foreseer.predictors.spectrum import Bands


class FreqCa(PartedPredictor):
    """F_hat = F_0 + P_high[(c_0 - 1) F_0 + c_1 F_1 + c_2 F_2], c of second-order HiCache.

    arXiv 2510.08669; the released code's order 0 below 0.1 of the highest radius, order 2 at
    contraction 0.71 above. The release transforms every anchor, and takes the grid for a square;
    here one transform of the increment per forecast gives the same, on any grid.

    Args:
        grid: (height, width) in tokens, or (frames, height, width).
        transform: `dct` (the release for FLUX) or `fft` (in two dimensions; the release for
            Qwen-Image runs it over the flattened tokens).
        low_radius: radius below which a frequency is reused, in (0, 1).
        contraction: HiCache's sigma for the high band.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        grid: Sequence[int],
        transform: str = "dct",
        low_radius: float = 0.1,
        contraction: float = 0.71,
    ) -> None:
        super().__init__(Bands([low_radius], grid, transform))
        self.high = HiCache(2, contraction)
        self.window = self.high.window

    def part_coefficients(self, history: History, step: Step) -> Float[Tensor, "P K 1"]:
        """Reuse for the low band, HiCache for the high one."""
        high = self.high.coefficients(history, step)
        low = torch.zeros_like(high)
        low[-1] = 1.0
        return torch.stack([low, high])[:, :, None]
