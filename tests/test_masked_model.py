"""The example's masked language model: exact tasks, a recipe that resumes, weights that decode."""

import pytest
import torch
import train_masked_model
from digit_tasks import BASE, EQUALS, MASK, PLUS, TASKS
from masked_model import HERE, Config, load_model
from safetensors.torch import load_file

from foreseer.integration.masked_sampler import Sampled, sample_masked

SMALL = Config(num_layers=1, width=16, num_heads=2, num_key_value_heads=1, mlp_width=16)


def numbers(prompt):
    """The digits of every number of a prompt."""
    inside = prompt[1:-1].tolist()
    if PLUS not in inside:
        return [inside]
    middle = inside.index(PLUS)
    return [inside[:middle], inside[middle + 1 :]]


def sums(digits):
    return [sum(digits[: i + 1]) % BASE for i in range(len(digits))]


def added(first, second):
    """Least significant digit first."""
    total = sum(BASE**i * (a + b) for i, (a, b) in enumerate(zip(first, second, strict=True)))
    return [total // BASE**i % BASE for i in range(len(first))]


ANSWERS = {
    "running_sums": sums,
    "addition": added,
    "reversal": lambda digits: digits[::-1],
    "sorting": sorted,
}


@pytest.mark.parametrize("task", TASKS)
def test_every_prompt_has_its_exact_answer(task):
    for length in (4, 12):
        made = TASKS[task](5, torch.Generator().manual_seed(0), length)
        for prompt, response in zip(made.prompts, made.responses, strict=True):
            assert prompt[-1] == EQUALS
            assert response.tolist() == ANSWERS[task](*numbers(prompt))


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train_masked_model, "SAVE_EVERY", 2)
    whole = train_masked_model.train(tmp_path / "whole", 5, SMALL)
    loss, calls = train_masked_model.masked_loss, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(train_masked_model, "masked_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_masked_model.train(tmp_path / "stopped", 5, SMALL)
    again = train_masked_model.train(tmp_path / "stopped", 5, SMALL)
    assert len(calls) == 4 + 3  # steps 2, 3 and 4
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    kept = load_file(tmp_path / "stopped" / "model.safetensors")
    assert {weight.dtype for weight in kept.values()} == {torch.bfloat16}
    assert load_model(tmp_path / "stopped").config == SMALL


def test_mask_rates_are_low_at_first_and_one_token_is_always_masked():
    stages = train_masked_model.STAGES
    assert [stage.highest for stage in stages] == [0.35, 0.35, 1.0]
    assert stages[1].until == 0.6
    seen = []

    def model(ids):
        seen.append((ids[:, -4:] == MASK).float())
        return type("Output", (), {"logits": torch.zeros(*ids.shape, 18)})

    generator = torch.Generator().manual_seed(0)
    train_masked_model.masked_loss(model, TASKS["sorting"](500, generator, 4), 0.01, generator)
    assert bool((seen[0].sum(1) == 1).float().mean() > 0.95)
    assert bool((seen[0].sum(1) >= 1).all())


def test_the_shipped_model_is_small_and_right_one_token_at_a_time_and_not_in_parallel():
    assert (HERE / "shipped" / "model.safetensors").stat().st_size < 3e6
    made = TASKS["running_sums"](32, torch.Generator().manual_seed(7 * 10**6))
    model = load_model()
    right = [
        int(
            (sample_masked(model, made.prompts, 12, steps).responses == made.responses).all(1).sum()
        )
        for steps in (12, 3)
    ]
    assert right[0] >= 31
    assert right[1] <= 4


def test_a_picture_shows_every_token_from_the_evaluation_that_committed_it():
    dllm = pytest.importorskip("dllm", reason="the wheel holds no benchmarks")
    found = Sampled(torch.tensor([[3, 1, 4]]), torch.tensor([[1, 0, 4]]))
    frames = dllm.filling(found, torch.tensor([3, 1, 5]), every=2)
    assert frames == [
        [("3", "new"), ("1", "new"), ("", "masked")],
        [("3", "right"), ("1", "right"), ("", "masked")],
        [("3", "right"), ("1", "right"), ("4", "wrong")],
    ]
