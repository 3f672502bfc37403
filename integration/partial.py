"""Run a transformer's trunk on some of its tokens, with the self-attention of every block given.

Everything outside self-attention acts on tokens one by one, so the rows of the selected tokens
come out as in a full run whenever the attention outputs do. Recomputing attention on a part of the
tokens is known to be worse than keeping its output (a finding of ClusCa's and DuCa's authors).

Shapes: B batch, N tokens of the stream, T text tokens beside it, n selected tokens, D channels.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foreseer.integration.host.facts import Trunk
from foreseer.integration.host.hook import block_list, capturing, own, replacing
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.predictors.token_clusters import take

SELF_ATTENTION = {
    "BasicTransformerBlock": ("attn1", "stream"),  # DiT, PixArt
    "FluxTransformerBlock": ("attn", "stream, text"),
    "FluxSingleTransformerBlock": ("attn", "text + stream"),
}
"""Self-attention of a block class, and what it returns: the stream, a pair, or one tensor of both.

Text tokens are all computed.
"""

TOLERANCE = 1e-3  # relative, float32: matrix products of fewer rows add in another order

Pick = Callable[[Float[Tensor, "B joined D"]], Float[Tensor, "B rows D"]]
"""The text rows and the selected stream rows of a full attention output, text first."""

Given = Callable[[str, Pick], Float[Tensor, "B rows D"]]
"""Attention outputs: `given(block, pick)` are the picked rows of that block's attention."""


@dataclass(frozen=True)
class Site:
    """The self-attention of one block."""

    block: nn.Module
    attribute: str
    layout: str

    @property
    def attention(self) -> nn.Module:
        """The module."""
        return self.block.get_submodule(self.attribute)


class GivenAttention(nn.Module):
    """Stands in for a block's self-attention and returns what it is given."""

    def __init__(self, layout: str, rows: Callable[[], Float[Tensor, "B rows D"]], n: int) -> None:
        super().__init__()
        self.layout = layout
        self.rows = rows
        self.n = n

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The given rows in the structure of the module replaced."""
        rows = self.rows()
        if self.layout != "stream, text":
            return rows
        num_text = rows.shape[1] - self.n
        return rows[:, num_text:], rows[:, :num_text]


class Picker:
    """The rows of selected tokens, in the stream and in attention outputs with text before it."""

    def __init__(self, selected: Int[Tensor, "B n"]) -> None:
        self.selected = selected
        self.num_tokens = 0  # N, known once the stream enters

    def enter(self, stream: Float[Tensor, "B N D"]) -> Float[Tensor, "B n D"]:
        """The rows of the stream that enters the blocks."""
        self.num_tokens = stream.shape[1]
        return take(stream, self.selected)

    def __call__(self, joined: Float[Tensor, "B joined D"]) -> Float[Tensor, "B rows D"]:
        """The text rows and the selected stream rows of an attention output."""
        num_text = joined.shape[1] - self.num_tokens
        if not num_text:
            return take(joined, self.selected)
        return torch.cat([joined[:, :num_text], take(joined, self.selected + num_text)], 1)


class PartialTrunk:
    """Run a transformer's forward with blocks that see only some tokens of the stream.

    Args:
        transformer: the host.
        trunk: its blocks and head.

    Raises:
        UnsupportedHost: a block's class has no row in `SELF_ATTENTION`, or is compiled.
    """

    def __init__(self, transformer: nn.Module, trunk: Trunk) -> None:
        self.transformer = transformer
        self.trunk = trunk
        self.head = transformer.get_submodule(trunk.head)
        blocks = {
            f"{name}.{i}": block
            for name in trunk.block_lists
            for i, block in enumerate(block_list(transformer, name))
        }
        self.sites = {name: site_of(name, block) for name, block in blocks.items()}
        self.first = next(iter(blocks.values()))

    @contextlib.contextmanager
    def capturing(self) -> Iterator[dict[str, Float[Tensor, "B rows D"]]]:
        """Collect the attention outputs of the forward inside, text before stream."""
        found: dict[str, Tensor] = {}
        handles = []
        for name, site in self.sites.items():
            keep = functools.partial(_keep_joined, found, name, site.layout)
            handles.append(site.attention.register_forward_hook(keep))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def __call__(
        self,
        forward: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        selected: Int[Tensor, "B n"],
        given: Given,
        merge: Callable[[Float[Tensor, "B n D"]], Float[Tensor, "B N D"]],
    ) -> Any:
        """The output of `forward` when `merge(fresh)` enters the head.

        Args:
            forward: the transformer's own forward.
            args: its positional arguments.
            kwargs: its keyword arguments.
            selected: tokens of the stream that the blocks see.
            given: the attention outputs.
            merge: from the selected tokens' features to all tokens'.
        """
        check_arguments(kwargs)
        pick = Picker(selected)
        entering, leaving = replacing(pick.enter), replacing(merge)
        handles: list[Any] = []
        originals = {name: site.attention for name, site in self.sites.items()}
        try:
            handles.append(self.first.register_forward_pre_hook(entering, with_kwargs=True))
            handles.append(self.head.register_forward_pre_hook(leaving, with_kwargs=True))
            for name, site in self.sites.items():
                rows = functools.partial(given, name, pick)
                stub = GivenAttention(site.layout, rows, selected.shape[1])
                site.block._modules[site.attribute] = stub
            return forward(*args, **kwargs)
        finally:
            for name, site in self.sites.items():
                site.block._modules[site.attribute] = originals[name]
            for handle in handles:
                handle.remove()

    def prove(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        """Check on this call that a random half of the tokens, computed alone, comes out the same.

        The attention outputs are those of the full run of the same call. Not bitwise, since a
        product of fewer rows may add in another order.

        Raises:
            UnsupportedHost: it does not, or the stream changes its tokens on the way.
        """
        check_arguments(kwargs)
        with self.capturing() as attention, _entering(self.first) as entered:
            with capturing(self.transformer, self.trunk, {"hidden"}) as found:
                forward(*args, **kwargs)
        hidden, kind = found["hidden"], type(self.transformer).__name__
        shapes = [tuple(stream.shape) for stream in entered]
        if shapes != [tuple(hidden.shape)] or hidden.ndim != 3:
            raise UnsupportedHost(
                f"{kind} enters its blocks with {shapes} and its head with {tuple(hidden.shape)}, "
                "expected one shape (batch, tokens, channels): the stream changes its tokens on "
                "the way. Use `forecasting`, which computes no single tokens."
            )
        generator = torch.Generator().manual_seed(0)
        order = torch.rand(hidden.shape[:2], generator=generator).argsort(1)
        half = order[:, : (hidden.shape[1] + 1) // 2].sort(1).values.to(hidden.device)
        fresh: list[Tensor] = []

        def merge(rows: Tensor) -> Tensor:
            fresh.append(rows)
            return hidden

        try:
            self(forward, args, kwargs, half, lambda name, pick: pick(attention[name]), merge)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            raise UnsupportedHost(
                f"{kind} does not run on a part of its tokens ({error}); use `forecasting`."
            ) from error
        check_rows(fresh[0], take(hidden, half), kind)


def check_rows(fresh: Float[Tensor, "B n D"], expected: Float[Tensor, "B n D"], kind: str) -> None:
    """Raise unless every row is the expected one, up to rounding."""
    tolerance = max(TOLERANCE, 8 * torch.finfo(expected.dtype).eps)
    same_shape = fresh.shape == expected.shape
    error = (fresh.float() - expected.float()).norm(dim=-1) if same_shape else torch.tensor(1.0)
    scale = expected.float().norm(dim=-1).clamp(min=1e-12)
    worst = float((error / scale).max())
    if not worst <= tolerance:  # also catches NaN
        raise UnsupportedHost(
            f"tokens of {kind} computed alone, with the attention outputs of the full run, differ "
            f"by up to {worst:.1e} of their size, expected at most {tolerance:.0e}: something "
            "besides self-attention mixes tokens. Use `forecasting`."
        )


def site_of(name: str, block: nn.Module) -> Site:
    """The self-attention of a block.

    Raises:
        UnsupportedHost: its class is not in the table, or it is compiled.
    """
    kind = type(block).__name__
    if kind not in SELF_ATTENTION:
        raise UnsupportedHost(
            f"block {name} is a {kind}; partial steps know the self-attention of "
            f"{', '.join(SELF_ATTENTION)} only. Use `forecasting`, or add a row to SELF_ATTENTION "
            "in integration/partial.py with a test."
        )
    if getattr(block, "_compiled_call_impl", None) is not None:
        raise UnsupportedHost(
            f"block {name} is compiled; partial steps exchange its attention, which would compile "
            "it again at every step. Use `forecasting`, or leave the blocks eager."
        )
    return Site(block, *SELF_ATTENTION[kind])


def check_arguments(kwargs: dict[str, Any]) -> None:
    """Raise for ControlNet residuals: they are added to the full stream between blocks."""
    found = [name for name, value in kwargs.items() if "controlnet" in name and value is not None]
    found = [name for name in found if not isinstance(kwargs[name], bool)]
    if found:
        raise UnsupportedHost(
            f"the transformer was called with {', '.join(found)}: residuals of all tokens do not "
            "fit a part of them. Use `forecasting` with a ControlNet."
        )


def _keep_joined(
    found: dict[str, Tensor], name: str, layout: str, module: nn.Module, args: tuple, output: Any
) -> None:
    if layout == "stream, text":
        pair = isinstance(output, tuple) and len(output) == 2
        joined = torch.cat([output[1], output[0]], 1) if pair else None
    else:
        joined = own(output) if isinstance(output, Tensor) else None
    if joined is None:
        raise UnsupportedHost(
            f"the attention of block {name} returned {type(output).__name__}, expected {layout}; "
            "an adapter that adds outputs to it (such as IP-Adapter) cannot be run on a part of "
            "the tokens."
        )
    found[name] = joined


@contextlib.contextmanager
def _entering(block: nn.Module) -> Iterator[list[Tensor]]:
    """The streams that enter a block in the forward inside."""
    streams: list[Tensor] = []

    def look(stream: Tensor) -> Tensor:
        streams.append(stream)
        return stream

    handle = block.register_forward_pre_hook(replacing(look), with_kwargs=True)
    try:
        yield streams
    finally:
        handle.remove()
