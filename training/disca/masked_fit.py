"""A corrector for a masked language model: its last block, tuned on recorded decodings.

Between evaluations a masked model's logits stay what they were, though tokens have been committed:
that is parallel decoding. The corrector runs the last block on what the blocks before it added at
the evaluation a and on the tokens as they are now,

    h_hat_t = block_w(E(x_t) + s_a - E(x_a) + U norm(E(x_t))),   loss  KL(head h_t || head h_hat_t)

over the tokens still masked at step t, on pairs of a step a and one up to `horizon` steps later, of
decodings of one token at every step. w starts as the model's own and U at zero.

Shapes: R decodings, S = G steps, N tokens, D channels, V ids, B pairs.
Source: ours; the loss, and that logits are corrected by a small network on the frozen model's
states, are multi-token residual prediction's, arXiv 2605.18817.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foreseer.checkpoints.spec import PredictorSpec
from foreseer.integration.host.call import Call
from foreseer.integration.host.hook import Attached, TrunkSkipper
from foreseer.integration.host.loop import read_times
from foreseer.integration.host.module_host import ModuleHost
from foreseer.integration.host.outer import OuterBlocks
from foreseer.integration.host.proof import facts_of, prove
from foreseer.integration.host.taps import BEFORE_LAST, capturing
from foreseer.integration.host.trunk import Trunk
from foreseer.integration.masked_sampler import (
    Prompts,
    check_bidirectional,
    logits_of,
    sample_masked,
)
from foreseer.predictors.tuned_block import TunedLastBlock

CLIP = 1.0  # of the gradient's norm
BETAS = (0.9, 0.98)  # pairs of a batch differ much in how far they are to forecast


@dataclass(frozen=True)
class Decodings:
    """Decodings of one token at every step.

    Args:
        ids: what the model was given at every step.
        attended: 0 at padding.
        before_last: what its blocks before the last had added to what entered the first.
        hidden: what entered its head.
        length: G.
        host: fingerprint of the model.
    """

    ids: Int[Tensor, "R S N"]
    attended: Int[Tensor, "R N"]
    before_last: Float[Tensor, "R S N D"]
    hidden: Float[Tensor, "R S N D"]
    length: int
    host: dict[str, Any]


class _Recorded:
    """A model that keeps what its calls were given and what entered its last block and head."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config = model.config
        self.ids: list[Tensor] = []
        self.attended: list[Tensor] = []
        self.taps: list[dict[str, Tensor]] = []

    def __call__(self, **kwargs: Any) -> Any:
        self.ids.append(kwargs["input_ids"])
        self.attended.append(kwargs["attention_mask"])
        with capturing(self.model, _trunk(self.model, kwargs), {"hidden", BEFORE_LAST}) as found:
            output = self.model(**kwargs)
        self.taps.append(found)
        return output


def record_decodings(
    host: Any, prompts: Prompts, length: int, block: int | None = None
) -> Decodings:
    """Decode in full, one token at every step, and keep what enters the last block and the head.

    Args:
        host: `foreseer.host(model)` of a masked language model.
        prompts: see `sample_masked`.
        length: G.
        block: see `sample_masked`.

    Raises:
        ValueError: this is no host, or something is attached to its model.
        UnsupportedHost: the model is causal, or its blocks hand on more than one stream.
    """
    _check_host(host)
    check_bidirectional(host.module)
    recorded = _Recorded(host.module)
    with _alone(host.module):
        sample_masked(recorded, prompts, length, length, block)
    taps = {
        name: torch.stack([found[name] for found in recorded.taps], 1)
        for name in ("hidden", BEFORE_LAST)
    }
    ids = torch.stack(recorded.ids, 1)
    before_last, hidden = taps[BEFORE_LAST], taps["hidden"]
    return Decodings(ids, recorded.attended[-1], before_last, hidden, length, host.fingerprint())


def fit_corrector(
    host: Any,
    decodings: Decodings,
    horizon: int = 4,
    num_steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
    tell: Callable[[int, float], None] | None = None,
) -> TunedLastBlock:
    """Tune a copy of the last block on pairs of steps of recorded decodings.

    Args:
        host: what was recorded; its parameters get no gradient.
        decodings: see `record_decodings`.
        horizon: most steps from the anchor to the step that is forecast.
        num_steps: optimiser steps.
        batch_size: pairs of a step.
        learning_rate: AdamW's, after a linear start falling to zero by half a cosine.
        seed: of the pairs.
        tell: called with the step and its loss.

    Returns:
        The predictor, with the spec of this fit.

    Raises:
        ValueError: a horizon that the recording does not reach, decodings of another model, no
            host, or something that is attached to its model.
    """
    _check_host(host)
    _check_recorded(host, decodings, horizon)
    model: Any = host.module
    call = {"input_ids": decodings.ids[:1, 0], "attention_mask": decodings.attended[:1]}
    trunk = _trunk(model, call)
    teacher, student = TrunkSkipper(model, trunk), OuterBlocks(model, trunk, BEFORE_LAST)
    reach, num_tokens = horizon / decodings.length, decodings.ids.shape[-1]
    width = decodings.hidden.shape[-1]
    predictor = TunedLastBlock.of(width, student.entry, reach, num_tokens)
    predictor.spec = _spec(host, decodings, horizon)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(predictor.parameters(), learning_rate, BETAS, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, num_steps, pct_start=0.1, cycle_momentum=False
    )
    with _alone(model), _frozen(model):
        for number in range(num_steps):
            pairs = _pairs(decodings, horizon, batch_size, generator)
            loss = _loss(predictor, model, teacher, student, decodings, *pairs)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(predictor.parameters(), CLIP)
            optimiser.step()
            rate.step()
            if tell is not None:
                tell(number, float(loss.detach()))
    return predictor.eval()


def _check_host(host: Any) -> None:
    if not isinstance(host, ModuleHost):
        raise ValueError(
            f"found {type(host).__name__}, expected the host of a masked language model: "
            "foreseer.host(model)."
        )


def _check_recorded(host: ModuleHost, decodings: Decodings, horizon: int) -> None:
    if decodings.host != host.fingerprint():
        raise ValueError(
            f"the decodings are those of another model than {type(host.module).__name__} is now; "
            "record them anew: record_decodings(host, prompts, length)."
        )
    if not 1 <= horizon < decodings.length:
        raise ValueError(
            f"horizon is {horizon}, expected 1 to {decodings.length - 1}, steps of the recording."
        )


@contextlib.contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Let no other thread call a model whose blocks are exchanged, nor anybody attach to it."""
    owner = threading.get_ident()

    def route(forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != owner:
            raise ValueError(
                f"{type(model).__name__} is being recorded or fitted on in another thread, which "
                "exchanges its blocks; call it when that is done, or call a copy."
            )
        return forward(*args, **kwargs)

    attached = Attached(model, route)
    try:
        yield
    finally:
        attached.remove()


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of a model get a gradient inside."""
    frozen = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


@torch.no_grad()
def _trunk(model: nn.Module, kwargs: dict[str, Any]) -> Trunk:
    """The blocks and head of a model, proven on a call once."""
    facts, taps = facts_of(model), frozenset({BEFORE_LAST})
    call = Call(model, model.forward, (), kwargs)
    proof = (taps, None, call.form)
    if facts.trunk is None or proof not in facts.proven:
        facts.trunk, _ = prove(call, set(taps), None)
        facts.proven.add(proof)
    return facts.trunk


def _spec(host: ModuleHost, decodings: Decodings, horizon: int) -> PredictorSpec:
    """The circumstances of a fit."""
    length = decodings.length
    return PredictorSpec(
        tap=BEFORE_LAST,
        anchors=tuple(range(0, length, horizon)),
        sigmas=tuple(read_times(length)[1]),
        host=host.fingerprint(),
        scheduler=type(host.scheduler).__name__,
        num_branches=1,
        guidance_scale=1.0,
        dtype=str(decodings.hidden.dtype).removeprefix("torch."),
        num_trajectories=len(decodings.ids),
    )


def _pairs(
    decodings: Decodings, horizon: int, count: int, generator: torch.Generator
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"], Int[Tensor, " B"]]:
    """Some decodings, and an anchor and a later step of each."""
    rows = torch.randint(len(decodings.ids), (count,), generator=generator)
    gaps = 1 + torch.randint(horizon, (count,), generator=generator)
    anchors = (torch.rand(count, generator=generator) * (decodings.length - gaps)).long()
    return rows, anchors, anchors + gaps


def _loss(
    predictor: TunedLastBlock,
    model: Any,
    teacher: TrunkSkipper,
    student: OuterBlocks,
    decodings: Decodings,
    rows: Int[Tensor, " B"],
    anchors: Int[Tensor, " B"],
    steps: Int[Tensor, " B"],
) -> Float[Tensor, ""]:
    """KL of the head's distributions at the tokens still masked."""
    ids = decodings.ids[rows, steps]
    call = {"input_ids": ids, "attention_mask": decodings.attended[rows]}
    true = functools.partial(_given, decodings.hidden[rows, steps])
    with torch.no_grad():
        wanted = logits_of(teacher(model.forward, (), call, true)).log_softmax(-1)
    entering = functools.partial(_entering, predictor, decodings.before_last[rows, anchors])
    output = student(model.forward, (), call, entering, weights=predictor.block_weights)
    found = logits_of(output).log_softmax(-1)
    masked = ids == model.config.mask_token_id
    return nn.functional.kl_div(
        found[masked], wanted[masked], reduction="batchmean", log_target=True
    )


def _entering(predictor: TunedLastBlock, kept: Tensor, came: list[Tensor]) -> list[Tensor]:
    return [came[0] + predictor.added(kept, came[0])]


def _given(hidden: Tensor, came: Tensor) -> Tensor:
    return hidden
