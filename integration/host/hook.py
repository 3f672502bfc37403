"""The hooks on a transformer: stand in for its forward, or skip its trunk and put a forecast back.

Nothing here decides anything: `Session` (session.py) says what each call does.

Pipelines look at the signature of what they call, users copy and save what is replaced, and other
libraries put wrappers of their own above or below: all of that keeps working.
"""

import contextlib
import copy
import functools
import inspect
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foreseer.integration.host.caller import is_called_elsewhere
from foreseer.integration.host.taps import block_list
from foreseer.integration.host.trunk import (
    SkippedBlocks,
    Trunk,
    UnsupportedHost,
    exchange,
    first_tensor,
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
        self.ladder = bool(trunk.middle)
        self.blocks = trunk_modules(transformer, trunk)
        lists = {name: block_list(transformer, name) for name in trunk.block_lists}
        self.empty = without_middle(trunk, {n: SkippedBlocks(each) for n, each in lists.items()})

    def __call__(
        self,
        forward: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        entering: Callable[[Tensor], Tensor],
    ) -> Any:
        """The output of `forward` with the head's first tensor t replaced by `entering(t)`.

        Raises:
            UnsupportedHost: another network adds to what is skipped of a U-Net.
        """
        if self.ladder:
            refuse_additions(self.transformer, args, kwargs)
        enter = functools.partial(_batch_first, entering, self.axis)
        with exchanged(self.transformer, self.blocks, self.empty, self.head, enter):
            return forward(*args, **kwargs)


def _batch_first(entering: Callable[[Tensor], Tensor], axis: int, tensor: Tensor) -> Tensor:
    return entering(tensor.transpose(0, axis)).transpose(0, axis)


@contextlib.contextmanager
def exchanged(
    transformer: nn.Module,
    blocks: Mapping[str, nn.Module],
    others: Mapping[str, nn.Module | None],
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
    new = as_given(entering(found), found)
    for place, value in enumerate(args):
        if value is found:
            return (*args[:place], new, *args[place + 1 :]), kwargs
    return args, {name: new if value is found else value for name, value in kwargs.items()}


def as_given(tensor: Tensor, given: Tensor) -> Tensor:
    """A tensor in the dtype and memory layout of the one whose place it takes."""
    tensor = tensor.to(given.dtype)
    if given.ndim == 4 and not given.is_contiguous():
        if given.is_contiguous(memory_format=torch.channels_last):
            return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


ADDED = ("additional_residual", "controlnet", "control_")
"""In the names of arguments by which another network adds to what single blocks make."""


def refuse_additions(transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise where another network adds to what blocks make that are skipped.

    Args:
        transformer: the host.
        args: positional arguments of its call.
        kwargs: its keyword arguments.

    Raises:
        UnsupportedHost: one does.
    """
    names = inspect.signature(type(transformer).forward).parameters
    for name, value in (*zip(list(names)[1:], args, strict=False), *kwargs.items()):
        if any(word in name for word in ADDED) and _holds_tensor(value):
            raise UnsupportedHost(
                f"{name} adds to what single blocks of {type(transformer).__name__} make (a "
                "ControlNet or an adapter), and skipped blocks would leave that out; use the "
                "`output` tap, or run without it."
            )


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, Tensor) or (
        isinstance(value, list | tuple) and any(map(_holds_tensor, value))
    )


def trunk_modules(transformer: nn.Module, trunk: Trunk) -> dict[str, nn.Module]:
    """The block lists of a trunk by name, and what runs between those of a U-Net."""
    found: dict[str, nn.Module] = {n: block_list(transformer, n) for n in trunk.block_lists}
    if trunk.middle:
        found[trunk.middle] = transformer.get_submodule(trunk.middle)
    return found


def without_middle(trunk: Trunk, others: Mapping[str, nn.Module]) -> dict[str, nn.Module | None]:
    """What stands in the places of a trunk's lists, and nothing between those of a U-Net."""
    return {**others, trunk.middle: None} if trunk.middle else dict(others)
