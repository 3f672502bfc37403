"""Facts read off a diffusion transformer: its trunk of blocks and its head.

The trunk is the block lists; the head is the first module called after the last block whose first
tensor argument has the block output's rank, batch and channels. Both are read from one traced
forward; classes where that finds nothing, or the wrong module, have a row in `TRUNK_FACTS`.

Where the trunk is, where tracing does not find it, and how the class takes its time: where it makes
modulation vectors, and in which unit.

Shapes: B batch, W width of a modulation vector.
"""

import contextlib
import functools
import inspect
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foreseer.errors import UnsupportedHost as UnsupportedHost


@dataclass(frozen=True)
class Trunk:
    """Where the blocks and the head of a transformer are.

    Args:
        block_lists: names of the `ModuleList`s of blocks, in calling order.
        head: qualified name of the head module.
        streams: where every block, in calling order, takes what the block before it returned:
            positions and keywords; empty where something happens in between, and for all where
            that is not known.
        place: which of the tensors that a block returns is the stream the head takes, counted
            from the end: -1 for the last.
        batch_axis: axis of the head's input that counts samples; features have it first.
        middle: of a U-Net, whose down blocks hand tensors to its up blocks: the module that runs
            between them; empty for a chain.
    """

    block_lists: tuple[str, ...]
    head: str
    streams: tuple[tuple[int | str, ...], ...] = ()
    place: int = -1
    batch_axis: int = 0
    middle: str = ""

    def entering(self, number: int) -> tuple[int | str, ...]:
        """Where a block, counted from 0 or from the end, takes what the one before it returned."""
        return self.streams[number] if self.streams else ()

    @property
    def start(self) -> int:
        """The first block of the last stretch whose blocks hand on their outputs as they are.

        Refiners and joined streams come before it.
        """
        broken = [number for number, places in enumerate(self.streams) if not places]
        return broken[-1] if broken else 0


@dataclass(frozen=True)
class Given:
    """What a user says of a module's trunk.

    Args:
        block_lists: names of its `ModuleList`s of blocks, in calling order; None finds them.
        head: name of the head; None finds it.
    """

    block_lists: tuple[str, ...] | None = None
    head: str | None = None


_given: "weakref.WeakKeyDictionary[nn.Module, Given]" = weakref.WeakKeyDictionary()


def give_trunk(module: nn.Module, given: Given) -> None:
    """Look for the trunk of a module where its user says from now on, nested lists included.

    Raises:
        UnsupportedHost: it has no such block list or head.
    """
    lists = [name for name, _ in nested_lists(module)]
    modules = dict(module.named_modules())
    for name in given.block_lists or ():
        if name not in lists:
            kind = f"a {type(modules[name]).__name__}" if name in modules else "missing"
            raise UnsupportedHost(
                f"{type(module).__name__} has no ModuleList {name!r} ({kind}); it has "
                f"{', '.join(lists) or 'none'}. Say blocks=, one of them, or keep the blocks in a "
                "ModuleList that the forward goes through."
            )
    if given.head is not None and given.head not in modules:
        raise UnsupportedHost(
            f"{type(module).__name__} has no module {given.head!r}; say head=, the name of the "
            "first one that is called after the blocks, or leave it out to have it found."
        )
    _given[module] = given


def nested_lists(module: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The module lists of a module with their names, without those inside of another one."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(child, nn.ModuleList) and len(child) and not inside:
            found.append((name, child))
    return found


def block_lists_of(module: nn.Module) -> dict[str, nn.ModuleList]:
    """Where to look for the trunk of a module: its own lists, or those that its user knows of."""
    if module not in _given:
        return {name: each for name, each in nested_lists(module) if "." not in name}
    wanted = _given[module].block_lists
    return {name: each for name, each in nested_lists(module) if wanted is None or name in wanted}


def given_trunk(module: nn.Module) -> Given:
    """What was said of the trunk of a module."""
    return _given.get(module, Given())


def exchange(module: nn.Module, others: Mapping[str, Any]) -> None:
    """Put other modules in the places of some, by their names in a module."""
    for name, other in others.items():
        owner, _, own = name.rpartition(".")
        module.get_submodule(owner)._modules[own] = other


TRUNK_FACTS: dict[str, Trunk | str] = {
    # The modules of the face are called between the blocks.
    "ConsisIDTransformer3DModel": Trunk(("transformer_blocks",), "norm_final", (), -2),
    # Tokens come before samples.
    "ErnieImageTransformer2DModel": Trunk(("layers",), "final_norm", (), -1, 1),
    # The tokens get their place in the grid back before the head, which adds two axes.
    "Kandinsky5Transformer3DModel": Trunk(
        ("text_transformer_blocks", "visual_transformer_blocks"), "out_layer"
    ),
    "LatteTransformer3DModel": "has frames and samples on one axis; use the `output` tap",
    "LTX2VideoTransformer3DModel": "predicts sound beside the video, with a head for each; it is "
    "not supported",
}
"""The trunk of a class where tracing does not find it; a text says why there is none."""


@dataclass(frozen=True)
class TimeFacts:
    """How a transformer class takes its time.

    Args:
        places: pattern of the names of the modules that return modulation vectors.
        waves: pattern of the names of the modules that turn the time into sines and cosines.
        time_scale: what the flow time is multiplied by before it is passed as `timestep`.
    """

    places: str
    waves: str
    time_scale: float


TIME_FACTS = {
    "DiTTransformer2DModel": TimeFacts(
        r"transformer_blocks\.\d+\.norm1\.emb",
        r"transformer_blocks\.\d+\.norm1\.emb\.time_proj",
        1000.0,
    ),
    "Flux2Transformer2DModel": TimeFacts(
        r"time_guidance_embed", r"time_guidance_embed\.time_proj", 1.0
    ),
    "FluxTransformer2DModel": TimeFacts(r"time_text_embed", r"time_text_embed\.time_proj", 1.0),
    "HunyuanVideo15Transformer3DModel": TimeFacts(r"time_embed", r"time_embed\.time_proj", 1000.0),
    "QwenImageTransformer2DModel": TimeFacts(
        r"time_text_embed", r"time_text_embed\.time_proj", 1.0
    ),
    "SD3Transformer2DModel": TimeFacts(r"time_text_embed", r"time_text_embed\.time_proj", 1000.0),
    "WanTransformer3DModel": TimeFacts(
        r"condition_embedder\.time_embedder", r"condition_embedder\.timesteps_proj", 1000.0
    ),
}
"""Known hosts by class name; another one is a row here."""


def time_facts(transformer: nn.Module) -> TimeFacts:
    """The row of a transformer's class.

    Raises:
        UnsupportedHost: there is none.
    """
    name = type(transformer).__name__
    if name not in TIME_FACTS:
        raise UnsupportedHost(
            f"it is not known where {name} makes its modulation vector; known are "
            f"{sorted(TIME_FACTS)}. Add a row to TIME_FACTS in integration/host/trunk.py."
        )
    return TIME_FACTS[name]


def modulation_places(transformer: nn.Module) -> list[nn.Module]:
    """The modules of a transformer that return modulation vectors, in the order of their names.

    Raises:
        UnsupportedHost: its class is not known.
    """
    return _matching(transformer, time_facts(transformer).places)


def wave_places(transformer: nn.Module) -> list[nn.Module]:
    """The modules of a transformer that turn the time into sines and cosines.

    Raises:
        UnsupportedHost: its class is not known.
    """
    return _matching(transformer, time_facts(transformer).waves)


def _matching(transformer: nn.Module, pattern: str) -> list[nn.Module]:
    found = re.compile(pattern)
    return [module for name, module in transformer.named_modules() if found.fullmatch(name)]


@contextlib.contextmanager
def modulations(transformer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the modulation vectors of the forward inside, as its head sees them.

    Only the first place counts: on a host that makes one per block, that is the one of its head.

    Raises:
        UnsupportedHost: the host's class is not known.
    """
    found: list[Tensor] = []
    place = modulation_places(transformer)[0]
    handle = place.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


def modulation_width(transformer: nn.Module) -> int:
    """Width of a modulation vector: what the last linear layer of its module returns.

    Raises:
        UnsupportedHost: the host's class is not known.
    """
    place = modulation_places(transformer)[0]
    layers = [module for module in place.modules() if isinstance(module, nn.Linear)]
    return layers[-1].out_features


LADDER, MIDDLE = ("down_blocks", "up_blocks"), "mid_block"
"""Names of the parts of diffusers' U-Nets."""


class SkippedBlocks(nn.ModuleList):
    """A view of a block list that iterates as empty but indexes and counts like the list itself.

    Hosts reach into a block between trunk and head (DiT asks `transformer_blocks[0]` for its
    embedding).
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self._modules = blocks._modules

    def __iter__(self) -> Iterator[Any]:
        """Nothing."""
        return iter(())


class ObservedBlocks(SkippedBlocks):
    """A view of a block list whose blocks are observed, with no hook on any of them.

    A hook on a compiled block would be compiled into it.

    Args:
        blocks: the list.
        name: its name in the host.
        entering: called before each block with its name and arguments.
        leaving: called after it with its name and what it returned.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        name: str,
        entering: Callable[[str, tuple, dict[str, Any]], None],
        leaving: Callable[[str, Any], None],
    ) -> None:
        super().__init__(blocks)
        self.name = name
        self.entering = entering
        self.leaving = leaving

    def __iter__(self) -> Iterator[Any]:
        """A stand-in for every block."""
        for number, block in enumerate(self._modules.values()):
            yield _ObservedBlock(block, f"{self.name}.{number}", self)


class _ObservedBlock:
    """Calls a block and tells of it; everything else about it is the block's own."""

    def __init__(self, block: Any, name: str, blocks: ObservedBlocks) -> None:
        self._block = block
        self._name = name
        self._list = blocks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._list.entering(self._name, args, kwargs)
        output = self._block(*args, **kwargs)
        self._list.leaving(self._name, output)
        return output

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._block, attribute)


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor among a call's arguments, `hidden_states` before other keywords."""
    named = (kwargs.get("hidden_states"), *kwargs.values())
    return next((value for value in (*args, *named) if isinstance(value, Tensor)), None)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors a block returned, in order."""
    values = output if isinstance(output, tuple | list) else (output,)
    return [value for value in values if isinstance(value, Tensor)]


def stream_of(output: Any, place: int = -1) -> Tensor | None:
    """The residual stream in a block's output: the tensor, or the one at `place` of several."""
    found = tensors_of(output)
    return found[place] if len(found) >= -place else (found[-1] if found else None)


class TrunkTracer:
    """Watch one forward of a transformer and name its trunk and head.

    Use as a context manager around the forward, then call `trunk()`.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.lists = block_lists_of(transformer)
        self.calls: list[tuple[str, Tensor | None]] = []  # module name, first tensor argument
        self.outputs: list[Tensor] = []  # what the newest block returned
        self.returned: dict[str, list[Tensor]] = {}  # what each block returned
        self.streams: dict[str, tuple[int | str, ...]] = {}  # arguments the block before returned
        self._handles: list[Any] = []

    def __enter__(self) -> "TrunkTracer":
        """Start watching."""
        seen = {
            name: ObservedBlocks(blocks, name, self._entering, self._leaving)
            for name, blocks in self.lists.items()
        }
        exchange(self.transformer, seen)
        for name, module in self.transformer.named_modules():
            if name and not self._is_block(name) and not self._is_compiled(name):
                called = functools.partial(self._called, name)
                self._handles.append(module.register_forward_pre_hook(called, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        exchange(self.transformer, self.lists)

    def _called(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tensor = first_tensor(args, kwargs)
        self.calls.append((name, None if tensor is None else tensor.detach()))

    def _entering(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        tensor = first_tensor(args, kwargs)
        self.calls.append((name, None if tensor is None else tensor.detach()))
        named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        self.streams[name] = tuple(
            place for place, value in named if any(value is returned for returned in self.outputs)
        )

    def _leaving(self, name: str, output: Any) -> None:
        self.outputs = tensors_of(output)
        self.returned[name] = self.outputs

    def _is_compiled(self, name: str) -> bool:
        """Whether a module is compiled, or inside of one that is."""
        words = name.split(".")
        inside = (self.transformer.get_submodule(".".join(words[:i])) for i in range(1, len(words)))
        modules = [*inside, self.transformer.get_submodule(name)]
        return any(module._compiled_call_impl is not None for module in modules)

    def _is_block(self, name: str) -> bool:
        return name.rpartition(".")[0] in self.lists

    def trunk(self) -> Trunk:
        """The trunk and head of the forward just watched.

        Raises:
            UnsupportedHost: no complete block list was run, or nothing after it looks like a head.
        """
        name = type(self.transformer).__name__
        fact = TRUNK_FACTS.get(name)
        if isinstance(fact, str):
            raise UnsupportedHost(f"{name} {fact}.")
        if fact is not None:
            return fact
        called = [name for name, _ in self.calls]
        run = [
            name
            for name, blocks in self.lists.items()
            if [c for c in called if c in self._block_names(name)]
            == [f"{name}.{i}" for i in range(len(blocks))]
        ]
        if not run:
            raise UnsupportedHost(
                f"{type(self.transformer).__name__} ran none of its block lists "
                f"({', '.join(self.lists) or 'it has none'}) once in order; this host needs the "
                "`output` tap."
            )
        run.sort(key=lambda name: called.index(f"{name}.0"))
        blocks = {block for name in run for block in self._block_names(name)}
        last = f"{run[-1]}.{len(self.lists[run[-1]]) - 1}"
        returned = self.returned.get(last, [])
        if not returned:
            raise UnsupportedHost(f"block {last} returned no tensor; use the `output` tap.")
        start, head = called.index(last) + 1, given_trunk(self.transformer).head
        for name, tensor in self.calls[start:]:
            inside = any(name.startswith(f"{block}.") for block in blocks)
            wanted = head in (None, name) and not inside
            if wanted and tensor is not None and _fits(tensor, returned):
                place = _place_of(tensor, returned)
                streams = tuple(self.streams[each] for each in called if each in blocks)
                middle = MIDDLE if tuple(run) == LADDER else ""
                return Trunk(tuple(run), name, streams, place, middle=middle)
        shapes = " and ".join(str(tuple(stream.shape)) for stream in returned)
        raise UnsupportedHost(
            f"no module {head or ''}".rstrip() + f" called after block {last} takes a tensor like "
            f"its output {shapes}; use the `output` tap."
        )

    def _block_names(self, name: str) -> set[str]:
        return {f"{name}.{i}" for i in range(len(self.lists[name]))}


def _fits(tensor: Tensor, streams: list[Tensor]) -> bool:
    """Whether a tensor has the rank, batch and channels of a stream, and no more tokens than all.

    Args:
        tensor: first tensor argument of a module.
        streams: what the last block returned: the stream, perhaps beside that of the text.
    """
    tokens = sum(stream.shape[1] for stream in streams if stream.ndim == tensor.ndim)
    return any(
        tensor.ndim == stream.ndim > 1
        and tensor.shape[0] == stream.shape[0]
        and tensor.shape[-1] == stream.shape[-1]
        and tensor.shape[1] <= tokens
        for stream in streams
    )


def _place_of(tensor: Tensor, streams: list[Tensor]) -> int:
    """Which of the last block's tensors enters the head, counted from the end."""
    equal = [i for i, stream in enumerate(streams) if tensor.shape == stream.shape]
    exact = [i for i in equal if torch.equal(tensor, streams[i])]
    return (exact or equal or [len(streams) - 1])[-1] - len(streams)


TIME_ARGUMENTS = ("timestep", "timesteps", "t", "sigma")


def takes_time(network: nn.Module) -> bool:
    """Whether a network is told a time, as whatever denoises is."""
    owner: Any = type(getattr(network, "_orig_mod", network))
    return any(name in inspect.signature(owner.forward).parameters for name in TIME_ARGUMENTS)
