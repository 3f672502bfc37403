"""Targets are what the closed form says: the MeanFlow identity, its rivals, and what must fail."""

import pytest
import torch
from flow_fields import Gaussian, ring

from foreseer.distill.guidance import Conditions, Points
from foreseer.distill.meanflow import (
    AlphaFlowTarget,
    ChordTarget,
    MeanFlowTarget,
    VelocityTarget,
    difference,
    exact_derivative,
)

SIZE = 4096
NONE = Conditions({})


def gaussian() -> Gaussian:
    mean = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    return Gaussian(mean, torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64))


def places(dtype: torch.dtype = torch.float64, size: int = SIZE, dim: int = 3) -> tuple:
    """Random x, r and t with 0 <= r <= t <= 1."""
    r, t = torch.rand(2, size, dtype=dtype).sort(0).values
    return torch.randn(size, dim, dtype=dtype), r, t


def points(flow: Gaussian, equal: bool = False) -> Points:
    x, r, t = places()
    r = t if equal else r
    return Points(x, r, t, flow.velocity(x, t), NONE, None, flow.average_velocity(x, r, t))


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())


# T1, T2
def test_the_identity_holds_on_the_closed_form():
    flow, (x, r, t) = gaussian(), places()
    y = MeanFlowTarget()(flow.average_velocity, Points(x, r, t, flow.velocity(x, t), NONE))
    assert rms(flow.average_velocity(x, r, t) - y) < 1e-10


@pytest.mark.parametrize("tangents", ["v10", "001", "v00", "v11"])
def test_a_swapped_tangent_breaks_the_identity(tangents):
    flow, (x, r, t) = gaussian(), places()
    v = flow.velocity(x, t)
    names = {"v": v, "0": torch.zeros_like(t), "1": torch.ones_like(t)}
    first = v if tangents[0] == "v" else torch.zeros_like(v)
    wrong = (first, names[tangents[1]], names[tangents[2]])
    _, change = torch.func.jvp(flow.average_velocity, (x, r, t), wrong)
    u = flow.average_velocity(x, r, t)
    assert rms(u - (v - (t - r)[:, None] * change)) > 0.1 * rms(u)


def test_the_derivative_takes_the_tangents_v_0_1():
    flow, (x, r, t) = gaussian(), places()
    v = flow.velocity(x, t)
    _, expected = torch.func.jvp(
        flow.average_velocity, (x, r, t), (v, torch.zeros_like(r), torch.ones_like(t))
    )
    assert torch.equal(exact_derivative(flow.average_velocity, x, r, t, v), expected)


# T3, T4, T6
def test_the_closed_form_is_the_integral_of_the_velocity():
    flow, (x, r, t) = gaussian(), places(size=64)
    h, now, moved = (r - t)[:, None] / 400, t, x
    for _ in range(400):
        k1 = flow.velocity(moved, now)
        k2 = flow.velocity(moved + h / 2 * k1, now + h[:, 0] / 2)
        k3 = flow.velocity(moved + h / 2 * k2, now + h[:, 0] / 2)
        k4 = flow.velocity(moved + h * k3, now + h[:, 0])
        moved, now = moved + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), now + h[:, 0]
    assert (flow.move(x, r, t) - moved).abs().max() < 1e-8


def test_two_steps_equal_one():
    flow, (x, r, t) = gaussian(), places()
    middle = (r + t) / 2
    twice = flow.move(flow.move(x, middle, t), r, middle)
    assert (twice - flow.move(x, r, t)).abs().max() < 1e-10


def test_a_mixture_of_one_is_its_gaussian():
    x, r, t = places(dim=2, size=64)
    mean = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    flow = Gaussian(mean[0], torch.full((2,), 0.4, dtype=torch.float64))
    mixture = type(ring())(mean, 0.4)
    torch.testing.assert_close(mixture.velocity(x, t), flow.velocity(x, t))
    torch.testing.assert_close(mixture.move(x, r, t), flow.move(x, r, t), atol=1e-6, rtol=0)


def test_guidance_moves_the_mean():
    flow, (x, _, t) = gaussian(), places()
    null = Gaussian(torch.zeros(3, dtype=torch.float64), flow.deviation)
    v_0, v_c = null.velocity(x, t), flow.velocity(x, t)
    guided = flow.guided(null, 3.0).velocity(x, t)
    assert (guided - (v_0 + 3.0 * (v_c - v_0))).abs().max() < 1e-10


# T5
def test_the_pairs_own_velocity_gives_the_same_target_on_average():
    """Given x_t, x_0 is normal, so the mean over pairs is taken over draws of it."""
    flow, draws = gaussian(), 400_000
    t, r = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    x = torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float64)
    s_t2 = (1 - t) ** 2 * flow.deviation**2 + t**2
    gain = (1 - t) * flow.deviation**2 / s_t2
    mean = flow.mean + gain * (x[0] - (1 - t) * flow.mean)
    deviation = (flow.deviation**2 - gain * (1 - t) * flow.deviation**2).sqrt()
    x_0 = mean + deviation * torch.randn(draws, 3, dtype=torch.float64)
    v = (x - x_0) / t  # eps - x_0 with eps = (x_t - (1 - t) x_0) / t
    many = Points(x.repeat(draws, 1), r.repeat(draws), t.repeat(draws), v, NONE)
    y = MeanFlowTarget()(flow.average_velocity, many)
    error = (y.mean(0) - flow.average_velocity(x, r, t)[0]).abs()
    assert bool((error < 4 * y.std(0) / draws**0.5).all())


# T7
def test_a_difference_is_the_derivative_in_single_precision():
    flow = Gaussian(gaussian().mean.float(), gaussian().deviation.float())
    x, r, t = places(torch.float32)
    inside = (t + 1e-2 <= 1) & (t - 1e-2 >= r) & (t - r > 0.05)
    x, r, t = x[inside], r[inside], t[inside]
    v = flow.velocity(x, t)
    exact = exact_derivative(flow.average_velocity, x, r, t, v)
    error = difference(flow.average_velocity, x, r, t, v, 1e-2) - exact
    assert rms(error) < 2e-3 * rms(exact)


@pytest.mark.parametrize("end", ["t = 1", "t - h < r"])
def test_a_difference_is_one_sided_at_the_ends(end):
    flow, (x, r, _) = gaussian(), places(size=256)
    t = torch.ones_like(r) if end == "t = 1" else r + 1e-4
    v = flow.velocity(x, t)
    exact = exact_derivative(flow.average_velocity, x, r, t, v)
    found = difference(flow.average_velocity, x, r, t, v, 1e-4)
    assert rms(found - exact) < 1e-2 * rms(exact)  # first order in h


def test_a_difference_is_zero_where_there_is_nothing_to_differ():
    flow, (x, _, _) = gaussian(), places(size=8)
    one = torch.ones(8, dtype=torch.float64)
    assert not difference(flow.average_velocity, x, one, one, flow.velocity(x, one), 1e-2).any()


# T11 and the rivals
@pytest.mark.parametrize(
    "target", [MeanFlowTarget(), MeanFlowTarget(1e-2), AlphaFlowTarget(), ChordTarget()]
)
def test_every_target_is_the_velocity_where_r_is_t(target):
    flow = gaussian()
    at = points(flow, equal=True)
    y = target(flow.average_velocity, at)
    torch.testing.assert_close(y, at.v, atol=1e-12, rtol=0)
    assert torch.equal(VelocityTarget()(flow.average_velocity, at), at.v)


def test_alpha_flow_runs_from_the_velocity_to_mean_flow():
    flow = gaussian()
    at = points(flow)
    u = flow.average_velocity(at.x_t, at.r, at.t)
    errors = [rms(AlphaFlowTarget(a)(flow.average_velocity, at) - u) for a in (1.0, 0.1, 0.01)]
    assert errors[0] == pytest.approx(rms(at.v - u))
    assert errors[1] < 0.1 * errors[0] and errors[2] < 0.1 * errors[1]


def test_the_chord_needs_recorded_runs():
    flow = gaussian()
    x, r, t = places(size=4)
    with pytest.raises(ValueError, match="TeacherRuns"):
        ChordTarget()(flow.average_velocity, Points(x, r, t, flow.velocity(x, t), NONE))


def test_a_tangent_warm_up_starts_at_the_velocity():
    flow = gaussian()
    at = points(flow)
    half = MeanFlowTarget()(flow.average_velocity, at, 0.5)
    whole = MeanFlowTarget()(flow.average_velocity, at, 1.0)
    torch.testing.assert_close(half, (at.v + whole) / 2)
    assert torch.equal(MeanFlowTarget()(flow.average_velocity, at, 0.0), at.v)


@pytest.mark.parametrize("step", [0.0, -1e-3, 0.5])
def test_a_difference_step_out_of_range_is_refused(step):
    with pytest.raises(ValueError, match="expected"):
        MeanFlowTarget(step)


# T9, T10
def test_the_gradient_is_that_of_the_compound_form_and_never_enters_the_derivative():
    """iMF regresses u + (t - r) sg(du/dt) to v, which has the same gradient with a teacher's v."""
    flow, (x, r, t) = gaussian(), places(size=64)
    v = flow.velocity(x, t)
    net = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    net.double()

    def u(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return net(torch.cat([x, r[:, None], t[:, None]], 1))

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, list(net.parameters())))

    at = Points(x, r, t, v, NONE)
    y = MeanFlowTarget()(u, at)
    assert not y.requires_grad
    ours = gradients((u(x, r, t) - y).square().mean())
    change = exact_derivative(u, x, r, t, v)
    compound = gradients((u(x, r, t) + (t - r)[:, None] * change - v).square().mean())
    frozen = [p.detach().clone() for p in net.parameters()]

    def detached(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        names = [name for name, _ in net.named_parameters()]
        inputs = torch.cat([x, r[:, None], t[:, None]], 1)
        return torch.func.functional_call(net, dict(zip(names, frozen, strict=True)), inputs)

    again = gradients((u(x, r, t) - MeanFlowTarget()(detached, at)).square().mean())
    for a, b, c in zip(ours, compound, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        assert torch.equal(a, c)
