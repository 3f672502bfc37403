"""ST-LPIPS: how far apart two images look, by features of a network; not LPIPS, and no PSNR.

Shapes: B batch, C channels (1 or 3), H height, W width.
Source: Ghildyal and Liu, Shift-tolerant Perceptual Similarity Metric, arXiv 2207.13686. Their
weights (AlexNet, BSD-2) come with the package `stlpips-pytorch`, of which only the file is read.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from foreseer.extras import require

PACKAGE, WEIGHTS = "stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth"
LAYERS = (  # name and padding of each convolution, in turn
    ("slice1.0", 2),
    ("slice2.5", 2),
    ("slice3.9", 1),
    ("slice4.11", 1),
    ("slice5.13", 1),
)
BLURS = {"slice2.5": "slice2.4", "slice3.9": "slice3.8"}  # of the pooling before a convolution
TINY = 1e-10
SMALLEST = 12  # pixels of a side that the poolings leave something of


class StLpips:
    """The distance, with the published weights.

    d = sum_l mean_hw (w_l . (f_l(x) - f_l(y))^2), f_l the features after each of five convolutions,
    of norm 1 over the channels; images from 0 to 1 are scaled as the network was trained.

    Raises:
        MissingExtra: the package with the weights is not installed.
    """

    def __init__(self) -> None:
        require("perceptual", "ST-LPIPS")
        spec = find_spec(PACKAGE)
        assert spec is not None and spec.origin is not None  # it is installed
        path = Path(spec.origin).parent / WEIGHTS
        self.weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "B C H W"], reference: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, " B"]:
        """The distance of every pair, 0 where both are equal; lower is better.

        Args:
            images: accelerated samples in [0, 1].
            reference: samples of the full run in [0, 1].

        Raises:
            ValueError: the shapes differ, there are other numbers of channels, or the images are
                smaller than the poolings need.
        """
        fits = images.shape[1] in (1, 3) and min(images.shape[-2:]) >= SMALLEST
        if images.shape != reference.shape or not fits:
            raise ValueError(
                f"ST-LPIPS found images of {tuple(images.shape)} and {tuple(reference.shape)}, "
                f"expected the same for both, 1 or 3 channels and sides of {SMALLEST} pixels or "
                "more; leave `perceptual` out."
            )
        pairs = zip(self._features(images), self._features(reference), strict=True)
        total = torch.zeros(len(images))
        for place, (mine, other) in enumerate(pairs):
            weight = self.weights[f"lin{place}.model.1.weight"]
            total += functional.conv2d((mine - other).square(), weight).mean((1, 2, 3))
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        """What each convolution finds, of norm 1 over the channels."""
        x = (2 * images.cpu().float().expand(-1, 3, -1, -1) - 1).sub(self._scaling("shift"))
        x, found = x / self._scaling("scale"), []
        for name, padding in LAYERS:
            if name in BLURS:
                x = self._blur(functional.max_pool2d(x, 3, 1), BLURS[name])
            weight, bias = (self.weights[f"net.{name}.{part}"] for part in ("weight", "bias"))
            x = functional.conv2d(x, weight, bias, padding=padding)
            if name == LAYERS[0][0]:
                x = self._blur(x, "slice1.1")
            x = x.relu()
            found.append(x / (x.norm(dim=1, keepdim=True) + TINY))
        return found

    def _scaling(self, name: str) -> Tensor:
        return self.weights[f"scaling_layer.{name}"]

    def _blur(self, x: Tensor, name: str) -> Tensor:
        """Every second pixel of what is blurred, mirrored at the edges."""
        padded = functional.pad(x, (2, 2, 2, 2), "reflect")
        return functional.conv2d(
            padded, self.weights[f"net.{name}.filt"], stride=2, groups=x.shape[1]
        )
