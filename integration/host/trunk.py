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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foreseer.errors import UnsupportedHost as UnsupportedHost


@dataclass(frozen=True)
class Trunk:
    """Where the blocks and the head of a transformer are.

    Args:
        block_lists: names of the root's `ModuleList`s of blocks, in calling order.
        head: qualified name of the head module.
        streams: where the last block takes what the block before it returned: positions and
            keywords; empty where something happens in between.
        place: which of the tensors that a block returns is the stream the head takes, counted
            from the end: -1 for the last.
        batch_axis: axis of the head's input that counts samples; features have it first.
    """

    block_lists: tuple[str, ...]
    head: str
    streams: tuple[int | str, ...] = ()
    place: int = -1
    batch_axis: int = 0


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
    "FluxTransformer2DModel": TimeFacts(r"time_text_embed", r"time_text_embed\.time_proj", 1.0),
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
        self.lists = {
            name: module
            for name, module in transformer.named_children()
            if isinstance(module, nn.ModuleList) and len(module)
        }
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
        self.transformer._modules.update(seen)
        for name, module in self.transformer.named_modules():
            if name and not self._is_block(name) and not self._is_compiled(name):
                called = functools.partial(self._called, name)
                self._handles.append(module.register_forward_pre_hook(called, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self.transformer._modules.update(self.lists)

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
        return name.count(".") == 1 and name.split(".")[0] in self.lists

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
        streams = self.returned.get(last, [])
        if not streams:
            raise UnsupportedHost(f"block {last} returned no tensor; use the `output` tap.")
        start = called.index(last) + 1
        for name, tensor in self.calls[start:]:
            inside = any(name.startswith(f"{block}.") for block in blocks)
            if not inside and tensor is not None and _fits(tensor, streams):
                place = _place_of(tensor, streams)
                return Trunk(tuple(run), name, self.streams.get(last, ()), place)
        shapes = " and ".join(str(tuple(stream.shape)) for stream in streams)
        raise UnsupportedHost(
            f"no module called after block {last} takes a tensor like its output {shapes}; use the "
            "`output` tap."
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


TURNS = {"transformer": 0, "unconditional_transformer": 0, "transformer_2": 1}
"""Networks that are forecast, by name. Wan 2.2 runs `transformer` at high noise and `transformer_2`
at low noise, so they take turns; Ideogram 4 guides with `unconditional_transformer` at every step
of `transformer`."""

TIME_ARGUMENTS = ("timestep", "timesteps", "t", "sigma")


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline that are forecast, by name, those for high noise first.

    Raises:
        UnsupportedHost: the pipeline has no `transformer`, or a compiled one.
    """
    found: dict[str, nn.Module] = {}
    for name in TURNS:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module) and all(module is not other for other in found.values()):
            found[name] = module
    if not found:
        raise UnsupportedHost(
            f"{type(pipe).__name__} has no `transformer` module; foreseer works on diffusion "
            "transformers."
        )
    for name, module in found.items():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise UnsupportedHost(
                f"the whole {name} is compiled, which fixes one path through it; "
                f"use pipe.{name}.compile_repeated_blocks(fullgraph=True) instead, which compiles "
                "the blocks and keeps forecasting exact."
            )
    return found


def transformer_of(pipe: Any) -> nn.Module:
    """The denoiser of a pipeline that has one.

    Raises:
        UnsupportedHost: the pipeline has no `transformer`, or two.
    """
    found = transformers_of(pipe)
    if len(found) > 1:
        raise UnsupportedHost(
            f"{type(pipe).__name__} has the experts {', '.join(found)}; this needs a pipeline with "
            "one transformer. Recording, L2PLeastSquares and forecasting take both."
        )
    return next(iter(found.values()))


def others_of(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline that take a time and are not forecast, such as a ControlNet."""
    forecast = list(transformers_of(pipe).values())
    return {
        name: module
        for name, module in vars(pipe).items()
        if isinstance(module, nn.Module)
        and all(module is not other for other in forecast)
        and takes_time(module)
    }


def takes_time(network: nn.Module) -> bool:
    """Whether a network is told a time, as whatever denoises is."""
    owner: Any = type(getattr(network, "_orig_mod", network))
    return any(name in inspect.signature(owner.forward).parameters for name in TIME_ARGUMENTS)
