"""The metrics equal their definitions per sample, and refuse input that would flatter them."""

import math
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from foreseer.evaluation.metrics import EXACT_DB, latent_rel_l2, paired, psnr, ssim, summarise
from foreseer.evaluation.st_lpips import StLpips
from foreseer.extras import MissingExtra


def noisy_pair(count=3, channels=1):
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(count, channels, 32, 32, generator=generator)
    noise = 0.05 * torch.randn(reference.shape, generator=generator)
    return (reference + noise).clamp(0, 1), reference


def test_psnr_is_twenty_decibels_for_an_error_of_one_tenth():
    reference = torch.full((2, 1, 4, 4), 0.5, dtype=torch.float64)
    images = reference + torch.tensor([0.1, 0.01], dtype=torch.float64).view(2, 1, 1, 1)
    assert psnr(images, reference).tolist() == pytest.approx([20, 40], abs=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_agree_with_torchmetrics_on_each_sample(channels):
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    images, reference = noisy_pair(channels=channels)
    for one in range(len(images)):
        pair = images[one : one + 1].double(), reference[one : one + 1].double()
        theirs = peak_signal_noise_ratio(*pair, data_range=1.0)
        # torchmetrics takes the logarithm in float32
        assert psnr(images, reference)[one].item() == pytest.approx(theirs.item(), abs=1e-5)
        theirs = structural_similarity_index_measure(*pair, data_range=1.0)
        assert ssim(images, reference)[one].item() == pytest.approx(theirs.item(), abs=1e-9)


def test_identical_images_have_infinite_psnr_and_ssim_one():
    _, reference = noisy_pair()
    assert psnr(reference, reference).tolist() == [math.inf] * 3
    assert ssim(reference, reference).tolist() == pytest.approx([1.0] * 3, abs=1e-12)


@pytest.mark.parametrize(("true_db", "printed_db"), [(36.0, 36.0), (24.1, 29.1), (20.3, 28.4)])
def test_wrapped_uint8_arithmetic_flatters_large_errors_and_float_psnr_does_not(
    true_db, printed_db
):
    generator = torch.Generator().manual_seed(0)
    noise = 255 * 10 ** (-true_db / 20) * torch.randn(1, 1, 512, 512, generator=generator)
    reference = torch.full(noise.shape, 128, dtype=torch.uint8)
    images = (128 + noise).round().clamp(0, 255).to(torch.uint8)
    wrapped = ((images - reference) ** 2).double().mean()  # both operations wrap modulo 256
    assert 10 * math.log10(255**2 / wrapped) == pytest.approx(printed_db, abs=0.2)
    assert psnr(images / 255, reference / 255).item() == pytest.approx(true_db, abs=0.1)


def test_latent_error_is_relative_to_the_norm_of_the_reference():
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    latents = torch.tensor([[3.0, 4.5], [1.0, 2.0]])
    assert latent_rel_l2(latents, reference).tolist() == pytest.approx([0.1, 0.5])
    with pytest.raises(ValueError, match="norm 0"):
        latent_rel_l2(latents, torch.zeros(2, 2))


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 1, 16, 16, dtype=torch.uint8), "divide by 255"),
        (torch.full((1, 1, 16, 16), 1.5), "lie in"),
        (torch.full((1, 1, 16, 16), math.nan), "lie in"),
        (torch.zeros(1, 3, 16, 16), "equal, non-empty shapes"),
    ],
)
def test_images_that_would_be_misread_are_refused(metric, images, message):
    # Under shape and type checks a wrong dtype or shape is refused earlier, by another error.
    with pytest.raises((ValueError, TypeError), match=f"{message}|shape|type"):
        metric(images, torch.zeros(1, 1, 16, 16))


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))


def test_summary_matches_hand_arithmetic():
    summary = summarise(torch.arange(11.0))
    assert (summary.mean, summary.median, summary.q10, summary.q90) == pytest.approx((5, 5, 1, 9))


def test_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    summaries = [summarise(5 + 2 * torch.randn(40, generator=generator)) for _ in range(60)]
    covered = sum(summary.ci_low <= 5 <= summary.ci_high for summary in summaries)
    assert 52 <= covered < 60  # 57 expected of 60; the binomial spread is below 2
    widths = [summary.ci_high - summary.ci_low for summary in summaries]
    assert sum(widths) / 60 == pytest.approx(2 * 1.96 * 2 / math.sqrt(40), rel=0.1)


def test_summaries_repeat_and_survive_infinite_values():
    values = torch.tensor([30.0, 31.0, math.inf, math.inf])
    summary = summarise(values)
    assert summary == summarise(values)
    assert (summary.mean, summary.median, summary.q90) == (math.inf, math.inf, math.inf)
    assert summary.q10 == pytest.approx(30.3)
    with pytest.raises(ValueError, match="1 are NaN"):
        summarise(torch.tensor([1.0, math.nan]))


def test_measuring_never_loads_lightning():
    code = (
        "import sys, torch; from foreseer.evaluation.metrics import ssim; "
        "assert 'torchmetrics' not in sys.modules; "
        "ssim(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)); "
        "assert not {'lightning', 'pytorch_lightning', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_paired_difference_is_told_apart_where_the_intervals_of_both_overlap():
    generator = torch.Generator().manual_seed(0)
    hard = 30 + 5 * torch.randn(64, generator=generator)  # samples differ far more than methods
    ahead = hard + 0.5 + 0.3 * torch.randn(64, generator=generator)
    gap = paired(ahead, hard)
    assert summarise(ahead).ci_low < summarise(hard).ci_high
    assert 0.3 < gap.low < gap.mean < gap.high < 0.7 and gap.mean == pytest.approx(0.5, abs=0.1)
    assert gap.wins == int((ahead > hard).sum()) and gap.count == 64
    turned = paired(hard, ahead)
    assert (turned.mean, turned.wins) == (pytest.approx(-gap.mean), 64 - gap.wins)


def test_samples_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match="non-empty"):
        paired(torch.ones(0), torch.ones(0))
    with pytest.raises(ValueError, match="NaN or infinite"):
        paired(torch.tensor([1.0, -math.inf]), torch.ones(2))
    with pytest.raises(ValueError, match="prompts of 3 samples, expected 2"):
        paired(torch.ones(2), torch.ones(2), [0, 0, 1])


def test_a_method_is_level_with_itself_and_exact_samples_have_a_difference():
    values = torch.tensor([20.0, 31.5, math.inf, 28.0])
    same = paired(values, values)
    assert (same.mean, same.low, same.high, same.wins) == (0.0, 0.0, 0.0, 0)
    assert same.standing == "level"
    exact = paired(torch.full((4,), math.inf), torch.full((4,), 50.0))
    assert (exact.mean, exact.low, exact.wins) == (EXACT_DB - 50, EXACT_DB - 50, 4)
    assert exact.standing == "ahead"


def test_samples_of_one_prompt_are_resampled_together():
    """Where a prompt decides, 16 samples of 4 prompts tell no more than 4: naively, half as far."""
    prompts = [i // 4 for i in range(16)]
    of_prompt = torch.tensor([1.5, -0.2, 1.0, -0.4]).repeat_interleave(4)
    generator = torch.Generator().manual_seed(0)
    differences = of_prompt + 0.01 * torch.randn(16, generator=generator)
    naive, honest = (paired(differences, torch.zeros(16), p) for p in (None, prompts))
    assert (naive.mean, naive.wins) == (honest.mean, honest.wins)
    assert naive.standing == "ahead" and honest.standing == "level"
    assert honest.high - honest.low > 1.8 * (naive.high - naive.low)
    each = summarise(differences, range(16))
    assert each == summarise(differences)


def waves(size, channels, count=2):
    """Images made of waves, and the same mirrored into one another by a fifth."""
    t = torch.arange(size, dtype=torch.float64) / size
    made = [
        [
            torch.sin(6.3 * (k + 1) * t[:, None] + c) * torch.cos(6.3 * (k + 2) * t)
            for c in range(channels)
        ]
        for k in range(count)
    ]
    images = torch.stack([torch.stack(each) for each in made]) * 0.5 + 0.5
    return images.float(), (0.8 * images + 0.2 * images.flip(-1)).clamp(0, 1).float()


@pytest.mark.skipif(find_spec("stlpips_pytorch") is None, reason="the extra `perceptual`")
@pytest.mark.parametrize(
    ("size", "channels", "theirs"),
    [
        (32, 1, (8.712898e-05, 9.440347e-05)),
        (64, 3, (2.0771638e-04, 1.7000872e-04)),
        (96, 3, (1.1633681e-04, 1.2732559e-04)),
    ],
)
def test_st_lpips_is_what_its_package_computes(size, channels, theirs):
    """By `stlpips.LPIPS(net="alex", variant="shift_tolerant")(a, b, normalize=True)`, 0.0.2."""
    distance, (one, other) = StLpips(), waves(size, channels)
    assert distance(one, other).tolist() == pytest.approx(theirs, rel=1e-4)
    assert distance(one, one).tolist() == [0.0, 0.0]
    assert bool((distance(one, 1 - one) > 2 * distance(one, other)).all())
    with pytest.raises(ValueError, match="expected the same for both"):
        distance(one[..., :8], other[..., :8])


def test_st_lpips_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("foreseer.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="needs the extra `perceptual`, of which stlpips"):
        StLpips()
