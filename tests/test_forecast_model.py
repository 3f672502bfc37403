"""A predictor runs on any sampler loop, bit for bit as in the pipeline, or refuses it in words."""

import dataclasses
import functools

import pytest
import torch
from tiny_hosts import tiny_dit
from torch import Tensor

import foreseer as fs
from foreseer.integration.sigma_run import flow_time
from foreseer.predictors.linear import L2P

PIPELINE, READOUT, ROWS = "zoo:fashion_dit", "zoo:fashion_dit_readout_8", "zoo:emoji_flux_l2p_8"


@pytest.fixture(scope="module")
def pipe():
    return fs.load_pipeline(PIPELINE)


@pytest.fixture(scope="module")
def emoji():
    return fs.load_pipeline("zoo:emoji_flux")


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(pipe, noise) -> Tensor:
    """The images of the pipeline under the predictor."""
    with fs.forecasting(pipe, READOUT):
        return pipe([3, 7], latents=noise, output_type="latent").images


def network(pipe):
    """`f(x, sigma, labels)` of the bundled transformer."""

    def model_fn(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return pipe.transformer(x, timestep=1000 * sigma, class_labels=labels, return_dict=False)[0]

    return model_fn


@torch.no_grad()
def euler(model, pipe, x: Tensor, together: bool = True, guidance: float = 3.0) -> Tensor:
    """A loop written by hand: guidance in one call or in two, then an Euler step."""
    pipe.scheduler.set_timesteps(50)
    sigmas = pipe.scheduler.sigmas
    labels, null = torch.tensor([3, 7]), torch.tensor([10, 10])
    for i in range(50):
        sigma = sigmas[i].expand(len(x))
        if together:
            both = model(
                torch.cat([x, x]),
                sigma.repeat(2),
                labels=torch.cat([labels, null]),
                branches=(0, 1),
            )
            cond, uncond = both.chunk(2)
        else:
            cond = model(x, sigma, labels=labels, branches=(0,))
            uncond = model(x, sigma, labels=null, branches=(1,))
        v = uncond + guidance * (cond - uncond)
        x = x + (sigmas[i + 1] - sigmas[i]) * v
    return x


def wrapped(pipe, **settings):
    return fs.forecast_model(
        network(pipe), READOUT, model=pipe.transformer, guidance_scale=3.0, **settings
    )


# -------------------------------------------------------------------------------- the same images


def test_a_hand_written_loop_draws_the_images_of_the_pipeline_bit_for_bit(pipe, noise, expected):
    model = wrapped(pipe)
    assert torch.equal(euler(model, pipe, noise), expected)
    assert model.report().anchors == list(fs.load(READOUT).spec.anchors)
    assert len(model.report().forecasts) == 42
    assert "42 of 50 steps forecast" in repr(model)
    assert model.run.forecaster.state_bytes() == 0  # nothing is held once the run is over
    assert torch.equal(euler(model, pipe, noise), expected)  # and the next run is a new one


@pytest.mark.parametrize("returns", ["v", "denoised"])
def test_step_0_is_told_another_time_as_in_the_pipeline(pipe, noise, returns):
    predictor = fs.load(READOUT)
    predictor.first_time = 0.97
    with fs.forecasting(pipe, predictor):
        expected = pipe([3, 7], latents=noise, output_type="latent").images
    own, told = network(pipe), []

    def model_fn(x, sigma, labels):
        told.append(float(sigma[0]))
        v = own(x, sigma, labels)
        return v if returns == "v" else x - sigma[:, None, None, None] * v

    if returns == "v":
        model = fs.forecast_model(model_fn, predictor, model=pipe.transformer)
        assert torch.equal(euler(model, pipe, noise), expected)
    else:
        rows = L2P(50, predictor.anchors, 2, first_time=0.97)
        rows.weight.copy_(predictor.weight)
        rows.spec = predictor.spec
        loops = [
            fs.forecast_model(f, rows, model=pipe.transformer, returns=kind)
            for f, kind in ((own, "v"), (model_fn, "denoised"))
        ]
        x, sigma = torch.cat([noise, noise]), torch.ones(4)
        labels = torch.tensor([3, 7, 10, 10])
        v, denoised = (loop(x, sigma, labels=labels, branches=(0, 1)) for loop in loops)
        torch.testing.assert_close(x - denoised, v, atol=1e-5, rtol=0)
    assert told[0] == pytest.approx(0.97) and 0.97 not in told[1:]


def test_a_time_that_scales_the_input_is_refused(pipe):
    rows = L2P(50, [0, 25], first_time=0.97)
    rows.spec = dataclasses.replace(fs.load(READOUT).spec, anchors=(0, 25), scheduler="DDIM")
    with pytest.raises(ValueError, match="returns eps scales its input by it; .* first_times=0"):
        fs.forecast_model(pipe.transformer, rows, returns="eps")


def test_branches_in_calls_of_their_own_are_known_by_their_numbers(pipe, noise, expected):
    found = euler(wrapped(pipe), pipe, noise, together=False)
    assert (found - expected).abs().max() < 1e-4  # products of another batch size


def test_what_is_returned_as_denoised_is_forecast_as_v(pipe, noise, expected):
    """The k-diffusion convention, on its own Euler step."""
    plain = network(pipe)

    def denoiser(x, sigma, labels):
        return x - sigma.reshape(-1, 1, 1, 1) * plain(x, sigma, labels)

    model = fs.forecast_model(denoiser, READOUT, model=pipe.transformer, returns="denoised")

    def as_v(x, sigma, **kwargs):
        return (x - model(x, sigma, **kwargs)) / sigma.reshape(-1, 1, 1, 1)

    found = euler(as_v, pipe, noise)
    assert (found - expected).abs().max() < 1e-3  # x - sigma v and back, rounded in float32
    assert len(model.report().forecasts) == 42


def test_rows_on_the_output_need_nothing_but_the_function(emoji):
    """Linear rows, without a hook on the network, on a FLUX-like host."""
    count = sum(parameter.numel() for parameter in emoji.transformer.parameters())
    stand_in = torch.nn.Linear(count, 1, bias=False, device="meta")  # of no diffusers class
    noise = torch.randn(1, 64, 48, generator=torch.Generator().manual_seed(0))
    with fs.forecasting(emoji, ROWS):
        expected = emoji("panda face", latents=noise, output_type="latent").images
    calls = []

    def transformer(x, **kwargs):
        (v,) = plain(x, **kwargs)
        calls.append(len(x))
        return (v,)

    plain = emoji.transformer.forward

    def model_fn(x, sigma, **kwargs):
        return transformer(x, timestep=sigma, **kwargs)[0]

    model = fs.forecast_model(model_fn, ROWS, model=stand_in)

    def forward(x, timestep, **kwargs):
        return (model(x, timestep, branches=(0, 1), **kwargs),)

    emoji.transformer.forward = forward
    try:
        found = emoji("panda face", latents=noise, output_type="latent").images
    finally:
        del emoji.transformer.forward
    assert torch.equal(found, expected)
    assert calls == [2] * 8


def test_a_formula_goes_on_any_grid_and_eps_are_found_by_k_diffusions_sigma():
    sigmas = torch.tensor([9.0, 4.0, 1.0, 0.25, 0.0])
    seen = []

    def eps(x, sigma):
        seen.append(float(sigma))
        return torch.full_like(x, float(sigma))

    model = fs.forecast_model(
        eps, fs.predictors.Taylor(1), returns="eps", sigmas=sigmas, anchors=(0, 1)
    )
    x = torch.zeros(1, 2)
    out = [float(model(x, sigma)[0, 0]) for sigma in sigmas[:-1]]
    assert seen == [9.0, 4.0] and out[:2] == [9.0, 4.0]
    line = [9 - 5 * step for step in range(4)]  # Taylor is in steps
    assert out == pytest.approx(line)
    assert flow_time(9.0, "eps") == pytest.approx(0.9)
    denoiser = fs.forecast_model(
        lambda x, sigma: x - sigma * eps(x, sigma),
        fs.predictors.Taylor(1),
        returns="denoised",
        fitted_on="eps",
        sigmas=sigmas,
        anchors=(0, 1),
    )
    for sigma, value in zip(sigmas[:-1], line, strict=True):
        assert float(denoiser(x, sigma)[0, 0]) == pytest.approx(-float(sigma) * value)


def test_a_rule_over_steps_is_told_the_runs_flow_times_by_pipelines_and_loops(pipe, noise):
    rule, anchors = fs.predictors.MeanCache(2), (0, 1, 9)
    with fs.forecasting(pipe, rule, tap="output", anchors=anchors):
        drawn = pipe([3, 7], latents=noise, output_type="latent").images
    sigmas = pipe.scheduler.sigmas
    model = fs.forecast_model(network(pipe), rule, sigmas=sigmas, anchors=anchors)
    assert torch.equal(euler(model, pipe, noise), drawn)
    rows, computed = rule.rows(anchors, sigmas[:-1].tolist())[0, 0], {}
    plain, step = network(pipe), iter(range(50))

    def by_rows(x, sigma, labels, branches):
        s = next(step)
        if s in anchors:
            computed[s] = plain(x, sigma, labels)
        return sum(rows[s, a].float() * v for a, v in computed.items())

    assert (euler(by_rows, pipe, noise) - drawn).abs().max() < 1e-4


# ---------------------------------------------------------------------------------- what it refuses


def test_another_model_is_refused_in_the_words_of_the_pipeline(pipe):
    with pytest.raises(fs.PredictorMismatch, match="fitted on another host: number of parameters"):
        fs.forecast_model(network(pipe), READOUT, model=tiny_dit())
    with pytest.raises(fs.PredictorMismatch, match="fitted on another host: number of parameters"):
        fs.forecast_model(network(pipe), ROWS, model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="fitted on one model; pass model="):
        fs.forecast_model(network(pipe), ROWS)


def test_weights_that_changed_since_are_refused_when_a_run_begins(pipe, noise):
    model = wrapped(pipe)
    bias = pipe.transformer.proj_out_2.bias
    kept = bias.detach().clone()
    try:
        with torch.no_grad():
            bias += 1
        with pytest.raises(fs.PredictorMismatch, match="weights .fine-tuned, or with a LoRA"):
            euler(model, pipe, noise)
    finally:
        with torch.no_grad():
            bias.copy_(kept)


@pytest.mark.parametrize("off", [0.97, 0.5])
def test_a_sigma_off_the_fits_grid_is_refused_and_the_next_run_is_sound(pipe, noise, expected, off):
    model = wrapped(pipe)
    labels = torch.tensor([3, 7, 10, 10])
    x = torch.cat([noise, noise])
    sigmas = fs.load(READOUT).spec.sigmas
    with torch.no_grad():
        model(x, torch.full((4,), sigmas[0]), labels=labels, branches=(0, 1))
        with pytest.raises(fs.PredictorMismatch, match="sigma grid differs from the fit's: step"):
            model(x, torch.full((4,), off), labels=labels, branches=(0, 1))
    assert torch.equal(euler(model, pipe, noise), expected)


def test_samplers_that_evaluate_a_step_twice_or_leave_one_out_are_refused(pipe, noise):
    x, labels = torch.cat([noise, noise]), torch.tensor([3, 7, 10, 10])
    sigmas = fs.load(READOUT).spec.sigmas
    for path, words in (
        ((0, 1, 1), f"step 2 has sigma {sigmas[1]:.6f}, expected {sigmas[2]:.6f}"),  # Heun
        ((0, 2), f"step 1 has sigma {sigmas[2]:.6f}, expected {sigmas[1]:.6f}"),
        ((3,), "fitted on 50 steps, this run has 47"),  # image to image
    ):
        model = wrapped(pipe)
        with torch.no_grad(), pytest.raises(fs.PredictorMismatch, match=words):
            for place in path:
                model(x, torch.full((4,), sigmas[place]), labels=labels, branches=(0, 1))


def test_other_guidance_branches_dtypes_and_sizes_are_refused(pipe, noise):
    model = wrapped(pipe)
    one = functools.partial(model, labels=torch.tensor([3, 7]))
    sigmas = fs.load(READOUT).spec.sigmas
    with torch.no_grad():
        with pytest.raises(fs.PredictorMismatch, match=r"2 guidance branch\(es\) per step, .* 1"):
            for sigma in sigmas[:2]:
                one(noise, sigma * torch.ones(2))
        half = fs.forecast_model(
            lambda x, sigma, labels: network(pipe)(x, sigma, labels).bfloat16(),
            READOUT,
            model=pipe.transformer,
        )
        with pytest.raises(fs.PredictorMismatch, match="fitted on float32 features"):
            half(noise, sigmas[0] * torch.ones(2), labels=torch.tensor([3, 7]))
        scale = fs.forecast_model(
            network(pipe), READOUT, model=pipe.transformer, guidance_scale=5.0
        )
        with pytest.raises(fs.PredictorMismatch, match="fitted at guidance_scale 3"):
            euler(scale, pipe, noise)
        with pytest.raises(ValueError, match="expected one sigma for all"):
            one(noise, torch.tensor([1.0, 0.5]))


def test_what_a_function_cannot_show_is_refused(pipe, noise):
    with pytest.raises(fs.UnsupportedHost, match="reads the hidden state.*pass model="):
        fs.forecast_model(network(pipe), fs.load(READOUT), model=None)
    with pytest.raises(fs.PredictorMismatch, match="tap 'hidden', which lies inside the network"):
        fs.forecast_model(network(pipe), "zoo:fashion_dit_l2p_8", model=pipe.transformer)
    guided = fs.forecast_model(
        lambda x, sigma, labels: network(pipe)(x, sigma, labels)[:1],
        READOUT,
        model=pipe.transformer,
    )
    with torch.no_grad(), pytest.raises(fs.UnsupportedHost, match="expected one call with that"):
        guided(noise, torch.ones(2), labels=torch.tensor([3, 7]))


def test_what_is_returned_must_tell_what_is_forecast(pipe):
    rows = fs.predictors.Taylor(1)
    with pytest.raises(ValueError, match="pass fitted_on='v' of a flow model"):
        fs.forecast_model(network(pipe), rows, returns="denoised", sigmas=[1.0], anchors=(0,))
    with pytest.raises(ValueError, match="returns eps, the predictor forecasts v"):
        fs.forecast_model(network(pipe), READOUT, model=pipe.transformer, returns="eps")
    with pytest.raises(ValueError, match="returns is 'x0'"):
        fs.forecast_model(network(pipe), rows, returns="x0", sigmas=[1.0], anchors=(0,))
    with pytest.raises(ValueError, match="no grid of its own; pass sigmas"):
        fs.forecast_model(network(pipe), rows, anchors=(0,))
    with pytest.raises(ValueError, match="no anchors of its own"):
        fs.forecast_model(network(pipe), rows, sigmas=[1.0])
