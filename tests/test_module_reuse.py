"""Rules on modules: EfficientVLA's interval and BAC's update steps are as they are defined."""

import itertools

import pytest
import torch

from foreseer.integration.module_reuse import (
    ModuleReuse,
    bubbled,
    drift,
    every,
    held_similarity,
    update_steps,
)

action_head = pytest.importorskip("action_head", reason="the wheel holds no examples")
STEPS = 10


def head_of_two_blocks():
    torch.manual_seed(0)
    head = action_head.ActionHead(width=32, depth=2, heads=2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return head.eval().requires_grad_(False)


def modules_of(head):
    return [f"blocks.{i}.{part}" for i in range(len(head.blocks)) for part in ("attention", "mlp")]


def inputs(samples=3):
    generator = torch.Generator().manual_seed(1)
    eps = torch.randn(samples, action_head.CHUNK, action_head.ACTION, generator=generator)
    seen = torch.randn(samples, action_head.OBSERVATION, generator=generator)
    return eps, seen, torch.arange(samples)


def sample(head, eps, seen, task, at=lambda step: None):
    x = eps
    for step in range(STEPS):
        at(step)
        x = x - head(x, torch.full((len(x),), 1 - step / STEPS), seen, task) / STEPS
    return x


def efficient_vla(head, eps, seen, task, interval):
    """EfficientVLA, section 3.3, on this head, written out."""
    x, kept = eps, {}
    for step in range(STEPS):
        condition = head.condition(torch.full((len(x),), 1 - step / STEPS), seen, task)
        h = head.embed(x) + head.place
        for number, block in enumerate(head.blocks):
            parts = block.modulation(condition)[:, None].chunk(6, dim=-1)
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
            if step % interval == 0:
                kept[number, "attention"] = block.attention(block.norm(h) * (1 + scale_a) + shift_a)
            h = h + gate_a * kept[number, "attention"]
            if step % interval == 0:
                kept[number, "mlp"] = block.mlp(block.norm(h) * (1 + scale_m) + shift_m)
            h = h + gate_m * kept[number, "mlp"]
        x = x - head.final(h, condition) / STEPS
    return x


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_an_interval_on_all_modules_is_efficient_vla(interval):
    head = head_of_two_blocks()
    steps = every(interval, STEPS)
    with ModuleReuse(head, dict.fromkeys(modules_of(head), steps)) as reuse:
        found = sample(head, *inputs(), reuse.at)
        assert reuse.computed == len(modules_of(head)) * len(steps)
    expected = efficient_vla(head, *inputs(), interval)
    assert (found - expected).abs().max() < 1e-6  # the same sums in the same order, in float32
    assert (found - sample(head, *inputs())).abs().max() < 1e-6 if interval == 1 else True
    assert "forward" not in vars(head.blocks[0].mlp)  # and nothing stays on the modules


def test_what_is_reused_is_of_this_run():
    head = head_of_two_blocks()
    with ModuleReuse(head, dict.fromkeys(modules_of(head), every(5, STEPS))) as reuse:
        first = sample(head, *inputs(), reuse.at)
        sample(head, *inputs(samples=2), reuse.at)
        assert torch.equal(sample(head, *inputs(), reuse.at), first)


@pytest.mark.parametrize(
    ("names", "steps", "said"),
    [
        (["blocks.7.mlp"], [0, 5], "has no module 'blocks.7.mlp'"),
        (["blocks.0.mlp"], [1, 5], "expected 0 among them"),
    ],
)
def test_a_module_that_is_not_there_or_not_begun_is_refused(names, steps, said):
    with pytest.raises(ValueError, match=said):
        ModuleReuse(head_of_two_blocks(), dict.fromkeys(names, steps))


def test_a_loop_that_does_not_say_where_it_is_is_refused():
    head = head_of_two_blocks()
    with ModuleReuse(head, {"blocks.0.mlp": [0, 5]}) as reuse:
        with pytest.raises(ValueError, match=r"before the loop said at\(0\)"):
            sample(head, *inputs())
        reuse.at(0)
        reuse.at(1)
        with pytest.raises(ValueError, match="step 1 follows 1"):
            reuse.at(1)
    with pytest.raises(ValueError, match="interval is 0"):
        every(0, STEPS)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_update_steps_are_the_best_of_all_lists(count, seed):
    generator = torch.Generator().manual_seed(seed)
    similarity = held_similarity(torch.randn(STEPS, 3, generator=generator).cumsum(0))

    def held(steps):
        ends = [*steps[1:], STEPS]
        pairs = zip(steps, ends, strict=True)
        return sum(float(similarity[i, k]) for i, j in pairs for k in range(i + 1, j))

    lists = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), count - 1)]
    found = update_steps(similarity, count)
    assert len(found) == count
    assert abs(held(found) - max(map(held, lists))) < 1e-12


def test_more_updates_than_steps_are_refused():
    with pytest.raises(ValueError, match="found 11 updates, expected 1 to the 10 steps"):
        update_steps(torch.eye(STEPS), 11)


def test_mlps_of_most_drift_are_computed_with_those_behind_them():
    steps = {"a.attention": [0, 2], "a.mlp": [0, 3], "b.mlp": [0, 5], "c.mlp": [0, 7]}
    drifts = {"a.mlp": 3.0, "b.mlp": 1.0, "c.mlp": 2.0}
    mlps = ["a.mlp", "b.mlp", "c.mlp"]
    assert bubbled(steps, drifts, mlps, top=1) == {**steps, "a.mlp": [0, 3, 5, 7]}
    assert bubbled(steps, drifts, mlps, top=0) == steps
    assert bubbled(steps, drifts, mlps, top=3) == {
        **steps,
        "a.mlp": [0, 3, 5, 7],
        "b.mlp": [0, 5, 7],
    }
    assert drift(torch.tensor([[0.0, 0.0], [1.0, 3.0]])) == pytest.approx(1.0)  # 2 of 4 pairs
