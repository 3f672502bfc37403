"""What must hold on a pipeline's own inputs before anything is forecast on its transformer.

Proven bit for bit on the first call: putting the tap back without running the trunk, stopping after
the first block, running the last block alone. A host where one of them fails is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adaptive import take_rows
from .gate import FirstLook, LastBlock
from .hook import LAST_BLOCK, TrunkSkipper, capturing
from .host import Trunk, TrunkTracer, UnsupportedHost

ROWS_TOLERANCE = 1e-2  # products of another batch size round differently, in bfloat16 by 4e-3


@dataclass(frozen=True)
class Call:
    """One call of a transformer, to be repeated.

    Args:
        transformer: the host.
        forward: its own forward.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """

    transformer: nn.Module
    forward: Callable
    args: tuple
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Proven:
    """The facts of a host and what runs parts of it; None where nothing asked for it."""

    trunk: Trunk
    skipper: TrunkSkipper
    first_look: FirstLook | None
    last_block: LastBlock | None


def prove(call: Call, taps: set[str], probe: str | None) -> Proven:
    """Find the trunk and check that what a controller asks for is exact.

    Args:
        call: the call to check it on.
        taps: taps the controller captures, `last_block` where it has forecasts checked.
        probe: what it looks at in the first block; None for nothing.

    Raises:
        UnsupportedHost: the trunk was not found, or something is not exact.
    """
    host, forward, args, kwargs = call.transformer, call.forward, call.args, call.kwargs
    with TrunkTracer(host) as tracer:
        forward(*args, **kwargs)
    trunk = tracer.trunk()
    last_block = LastBlock(host, trunk) if LAST_BLOCK in taps else None
    with capturing(host, trunk, {"hidden"} | taps) as found:
        expected = output_tensor(forward(*args, **kwargs))
    skipper = TrunkSkipper(host, trunk)
    replayed = skipper(forward, args, kwargs, lambda entering: found["hidden"])
    check_same(call, expected, replayed, f"replaying the head input ({trunk.head})")
    if last_block is not None:
        inputs = [found[f"{LAST_BLOCK}.{i}"] for i in range(len(trunk.streams))]
        replayed = last_block(forward, args, kwargs, inputs, lambda entering: entering)
        check_same(call, expected, replayed, "running the last block on its own input")
    first_look = FirstLook(host, trunk, probe) if probe is not None else None
    if first_look is not None:
        for judge in (lambda seen: True, lambda seen: False):
            replayed, _ = first_look(forward, args, kwargs, judge, lambda entering: found["hidden"])
            check_same(call, expected, replayed, "looking at the first block")
    return Proven(trunk, skipper, first_look, last_block)


def check_same(call: Call, expected: Tensor, output: Any, what: str) -> None:
    """Raise unless an output is bit for bit the expected one."""
    found = output_tensor(output)
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
    args, kwargs = take_rows((call.args, call.kwargs), rows, len(expected))
    alone = output_tensor(call.forward(*args, **kwargs))
    if alone.shape != expected[rows].shape or not torch.allclose(
        alone.float(), expected[rows].float(), rtol=ROWS_TOLERANCE, atol=ROWS_TOLERANCE
    ):
        raise UnsupportedHost(
            f"a row of a batch of {type(call.transformer).__name__} computed alone differs from "
            "what it was in the batch, so refused samples cannot be computed on their own; draw "
            "one sample per call."
        )


def output_tensor(output: Any) -> Tensor:
    """The prediction in a transformer's return value.

    Raises:
        UnsupportedHost: the return value is neither a 1-tuple nor has a tensor `sample`.
    """
    sample = output[0] if isinstance(output, tuple) and len(output) == 1 else output
    sample = getattr(sample, "sample", sample)
    if not isinstance(sample, Tensor):
        raise UnsupportedHost(
            f"the transformer returned {type(output).__name__}, expected a tuple of one tensor or "
            "an output with a `sample` tensor."
        )
    return sample
