"""What must hold on a pipeline's own inputs before anything is forecast, and how long it holds.

Proven bit for bit on the first call: putting the tap back without running the trunk, stopping after
the first block, running the last block alone. A host where one of them fails is refused. What was
found holds from one attachment to the next for the same modules with the same hooks and methods,
called in the same form; weights do not enter it, since a tap that is put back runs the operations
it would have run.
"""

import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foreseer.integration.host.call import Call, prediction
from foreseer.integration.host.gate import FirstLook, LastBlock
from foreseer.integration.host.hook import (
    BEFORE_LAST,
    LAST_BLOCK,
    ReplacedMethod,
    TrunkSkipper,
    capturing,
    stream_tap,
)
from foreseer.integration.host.layout import Layout
from foreseer.integration.host.trunk import Trunk, TrunkTracer, UnsupportedHost, given_trunk

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
CALLED = ("forward", "_old_forward", "_compiled_call_impl")  # what stands on a module's instance


@dataclass
class HostFacts:
    """What is known of a transformer.

    Args:
        state: what it was like, see `state_of`.
        trunk: its trunk and head, once traced.
        proven: what was proven of it, each with the form of the call it was proven on.
        layouts: where the tokens of its head's input lie in the output.
    """

    state: tuple[Any, ...]
    trunk: Trunk | None = None
    proven: set[Hashable] = field(default_factory=set)
    layouts: dict[Hashable, Layout] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[nn.Module, HostFacts] = weakref.WeakKeyDictionary()


def facts_of(transformer: nn.Module) -> HostFacts:
    """What is known of a transformer; nothing where it is not what it was.

    Args:
        transformer: the host, with or without a session on it.
    """
    state, facts = (given_trunk(transformer), *state_of(transformer)), _known.get(transformer)
    if facts is None or facts.state != state:
        facts = _known[transformer] = HostFacts(state)
    return facts


def state_of(transformer: nn.Module) -> Iterator[Any]:
    """The modules of a transformer with what is called when they are, but for foreseer's own.

    Modules and functions are held weakly: one that took the place of another is never taken for it.
    """
    for name, module in transformer.named_modules():
        yield name, _held(module)
        values = vars(module)
        for each in CALLED:
            if each in values and not _is_own(module, values[each]):
                yield _held(values[each])
        for hooks in HOOKS:
            yield from map(_held, values[hooks].values())
        registry = values.get("_diffusers_hook")
        yield from map(_held, getattr(registry, "hooks", {}).values())
        yield from (_held(values[each]) for each in ("_hf_hook", "processor") if each in values)


def _below(value: Any) -> Any:
    """What a session of foreseer calls, where it has put itself in its place."""
    while isinstance(value, ReplacedMethod):
        value = value.method
    return value


def _is_own(module: nn.Module, value: Any) -> bool:
    """Whether a method is that of the module's class, under a session or not."""
    own = getattr(_below(value), "__func__", None)
    return own is not None and own is getattr(type(module), own.__name__, None)


def _held(value: Any) -> Any:
    value = _below(value)
    if hasattr(value, "__func__"):  # a bound method is a new object whenever it is asked for
        return _held(value.__func__), _held(value.__self__)
    try:
        return value if value is None else weakref.ref(value)
    except TypeError:  # of a class with slots: taken for another one whenever it is asked for
        return object()


ROWS_TOLERANCE = 1e-2  # products of another batch size round differently, in bfloat16 by 4e-3


@dataclass(frozen=True)
class Parts:
    """What runs parts of a host; None where nothing asked for it."""

    skipper: TrunkSkipper
    first_look: FirstLook | None
    last_block: LastBlock | None

    @classmethod
    def of(cls, host: nn.Module, trunk: Trunk, taps: set[str], probe: str | None) -> "Parts":
        """What a run asks for, see `prove`."""
        return cls(
            TrunkSkipper(host, trunk),
            FirstLook(host, trunk, probe) if probe is not None else None,
            LastBlock(host, trunk) if taps & {LAST_BLOCK, BEFORE_LAST} else None,
        )


def prove(call: Call, taps: set[str], probe: str | None) -> tuple[Trunk, Parts]:
    """Find the trunk and check that what a run asks for is exact.

    Args:
        call: the call to check it on.
        taps: taps the run captures, `last_block` where it has forecasts checked.
        probe: what it looks at in the first block; None for nothing.

    Raises:
        UnsupportedHost: the trunk was not found, or something is not exact.
    """
    host, forward, args, kwargs = call.transformer, call.forward, call.args, call.kwargs
    with TrunkTracer(host) as tracer:
        call.run()
    trunk = tracer.trunk()
    parts = Parts.of(host, trunk, taps, probe)
    skipper, first_look, last_block = parts.skipper, parts.first_look, parts.last_block
    streams = {LAST_BLOCK} if last_block is not None else set()
    with capturing(host, trunk, {"hidden"} | taps | streams) as found:
        expected = prediction(call.run())
    if "hidden" not in found:
        raise UnsupportedHost(
            f"the head {trunk.head!r} of {type(host).__name__} was not called with a tensor; its "
            "row in integration/host/trunk.py names another module."
        )
    check_batch_axis(call, found["hidden"], expected)
    replayed = skipper(forward, args, kwargs, lambda entering: found["hidden"])
    check_same(call, expected, replayed, f"replaying the head input ({trunk.head})")
    if "residual" in taps:
        check_residual(call, found["trunk_in"], skipper)
    if last_block is not None:
        inputs, came = [found[stream_tap(i)] for i in range(len(trunk.streams))], []

        def entering_last(streams: list[Tensor]) -> list[Tensor]:
            came.extend(streams)
            return inputs

        replayed = last_block(forward, args, kwargs, entering_last)
        if BEFORE_LAST in taps:
            check_before_last(call, found["trunk_in"], came, inputs)
        check_same(call, expected, replayed, "running the last block on its own input")
    if first_look is not None:
        for judge in (lambda seen: True, lambda seen: False):
            replayed, _ = first_look(forward, args, kwargs, judge, lambda entering: found["hidden"])
            check_same(call, expected, replayed, "looking at the first block")
        first_look.entered = None
    return trunk, parts


def check_batch_axis(call: Call, hidden: Tensor, expected: Tensor) -> None:
    """Raise unless a feature's first axis counts samples, as its parts by branch need.

    Raises:
        UnsupportedHost: it counts something else.
    """
    if len(hidden) != len(expected):
        raise UnsupportedHost(
            f"the head of {type(call.transformer).__name__} is given a tensor of shape "
            f"{tuple(hidden.shape)} for {len(expected)} samples; expected samples first. Use the "
            "`output` tap, or add a row with its batch_axis to integration/host/trunk.py."
        )


def check_residual(call: Call, trunk_in: Tensor, skipper: TrunkSkipper) -> None:
    """Raise unless what enters the first block reaches the head when the blocks are skipped.

    Only then is the head's input of another step that tensor plus a residual.

    Raises:
        UnsupportedHost: something else does, as where refiner blocks come before the trunk.
    """
    came: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        came.append(tensor)
        return tensor

    skipper(call.forward, call.args, call.kwargs, keep)
    if came[0].shape != trunk_in.shape or not torch.equal(came[0], trunk_in):
        raise UnsupportedHost(
            f"what enters the first block of {type(call.transformer).__name__} "
            f"{tuple(trunk_in.shape)} is not what reaches its head without the blocks "
            f"{tuple(came[0].shape)}, so it has no `residual` tap; use `hidden` or `output`."
        )


def check_before_last(
    call: Call, trunk_in: Tensor, came: list[Tensor], inputs: list[Tensor]
) -> None:
    """Raise unless one stream reaches the last block, and what entered the first without the rest.

    Raises:
        UnsupportedHost: there are several streams, or something else reaches it.
    """
    same = len(inputs) == 1 and came[0].shape == trunk_in.shape == inputs[0].shape
    if not same or not torch.equal(came[0], trunk_in):
        raise UnsupportedHost(
            f"the last block of {type(call.transformer).__name__} takes {len(inputs)} streams, the "
            f"first {tuple(inputs[0].shape)}, and without the blocks before it is not given the "
            f"{tuple(trunk_in.shape)} that enters the first one, so it has no `before_last` tap; "
            "use `residual`, `hidden` or `output`."
        )


def check_same(call: Call, expected: Tensor, output: Any, what: str) -> None:
    """Raise unless an output is bit for bit the expected one."""
    found = prediction(output)
    if not torch.equal(expected.nan_to_num(), found.nan_to_num()):
        worst = float((expected - found).abs().max())
        raise UnsupportedHost(
            f"{what} of {type(call.transformer).__name__} changes its output by up to "
            f"{worst:.2e}, expected bitwise equality; use the `output` tap."
        )


def check_rows(call: Call, expected: Tensor) -> None:
    """Raise unless a row computed alone is what it was in its batch, up to rounding.

    Args:
        call: a call of several rows.
        expected: its output.

    Raises:
        UnsupportedHost: the row differs.
    """
    rows = [len(expected) - 1]
    alone = prediction(call.rows(rows, len(expected)).run())
    if alone.shape != expected[rows].shape or not torch.allclose(
        alone.float(), expected[rows].float(), rtol=ROWS_TOLERANCE, atol=ROWS_TOLERANCE
    ):
        raise UnsupportedHost(
            f"a row of a batch of {type(call.transformer).__name__} computed alone differs from "
            "what it was in the batch, so refused samples cannot be computed on their own; draw "
            "one sample per call."
        )
