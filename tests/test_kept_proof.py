"""A proof holds from one attachment to the next while the transformer stays as it was."""

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from tiny_hosts import items, pipeline, run, settings

from foreseer.evaluation.measure import generate
from foreseer.integration.forecasting import forecasting
from foreseer.integration.host.proof import facts_of
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.predictors.tokens import RandomPolicy
from foreseer.schedules import FirstBlock, SpeCa, TeaCache

HOST = "dit_guided"
ANCHORS = [0, 3]


def evaluations(pipe: Any, **attaching: Any) -> int:
    """How often the last block runs while a picture is drawn."""
    counted = []
    handle = pipe.transformer.transformer_blocks[-1].norm3.register_forward_hook(counter(counted))
    given = {"predictor": Reuse(), "anchors": ANCHORS, "tap": "hidden"} | attaching
    try:
        with warnings.catch_warnings(), forecasting(pipe, **given):
            warnings.simplefilter("ignore")
            run(HOST, pipe)
    finally:
        handle.remove()
    return len(counted)


COUNTERS: dict[int, Any] = {}


def counter(counted: list) -> Any:
    """One function for a pipeline's whole test: another hook would be another transformer."""
    COUNTERS["list"] = counted
    return count


def count(module: Any, args: Any, output: Any) -> None:
    COUNTERS["list"].append(1)


@pytest.mark.parametrize(
    ("tap", "schedule", "proving"),
    [
        ("hidden", None, 2),
        ("residual", None, 2),
        ("hidden", FirstBlock(1e9), 3),
        ("hidden", TeaCache(1e9), 3),
        ("hidden", SpeCa(1e9), 4),
    ],
)
def test_another_attachment_costs_its_anchors_alone(tap, schedule, proving):
    pipe = pipeline(HOST)
    first = evaluations(pipe, tap=tap, schedule=schedule)
    later = [evaluations(pipe, tap=tap, schedule=schedule) for _ in range(2)]
    assert later[0] == later[1] and first - later[0] == proving
    if schedule is None:
        assert later[0] == len(ANCHORS)


def test_measuring_a_batch_costs_its_anchors_alone():
    pipe, counted = pipeline(HOST), []
    pipe.transformer.transformer_blocks[-1].norm3.register_forward_hook(counter(counted))
    for _ in range(2):
        counted.clear()
        generate(pipe, Reuse(), "hidden", items(HOST, 2), ANCHORS, **settings(HOST))
    assert len(counted) == len(ANCHORS)


def replaced(pipe: Any) -> None:
    blocks = pipe.transformer.transformer_blocks
    blocks[0] = copy.deepcopy(blocks[0])


def hooked(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda module, args, output: None)


def patched(pipe: Any) -> None:
    block = pipe.transformer.transformer_blocks[0]
    inner = block.forward
    block.forward = lambda *args, **kwargs: inner(*args, **kwargs)


def another_processor(pipe: Any) -> None:
    attention = pipe.transformer.transformer_blocks[0].attn1
    attention.set_processor(type(attention.processor)())


def cast(pipe: Any) -> None:
    pipe.to(torch.bfloat16)


@pytest.mark.parametrize("change", [replaced, hooked, patched, another_processor, cast])
def test_what_is_changed_is_proven_anew(change):
    pipe = pipeline(HOST)
    before = evaluations(pipe)
    assert evaluations(pipe) == len(ANCHORS) == before - 2
    change(pipe)
    assert evaluations(pipe) == before  # proven again
    assert evaluations(pipe) == len(ANCHORS)


def test_a_call_of_another_form_is_proven_anew():
    pipe = pipeline(HOST)
    evaluations(pipe)
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluations(pipe) == len(ANCHORS) + 2
    assert evaluations(pipe) == len(ANCHORS)
    assert evaluations(pipe, tap="residual") == len(ANCHORS) + 2


def test_a_host_that_is_no_longer_exact_is_refused():
    pipe = pipeline(HOST)
    evaluations(pipe)
    drawn = iter(range(100))

    def drifting(module, args, output):  # as of a cache that somebody hangs on a block
        return output + next(drawn)

    handle = pipe.transformer.norm_out.register_forward_hook(drifting)
    with pytest.raises(UnsupportedHost, match="changes its output"):
        evaluations(pipe)
    handle.remove()
    assert evaluations(pipe) == len(ANCHORS) + 2


def test_tokens_are_proven_once():
    pipe, counted = pipeline(HOST), []
    pipe.transformer.transformer_blocks[-1].norm3.register_forward_hook(counter(counted))
    costs = []
    for _ in range(3):
        counted.clear()
        with forecasting(pipe, Taylor(1), ANCHORS, tokens=RandomPolicy(4)):
            run(HOST, pipe)
        costs.append(len(counted))
    assert costs[0] > costs[1] == costs[2]


def test_pictures_are_the_same_with_a_kept_proof_and_no_transformer_is_kept_alive():
    fresh, pipe = pipeline(HOST), pipeline(HOST)
    pictures: list[torch.Tensor] = []
    for each in (pipe, fresh, pipe):
        with forecasting(each, Taylor(1), ANCHORS, "hidden"):
            pictures.append(run(HOST, each))
    assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[1], pictures[2])
    facts = weakref.ref(facts_of(pipe.transformer))
    assert facts().proven
    twin = copy.deepcopy(pipe.transformer)
    assert not facts_of(twin).proven  # a copy is another transformer
    del pipe, each
    gc.collect()
    assert facts() is None
