"""How far the images of an accelerated run are from those of the full run, sample by sample.

Shapes: B batch, C channels, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.checkpoints.standing import Standing, standing

NUM_RESAMPLES = 10_000  # bootstrap resamples of the mean
RESAMPLING_SEED = 0
EXACT_DB = 150.0  # what a PSNR counts as in differences where the image is reproduced exactly
SSIM_WINDOW = 11  # pixels: side of the Gaussian window of Wang et al. 2004


@dataclass(frozen=True)
class Summary:
    """One number per sample, condensed; `ci_low` to `ci_high` is a 95 % interval of the mean."""

    mean: float
    median: float
    q10: float
    q90: float
    ci_low: float
    ci_high: float


def psnr(
    images: Float[Tensor, "B C H W"], reference: Float[Tensor, "B C H W"]
) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each sample in dB, computed in float64.

    PSNR = -10 log10(mean (images - reference)^2), for images with peak value 1. Squaring a
    difference of `uint8` images wraps modulo 256 and flatters large errors, so integer images
    are refused.

    Args:
        images: accelerated samples in [0, 1].
        reference: samples of the full run in [0, 1].

    Returns:
        PSNR per sample, `inf` where the two are identical.

    Raises:
        ValueError: the shapes differ, or the values are not floats in [0, 1].
    """
    _check_images(images, reference)
    squared_error = (images.double() - reference.double()).square()
    return -10 * squared_error.flatten(1).mean(1).log10()


def ssim(
    images: Float[Tensor, "B C H W"], reference: Float[Tensor, "B C H W"]
) -> Float[Tensor, " B"]:
    """Structural similarity of each sample (Wang et al. 2004, eq. 13), Gaussian window, float64.

    Args:
        images: accelerated samples in [0, 1], at least 11 x 11 pixels.
        reference: samples of the full run in [0, 1].

    Returns:
        SSIM per sample, 1 where the two are identical.

    Raises:
        ValueError: the shapes differ, the values are not floats in [0, 1], or the images are
            smaller than the window.
    """
    _check_images(images, reference)
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, "
            f"got {images.shape[-2]} x {images.shape[-1]}; upscale them first."
        )
    # Imported here because it takes seconds, and deploying a predictor never measures SSIM.
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarity = structural_similarity_index_measure(
        images.double(),
        reference.double(),
        kernel_size=SSIM_WINDOW,
        reduction="none",
        data_range=1.0,
    )
    return torch.as_tensor(similarity).reshape(len(images))


def latent_rel_l2(
    latents: Float[Tensor, "B ..."], reference: Float[Tensor, "B ..."]
) -> Float[Tensor, " B"]:
    """Relative error ||x - x_ref|| / ||x_ref|| of each final latent, computed in float64.

    Args:
        latents: final latents of the accelerated run.
        reference: final latents of the full run.

    Returns:
        Relative L2 error per sample.

    Raises:
        ValueError: the shapes differ, or a reference is zero everywhere.
    """
    _check_shapes(latents, reference)
    scale = reference.double().flatten(1).norm(dim=1)
    if not bool((scale > 0).all()):
        raise ValueError("A reference latent has norm 0 or NaN: its relative error is undefined.")
    return (latents.double() - reference.double()).flatten(1).norm(dim=1) / scale


def summarise(values: Float[Tensor, " B"], prompts: Sequence[int] | None = None) -> Summary:
    """Condense per-sample values; the interval of the mean is a percentile bootstrap.

    Resampling uses a fixed seed, so equal values give equal summaries.

    Args:
        values: one number per sample; `inf` is allowed.
        prompts: of each sample, a number: those of one prompt are alike, so they are resampled
            together (a cluster bootstrap); None takes every sample for itself.

    Raises:
        ValueError: there is no sample, a value is NaN, or there are other numbers of prompts.
    """
    if values.numel() == 0 or bool(values.isnan().any()):
        raise ValueError(
            f"Expected at least one value and no NaN, got {values.numel()} values of which "
            f"{int(values.isnan().sum())} are NaN; did a run diverge?"
        )
    values = values.detach().double().cpu()
    means = _resampled_means(values, range(len(values)) if prompts is None else prompts)
    return Summary(
        mean=float(values.mean()),
        median=_quantile(values, 0.5),
        q10=_quantile(values, 0.1),
        q90=_quantile(values, 0.9),
        ci_low=_quantile(means, 0.025),
        ci_high=_quantile(means, 0.975),
    )


def _resampled_means(values: Float[Tensor, " B"], prompts: Sequence[int]) -> Float[Tensor, " R"]:
    """Means of `NUM_RESAMPLES` draws of prompts with all their samples, with replacement."""
    if len(prompts) != len(values):
        raise ValueError(f"found the prompts of {len(prompts)} samples, expected {len(values)}.")
    groups = torch.as_tensor(list(prompts)).unique(return_inverse=True)[1]
    count = int(groups.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, groups, values)
    sizes = torch.bincount(groups, minlength=count).double()
    generator = torch.Generator().manual_seed(RESAMPLING_SEED)
    picks = torch.randint(count, (NUM_RESAMPLES, count), generator=generator)
    return sums[picks].sum(1) / sizes[picks].sum(1)


@dataclass(frozen=True)
class Paired:
    """A method against a rival on the same samples; `low` to `high` is a 95 % interval of the mean.

    Args:
        mean: of the differences, method minus rival.
        low: of the interval.
        high: of the interval.
        wins: samples on which the method is ahead.
        count: samples.
    """

    mean: float
    low: float
    high: float
    wins: int
    count: int

    @property
    def standing(self) -> Standing:
        """Whether the method is ahead of its rival, level with it or behind."""
        return standing(self.low, self.high)


def paired(
    values: Float[Tensor, " B"], rival: Float[Tensor, " B"], prompts: Sequence[int] | None = None
) -> Paired:
    """Compare two methods sample by sample; the interval is a percentile bootstrap.

    Args:
        values: one number in dB per sample of the method, such as its PSNR; more than `EXACT_DB`
            counts as that, so that an exact sample has a difference.
        rival: the rival's, of the same samples in the same order.
        prompts: of each sample, see `summarise`.

    Raises:
        ValueError: other numbers of samples, no sample, or a difference that is no finite number.
    """
    _check_shapes(values, rival)
    mine, other = (each.detach().double().cpu().clamp(max=EXACT_DB) for each in (values, rival))
    differences = mine - other
    if not bool(differences.isfinite().all()):
        raise ValueError("A difference is NaN or infinite; leave samples without an error out.")
    summary = summarise(differences, prompts)
    wins = int((differences > 0).sum())
    return Paired(summary.mean, summary.ci_low, summary.ci_high, wins, len(differences))


def paired_squares(
    squares: Float[Tensor, " B"], rival: Float[Tensor, " B"], prompts: Sequence[int] | None = None
) -> Paired:
    """Compare mean squared errors of the same samples, in dB; the interval is a bootstrap, too.

    10 log10 (mean of the rival's squares / mean of the method's), of all samples and of resampled
    ones.

    Args:
        squares: one squared error per sample of the method, > 0.
        rival: the rival's, of the same samples in the same order.
        prompts: of each sample, see `summarise`.

    Raises:
        ValueError: other numbers of samples, or no sample.
    """
    _check_shapes(squares, rival)
    mine, other = (each.detach().double().cpu() for each in (squares, rival))
    groups = range(len(mine)) if prompts is None else prompts
    # Both draw with the same seed, hence the same samples.
    ratios = 10 * (_resampled_means(other, groups) / _resampled_means(mine, groups)).log10()
    mean = 10 * float((other.mean() / mine.mean()).log10())
    wins = int((mine < other).sum())
    return Paired(mean, _quantile(ratios, 0.025), _quantile(ratios, 0.975), wins, len(mine))


def _quantile(values: Float[Tensor, " B"], q: float) -> float:
    """Linearly interpolated quantile that, unlike `torch.quantile`, is never NaN beside `inf`."""
    ordered = values.sort().values
    position = q * (len(values) - 1)
    below = int(position)
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(values) - 1)])
    fraction = position - below
    return low if low == high or fraction == 0 else low + fraction * (high - low)


def _check_images(images: Tensor, reference: Tensor) -> None:
    """Refuse a pair of image batches that PSNR and SSIM would misread."""
    _check_shapes(images, reference)
    for name, batch in (("images", images), ("reference", reference)):
        if not batch.is_floating_point():
            raise ValueError(f"{name} must be floats in [0, 1], got {batch.dtype}; divide by 255.")
        low, high = float(batch.min()), float(batch.max())
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise ValueError(f"{name} must lie in [0, 1], got values from {low:g} to {high:g}.")


def _check_shapes(values: Tensor, reference: Tensor) -> None:
    """Refuse shapes that would broadcast, and empty batches."""
    if values.shape != reference.shape or values.numel() == 0:
        raise ValueError(
            f"Expected two equal, non-empty shapes, got {tuple(values.shape)} "
            f"and {tuple(reference.shape)}."
        )
