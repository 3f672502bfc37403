"""Forecasting next to what people do to the weights: LoRA, compiling, offloading, casting."""

import dataclasses
import functools
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from families import FAMILIES, Family, call
from families.family import STEPS, seeded
from nightly import nightly
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from test_composition import ANCHORS, EVERY, ODD, Replay, check_replay, facts, replaying
from torch import Tensor

from foreseer.checkpoints.spec import PredictorMismatch, PredictorSpec
from foreseer.integration.forecasting import attach, forecasting
from foreseer.integration.host.clock import flow_sigmas
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.integration.host.hosts import transformers_of
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.integration.session import Session
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.trajectories.collector import Recorder

WEIGHTS = r"another host: (number of parameters|weights)"


def learned(family: Family, pipe: Any, dtype: str = "float32") -> L2P:
    """Rows that are no rule's, fitted (as it says) on this pipeline as it is now."""
    call(family, pipe)  # so that the scheduler has the run's sigmas
    predictor = L2P(STEPS, ANCHORS, family.branches)
    on_anchors = torch.zeros(STEPS)
    on_anchors[list(ANCHORS)] = 0.05
    noise = torch.randn(predictor.weight.shape, generator=seeded(3))
    predictor.weight += (noise * on_anchors).tril(-1)
    predictor.spec = PredictorSpec(
        tap="hidden",
        anchors=ANCHORS,
        sigmas=tuple(flow_sigmas(pipe.scheduler)),
        host=host_fingerprint(*transformers_of(pipe).values()),
        scheduler=type(pipe.scheduler).__name__,
        num_branches=family.branches,
        guidance_scale=getattr(pipe, "guidance_scale", None) or 1.0,
        dtype=dtype,
    )
    return predictor


# -------------------------------------------------------------------------------------------- LoRA


def lora(pipe: Any, name: str = "style", seed: int = 0) -> None:
    """Adds an adapter with random weights, none of them zero."""
    torch.manual_seed(seed)
    targets = ["to_q", "to_v"]
    config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name=name)


def lora_weights(host: str) -> dict[str, Tensor]:
    """The adapter's weights as users have them in a file."""
    pipe = FAMILIES[host].build()
    lora(pipe)
    found = get_peft_model_state_dict(pipe.transformer, adapter_name="style")
    return {f"transformer.{name}": value for name, value in found.items()}


def with_lora(host: str) -> Any:
    pipe = FAMILIES[host].build()
    pipe.load_lora_weights(lora_weights(host), adapter_name="style")
    return pipe


def load(pipe: Any) -> None:
    pipe.load_lora_weights(lora_weights("flux"), adapter_name="style")


def weaken(pipe: Any) -> None:
    pipe.set_adapters("style", 0.3)


def fuse(pipe: Any) -> None:
    pipe.fuse_lora(components=["transformer"], lora_scale=0.7)


def unload(pipe: Any) -> None:
    pipe.unload_lora_weights()


def disable(pipe: Any) -> None:
    pipe.disable_lora()


def another(pipe: Any) -> None:
    lora(pipe, "other", seed=1)
    pipe.set_adapters(["style", "other"], [1.0, 0.5])


def fuse_and_unload(pipe: Any) -> None:
    fuse(pipe)
    unload(pipe)


def load_fuse_and_unload(pipe: Any) -> None:
    load(pipe)
    fuse_and_unload(pipe)


def swap(pipe: Any) -> None:
    """Other weights into the adapter that is there, without a new one."""
    other = {name: 2 * value for name, value in lora_weights("flux").items()}
    pipe.load_lora_weights(other, adapter_name="style", hotswap=True)


CHANGES = [weaken, fuse, unload, disable, another, fuse_and_unload, swap]


@pytest.mark.parametrize("host", ["flux", "wan"])
def test_a_lora_loaded_before_attaching_is_part_of_the_host(host):
    family, pipe = FAMILIES[host], with_lora(host)
    plain = call(family, pipe)
    assert not torch.equal(plain, call(family, family.build()))
    check_replay(pipe, functools.partial(call, family, pipe), plain)


@pytest.mark.parametrize("change", [load, load_fuse_and_unload])
def test_a_lora_loaded_after_attaching_is_noticed(change):
    family, pipe = FAMILIES["flux"], FAMILIES["flux"].build()
    with forecasting(pipe, learned(family, pipe)):
        call(family, pipe)
        change(pipe)
        with pytest.raises(PredictorMismatch, match=WEIGHTS):
            call(family, pipe)


@pytest.mark.parametrize("change", CHANGES)
def test_a_lora_changed_after_attaching_is_noticed(change):
    family, pipe = FAMILIES["flux"], with_lora("flux")
    with forecasting(pipe, learned(family, pipe)):
        call(family, pipe)
        change(pipe)
        with pytest.raises(PredictorMismatch, match=WEIGHTS):
            call(family, pipe)


@pytest.mark.parametrize("change", CHANGES)
def test_a_lora_changed_before_attaching_is_noticed(change):
    family, pipe = FAMILIES["flux"], with_lora("flux")
    predictor = learned(family, pipe)
    change(pipe)
    with pytest.raises(PredictorMismatch, match=WEIGHTS):
        attach(pipe, predictor)


@pytest.mark.parametrize("host", ["flux", "wan"])
def test_a_predictor_fitted_with_the_lora_on_runs_on_it_and_on_nothing_else(host):
    family, pipe = FAMILIES[host], with_lora(host)
    predictor = learned(family, pipe)
    with forecasting(with_lora(host), predictor) as attached:
        call(family, attached.session.pipe)
        assert attached.report().anchors == list(ANCHORS)
    with pytest.raises(PredictorMismatch, match=WEIGHTS):
        attach(FAMILIES[host].build(), predictor)


def test_a_lora_that_is_taken_off_again_is_forgiven():
    family, pipe = FAMILIES["flux"], FAMILIES["flux"].build()
    with forecasting(pipe, learned(family, pipe)):
        expected = call(family, pipe)
        load(pipe)
        with pytest.raises(PredictorMismatch, match=WEIGHTS):
            call(family, pipe)
        unload(pipe)
        assert torch.equal(call(family, pipe), expected)


@pytest.mark.parametrize("change", [load, load_fuse_and_unload])
def test_a_rule_runs_on_a_lora_loaded_after_attaching(change):
    family, pipe = FAMILIES["flux"], FAMILIES["flux"].build()
    other = FAMILIES["flux"].build()
    change(other)
    plain = call(family, other)
    with forecasting(other, Taylor(1), ANCHORS, "hidden"):
        expected = call(family, other)
    with forecasting(pipe, Taylor(1), ANCHORS, "hidden"):
        call(family, pipe)
        change(pipe)
        assert torch.equal(call(family, pipe), expected)
    check_replay(pipe, functools.partial(call, family, pipe), plain)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_lora_is_replayed_exactly(change):
    family, pipe, other = FAMILIES["flux"], with_lora("flux"), with_lora("flux")
    change(other)
    plain = call(family, other)
    session = Session(pipe, Replay("hidden"))
    call(family, pipe)
    change(pipe)
    assert torch.equal(call(family, pipe), plain)
    session.source.replay()
    assert torch.equal(call(family, pipe), plain)
    assert session.report.forecasts == ODD
    session.detach()
    assert torch.equal(call(family, pipe), plain)


def test_weights_changed_in_place_after_attaching_are_noticed():
    family, pipe = FAMILIES["flux"], FAMILIES["flux"].build()
    with forecasting(pipe, learned(family, pipe)):
        call(family, pipe)
        pipe.transformer.proj_out.weight.data.mul_(1.1)
        with pytest.raises(PredictorMismatch, match=WEIGHTS):
            call(family, pipe)


# --------------------------------------------------------------------------------------- compiling


class Counting:
    """A backend of torch.compile that counts graphs and compiles nothing."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward

    @property
    def breaks(self) -> int:
        return sum(torch._dynamo.utils.counters["graph_break"].values())


@pytest.fixture
def counting():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield Counting()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly(["flux", "qwenimage", "wan"], ["flux", "wan"]))
@pytest.mark.parametrize("first", ["compile", "attach"])
def test_compiled_blocks_are_not_compiled_again(name, first, counting):
    family = FAMILIES[name]
    pipe = family.build()
    run = functools.partial(call, family, pipe)
    plain = run()
    other = family.build()
    other.transformer.compile_repeated_blocks(fullgraph=True, backend=counting)
    assert torch.equal(call(family, other), plain)
    alone, counting.graphs = counting.graphs, 0
    torch._dynamo.reset()

    def compiling():
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counting)
        assert torch.equal(run(), plain)

    if first == "compile":
        compiling()
    session = Session(pipe, Replay("hidden"))
    if first == "attach":
        run()
        compiling()
    assert torch.equal(run(), plain)
    session.source.replay()
    assert torch.equal(run(), plain)
    assert session.report.forecasts == ODD
    session.detach()
    assert torch.equal(run(), plain)
    for tap in ("output", "residual"):
        with forecasting(pipe, Taylor(1), ANCHORS, tap) as attached:
            run()
            assert attached.report().anchors == list(ANCHORS)
    assert counting.graphs == alone > 0
    assert counting.breaks == 0


@pytest.mark.slow
def test_recording_compiles_nothing_more(counting):
    family = FAMILIES["flux"]
    pipe = family.build()
    plain = call(family, pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counting)
    call(family, pipe)
    alone = counting.graphs
    session = Session(
        pipe, observers=[Recorder(("output", "hidden", "residual", "blocks.0", "blocks.3"))]
    )
    assert torch.equal(call(family, pipe), plain)
    session.detach()
    assert counting.graphs == alone > 0
    assert counting.breaks == 0


def test_a_learned_predictor_knows_its_weights_in_compiled_blocks(counting):
    family = FAMILIES["flux"]
    pipe = family.build()
    predictor = learned(family, pipe)
    with forecasting(pipe, predictor):
        expected = call(family, pipe)
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counting)
        assert torch.equal(call(family, pipe), expected)
    with forecasting(pipe, predictor):
        assert torch.equal(call(family, pipe), expected)


def wrap(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def in_place(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")


as_a_whole = pytest.mark.parametrize("compiling", [wrap, in_place])


@as_a_whole
def test_a_transformer_compiled_as_a_whole_is_refused(compiling):
    pipe = FAMILIES["flux"].build()
    transformer = pipe.transformer
    compiling(pipe)
    with pytest.raises(UnsupportedHost, match="compile_repeated_blocks"):
        attach(pipe, Reuse(), ANCHORS)
    assert "forward" not in vars(transformer)


@as_a_whole
def test_a_transformer_compiled_as_a_whole_after_attaching_is_refused_at_the_next_run(compiling):
    family = FAMILIES["flux"]
    pipe = family.build()
    with forecasting(pipe, Reuse(), ANCHORS, "hidden"):
        compiling(pipe)
        with pytest.raises(UnsupportedHost, match="compile_repeated_blocks"):
            call(family, pipe)


# --------------------------------------------------------------------------------------- offloading


def sequential(pipe: Any) -> None:
    for transformer in transformers_of(pipe).values():
        accelerate.cpu_offload(transformer, execution_device="cpu", offload_buffers=True)


def whole_models(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def groups(pipe: Any, kind: str) -> None:
    more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    for transformer in transformers_of(pipe).values():
        transformer.enable_group_offload(
            torch.device("cpu"), torch.device("cpu"), offload_type=kind, **more
        )


def blocks(pipe: Any) -> None:
    groups(pipe, "block_level")


def leaves(pipe: Any) -> None:
    groups(pipe, "leaf_level")


def take_off(pipe: Any, offload: Any) -> None:
    if offload in (sequential, whole_models):
        pipe.remove_all_hooks()
        return
    for transformer in transformers_of(pipe).values():
        for module in transformer.modules():
            for name in list(getattr(getattr(module, "_diffusers_hook", None), "hooks", {})):
                if name != "foreseer":
                    module._diffusers_hook.remove_hook(name, recurse=False)


every_offload = pytest.mark.parametrize("offload", [sequential, whole_models, blocks, leaves])
offloaded_hosts = pytest.mark.parametrize("name", ["flux", "wan"])


def check_runs(run: Any, session: Any, plain: Tensor) -> None:
    """Records a run and replays it twice."""
    session.source.record()
    assert torch.equal(run(), plain)
    assert session.report.forecasts == []
    session.source.replay()
    for _ in range(2):
        session.report.num_steps = 0
        assert torch.equal(run(), plain)
        assert session.report.num_steps == STEPS
        assert session.report.forecasts == ODD


@offloaded_hosts
@every_offload
def test_offloading_turned_on_before_attaching_changes_no_bit(name, offload):
    family = FAMILIES[name]
    pipe = family.build()
    run = functools.partial(call, family, pipe)
    plain = run()
    offload(pipe)
    assert torch.equal(run(), plain)
    session = Session(pipe, Replay("hidden"))
    check_runs(run, session, plain)
    session.detach()
    assert torch.equal(run(), plain)
    take_off(pipe, offload)
    assert torch.equal(run(), plain)


@offloaded_hosts
@every_offload
def test_offloading_turned_on_after_attaching_changes_no_bit(name, offload):
    family = FAMILIES[name]
    pipe = family.build()
    run = functools.partial(call, family, pipe)
    plain = run()
    session = Session(pipe, Replay("hidden"))
    check_runs(run, session, plain)
    offload(pipe)
    check_runs(run, session, plain)
    session.detach()
    assert torch.equal(run(), plain)
    take_off(pipe, offload)
    assert torch.equal(run(), plain)


@offloaded_hosts
@every_offload
@pytest.mark.parametrize("first", ["offload", "attach"])
def test_offloading_can_be_taken_off_before_detaching(name, offload, first):
    family = FAMILIES[name]
    pipe = family.build()
    run = functools.partial(call, family, pipe)
    plain, before = run(), facts(pipe)
    if first == "offload":
        offload(pipe)
    session = Session(pipe, Replay("hidden"))
    if first == "attach":
        offload(pipe)
    check_runs(run, session, plain)
    take_off(pipe, offload)
    check_runs(run, session, plain)
    session.detach()
    assert torch.equal(run(), plain)
    assert "foreseer" not in str(getattr(pipe.transformer, "_diffusers_hook", ""))
    assert before["scheduler"] == facts(pipe)["scheduler"]


@every_offload
@offloaded_hosts
def test_a_learned_predictor_knows_its_weights_when_they_are_offloaded(name, offload):
    family = FAMILIES[name]
    pipe = family.build()
    predictor = learned(family, pipe)
    with forecasting(pipe, predictor):
        expected = call(family, pipe)
    offload(pipe)
    assert host_fingerprint(*transformers_of(pipe).values()) == predictor.spec.host
    with forecasting(pipe, predictor) as attached:
        for _ in range(2):
            assert torch.equal(call(family, pipe), expected)
            assert attached.report().anchors == list(ANCHORS)


@pytest.mark.parametrize("offload", [blocks, leaves])
def test_a_lora_loaded_into_an_offloaded_host_is_forecast_and_replayed(offload):
    family, pipe, other = FAMILIES["flux"], FAMILIES["flux"].build(), with_lora("flux")
    plain = call(family, other)
    offload(pipe)
    session = Session(pipe, Replay("hidden"))
    call(family, pipe)
    load(pipe)  # diffusers takes its offloading off for this, and puts it on again
    check_runs(functools.partial(call, family, pipe), session, plain)
    session.detach()
    assert torch.equal(call(family, pipe), plain)


def test_an_offloaded_host_of_other_weights_is_noticed():
    family = FAMILIES["flux"]
    pipe = family.build()
    predictor = learned(family, pipe)
    pipe.transformer.x_embedder.weight.data.mul_(1.1)
    sequential(pipe)
    with pytest.raises(PredictorMismatch, match=WEIGHTS):
        attach(pipe, predictor)
    remove_hook_from_module(pipe.transformer, recurse=True)


# ----------------------------------------------------------------------------------- other numbers


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_weights_kept_in_float8_are_replayed_exactly(name, compute):
    family = cast(FAMILIES[name], compute)
    pipe = family.build()
    predictor = learned(family, pipe, dtype=str(compute).removeprefix("torch."))
    unequal = call(family, pipe)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute)
    run = functools.partial(call, family, pipe)
    plain = run()
    assert plain.isfinite().all() and not torch.equal(plain, unequal)
    check_replay(pipe, run, plain)
    with pytest.raises(PredictorMismatch, match=WEIGHTS):
        attach(pipe, predictor)
    tap = "float32" if name == "wan" else str(compute).removeprefix("torch.")
    with forecasting(pipe, learned(family, pipe, tap)) as attached:
        assert torch.equal(run(), run())
        assert attached.report().anchors == list(ANCHORS)
    assert torch.equal(run(), plain)


def cast(family: Family, dtype: torch.dtype) -> Family:
    """A family in another dtype: pipeline and prompts."""

    def inputs(seed: int) -> dict[str, Any]:
        found = family.inputs(seed)
        return {
            name: value.to(dtype)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in found.items()
        }

    return dataclasses.replace(family, build=lambda: family.build().to(dtype), inputs=inputs)


@pytest.mark.parametrize("tap", ["output", "hidden"])
@pytest.mark.parametrize("name", ["flux", "qwenimage", "sd3", "wan", "flux_controlnet"])
def test_a_bfloat16_run_is_replayed_exactly(name, tap):
    family = cast(EVERY[name], torch.bfloat16)
    pipe = family.build()
    run = functools.partial(call, family, pipe)
    plain = run()
    with replaying(pipe, run, tap) as session:
        assert torch.equal(run(), plain)
        assert session.report.forecasts == ODD
        kept = session.source.kept.parts.values()
        own = {feature.dtype for held in kept for feature in held.values()}
    # Wan's head is norm_out(hidden_states.float())
    assert own == {torch.float32 if (name, tap) == ("wan", "hidden") else torch.bfloat16}


@pytest.mark.parametrize("name", ["flux", "qwenimage"])
def test_a_predictor_fitted_in_float32_is_kept_off_a_bfloat16_run(name):
    family = cast(FAMILIES[name], torch.bfloat16)
    pipe = family.build()
    plain = call(family, pipe)
    predictor = learned(FAMILIES[name], FAMILIES[name].build())
    with pytest.raises(PredictorMismatch, match="fitted on float32 features, this run makes bf"):
        with forecasting(pipe, predictor):
            call(family, pipe)
    assert torch.equal(call(family, pipe), plain)
    with forecasting(pipe, learned(family, pipe, "bfloat16")) as attached:
        assert call(family, pipe).dtype == torch.bfloat16
        assert attached.report().anchors == list(ANCHORS)


def test_wan_in_bfloat16_is_forecast_in_float32():
    family = cast(FAMILIES["wan"], torch.bfloat16)
    pipe = family.build()
    with pytest.raises(PredictorMismatch, match="fitted on bfloat16 features, this run makes fl"):
        with forecasting(pipe, learned(family, pipe, "bfloat16")):
            call(family, pipe)
    with forecasting(pipe, learned(family, pipe, "float32")) as attached:
        call(family, pipe)
        assert attached.report().anchors == list(ANCHORS)
