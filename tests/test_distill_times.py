"""Laws of time keep 0 <= r <= t <= 1 and their own limits; recorded runs are the lines they say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from foreseer.distill.guidance import Runs
from foreseer.distill.times import EqualTimes, MeanFlowTimes, RestrictedTimes, SamplerTimes

SIZE = 20_000
LAWS = {
    "equal": EqualTimes(),
    "restricted": RestrictedTimes(0.2),
    "mixed": RestrictedTimes(0.3, 0.25),
    "unrestricted": RestrictedTimes(1.0),
    "meanflow": MeanFlowTimes(),
    "sampler": SamplerTimes(4, 20),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", LAWS)
@given(seed=st.integers(0, 2**31), share=st.sampled_from([0.1, 0.5, 1.0]))
def test_every_draw_is_an_interval(name, seed, share):
    r, t = LAWS[name].draw(500, seeded(seed), share)
    assert bool(((r >= 0) & (r <= t) & (t <= 1)).all())


# T12
def test_restricted_intervals_are_uniform_and_end_at_r():
    r, t = RestrictedTimes(0.2).draw(SIZE, seeded())
    interval = t - r
    assert float(interval.max()) <= 0.2 + 1e-6
    free = interval[t > 0.2]  # not cut at zero
    assert stats.kstest(free.numpy() / 0.2, "uniform").pvalue > 1e-3
    share = float((r == 0).float().mean())
    deviation = (0.1 * 0.9 / SIZE) ** 0.5
    assert abs(share - 0.1) < 3 * deviation  # R / 2


def test_a_share_of_equal_times_is_drawn_where_asked():
    r, t = RestrictedTimes(0.2, 0.25).draw(SIZE, seeded())
    assert float((r == t).float().mean()) == pytest.approx(0.25, abs=0.02)
    r, t = MeanFlowTimes(equal_share=0.75).draw(SIZE, seeded())
    assert float((r == t).float().mean()) == pytest.approx(0.75, abs=0.02)


# T13
def test_an_interval_of_one_reaches_every_r():
    r, t = RestrictedTimes(1.0).draw(SIZE, seeded())
    assert float((t - r).max()) > 0.95
    assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-3


def test_sampler_times_are_those_of_equal_steps():
    r, t = SamplerTimes(4, 6).draw(SIZE, seeded())
    lengths = (1 / (t - r)).double()
    assert torch.allclose(lengths, lengths.round(), atol=1e-4)
    assert set(lengths.round().int().tolist()) == {4, 5, 6}
    numbers = t.double() * lengths.round()
    assert torch.allclose(numbers, numbers.round(), atol=1e-4)
    first = float((t == 1).float().mean())
    assert first == pytest.approx((1 / 4 + 1 / 5 + 1 / 6) / 3, abs=0.02)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RestrictedTimes(0.0),
        lambda: RestrictedTimes(1.5),
        lambda: RestrictedTimes(0.2, 2.0),
        lambda: MeanFlowTimes(deviation=0.0),
        lambda: SamplerTimes(5, 4),
    ],
)
def test_a_law_out_of_range_is_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def runs() -> Runs:
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.0], dtype=torch.float64)
    eps = torch.zeros(2, 1, dtype=torch.float64)
    v = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 4.0]], dtype=torch.float64)[..., None]
    return Runs(eps, v, sigmas)


def test_a_run_is_the_broken_line_of_its_slopes():
    at = lambda t: runs().at(torch.full((2,), t, dtype=torch.float64))[:, 0].tolist()  # noqa: E731
    assert at(1.0) == pytest.approx([0.0, 0.0])
    assert at(0.7) == pytest.approx([-0.3, 0.3])
    assert at(0.5) == pytest.approx([-0.7, 0.3])
    assert at(0.0) == pytest.approx([-2.1, -1.3])


def test_the_slope_is_that_of_the_step_in_progress():
    slope = lambda t: runs().velocity(torch.full((2,), t))[:, 0].tolist()  # noqa: E731
    assert slope(1.0) == [1.0, -1.0]
    assert slope(0.71) == [1.0, -1.0]
    assert slope(0.7) == [2.0, 0.0]
    assert slope(0.0) == [3.0, 4.0]


def test_a_chord_leads_from_one_point_of_the_run_to_another():
    t, r = torch.tensor([0.8, 0.5]).double(), torch.tensor([0.1, 0.5]).double()
    chord = runs().chord(r, t)
    moved = runs().at(t) - (t - r)[:, None] * chord
    torch.testing.assert_close(moved, runs().at(r))
    assert chord[1, 0] == 0.0  # r = t: the slope
