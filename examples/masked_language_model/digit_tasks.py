"""Prompts with one exact answer, made on the fly: what the masked language model is trained on.

A prompt is `[task] digits [=]`, for addition `[task] digits [+] digits [=]`; the response has as
many digits. Shapes: B prompts, P prompt tokens, G response tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

BASE = 10
NUM_DIGITS = 12  # at most
SUM, REVERSE, SORT, ADD, PLUS, EQUALS, PAD, MASK = range(BASE, BASE + 8)
VOCABULARY = "0123456789ΣRSA+=_."
"""A sign for each token id: ten digits, four tasks, plus, equals, padding, mask."""


@dataclass(frozen=True)
class Examples:
    """Prompts and their only right responses."""

    prompts: Int[Tensor, "B P"]
    responses: Int[Tensor, "B G"]

    @property
    def sequences(self) -> Int[Tensor, "B N"]:
        """Prompt and response in one row."""
        return torch.cat([self.prompts, self.responses], 1)


def running_sums(count: int, generator: torch.Generator, length: int = NUM_DIGITS) -> Examples:
    """r_i = r_{i-1} + p_i modulo 10: no digit is known before its neighbour is."""
    digits = _digits(count, generator, length)
    return Examples(_prompt(SUM, digits), digits.cumsum(1) % BASE)


def reversal(count: int, generator: torch.Generator, length: int = NUM_DIGITS) -> Examples:
    """r_i = p_{G+1-i}."""
    digits = _digits(count, generator, length)
    return Examples(_prompt(REVERSE, digits), digits.flip(1))


def sorting(count: int, generator: torch.Generator, length: int = NUM_DIGITS) -> Examples:
    """The prompt's digits in rising order."""
    digits = _digits(count, generator, length)
    return Examples(_prompt(SORT, digits), digits.sort(1).values)


def addition(count: int, generator: torch.Generator, length: int = NUM_DIGITS) -> Examples:
    """The sum of two numbers, least significant digit first, the last carry dropped."""
    first, second = _digits(count, generator, length), _digits(count, generator, length)
    total, carry = [], torch.zeros(count, dtype=torch.long)
    for i in range(length):
        here = first[:, i] + second[:, i] + carry
        total.append(here % BASE)
        carry = here // BASE
    return Examples(_prompt(ADD, first, second), torch.stack(total, 1))


TASKS: dict[str, Callable[..., Examples]] = {
    "running_sums": running_sums,
    "addition": addition,
    "reversal": reversal,
    "sorting": sorting,
}


def written(ids: Int[Tensor, " N"]) -> str:
    """The signs of a row of tokens."""
    return "".join(VOCABULARY[i] for i in ids.tolist())


def _digits(count: int, generator: torch.Generator, length: int) -> Int[Tensor, "B G"]:
    return torch.randint(BASE, (count, length), generator=generator)


def _prompt(task: int, *numbers: Int[Tensor, "B G"]) -> Int[Tensor, "B P"]:
    count = len(numbers[0])
    columns = [torch.full((count, 1), task), numbers[0]]
    for number in numbers[1:]:
        columns += [torch.full((count, 1), PLUS), number]
    return torch.cat([*columns, torch.full((count, 1), EQUALS)], 1)
