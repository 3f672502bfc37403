"""Runs of a network whose outer blocks run on the current step while the others are forecast.

A chain of blocks takes what the blocks in between add to the stream, a U-Net what its deeper part
hands to its last up blocks. The last block alone, on forecast inputs, has none in front.

Source: DeepCache (arXiv 2312.00858, section 3.3) and DaTo (arXiv 2501.00375), which reuse the
deeper part; Delta-DiT (arXiv 2406.01125), which reuses what blocks add to the stream.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from foreseer.checkpoints.spec import DEEP_TAP
from foreseer.integration.host.gate import Enter, refuse_other_axes
from foreseer.integration.host.hook import (
    as_given,
    exchanged,
    refuse_additions,
    trunk_modules,
    without_middle,
)
from foreseer.integration.host.taps import block_list, block_taps, outer_blocks
from foreseer.integration.host.trunk import SkippedBlocks, Trunk, UnsupportedHost, first_tensor

Streams = Callable[[list[Tensor]], list[Tensor]]  # what enters a block, given what would have


class OuterBlocks:
    """Run a forward with the blocks at its two ends alone, and a given tensor in between.

    Args:
        transformer: the host.
        trunk: its facts.
        tap: where the tensor goes, see `outer_blocks`.

    Raises:
        UnsupportedHost: the host has not so many blocks, or what one of them is handed by the block
            before it is not known.
    """

    def __init__(self, transformer: nn.Module, trunk: Trunk, tap: str) -> None:
        refuse_other_axes(transformer, trunk)
        front, back = _ends(transformer, trunk, tap)
        self.transformer = transformer
        self.streams = trunk.entering(-back)
        if not self.streams:
            raise UnsupportedHost(
                f"{type(transformer).__name__} does not hand the output of one block to the next "
                f"as it is where the tap {tap!r} needs it, so nothing can be put there; use "
                "another schedule or tap."
            )
        self.head = transformer.get_submodule(trunk.head)
        self.blocks = trunk_modules(transformer, trunk)
        names = list(block_taps(transformer, trunk).values())
        self.entry = transformer.get_submodule(names[-back])
        front += trunk.start if front else 0
        running = {*names[:front], *names[len(names) - back :]}
        self.swapped = {
            name: _Some(block_list(transformer, name), name, running, names[-back], self)
            for name in trunk.block_lists
        }

    def __call__(
        self,
        forward: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        inputs: Streams,
        entering: Enter | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The output of `forward` with the blocks at the back run on other streams.

        Args:
            forward: the host's own.
            args: its positional arguments.
            kwargs: its keyword arguments.
            inputs: makes what enters the first of them of what comes from the front.
            entering: what enters the head, given what they made; None for that.
            weights: of the first of them for this call, by name; None for its own.

        Raises:
            UnsupportedHost: another network adds to what is skipped.
        """
        refuse_additions(self.transformer, args, kwargs)
        self.inputs, self.weights = inputs, weights
        try:
            enter = _same if entering is None else entering
            with exchanged(self.transformer, self.blocks, self.swapped, self.head, enter):
                return forward(*args, **kwargs)
        finally:
            del self.inputs, self.weights

    def put(self, feature: Tensor, came: Sequence[Tensor]) -> list[Tensor]:
        """What enters the blocks at the back: what came from the front and what was added to it.

        Args:
            feature: what was added, stream after stream along the tokens.
            came: the streams.
        """
        parts = feature.split([each.shape[1] for each in came], 1)
        return [each + part for each, part in zip(came, parts, strict=True)]

    def enter(self, *args: Any, **kwargs: Any) -> Any:
        """Called in the place of the first block at the back."""
        positional, named = list(args), dict(kwargs)
        came = [positional[p] if isinstance(p, int) else named[p] for p in self.streams]
        for place, value, old in zip(self.streams, self.inputs(came), came, strict=True):
            if isinstance(place, int):
                positional[place] = as_given(value, old)
            else:
                named[place] = as_given(value, old)
        if self.weights is not None:
            weights = {name: weight.to(came[0]) for name, weight in self.weights.items()}
            return functional_call(self.entry, weights, tuple(positional), named)
        return self.entry(*positional, **named)


def _ends(transformer: nn.Module, trunk: Trunk, tap: str) -> tuple[int, int]:
    """Blocks that run at each end.

    Raises:
        UnsupportedHost: none would be left in between.
    """
    ends = outer_blocks(tap)
    assert ends is not None  # asked for before
    count = len(block_list(transformer, trunk.block_lists[-1]))
    if not trunk.middle:
        count = len(block_taps(transformer, trunk)) - trunk.start
    most = count - 1 if trunk.middle else (count - 1) // 2
    if DEEP_TAP.fullmatch(tap) and max(ends) > most:
        kind = "up blocks" if trunk.middle else "blocks"
        raise UnsupportedHost(
            f"the tap {tap!r} runs {max(ends)} of the {kind} of {type(transformer).__name__} at "
            f"each end, which has {count}; expected at most deep.{most}."
        )
    return ends


def _same(entering: Tensor) -> Tensor:
    return entering


class _Some(SkippedBlocks):
    """Iterates over the blocks that run, with a stand-in for the one that is given a forecast."""

    def __init__(
        self, blocks: nn.ModuleList, name: str, running: set[str], entry: str, outer: OuterBlocks
    ) -> None:
        super().__init__(blocks)
        self.places = [i for i in range(len(blocks)) if f"{name}.{i}" in running]
        self.entry = next((i for i in self.places if f"{name}.{i}" == entry), None)
        self.outer = outer

    def __iter__(self) -> Iterator[Any]:
        """The blocks in order."""
        for place in self.places:
            block = self[place]
            yield _Entry(block, self.outer) if place == self.entry else block


class _Entry:
    """Calls `enter` in a block's place; everything else about it is the block's own."""

    def __init__(self, block: nn.Module, outer: OuterBlocks) -> None:
        self._block = block
        self._outer = outer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._outer.enter(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._block, attribute)


class OuterLadder:
    """Run a U-Net with its first d down blocks and last d up blocks, and a tensor in between.

    The skip tensors that the skipped up blocks would take go to the stand-in for them; the sizes of
    an odd grid come from the others, as in the full run.

    Args:
        transformer: the host.
        trunk: its facts.
        tap: `deep.<d>`.

    Raises:
        UnsupportedHost: it has not so many up blocks, or its blocks are of another kind.
    """

    def __init__(self, transformer: nn.Module, trunk: Trunk, tap: str) -> None:
        if DEEP_TAP.fullmatch(tap) is None:
            refuse_other_axes(transformer, trunk)
        _, depth = _ends(transformer, trunk, tap)
        self.transformer = transformer
        self.head = transformer.get_submodule(trunk.head)
        self.blocks = trunk_modules(transformer, trunk)
        down, up = (block_list(transformer, name) for name in trunk.block_lists)
        made = 1 + sum(map(_skips_made, down[:depth]))
        last: list[Any] = list(up[len(up) - depth :])
        spare = made - sum(len(block.resnets) for block in last)
        if spare < 1 or any(hasattr(block, "skip_conv") for block in (*down, *up)):
            raise UnsupportedHost(
                f"the blocks of {type(transformer).__name__} hand on other skip tensors than "
                "those of UNet2DModel and UNet2DConditionModel, so a part of them cannot be "
                "skipped; use the taps `hidden` or `output`."
            )
        deep = _Deep(spare, self)
        self.swapped = without_middle(
            trunk,
            {
                trunk.block_lists[0]: _Listed(down, list(down[:depth])),
                trunk.block_lists[1]: _Listed(up, [deep, *last]),
            },
        )

    def __call__(
        self,
        forward: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        inputs: Streams,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The output of `forward` with another tensor entering the last up blocks.

        Args:
            forward: the host's own.
            args: its positional arguments.
            kwargs: its keyword arguments.
            inputs: makes that tensor of what comes from the down blocks.
            weights: those of `OuterBlocks`; a U-Net has none.

        Raises:
            UnsupportedHost: another network adds to what is skipped.
        """
        refuse_additions(self.transformer, args, kwargs)
        self.inputs = inputs
        try:
            with exchanged(self.transformer, self.blocks, self.swapped, self.head, _same):
                return forward(*args, **kwargs)
        finally:
            del self.inputs

    def put(self, feature: Tensor, came: Sequence[Tensor]) -> list[Tensor]:
        """What enters the last up blocks: the tensor itself."""
        return [feature]


def _skips_made(block: Any) -> int:
    """Skip tensors that a down block hands on: one of every layer, and its smaller output."""
    return len(block.resnets) + int(bool(block.downsamplers))


class _Listed(SkippedBlocks):
    """Iterates over, and counts, some blocks; indexes like the list itself."""

    def __init__(self, blocks: nn.ModuleList, some: Sequence[Any]) -> None:
        super().__init__(blocks)
        self.some = list(some)

    def __iter__(self) -> Iterator[Any]:
        """Those."""
        return iter(self.some)

    def __len__(self) -> int:
        return len(self.some)


class _Deep:
    """Stands for the up blocks that are skipped: takes their skip tensors, returns the forecast."""

    def __init__(self, spare: int, outer: OuterLadder) -> None:
        self.resnets = [None] * spare  # forwards count the skip tensors of a block by them
        self._outer = outer

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        came = first_tensor(args, kwargs)
        assert came is not None  # a U-Net's blocks are given it
        return as_given(self._outer.inputs([came])[0], came)


def outer_part(transformer: nn.Module, trunk: Trunk, tap: str) -> OuterBlocks | OuterLadder:
    """What runs the outer blocks of a host where a tap is forecast.

    Raises:
        UnsupportedHost: see the classes.
    """
    return (OuterLadder if trunk.middle else OuterBlocks)(transformer, trunk, tap)
