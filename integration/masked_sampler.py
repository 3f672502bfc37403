"""Decoding of masked diffusion language models: `sample_masked(model, prompts, length, steps)`.

The response starts as masks. An evaluation gives every masked token its likeliest id and that id's
probability, the confidence; the most confident are committed and never change again.

Shapes: B sequences, P prompt tokens (padded on the left), G response tokens, N = P + G, V ids.
Source: LLaDA, arXiv 2502.09992 (blocks, low-confidence remasking); Fast-dLLM, arXiv 2505.22618
(threshold).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foreseer.integration.host.trunk import UnsupportedHost

COMMITS = ("confidence", "threshold")
Prompts: TypeAlias = Int[Tensor, "B P"] | Sequence[Int[Tensor, " _"]] | Sequence[Sequence[int]]
LENGTHS = ("max_sequence_length", "max_position_embeddings")  # of a config: LLaDA's, most others'


@dataclass(frozen=True)
class Sampled:
    """What was decoded.

    Args:
        responses: token ids.
        committed_at: the evaluation, from 0, at which each token was committed.
    """

    responses: Int[Tensor, "B G"]
    committed_at: Int[Tensor, "B G"]

    @property
    def evaluations(self) -> Int[Tensor, " B"]:
        """Steps that each sequence took, as if decoded alone."""
        return self.committed_at.amax(1) + 1


@torch.no_grad()
def sample_masked(
    model: Callable[..., Any],
    prompts: Prompts,
    length: int,
    steps: int,
    block: int | None = None,
    commit: str = "confidence",
    threshold: float = 0.9,
    clock: Iterable[Any] | None = None,
) -> Sampled:
    """Fill in responses of masks, block after block from the left.

    Args:
        model: called as `model(input_ids=..., attention_mask=...)`, returns logits or an object
            with `logits`; its `config` has `mask_token_id`, and `pad_token_id` for unequal prompts.
        prompts: token ids; unequal ones are padded on the left and masked in attention.
        length: G.
        steps: with `confidence`, steps of the whole response, from one per block to G: each commits
            G / steps tokens. With `threshold`, the most steps.
        block: tokens of a block; divides G; None for one block.
        commit: `confidence`, a fixed number of tokens at every step; `threshold`, all tokens of the
            block that are surer than `threshold`, at least one.
        threshold: a probability.
        clock: an entry a step: what `run.steps(steps)` opened, where a run forecasts.

    Returns:
        The responses, and when each token was committed.

    Raises:
        ValueError: no mask id, too long a sequence, blocks, steps or a clock that do not fit,
            logits that are not finite, or steps that end before the response is complete.
        UnsupportedHost: the model's attention is causal.
    """
    config = getattr(model, "config", None)
    block = length if block is None else block
    _check_numbers(length, steps, block, commit, threshold, clock)
    mask_id = _token(config, "mask_token_id", "a masked model's tokenizer has a mask token")
    rows, attended = _padded(prompts, config)
    ids = torch.cat([rows, rows.new_full((len(rows), length), mask_id)], 1)
    attended = torch.cat([attended, attended.new_ones(len(rows), length)], 1)
    _check_length(ids.shape[1], length, config)
    check_bidirectional(model)
    committed_at = torch.full_like(ids[:, -length:], -1)
    quotas = _quotas(length, steps, block)
    for index, _ in enumerate(range(steps) if clock is None else clock):
        if not bool((committed_at < 0).any()):
            break
        logits = logits_of(model(input_ids=ids, attention_mask=attended))[:, -length:]
        tokens, confidence = _guesses(logits, mask_id, index)
        open_ = _open(committed_at < 0, block)
        confidence = confidence.masked_fill(~open_, -1.0)
        if commit == "confidence":
            chosen = _most(confidence, quotas[index])
        else:
            chosen = (confidence > threshold) | (_most(confidence, 1) & open_)
        response = torch.where(chosen, tokens, ids[:, -length:])
        ids = torch.cat([ids[:, :-length], response], 1)  # what was given stays as it was
        committed_at[chosen] = index
    _check_complete(committed_at, index + 1)
    return Sampled(ids[:, -length:], committed_at)


def logits_of(output: Any) -> Float[Tensor, "B N V"]:
    """The logits among what a language model returned.

    Raises:
        UnsupportedHost: there are none.
    """
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.ndim != 3:
        raise UnsupportedHost(
            f"the model returned {type(output).__name__}, expected logits (batch, tokens, ids) or "
            "an object with them as `logits`."
        )
    return found


def check_bidirectional(model: Callable[..., Any]) -> None:
    """Raise if later tokens do not change the logits of earlier ones; asked once per network.

    Raises:
        UnsupportedHost: the attention is causal.
    """
    if not isinstance(model, nn.Module) or getattr(model, BIDIRECTIONAL, False):
        return
    device = next(model.parameters()).device
    probe = torch.zeros(2, 4, dtype=torch.long, device=device)
    probe[1, -1] = 1
    forward = type(model).forward  # below whatever is attached
    first, second = logits_of(forward(model, probe))[:, 0]
    if torch.equal(first, second):
        raise UnsupportedHost(
            f"the logits of the first token of {type(model).__name__} do not depend on the last: "
            "its attention is causal, and a masked model looks both ways. Load the masked model's "
            "own class, or generate from left to right."
        )
    object.__setattr__(model, BIDIRECTIONAL, True)


BIDIRECTIONAL = "_foreseer_bidirectional"


def _guesses(
    logits: Float[Tensor, "B G V"], mask_id: int, index: int
) -> tuple[Int[Tensor, "B G"], Float[Tensor, "B G"]]:
    """The likeliest id that is no mask, and its probability."""
    wrong = int((~logits.isfinite()).any(-1).sum())
    if wrong:
        raise ValueError(
            f"the logits of {wrong} of {logits.shape[0] * logits.shape[1]} response tokens are not "
            f"finite at step {index}; nothing was committed. Look for overflow in half precision, "
            "or for a row of padding alone."
        )
    ids = torch.arange(logits.shape[-1], device=logits.device)
    confidence, tokens = logits.float().masked_fill(ids == mask_id, -torch.inf).softmax(-1).max(-1)
    return tokens, confidence


def _open(masked: Bool[Tensor, "B G"], block: int) -> Bool[Tensor, "B G"]:
    """The masked tokens of each sequence's first block that has any."""
    blocks = masked.unflatten(1, (-1, block))
    left = blocks.any(-1)
    return (blocks & (left & (left.cumsum(1) == 1))[..., None]).flatten(1)


def _most(confidence: Float[Tensor, "B G"], count: int) -> Bool[Tensor, "B G"]:
    """The `count` most confident tokens of each sequence."""
    chosen = torch.zeros_like(confidence, dtype=torch.bool)
    return chosen.scatter_(1, confidence.topk(count, dim=1).indices, True)


def _quotas(length: int, steps: int, block: int) -> list[int]:
    """Tokens to commit at every step; what does not divide goes to a block's first steps."""
    per_block = steps // (length // block)
    share, rest = divmod(block, max(per_block, 1))
    return [share + (i < rest) for i in range(per_block)] * (length // block)


def _padded(
    prompts: Prompts, config: Any
) -> tuple[Int[Tensor, "B longest"], Int[Tensor, "B longest"]]:
    """Prompts in one tensor, and where they are no padding."""
    if not isinstance(prompts, Tensor):
        prompts = [row if isinstance(row, Tensor) else torch.tensor(row) for row in prompts]
    lengths = {len(row) for row in prompts}
    if not lengths or 0 in lengths:
        raise ValueError(
            f"found {len(prompts)} prompts of lengths {sorted(lengths)}; expected at least one "
            "prompt, and no empty one."
        )
    if len(lengths) == 1:
        rows = prompts if isinstance(prompts, Tensor) else torch.stack(list(prompts))
        return rows, torch.ones_like(rows)
    pad = _token(config, "pad_token_id", "prompts of unequal lengths are padded with it")
    most = max(lengths)
    rows = torch.stack([nn.functional.pad(row, (most - len(row), 0), value=pad) for row in prompts])
    columns = torch.arange(most, device=rows.device)
    starts = torch.tensor([most - len(row) for row in prompts], device=rows.device)
    return rows, (columns >= starts[:, None]).long()


def _token(config: Any, name: str, why: str) -> int:
    found = getattr(config, name, None)
    if not isinstance(found, int):
        raise ValueError(
            f"the model's config has {name} = {found!r}, expected a token id: {why}. Set "
            f"model.config.{name}."
        )
    return found


def _check_numbers(
    length: int, steps: int, block: int, commit: str, threshold: float, clock: Any
) -> None:
    counted = len(getattr(clock, "sigmas", None) or range(steps))
    if counted != steps:
        raise ValueError(f"the clock has {counted} steps and steps is {steps}; expected as many.")
    if not 1 <= block <= length or length % block:
        raise ValueError(
            f"a response of {length} tokens does not divide into blocks of {block}; expected a "
            "block that is no longer than the response and divides it."
        )
    if commit not in COMMITS or not 0 < threshold < 1:
        raise ValueError(
            f"commit is {commit!r} with threshold {threshold}; expected one of {COMMITS} and a "
            "probability between 0 and 1."
        )
    blocks = length // block
    if not blocks <= steps <= length or (commit == "confidence" and steps % blocks):
        raise ValueError(
            f"{steps} steps do not fit {blocks} blocks of {block} tokens; expected a multiple of "
            f"{blocks} from {blocks} to {length}."
        )


def _check_complete(committed_at: Int[Tensor, "B G"], steps: int) -> None:
    left = int((committed_at < 0).sum())
    if left:
        raise ValueError(
            f"{left} tokens are still masked after {steps} steps; expected a complete response: "
            f"give as many steps as it has tokens ({committed_at.shape[1]})."
        )


def _check_length(found: int, length: int, config: Any) -> None:
    limits = [getattr(config, name, None) for name in LENGTHS]
    limit = next((value for value in limits if isinstance(value, int)), None)
    if limit is not None and found > limit:
        raise ValueError(
            f"a prompt of {found - length} tokens with a response of {length} makes {found}, but "
            f"the model was trained on at most {limit}; shorten the prompt or the response."
        )
