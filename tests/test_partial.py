"""Tokens computed alone are the full run's, correct the forecast only, and leave no trace."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    PixArtTransformer2DModel,
)
from tiny_hosts import (
    HOSTS,
    STEPS,
    adding_pipeline,
    bare_pipeline,
    pipeline,
    run,
    seeded,
    spec_for,
    tiny_dit,
    tiny_flux,
)
from torch import Tensor, nn

from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.integration.forecasting import attach, forecasting
from foreseer.integration.host.taps import capturing
from foreseer.integration.host.trunk import Trunk, TrunkTracer, UnsupportedHost
from foreseer.integration.token_runner import PartialTrunk
from foreseer.predictors.base import History
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.predictors.tokens import ClusterPolicy, RandomPolicy, take

ANCHORS = (0, 1, 4)
FORECASTS = [2, 3, 5, 6, 7]
every_host = pytest.mark.parametrize("host", HOSTS)


def tiny_pixart() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        caption_channels=12,
        norm_num_groups=1,
        use_additional_conditions=False,
    ).eval()


def transformer_call(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny transformer and the arguments of one call of it, two samples of 16 tokens."""
    g = seeded(5)
    timestep = torch.tensor([500, 500])
    if name == "dit":
        host: Any = tiny_dit()
        latents = torch.randn(2, 1, 8, 8, generator=g)
        return host, {
            "hidden_states": latents,
            "timestep": timestep,
            "class_labels": torch.tensor([0, 2]),
        }
    if name == "pixart":
        return tiny_pixart(), {
            "hidden_states": torch.randn(2, 4, 8, 8, generator=g),
            "encoder_hidden_states": torch.randn(2, 3, 12, generator=g),
            "timestep": timestep,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return tiny_flux(), {
        "hidden_states": torch.randn(2, 16, 16, generator=g),
        "encoder_hidden_states": torch.randn(2, 3, 12, generator=g),
        "pooled_projections": torch.randn(2, 12, generator=g),
        "timestep": timestep / 1000,
        "img_ids": ids,
        "txt_ids": torch.zeros(3, 3),
    }


class Oracle:
    """A transformer, one call of it, and what its attention and its head's input were."""

    def __init__(self, name: str) -> None:
        self.host, self.kwargs = transformer_call(name)
        with torch.no_grad(), TrunkTracer(self.host) as tracer:
            self.host(**self.kwargs)
        self.partial = PartialTrunk(self.host, tracer.trunk())
        with (
            torch.no_grad(),
            self.partial.capturing() as self.attention,
            capturing(self.host, tracer.trunk(), {"hidden"}) as found,
        ):
            self.output = self.host(**self.kwargs)[0]
        self.hidden = found["hidden"]

    def __call__(self, selected: Tensor, merge: Any) -> Tensor:
        given = lambda name, pick: pick(self.attention[name])  # noqa: E731 (read as a formula)
        with torch.no_grad():
            call = (self.host.forward, (), self.kwargs)
            return self.partial(*call, selected, given, merge)[0]


def modules_and_hooks(host: nn.Module) -> tuple:
    """Everything a partial step touches."""
    return (
        [(name, id(module)) for name, module in host.named_modules()],
        [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in host.modules()],
    )


# ------------------------------------------------------------------------- tokens computed alone


@pytest.mark.parametrize("name", ["dit", "pixart", "flux"])
def test_all_tokens_with_the_true_attention_are_the_full_run_bit_for_bit(name):
    oracle = Oracle(name)
    everything = torch.arange(16).repeat(2, 1)
    assert torch.equal(oracle(everything, lambda fresh: fresh), oracle.output)


@pytest.mark.parametrize("name", ["dit", "pixart", "flux"])
def test_half_of_the_tokens_come_out_as_in_the_full_run(name):
    oracle = Oracle(name)
    selected = torch.stack([torch.randperm(16, generator=seeded(i))[:8] for i in range(2)])
    seen = []

    def merge(fresh: Tensor) -> Tensor:
        seen.append(fresh)
        return oracle.hidden

    output = oracle(selected, merge)
    # float32 sums of another number of rows may be taken in another order
    torch.testing.assert_close(seen[0], take(oracle.hidden, selected), rtol=1e-4, atol=1e-5)
    assert torch.equal(output, oracle.output)  # the head saw what `merge` returned


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_the_given_attention_is_what_the_blocks_use(name):
    oracle = Oracle(name)
    everything = torch.arange(16).repeat(2, 1)
    for block in oracle.attention:
        kept = oracle.attention[block]
        oracle.attention[block] = kept + 0.1
        assert not torch.allclose(oracle(everything, lambda fresh: fresh), oracle.output)
        oracle.attention[block] = kept


@pytest.mark.parametrize("name", ["dit", "flux"])
@pytest.mark.parametrize("where", ["given", "merge"])
def test_an_exception_inside_leaves_the_host_as_it_was(name, where):
    oracle = Oracle(name)
    before = modules_and_hooks(oracle.host)

    def fail(*_: Any) -> Any:
        raise RuntimeError("stop")

    given = fail if where == "given" else lambda name, pick: pick(oracle.attention[name])
    with torch.no_grad(), pytest.raises(RuntimeError, match="stop"):
        selected = torch.tensor([[1, 5], [2, 3]])
        oracle.partial(oracle.host.forward, (), oracle.kwargs, selected, given, fail)
    assert modules_and_hooks(oracle.host) == before
    with torch.no_grad():
        assert torch.equal(oracle.host(**oracle.kwargs)[0], oracle.output)


# ------------------------------------------------------------------------------- what is refused


def test_an_unknown_block_is_refused_by_name():
    pipe = adding_pipeline()
    with forecasting(pipe, Reuse(), ANCHORS, tokens=RandomPolicy(2)):
        with pytest.raises(UnsupportedHost, match=r"transformer_blocks\.0 is a Adds.*forecasting"):
            run("dit", pipe)


def test_a_fused_stream_of_text_and_image_is_refused():
    torch.manual_seed(0)
    host = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=12,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
    )
    trunk = Trunk(("transformer_blocks", "single_transformer_blocks"), "norm_out")
    with pytest.raises(UnsupportedHost, match="Flux2TransformerBlock"):
        PartialTrunk(host, trunk)


def test_blocks_that_mix_tokens_outside_attention_are_refused():
    class Mixes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.mean(1, keepdim=True)

    pipe = pipeline("dit")
    pipe.transformer.transformer_blocks[1].ff = Mixes()
    with forecasting(pipe, Reuse(), ANCHORS, tokens=RandomPolicy(2)):
        with pytest.raises(UnsupportedHost, match="something besides self-attention mixes tokens"):
            run("dit", pipe)
    with forecasting(pipe, Reuse(), ANCHORS, "hidden"):  # what the message says to use
        run("dit", pipe)


def test_controlnet_residuals_are_refused():
    oracle = Oracle("flux")
    residuals = {"controlnet_block_samples": [torch.randn(2, 16, 16)]}
    with pytest.raises(UnsupportedHost, match="controlnet_block_samples"):
        oracle.partial.prove(oracle.host.forward, (), {**oracle.kwargs, **residuals})
    oracle.kwargs |= residuals
    with pytest.raises(UnsupportedHost, match="controlnet_block_samples"):
        oracle(torch.tensor([[0], [1]]), lambda fresh: fresh)


def test_attention_that_returns_more_than_the_table_says_is_refused():
    oracle = Oracle("flux")
    block = oracle.host.transformer_blocks[0]
    handle = block.attn.register_forward_hook(lambda m, a, out: (*out, torch.zeros_like(out[0])))
    with pytest.raises(UnsupportedHost, match="attention of block transformer_blocks.0 returned"):
        oracle.partial.prove(oracle.host.forward, (), oracle.kwargs)
    handle.remove()


def test_compiled_blocks_are_refused():
    host = tiny_dit()
    host.transformer_blocks[1].compile(backend="eager")
    trunk = Trunk(("transformer_blocks",), "norm_out")
    with pytest.raises(UnsupportedHost, match=r"transformer_blocks\.1 is compiled"):
        PartialTrunk(host, trunk)


def test_a_predictor_of_another_tap_is_refused():
    pipe = pipeline("dit_guided")
    predictor = L2P(STEPS, ANCHORS, 2)
    predictor.spec = spec_for(pipe, anchors=ANCHORS)  # of `output`
    with pytest.raises(PredictorMismatch, match="computed tokens need one fitted on 'hidden'"):
        attach(pipe, predictor, tokens=RandomPolicy(2))


def test_a_learned_attention_rule_is_refused():
    pipe = pipeline("dit_guided")
    rule = L2P(STEPS, ANCHORS, 2)
    with pytest.raises(ValueError, match="attention rule L2P is learned"):
        attach(pipe, Reuse(), ANCHORS, tokens=RandomPolicy(2), attention_rule=rule)


# ----------------------------------------------------------------------------------- whole runs


@every_host
def test_anchors_at_every_step_change_no_bit(host):
    pipe = pipeline(host)
    plain = run(host, pipe)
    with forecasting(pipe, Taylor(1), range(STEPS), tokens=ClusterPolicy(2)) as attached:
        assert torch.equal(run(host, pipe), plain)
    assert attached.report().anchors == list(range(STEPS))
    assert attached.report().partials == []


@every_host
def test_detaching_leaves_nothing_behind(host):
    pipe = pipeline(host)
    plain, before = run(host, pipe), modules_and_hooks(pipe.transformer)
    attached = attach(pipe, Taylor(1), ANCHORS, tokens=ClusterPolicy(2))
    run(host, pipe)
    attached.detach()
    assert modules_and_hooks(pipe.transformer) == before
    assert torch.equal(run(host, pipe), plain)
    assert "forward" not in pipe.transformer.__dict__


@every_host
def test_two_runs_of_one_attachment_are_equal(host):
    pipe = pipeline(host)
    with forecasting(pipe, Taylor(1), ANCHORS, tokens=ClusterPolicy(2)):
        assert torch.equal(run(host, pipe), run(host, pipe))


@every_host
def test_computed_tokens_change_the_forecast_and_never_the_histories(host):
    pipe = pipeline(host)
    seen: list[tuple] = []

    def attached_run(policy: Any) -> Tensor:
        with forecasting(pipe, Taylor(1), ANCHORS, tokens=policy) as attached:
            source, runner = attached.session.source, attached.session.runner
            inner = policy.merge

            def merge(*args: Any) -> Tensor:
                histories = [*source.histories, *runner.attention]
                kept = [f for history in histories for f in history.features]
                before = [feature.clone() for feature in kept]
                merged = inner(*args)
                assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
                seen.append((len(kept), next(iter(source.histories)).steps))
                return merged

            policy.merge = merge
            return run(host, pipe)

    partial = attached_run(ClusterPolicy(2, gamma=0.5))
    with forecasting(pipe, Taylor(1), ANCHORS, "hidden"):
        assert not torch.allclose(run(host, pipe), partial)
    assert seen and all(set(steps) <= set(ANCHORS) for _, steps in seen)


def test_even_offsets_of_the_alternating_pattern_are_pure_forecasts():
    pipe = pipeline("dit_guided")
    with forecasting(pipe, Taylor(1), ANCHORS, tokens=RandomPolicy(2)) as attached:
        run("dit_guided", pipe)
    report = attached.report()
    assert report.forecasts == FORECASTS
    assert report.partials == [2, 5, 7]
    assert len(report.partial_seconds) == 3 and len(report.seconds["forecast"]) == 2
    assert "tokens computed at: 2 5 7" in str(report)


def test_every_forecast_step_computes_tokens_with_clusters():
    pipe = pipeline("dit_guided")
    with forecasting(pipe, Taylor(1), ANCHORS, tokens=ClusterPolicy(2)) as attached:
        run("dit_guided", pipe)
    assert attached.report().partials == FORECASTS
    assert "tokens computed at: 2 3 5 6 7" in str(attached.report())


@pytest.mark.parametrize("host", ["dit_guided", "flux_two_calls"])
def test_both_guidance_branches_compute_the_same_tokens(host):
    pipe = pipeline(host)
    picks: dict[int, list[Tensor]] = {}
    with forecasting(pipe, Taylor(1), ANCHORS, tokens=ClusterPolicy(2)) as attached:
        select = attached.session.runner.select

        def spy(step: Any) -> Any:
            selected = select(step)
            assert len(selected) == 2 * len(step.branches)
            picks.setdefault(step.index, []).extend(selected.chunk(len(step.branches)))
            return selected

        attached.session.runner.select = spy
        run(host, pipe)
    assert list(picks) == FORECASTS
    assert all(len(halves) == 2 and torch.equal(*halves) for halves in picks.values())


def test_clusters_are_those_of_both_branches_side_by_side():
    pipe = pipeline("dit_guided")
    with forecasting(pipe, Taylor(1), ANCHORS, tokens=ClusterPolicy(2)) as attached:
        source, policy = attached.session.source, attached.session.runner.policy
        seen = []
        policy.observe = seen.append
        policy.is_partial = lambda offset: False
        kept = []
        source.finish = lambda report: kept.extend(source.histories)
        run("dit_guided", pipe)
    newest = kept[0].features[-1]
    assert len(seen) == len(ANCHORS)
    assert torch.equal(seen[-1], torch.cat(newest.chunk(2), -1))


def test_a_partial_step_is_what_the_parts_give_by_hand():
    oracle = Oracle("dit")
    pipe = bare_pipeline(
        SimpleNamespace(transformer=oracle.host, scheduler=FlowMatchEulerDiscreteScheduler())
    )
    policy, call = RandomPolicy(5, pattern=(True,)), dict(oracle.kwargs)
    with forecasting(pipe, Reuse(), (0,), tokens=policy), torch.no_grad():
        pipe.scheduler.set_timesteps(2)
        v = oracle.host(**call)[0]
        pipe.scheduler.step(v, pipe.scheduler.timesteps[0], call["hidden_states"])
        call["timestep"] = torch.tensor([200, 200])
        call["hidden_states"] = call["hidden_states"] * 0.9
        found = oracle.host(**call)[0]
        selected = policy.select(1)
    oracle.kwargs = call
    merge = lambda fresh: policy.merge(oracle.hidden, fresh, selected)  # noqa: E731
    assert torch.equal(found, oracle(selected, merge))


def test_the_attention_rule_forecasts_the_picked_rows():
    pipe = pipeline("dit")
    with forecasting(
        pipe, Reuse(), ANCHORS, tokens=RandomPolicy(2), attention_rule=Taylor(1)
    ) as attached:
        runner = attached.session.runner
        forecast, compared = runner.forecast_attention, []

        def spy(step: Any, block: str, pick: Any) -> Tensor:
            rows = forecast(step, block, pick)
            kept: History
            (kept,) = runner.attention.at(step)[block]
            torch.testing.assert_close(rows, pick(Taylor(1)(kept, step)))
            compared.append(len(kept))
            return rows

        runner.forecast_attention = spy
        run("dit", pipe)
    assert compared == [2] * 6  # two blocks at three steps, two anchors each


def test_attention_histories_count_as_state():
    pipe = pipeline("dit")
    anchor = 2 * 4 * 16 * 4  # bytes of a feature: 2 samples, 4 tokens, 16 channels, float32
    sizes = {}
    for rule in (Reuse(), Taylor(1)):
        with forecasting(
            pipe, Reuse(), ANCHORS, tokens=RandomPolicy(2), attention_rule=rule
        ) as attached:
            run("dit", pipe)
        sizes[type(rule)] = attached.report().state_bytes
    assert sizes[Reuse] == (1 + 2) * anchor  # the hidden tap and two attention outputs
    assert sizes[Taylor] == (1 + 2 * 2) * anchor


def test_a_learned_predictor_is_the_base_forecast():
    pipe = pipeline("dit_guided")
    predictor = L2P(STEPS, ANCHORS, 2)  # at its start, which is reuse
    predictor.spec = spec_for(pipe, anchors=ANCHORS, tap="hidden")
    with forecasting(pipe, predictor, tokens=ClusterPolicy(2)) as attached:
        learned = run("dit_guided", pipe)
    assert attached.report().anchors == list(ANCHORS)
    with forecasting(pipe, Reuse(), ANCHORS, tokens=ClusterPolicy(2)):
        assert torch.equal(learned, run("dit_guided", pipe))


def test_a_run_that_fails_halfway_leaves_no_trace():
    pipe = pipeline("dit_guided")
    plain = run("dit_guided", pipe)
    with forecasting(pipe, Taylor(1), ANCHORS, tokens=ClusterPolicy(2)) as attached:
        expected = run("dit_guided", pipe)
        before = modules_and_hooks(pipe.transformer)
        policy = attached.session.runner.policy
        policy.merge = lambda *_: (_ for _ in ()).throw(RuntimeError("stop"))
        with pytest.raises(RuntimeError, match="stop"):
            run("dit_guided", pipe)
        del policy.merge
        assert modules_and_hooks(pipe.transformer) == before
        assert torch.equal(run("dit_guided", pipe), expected)
    assert torch.equal(run("dit_guided", pipe), plain)
