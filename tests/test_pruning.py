"""Pruned attention is DaTo's formulas, exact where nothing is pruned, and leaves no trace."""

import math
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from test_partial import modules_and_hooks, transformer_call
from tiny_hosts import HOSTS, STEPS, pipeline, run, seeded
from torch import Tensor, nn

from foreseer.integration.forecasting import attach, forecasting
from foreseer.integration.host.trunk import TrunkTracer, UnsupportedHost
from foreseer.integration.pruning_runner import AttentionCall
from foreseer.integration.token_runner import sites_of
from foreseer.predictors.pruning_policy import CHUNK, Choice, PruningPolicy
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.predictors.tokens import take

EVERY = range(STEPS)
every_host = pytest.mark.parametrize("host", HOSTS)


def policy_on(grid: tuple[int, int, int], batch: int = 2, **arguments: Any) -> PruningPolicy:
    """A policy that has met a run with this grid."""
    policy = PruningPolicy(**arguments)
    policy.prepare(None, [0], STEPS)
    policy.lay_out(grid)
    policy.observe(torch.zeros(batch, math.prod(grid), 1))
    return policy


def released(
    rows: Tensor, score: Tensor, ratio: float, grid: tuple[int, int], attend: Any
) -> tuple[Tensor, list[int]]:
    """DaTo's rule for one sample, token by token, and what it prunes."""
    height, width = grid
    unit = rows / rows.norm(dim=-1, keepdim=True)
    base = []
    for top in range(0, height, 2):
        for left in range(0, width, 2):
            patch = [
                y * width + x
                for y in range(top, min(top + 2, height))
                for x in range(left, min(left + 2, width))
            ]
            base.append(max(patch, key=lambda i: float(score[i])))
    others = [i for i in range(len(rows)) if i not in base]
    likeness = {i: max(float(unit[i] @ unit[j]) for j in base) for i in others}
    ranked = sorted(others, key=lambda i: -likeness[i])
    pruned = sorted(ranked[: int(ratio * len(rows))])
    kept = [i for i in range(len(rows)) if i not in pruned]
    fresh = attend(rows[kept])
    out = torch.empty(len(rows), fresh.shape[1])
    for place, i in enumerate(kept):
        out[i] = fresh[place]
    for i in pruned:
        out[i] = fresh[max(range(len(kept)), key=lambda n: float(unit[i] @ unit[kept[n]]))]
    return out, pruned


def attended(rows: Tensor) -> Tensor:
    """A self-attention without projections."""
    return nn.functional.scaled_dot_product_attention(rows, rows, rows)


# --------------------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 5)])
@pytest.mark.parametrize("ratio", [0.2, 0.4])
@pytest.mark.parametrize("seed", [0, 1])
def test_copying_is_the_release_token_by_token(grid, ratio, seed):
    policy = policy_on((1, *grid), ratios=ratio, seed=seed, dynamics=0.7)
    rows = torch.randn(2, grid[0] * grid[1], 8, generator=seeded(seed))
    older, newer = (torch.randn(2, rows.shape[1], 3, generator=seeded(5 + i)) for i in range(2))
    policy.look(older)
    policy.look(newer)
    choice = policy.choose(rows, 3)
    fresh = attended(take(rows, choice.kept))
    found = policy.recover(None, fresh, choice, (0,), 3)
    scores = policy.scores(3)
    eps = torch.randn(
        2, rows.shape[1], generator=torch.Generator().manual_seed(100_003 * seed + 3), dtype=float
    )
    moved = (newer.double() - older.double()).abs().mean(-1)
    torch.testing.assert_close(scores, 0.7 * moved + 0.1 * eps)
    for sample in range(2):
        expected, pruned = released(rows[sample], scores[sample], ratio, grid, attended)
        assert choice.pruned[sample].tolist() == pruned
        torch.testing.assert_close(found[sample], expected, rtol=1e-6, atol=1e-6)


def test_learned_recovery_is_its_equation_and_past_zero_gain_one_is_the_copy():
    policy = policy_on((1, 4, 4), ratios=0.4)
    rows = torch.randn(4, 16, 8, generator=seeded(1))
    choice = policy.choose(rows[:2], 1).repeat(2)
    own = torch.randn(4, 16, 8, generator=seeded(2))
    fresh = attended(take(rows, choice.kept))
    copied = policy.recover(None, fresh, choice, (0, 1), 1)
    assert torch.equal(policy.recover(own, fresh, choice, (0, 1), 1), copied)
    assert torch.equal(take(copied, choice.pruned), take(fresh, choice.partner))
    pairs = torch.rand(2, STEPS, 2, generator=seeded(3), dtype=torch.float64)
    policy.innovation.pairs = pairs
    found = policy.recover(own, fresh, choice, (0, 1), 5)
    for row in range(4):
        past, gain = pairs[row // 2, 5].float()
        for place, i in enumerate(choice.pruned[row].tolist()):
            n = choice.partner[row, place]
            speaker = choice.kept[row, n]
            expected = past * own[row, i] + gain * (fresh[row, n] - past * own[row, speaker])
            torch.testing.assert_close(found[row, i], expected)
    assert torch.equal(take(found, choice.kept), fresh)  # by scatter, to the bit


def test_more_dynamic_tokens_are_base_tokens_and_chance_only_breaks_ties():
    policy = policy_on((1, 4, 4), batch=1, dynamics=1.0, noise=0.0)
    policy.look(torch.zeros(1, 16, 3))
    policy.look(torch.arange(16.0).view(1, 16, 1).expand(1, 16, 3))
    assert policy.base(2)[0].tolist() == [5, 7, 13, 15]  # lower right of every patch


def test_cosines_come_in_chunks(monkeypatch):
    rows = torch.randn(2, 64, 4, generator=seeded(0))
    whole = policy_on((1, 8, 8)).choose(rows, 1)
    monkeypatch.setattr("foreseer.predictors.pruning_policy.CHUNK", 40)
    parts = policy_on((1, 8, 8)).choose(rows, 1)
    for name in ("kept", "pruned", "partner"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    assert CHUNK < 4096**2 // 4


# ------------------------------------------------------------------------------------ the hosts


@pytest.mark.parametrize("name", ["dit", "pixart", "flux"])
def test_all_tokens_kept_is_the_attention_to_the_bit_and_some_are_those_rows(name):
    """Every attention of a call, asked on all tokens in order, and on other tokens by row."""
    host, kwargs = transformer_call(name)
    with torch.no_grad(), TrunkTracer(host) as tracer:
        host(**kwargs)
    asked = []
    for site_name, site in sites_of(host, tracer.trunk()).items():

        def look(module, args, given, output, name=site_name, layout=site.layout):
            call = AttentionCall(name, module.__dict__["whole"], layout, args, given, 16)
            everyone = torch.arange(16).repeat(2, 1)
            text, stream = call(everyone)
            again = call.output(text, stream)
            for own, other in zip(
                *(x if isinstance(x, tuple) else (x,) for x in (output, again)), strict=True
            ):
                assert torch.equal(own, other)
            kept = torch.tensor([[0, 3, 9], [1, 2, 15]])
            each = [call_of_row(call, row, kept[row : row + 1]) for row in range(2)]
            torch.testing.assert_close(call(kept)[1], torch.cat(each), rtol=1e-5, atol=1e-6)
            asked.append(name)

        plain = _Plain(site.attention)
        site.block._modules[site.attribute] = plain
        plain.register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        host(**kwargs)
    assert len(asked) == len(sites_of(host, tracer.trunk()))


class _Plain(nn.Module):
    """A wrapper around an attention, as adapters put there."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.__dict__["whole"] = whole

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.whole(*args, **kwargs)


def call_of_row(call: AttentionCall, row: int, kept: Tensor) -> Tensor:
    """The kept tokens of one row of a call, asked alone."""
    one = AttentionCall(
        call.name,
        call.attention,
        call.layout,
        (),
        {
            "hidden_states": call.joined[row : row + 1],
            **{
                key: value[row : row + 1]
                if key == "encoder_hidden_states" and value is not None
                else value
                for key, value in call.rest.items()
            },
        },
        call.stream.shape[1],
    )
    return one(kept)[1]


@every_host
def test_ratio_zero_changes_no_bit(host):
    pipe = pipeline(host)
    plain = run(host, pipe)
    for policy in (PruningPolicy(0.0), PruningPolicy([0.0] * STEPS, past=1.0)):
        with forecasting(pipe, Reuse(), EVERY, tokens=policy) as attached:
            assert torch.equal(run(host, pipe), plain)
    assert attached.report().anchors == list(EVERY)


@every_host
def test_pruned_runs_differ_repeat_and_leave_nothing_behind(host):
    pipe = pipeline(host)
    plain, before = run(host, pipe), modules_and_hooks(pipe.transformer)
    attached = attach(pipe, Reuse(), EVERY, tokens=PruningPolicy(0.5))
    pruned = run(host, pipe)
    assert torch.equal(run(host, pipe), pruned)
    attached.detach()
    assert modules_and_hooks(pipe.transformer) == before
    assert torch.equal(run(host, pipe), plain)
    assert not torch.equal(pruned, plain)


@pytest.mark.parametrize("host", ["dit_guided", "flux_two_calls"])
def test_both_guidance_branches_keep_the_same_tokens(host):
    pipe = pipeline(host)
    seen: dict[tuple[int, str], list[Choice]] = {}
    with forecasting(pipe, Reuse(), EVERY, tokens=PruningPolicy(0.5)) as attached:
        runner = attached.session.runner
        recover = runner.recover

        def spy(step, call, own, fresh, choice):
            parts = [
                Choice(*parts)
                for parts in zip(
                    *(
                        each.chunk(len(step.branches))
                        for each in (choice.kept, choice.pruned, choice.partner)
                    ),
                    strict=True,
                )
            ]
            seen.setdefault((step.index, call.name), []).extend(parts)
            return recover(step, call, own, fresh, choice)

        runner.recover = spy
        run(host, pipe)
    assert {step for step, _ in seen} == set(range(1, STEPS))  # the first runs in full
    for first, second in seen.values():
        assert torch.equal(first.kept, second.kept) and torch.equal(first.partner, second.partner)


def test_a_pruned_step_is_what_the_formulas_give_by_hand():
    """The second block of a DiT, whose attention is asked about by hand in mid-run."""
    pipe = pipeline("dit")
    checked = []
    policy = PruningPolicy(0.5, past=0.9, gain=0.6)
    with forecasting(pipe, Reuse(), EVERY, tokens=policy) as attached:
        runner = attached.session.runner
        recover = runner.recover
        last: dict[str, Tensor] = {}

        def spy(step, call, own, fresh, choice):
            found = recover(step, call, own, fresh, choice)
            kept = take(call.stream, choice.kept)
            assert torch.equal(fresh, call.attention(kept))
            if call.name in last:
                assert torch.equal(own, last[call.name])  # reuse of what was recovered
            near, mine = take(fresh, choice.partner), take(own, choice.pruned)
            theirs = take(own, choice.kept.gather(1, choice.partner))
            expected = 0.9 * mine + 0.6 * (near - 0.9 * theirs)
            torch.testing.assert_close(take(found, choice.pruned), expected)
            last[call.name] = found
            checked.append(call.name)
            return found

        runner.recover = spy
        run("dit", pipe)
    assert len(checked) == 2 * (STEPS - 1)


def test_forecasts_between_pruned_anchors_are_the_predictors():
    pipe = pipeline("dit_guided")
    with forecasting(pipe, Taylor(1), (0, 1, 4), tokens=PruningPolicy(0.5)) as attached:
        pruned = run("dit_guided", pipe)
    assert attached.report().anchors == [0, 1, 4] and attached.report().partials == []
    with forecasting(pipe, Taylor(1), (0, 1, 4), "hidden"):
        assert not torch.equal(run("dit_guided", pipe), pruned)


def test_one_choice_for_all_blocks_is_the_first_blocks():
    pipe = pipeline("flux")
    policy = PruningPolicy(0.5, every_block=False)
    with forecasting(pipe, Reuse(), EVERY, tokens=policy) as attached:
        chosen = []
        choose = policy.choose
        policy.choose = lambda rows, index: chosen.append(index) or choose(rows, index)
        run("flux", pipe)
    assert chosen == list(range(1, STEPS)) and attached.report().anchors == list(EVERY)


def test_odd_grids_and_another_grid_in_the_next_run_are_taken_as_they_come():
    pipe = pipeline("flux")
    with forecasting(pipe, Reuse(), EVERY, tokens=PruningPolicy(0.3)):
        for height, width in ((48, 80), (32, 32), (80, 48)):
            alone = run("flux", pipe, height=height, width=width)
            assert torch.equal(run("flux", pipe, height=height, width=width), alone)


def test_a_batch_of_one_is_pruned_as_in_a_batch_of_two():
    """The noise of a sample goes by its place, so only the first sample can be compared."""
    pipe = pipeline("dit")
    policy = PruningPolicy(0.5, noise=0.0, dynamics=1.0)
    noise = torch.randn(2, 1, 4, 4, generator=seeded(3))
    with forecasting(pipe, Reuse(), EVERY, tokens=policy):
        both = run("dit", pipe, latents=noise)
        one = run("dit", pipe, latents=noise[:1], class_labels=[0])
    torch.testing.assert_close(one, both[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.fault
def test_adapters_inside_an_attention_and_around_it_are_run_on_the_kept_tokens():
    class Low(nn.Module):
        """A LoRA: what was there, plus a product of rank one."""

        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner
            self.down = nn.Linear(inner.in_features, 1, bias=False)
            self.up = nn.Linear(1, inner.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.up(self.down(x))

    pipe = pipeline("dit_guided")
    block = pipe.transformer.transformer_blocks[0]
    with forecasting(pipe, Reuse(), EVERY, tokens=PruningPolicy(0.5)):
        bare = run("dit_guided", pipe)
    block.attn1.to_q = Low(block.attn1.to_q)
    around = block.attn1 = _Plain(block.attn1)
    with forecasting(pipe, Reuse(), EVERY, tokens=PruningPolicy(0.5)):
        assert not torch.equal(run("dit_guided", pipe), bare)
    assert block.attn1 is around


@pytest.mark.fault
def test_controlnet_residuals_go_on_being_added_to_all_tokens():
    """The stream between blocks is whole, unlike at a partial step."""
    pipe = pipeline("flux")
    forward = FluxTransformer2DModel.forward
    residual = torch.randn(2, 4, 16, generator=seeded(4))

    def with_residuals(self, *args, **kwargs):
        return forward(self, *args, controlnet_block_samples=[residual], **kwargs)

    with forecasting(pipe, Reuse(), EVERY, tokens=PruningPolicy(0.5)):
        bare = run("flux", pipe)
    pipe.transformer.__class__ = type(
        "Controlled", (FluxTransformer2DModel,), {"forward": with_residuals}
    )
    plain = run("flux", pipe)
    with forecasting(pipe, Reuse(), EVERY, tokens=PruningPolicy(0.0)):
        assert torch.equal(run("flux", pipe), plain)
    with forecasting(pipe, Reuse(), EVERY, tokens=PruningPolicy(0.5)):
        assert not torch.equal(run("flux", pipe), bare)


@pytest.mark.fault
def test_hosts_whose_attention_cannot_be_cut_are_refused_and_left_as_they_were():
    pipe = pipeline("dit")
    block = pipe.transformer.transformer_blocks[1]
    block.compile(backend="eager")
    with forecasting(pipe, Reuse(), EVERY, tokens=PruningPolicy(0.5)):
        with pytest.raises(UnsupportedHost, match=r"transformer_blocks\.1 is compiled"):
            run("dit", pipe)

    class Ordered(nn.Module):
        """An attention that goes by the place of a token."""

        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return x.cumsum(1)

    pipe = pipeline("dit")
    block, before = pipe.transformer.transformer_blocks[1], None
    block.attn1 = Ordered()
    before = modules_and_hooks(pipe.transformer)
    with forecasting(pipe, Reuse(), EVERY, tokens=PruningPolicy(0.5)):
        with pytest.raises(UnsupportedHost, match="differ by up to"):
            run("dit", pipe)
    assert modules_and_hooks(pipe.transformer) == before

    pipe = pipeline("flux")
    pipe.transformer.transformer_blocks[0].attn.register_forward_hook(
        lambda module, args, out: (*out, torch.zeros_like(out[0]))
    )
    with forecasting(pipe, Reuse(), EVERY, tokens=PruningPolicy(0.5)):
        with pytest.raises(UnsupportedHost, match="transformer_blocks.0 returned tuple, expected"):
            run("flux", pipe)


@pytest.mark.fault
def test_an_exception_in_mid_run_leaves_the_host_as_it_was():
    pipe = pipeline("flux")
    plain, before = run("flux", pipe), modules_and_hooks(pipe.transformer)
    attached = attach(pipe, Reuse(), EVERY, tokens=PruningPolicy(0.5))
    during = modules_and_hooks(pipe.transformer)
    attached.session.runner.recover = lambda *_: (_ for _ in ()).throw(RuntimeError("stop"))
    with pytest.raises(RuntimeError, match="stop"):
        run("flux", pipe)
    assert modules_and_hooks(pipe.transformer) == during
    attached.detach()
    assert modules_and_hooks(pipe.transformer) == before
    assert torch.equal(run("flux", pipe), plain)


@pytest.mark.fault
def test_ratios_that_no_run_can_have_are_refused():
    for wrong in (-0.1, 0.8, 1.0, math.nan, [0.0, 1.0], []):
        with pytest.raises(ValueError, match=r"expected numbers in \[0, 0.75\]"):
            PruningPolicy(wrong)
    with pytest.raises(ValueError, match="the ratio of step 0 is 0.3, expected 0"):
        PruningPolicy([0.3, 0.3])
    with pytest.raises(ValueError, match="expected finite numbers"):
        PruningPolicy(past=math.inf)
    with pytest.raises(ValueError, match="dynamics -1.0"):
        PruningPolicy(dynamics=-1.0)
    pipe = pipeline("dit")
    with forecasting(pipe, Reuse(), EVERY, tokens=PruningPolicy([0.0, 0.4])):
        with pytest.raises(ValueError, match="2 ratios for a run of 8 steps"):
            run("dit", pipe)
    pipe = pipeline("flux")
    with forecasting(pipe, Reuse(), EVERY, tokens=PruningPolicy(0.7)):
        with pytest.raises(ValueError, match=r"on the grid \(1, 3, 3\).*4 are the best"):
            run("flux", pipe, height=48, width=48)


def test_every_ratio_of_a_vector_is_used():
    pipe = pipeline("dit")
    ratios = [0.0, 0.25, 0.5, 0.75, 0.0, 0.0, 0.0, 0.5]
    counts = {}
    with forecasting(pipe, Reuse(), EVERY, tokens=PruningPolicy(ratios)) as attached:
        runner = attached.session.runner
        recover = runner.recover

        def spy(step, call, own, fresh, choice):
            counts[step.index] = choice.pruned.shape[1]
            return recover(step, call, own, fresh, choice)

        runner.recover = spy
        run("dit", pipe)
    assert counts == {1: 1, 2: 2, 3: 3, 7: 2}
