"""Computed steps whose self-attention runs on a part of the tokens, under a `PruningPolicy`.

A block's attention module is exchanged for the length of a call by one that asks the original on
the kept tokens, with their positions, and fills in the others. Everything else runs on all tokens.

Shapes: R rows of a call, B samples, N tokens of the stream, T text tokens beside it, k kept tokens,
C channels.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foreseer.integration.forecaster import Forecaster
from foreseer.integration.host.call import Call
from foreseer.integration.host.expert import Expert
from foreseer.integration.host.taps import capturing
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.integration.observers import StepRecord
from foreseer.integration.runner import Answer, Runner
from foreseer.integration.token_runner import (
    TokenRunner,
    check_rows,
    entering,
    sites_of,
)
from foreseer.predictors.base import LinearPredictor, Step
from foreseer.predictors.pruning_policy import Choice, PruningPolicy
from foreseer.predictors.tokens import take

Outputs = tuple[Tensor | None, Tensor]
"""What an attention gives for the text, `(R, T, C)`, and for tokens of the stream, `(R, n, C)`."""


class AttentionCall:
    """One call of a block's self-attention, which can be asked about a part of the stream.

    Args:
        name: of the block.
        attention: its module.
        layout: what it takes and returns, see `SELF_ATTENTION`.
        args: positional arguments of the call.
        kwargs: its keyword arguments.
        num_tokens: N.

    Raises:
        UnsupportedHost: it is given something that belongs to all tokens and cannot be taken apart.
    """

    def __init__(
        self,
        name: str,
        attention: nn.Module,
        layout: str,
        args: tuple,
        kwargs: dict[str, Any],
        num_tokens: int,
    ) -> None:
        self.name, self.attention, self.layout = name, attention, layout
        self.rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        joined = args[0] if args else kwargs["hidden_states"]
        mixed = self.rest.get("encoder_hidden_states") is not None and layout != "stream, text"
        if len(args) > 1 or mixed or self.rest.get("attention_mask") is not None:
            raise UnsupportedHost(
                f"the attention of block {name} is called with a mask, with what else it attends "
                "to, or with positional arguments, expected the stream alone: these cannot be cut "
                "to the kept tokens. Leave tokens= out."
            )
        self.joined: Tensor = joined
        self.num_text = joined.shape[1] - num_tokens  # 0 where the text is beside it

    @property
    def stream(self) -> Float[Tensor, "R N C"]:
        """What enters of the stream."""
        return self.joined[:, self.num_text :]

    def __call__(self, kept: Int[Tensor, "R k"] | None) -> Outputs:
        """The module's own outputs.

        Args:
            kept: tokens of the stream that take part; None for all, in one untouched call.
        """
        if kept is None:
            return self._split(self.attention(self.joined, **self.rest))
        positions = self.rest.get("image_rotary_emb")
        if positions is None or bool((kept == kept[:1]).all()):
            return self._ask(slice(None), kept)
        text = self.joined.new_empty(len(kept), self._texts(), self.joined.shape[2])
        stream = self.joined.new_empty(*kept.shape, self.joined.shape[2])
        for choice in kept.unique(dim=0):  # positions are the same for all rows of a call
            rows = (kept == choice).all(1).nonzero().flatten()
            own_text, own = self._ask(rows, kept[rows])
            stream[rows] = own
            if own_text is not None:
                text[rows] = own_text
        return (text if self._texts() else None), stream

    def _texts(self) -> int:
        beside = self.rest.get("encoder_hidden_states")
        return self.num_text if beside is None else int(beside.shape[1])

    def _ask(self, rows: slice | Tensor, kept: Int[Tensor, "r k"]) -> Outputs:
        """The outputs of rows, which keep the same tokens where these have positions."""
        joined, rest, texts = self.joined[rows], dict(self.rest), self._texts()
        part = take(joined[:, self.num_text :], kept)
        if self.num_text:
            part = torch.cat([joined[:, : self.num_text], part], 1)
        if rest.get("encoder_hidden_states") is not None:
            rest["encoder_hidden_states"] = rest["encoder_hidden_states"][rows]
        if (positions := rest.get("image_rotary_emb")) is not None:
            text = torch.arange(texts, device=kept.device)
            places = torch.cat([text, kept[0] + texts])
            rest["image_rotary_emb"] = tuple(each[places.to(each.device)] for each in positions)
        return self._split(self.attention(part, **rest))

    def _split(self, output: Any) -> Outputs:
        pair = isinstance(output, tuple) and len(output) == 2
        if self.layout == "stream, text" and pair:
            return output[1], output[0]
        if self.layout == "stream, text" or not isinstance(output, Tensor):
            raise UnsupportedHost(
                f"the attention of block {self.name} returned {type(output).__name__}, expected "
                f"{self.layout}: an adapter that adds outputs to it (such as IP-Adapter) cannot be "
                "run on a part of the tokens. Leave tokens= out."
            )
        if not self.num_text:
            return None, output
        return output[:, : self.num_text], output[:, self.num_text :]

    def output(self, text: Tensor | None, stream: Tensor) -> Any:
        """Outputs in the form in which the module returns them."""
        if self.layout == "stream, text":
            return stream, text
        return stream if text is None else torch.cat([text, stream], 1)


Attend = Callable[[AttentionCall], Outputs]


class AttendedBy(nn.Module):
    """Stands in for a block's self-attention and has `attend` answer.

    Args:
        name: of the block.
        attention: its module.
        layout: see `SELF_ATTENTION`.
        attend: gives the outputs of a call, those of the stream for all its tokens.
        entered: what has entered the first block in this forward.
    """

    def __init__(
        self, name: str, attention: nn.Module, layout: str, attend: Attend, entered: list[Tensor]
    ) -> None:
        super().__init__()
        self.about = name, attention, layout  # a tuple, so that the module is no child of this one
        self.attend = attend
        self.entered = entered

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `attend` says, in the form of the module replaced."""
        call = AttentionCall(*self.about, args, kwargs, self.entered[-1].shape[1])
        return call.output(*self.attend(call))


class PruningRunner(TokenRunner):
    """Run the network with pruned self-attention; forecasts are the source's alone.

    Args:
        pipe: a pipeline with one transformer of known blocks.
        source: the forecaster of the hidden tap.
        policy: which tokens take part.
        attention_rule: forecasts the attention outputs of tokens that do not; None repeats them.
    """

    policy: PruningPolicy

    def __init__(
        self,
        pipe: Any,
        source: Forecaster,
        policy: PruningPolicy,
        attention_rule: LinearPredictor | None = None,
    ) -> None:
        super().__init__(pipe, source, policy, attention_rule)
        self.taps = frozenset({"output"} if policy.dynamics else ())
        self.choices: dict[str, Choice] = {}  # of the step in progress, by block

    def prove(self, expert: Expert, call: Call) -> None:
        """Prove the tap, then that an attention does not go by the order of its tokens."""
        Runner.prove(self, expert, call)
        expert.proven = False  # until the second proof, too, has passed
        assert expert.trunk is not None  # just traced
        self.sites = sites_of(expert.transformer, expert.trunk)
        proof = ("pruning", call.form)
        if proof not in expert.facts.proven:
            self._prove_order(expert, call)
            expert.facts.proven.add(proof)
        expert.proven = True

    def _prove_order(self, expert: Expert, call: Call) -> None:
        """Check that tokens in reverse order come out of every attention as they are."""
        assert expert.trunk is not None
        hidden = []
        for attend in (_whole, _reversed):
            with capturing(expert.transformer, expert.trunk, {"hidden"}) as found:
                with self.attending(attend):
                    call.run()
            hidden.append(found["hidden"])
        check_rows(hidden[1], hidden[0], type(expert.transformer).__name__)

    @contextlib.contextmanager
    def attending(self, attend: Attend) -> Iterator[None]:
        """Have every self-attention of the forward inside answered by `attend`."""
        originals = {name: site.attention for name, site in self.sites.items()}
        first = next(iter(self.sites.values())).block
        try:
            with entering(first) as entered:
                for name, site in self.sites.items():
                    stub = AttendedBy(name, originals[name], site.layout, attend, entered)
                    site.block._modules[site.attribute] = stub
                yield
        finally:
            for name, site in self.sites.items():
                site.block._modules[site.attribute] = originals[name]

    def run(self, expert: Expert, call: Call, step: Step) -> Answer:
        """Run the network; a call of which nothing is known yet in full."""
        pruned = self.source.knows(step) and self.policy.num_pruned(step.index)
        if not pruned and self.policy.innovation.forgets:
            return Runner.run(self, expert, call, step)
        found: dict[str, Tensor] = {}
        attend = functools.partial(self._pruned if pruned else self._kept, step, found)
        with self.attending(attend):
            answer = Runner.run(self, expert, call, step)
        return Answer(answer.output, answer.taps, attention=found)

    def _kept(self, step: Step, found: dict[str, Tensor], call: AttentionCall) -> Outputs:
        """An attention of all tokens, whose output is kept."""
        text, found[call.name] = call(None)
        return text, found[call.name]

    def _pruned(self, step: Step, found: dict[str, Tensor], call: AttentionCall) -> Outputs:
        """An attention of the kept tokens."""
        branches = len(step.branches)
        place = call.name if self.policy.every_block else ""
        if place not in self.choices:
            rows = call.stream[: len(call.stream) // branches]
            self.choices[place] = self.policy.choose(rows, step.index)
        choice = self.choices[place].repeat(branches)
        text, fresh = call(choice.kept)
        own = None
        if not self.policy.innovation.forgets:
            own = self.forecast_attention(step, call.name, _all)
        stream = self.recover(step, call, own, fresh, choice)
        if own is not None:
            found[call.name] = stream
        return text, stream

    def recover(
        self,
        step: Step,
        call: AttentionCall,
        own: Float[Tensor, "R N C"] | None,
        fresh: Float[Tensor, "R k C"],
        choice: Choice,
    ) -> Float[Tensor, "R N C"]:
        """The output of all tokens: the policy's."""
        return self.policy.recover(own, fresh, choice, step.branches, step.index)

    def on_step(self, record: StepRecord) -> None:
        """Keep the attention outputs and the network's own, and forget the step's choices."""
        super().on_step(record)
        self.choices = {}
        first = record.calls[0] if record.calls else None
        if first is None or first.taps is None or not self.policy.dynamics:
            return
        assert first.layout is not None  # it was asked for
        output = first.taps["output"]
        rows = output[: len(output) // len(first.step.branches)]
        self.policy.look(first.layout.pick(rows))

    def forget(self) -> None:
        """Let go of choices, too."""
        super().forget()
        self.choices = {}


def _all(rows: Tensor) -> Tensor:
    return rows


def _whole(call: AttentionCall) -> Outputs:
    return call(None)


def _reversed(call: AttentionCall) -> Outputs:
    count = call.stream.shape[1]
    order = torch.arange(count - 1, -1, -1, device=call.stream.device)
    text, stream = call(order.repeat(len(call.stream), 1))
    return text, stream.flip(1)
