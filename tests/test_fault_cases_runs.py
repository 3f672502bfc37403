"""Each numbered way in which a run can differ from its fit, or break off, leaves no wrong image."""

import dataclasses
import functools
from typing import Any

import pytest
import soak
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from families import FAMILIES, MORE, call
from soak_cases import ABORTS, Call, Predictors, build, fresh, grid, image, outcome
from test_composition_weights import cast, fuse, learned, load
from test_composition_weights import swap as swap_weights
from tiny_hosts import bare_pipeline, pipeline, run, seeded, spec_for

from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.integration.forecasting import attach, forecasting
from foreseer.integration.histories import most_bytes
from foreseer.integration.host.clock import flow_sigmas
from foreseer.integration.token_runner import PartialTrunk
from foreseer.predictors.base import History, Step
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import Newton, Reuse, Taylor

pytestmark = pytest.mark.fault
ANCHORS = (0, 1, 4)


@functools.cache
def on_a_new_pipeline(wanted: Call) -> dict[str, str]:
    return fresh(wanted, {})


def fitted(slot: str, setup: str = "l2p_output") -> tuple[Any, Any]:
    """A pipeline and a predictor that was fitted on its usual run, as it says."""
    pipe = build(slot)[slot]
    return pipe, Predictors({slot: grid(slot)}).get(setup, slot, pipe)


# ------------------------------------------------------------------------ 8: steps, grid, scheduler


def test_case_08_a_predictor_of_50_steps_at_20():
    pipe = pipeline("dit_guided")
    pipe.scheduler.set_timesteps(50)
    sigmas, anchors = tuple(flow_sigmas(pipe.scheduler)), (0, 1, 10)
    predictor = L2P(50, anchors, 2)
    predictor.spec = spec_for(pipe, sigmas=sigmas, anchors=anchors)
    plain = run("dit_guided", pipe, num_inference_steps=20)
    with forecasting(pipe, predictor):
        run("dit_guided", pipe, num_inference_steps=50)
        with pytest.raises(PredictorMismatch, match="fitted on 50 steps, this run has 20"):
            run("dit_guided", pipe, num_inference_steps=20)
    assert torch.equal(run("dit_guided", pipe, num_inference_steps=20), plain)


@pytest.mark.parametrize("setup", ["l2p_output", "gram", "lesa"])
def test_case_08_other_sigmas_at_as_many_steps(setup):
    pipe, predictor = fitted("flux", setup)
    wanted = Call("flux", None)
    sigmas = [1.0, 0.9, 0.8, 0.7, 0.5, 0.4, 0.2, 0.1]
    with forecasting(pipe, predictor):
        image(pipe, wanted)
        with pytest.raises(PredictorMismatch, match="sigma grid differs from the fit's: step"):
            image(pipe, wanted, sigmas=sigmas)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), "has sigma .*another shift"),
        (lambda: DDIMScheduler(clip_sample=False), "fitted under FlowMatchEuler.*found DDIM"),
        (FlowMatchHeunDiscreteScheduler, "fitted under FlowMatchEuler.*found FlowMatchHeun"),
    ],
)
def test_case_08_another_scheduler_or_shift(scheduler, message):
    pipe, predictor = fitted("dit")
    pipe.scheduler = scheduler()
    with pytest.raises(PredictorMismatch, match=message), forecasting(pipe, predictor):
        image(pipe, Call("dit", None))


def test_case_08_another_strength_changes_the_real_number_of_steps():
    pipe, predictor = fitted("flux_img2img")
    asked = functools.partial(call, MORE["flux_img2img"], pipe)
    with forecasting(pipe, predictor):
        assert asked(strength=0.75).isfinite().all()
        with pytest.raises(PredictorMismatch, match="fitted on 6 steps, this run has 4"):
            asked(strength=0.5)


# ------------------------------------------------------ 9: resolution, batch, guidance in a session

CHANGES = {
    "resolution": {"pixels": 48},
    "batch": {"samples": (0, 1)},
    "guidance scale": {"guidance": "stronger"},
    "guidance passes": {"guidance": "passes"},
    "guidance off": {"guidance": "off"},
    "steps": {"num_steps": 10},
}


@pytest.mark.filterwarnings("ignore:SpeCa")
@pytest.mark.parametrize(
    ("slot", "setup"),
    [("flux", "taylor"), ("flux", "clusters"), ("sd3", "speca"), ("sd3", "first_block")],
)
def test_case_09_every_change_in_mid_session_is_like_a_fresh_run(slot, setup):
    other = "off" if slot == "flux" else "passes"  # what the host does not do
    changes = [c for name, c in CHANGES.items() if c.get("guidance") != other]
    pipe = build(slot)[slot]
    session = Predictors({}).attach(setup, slot, pipe)
    for change in [{}, *changes, {}, {}]:
        wanted = Call(slot, setup, **change)
        assert outcome(pipe, session, wanted) == on_a_new_pipeline(wanted), change
    session.detach()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("resolution", "sigma grid|latents"),
        ("guidance scale", "guidance_scale 5, this run has 7"),
        ("guidance off", r"2 guidance branch\(es\) per step, this run has 1"),
    ],
)
def test_case_09_a_learned_predictor_refuses_what_it_was_not_fitted_on(change, message):
    pipe, predictor = fitted("sd3", "l2p_hidden")
    predictor.spec = dataclasses.replace(predictor.spec, latent_shapes=((4, 4, 4),))
    with forecasting(pipe, predictor):
        expected = image(pipe, Call("sd3", None))
        with pytest.raises(PredictorMismatch, match=message):
            image(pipe, Call("sd3", None, **CHANGES[change]))
        assert torch.equal(image(pipe, Call("sd3", None)), expected)


def test_case_09_another_batch_in_mid_run_is_computed():
    pipe = bare_pipeline(pipeline("dit"))
    rows = [3, 3, 3, 2, 2, 1, 1, 1]
    pipe.scheduler.set_timesteps(len(rows))
    x_t, label = torch.randn(3, 1, 4, 4, generator=seeded()), torch.tensor([0, 1, 2])
    with forecasting(pipe, Taylor(1), ANCHORS, "hidden") as attached, torch.no_grad():
        pipe.scheduler.set_timesteps(len(rows))
        for count, timestep in zip(rows, pipe.scheduler.timesteps, strict=True):
            x_t = x_t[:count]
            v = pipe.transformer(x_t, timestep.expand(count), label[:count]).sample
            x_t = pipe.scheduler.step(v, timestep, x_t, return_dict=False)[0]
    assert attached.report().anchors == [0, 1, 3, 4, 5]  # 3 and 5 are the first of their size


def test_case_09_two_runs_in_a_row_are_two_new_processes():
    wanted = Call("flux", "taylor", samples=(0, 1))
    pipe = build("flux")["flux"]
    session = Predictors({}).attach("taylor", "flux", pipe)
    found = [outcome(pipe, session, wanted) for _ in range(2)]
    session.detach()
    assert found == [soak.in_a_new_interpreter(wanted, {})] * 2


# ----------------------------------------------------------------------------- 10: numbers' formats


@pytest.mark.parametrize(
    ("fitted_in", "run_in"), [("float16", "bfloat16"), ("bfloat16", "float32")]
)
def test_case_10_a_predictor_of_another_dtype_is_refused(fitted_in, run_in):
    family = cast(FAMILIES["flux"], getattr(torch, run_in))
    pipe = family.build()
    predictor = learned(family, pipe, dtype=fitted_in)  # of these weights, else those tell it first
    message = f"fitted on {fitted_in} features, this run makes {run_in}; load the pipeline in"
    with pytest.raises(PredictorMismatch, match=message), forecasting(pipe, predictor):
        call(family, pipe)


def test_case_10_weights_stored_in_float8_are_other_weights():
    family = FAMILIES["flux"]
    pipe = family.build()
    predictor = learned(family, pipe)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(PredictorMismatch, match="another host: weights"):
        attach(pipe, predictor)
    with forecasting(pipe, learned(family, pipe)):  # fitted on them, in the dtype that computes
        assert call(family, pipe).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_case_10_sums_run_in_float32(dtype):
    history = History(3)
    for index in range(3):
        step = Step(index, 1 - index / 8, 8)
        history.push(step, torch.randn(2, 4, 16, generator=seeded(index)).mul(1000).to(dtype))
    rule, step = Newton(2), Step(4, 0.5, 8)
    weights = rule.coefficients(history, step).tolist()
    wide = sum(w * f.float() for w, f in zip(weights, history.features, strict=True))
    assert torch.equal(rule(history, step), wide.to(dtype))


def float16_host(bias: float) -> Any:
    """A host whose output is near a number, in float16."""
    pipe = pipeline("dit").to(torch.float16)
    pipe.transformer.proj_out_2.bias.data.fill_(bias)
    return pipe


def test_case_10_float16_features_whose_sum_is_beyond_float16_are_finite():
    pipe = float16_host(4000.0)  # 32 of them sum to twice what float16 holds
    with forecasting(pipe, Reuse(), ANCHORS, "output"):
        assert run("dit", pipe).isfinite().all()


def test_case_10_a_forecast_that_leaves_float16_is_refused():
    pipe = float16_host(60000.0)

    class Doubling(Reuse):
        def coefficients(self, history, step):
            return 2 * super().coefficients(history, step)

    with forecasting(pipe, Doubling(), (0, 1), "output"):
        with pytest.raises(ValueError, match="a forecast left the range of float16, 65504"):
            run("dit", pipe)


# -------------------------------------------------------------------------------- 11: other weights


@pytest.mark.parametrize("change", [load, lambda pipe: (load(pipe), fuse(pipe))])
def test_case_11_a_lora_loaded_after_the_fit(change):
    family = FAMILIES["flux"]
    pipe = family.build()
    predictor = learned(family, pipe)
    with forecasting(pipe, predictor):
        call(family, pipe)
        change(pipe)
        with pytest.raises(PredictorMismatch, match="another host: (number of parameters|weights)"):
            call(family, pipe)
    with pytest.raises(PredictorMismatch, match="another host"):
        attach(pipe, predictor)


def test_case_11_fused_weights_that_differ():
    family = FAMILIES["flux"]
    pipe = family.build()
    load(pipe)
    predictor = learned(family, pipe)
    swap_weights(pipe)
    with pytest.raises(PredictorMismatch, match="weights .fine-tuned, or with a LoRA"):
        attach(pipe, predictor)


# --------------------------------------------------------------------------------------- 17: memory


@pytest.mark.parametrize(("window", "mib"), [(3, 72), (8, 192), (None, 312)])
def test_case_17_memory_of_flux_at_1024_pixels(window, mib):
    history = History(window)
    history.push(Step(0, 1.0, 50), torch.empty(1, 4096, 3072, dtype=torch.bfloat16, device="meta"))
    assert most_bytes(history, 12) == mib * 2**20  # 13 anchors


def test_case_17_memory_that_runs_out_in_a_proof_is_told_as_that(monkeypatch):
    pipe = build("flux")["flux"]
    session = Predictors({}).attach("clusters", "flux", pipe)

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(PartialTrunk, "__call__", no_memory)
    with pytest.raises(torch.OutOfMemoryError, match="9 GiB"):
        image(pipe, Call("flux", "clusters"))
    session.detach()


# ------------------------------------------------------------------------- 22: exceptions in a call


@pytest.mark.filterwarnings("ignore:SpeCa")
@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("kind", [*ABORTS, "interrupt"])
@pytest.mark.parametrize("setup", ["taylor", "speca", "clusters", "teacache"])
def test_case_22_after_an_exception_the_next_call_is_a_fresh_one(setup, kind, step):
    pipe = build("flux")["flux"]
    before = soak.footprint(pipe)
    session = Predictors({}).attach(setup, "flux", pipe)
    for again in (0, 1):  # in the first call, and in one of a host that is known
        try:
            outcome(pipe, session, Call("flux", setup, stop=(kind, step + again)))
        except tuple(ABORTS.values()):
            assert kind != "interrupt"
        modules = {type(module).__name__ for module in pipe.transformer.children()}
        assert not any("Blocks" in name for name in modules), modules
        assert soak.footprint(pipe)["transformer.norm_out"] == before["transformer.norm_out"]
        usual = Call("flux", setup)
        assert outcome(pipe, session, usual) == on_a_new_pipeline(usual)
    session.detach()
    assert outcome(pipe, None, Call("flux", None)) == on_a_new_pipeline(Call("flux", None))
    assert soak.footprint(pipe).keys() == before.keys()
