"""Parts sum to the feature and their Grams to its Gram, on any grid; misfits are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foreseer.predictors.partition import ChannelGroups, Partition
from foreseer.predictors.spectrum import Bands, cosine_matrix, equal_bands, partition_from

GRIDS = [(4, 4), (5, 3), (1, 7), (8, 6), (3, 4, 5)]
TRANSFORMS = ["dct", "fft"]


def tokens(partition: Partition, batch: int = 3, dtype: torch.dtype = torch.float32):
    num_tokens, channels = partition.smallest
    width = channels if isinstance(partition, ChannelGroups) else 6
    return torch.randn(batch, max(num_tokens, 2), width, dtype=dtype)


def cases() -> list[Partition]:
    bands = [equal_bands(3, grid, t) for grid in GRIDS for t in TRANSFORMS]
    return [*bands, Bands([], (2, 3)), ChannelGroups([0, 2, 1, 0, 2]), ChannelGroups([0, 0])]


def name(partition: Partition) -> str:
    return str(partition.describe())


every_partition = pytest.mark.parametrize("partition", cases(), ids=name)


@every_partition
def test_the_parts_sum_to_the_feature(partition):
    feature = tokens(partition)
    torch.testing.assert_close(torch.stack(partition.split(feature)).sum(0), feature)


@every_partition
def test_the_parts_are_orthogonal_projections(partition):
    feature = tokens(partition, dtype=torch.float64)
    parts = partition.split(feature)
    for p, part in enumerate(parts):
        for q, again in enumerate(partition.split(part)):
            torch.testing.assert_close(again, part if p == q else torch.zeros_like(part))
        for other in parts[p + 1 :]:
            assert abs(float((part * other).sum())) < 1e-12 * float(feature.square().sum())


@every_partition
def test_part_grams_sum_to_the_gram_and_are_those_of_the_parts(partition):
    steps = tokens(partition, batch=7)
    wide = steps.flatten(1).double()
    grams = partition.grams(steps)
    assert grams.shape == (partition.num_parts, 7, 7) and grams.dtype == torch.float64
    gap = (grams.sum(0) - wide @ wide.mT).abs().max()
    assert float(gap) <= 1e-12 * float((wide @ wide.mT).abs().max())
    for part, gram in zip(partition.split(steps.double()), grams, strict=True):
        torch.testing.assert_close(part.flatten(1) @ part.flatten(1).mT, gram)


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=3),
    st.sampled_from(TRANSFORMS),
    st.floats(0.01, 0.99),
)
def test_two_bands_sum_to_the_feature_on_any_grid(grid, transform, edge):
    if max(grid) == 1 or (max(grid) == 2 and transform == "fft"):
        grid = [*grid[:-1], 4]
    bands = Bands([edge], grid, transform)
    feature = tokens(bands, dtype=torch.float64)
    low, high = bands.split(feature)
    torch.testing.assert_close(low + high, feature)
    torch.testing.assert_close(low.mean(1), feature.mean(1))  # the mean is a low frequency


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_maps_and_their_tokens_have_the_same_bands(transform):
    bands = equal_bands(3, (5, 4), transform)
    maps = torch.randn(2, 6, 5, 4)
    from_maps = bands.split(maps)
    from_tokens = bands.split(maps.flatten(2).mT)
    for a, b in zip(from_maps, from_tokens, strict=True):
        torch.testing.assert_close(a.flatten(2).mT, b)
    torch.testing.assert_close(bands.grams(maps), bands.grams(maps.flatten(2).mT))


def test_channel_groups_take_axis_1_of_maps_and_the_last_axis_of_tokens():
    groups = ChannelGroups([0, 1, 1])
    maps = torch.randn(2, 3, 4, 5)
    first, second = groups.split(maps)
    assert torch.equal(first[:, 0], maps[:, 0]) and not first[:, 1:].any()
    assert torch.equal(second[:, 1:], maps[:, 1:]) and not second[:, 0].any()
    first = groups.split(maps.flatten(2).mT)[0]
    assert torch.equal(first[..., 0], maps[:, 0].flatten(1)) and not first[..., 1:].any()
    video = torch.randn(2, 3, 2, 4, 5)
    assert torch.equal(groups.split(video)[0][:, 0], video[:, 0])


def test_the_cosine_matrix_is_orthonormal_and_its_first_row_the_mean():
    matrix = cosine_matrix(7)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(matrix[0], torch.full((7,), 7**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_wave_falls_into_the_band_of_its_frequency(transform):
    bands = Bands([0.5], (8, 8), transform)
    place = torch.arange(8.0)
    slow = torch.cos(torch.pi * (2 * place + 1) / 16 * 2)  # one cycle in eight tokens
    fast = torch.cos(torch.pi * (2 * place + 1) / 16 * 6)  # three
    low, high = bands.split((slow[:, None] * torch.ones(8)).reshape(1, 64, 1))
    assert high.norm() < 1e-5 * low.norm()
    low, high = bands.split((fast[:, None] * fast).reshape(1, 64, 1))
    assert low.norm() < 1e-5 * high.norm()


@pytest.mark.parametrize("num_parts", [2, 3])
def test_weighing_takes_a_transform_per_part_but_one_and_one_back(num_parts, monkeypatch):
    bands = equal_bands(num_parts, (4, 4), "fft")
    calls = []
    for direction in ("rfftn", "irfftn"):
        real = getattr(torch.fft, direction)
        monkeypatch.setattr(
            torch.fft,
            direction,
            lambda *a, real=real, d=direction, **k: calls.append(d) or real(*a, **k),
        )
    bands.weigh([torch.randn(1, 16, 2) for _ in range(num_parts)])
    assert calls == ["rfftn"] * (num_parts - 1) + ["irfftn"]


@pytest.mark.parametrize(
    ("partition", "shape", "message"),
    [
        (Bands([0.5], (4, 6)), (1, 25, 3), r"\(1, 25, 3\).*grid \[4, 6\].*24"),
        (Bands([0.5], (4, 6)), (1, 3, 6, 4), r"\(1, 3, 6, 4\).*\[4, 6\]"),
        (Bands([0.5], (4, 6)), (1, 24), r"\(1, 24\)"),
        (ChannelGroups([0, 1]), (1, 4, 3), r"\(1, 4, 3\).*2 channels"),
        (ChannelGroups([0, 1]), (1, 3, 4, 2), r"\(1, 3, 4, 2\).*2 channels"),
    ],
)
def test_another_width_or_grid_is_refused_with_what_was_found_and_expected(
    partition, shape, message
):
    feature = torch.randn(shape)
    with pytest.raises(ValueError, match=message):
        partition.combine(torch.ones(partition.num_parts, 1, 1), [feature])
    with pytest.raises(ValueError, match=message):
        partition.grams(feature)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bands([0.5, 0.5], (4, 4)), "rising radii"),
        (lambda: Bands([0.0], (4, 4)), "rising radii"),
        (lambda: Bands([1.0], (4, 4)), "rising radii"),
        (lambda: Bands([0.5], (16,)), "height, width"),
        (lambda: Bands([0.5], (4, 0)), "height, width"),
        (lambda: Bands([0.5], (4, 4), "dst"), "'dct' or 'fft'"),
        (lambda: Bands([0.1, 0.2], (4, 4)), r"bands \[1\] hold no frequency.*fewer"),
        (lambda: Bands([0.1], (1, 1)), r"bands \[1\] hold no frequency"),
        (lambda: ChannelGroups([]), "0 channels"),
        (lambda: ChannelGroups([0, 2]), "0 to 1"),
        (lambda: ChannelGroups([0, -1]), "0 to 1"),
        (lambda: partition_from({"class": "Wavelets"}), "Wavelets.*Bands"),
        (lambda: partition_from({"class": "Bands", "radius": 1}), "radius"),
    ],
)
def test_arguments_that_make_no_partition_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_partition
def test_a_partition_is_rebuilt_from_its_description(partition):
    again = partition_from(partition.describe())
    assert again.describe() == partition.describe()
    feature = tokens(partition)
    for a, b in zip(again.split(feature), partition.split(feature), strict=True):
        assert torch.equal(a, b)
