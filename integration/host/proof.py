"""What must hold on a pipeline's own inputs before anything is forecast, and how long it holds.

Proven bit for bit on the first call: putting the tap back without running the trunk, stopping after
the first block, running the outer blocks alone. A host where one of them fails is refused. What was
found holds from one attachment to the next for the same modules with the same hooks and methods,
called in the same form; weights do not enter it, since a tap that is put back runs the operations
it would have run.
"""

import weakref
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foreseer.integration.host.call import Call, prediction
from foreseer.integration.host.gate import FirstLook
from foreseer.integration.host.hook import ReplacedMethod, TrunkSkipper, refuse_additions
from foreseer.integration.host.layout import Layout
from foreseer.integration.host.outer import OuterBlocks, OuterLadder, outer_part
from foreseer.integration.host.taps import (
    LAST_BLOCK,
    captured_streams,
    capturing,
    front_tap,
    outer_blocks,
)
from foreseer.integration.host.trunk import (
    MIDDLE,
    Trunk,
    TrunkTracer,
    UnsupportedHost,
    given_trunk,
)

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
    outer: dict[str, OuterBlocks | OuterLadder]

    @classmethod
    def of(cls, host: nn.Module, trunk: Trunk, taps: set[str], probe: str | None) -> "Parts":
        """What a run asks for, see `prove`."""
        return cls(
            TrunkSkipper(host, trunk),
            FirstLook(host, trunk, probe) if probe is not None else None,
            {tap: outer_part(host, trunk, tap) for tap in sorted(taps) if outer_blocks(tap)},
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
    if hasattr(host, MIDDLE) or any(map(outer_blocks, taps)):
        refuse_additions(host, args, kwargs)  # before a forward takes adapters out of their list
    with TrunkTracer(host) as tracer:
        call.run()
    trunk = tracer.trunk()
    parts = Parts.of(host, trunk, taps, probe)
    skipper, first_look = parts.skipper, parts.first_look
    with capturing(host, trunk, {"hidden"} | taps) as found:
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
    for tap, part in parts.outer.items():
        check_outer(call, tap, part, found, expected)
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


def check_outer(
    call: Call,
    tap: str,
    part: OuterBlocks | OuterLadder,
    found: dict[str, Tensor],
    expected: Tensor,
) -> None:
    """Raise unless the outer blocks alone, on what was captured between them, are exact.

    Where what others add is forecast, what comes from the front must be what left it in the full
    run: only then is what enters the blocks at the back of another step that plus the forecast.

    Args:
        call: the call.
        tap: the tap.
        part: what runs the outer blocks.
        found: what was captured of the full run.
        expected: its output.

    Raises:
        UnsupportedHost: they are not.
    """
    came: list[Tensor] = []
    inputs = [found[name] for name in captured_streams(found, tap)]
    if isinstance(part, OuterLadder):
        inputs = [found[tap]]

    def entering(streams: list[Tensor]) -> list[Tensor]:
        came.extend(streams)
        return inputs

    try:
        replayed = part(call.forward, call.args, call.kwargs, entering)
    except Exception as error:
        raise UnsupportedHost(
            f"{type(call.transformer).__name__} does not run without the blocks between those of "
            f"the tap {tap!r} ({type(error).__name__}: {error}); use the `hidden` or `output` tap."
        ) from error
    if isinstance(part, OuterBlocks) and tap != LAST_BLOCK:
        left = [found[name] for name in captured_streams(found, tap, front_tap)]
        alike = [len(left) == len(came), *map(torch.equal, left, came)]
        if not all(alike) or tap not in found:
            raise UnsupportedHost(
                f"the blocks between those of the tap {tap!r} of {type(call.transformer).__name__} "
                f"are given {_shapes(left)} and hand on {_shapes(inputs)}, and without them "
                f"{_shapes(came)} comes through, so what they add is no tensor of its own; use "
                "another deep tap, `residual`, `hidden` or `output`."
            )
    check_same(call, expected, replayed, f"running the outer blocks on their own inputs ({tap})")


def _shapes(tensors: Sequence[Tensor]) -> str:
    return " and ".join(str(tuple(each.shape)) for each in tensors) or "nothing"


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
