"""Train the masked language model on one thread; the same command resumes.

    python examples/masked_language_model/train_masked_model.py --out runs/masked_model

Short numbers first, and mask rates up to .35 for the first 60 % of the run, then up to 1:
neighbours are learned first, what follows from few of them after that. Numbers of 24 digits from
the start stayed at chance for 150 steps, numbers of up to 8 left it within 150.
"""

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from digit_tasks import MASK, NUM_DIGITS, TASKS, Examples
from masked_model import Config, MaskedLanguageModel, config_text
from safetensors.torch import save_file
from torch import Tensor, nn

BATCH = 32
NUM_STEPS = 1100
LEARNING_RATE = 2e-3
WARMUP = 50
SAVE_EVERY = 100
ALL_TASKS = {"running_sums": 0.5, "addition": 0.24, "reversal": 0.13, "sorting": 0.13}


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Args:
        until: share of the run's steps at which it ends.
        lengths: shortest and longest number, in digits.
        tasks: share of each task.
        highest: highest mask rate.
    """

    until: float
    lengths: tuple[int, int]
    tasks: dict[str, float]
    highest: float


STAGES = (
    Stage(0.3, (4, 8), {"running_sums": 1.0}, 0.35),
    Stage(0.6, (8, NUM_DIGITS), {"running_sums": 1.0}, 0.35),
    Stage(1.0, (NUM_DIGITS, NUM_DIGITS), {"running_sums": 1.0}, 1.0),
)


def masked_loss(
    model: nn.Module, examples: Examples, highest: float, generator: torch.Generator
) -> Tensor:
    """Cross-entropy of the masked response tokens, every sequence with its own mask rate.

    Args:
        model: returns an object with `logits`.
        examples: a batch.
        highest: mask rates are uniform in (0, highest]; at least one token is masked.
        generator: of rates and masks.
    """
    count, length = examples.responses.shape
    rates = torch.rand(count, 1, generator=generator) * highest
    order = torch.rand(count, length, generator=generator)
    masked = (order < rates) | (order == order.amin(1, keepdim=True))
    shown = examples.responses.masked_fill(masked, MASK)
    logits = model(torch.cat([examples.prompts, shown], 1)).logits[:, -length:]
    return nn.functional.cross_entropy(logits[masked], examples.responses[masked])


def batch_at(step: int, num_steps: int) -> tuple[str, Examples, float, torch.Generator]:
    """Task, batch and highest mask rate of a step, and the generator that made them."""
    stage = next(stage for stage in STAGES if step < stage.until * num_steps)
    generator = torch.Generator().manual_seed(step)
    shares = torch.tensor(list(stage.tasks.values()))
    task = list(stage.tasks)[int(torch.multinomial(shares, 1, generator=generator))]
    shortest, longest = stage.lengths
    length = int(torch.randint(shortest, longest + 1, (), generator=generator))
    return task, TASKS[task](BATCH, generator, length), stage.highest, generator


def learning_rate_at(step: int, num_steps: int) -> float:
    """Share of the learning rate: a linear start, then half a cosine to a hundredth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = (step - WARMUP) / max(num_steps - WARMUP, 1)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def train(out: Path, num_steps: int = NUM_STEPS, config: Config | None = None) -> nn.Module:
    """Train, or go on from the last state in `out`, and write `model.safetensors` in bfloat16.

    Every step draws from a generator seeded by its number, so a resumed run is the run itself.

    Args:
        out: folder of the state and of the result.
        num_steps: optimiser steps.
        config: sizes; None for the shipped ones.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = MaskedLanguageModel(config or Config())
    optimiser = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    step = resume(out, model, optimiser)
    losses: dict[str, float] = {}
    began = time.process_time()
    while step < num_steps:
        task, examples, highest, generator = batch_at(step, num_steps)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_at(step, num_steps)
        loss = masked_loss(model, examples, highest, generator)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        losses[task] = loss.item() if task not in losses else 0.9 * losses[task] + 0.1 * loss.item()
        if step % 50 == 0:
            told = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
            print(f"{step:6d}  {time.process_time() - began:6.0f} s  {told}", flush=True)
        if step % SAVE_EVERY == 0 or step == num_steps:
            keep(out, model, optimiser, step)
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    save_file(weights, out / "model.safetensors")
    (out / "config.json").write_text(config_text(model.config))
    return model


def keep(out: Path, model: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
    """Write what resuming needs, whole or not at all."""
    state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
    torch.save(state, out / "state.pt.new")
    os.replace(out / "state.pt.new", out / "state.pt")


def resume(out: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Load the last state, if there is one, and return its step."""
    if not (out / "state.pt").exists():
        return 0
    state: dict[str, Any] = torch.load(out / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num_steps", type=int, default=NUM_STEPS)
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    train(arguments.out, arguments.num_steps)


if __name__ == "__main__":
    main()
