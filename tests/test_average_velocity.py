"""A student is its unmodified host and a small conditioner; its pipeline knows its limits."""

import copy

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from student_cases import RANGE, awake, student_pipeline
from tiny_hosts import seeded, tiny_dit, tiny_flux
from torch import nn

from foreseer.distill.guidance import velocity
from foreseer.distill.meanflow import difference, exact_derivative
from foreseer.evaluation.solvers import sampling_with, solver_scheduler
from foreseer.integration.forecasting import forecasting
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.integration.host.trunk import (
    UnsupportedHost,
    modulation_places,
    modulation_width,
    modulations,
)
from foreseer.integration.pipelines.average_velocity import (
    Conditioning,
    IntervalConditioner,
    conditioner_for,
)
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.schedules import FirstBlock, SpeCa, TeaCache

BATCH = 3


def flux_arguments() -> dict[str, torch.Tensor]:
    return {
        "encoder_hidden_states": torch.randn(BATCH, 3, 12, generator=seeded(1)),
        "pooled_projections": torch.randn(BATCH, 12, generator=seeded(2)),
        "img_ids": torch.arange(12.0).reshape(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }


HOSTS = {
    "dit": (tiny_dit, (1, 4, 4), lambda: {"class_labels": torch.tensor([0, 1, 2])}),
    "flux": (tiny_flux, (4, 16), flux_arguments),
}
every_host = pytest.mark.parametrize("name", HOSTS)


def student(name: str, band_limit: float | None = 60.0, double: bool = False):
    """u(x, r, t) of an awake student, and a state."""
    make, shape, arguments = HOSTS[name]
    transformer = make()
    conditioner = awake(conditioner_for(transformer, 0.25, band_limit=band_limit))
    conditioning = Conditioning(transformer, conditioner)
    given = arguments()
    if double:
        transformer.double()
        conditioner.double()
        given = {n: v.double() if v.is_floating_point() else v for n, v in given.items()}

    def u(x, r, t):
        with conditioning.at(t - r):
            return velocity(transformer, x, t, given)

    return u, torch.randn(BATCH, *shape, generator=seeded(3)).to(next(transformer.parameters()))


def times() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([0.3, 0.5, 0.7]), torch.tensor([0.45, 0.6, 0.9])


@every_host
def test_a_fresh_student_is_its_teacher_bit_for_bit(name):
    make, shape, arguments = HOSTS[name]
    x, t = torch.randn(BATCH, *shape, generator=seeded(3)), times()[1]
    expected = velocity(make(), x, t, arguments())
    transformer = make()
    conditioning = Conditioning(transformer, conditioner_for(transformer, **RANGE))
    with conditioning.at(torch.full((BATCH,), 0.2), torch.full((BATCH,), 3.0)):
        assert torch.equal(velocity(transformer, x, t, arguments()), expected)


@every_host
def test_the_interval_changes_an_awake_student_and_leaving_ends_it(name):
    make, shape, arguments = HOSTS[name]
    transformer = make()
    x, t = torch.randn(BATCH, *shape, generator=seeded(3)), times()[1]
    plain = velocity(transformer, x, t, arguments())
    conditioning = Conditioning(transformer, awake(conditioner_for(transformer)))
    with conditioning.at(torch.full((BATCH,), 0.1)):
        short = velocity(transformer, x, t, arguments())
    with conditioning.at(torch.full((BATCH,), 0.2)):
        long = velocity(transformer, x, t, arguments())
    assert not torch.equal(short, long) and not torch.equal(short, plain)
    assert torch.equal(velocity(transformer, x, t, arguments()), plain)
    conditioning.detach()
    assert not any(place._forward_hooks for place in modulation_places(transformer))


# T8
@every_host
def test_the_exact_derivative_is_the_limit_of_differences(name):
    """In float64, where a small step does not drown in rounding."""
    u, x = student(name, band_limit=30.0, double=True)
    r, t = (time.double() for time in times())
    v = torch.randn(x.shape, generator=seeded(4)).to(x)
    exact = exact_derivative(u, x, r, t, v)
    found = difference(u, x, r, t, v, 1e-4)
    # The hosts embed time in float32 whatever their own dtype, hence no tighter.
    assert float((found - exact).norm()) < 1e-2 * float(exact.norm())


@every_host
def test_plain_attention_is_chosen_for_the_derivative_alone(name):
    u, x = student(name)
    r, t = times()
    v = torch.randn(x.shape, generator=seeded(4))
    with pytest.raises(NotImplementedError):
        torch.func.jvp(u, (x, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    assert exact_derivative(u, x, r, t, v).isfinite().all()


def test_a_band_limit_damps_fast_waves_alone():
    def change(step: float, band_limit: float | None) -> float:
        u, x = student("dit", band_limit)
        t = torch.full((BATCH,), 0.5)
        with torch.no_grad():
            return float((u(x, t, t + step) - u(x, t, t)).norm())

    near, far = 2e-3, 0.2  # two radians of the fastest wave, and many of it
    assert change(near, 30.0) < 0.3 * change(near, None)
    assert change(far, 30.0) > 0.3 * change(far, None)


def test_a_host_without_a_row_is_refused():
    with pytest.raises(UnsupportedHost, match="TIME_FACTS"):
        modulation_places(nn.Linear(2, 2))


def test_the_modulation_is_that_of_the_head():
    transformer = tiny_dit()
    x, t = torch.randn(BATCH, 1, 4, 4), times()[1]
    with modulations(transformer) as found:
        velocity(transformer, x, t, {"class_labels": torch.tensor([0, 1, 2])})
    embed = transformer.transformer_blocks[0].norm1.emb
    assert torch.equal(found[-1], embed(1000 * t, torch.tensor([0, 1, 2]), hidden_dtype=x.dtype))
    assert found[-1].shape == (BATCH, modulation_width(transformer))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_interval": 0.0},
        {"max_interval": 1.1},
        {"min_guidance": 1.0},
        {"min_guidance": 3.0, "max_guidance": 2.0},
        {"band_limit": 0.0},
    ],
)
def test_a_conditioner_out_of_range_is_refused(changes):
    with pytest.raises(ValueError):
        IntervalConditioner(16, 2, **changes)


def test_a_missing_or_unknown_scale_is_refused():
    taught, untaught = (IntervalConditioner(16, 2, 0.2, *ends) for ends in ((1.0, 4.0), ()))
    interval = torch.zeros(2)
    with pytest.raises(ValueError, match="pass guidance_scale"):
        taught(interval)
    with pytest.raises(ValueError, match="leave guidance_scale out"):
        untaught(interval, torch.ones(2))


def draw(pipe, **changes):
    options = {"generator": seeded(), "output_type": "latent", "num_inference_steps": 8}
    return pipe([0, 2], **{**options, **changes}).images


def test_a_pipeline_takes_uniform_steps_with_the_average_velocity():
    pipe = student_pipeline()
    x = torch.randn(2, 1, 4, 4, generator=seeded())
    expected = x
    for i in range(8):
        t, interval = torch.full((2,), 1 - i / 8), torch.full((2,), 1 / 8)
        with torch.no_grad(), pipe.conditioning.at(interval, torch.full((2,), 3.0)):
            u = velocity(pipe.transformer, expected, t, {"class_labels": torch.tensor([0, 2])})
        expected = expected - u / 8
    torch.testing.assert_close(draw(pipe, latents=x), expected)


def test_a_student_of_two_branches_is_guided_by_both():
    pipe = student_pipeline(embed_guidance=False)
    x = torch.randn(2, 1, 4, 4, generator=seeded())
    expected = x
    for i in range(8):
        t, interval = torch.full((2,), 1 - i / 8), torch.full((2,), 1 / 8)
        with torch.no_grad(), pipe.conditioning.at(interval):
            u_c = velocity(pipe.transformer, expected, t, {"class_labels": torch.tensor([0, 2])})
            u_0 = velocity(pipe.transformer, expected, t, {"class_labels": torch.tensor([3, 3])})
        expected = expected - (u_0 + 2.5 * (u_c - u_0)) / 8
    found = draw(pipe, latents=x, guidance_scale=2.5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="1 to 4"):
        draw(pipe, guidance_scale=4.5)


# T14
def test_an_interval_longer_than_trained_is_refused():
    with pytest.raises(ValueError, match="Take more steps: 4 where"):
        draw(student_pipeline(), num_inference_steps=3)
    assert draw(student_pipeline(), num_inference_steps=4).isfinite().all()


@pytest.mark.parametrize("scale", [0.5, 4.5])
def test_a_scale_that_was_not_trained_is_refused(scale):
    with pytest.raises(ValueError, match="1 to 4"):
        draw(student_pipeline(), guidance_scale=scale)


def test_a_solver_for_velocities_is_refused():
    pipe = student_pipeline()
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )
    with pytest.raises(ValueError, match="average velocities"):
        draw(pipe)
    pipe = student_pipeline()
    with sampling_with(pipe, solver_scheduler("ab2", [1.0, 0.75, 0.5, 0.25])) as other:
        with pytest.raises(ValueError, match="average velocities"):
            draw(other, num_inference_steps=4)


def test_a_student_is_saved_and_loaded(tmp_path):
    pipe = student_pipeline()
    pipe.save_pretrained(tmp_path)
    again = load_pipeline(str(tmp_path))
    assert torch.equal(draw(again), draw(pipe))
    assert host_fingerprint(again.transformer) == host_fingerprint(pipe.transformer)
    assert type(again.transformer) is type(tiny_dit())


def test_the_conditioner_is_part_of_the_fingerprint_and_there_is_one():
    pipe = student_pipeline()
    before = host_fingerprint(pipe.transformer)
    names = [name for name, _ in pipe.transformer.named_modules()]
    assert not any("conditioner" in name for name in names)
    with torch.no_grad():
        pipe.conditioner.outer.weight[0] += 1.0
    assert host_fingerprint(pipe.transformer) != before
    with pytest.raises(ValueError, match="already"):
        Conditioning(pipe.transformer, pipe.conditioner)
    pipe.conditioning.detach()
    assert host_fingerprint(pipe.transformer) == host_fingerprint(tiny_dit())
    Conditioning(pipe.transformer, pipe.conditioner)


def test_a_deep_copy_has_a_conditioner_of_its_own():
    pipe = student_pipeline()
    before = draw(pipe)
    copied = copy.deepcopy(pipe)
    with torch.no_grad():
        copied.conditioner.outer.weight.zero_()
    assert torch.equal(draw(pipe), before)
    assert not torch.equal(draw(copied), before)


def test_forecasting_works_on_a_student_and_detaches():
    pipe = student_pipeline()
    full = draw(pipe)
    with forecasting(pipe, Reuse(), anchors=range(8), tap="hidden"):
        assert torch.equal(draw(pipe), full)
    with forecasting(pipe, Reuse(), anchors=(0, 2, 4, 6), tap="hidden") as run:
        assert not torch.equal(draw(pipe), full)
    assert run.report().anchors == [0, 2, 4, 6]
    assert torch.equal(draw(pipe), full)


SCHEDULES = {
    "speca": lambda: SpeCa(0.02),
    "teacache": lambda: TeaCache(0.05),
    "first_block": lambda: FirstBlock(0.05),
}


@pytest.mark.parametrize("embed_guidance", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_that_decide_work_on_a_student(name, embed_guidance):
    """SpeCa computes single rows of a batch, so what is added must fit any number of rows."""
    pipe = student_pipeline(embed_guidance)
    full = draw(pipe)
    with forecasting(pipe, Taylor(1), tap="hidden", schedule=SCHEDULES[name]()) as run:
        assert draw(pipe).isfinite().all()
    assert run.report().anchors[0] == 0
    with forecasting(pipe, Taylor(1), anchors=range(8), tap="hidden", schedule=SCHEDULES[name]()):
        torch.testing.assert_close(draw(pipe), full)
