"""The taps of a network: what is captured of a forward as it runs, and under which names.

Shapes: B rows, N tokens, D channels.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from foreseer.checkpoints.spec import DEEP_TAP
from foreseer.integration.host.trunk import (
    ObservedBlocks,
    Trunk,
    exchange,
    first_tensor,
    stream_of,
)

LAST_BLOCK = "last_block"
BEFORE_LAST = "before_last"


@contextlib.contextmanager
def capturing(transformer: nn.Module, trunk: Trunk | None, taps: set[str]) -> Iterator[dict]:
    """Collect the given trunk taps of the forward run inside; yields a dict filled by its end.

    The blocks carry no hook: where one is looked at, its list is exchanged for the call.

    Args:
        transformer: the host.
        trunk: its facts; None when only `output` is tapped.
        taps: any of `hidden`, `residual`, `before_last` (what enters the last block less what
            enters the first), `deep.<d>` (what the blocks between the first d and the last d
            add, text and picture along the tokens; on a U-Net what enters the last d up blocks),
            `blocks.<i>`, `last_block` (its input streams, one entry `last_block.<i>` each);
            `output` is read off the call's result.
    """
    found: dict[str, Tensor] = {}
    if trunk is None:
        yield found
        return
    handles: list[Any] = []
    if taps & {"hidden", "residual"}:
        head = transformer.get_submodule(trunk.head)
        keep = functools.partial(_keep, found, "hidden", trunk.batch_axis)
        handles.append(head.register_forward_pre_hook(keep, with_kwargs=True))
    lists: dict[str, nn.ModuleList] = {}
    tapped = _BlockTaps(transformer, trunk, taps, found)
    if taps - {"hidden", "output"}:
        lists = {name: block_list(transformer, name) for name in trunk.block_lists}
        seen = {n: ObservedBlocks(b, n, tapped.entering, tapped.leaving) for n, b in lists.items()}
        exchange(transformer, seen)
    try:
        yield found
    finally:
        exchange(transformer, lists)
        for handle in handles:
            handle.remove()
    if {"hidden", "trunk_in"} <= found.keys():
        if found["hidden"].shape == found["trunk_in"].shape:  # else the proof says what is wrong
            found["residual"] = found["hidden"] - found["trunk_in"]
    for tap in tapped.between:
        added = tapped.added(tap)
        if added is not None:  # else the proof says what is wrong
            found[tap] = added


class _BlockTaps:
    """What is taken of the blocks as they run.

    Args:
        transformer: the host.
        trunk: its facts.
        taps: see `capturing`.
        found: where it is put.
    """

    def __init__(
        self, transformer: nn.Module, trunk: Trunk, taps: set[str], found: dict[str, Tensor]
    ) -> None:
        self.trunk = trunk
        self.axis = trunk.batch_axis
        self.found = found
        names = block_taps(transformer, trunk)
        self.blocks = list(names.values())
        self.outputs: dict[str, list[str]] = {}  # taps that are what a block returns
        for tap in taps & names.keys():
            self.outputs.setdefault(names[tap], []).append(tap)
        self.first = self.blocks[0] if "residual" in taps else None
        self.inputs: dict[str, list[Callable[[int], str]]] = {}  # and those of what enters it
        self.between: list[str] = []
        for tap in taps:
            ends = outer_blocks(tap)
            if ends is not None and trunk.middle:
                self.outputs.setdefault(self.blocks[-1 - ends[1]], []).append(tap)
            elif ends is not None:
                self._between(tap, *ends)

    def _between(self, tap: str, front: int, back: int) -> None:
        front += self.trunk.start if front else 0
        if front + back >= len(self.blocks):
            return  # which the proof refuses
        entered = self.inputs.setdefault(self.blocks[-back], [])
        entered.append(functools.partial(stream_tap, tap))
        if tap != LAST_BLOCK:
            self.between.append(tap)
            left = self.inputs.setdefault(self.blocks[front], [])
            left.append(functools.partial(front_tap, tap))

    def entering(self, block: str, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keep what enters some blocks."""
        if block == self.first and (tensor := first_tensor(args, kwargs)) is not None:
            self.found["trunk_in"] = own(tensor.transpose(0, self.axis))
        if block in self.inputs:
            number = self.blocks.index(block)
            places = self.trunk.entering(number)
            values = [args[p] if isinstance(p, int) else kwargs[p] for p in places]
            if number == 0 and (tensor := first_tensor(args, kwargs)) is not None:
                values = [tensor]
            for named in self.inputs[block]:
                self.found |= {named(i): own(value) for i, value in enumerate(values)}

    def leaving(self, block: str, output: Any) -> None:
        """Keep the stream after a block."""
        if block in self.outputs and (stream := stream_of(output, self.trunk.place)) is not None:
            for tap in self.outputs[block]:
                self.found[tap] = own(stream.transpose(0, self.axis))

    def added(self, tap: str) -> Tensor | None:
        """What was added between two blocks, stream after stream; None where they do not match."""
        later = [self.found[name] for name in captured_streams(self.found, tap)]
        earlier = [self.found[name] for name in captured_streams(self.found, tap, front_tap)]
        if not later or [each.shape for each in later] != [each.shape for each in earlier]:
            return None
        added = [one - other for one, other in zip(later, earlier, strict=True)]
        alike = {(each.ndim, len(each), each.shape[2:]) for each in added}
        return torch.cat(added, 1) if len(alike) == 1 else None


def outer_blocks(tap: str) -> tuple[int, int] | None:
    """How many blocks at each end run where something is put back at a tap between them.

    Args:
        tap: `last_block` and `before_last` put back what enters the last block, `deep.<d>` what
            enters the last d, behind the first d of the chain (`Trunk.start`).

    Returns:
        Numbers at the front and at the back; None where no block runs.
    """
    if tap in (LAST_BLOCK, BEFORE_LAST):
        return 0, 1
    found = DEEP_TAP.fullmatch(tap)
    return None if found is None else (int(found[1]), int(found[1]))


def front_tap(tap: str, number: int) -> str:
    """Name under which a stream is captured that leaves the blocks at the front of a tap."""
    return f"{tap}.before.{number}"


def stream_tap(tap: str, number: int) -> str:
    """Name under which a stream is captured that enters the blocks at the back of a tap."""
    return f"{tap}.{number}"


def captured_streams(
    found: Container[str], tap: str, named: Callable[[str, int], str] = stream_tap
) -> list[str]:
    """Names of the streams captured at one end of a tap, in order.

    Args:
        found: what was captured, by name.
        tap: the tap.
        named: `stream_tap` for what enters the blocks at its back, `front_tap` for what leaves
            those at its front.
    """
    names = (named(tap, number) for number in itertools.count())
    return list(itertools.takewhile(found.__contains__, names))


def block_list(transformer: nn.Module, name: str) -> nn.ModuleList:
    """The block list of that name."""
    blocks = transformer.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)  # the tracer looks at nothing else
    return blocks


def block_taps(transformer: nn.Module, trunk: Trunk) -> dict[str, str]:
    """Name of the block behind every tap `blocks.0`, `blocks.1`, ..., in calling order."""
    names = [
        f"{name}.{number}"
        for name in trunk.block_lists
        for number in range(len(block_list(transformer, name)))
    ]
    return {f"blocks.{i}": name for i, name in enumerate(names)}


def _keep(
    found: dict[str, Tensor],
    tap: str,
    axis: int,
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
) -> None:
    tensor = first_tensor(args, kwargs)
    if tensor is not None:
        found[tap] = own(tensor.transpose(0, axis))


def own(tensor: Tensor) -> Tensor:
    """A copy that keeps no larger storage alive and that nothing downstream can change in place."""
    return tensor.clone(memory_format=torch.contiguous_format)
