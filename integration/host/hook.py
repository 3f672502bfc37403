"""The hooks on a transformer: run it and capture a tap, or skip its trunk and put a forecast back.

Nothing here decides anything: `Session` (session.py) says what each call does.

Pipelines look at the signature of what they call, users copy and save what is replaced, and other
libraries put wrappers of their own above or below: all of that keeps working.
"""

import contextlib
import copy
import functools
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foreseer.integration.host.caller import is_called_elsewhere
from foreseer.integration.host.trunk import (
    ObservedBlocks,
    SkippedBlocks,
    Trunk,
    exchange,
    first_tensor,
    stream_of,
)


class ReplacedMethod:
    """A method of an instance replaced; the signature and name stay the method's.

    Args:
        method: what the instance did before.
        replacement: called instead, with the method and the call's arguments.
    """

    def __init__(self, method: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        functools.update_wrapper(self, method)
        self.method: Any = method
        self.replacement = replacement

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The replacement."""
        return self.replacement(self.method, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The method itself, of the copied instance."""
        if isinstance(self.method, types.MethodType):
            owner = memo.get(id(self.method.__self__), self.method.__self__)
            return types.MethodType(self.method.__func__, owner)
        return copy.deepcopy(self.method, memo)


def replace_method(owner: Any, name: str, replacement: Callable[..., Any]) -> ReplacedMethod:
    """Replace a method on an instance alone, below any hook of diffusers or accelerate on it.

    Those hooks come and go while a pipeline runs; what is below them stays.

    Args:
        owner: the instance.
        name: name of the method.
        replacement: see `ReplacedMethod`.

    Returns:
        What stands there now, for `restore_method`.
    """
    own = ((holder, slot) for holder, slot in _slots(owner, name) if _is_own(holder, slot, owner))
    holder, slot = next(own, (owner, name))
    replaced = ReplacedMethod(getattr(holder, slot), replacement)
    setattr(holder, slot, replaced)
    return replaced


def restore_method(owner: Any, name: str, replaced: ReplacedMethod) -> None:
    """Take a replacement out again, wherever it is by now.

    Where something unknown holds on to it, it lets every call through.

    Args:
        owner: the instance.
        name: name of the method.
        replaced: what `replace_method` returned.
    """
    replaced.replacement = _let_through
    for holder, slot in _slots(owner, name):
        found = getattr(holder, slot)
        if found is replaced:
            _put_back(holder, slot, replaced.method)
        while isinstance(found, ReplacedMethod):
            if found.method is replaced:
                found.method = replaced.method
            found = found.method


def _slots(owner: Any, name: str) -> list[tuple[Any, str]]:
    """The places that hold a method or what is below a hook on it."""
    registry = getattr(owner, "_diffusers_hook", None)
    found: list[tuple[Any, str]] = []
    for reference in getattr(registry, "_fn_refs", ()):
        inner = getattr(reference, "original_forward", None)
        found.append((reference, "forward" if inner is None else "original_forward"))
    if "_old_forward" in vars(owner):
        found.append((owner, "_old_forward"))
    return [*found, (owner, name)] if name == "forward" else [(owner, name)]


def _is_own(holder: Any, slot: str, owner: Any) -> bool:
    """Whether a place holds the instance's own method, or a replacement of it."""
    found = getattr(holder, slot)
    return isinstance(found, ReplacedMethod) or getattr(found, "__self__", None) is owner


def _put_back(holder: Any, slot: str, method: Any) -> None:
    """The method as it was: nothing on the instance where it was the class's own."""
    if getattr(method, "__func__", None) is getattr(type(holder), slot, None):
        delattr(holder, slot)
    else:
        setattr(holder, slot, method)


def _let_through(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return method(*args, **kwargs)


MARK = "_foreseer_attached"
CACHE_MODULES = ("_cache", "pyramid_attention_broadcast")  # of diffusers.hooks
PATCHED = {"enable_teacache": "TeaCache", "magcache_thresh": "MagCache"}
"""What forwards that are put in place of a class's own look up on the model, and whose they are."""
LAST_BLOCK = "last_block"
BEFORE_LAST = "before_last"
PATIENCE = 0.001  # seconds between two looks at what other threads are doing


class Attached:
    """A transformer whose calls go through `route(forward, args, kwargs)` until `remove`.

    Calls that other threads are in the middle of did not; they are waited for, since what is put on
    the transformer afterwards would act on them.

    Args:
        transformer: the host.
        route: see above.

    Raises:
        ValueError: another foreseer session or another cache is on it already.
    """

    def __init__(
        self,
        transformer: nn.Module,
        route: Callable[[Callable, tuple, dict[str, Any]], Any],
    ) -> None:
        refuse_other_caches(transformer)
        if getattr(transformer, MARK, None) is not None:
            raise ValueError("foreseer is already attached to this transformer; detach it first.")
        self.transformer = transformer
        self.replaced = replace_method(
            transformer,
            "forward",
            lambda forward, *args, **kwargs: route(forward, args, kwargs),
        )
        object.__setattr__(transformer, MARK, _Mark())
        while is_called_elsewhere(transformer, self.replaced):
            time.sleep(PATIENCE)

    def remove(self) -> None:
        """Give the transformer its own forward back."""
        restore_method(self.transformer, "forward", self.replaced)
        object.__delattr__(self.transformer, MARK)


class _Mark:
    """Says that a session is attached; a copy of the transformer has none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None


def refuse_other_caches(transformer: nn.Module) -> None:
    """Raise if something else already caches on this transformer.

    Raises:
        ValueError: a cache of diffusers, enabled or applied by hand, cache-dit, or the forwards
            that TeaCache's and MagCache's authors put in place of a class's own.
    """
    found = _other_cache(transformer)
    if found is not None:
        raise ValueError(
            f"{type(transformer).__name__} already has a cache ({found}); take it off first, with "
            "disable_cache() for one of diffusers, cache_dit.disable_cache(pipe), or by giving the "
            "class its own forward and attributes back: two caches on one model would forecast "
            "each other's forecasts."
        )


def _other_cache(transformer: nn.Module) -> str | None:
    config = getattr(transformer, "_cache_config", None)
    if config is not None:
        return type(config).__name__
    if getattr(transformer, "_is_cached", False):
        return "cache-dit"
    for switch, cache in PATCHED.items():
        if getattr(transformer, switch, None) not in (None, False):
            return cache
    for module in transformer.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            if any(word in type(hook).__module__ for word in CACHE_MODULES):
                return type(hook).__name__
    return None


class TrunkSkipper:
    """Run a transformer's forward without its blocks, with a given tensor entering the head."""

    def __init__(self, transformer: nn.Module, trunk: Trunk) -> None:
        self.transformer = transformer
        self.axis = trunk.batch_axis
        self.head = transformer.get_submodule(trunk.head)
        self.blocks = {name: block_list(transformer, name) for name in trunk.block_lists}
        self.empty = {name: SkippedBlocks(blocks) for name, blocks in self.blocks.items()}

    def __call__(
        self,
        forward: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        entering: Callable[[Tensor], Tensor],
    ) -> Any:
        """The output of `forward` with the head's first tensor t replaced by `entering(t)`."""
        enter = functools.partial(_batch_first, entering, self.axis)
        with exchanged(self.transformer, self.blocks, self.empty, self.head, enter):
            return forward(*args, **kwargs)


def _batch_first(entering: Callable[[Tensor], Tensor], axis: int, tensor: Tensor) -> Tensor:
    return entering(tensor.transpose(0, axis)).transpose(0, axis)


@contextlib.contextmanager
def exchanged(
    transformer: nn.Module,
    blocks: Mapping[str, nn.Module],
    others: Mapping[str, nn.Module],
    head: nn.Module,
    entering: Callable[[Tensor], Tensor],
) -> Iterator[None]:
    """Let the forward inside run on other block lists, with another tensor entering the head.

    Args:
        transformer: the host.
        blocks: its own block lists, put back come what may.
        others: what stands in their place.
        head: its head.
        entering: what enters the head, given what would have.
    """
    exchange(transformer, others)
    handle = head.register_forward_pre_hook(replacing(entering), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        exchange(transformer, blocks)


def replacing(entering: Callable[[Tensor], Tensor]) -> Callable:
    """A forward pre-hook that gives a module `entering(t)` for its first tensor t."""
    return functools.partial(_replace_first, entering)


def _replace_first(
    entering: Callable[[Tensor], Tensor], module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    found = first_tensor(args, kwargs)
    assert found is not None  # the tracer chose the head by this tensor
    new = entering(found).to(found.dtype)
    for place, value in enumerate(args):
        if value is found:
            return (*args[:place], new, *args[place + 1 :]), kwargs
    return args, {name: new if value is found else value for name, value in kwargs.items()}


@contextlib.contextmanager
def capturing(transformer: nn.Module, trunk: Trunk | None, taps: set[str]) -> Iterator[dict]:
    """Collect the given trunk taps of the forward run inside; yields a dict filled by its end.

    The blocks carry no hook: where one is looked at, its list is exchanged for the call.

    Args:
        transformer: the host.
        trunk: its facts; None when only `output` is tapped.
        taps: any of `hidden`, `residual`, `before_last` (what enters the last block less what
            enters the first), `blocks.<i>`, `last_block` (its input streams, one entry
            `last_block.<i>` each); `output` is read off the call's result.
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
    if taps - {"hidden", "output"}:
        tapped = _BlockTaps(transformer, trunk, taps, found)
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
    if BEFORE_LAST in taps and found.keys() >= {"trunk_in", stream_tap(0)}:
        if found[stream_tap(0)].shape == found["trunk_in"].shape:
            found[BEFORE_LAST] = found[stream_tap(0)] - found["trunk_in"]


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
        self.streams = trunk.streams
        self.place = trunk.place
        self.axis = trunk.batch_axis
        self.found = found
        names = block_taps(transformer, trunk)
        self.outputs = {block: tap for tap, block in names.items() if tap in taps}
        blocks = list(names.values())
        self.first = blocks[0] if taps & {"residual", BEFORE_LAST} else None
        self.last = blocks[-1] if taps & {LAST_BLOCK, BEFORE_LAST} else None

    def entering(self, block: str, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keep what enters the first and the last block."""
        if block == self.first and (tensor := first_tensor(args, kwargs)) is not None:
            self.found["trunk_in"] = own(tensor.transpose(0, self.axis))
        if block == self.last:
            for number, place in enumerate(self.streams):
                value = args[place] if isinstance(place, int) else kwargs[place]
                self.found[stream_tap(number)] = own(value)

    def leaving(self, block: str, output: Any) -> None:
        """Keep the stream after a block."""
        if block in self.outputs and (stream := stream_of(output, self.place)) is not None:
            self.found[self.outputs[block]] = own(stream.transpose(0, self.axis))


def stream_tap(number: int) -> str:
    """Name under which a stream that enters the last block is captured."""
    return f"{LAST_BLOCK}.{number}"


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
