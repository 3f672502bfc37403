"""Runs of a transformer that stop after a first look.

`FirstLook` asks a schedule about the first block before the others run.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

from foreseer.integration.host.call import Narrowed
from foreseer.integration.host.hook import exchanged
from foreseer.integration.host.taps import block_list, own
from foreseer.integration.host.trunk import (
    SkippedBlocks,
    Trunk,
    UnsupportedHost,
    first_tensor,
    stream_of,
)

Enter = Callable[[Tensor], Tensor]  # what enters the head, given what would have


def refuse_other_axes(transformer: nn.Module, trunk: Trunk) -> None:
    """Raise where samples are not counted by a block's first axis.

    Raises:
        UnsupportedHost: they are counted by another.
    """
    if trunk.middle:
        raise UnsupportedHost(
            f"{type(transformer).__name__} is a U-Net, whose blocks have no stream in common, so "
            "nothing can be decided or checked inside of it; use a list of anchors."
        )
    if trunk.batch_axis:
        raise UnsupportedHost(
            f"the blocks of {type(transformer).__name__} take tokens before samples, so nothing "
            "can be decided or checked per sample inside of them; use a list of anchors."
        )


class FirstLook:
    """Run a forward up to a statistic of its first block, then all of it or none of its trunk.

    Args:
        transformer: the host.
        trunk: its facts.
        probe: `modulated` or `first_block`, see `Schedule`.

    Raises:
        UnsupportedHost: `modulated` is asked for and the first block has no attention module.
    """

    def __init__(self, transformer: nn.Module, trunk: Trunk, probe: str) -> None:
        refuse_other_axes(transformer, trunk)
        self.transformer = transformer
        self.head = transformer.get_submodule(trunk.head)
        self.blocks = {name: block_list(transformer, name) for name in trunk.block_lists}
        self.gated = {name: _GatedBlocks(blocks, self) for name, blocks in self.blocks.items()}
        self.first = self.blocks[trunk.block_lists[0]][0]
        self.attention = _attention_of(self.first) if probe == "modulated" else None
        self.place = trunk.place
        self._shapes: Any = None
        self.entered: Tensor | None = None  # the stream before the first block of the latest call

    def __call__(
        self,
        forward: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        judge: Callable[[Tensor], bool],
        entering: Enter,
    ) -> tuple[Any, bool]:
        """The output, and whether the whole network ran.

        Args:
            forward: the transformer's own.
            args: its positional arguments.
            kwargs: its keyword arguments.
            judge: told the statistic, says whether the network shall run.
            entering: makes what enters the head when it shall not.
        """
        self.judge = judge
        self.stopped = False

        def enter(tensor: Tensor) -> Tensor:
            return entering(tensor) if self.stopped else tensor

        try:
            with exchanged(self.transformer, self.blocks, self.gated, self.head, enter):
                return forward(*args, **kwargs), not self.stopped
        finally:
            del self.judge  # it knows the step and its input

    def narrow(self, narrowed: Narrowed) -> None:
        """The next call has the rows of some branches of the last one only."""
        self._shapes = _pytree.tree_map_only(
            _Shape, functools.partial(_Shape.narrowed, narrowed=narrowed), self._shapes
        )

    def open_with(self, *args: Any, **kwargs: Any) -> Any:
        """Called in the first block's place."""
        entered = first_tensor(args, kwargs)
        self.entered = None if entered is None else own(entered)
        if self.attention is None:
            output = self.first(*args, **kwargs)
            after = stream_of(output, self.place)
            assert after is not None and self.entered is not None  # the tracer saw both
            self.stopped = not self.judge((after - self.entered).detach())
            return output
        self.stopped = not self.judge(_entering_attention(self.first, self.attention, args, kwargs))
        if self.stopped:  # nothing reads it: the head is given the forecast
            return _pytree.tree_map_only(_Shape, _Shape.fill, self._shapes)
        output = self.first(*args, **kwargs)
        self._shapes = _pytree.tree_map_only(Tensor, _Shape, output)
        return output


class _GatedBlocks(SkippedBlocks):
    """Iterates over the blocks until the first look says stop."""

    def __init__(self, blocks: nn.ModuleList, look: FirstLook) -> None:
        super().__init__(blocks)
        self.look = look

    def __iter__(self) -> Iterator[Any]:
        """The first block's stand-in, then blocks as long as nothing was stopped."""
        for block in self._modules.values():
            if self.look.stopped:
                return
            yield self.look.open_with if block is self.look.first else block


class _Shape:
    """A tensor's outline, enough to stand in where the values are never read."""

    def __init__(self, tensor: Tensor) -> None:
        self.one = tensor.new_zeros(())
        self.shape = tensor.shape

    def narrowed(self, narrowed: Narrowed) -> "_Shape":
        shape = narrowed.shape(self.shape)
        return _Shape(self.one.expand(shape))

    def fill(self) -> Tensor:
        return self.one.expand(self.shape)


class _Halt(Exception):
    """Carries what entered the attention out of the first block."""

    def __init__(self, entered: Tensor) -> None:
        super().__init__()
        self.entered = entered


def _entering_attention(
    block: nn.Module, attention: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> Tensor:
    """Run a block until its attention is called and take what enters it."""

    def halt(module: nn.Module, inner: tuple, named: dict[str, Any]) -> None:
        entered = first_tensor(inner, named)
        if entered is not None:
            raise _Halt(entered.detach())

    handle = attention.register_forward_pre_hook(halt, with_kwargs=True)
    try:
        block(*args, **kwargs)
    except _Halt as halted:
        return halted.entered
    finally:
        handle.remove()
    raise UnsupportedHost(
        f"the first block ({type(block).__name__}) never called its attention with a tensor; use "
        "the FirstBlock schedule."
    )


def _attention_of(block: nn.Module) -> nn.Module:
    for _, module in block.named_children():
        if "Attention" in type(module).__name__:
            return module
    raise UnsupportedHost(
        f"the first block ({type(block).__name__}) has no attention module of its own, so TeaCache "
        "has no modulated input to look at; use the FirstBlock schedule."
    )
