"""Forecasts whose most telling tokens are computed: `forecasting(pipe, predictor, tokens=policy)`.

Everything outside self-attention acts on tokens one by one, so the rows of the selected tokens
come out as in a full run whenever the attention outputs do. Recomputing attention on a part of the
tokens is known to be worse than keeping its output (a finding of ClusCa's and DuCa's authors).

Shapes: B samples (rows of the stream's batch), M = branches * B rows of a call, N tokens of the
stream, T text tokens beside it, n selected tokens, D channels.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foreseer.integration.forecaster import Forecaster
from foreseer.integration.histories import Histories, most_bytes
from foreseer.integration.host.call import Call
from foreseer.integration.host.expert import Expert
from foreseer.integration.host.hook import replacing
from foreseer.integration.host.hosts import transformer_of
from foreseer.integration.host.taps import block_list, capturing, own
from foreseer.integration.host.trunk import Trunk, UnsupportedHost
from foreseer.integration.observers import CallRecord, Observer, Source, StepRecord
from foreseer.integration.runner import Answer, Runner
from foreseer.predictors.base import Grid, History, LinearPredictor, Step
from foreseer.predictors.rules import Reuse
from foreseer.predictors.tokens import TokenPolicy, take

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
        self.sites = sites_of(transformer, trunk)
        self.first = next(iter(self.sites.values())).block

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
        with self.capturing() as attention, entering(self.first) as entered:
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


def sites_of(transformer: nn.Module, trunk: Trunk) -> dict[str, Site]:
    """The self-attention of every block, in the order in which they run.

    Raises:
        UnsupportedHost: a block's class has no row in `SELF_ATTENTION`, or is compiled.
    """
    return {
        f"{name}.{i}": site_of(f"{name}.{i}", block)
        for name in trunk.block_lists
        for i, block in enumerate(block_list(transformer, name))
    }


def site_of(name: str, block: nn.Module) -> Site:
    """The self-attention of a block.

    Raises:
        UnsupportedHost: its class is not in the table, or it is compiled.
    """
    kind = type(block).__name__
    if kind not in SELF_ATTENTION:
        raise UnsupportedHost(
            f"block {name} is a {kind}; token policies know the self-attention of "
            f"{', '.join(SELF_ATTENTION)} only. Use `forecasting`, or add a row to SELF_ATTENTION "
            "in integration/token_runner.py with a test."
        )
    if getattr(block, "_compiled_call_impl", None) is not None:
        raise UnsupportedHost(
            f"block {name} is compiled; token policies exchange its attention, which would compile "
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


def grid_of(call: CallRecord, num_tokens: int) -> Grid:
    """How the tokens of the stream lie in the picture.

    Raises:
        UnsupportedHost: it is not known, or the stream has tokens that are not of the picture.
    """
    assert call.layout is not None  # it was asked for
    grid, first = call.layout.grid, call.layout.tokens[0]
    in_order = torch.equal(first, torch.arange(num_tokens, device=first.device))
    if grid is None or math.prod(grid) != num_tokens or not in_order:
        raise UnsupportedHost(
            f"the {num_tokens} tokens of the stream lie on the grid {grid}, expected frames, "
            "height and width whose product they are, in reading order: the policy goes by "
            "neighbours in the picture. Use one that does not, such as RandomPolicy."
        )
    return grid


@contextlib.contextmanager
def entering(block: nn.Module) -> Iterator[list[Tensor]]:
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


class TokenRunner(Runner, Observer):
    """Compute a policy's tokens at forecast steps, on forecast attention outputs.

    The forecaster's histories are never altered.

    Args:
        pipe: a pipeline with one transformer of known blocks.
        source: the forecaster of the hidden tap.
        policy: which tokens are computed, and what follows for the others.
        attention_rule: forecasts the attention outputs that the computed tokens need; None reuses
            the newest anchor's.
    """

    def __init__(
        self,
        pipe: Any,
        source: Forecaster,
        policy: TokenPolicy,
        attention_rule: LinearPredictor | None = None,
    ) -> None:
        transformer_of(pipe)  # one, no experts
        self.source = source
        self.policy = policy
        self.wants_layout = policy.wants_grid
        self.attention_rule = Reuse() if attention_rule is None else attention_rule
        self.attention = Histories(self.attention_rule.window)  # by block
        self.trunk: PartialTrunk | None = None

    def prove(self, expert: Expert, call: Call) -> None:
        """Prove the tap, then that tokens can be computed alone."""
        super().prove(expert, call)
        expert.proven = False  # until the second proof, too, has passed
        assert expert.trunk is not None  # just traced
        self.trunk = PartialTrunk(expert.transformer, expert.trunk)
        proof = ("tokens", call.form)
        if proof not in expert.facts.proven:
            self.trunk.prove(call.forward, call.args, call.kwargs)
            expert.facts.proven.add(proof)
        expert.proven = True

    def run(self, expert: Expert, call: Call, step: Step) -> Answer:
        """Run the network and capture its attention outputs, too."""
        assert self.trunk is not None  # proven before the first call is run
        with self.trunk.capturing() as attention:
            answer = super().run(expert, call, step)
        return Answer(answer.output, answer.taps, attention=attention)

    def forecast(self, expert: Expert, call: Call, step: Step, source: Source) -> Answer:
        """Put a forecast in the network's place, with the policy's tokens computed."""
        selected = self.select(step)
        if selected is None or self.trunk is None:
            return super().forecast(expert, call, step, source)
        feature = source.forecast(step)

        def given(block: str, pick: Pick) -> Tensor:
            return self.forecast_attention(step, block, pick)

        def merge(fresh: Tensor) -> Tensor:
            return self.merge(step, feature, fresh, selected)

        output = self.trunk(call.forward, call.args, call.kwargs, selected, given, merge)
        return Answer(output, None, feature, partial=True)

    def merge(
        self,
        step: Step,
        feature: Float[Tensor, "M N D"],
        fresh: Float[Tensor, "M n D"],
        selected: Int[Tensor, "M n"],
    ) -> Float[Tensor, "M N D"]:
        """What enters the head: the policy's."""
        return self.policy.merge(feature, fresh, selected, step.branches)

    def select(self, step: Step) -> Int[Tensor, "M n"] | None:
        """The tokens of a call to compute, the same in all branches; None for a pure forecast."""
        found = self.source.histories.at(step)
        assert found is not None  # only known calls are forecast
        (history,) = found[self.source.tap]
        if not self.policy.is_partial(step.index - history.steps[-1]):
            return None
        return self.policy.select(step.index).repeat(len(step.branches), 1)

    def forecast_attention(self, step: Step, block: str, pick: Pick) -> Float[Tensor, "M rows D"]:
        """The rule's forecast of the picked rows of a block's attention output."""
        found = self.attention.at(step)
        assert found is not None  # kept with the features
        (kept,) = found[block]
        rows = [pick(feature) for feature in kept.features]
        forecast: Tensor = self.attention_rule(
            History(kept.window, kept.steps, kept.sigmas, rows), step
        )
        return forecast

    def on_step(self, record: StepRecord) -> None:
        """Keep the attention outputs of an anchor and show it to the policy, all branches of it."""
        anchor: list[Tensor] = []
        for call in record.calls:
            if call.taps is None:
                continue
            found = None if call.starts else self.attention.at(call.step)
            if found is None:
                found = self.attention.start(call.step)
            for block, output in call.attention.items():
                (history,) = found.setdefault(block, [History(self.attention.window)])
                history.push(call.step, output)
            anchor.extend(call.taps["hidden"].chunk(len(call.step.branches)))
        if anchor:
            if record.index == 0:
                groups = record.calls[0].step.groups
                own = None if groups is None else groups[: len(anchor[0])]
                self.policy.prepare(own, self.source.anchors, len(record.sigmas))
                if self.policy.wants_grid:
                    self.policy.lay_out(grid_of(record.calls[0], anchor[0].shape[1]))
            self.policy.observe(torch.cat(anchor, -1))

    def forget(self) -> None:
        """Let go of all attention outputs and clusters."""
        self.policy.reset()
        self.attention.clear()

    def state_bytes(self) -> int:
        """Bytes of all attention histories and of the policy."""
        return self.attention.state_bytes() + self.policy.state_bytes()

    def most_bytes(self, index: int, num_steps: int) -> int:
        """Bytes at most of all attention histories and of the policy."""
        to_come = self.source.schedule.to_come(index, num_steps)
        return self.policy.most_bytes(to_come) + sum(
            most_bytes(history, to_come if history.steps[-1] == index else 0)
            for history in self.attention
        )
