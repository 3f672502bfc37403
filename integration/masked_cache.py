"""dLLM-Cache: `with dllm_cache(model, G)` a masked language model computes some of its tokens.

Per block K and V (before rotary positions), attention output and MLP output of all tokens are kept.
At step t of a decoding, counted from 0, in every block but the first, which is always computed:

    prompt    computed if t mod prompt_every == 0
    response  computed if t mod response_every == 0, else the floor(ratio G) tokens whose
              cos(V_new, V_kept) is smallest; V is renewed for all of them

A computed token has its Q, K, attention and MLP renewed; all others keep theirs.

Shapes: B sequences, P prompt and G response tokens, N = P + G, D channels, H query and K key heads
of C channels, n computed tokens.
Source: arXiv 2506.06295, section 3, and its released code, whose grouped-query attention, padding
masks and shared state are mended here.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foreseer.integration.host.hook import Attached, replace_method, restore_method
from foreseer.integration.host.taps import own
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.integration.masked_sampler import Prompts, check_bidirectional, sample_masked
from foreseer.predictors.tokens import take

OWN_CACHES = ("use_cache", "cache", "past_key_value", "past_key_values", "layer_past")
DRIFT = 0.1
"""Mean relative change of a prompt token's stream above which a frozen prompt is refused."""


@dataclass(frozen=True)
class BlockNames:
    """Names of the parts of a block that attends and then runs an MLP, each on a normed stream."""

    norm: str
    query: str
    key: str
    value: str
    out: str
    mlp_norm: str
    gate: str
    up: str
    down: str


_LLADA = BlockNames(
    norm="attn_norm",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    out="attn_out",
    mlp_norm="ff_norm",
    gate="ff_proj",
    up="up_proj",
    down="ff_out",
)
_LLAMA = BlockNames(
    norm="input_layernorm",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)
BLOCKS = {
    "MaskedBlock": _LLADA,
    "DreamDecoderLayer": _LLAMA,
    "LlamaDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
}
"""Block classes: SwiGLU, no norm on queries and keys, called with `position_embeddings`."""


@dataclass
class Kept:
    """What is kept of a block."""

    key: Float[Tensor, "B N KC"]
    value: Float[Tensor, "B N KC"]
    attention: Float[Tensor, "B N D"]
    mlp: Float[Tensor, "B N D"]


@dataclass
class CacheRun:
    """Where a decoding is, and what it has cost.

    Args:
        steps: forwards since the `with` block began.
        computed: tokens computed, summed over blocks and sequences.
        all_tokens: tokens there were.
    """

    steps: int = 0
    computed: int = 0
    all_tokens: int = 0
    index: int = -1  # t of the decoding in work
    ids: Tensor | None = None
    kept: dict[int, Kept] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Tokens computed, of all."""
        return self.computed / max(self.all_tokens, 1)

    def state_bytes(self) -> int:
        """Bytes kept: 2 B N (D + K C) elements a block."""
        tensors = [tensor for kept in self.kept.values() for tensor in vars(kept).values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextlib.contextmanager
def dllm_cache(
    model: nn.Module,
    length: int,
    prompt_every: int = 25,
    response_every: int = 5,
    ratio: float = 0.25,
    probe: Prompts | None = None,
    max_drift: float = DRIFT,
) -> Iterator[CacheRun]:
    """Let every decoding inside the `with` block keep what its tokens computed.

    A decoding begins where the prompt is another one, a token is masked again or nothing changed.

    Args:
        model: a masked language model with blocks of a class in `BLOCKS`.
        length: G; what comes before is the prompt.
        prompt_every: steps from one computation of the prompt to the next.
        response_every: the same of the response.
        ratio: share of the response computed in between.
        probe: prompts to measure how far prompt tokens move while they would be kept; asked for
            where `prompt_every` is more than 1.
        max_drift: the most they may, see `prompt_drift`.

    Raises:
        ValueError: a number is out of range, there is no probe, or something is attached already.
        UnsupportedHost: unknown or compiled blocks, causal attention, or a prompt that moves.
    """
    if prompt_every < 1 or response_every < 1 or not 0 <= ratio <= 1 or length < 1:
        raise ValueError(
            f"found prompt_every {prompt_every}, response_every {response_every}, ratio {ratio} "
            f"and length {length}; expected intervals and a length of at least 1, and a ratio from "
            "0 to 1."
        )
    blocks = masked_blocks(model)
    check_bidirectional(model)
    if prompt_every > 1:
        _check_drift(model, length, prompt_every, probe, max_drift)
    run = CacheRun()
    settings = _Settings(length, prompt_every, response_every, ratio)
    attached = Attached(model, functools.partial(_route, run, length, model.config))
    replaced = []
    try:
        for number, (block, names) in enumerate(blocks):
            cached = functools.partial(_block, run, settings, number, block, names)
            replaced.append((block, replace_method(block, "forward", cached)))
        yield run
    finally:
        for block, method in replaced:
            restore_method(block, "forward", method)
        attached.remove()
        run.kept.clear()
        run.ids = None


def masked_blocks(model: nn.Module) -> list[tuple[nn.Module, BlockNames]]:
    """The blocks of a model in the order of their names, with the names of their parts.

    Raises:
        UnsupportedHost: none is known, or one is compiled.
    """
    found = [(m, BLOCKS[type(m).__name__]) for m in model.modules() if type(m).__name__ in BLOCKS]
    if not found:
        kinds = sorted({type(m).__name__ for m in model.modules() if isinstance(m, nn.ModuleList)})
        inside = {
            type(b).__name__ for m in model.modules() if isinstance(m, nn.ModuleList) for b in m
        }
        raise UnsupportedHost(
            f"{type(model).__name__} has {kinds or 'no block lists'} of {sorted(inside)}; "
            f"dLLM-Cache knows the parts of {', '.join(BLOCKS)} only. Add a row to BLOCKS in "
            "integration/masked_cache.py with a test."
        )
    if any(getattr(block, "_compiled_call_impl", None) is not None for block, _ in found):
        raise UnsupportedHost(
            f"the blocks of {type(model).__name__} are compiled; their forward is exchanged, which "
            "would compile it again at every number of tokens. Leave the blocks eager."
        )
    return found


@torch.no_grad()
def prompt_drift(
    model: nn.Module,
    prompts: Prompts,
    length: int,
    every: int,
) -> float:
    """How far prompt tokens move while they would be kept, |x_t - x_a| / |x_a| after a block.

    Mean over sequences, tokens and steps t after the last multiple a of `every`; the worst block's.

    Args:
        model: see `dllm_cache`.
        prompts: see `sample_masked`; decoded in full, one token at every step.
        length: G.
        every: steps.
    """
    anchors: dict[int, Tensor] = {}
    moved: dict[int, list[float]] = {}
    calls = [0] * len(masked_blocks(model))

    def look(number: int, module: nn.Module, args: tuple, output: Any) -> None:
        stream = output if isinstance(output, Tensor) else output[0]
        prompt = own(stream[:, : stream.shape[1] - length].float())
        if calls[number] % every == 0:
            anchors[number] = prompt
        else:
            change = (prompt - anchors[number]).norm(dim=-1) / anchors[number].norm(dim=-1)
            moved.setdefault(number, []).append(float(change.mean()))
        calls[number] += 1

    handles = [
        block.register_forward_hook(functools.partial(look, number))
        for number, (block, _) in enumerate(masked_blocks(model))
    ]
    try:
        sample_masked(model, prompts, length, length)
    finally:
        for handle in handles:
            handle.remove()
    return max((sum(values) / len(values) for values in moved.values()), default=0.0)


@dataclass(frozen=True)
class _Settings:
    length: int
    prompt_every: int
    response_every: int
    ratio: float


def _check_drift(model: nn.Module, length: int, every: int, probe: Any, max_drift: float) -> None:
    if probe is None:
        raise ValueError(
            f"prompt_every is {every} and there is no probe: whether a prompt may be kept depends "
            "on the model. Pass a few prompts as probe=, or prompt_every=1."
        )
    found = prompt_drift(model, probe, length, every)
    if not found <= max_drift:  # also catches NaN
        raise UnsupportedHost(
            f"prompt tokens of {type(model).__name__} move by {found:.2f} of their size while they "
            f"would be kept for {every} steps, expected at most {max_drift}: they carry what the "
            "response says, and keeping them would decode something else. Lower prompt_every, or "
            "measure what is lost with max_drift=float('inf')."
        )


def _route(
    run: CacheRun, length: int, config: Any, forward: Callable, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Find out where the decoding is, then run the model."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] <= length:
        raise ValueError(
            f"the model was called with {getattr(ids, 'shape', None)} as input_ids, expected "
            f"(batch, tokens) with more than the response's {length} tokens."
        )
    if torch.is_grad_enabled():
        raise ValueError(
            "the model was called with gradients, which do not reach what is kept; decode under "
            "torch.no_grad()."
        )
    before = run.ids
    going_on = (
        before is not None
        and before.shape == ids.shape
        and before.device == ids.device
        and torch.equal(before[:, :-length], ids[:, :-length])
        and not torch.equal(before, ids)
        and not bool(((ids == config.mask_token_id) & (before != config.mask_token_id)).any())
    )
    run.index = run.index + 1 if going_on else 0
    run.steps += 1
    run.ids = None  # known again once the forward has come to its end
    output = forward(*args, **kwargs)
    run.ids = ids.clone()
    return output


def _block(
    run: CacheRun,
    settings: _Settings,
    number: int,
    block: nn.Module,
    names: BlockNames,
    forward: Callable,
    hidden_states: Float[Tensor, "B N D"],
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """A block's forward, of all its tokens or of some."""
    own = [n for n in OWN_CACHES if kwargs.get(n) is not None and kwargs[n] is not False]
    if own:
        raise UnsupportedHost(
            f"the model keeps keys and values of its own ({', '.join(own)}); a masked model's "
            "tokens all change. Call it with use_cache=False."
        )
    assert position_embeddings is not None  # of every class in the table
    stream = hidden_states
    prompt = number == 0 or run.index % settings.prompt_every == 0
    response = number == 0 or run.index % settings.response_every == 0
    run.all_tokens += stream.shape[0] * stream.shape[1]
    if prompt and response:
        run.computed += stream.shape[0] * stream.shape[1]
        with _keeping(run, number, block, names):
            return forward(
                stream,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **kwargs,
            )
    kept, part = run.kept[number], functools.partial(_part, block)
    start = stream.shape[1] - settings.length
    normed = part(names.norm)(stream)
    chosen = _renew_values(kept, normed, part(names.value), start, prompt, response, settings.ratio)
    run.computed += chosen.numel()
    if chosen.shape[1]:
        rows = take(normed, chosen)
        _put(kept.key, chosen, part(names.key)(rows))
        queries = part(names.query)(rows)
        mixed = _attend(queries, kept, chosen, attention_mask, position_embeddings)
        _put(kept.attention, chosen, part(names.out)(mixed))
    stream = stream + kept.attention
    if chosen.shape[1]:
        rows = part(names.mlp_norm)(take(stream, chosen))
        gated = nn.functional.silu(part(names.gate)(rows)) * part(names.up)(rows)
        _put(kept.mlp, chosen, part(names.down)(gated))
    return stream + kept.mlp


def _renew_values(
    kept: Kept,
    normed: Float[Tensor, "B N D"],
    project: nn.Module,
    start: int,
    prompt: bool,
    response: bool,
    ratio: float,
) -> Int[Tensor, "B n"]:
    """Renew V, and choose the tokens whose rest is computed."""
    batch, num_tokens = normed.shape[:2]
    columns = torch.arange(num_tokens, device=normed.device).expand(batch, -1)
    chosen = [columns[:, :start]] if prompt else []
    if prompt:
        kept.value[:, :start] = project(normed[:, :start])
    count = int(ratio * (num_tokens - start))
    if response:
        kept.value[:, start:] = project(normed[:, start:])
        chosen.append(columns[:, start:])
    elif count:
        new = project(normed[:, start:])
        likeness = nn.functional.cosine_similarity(new, kept.value[:, start:], dim=-1)
        chosen.append(start + likeness.topk(count, 1, largest=False).indices.sort(1).values)
        kept.value[:, start:] = new
    return torch.cat([columns[:, :0], *chosen], 1)


def _attend(
    queries: Float[Tensor, "B n HC"],
    kept: Kept,
    chosen: Int[Tensor, "B n"],
    mask: Tensor | None,
    positions: tuple[Tensor, Tensor],
) -> Float[Tensor, "B n HC"]:
    """Attention of the chosen tokens to all."""
    batch, num_tokens = kept.key.shape[:2]
    cos, sin = (p.reshape(-1, num_tokens, p.shape[-1]).expand(batch, -1, -1) for p in positions)
    width = cos.shape[-1]
    q, k, v = (
        x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (queries, kept.key, kept.value)
    )
    if mask is not None and mask.shape[-2] != 1:  # a row for every query
        rows = mask.expand(batch, mask.shape[1], -1, -1)
        places = chosen[:, None, :, None].expand(-1, rows.shape[1], -1, num_tokens)
        mask = rows.gather(2, places)
    mixed = nn.functional.scaled_dot_product_attention(
        _rotated(q, take(cos, chosen), take(sin, chosen)),
        _rotated(k, cos, sin),
        v,
        attn_mask=mask,
        enable_gqa=True,
    )
    return mixed.transpose(1, 2).flatten(2)


def _rotated(
    x: Float[Tensor, "B heads n C"], cos: Float[Tensor, "B n C"], sin: Float[Tensor, "B n C"]
) -> Float[Tensor, "B heads n C"]:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


@contextlib.contextmanager
def _keeping(run: CacheRun, number: int, block: nn.Module, names: BlockNames) -> Iterator[None]:
    """Keep what the block's own forward computes inside."""
    found: dict[str, Tensor] = {}
    places = {
        "key": names.key,
        "value": names.value,
        "attention": names.out,
        "mlp": names.down,
    }
    handles = [
        _part(block, name).register_forward_hook(functools.partial(_keep, found, slot))
        for slot, name in places.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    run.kept[number] = Kept(**found)


def _keep(found: dict[str, Tensor], slot: str, module: nn.Module, args: tuple, out: Tensor) -> None:
    found[slot] = own(out)


def _put(kept: Float[Tensor, "B N D"], chosen: Int[Tensor, "B n"], rows: Tensor) -> None:
    kept.scatter_(1, chosen[..., None].expand_as(rows), rows)


def _part(block: nn.Module, name: str) -> nn.Module:
    return block.get_submodule(name)
