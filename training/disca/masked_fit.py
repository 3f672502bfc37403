"""A corrector for a masked language model: DisCa's predictor on recorded decodings.

Between evaluations a masked model's logits stay what they were, though tokens have been committed:
that is parallel decoding. The corrector sees the embeddings of the tokens as they are now:

    h_hat_t = h_a + f([E(x_t), h_a], t - a),    loss  KL(head(h_t) || head(h_hat_t))

over the tokens still masked at step t, on pairs of a step a and one up to `horizon` steps later, of
decodings of one token at every step.

Shapes: R decodings, S = G steps, N tokens, D channels, V ids, B pairs.
Source: DisCa, arXiv 2602.05449, on logits as multi-token residual prediction, arXiv 2605.18817.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foreseer.checkpoints.spec import PredictorSpec
from foreseer.integration.host.hook import TrunkSkipper
from foreseer.integration.host.loop import read_times
from foreseer.integration.host.module_host import ModuleHost
from foreseer.integration.host.trunk import Trunk, first_tensor, given_trunk
from foreseer.integration.masked_sampler import Prompts, logits_of, sample_masked
from foreseer.predictors.base import History, Step
from foreseer.predictors.neural import DiscaPredictor

CLIP = 1.0  # of the gradient's norm


@dataclass(frozen=True)
class Decodings:
    """Decodings of one token at every step.

    Args:
        ids: what the model was given at every step.
        attended: 0 at padding.
        hidden: what entered its head.
        length: G.
    """

    ids: Int[Tensor, "R S N"]
    attended: Int[Tensor, "R N"]
    hidden: Float[Tensor, "R S N D"]
    length: int


def record_decodings(
    host: ModuleHost, prompts: Prompts, length: int, block: int | None = None
) -> Decodings:
    """Decode in full, one token at every step, and keep what enters the head.

    Args:
        host: `foreseer.host(model, blocks=..., head=...)` of a masked language model.
        prompts: see `sample_masked`.
        length: G.
        block: see `sample_masked`.

    Raises:
        ValueError: the host does not name its blocks and head.
    """
    ids: list[Tensor] = []
    attended: list[Tensor] = []
    hidden: list[Tensor] = []

    def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids.append(kwargs["input_ids"].clone())
        attended.append(kwargs["attention_mask"])

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found = first_tensor(args, kwargs)
        assert found is not None  # a head has an input
        hidden.append(found.clone())

    model = host.module
    head = model.get_submodule(_trunk(host).head)
    handles = [
        model.register_forward_pre_hook(see, with_kwargs=True),
        head.register_forward_pre_hook(keep, with_kwargs=True),
    ]
    try:
        sample_masked(model, prompts, length, length, block)
    finally:
        for handle in handles:
            handle.remove()
    first = len(ids) - length  # a look at whether the model is causal comes before
    return Decodings(
        torch.stack(ids[first:], 1), attended[-1], torch.stack(hidden[-length:], 1), length
    )


def fit_corrector(
    predictor: DiscaPredictor,
    host: ModuleHost,
    decodings: Decodings,
    horizon: int = 4,
    num_steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    tell: Callable[[int, float], None] | None = None,
) -> DiscaPredictor:
    """Train a predictor without modulation on pairs of steps of recorded decodings.

    Args:
        predictor: changed in place; its spec becomes this host's.
        host: what was recorded; its parameters get no gradient.
        decodings: see `record_decodings`.
        horizon: most steps from the anchor to the step that is forecast.
        num_steps: optimiser steps.
        batch_size: pairs of a step.
        learning_rate: AdamW's, after a linear start falling to zero by half a cosine.
        seed: of the pairs.
        tell: called with the step and its loss.

    Returns:
        The predictor.

    Raises:
        ValueError: a horizon that the recording or the predictor does not reach.
    """
    _check_horizon(horizon, predictor.max_gap, decodings.length)
    model: Any = host.module
    mask_id: int = model.config.mask_token_id
    skipper, generator = TrunkSkipper(model, _trunk(host)), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(predictor.parameters(), learning_rate, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, num_steps, pct_start=0.1, cycle_momentum=False
    )
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    predictor.train()
    try:
        for number in range(num_steps):
            rows, anchor, step = _pairs(decodings, horizon, batch_size, generator)
            loss = _loss(predictor, model, skipper, decodings, mask_id, rows, anchor, step)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(predictor.parameters(), CLIP)
            optimiser.step()
            rate.step()
            if tell is not None:
                tell(number, float(loss.detach()))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    predictor.spec = _spec(host, decodings, horizon)
    return predictor.eval()


def _check_horizon(horizon: int, max_gap: float, length: int) -> None:
    reach = max_gap * length + 1e-3
    if not 1 <= horizon < length or horizon > reach:
        raise ValueError(
            f"horizon is {horizon}, expected 1 to {length - 1}, and at most max_gap of the "
            f"predictor times the response, {reach:.0f}."
        )


def _trunk(host: ModuleHost) -> Trunk:
    """The names that the host was made with."""
    given = given_trunk(host.module)
    if given.block_lists is None or given.head is None:
        raise ValueError(
            f"{host.name} does not say where its blocks and its head are; make it with "
            "foreseer.host(model, blocks='model.transformer.blocks', head='model.transformer.ln_f')"
            ", or what they are called here."
        )
    return Trunk(given.block_lists, given.head)


def _spec(host: ModuleHost, decodings: Decodings, horizon: int) -> PredictorSpec:
    """The circumstances of a fit."""
    length = decodings.length
    return PredictorSpec(
        tap="hidden",
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
) -> tuple[Int[Tensor, " B"], int, int]:
    """Some decodings, and an anchor and a later step of all of them."""
    rows = torch.randint(len(decodings.ids), (count,), generator=generator)
    gap = 1 + int(torch.randint(horizon, (), generator=generator))
    anchor = int(torch.randint(decodings.length - gap, (), generator=generator))
    return rows, anchor, anchor + gap


def _loss(
    predictor: DiscaPredictor,
    model: nn.Module,
    skipper: TrunkSkipper,
    decodings: Decodings,
    mask_id: int,
    rows: Int[Tensor, " B"],
    anchor: int,
    step: int,
) -> Float[Tensor, ""]:
    """KL of the head's distributions at the tokens still masked."""
    length = decodings.length
    history = History(predictor.window)
    history.push(_step(anchor, length), decodings.hidden[rows, anchor])
    ids = decodings.ids[rows, step]
    call = {"input_ids": ids, "attention_mask": decodings.attended[rows]}
    true = functools.partial(_given, decodings.hidden[rows, step])
    forecast = functools.partial(_forecast, predictor, history, step, length)
    with torch.no_grad():
        wanted = logits_of(skipper(model.forward, (), call, true)).log_softmax(-1)
    found = logits_of(skipper(model.forward, (), call, forecast)).log_softmax(-1)
    masked = ids == mask_id
    return nn.functional.kl_div(
        found[masked], wanted[masked], reduction="batchmean", log_target=True
    )


def _step(index: int, num_steps: int, tokens: Tensor | None = None) -> Step:
    return Step(index, 1 - index / num_steps, num_steps, tokens=tokens)


def _given(hidden: Tensor, came: Tensor) -> Tensor:
    return hidden


def _forecast(
    predictor: DiscaPredictor, history: History, step: int, length: int, came: Tensor
) -> Tensor:
    forecast: Tensor = predictor(history, _step(step, length, came))
    return forecast
