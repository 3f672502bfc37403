"""RF inversion: its formulas, exactness under forecasting in both phases, and what it refuses."""

import warnings

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from module_hosts import seeded
from PIL import Image
from tiny_hosts import tiny_flux
from tiny_text import tiny_text_pipeline

import foreseer as fs
from foreseer.integration.pipelines.rf_inversion import RFInversion, source_share

STEPS = 6
EVEN = [0, 2, 4]


def pictures(rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, 3, 16, 16, generator=seeded(seed)) * 2 - 1


@pytest.fixture(scope="module")
def editor():
    return RFInversion(tiny_text_pipeline())


def invert(editor, gamma=0.5, **given):
    given = {"images": pictures(), "num_inference_steps": STEPS, "prompt": "a cat"} | given
    return editor.invert(gamma=gamma, generator=seeded(3), **given)


def edit(editor, inverted, eta=0.7, stop=2, **given):
    return editor.edit(inverted, "a dog", eta, stop, output_type="latent", **given)


def half_mask() -> torch.Tensor:
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., :6] = True  # half of a token's column
    return mask


# ------------------------------------------------------------------------------------- formulas


def test_inversion_is_the_published_step(editor):
    inverted = invert(editor, 0.4)
    model = editor._model("a cat", 1.0, inverted.source, (16, 16))
    x, y = inverted.source, inverted.noise
    assert not torch.equal(y, x) and torch.equal(x, editor.coder.encoded(pictures())[0])
    with torch.no_grad():
        for i in range(STEPS):
            u = model(x, i / STEPS)
            x = x + (u + 0.4 * ((y - x) / (1 - i / STEPS) - u)) / STEPS
    torch.testing.assert_close(inverted.latents, x, rtol=1e-5, atol=1e-5)


def test_editing_is_the_published_step(editor):
    inverted = invert(editor)
    found = edit(editor, inverted, 0.6, 4, start=1, guidance_scale=2.0)
    told, plain = (
        editor._model(prompt, 1.0, inverted.source, (16, 16)) for prompt in ("a dog", "")
    )
    x = inverted.latents
    with torch.no_grad():
        for i in range(STEPS):
            sigma = 1 - i / STEPS
            v = plain(x, sigma)
            v = v + 2.0 * (told(x, sigma) - v)
            if 1 <= i < 4:
                v = v + 0.6 * ((x - inverted.source) / sigma - v)
            x = x - v / STEPS
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


def test_editing_without_a_pull_is_the_pipeline(editor):
    inverted = invert(editor)
    found = edit(editor, inverted, 0.0, 0)
    pipe, times = editor.pipe, torch.linspace(1, 1 / STEPS, STEPS).tolist()
    own = pipe.scheduler.set_timesteps
    pipe.scheduler.set_timesteps = lambda *_, device=None: own(sigmas=times, device=device)
    try:
        expected = pipe("a dog", latents=inverted.latents.repeat(1, 1, 1)[:1], output_type="latent")
    finally:
        del pipe.scheduler.set_timesteps
    torch.testing.assert_close(found[:1], expected.images, rtol=1e-4, atol=1e-5)


def test_outside_of_the_mask_the_picture_is_put_back(editor):
    inverted, mask = invert(editor), half_mask()
    found = edit(editor, inverted, mask=mask, background_steps=STEPS)
    kept = ~editor.coder.packed_mask(mask).expand_as(found)
    assert torch.equal(found[kept], inverted.source[kept])
    assert float((found - inverted.source)[~kept].abs().min()) > 0
    early = edit(editor, inverted, mask=mask, background_steps=2)
    assert not torch.equal(early[kept], inverted.source[kept])


def test_the_exact_inversion_is_brought_back_to_the_pictures(editor):
    errors = []
    for inverted in (
        invert(editor, 0.0),
        editor.invert_exactly(pictures(), STEPS, prompt="a cat", iterations=8),
    ):
        back = editor.edit(inverted, "a cat", 0.0, 0, guidance_scale=1.0, output_type="latent")
        errors.append(float((back - inverted.source).norm() / inverted.source.norm()))
    assert errors[1] < 1e-3 < errors[0]


def test_the_share_of_the_picture_in_the_noise_is_the_published_product():
    up = [i / 28 for i in range(28)]
    assert [round(source_share(gamma, up), 3) for gamma in (0.2, 0.7, 1.0)] == [0.55, 0.108, 0.036]
    assert source_share(1.0, [*up, 1.0]) == pytest.approx(0, abs=1e-12)


# ---------------------------------------------------------------------- forecasting, acceptance


def test_all_steps_anchors_change_no_bit_in_either_phase(editor):
    inverted = invert(editor)
    edited = edit(editor, inverted, mask=half_mask())
    forward = editor.pipe.transformer.forward
    every = list(range(STEPS))
    with fs.forecasting(editor.inversion, fs.predictors.Taylor(1), every) as run:
        assert torch.equal(invert(editor).latents, inverted.latents)
        assert run.report().anchors == every
    with fs.forecasting(editor.editing, fs.predictors.Taylor(1), every, tap="hidden") as run:
        assert torch.equal(edit(editor, inverted, mask=half_mask()), edited)
        assert run.report().anchors == every
    assert editor.pipe.transformer.forward == forward
    assert "forward" not in vars(editor.pipe.transformer)


def test_phases_know_nothing_of_each_other(editor):
    inverted = invert(editor)
    with fs.forecasting(editor.editing, fs.predictors.Taylor(1), EVEN):
        expected = edit(editor, inverted)
    with fs.forecasting(editor.inversion, fs.predictors.Taylor(1), EVEN):
        skipped = invert(editor)
        with pytest.raises(ValueError, match="outside of a run"):  # of another phase
            edit(editor, inverted)
        assert torch.equal(invert(editor).latents, skipped.latents)
    assert not torch.equal(skipped.latents, inverted.latents)
    with fs.forecasting(editor.editing, fs.predictors.Taylor(1), EVEN) as run:
        assert torch.equal(edit(editor, inverted), expected)
        assert run.report().forecasts == [1, 3, 5]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_uniform_reuse_at_gamma_0_is_euler_with_fewer_steps(editor, every):
    anchors = range(0, STEPS, every)
    with fs.forecasting(editor.inversion, fs.predictors.Reuse(), anchors):
        skipped = invert(editor, 0.0)
    fewer = invert(editor, 0.0, num_inference_steps=STEPS // every)
    torch.testing.assert_close(skipped.latents, fewer.latents, rtol=1e-5, atol=1e-5)


def test_at_gamma_1_the_network_has_no_say_and_the_pipeline_says_so(editor):
    with pytest.warns(UserWarning, match="6 evaluations are thrown away.*pointless"):
        found = invert(editor, 1.0)
    pipe = tiny_text_pipeline()
    for weight in pipe.transformer.proj_out.parameters():
        weight.data.zero_()
    with pytest.warns(UserWarning, match="at gamma 1"):
        without = invert(RFInversion(pipe), 1.0)
    torch.testing.assert_close(found.latents, without.latents, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.latents, found.noise, rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        invert(editor, 0.9)


def test_readouts_are_fitted_on_exact_inversions(editor, tmp_path):
    inputs = [{"images": pictures(1, seed), "prompt": "a cat"} for seed in range(12)]
    editor.inversion.sample = lambda given, generator: (
        editor.invert(**given, gamma=0.0, num_inference_steps=STEPS, generator=generator).latents
    )
    editor.exact.sample = lambda given, generator: (
        editor.invert_exactly(**given, num_inference_steps=STEPS).latents
    )
    recording = fs.record(editor.exact, inputs, str(tmp_path / "recording"))
    assert recording.header.sigmas == pytest.approx([i / STEPS for i in range(STEPS)])
    fitted = fs.fit(recording, anchors=EVEN, pipeline=editor.inversion, rank=4)
    assert type(fitted).__name__ == "Readout" and fitted.first_time is None
    held = {"images": pictures(4, 99), "num_inference_steps": STEPS}
    exact = editor.invert_exactly(**held, prompt="a cat").latents
    errors = []
    for predictor in (fitted, fs.predictors.Taylor(1)):
        with fs.forecasting(editor.inversion, predictor, EVEN):
            found = invert(editor, 0.0, **held).latents
        errors.append(float((found - exact).norm()))
    assert errors[0] < errors[1]
    inverted = invert(editor)
    with fs.forecasting(editor.editing, fitted), pytest.raises(fs.PredictorMismatch, match="phase"):
        edit(editor, inverted)


# ---------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(2, 1, 16, 16), "picture 0 holds no pixel.*of 16x16"),
        (torch.ones(1, 1, 16, 16), "holds every pixel.*Leave the mask out"),
        (torch.ones(2, 1, 4, 4), "mask is 2x1x4x4, expected 2x1x16x16.*resize"),
        (torch.ones(3, 1, 16, 16), "mask is 3x1x16x16, expected 2x1x16x16"),
        (torch.ones(1, 3, 16, 16), "mask is 1x3x16x16, expected"),
        (Image.new("L", (16, 16)), "mask is a Image, expected a tensor of booleans: of a PIL"),
    ],
)
def test_masks_that_do_not_fit_are_refused(editor, mask, words):
    with pytest.raises(ValueError, match=words):
        edit(editor, invert(editor), mask=mask.bool() if isinstance(mask, torch.Tensor) else mask)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: invert(e, 1.5), "gamma is 1.5"),
        (lambda e: invert(e, images=pictures()[..., :8]), "16x8 pixels, expected 16x16"),
        (lambda e: invert(e, images=5 * pictures()), "values up to .*expected"),
        (lambda e: invert(e, prompt=["a cat"] * 3), "3 prompts for 2 pictures"),
        (lambda e: invert(e, noise=torch.zeros(1, 16, 48)), "noise has the shape"),
        (lambda e: invert(e, num_inference_steps=0), "num_inference_steps is 0"),
        (lambda e: edit(e, invert(e), stop=7), "stop 7; expected .* <= 6, the steps of"),
        (lambda e: edit(e, invert(e), eta=-1.0), "eta -1.0"),
        (lambda e: e.invert_exactly(pictures(), iterations=0), "iterations is 0"),
        (
            lambda e: invert(e, images=pictures()[:, :1]),
            r"\(2, 1, 16, 16\).*expected \(B, 3, H, W\)",
        ),
        (
            lambda e: e._embedded(None, pictures()[..., 0]),
            'prompt is None, expected words.*"" is no',
        ),
        (
            lambda e: e._embedded(["a cat", 3], pictures()[..., 0]),
            "prompt is .*, 3], expected words",
        ),
        (lambda e: invert(e, guidance_scale=float("nan")), "guidance_scale is nan"),
        (lambda e: edit(e, invert(e), guidance_scale=float("inf")), "guidance_scale is inf"),
        (
            lambda e: RFInversion(e.pipe).inversion(images=pictures(), gamma=[0.5, 0.5]),
            "inputs are gamma, images, expected images and.*gamma 0",
        ),
        (lambda e: RFInversion(e.pipe).exact(prompt="a cat"), "inputs are prompt, expected images"),
        (lambda e: RFInversion(object()), "found object, expected a PixelFluxPipeline"),
    ],
)
def test_bad_input_is_refused_in_words(editor, call, words):
    with pytest.raises(ValueError, match=words):
        call(editor)


def test_an_edit_inside_of_an_edit_is_told_to_wait(editor):
    inverted = invert(editor)
    block = editor.pipe.transformer.transformer_blocks[0]
    handle = block.register_forward_pre_hook(lambda *_: edit(editor, inverted))
    try:
        with pytest.raises(ValueError, match="open already; end it first, or give runs"):
            edit(editor, inverted)
    finally:
        handle.remove()
    assert bool(edit(editor, inverted).isfinite().all())


def test_an_inversion_is_edited_in_another_type_of_numbers(editor):
    inverted = invert(editor)
    half = RFInversion(tiny_text_pipeline())
    half.pipe.transformer.to(torch.bfloat16)
    found = edit(half, inverted, mask=half_mask())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.float(), edit(editor, inverted, mask=half_mask()), rtol=0.1, atol=0.1
    )


def test_an_edit_that_breaks_off_leaves_nothing_behind(editor):
    inverted = invert(editor)
    with fs.forecasting(editor.editing, fs.predictors.Taylor(1), EVEN) as run:
        expected = edit(editor, inverted)
        block, seen = editor.pipe.transformer.transformer_blocks[0], []

        def failing(*_):
            seen.append(1)
            if len(seen) == 3:
                raise RuntimeError("midway")

        handle = block.register_forward_pre_hook(failing)
        with pytest.raises(RuntimeError, match="midway"):
            edit(editor, inverted)
        handle.remove()
        assert "broken off" in str(run.report())
        assert torch.equal(edit(editor, inverted), expected)


def test_two_editors_on_one_transformer_are_refused_together(editor):
    other = RFInversion(editor.pipe)
    with (
        fs.forecasting(editor.inversion, fs.predictors.Reuse(), EVEN),
        pytest.raises(ValueError, match="already"),
        fs.forecasting(other.editing, fs.predictors.Reuse(), EVEN),
    ):
        pass


# ------------------------------------------------------------------------------- diffusers' FLUX


def test_a_flux_pipeline_of_diffusers_is_inverted_and_edited():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=1,
        shift_factor=0.1,
        scaling_factor=0.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, vae, None, None, None, None, tiny_flux(guidance_embeds=True))
    editor = RFInversion(pipe)
    prompt = torch.randn(1, 3, 12, generator=seeded(1)), torch.randn(1, 12, generator=seeded(2))
    given = {"images": pictures(1)[..., :12], "num_inference_steps": STEPS, "prompt": prompt}
    inverted = editor.invert(gamma=0.0, generator=seeded(0), **given)
    assert inverted.latents.shape == (1, 4 * 3, 16)
    grid = editor.grid(STEPS, inverted.latents)
    assert grid[0] == 1 and grid[-1] == 0 and grid[3] > 0.6  # shifted
    settings = {"eta": 0.0, "stop": 0, "guidance_scale": 3.5, "output_type": "latent"}
    found = editor.edit(inverted, prompt, **settings)
    expected = pipe(
        prompt_embeds=prompt[0],
        pooled_prompt_embeds=prompt[1],
        latents=inverted.latents,
        height=16,
        width=12,
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        output_type="latent",
    )
    torch.testing.assert_close(found, expected.images, rtol=1e-4, atol=1e-5)
    mask = torch.zeros(1, 1, 16, 12, dtype=torch.bool)
    mask[..., :1] = True
    assert editor.coder.packed_mask(mask).float().mean() == pytest.approx(1 / 6)
    drawn = editor.edit(inverted, prompt, 0.5, 2, mask, output_type="pt")
    assert drawn.shape == (1, 3, 16, 12) and bool(drawn.isfinite().all())


@pytest.mark.fault
def test_pictures_that_are_not_finite_or_not_rgb_of_one_size_are_refused(editor):
    broken = pictures()
    broken[0, 0, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="with values up to nan"):
        invert(editor, images=broken)
    with pytest.raises(ValueError, match="expected finite numbers"):
        invert(editor, noise=torch.full_like(editor.coder.encoded(pictures())[0], float("nan")))
    for images in (
        Image.new("RGBA", (16, 16)),
        Image.new("L", (16, 16)),
        [Image.new("RGB", (16, 16)), Image.new("RGB", (32, 16))],
        [],
    ):
        with pytest.raises(ValueError, match="expected RGB of one size"):
            invert(editor, images=images)
